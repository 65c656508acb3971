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
        "What it would take: of the pager's 3.5 us a fault, 0.5 us start the handler as the task"
        " that it may become, 0.4 us make a frozen Copy, 0.3 us make the coroutine; a handler"
        " that returns bare bytes, or a plain function for answers that never wait, is that much"
        " cheaper, and a serve thread in C costs nothing of it."
    ),
    "suspend": (
        "What it would take: a suspension costs a task (3 to 4 us to make, enter in asyncio's"
        " books and end) and a turn of the loop or two (asyncio 2.3 us, uvloop 1 us each)."
        " Carrying the answer out and reading on within the task's last step, on every Python,"
        " saves one of the turns and the call-back: 2 to 6 us."
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
