"""The same image by page faults, through FUSE, and as a plain private mapping of a local file.

Knows: the cases.
Must not know: how a run is made.

FUSE with pyfuse3 is what a Python user would reach for otherwise; a plain ``MAP_PRIVATE`` needs
no server at all, and is the better tool whenever the image is a local file of 4 KiB pages.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from .contest import run
from .figures import Figure, Sample, Settings, interleave, main, milliseconds
from .image_serving import FILE_NAME
from .image_touching import PAGE, pattern

SIZE = 64 << 20
DELAY = 0.001
CHUNK = 128 << 10  # FUSE's own read-ahead

#: Name, share of the pages touched, delay before each read, bytes we bring around a fault.
CASES = (
    ("local, all pages in order", 1.0, 0.0, CHUNK),
    ("local, scattered pages", 0.25, 0.0, 0),
    ("1 ms away, all pages in order, 128 KiB a fault", 1.0, DELAY, CHUNK),
    ("1 ms away, scattered pages, one page a fault", 0.025, DELAY, 0),
    ("1 ms away, scattered pages, 128 KiB a fault", 0.025, DELAY, CHUNK),
)


def measure(settings: Settings) -> list[Figure]:
    """Take the time to touch the pages, against FUSE and against a plain mapping."""
    missing = _missing()
    if missing:
        print(f"bench_fuse: without FUSE, for want of {missing}", file=sys.stderr)
    figures = []
    with tempfile.TemporaryDirectory(prefix="aiouffd-bench-") as folder:
        image = Path(folder, "local")
        image.write_bytes(pattern(SIZE))
        mount = Path(folder, "mount")
        mount.mkdir()
        for case, share, delay, chunk in CASES:
            count = max(1, int(share * min(SIZE // PAGE, settings.faults)))
            serving = [f"--image={image}", f"--mount={mount}", f"--delay={delay}"]
            contestants = {
                "faults": _contestant(settings, count, "faults", *serving, f"--chunk={chunk}")
            }
            if not missing:
                contestants["fuse"] = _contestant(
                    settings, count, "fuse", *serving, file=mount / FILE_NAME
                )
            if not delay:
                contestants["plain"] = _contestant(settings, count, "nothing", file=image)
            figures += _figures(case, interleave(contestants, settings.runs))
    return figures


def _missing() -> str:
    """Say what FUSE needs and this machine lacks; nothing if all is there."""
    if importlib.util.find_spec("pyfuse3") is None:
        return "pyfuse3 (pip install pyfuse3; needs libfuse3-dev, pkg-config and gcc)"
    return "" if os.access("/dev/fuse", os.R_OK | os.W_OK) else "/dev/fuse"


def _contestant(
    settings: Settings, count: int, kind: str, *serving: str, file: Path | None = None
) -> Callable[[], Sample]:
    where = ("--socket=SOCKET", f"--cpu={settings.cpu}")
    python = (sys.executable, "-m")
    target = [*python, "benchmarks.image_touching", *where, f"--size={SIZE}", f"--count={count}"]
    if file is not None:
        target.append(f"--file={file}")
    server = [*python, "benchmarks.image_serving", kind, *where, *serving]
    return lambda: run(target, server, settings.seconds)[0]


def _figures(case: str, results: Mapping[str, Mapping[str, list[float]]]) -> list[Figure]:
    against = {"fuse": "FUSE", "plain": "a plain MAP_PRIVATE"}
    return [
        Figure.compare(
            f"{case}, to {name}",
            ours=results["faults"]["took_ns"],
            floor=results[other]["took_ns"],
            unit=milliseconds,
        )
        for other, name in against.items()
        if other in results
    ] or [
        Figure.absolute(case, results["faults"]["took_ns"], unit=milliseconds),
    ]


if __name__ == "__main__":
    main("fuse", measure)
