"""Many ranges in one pager, many userfaultfds on one loop: the latency of a fault.

Knows: the cases and their targets.
Must not know: how a run is made.

The compared runs touch the same addresses in the same order; only what is registered differs:
every range by itself, or the whole mapping as one.  Going *round*, each fault is in another
range than the last, which is the worst order; in *blocks*, a range is touched to its end.
"""

from __future__ import annotations

from .contest import faulting, floor_command, loops, python_command
from .figures import Figure, Settings, interleave, main, microseconds

RANGES = 10_000
UFFDS = 1_000
AT_MOST = 1.2
REMEDY = (
    "What it would take: the next fault being in another userfaultfd, reading again finds nothing:"
    " an epoll that all of a loop share is asked instead, which costs more, and the next pager's"
    " objects have left the caches since its last fault."
)


def measure(settings: Settings) -> list[Figure]:
    """Take the median latency of a fault, against that of one range and one userfaultfd."""
    contestants = {}
    for ranges, uffds, blocks in ((RANGES, 1, False), (UFFDS, UFFDS, False), (UFFDS, UFFDS, True)):
        for whole in (False, True):
            commands = {"floor": floor_command(settings, whole=whole)}
            for loop in loops():
                options = [f"--loop={loop}", *(["--whole"] if whole else [])]
                commands[loop] = python_command(settings, "pager", *options)
            for who, command in commands.items():
                contestants[f"{ranges} {blocks} {who} {whole}"] = faulting(
                    settings, command, ranges=ranges, uffds=1 if whole else uffds, blocks=blocks
                )
    results = interleave(contestants, settings.runs)
    figures = []
    for who in (*loops(), "floor"):
        for ranges, blocks, case, remedy in (
            (RANGES, False, f"{RANGES:,} ranges in one pager, round", ""),
            (UFFDS, False, f"{UFFDS:,} userfaultfds on one loop, round", REMEDY),
            (UFFDS, True, f"{UFFDS:,} userfaultfds on one loop, in blocks", ""),
        ):
            figures.append(
                Figure.compare(
                    f"{case}, {'C alone' if who == 'floor' else who}, p50 to that of one",
                    ours=results[f"{ranges} {blocks} {who} False"]["p50_ns"],
                    floor=results[f"{ranges} {blocks} {who} True"]["p50_ns"],
                    at_most=None if who == "floor" else AT_MOST,
                    unit=microseconds,
                    remedy=remedy,
                )
            )
    return figures


if __name__ == "__main__":
    main("many", measure)
