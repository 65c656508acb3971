"""Registering 64 GiB of another process: time, and memory of ours.

Knows: the case and its targets.
Must not know: how a run is made.
"""

from __future__ import annotations

from .build import compile_c
from .contest import python_command, run
from .figures import Figure, Sample, Settings, interleave, main, mebibytes, milliseconds

LENGTH = 64 << 30


def measure(settings: Settings) -> list[Figure]:
    """Take time and memory of one ``Pager.register``."""
    target = [str(compile_c()), "idle", "SOCKET", str(LENGTH)]

    def ours() -> Sample:
        return run(target, python_command(settings, "register"), settings.seconds)[1]

    results = interleave({"ours": ours}, settings.runs)["ours"]
    return [
        Figure.absolute(
            "register 64 GiB, time", results["took_ns"], unit=milliseconds, at_most=50e6
        ),
        Figure.absolute(
            "register 64 GiB, memory held",
            results["resident_bytes"],
            unit=mebibytes,
            at_most=8 << 20,
        ),
        Figure.absolute(
            "register 64 GiB, memory at its peak",
            results["peak_bytes"],
            unit=mebibytes,
            at_most=8 << 20,
        ),
    ]


if __name__ == "__main__":
    main("register", measure)
