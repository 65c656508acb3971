"""Parking: faults that the kernel would not answer yet, and when to try again.

Knows: that EAGAIN holds up the whole userfaultfd, not one page.
Must not know: what is tried.

Laws of this file:

* EAGAIN is not an error.  The fault is not delivered again, and once the event that holds it
  up has been read no further one need ever come: only a timer of our own gets it going.
* One timer for all, slower each time nothing moved; when the first must wait again, so must
  the others.
* Before each round the reader runs: what holds us up may be an unread event.
"""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Final

from .errors import LayoutChanging
from .flight import Flight, Stage

if TYPE_CHECKING:
    from .dispatcher import Dispatcher

_FIRST: Final = 0.0005  # seconds until the first retry, doubling ...
_MAX: Final = 0.02  # ... up to this


class Parking:
    """The parked faults of one pager, oldest first."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._flights: dict[Flight, None] = {}
        self._delay = _FIRST

    def __len__(self) -> int:
        return len(self._flights)

    def add(self, flight: Flight, stage: Stage = Stage.PARKED) -> None:
        """Let a fault wait for the layout to settle."""
        if flight not in self._flights:
            self._dispatcher.counters.parked += 1
            self._flights[flight] = None
        flight.stage = stage
        self._dispatcher.timers.set("park", self._delay, self._retry)

    def discard(self, flight: Flight) -> None:
        """Take a fault out, if it is here."""
        self._flights.pop(flight, None)

    def clear(self) -> None:
        """Forget all of them."""
        self._flights.clear()

    def _retry(self) -> None:
        dispatcher = self._dispatcher
        dispatcher.reader.read_all()
        before = len(self._flights)
        try:
            for flight in tuple(self._flights):
                if flight not in self._flights:
                    continue  # the end of another took it along
                if not dispatcher.retry_parked(flight):
                    break
        except Exception as error:
            dispatcher.crash(error)
            return
        if not self._flights:
            self._delay = _FIRST
            return
        if len(self._flights) >= before:
            self._delay = min(self._delay * 2, _MAX)
        dispatcher.timers.set("park", self._delay, self._retry)


class Patience:
    """Waits between tries while the layout changes, for coroutines: doubling, with an end."""

    def __init__(self, limit: float | None) -> None:
        """Begin.

        Args:
            limit: Seconds that the waits may take together; None is for ever.
        """
        self._delay = _FIRST
        self._left = limit

    async def wait(self) -> None:
        """Wait a little longer than the last time.

        Raises:
            LayoutChanging: The waits together would exceed the limit.

        Cancellation: nothing has happened.
        """
        if self._left is not None:
            self._left -= self._delay
            if self._left < 0:
                raise LayoutChanging("waiting for the target's layout", errno.EAGAIN, 0, 0)
        await asyncio.sleep(self._delay)
        self._delay = min(self._delay * 2, _MAX)
