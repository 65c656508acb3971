"""Figures: one seam for whoever wants to see what a pager does, and cheap counters.

Knows: faults, events and outcomes as they are reported.
Must not know: where they go (a log, a dashboard, a test) or how faults are served.

Observer is the only set of hooks: metrics, traces, dashboards and tests all hang on it.
Counters are plain integers of their pager; a histogram entry costs some 90 ns.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from .events import Event, PageFault


class Observer(Protocol):
    """What a pager tells: every call comes in the loop's thread and must not block or raise."""

    def begin(self, fault: PageFault) -> None:
        """A fault was taken up; a handler is about to be asked."""

    def end(self, fault: PageFault, outcome: str, elapsed_ns: int) -> None:
        """A fault has ended.

        Args:
            fault: As it began.
            outcome: What was performed: ``copy``, ``zero``, ``continue``, ``move``,
                ``unprotect``, ``poison``, ``wake``; or ``gone`` (unmapped meanwhile),
                ``killed``, ``hanging``.
            elapsed_ns: Since the message was read.
        """

    def event(self, event: Event) -> None:
        """The address space of the target changed."""

    def failure(self, fault: PageFault, error: Exception) -> None:
        """A fault could not be answered and goes into the failure policy."""


@dataclass(slots=True)
class Counters:
    """What one pager has done since it started; all are counts of faults unless said.

    ``faults`` = ``joined`` + ``ended`` + those in flight, at every moment.
    """

    faults: int = 0  #: messages read that reported a page fault
    joined: int = 0  #: duplicates that waited for a fault already in flight, or just served
    ended: int = 0  #: resolved, gone or failed, each once
    removed: int = 0  #: answered with zeros because the target had removed the page
    parked: int = 0  #: times that the kernel said EAGAIN and the fault had to wait
    already: int = 0  #: times that the kernel said EEXIST: a page was there
    gone: int = 0  #: the memory was unmapped before the answer
    retries: int = 0  #: times that a handler was asked again
    fallbacks: int = 0  #: times that the second handler was asked
    failures: int = 0  #: went into the last action of the failure policy
    overdue: int = 0  #: reported by the watchdog
    queued: int = 0  #: had to wait for a free place among max_in_flight
    events: int = 0  #: messages that reported a change of the address space
    copied_bytes: int = 0  #: bytes installed on demand, in bytes
    filled_bytes: int = 0  #: bytes installed ahead of demand, in bytes

    def as_dict(self) -> dict[str, int]:
        """Give all counters by name."""
        return dataclasses.asdict(self)

    def add(self, other: Counters) -> None:
        """Count what another pager has done as well."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Histogram:
    """Counts of durations in powers of two: bucket n holds [2^(n-1), 2^n) nanoseconds."""

    __slots__ = ("buckets", "count", "total_ns")

    def __init__(self) -> None:
        self.buckets = [0] * 65  # any 64-bit number has its place: no test on the way
        self.count = 0
        self.total_ns = 0

    def add(self, elapsed_ns: int) -> None:
        """Count one duration, in nanoseconds, not negative."""
        self.buckets[elapsed_ns.bit_length()] += 1
        self.count += 1
        self.total_ns += elapsed_ns

    def merge(self, other: Histogram) -> None:
        """Count what another histogram has counted as well."""
        self.buckets = list(map(operator.add, self.buckets, other.buckets))
        self.count += other.count
        self.total_ns += other.total_ns

    def quantile(self, q: float) -> int:
        """Give an upper bound of a quantile, in nanoseconds; 0 if nothing was counted.

        Args:
            q: Between 0 and 1: 0.5 is the median.
        """
        wanted = q * self.count
        seen = 0
        for n, count in enumerate(self.buckets):
            seen += count
            if count and seen >= wanted:
                return 1 << n
        return 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Give (upper bound in nanoseconds, count) of each bucket that is not empty."""
        for n, count in enumerate(self.buckets):
            if count:
                yield 1 << n, count


class Metrics:
    """An Observer that keeps outcomes and a latency histogram."""

    def __init__(self) -> None:
        self.latency = Histogram()
        self.outcomes: dict[str, int] = {}
        self.events: dict[str, int] = {}
        self.failures: dict[str, int] = {}

    def merge(self, other: Metrics) -> None:
        """Count what another observer was told as well."""
        self.latency.merge(other.latency)
        for mine, others in (
            (self.outcomes, other.outcomes),
            (self.events, other.events),
            (self.failures, other.failures),
        ):
            for name, count in others.items():
                mine[name] = mine.get(name, 0) + count

    def begin(self, fault: PageFault) -> None:
        """Nothing to keep."""

    def end(self, fault: PageFault, outcome: str, elapsed_ns: int) -> None:  # noqa: ARG002 - Observer's
        """Count the outcome and its latency."""
        self.latency.add(elapsed_ns)
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def event(self, event: Event) -> None:
        """Count the event by its class."""
        name = type(event).__name__
        self.events[name] = self.events.get(name, 0) + 1

    def failure(self, fault: PageFault, error: Exception) -> None:  # noqa: ARG002 - Observer's
        """Count the failure by its error's class."""
        name = type(error).__name__
        self.failures[name] = self.failures.get(name, 0) + 1
