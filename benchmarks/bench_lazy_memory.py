"""Lazy memory within a process: a page touched for the first time, against a C handler thread.

Knows: the cases and their targets.
Must not know: how a touch is timed.

Everything runs on one CPU: between two idle virtual CPUs the wake-up is all one would measure.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from .build import compile_c
from .contest import alone, loops
from .figures import Figure, Sample, Settings, interleave, main, microseconds

#: What the median may be, as a multiple of the floor's.
TARGETS = {"inline": 1.3, "loop": 5.0}
CASES = {"inline": "plain function, in the faulting thread", "loop": "coroutine, on the loop"}
REMEDIES = {
    "inline": "Most of it is the signal, the page's copy and the way into Python and back: it"
    " would take compiled code in the trampoline.",
    "loop": "Most of it is two changes of thread, each with a change of the GIL's owner: it"
    " would take a thread that serves without the GIL, or an answer in the faulting thread.",
}


def measure(settings: Settings) -> list[Figure]:
    """Take the median time of a first touch."""
    cpu, faults = str(max(settings.cpu, 0)), str(settings.faults)
    contestants: dict[str, Callable[[], Sample]] = {
        "floor": alone([str(compile_c("lazy_floor.c")), cpu, faults], settings.seconds)
    }
    for kind in CASES:
        for loop in loops() if kind == "loop" else ["asyncio"]:
            command = [sys.executable, "-m", "benchmarks.lazy_touching", kind, loop, cpu, faults]
            contestants[f"{kind} {loop}"] = alone(command, settings.seconds)
    results = interleave(contestants, settings.runs)
    figures = []
    for name in contestants:
        if name == "floor":
            continue
        kind, loop = name.split()
        for value, shown in (("p50_ns", "p50"), ("p99_ns", "p99")):
            figures.append(
                Figure.compare(
                    f"lazy memory, {CASES[kind]}"
                    + (f", {loop}" if kind == "loop" else "")
                    + f", {shown}",
                    ours=results[name][value],
                    floor=results["floor"][value],
                    at_most=TARGETS[kind] if shown == "p50" else None,
                    unit=microseconds,
                    remedy=REMEDIES[kind],
                )
            )
    return figures


if __name__ == "__main__":
    main("lazy_memory", measure)
