"""What a migration cost: figures of both sides, and how they came about over time.

Knows: numbers and their names.
Must not know: connections, memory; who reads them.

Law of this file: what the other side tells of itself has the types that it should have, or is left
out: who shows it need not look again.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any, Final

from ..events import Event, PageFault
from .wire import text_of

_MOST: Final = 1 << 63  # that a number from the other side may be
_MOST_SAMPLES: Final = 4096
_MOST_ROUNDS: Final = 64  # that are told to the other side
_MOST_THREADS: Final = 512  # that are named; the longest waiting of them
_STEPS: Final = 200  # of a timeline
_STEP: Final = 0.05  # seconds, at first
_OWN_LINES: Final = 64  # threads that are kept apart in a timeline, from the first on ...
_SHOWN_LINES: Final = 16  # ... and those that have waited longest, which are told


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
        stage: See ``stages.Stage``.
        sent_bytes: On the connections so far.
        page_bytes: Of memory, sent with their contents so far.
        zero_bytes: Of memory, said to be zeros so far.
        left_bytes: Of memory, still to be sent.
        dirty_rate: As of the last round, in bytes per second.
        demand: Pages that were asked for so far.
    """

    seconds: float
    stage: str
    sent_bytes: int
    page_bytes: int
    zero_bytes: int
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
    stopped_after: float = 0.0  #: seconds from the beginning until the order to stop
    downtime: float = 0.0  #: seconds from the order to stop until it was said to run
    seconds: float = 0.0  #: in all
    connections: int = 0  #: pairs of them
    disconnected: float = 0.0  #: seconds without one, after the first
    rounds: list[Round] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def as_dict(self, *, short: bool = False) -> dict[str, Any]:
        """Give all by name; ``sent_over_memory`` besides.

        Args:
            short: Without the samples, and the last rounds only: what one frame can carry.
        """
        value = dataclasses.asdict(self)
        value["sent_over_memory"] = (
            self.sent_bytes / self.memory_bytes if self.memory_bytes else 0.0
        )
        if short:
            del value["samples"], value["rounds"][:-_MOST_ROUNDS]
        return value

    def sample(self, sample: Sample) -> None:
        """Keep a moment; when there are too many, every second one goes."""
        self.samples.append(sample)
        if len(self.samples) > _MOST_SAMPLES:
            del self.samples[1::2]


class Times:
    """Durations, counted in steps of at most a sixteenth of what they are.

    A quantile is then right to 3 per cent, of any number of durations, in constant memory.
    """

    __slots__ = ("_counts", "count", "longest_ns")

    def __init__(self) -> None:
        self.count = 0
        self.longest_ns = 0
        self._counts: dict[int, int] = {}

    def add(self, elapsed_ns: int) -> None:
        """Count one, in nanoseconds, not negative."""
        shift = max(elapsed_ns.bit_length() - 5, 0)
        key = shift << 5 | elapsed_ns >> shift
        self._counts[key] = self._counts.get(key, 0) + 1
        self.count += 1
        self.longest_ns = max(self.longest_ns, elapsed_ns)

    def quantile(self, q: float) -> float:
        """Give a quantile in seconds; 0 if nothing was counted.

        Args:
            q: Between 0 and 1: 0.5 is the median.
        """
        wanted, seen = q * (self.count - 1), 0
        for key in sorted(self._counts):
            seen += self._counts[key]
            if seen > wanted:
                shift, step = key >> 5, key & 31
                middle = (step << shift) + ((1 << shift) >> 1)
                return min(middle, self.longest_ns) * 1e-9
        return 0.0

    @property
    def longest(self) -> float:
        """The longest, in seconds."""
        return self.longest_ns * 1e-9


class Timeline:
    """When threads have waited, in steps of equal length; as time goes on they become longer.

    Attributes:
        step: Of so many seconds.
        ran_after: Seconds from the beginning, until which the program was said to run.
    """

    def __init__(self) -> None:
        self.step = _STEP
        self.ran_after = 0.0
        self._faults: list[int] = []  # that ended in each step
        self._stall: list[dict[int, float]] = []  # seconds in each step, by thread; -1: others
        self._threads: set[int] = set()

    def add(self, thread: int, began: float, ended: float) -> None:
        """Add a wait, which may reach over several steps.

        Args:
            thread: Whose.
            began: Seconds from the timeline's beginning; before it is as at it.
            ended: The same.
        """
        began, ended = max(began, 0.0), max(ended, 0.0)
        while ended >= self.step * _STEPS:
            self._widen()
        if thread not in self._threads:
            if len(self._threads) < _OWN_LINES:
                self._threads.add(thread)
            else:
                thread = -1
        first, last = int(began / self.step), int(ended / self.step)
        while len(self._faults) <= last:
            self._faults.append(0)
            self._stall.append({})
        self._faults[last] += 1
        for number in range(first, last + 1):
            start = number * self.step
            part = min(ended, start + self.step) - max(began, start)
            if part > 0:
                stall = self._stall[number]
                stall[thread] = stall.get(thread, 0.0) + part

    def _widen(self) -> None:
        """Make one step of two."""
        self.step *= 2
        self._faults = [sum(self._faults[at : at + 2]) for at in range(0, len(self._faults), 2)]
        merged = self._stall[::2]
        for one, other in zip(merged, self._stall[1::2], strict=False):
            for thread, each in other.items():
                one[thread] = one.get(thread, 0.0) + each
        self._stall = merged

    def as_dict(self) -> dict[str, Any]:
        """Give the step, and in each faults and seconds of stall by thread (``others`` too)."""
        sums: dict[int, float] = {}
        for each in self._stall:
            for thread, stall in each.items():
                sums[thread] = sums.get(thread, 0.0) + stall
        shown = sorted(sums.keys() - {-1}, key=lambda one: -sums[one])[:_SHOWN_LINES]
        lines = {
            str(thread): [round(each.get(thread, 0.0), 5) for each in self._stall]
            for thread in shown
        }
        if len(shown) < len(sums):
            lines["others"] = [
                round(sum(stall for one, stall in each.items() if one not in shown), 5)
                for each in self._stall
            ]
        return {
            "step": self.step,
            "ran_after": self.ran_after,
            "faults": list(self._faults),
            "stall": lines,
        }


class Stalls:
    """An Observer: how long which thread has waited for its memory.

    Where several threads wait for the same page, it is the first one's wait that is seen.  A
    fault may end in our books a moment after its thread was woken, which may wait for the next
    page by then: a thread's time is never counted twice.

    Attributes:
        by_thread: Seconds, by thread id (0 where the userfaultfd has no THREAD_ID).
        failures: Faults that went into the failure policy.
        times: Of all faults.
        network: Of those for which the source was asked: demand faults.
        timeline: From the switch on.
    """

    def __init__(self) -> None:
        self.by_thread: dict[int, float] = {}
        self.failures = 0
        self.times = Times()
        self.network = Times()
        self.timeline = Timeline()
        self._began_ns = time.perf_counter_ns()
        self._ended_ns: dict[int, int] = {}  # when a thread's last wait ended

    def note_switched(self) -> None:
        """Let the timeline begin: from now on the program may run."""
        self._began_ns = time.perf_counter_ns()

    def note_running(self) -> None:
        """Take note that it was said to run; threads of it may have waited before."""
        self.timeline.ran_after = (time.perf_counter_ns() - self._began_ns) * 1e-9

    def begin(self, fault: PageFault) -> None:
        """Nothing to keep."""

    def end(self, fault: PageFault, outcome: str, elapsed_ns: int) -> None:  # noqa: ARG002 - Observer's
        """Add a stall to its thread's."""
        thread, now_ns = fault.thread_id, time.perf_counter_ns()
        self.times.add(elapsed_ns)
        if thread:
            elapsed_ns = min(elapsed_ns, now_ns - self._ended_ns.get(thread, 0))
            self._ended_ns[thread] = now_ns
        stall = elapsed_ns * 1e-9
        self.by_thread[thread] = self.by_thread.get(thread, 0.0) + stall
        now = (now_ns - self._began_ns) * 1e-9
        self.timeline.add(thread, now - stall, now)

    def event(self, event: Event) -> None:
        """Nothing to keep."""

    def failure(self, fault: PageFault, error: Exception) -> None:  # noqa: ARG002 - Observer's
        """Count it."""
        self.failures += 1

    def as_dict(self, *, timeline: bool = False) -> dict[str, Any]:
        """Give faults, quantiles in seconds, and the stall of each thread in seconds.

        Args:
            timeline: With it.
        """
        threads = sorted(self.by_thread.items(), key=lambda item: -item[1])
        value: dict[str, Any] = {
            "faults": self.times.count,
            "failures": self.failures,
            "p50": self.times.quantile(0.5),
            "p99": self.times.quantile(0.99),
            "longest": self.times.longest,
            "demand_faults": self.network.count,
            "demand_p50": self.network.quantile(0.5),
            "demand_p99": self.network.quantile(0.99),
            "demand_longest": self.network.longest,
            "stall": sum(self.by_thread.values()),
            "stall_by_thread": {str(each): stall for each, stall in threads[:_MOST_THREADS]},
        }
        if timeline:
            value["timeline"] = self.timeline.as_dict()
        return value


_ANY: Final = "*"  # in a pattern: keys of any name
_OF_SOURCE: Final[dict[str, Any]] = {
    "stage": "",
    "round": 0,
    "left_bytes": 0,
    "dirty_rate": 0,
    "figures": SourceFigures().as_dict(short=True)
    | {"rounds": [dataclasses.asdict(Round(0, 0, 0, 0, 0))]},
}
_OF_DESTINATION: Final[dict[str, Any]] = Stalls().as_dict() | {
    "stage": "",
    "received_bytes": 0,
    "left_bytes": 0,
    "stall_by_thread": {_ANY: 0},
    "timeline": {"step": 0, "ran_after": 0, "faults": [0], "stall": {_ANY: [0]}},
}


def told_by_source(value: dict[str, Any]) -> dict[str, Any]:
    """Take what a source says of itself, as far as it is what it should be."""
    told: dict[str, Any] = _taken(value, _OF_SOURCE)
    figures = told.get("figures", {})
    if "rounds" in figures:
        whole = _OF_SOURCE["figures"]["rounds"][0].keys()
        figures["rounds"] = [each for each in figures["rounds"] if each.keys() == whole]
    return told


def told_by_destination(value: dict[str, Any]) -> dict[str, Any]:
    """Take what a destination says of itself, as far as it is what it should be."""
    told: dict[str, Any] = _taken(value, _OF_DESTINATION)
    timeline = told.get("timeline")
    if timeline is not None and (
        timeline.keys() != _OF_DESTINATION["timeline"].keys()
        or not timeline["step"] > 0
        or any(len(each) != len(timeline["faults"]) for each in timeline["stall"].values())
    ):
        del told["timeline"]
    return told


def _taken(value: object, pattern: object) -> Any:
    """Take what has the types of a pattern; None is nothing."""
    match pattern:
        case str():
            return text_of(value) if isinstance(value, str) else None
        case list():
            parts = value if isinstance(value, list) else ()
            return [part for each in parts if (part := _taken(each, pattern[0])) is not None]
        case dict():
            if not isinstance(value, dict):
                return None
            taken = {
                text_of(key): _taken(each, pattern[_ANY] if _ANY in pattern else pattern[key])
                for key, each in value.items()
                if _ANY in pattern or key in pattern
            }
            return {key: each for key, each in taken.items() if each is not None}
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < _MOST else None  # which neither nan nor infinity is
