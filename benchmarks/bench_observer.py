"""What watching costs: counters, the latency histogram, an observer on every fault.

Knows: how to time a call of nanoseconds.
Must not know: a kernel; nothing faults here.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable

from aiouffd.events import PageFault
from aiouffd.metrics import Counters, Histogram, Metrics

from .figures import Figure, Settings, interleave, main, nanoseconds


def measure(settings: Settings) -> list[Figure]:
    """Take the time of what happens per fault."""
    fault = PageFault(4096, 0, 4096)
    counters, histogram, metrics = Counters(), Histogram(), Metrics()

    def nothing() -> None:
        pass

    def count() -> None:
        counters.faults += 1

    def add() -> None:
        histogram.add(9_000)

    def observe() -> None:
        metrics.begin(fault)
        metrics.end(fault, "copy", 9_000)

    def timed(call: Callable[[], None]) -> Callable[[], dict[str, float]]:
        return lambda: {"ns": timeit.timeit(call, number=settings.faults) / settings.faults * 1e9}

    calls = {"nothing": nothing, "count": count, "add": add, "observe": observe}
    results = interleave({name: timed(call) for name, call in calls.items()}, settings.runs)
    empty = results["nothing"]["ns"]
    return [
        Figure.absolute(
            case,
            [max(0.0, a - b) for a, b in zip(results[name]["ns"], empty, strict=True)],
            unit=nanoseconds,
        )
        for name, case in (
            ("count", "one counter"),
            ("add", "one entry of the latency histogram"),
            ("observe", "one fault seen by Metrics (begin and end)"),
        )
    ]


if __name__ == "__main__":
    main("observer", measure)
