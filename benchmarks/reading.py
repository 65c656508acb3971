"""One run of reading a compressed image, bound to one CPU: the source, or the decompressor alone.

Knows: how a read is timed.
Must not know: who else ran, targets.

Rates are in time of the CPU, of all threads: on one CPU one of them always has something to do,
and what neighbours take is not counted.

``python -m benchmarks.reading IMAGE CPU frames|one|page|kept|(order|into) LOOP PIECE`` prints JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from aiouffd.sources.compressed import CompressedSource
from aiouffd.sources.file import FileSource
from aiouffd.sources.zstd_frames import decompress

PAGE = 4096
TOUCHES = 2000


async def open_image(path: str) -> CompressedSource:
    """Open the image, in the page cache."""
    Path(path).read_bytes()
    return await CompressedSource.open(FileSource(path))


async def frames_of(path: str) -> list[tuple[memoryview, int]]:
    """Give each frame, and the length of its content."""
    source = await open_image(path)
    table = source.table
    data = memoryview(Path(path).read_bytes())
    frames = [data[start:end] for start, end in pairwise(table.offsets)]
    sizes = [end - start for start, end in pairwise(table.starts)]
    await source.aclose()
    return [(frame, size) for frame, size in zip(frames, sizes, strict=True) if size]


def time_frames(path: str) -> dict[str, float]:
    """Decompress every frame and drop it."""
    frames = asyncio.run(frames_of(path))
    began = time.process_time_ns()
    for frame, size in frames:
        decompress(frame, size, None)
    took = time.process_time_ns() - began
    return {"rate": sum(size for _, size in frames) / took * 1e9}


async def time_order(path: str, piece: int, *, into: bool) -> dict[str, float]:
    """Read the image from its start to its end, into one buffer or each piece into a new one."""
    source = await open_image(path)
    buffer = memoryview(mmap.mmap(-1, piece))
    buffer[:] = bytes(piece)  # its memory is there, as that of a buffer used before
    began = time.process_time_ns()
    for offset in range(0, source.size, piece):
        length = min(piece, source.size - offset)
        if into:
            await source.readinto(offset, buffer[:length])
        else:
            await source.read(offset, length)
    took = time.process_time_ns() - began
    await source.aclose()
    return {"rate": source.size / took * 1e9}


def _median_ns(call: Callable[[int], object]) -> dict[str, float]:
    choose = random.Random(1)
    taken = []
    for _ in range(TOUCHES):
        number = choose.randrange(1 << 30)
        began = time.perf_counter_ns()
        call(number)
        taken.append(time.perf_counter_ns() - began)
    return {"p50_ns": statistics.median(taken)}


def time_one(path: str) -> dict[str, float]:
    """Decompress frames at random."""
    frames = asyncio.run(frames_of(path))

    def one(number: int) -> None:
        frame, size = frames[number % len(frames)]
        decompress(frame, size, None)

    return _median_ns(one)


async def time_page(path: str, *, kept: bool) -> dict[str, float]:
    """Read pages at random: anywhere, or in the first frame."""
    source = await open_image(path)
    pages = (source.table.starts[1] if kept else source.size) // PAGE
    sample = _median_ns(lambda number: source.read_nowait(number % pages * PAGE, PAGE))
    await source.aclose()
    return sample


def main() -> None:
    """Make one run."""
    path, cpu, kind, *rest = sys.argv[1:]
    if int(cpu) >= 0:
        os.sched_setaffinity(0, {int(cpu)})
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)  # before everything else on this CPU
    if kind == "frames":
        sample = time_frames(path)
    elif kind == "one":
        sample = time_one(path)
    elif kind in ("order", "into"):
        factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
        if rest[0] == "uvloop":
            import uvloop

            factory = uvloop.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            sample = runner.run(time_order(path, int(rest[1]), into=kind == "into"))
    else:
        sample = asyncio.run(time_page(path, kept=kind == "kept"))
    print(json.dumps(sample))


if __name__ == "__main__":
    main()
