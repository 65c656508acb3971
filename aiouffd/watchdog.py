"""Watchdog: which fault is overdue, on which line its handler waits, and is the target alive.

Knows: the ages of faults in flight.
Must not know: how to answer them.

A handler stuck in its source logs nothing by itself, and a thread that waits for ever looks
like a slow one.  So an overdue fault is reported with everything that finds the culprit, and
at its deadline the failure policy takes over.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Final

from .errors import DeadlineExceeded
from .flight import Flight, Stage, where_it_waits

if TYPE_CHECKING:
    from .dispatcher import Dispatcher

log: Final = logging.getLogger("aiouffd")

_ALIVE_EVERY: Final = 1.0  # seconds between questions whether the target is alive


class Watchdog:
    """Looks at the oldest faults when they may be overdue; costs nothing while there is none."""

    def __init__(
        self, dispatcher: Dispatcher, deadline: float | None, warn_after: float | None
    ) -> None:
        """Prepare.

        Args:
            dispatcher: Whose faults to watch.
            deadline: Seconds until the failure policy takes over; None is never.
            warn_after: Seconds until a fault is reported; None is never.
        """
        self._dispatcher = dispatcher
        self.deadline = deadline
        self.warn_after = warn_after
        self._first_look = min((x for x in (deadline, warn_after) if x is not None), default=None)

    def start(self) -> None:
        """Begin to ask whether the target is alive.

        A pidfd shows an exit at once; only an ioctl shows that the target called exec.  With a
        pidfd the questions become rarer and rarer as long as the target is quiet, for hundreds
        of idle targets would wake us all the time: that one called exec is seen at the latest
        when it has been quiet for twice as long.
        """
        self._ask_later(_ALIVE_EVERY)

    def _ask_later(self, delay: float) -> None:
        counters = self._dispatcher.counters
        heard = counters.faults + counters.events
        self._dispatcher.timers.set("alive", delay, partial(self._ask_alive, delay, heard))

    def _ask_alive(self, delay: float, heard: int) -> None:
        if self._dispatcher.uffd.target_alive():
            counters = self._dispatcher.counters
            quiet = heard == counters.faults + counters.events
            known = self._dispatcher.target is not None
            self._ask_later(2 * delay if quiet and known else _ALIVE_EVERY)
        else:
            self._dispatcher.target_is_gone()

    def watch(self) -> None:
        """See that somebody looks when a fault that begins now may be overdue."""
        if self._first_look is not None:
            self._dispatcher.timers.set("watch", self._first_look, self._look)

    def _look(self) -> None:
        dispatcher = self._dispatcher
        now = dispatcher.loop.time()
        next_look: float | None = None
        for flight in tuple(dispatcher.space.in_flight.values()):  # oldest first
            if flight.final or flight.stage in (Stage.HANGING, Stage.ENDED):
                continue
            age = now - flight.started
            if self.deadline is not None and age >= self.deadline:
                text = describe(flight, age)
                dispatcher.recovery.give_up(flight, DeadlineExceeded(text, flight.fault.address))
                continue
            if self.warn_after is not None and age >= self.warn_after and not flight.warned:
                flight.warned = True
                dispatcher.counters.overdue += 1
                log.warning("overdue: %s", describe(flight, age))
            limits = [] if self.deadline is None else [self.deadline]
            if self.warn_after is not None and not flight.warned:
                limits.append(self.warn_after)
            for limit in limits:
                left = limit - age
                next_look = left if next_look is None else min(next_look, left)
        if next_look is not None and self._first_look is not None and not dispatcher.target_gone:
            # A fault that begins meanwhile finds this timer set: it must not fire too late.
            delay = min(max(next_look, 0.001), self._first_look)
            dispatcher.timers.set("watch", delay, self._look)


def describe(flight: Flight, age: float) -> str:
    """Say of a fault in flight: kind, thread, offset, range, age, and where its handler waits.

    Args:
        flight: In flight.
        age: Since its message was read, in seconds.
    """
    fault = flight.fault
    where = where_it_waits(flight.task) if flight.task is not None else "no handler at work"
    thread = f" of thread {fault.thread_id}" if fault.thread_id else ""
    return (
        f"the {fault.kind} fault{thread} at {fault.address:#x} (offset {fault.offset:#x} of"
        f" {flight.region!r}) is {flight.stage.value} since {age:.3f} s; waits at {where}"
    )
