"""Fault to resume: one thread, one 4 KiB page at a time, through the whole pager.

Knows: the cases and their targets.
Must not know: how a run is made.
"""

from __future__ import annotations

from collections.abc import Callable

from .contest import faulting, floor_command, loops, python_command
from .figures import Figure, Sample, Settings, interleave, main, microseconds

#: (handler, loop): what its median may be, as a multiple of the floor's.
TARGETS = {
    ("pager", "asyncio"): 1.5,
    ("pager", "uvloop"): 1.4,
    ("suspend", "asyncio"): 2.6,
    ("suspend", "uvloop"): 2.0,
}
REMEDIES = {
    "pager": (
        "What it would take: of the 2.5 us that the pager adds to the bare reader, 0.5 us start the"
        " handler as the task that it may become, 0.25 us make a Copy, 0.3 us make and end"
        " the coroutine. Bare bytes save the Copy; a serve thread in C would save all of it."
    ),
    "suspend": (
        "What it would take: a suspension costs a task, a flight in the pager's books, a call-back"
        " at the task's end and a turn of the loop. A task that has served its fault needs no"
        " call-back, and a flight could be smaller; how much both save is not measured yet."
    ),
}
CASES = {
    "pager": "handler returns at once",
    "suspend": "handler suspends once",
    "buffer": "handler returns bare bytes",
    "observed": "handler returns at once, with Metrics",
    "raw": "no pager: reader and ioctl alone",
}


def measure(settings: Settings) -> list[Figure]:
    """Take the median latency of a fault."""
    contestants: dict[str, Callable[[], Sample]] = {
        "floor": faulting(settings, floor_command(settings))
    }
    for loop in loops():
        for kind in CASES:
            options = [f"--loop={loop}", *(["--observed"] if kind == "observed" else [])]
            command = python_command(settings, "pager" if options[1:] else kind, *options)
            contestants[f"{kind} {loop}"] = faulting(settings, command)
    results = interleave(contestants, settings.runs)
    figures = []
    for kind, case in CASES.items():
        for loop in loops():
            for value, name in (("p50_ns", "p50"), ("p99_ns", "p99")):
                figures.append(
                    Figure.compare(
                        f"{case}, {loop}, {name}",
                        ours=results[f"{kind} {loop}"][value],
                        floor=results["floor"][value],
                        at_most=TARGETS.get((kind, loop)) if name == "p50" else None,
                        unit=microseconds,
                        remedy=REMEDIES.get(kind, ""),
                    )
                )
    return figures


if __name__ == "__main__":
    main("fault", measure)
