"""Reading a compressed image through CompressedSource, against the decompressor alone.

Knows: the cases and their targets.
Must not know: how a read is timed.

The image is made of the interpreter's own files, as often as it takes.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

from aiouffd.image.copying import copy
from aiouffd.image.packed import FRAME_BYTES, PackedWriter
from aiouffd.performer import PIECE_BYTES
from aiouffd.sources.buffer import BufferSource

from .build import HERE, compile_c
from .contest import RunFailed, loops, python_command
from .contest import run as run_both
from .figures import Figure, Sample, Settings, bytes_per_second, interleave, main, microseconds

LENGTH = 256 << 20
PIECES = (1 << 20, 2 << 20)
AT_LEAST = 0.85
BROUGHT_AT_LEAST = 0.80
#: How a piece is read: given, or put into a buffer of the caller's as hydration does.
KINDS = {"order": "given", "into": "into a buffer"}


def content(length: int) -> bytes:
    """Make an image of the interpreter's own files."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [*sorted(folder.glob("*.py")), *sorted(folder.glob("lib-dynload/*.so"))]
    files.append(Path(sys.executable).resolve())
    data = b"".join(file.read_bytes() for file in files)
    return (data * (length // len(data) + 1))[:length]


async def pack(path: str, length: int) -> None:
    """Write the image."""
    async with PackedWriter(path, length) as writer:
        await copy(BufferSource(content(length)), writer)


def measure(settings: Settings) -> list[Figure]:
    """Take rates of reading in order, and the time of one page."""
    length = min(LENGTH, max(2 * PIECES[-1], settings.faults * (16 << 10) & -4096))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "image.zst")
        asyncio.run(pack(path, length))
        names = [
            "frames",
            *(f"{kind} {loop} {piece}" for kind in KINDS for loop in loops() for piece in PIECES),
        ]
        names += ["one", "page", "kept"]
        contestants = {name: _reading(settings, path, name) for name in names}
        copy_in_c = [str(compile_c()), "bulk", "SOCKET", str(settings.cpu), str(PIECE_BYTES)]
        contestants["copy"] = _bringing(settings, length, copy_in_c)
        for loop in loops():
            options = [f"--loop={loop}", f"--image={path}", "--one-cpu"]
            command = python_command(settings, "hydrate", *options)
            contestants[f"brought {loop}"] = _bringing(settings, length, command)
        results = interleave(contestants, settings.runs)
        stored = os.stat(path).st_size
    size = f"{length >> 20} MiB, {length / stored:.1f} times smaller, frames of"
    figures = [
        Figure.compare(
            f"in order, {case}, {piece >> 20} MiB at a time, {loop}, rate",
            ours=results[f"{kind} {loop} {piece}"]["rate"],
            floor=results["frames"]["rate"],
            at_least=AT_LEAST,
            unit=bytes_per_second,
            note=f"The image: {size} {FRAME_BYTES >> 10} KiB. Against: a loop over the frames,"
            " in memory, that calls the decompressor and drops what it gives."
            " Rates are in time of the CPU, of all threads.",
        )
        for kind, case in KINDS.items()
        for loop in loops()
        for piece in PIECES
    ]
    frames, copied = results["frames"]["rate"], results["copy"]["rate"]
    one_after_the_other = [1 / (1 / a + 1 / b) for a, b in zip(frames, copied, strict=True)]
    bringing = {loop: results[f"brought {loop}"]["rate"] for loop in loops()}
    for who, rates in {**bringing, "both in C, by arithmetic": one_after_the_other}.items():
        figures.append(
            Figure.compare(
                f"brought into a target, on one processor, {who}, rate",
                ours=rates,
                floor=frames,
                at_least=BROUGHT_AT_LEAST if who in bringing else None,
                unit=bytes_per_second,
                note="With the UFFDIO_COPY, which the other side does not have: no more than"
                " the decompressor and UFFDIO_COPY one after the other can give.",
            )
        )
    for name, case in (
        ("page", "4 KiB from a frame not decompressed yet, p50"),
        ("kept", "4 KiB from a frame decompressed lately, p50"),
    ):
        figures.append(
            Figure.compare(
                case,
                ours=results[name]["p50_ns"],
                floor=results["one"]["p50_ns"],
                unit=microseconds,
                note="Of a single page the other side is one frame given to the decompressor.",
            )
        )
    return figures


def _reading(settings: Settings, path: str, name: str) -> Callable[[], Sample]:
    command = [sys.executable, "-m", "benchmarks.reading", path, str(settings.cpu), *name.split()]

    def run() -> Sample:
        done = subprocess.run(
            command,
            env=dict(os.environ, PYTHONPATH=str(HERE.parent), PYTHONDONTWRITEBYTECODE="1"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=settings.seconds,
            check=False,
        )
        if done.returncode != 0:
            raise RunFailed(f"{command!r}: {done.stderr.strip()}")
        sample: dict[str, float] = json.loads(done.stdout)
        return sample

    return run


def _bringing(settings: Settings, length: int, command: list[str]) -> Callable[[], Sample]:
    target = [str(compile_c()), "idle", "SOCKET", str(length)]

    def rate() -> Sample:
        sample = run_both(target, command, settings.seconds)[1]
        return {"rate": sample["bytes"] / sample.get("cpu_seconds", sample["seconds"])}

    return rate


if __name__ == "__main__":
    main("sources", measure)
