"""What a migration cost: figures of both sides, and how they came about over time.

Knows: numbers and their names.
Must not know: connections, memory; who reads them.
"""

from __future__ import annotations

import dataclasses
from array import array
from dataclasses import dataclass, field
from typing import Any, Final

from ..events import Event, PageFault

_MOST_STALLS: Final = 1 << 20  # whose times are kept one by one
_MOST_SAMPLES: Final = 4096


@dataclass(frozen=True, slots=True)
class Round:
    """One pass of pre-copy.

    Attributes:
        number: From 1 on.
        seconds: What it took.
        sent_bytes: On the connections, in bytes.
        dirty_bytes: What the program wrote meanwhile, in bytes of whole pages.
        dirty_rate: In bytes per second.
    """

    number: int
    seconds: float
    sent_bytes: int
    dirty_bytes: int
    dirty_rate: float


@dataclass(frozen=True, slots=True)
class Sample:
    """Where a migration stood at one moment.

    Attributes:
        seconds: Since it began.
        stage: See ``outgoing.Stage``.
        sent_bytes: On the connections so far.
        left_bytes: Of memory, still to be sent.
        dirty_rate: As of the last round, in bytes per second.
        demand: Pages that were asked for so far.
    """

    seconds: float
    stage: str
    sent_bytes: int
    left_bytes: int
    dirty_rate: float
    demand: int


@dataclass(slots=True)
class SourceFigures:
    """What the source has seen."""

    memory_bytes: int = 0  #: of all regions
    sent_bytes: int = 0  #: on the connections, heads and all
    page_bytes: int = 0  #: of memory that were sent with their contents, each time
    zero_bytes: int = 0  #: of memory that were only said to be zeros, each time
    again_bytes: int = 0  #: of memory that were sent again after a connection broke
    demand: int = 0  #: runs that the destination asked for
    demand_bytes: int = 0  #: in these
    downtime: float = 0.0  #: seconds from the order to stop until it was said to run
    seconds: float = 0.0  #: in all
    connections: int = 0  #: pairs of them
    disconnected: float = 0.0  #: seconds without one, after the first
    rounds: list[Round] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Give all by name; ``sent_over_memory`` besides."""
        value = dataclasses.asdict(self)
        value["sent_over_memory"] = (
            self.sent_bytes / self.memory_bytes if self.memory_bytes else 0.0
        )
        return value

    def sample(self, sample: Sample) -> None:
        """Keep a moment; when there are too many, every second one goes."""
        self.samples.append(sample)
        if len(self.samples) > _MOST_SAMPLES:
            del self.samples[1::2]


class Stalls:
    """An Observer: how long which thread has waited for its memory.

    Attributes:
        by_thread: Seconds, by thread id (0 where the userfaultfd has no THREAD_ID).
        failures: Faults that went into the failure policy.
    """

    def __init__(self) -> None:
        self.by_thread: dict[int, float] = {}
        self.failures = 0
        self._times = array("Q")  # nanoseconds

    def begin(self, fault: PageFault) -> None:
        """Nothing to keep."""

    def end(self, fault: PageFault, outcome: str, elapsed_ns: int) -> None:  # noqa: ARG002 - Observer's
        """Add a stall to its thread's."""
        thread = fault.thread_id
        self.by_thread[thread] = self.by_thread.get(thread, 0.0) + elapsed_ns * 1e-9
        if len(self._times) < _MOST_STALLS:
            self._times.append(elapsed_ns)

    def event(self, event: Event) -> None:
        """Nothing to keep."""

    def failure(self, fault: PageFault, error: Exception) -> None:  # noqa: ARG002 - Observer's
        """Count it."""
        self.failures += 1

    def as_dict(self) -> dict[str, Any]:
        """Give faults, quantiles in seconds, and the stall of each thread in seconds."""
        times = sorted(self._times)
        count = len(times)

        def quantile(q: float) -> float:
            return times[min(int(q * count), count - 1)] * 1e-9 if count else 0.0

        return {
            "faults": count,
            "failures": self.failures,
            "p50": quantile(0.5),
            "p99": quantile(0.99),
            "longest": quantile(1.0),
            "stall": sum(self.by_thread.values()),
            "stall_by_thread": {str(thread): each for thread, each in self.by_thread.items()},
        }
