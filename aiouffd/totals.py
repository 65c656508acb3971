"""What a server's sessions have done together, those that have ended included.

Knows: the figures of sessions, and how to add them up.
Must not know: servers, who asks, in which format.

Laws of this file:

* Nothing is counted twice or lost: a session is added once, when it has ended, and the living
  are added to a copy.
* Hundreds of sessions are not added up in one go (law 10 of the pager): the loop turns
  after every few.  A session is added as it is at one moment, so the sums balance all the same.
* The accounts balance at every moment: ``faults`` = ``joined`` + ``ended`` + in flight, and
  ``ended`` = the sum of the outcomes = the count of latencies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final, Self

from .metrics import Counters, Metrics
from .prefetch import PrefetchFigures
from .session import Session

_AT_ONCE: Final = 16  # sessions, at some 25 us each, before the loop turns


class Totals:
    """Sums over sessions.

    Attributes:
        counters: Of all pagers.
        metrics: Outcomes, events, errors and latencies of all.
        prefetch: What was brought by working sets and in the background.
        in_flight: Faults that have begun and not ended.
        failures: Faults that ended in the policy's last action, by that action.
        sessions: How many there are or were, by state.

    Sharing: the loop's thread.
    """

    def __init__(self) -> None:
        self.counters = Counters()
        self.metrics = Metrics()
        self.prefetch = PrefetchFigures()
        self.in_flight = 0
        self.failures: dict[str, int] = {}
        self.sessions: dict[str, int] = {}

    def add(self, session: Session) -> None:
        """Add what a session has done so far."""
        counters = session.counters()
        self.counters.add(counters)
        self.metrics.merge(session.metrics)
        self.prefetch.add(session.prefetch.figures)
        self.in_flight += session.in_flight
        if counters.failures:
            action = session.service.failure.then.value
            self.failures[action] = self.failures.get(action, 0) + counters.failures
        state = session.state.name.lower()
        self.sessions[state] = self.sessions.get(state, 0) + 1

    def plus(self, sessions: Iterable[Session]) -> Self:
        """Give the sums with these sessions added; this object stays as it is."""
        total = self._copy()
        for session in sessions:
            total.add(session)
        return total

    async def plus_in_steps(self, sessions: Iterable[Session]) -> Self:
        """Do the same without holding the loop.

        What sessions do meanwhile may be in it or not; one that ends meanwhile is added once.

        Cancellation: nothing has been done.
        """
        total = self._copy()
        for number, session in enumerate(tuple(sessions), 1):
            total.add(session)
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
        return total

    def _copy(self) -> Self:
        total = type(self)()
        total.counters.add(self.counters)
        total.metrics.merge(self.metrics)
        total.prefetch.add(self.prefetch)
        total.in_flight = self.in_flight
        total.failures.update(self.failures)
        total.sessions.update(self.sessions)
        return total
