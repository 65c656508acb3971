"""Sixteen threads of one process faulting at once: faults per second.

Knows: the case and its target.
Must not know: how a run is made.
"""

from __future__ import annotations

from .contest import faulting, floor_command, loops, python_command
from .figures import Figure, Settings, faults_per_second, interleave, main

THREADS = 16
AT_LEAST = 0.6


def measure(settings: Settings) -> list[Figure]:
    """Take the rate."""
    contestants = {"floor": faulting(settings, floor_command(settings), threads=THREADS)}
    for loop in loops():
        for kind in ("pager", "suspend"):
            command = python_command(settings, kind, f"--loop={loop}")
            contestants[f"{kind} {loop}"] = faulting(settings, command, threads=THREADS)
    results = interleave(contestants, settings.runs)
    figures = []
    for loop in loops():
        for kind, case in (("pager", "returns at once"), ("suspend", "suspends once")):
            figures.append(
                Figure.compare(
                    f"{THREADS} threads, handler {case}, {loop}, rate",
                    ours=results[f"{kind} {loop}"]["per_second"],
                    floor=results["floor"]["per_second"],
                    at_least=AT_LEAST if kind == "pager" else None,
                    unit=faults_per_second,
                    remedy="What it would take: a serve thread in C, or one process per CPU.",
                )
            )
    return figures


if __name__ == "__main__":
    main("threads", measure)
