"""Parking: faults that the kernel would not answer yet, and when to try again.

Knows: that EAGAIN holds up the whole userfaultfd, not one page.
Must not know: what is tried.

Laws of this file:

* EAGAIN is not an error.  The fault is not delivered again, and once the event that holds it
  up has been read no further one need ever come: only a timer of our own gets it going.
* One timer for all, slower each time nothing moved; when the first must wait again, so must
  the others.
* Before each round the reader runs: what holds us up may be an unread event.
* A target that changes its memory without pause must not starve its other threads.  The
  kernel lets fills through only in the moment between the read of one event and the next
  change, a few microseconds later: so while events come a round is a burst, and each read
  is followed by tries at once.
"""

from __future__ import annotations

import asyncio
import errno
from functools import partial
from typing import TYPE_CHECKING, Final

from .errors import HandlerError, LayoutChanging
from .flight import Flight, Stage
from .performer import span_of

if TYPE_CHECKING:
    from .dispatcher import Dispatcher

_FIRST: Final = 0.0005  # seconds until the first retry, doubling ...
_MAX: Final = 0.02  # ... up to this
_BURST: Final = 16  # reads in a round while events keep coming, each followed by ...
_TRIES: Final = 20  # ... so many tries: its thread wakes up meanwhile, runs, and changes again
_TURNS: Final = 16  # of the loop, that fills ahead of demand try before each longer wait
_QUIET: Final = 2  # reads in a row without an event that end a burst


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
        counters = dispatcher.counters
        before = len(self._flights)
        dispatcher.reader.read_all()
        if not self._try_all():
            return
        quiet = 0
        for _ in range(_BURST):
            events = counters.events
            if quiet == _QUIET or not self._try_first():
                break
            quiet = 0 if counters.events != events else quiet + 1
        if not self._flights:
            self._delay = _FIRST
            return
        if len(self._flights) >= before:
            self._delay = min(self._delay * 2, _MAX)
        dispatcher.timers.set("park", self._delay, self._retry)

    def _try_all(self) -> bool:
        """Try each parked fault, until one must wait again.

        Returns:
            Whether the pager lives.
        """
        try:
            for flight in tuple(self._flights):
                if flight not in self._flights:
                    continue  # the end of another took it along
                if not self._dispatcher.retry_parked(flight):
                    break
        except Exception as error:
            self._dispatcher.crash(error)
            return False
        return True

    def _try_first(self) -> bool:
        """Read a batch, and try the oldest fault in the moment that this opens.

        Returns:
            Whether there was one.
        """
        dispatcher = self._dispatcher
        for flight in self._flights:
            if flight.stage is Stage.PARKED and flight.resolution is not None:
                try:
                    where = span_of(flight.resolution, flight.fault)
                except HandlerError:  # carrying it out will say so
                    return False
                retry = partial(dispatcher.retry_parked, flight, _TRIES)
                dispatcher.reader.read_and_try(where, retry)
                return not dispatcher.target_gone
        return False


class Patience:
    """Waits between tries while the layout changes, for coroutines: doubling, with an end."""

    def __init__(self, limit: float | None) -> None:
        """Begin.

        Args:
            limit: Seconds that the waits may take together; None is for ever.
        """
        self._delay = _FIRST
        self._left = limit
        self._turns = 0

    async def wait(self) -> None:
        """Wait for some turns of the loop, in which events are read, then ever longer.

        Raises:
            LayoutChanging: The waits together would exceed the limit.

        Cancellation: nothing has happened.
        """
        self._turns += 1
        if self._turns % _TURNS:
            await asyncio.sleep(0)
            return
        if self._left is not None:
            self._left -= self._delay
            if self._left < 0:
                raise LayoutChanging("waiting for the target's layout", errno.EAGAIN, 0, 0)
        await asyncio.sleep(self._delay)
        self._delay = min(self._delay * 2, _MAX)
