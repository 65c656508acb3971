"""Bulk fill in pieces through ``Region.fill``, against UFFDIO_COPY in the same pieces in C.

Knows: the case and its target.
Must not know: how a run is made.
"""

from __future__ import annotations

from collections.abc import Callable

from aiouffd.performer import PIECE_BYTES

from .build import compile_c
from .contest import loops, python_command, run
from .figures import Figure, Sample, Settings, bytes_per_second, interleave, main

LENGTH = 256 << 20
PIECE = PIECE_BYTES
AT_LEAST = 0.9


def measure(settings: Settings) -> list[Figure]:
    """Take the rate of one fill of a whole range."""
    # A page is a fault's worth of work: few faults asked for, little to fill.
    length = min(LENGTH, max(PIECE, settings.faults * (16 << 10) & -4096))
    target = [str(compile_c()), "idle", "SOCKET", str(length)]
    commands = {"floor": [str(compile_c()), "bulk", "SOCKET", str(settings.cpu), str(PIECE)]}
    for loop in loops():
        commands[loop] = python_command(settings, "fill", f"--loop={loop}")

    def contestant(command: list[str]) -> Callable[[], Sample]:
        def rate() -> Sample:
            sample = run(target, command, settings.seconds)[1]
            return {"rate": sample["bytes"] / sample["seconds"]}

        return rate

    results = interleave(
        {name: contestant(command) for name, command in commands.items()}, settings.runs
    )
    return [
        Figure.compare(
            f"fill {length >> 20} MiB in pieces, {loop}, rate",
            ours=results[loop]["rate"],
            floor=results["floor"]["rate"],
            at_least=AT_LEAST,
            unit=bytes_per_second,
        )
        for loop in loops()
    ]


if __name__ == "__main__":
    main("fill", measure)
