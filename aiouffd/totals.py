"""What a server's sessions have done together, those that have ended included.

Knows: the figures of sessions, and how to add them up.
Must not know: servers, who asks, in which format.

Laws of this file:

* Nothing is counted twice or lost: a session is added once, when it has ended, and the living
  are added to a copy.
* The accounts balance at every moment: ``faults`` = ``joined`` + ``ended`` + in flight, and
  ``ended`` = the sum of the outcomes = the count of latencies.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from .metrics import Counters, Metrics
from .prefetch import PrefetchFigures
from .session import Session


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
        total = type(self)()
        total.counters.add(self.counters)
        total.metrics.merge(self.metrics)
        total.prefetch.add(self.prefetch)
        total.in_flight = self.in_flight
        total.failures.update(self.failures)
        total.sessions.update(self.sessions)
        for session in sessions:
            total.add(session)
        return total
