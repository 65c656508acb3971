"""Bringing pages ahead of demand: hydration, replay of a working set, and chunks around a fault.

Knows: the cases and their targets.
Must not know: how a run is made.

Hydration is measured against UFFDIO_COPY in C out of memory; replay against the same target
served on demand alone, one thread that touches scattered pages; a chunk against one page.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from aiouffd.performer import PIECE_BYTES

from .build import HERE, compile_c
from .contest import loops, python_command, run
from .figures import (
    Figure,
    Sample,
    Settings,
    bytes_per_second,
    interleave,
    main,
    microseconds,
    milliseconds,
)
from .image_touching import PAGE, pattern
from .serving import MARK

HYDRATED = 1 << 30
IMAGE = 16 << 20
FEWEST = 64  # pages of the image, in a quick run
SHARE = 0.3  # of the image's pages that the target touches
HYDRATION_AT_LEAST = 0.85
REPLAY_AT_MOST = 0.1  # of the time that demand alone takes
P99_AT_MOST = 3.0
CHUNKS = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 2 << 20)


def measure(settings: Settings) -> list[Figure]:
    """Take rates, times to the last page, and the latency of demand beside a replay."""
    with tempfile.TemporaryDirectory(prefix="aiouffd-bench-", dir="/var/tmp") as folder:
        image = Path(folder, "image")
        # A page is a fault's worth of work: few faults asked for, little to serve.
        pages = max(FEWEST, min(IMAGE // PAGE, settings.faults))
        image.write_bytes(_half_random(pages * PAGE))
        packed = _pack(image)
        return [
            *_hydration(settings, Path(folder, "large")),
            *_replay(settings, image, pages),
            *_demand_beside_replay(settings, image, pages),
            *_chunks(settings, image, packed, pages),
        ]


def _hydration(settings: Settings, image: Path) -> list[Figure]:
    length = min(HYDRATED, max(PIECE_BYTES, settings.faults * (64 << 10) & -PAGE))
    block = bytes([MARK]) * min(length, 1 << 20)
    with image.open("wb") as file:
        for done in range(0, length, len(block)):
            file.write(block[: length - done])
    target = [str(compile_c()), "idle", "SOCKET", str(length)]
    commands = {"floor": [str(compile_c()), "bulk", "SOCKET", str(settings.cpu), str(PIECE_BYTES)]}
    for loop in loops():
        commands[loop] = python_command(settings, "hydrate", f"--loop={loop}", f"--image={image}")

    def contestant(command: list[str]) -> Callable[[], Sample]:
        def rate() -> Sample:
            sample = run(target, command, settings.seconds)[1]
            return {"rate": sample["bytes"] / sample["seconds"]}

        return rate

    results = interleave(
        {name: contestant(command) for name, command in commands.items()}, settings.runs
    )
    image.unlink()
    return [
        Figure.compare(
            f"hydrate {length >> 20} MiB from a cached file, {loop}, rate",
            ours=results[loop]["rate"],
            floor=results["floor"]["rate"],
            at_least=HYDRATION_AT_LEAST,
            unit=bytes_per_second,
            note="Hydration reads in threads, beside the fills: it takes a second processor."
            " Against a floor of 1 GiB, which memory that a virtual machine never had makes"
            " unsteady: the bulk fill above is the steadier one.",
        )
        for loop in loops()
    ]


def _touching(
    settings: Settings,
    image: Path,
    pages: int,
    count: int,
    *serving: str,
    seed: int = 1,
    apart: bool = False,
) -> Callable[[], Sample]:
    here = f"--cpu={settings.cpu}"
    others = os.sched_getaffinity(0) - {settings.cpu}
    there = f"--cpu={min(others)}" if apart and others else here
    python = (sys.executable, "-m")
    target = [*python, "benchmarks.image_touching", "--socket=SOCKET", there]
    target += [f"--size={pages * PAGE}", f"--count={count}", f"--seed={seed}", "--each"]
    server = [*python, "benchmarks.image_serving", "faults", "--socket=SOCKET", here]
    server += [f"--image={image}", *serving]
    return lambda: run(target, server, settings.seconds)[0]


def _replay(settings: Settings, image: Path, pages: int) -> list[Figure]:
    count = int(SHARE * pages)
    figures = []
    for delay in (0.001, 0.02):
        far = f"--delay={delay}"
        results = interleave(
            {
                "demand": _touching(settings, image, pages, count, far),
                "replay": _touching(settings, image, pages, count, far, f"--replay={count}"),
            },
            settings.runs,
        )
        figures.append(
            Figure.compare(
                f"{SHARE:.0%} of {pages >> 8} MiB, scattered, {delay * 1000:g} ms a read,"
                " to the last page, replay to demand alone",
                ours=results["replay"]["took_ns"],
                floor=results["demand"]["took_ns"],
                at_most=REPLAY_AT_MOST,
                unit=milliseconds,
            )
        )
    return figures


def _demand_beside_replay(settings: Settings, image: Path, pages: int) -> list[Figure]:
    """Touch pages of another choice than those that are replayed, on another processor.

    On the same one the kernel's scheduler would be measured: a replay never sleeps long.
    """
    count, replayed = int(0.05 * pages), f"--replay={int(SHARE * pages)}"
    touch = partial(_touching, settings, image, pages, count, seed=2, apart=True)
    figures = []
    for name, delay in (("a cached file", 0.0), ("1 ms a read", 0.001)):
        far = f"--delay={delay}"
        results = interleave(
            {
                "alone": touch(far),
                "beside": touch(far, replayed),
            },
            settings.runs,
        )
        figures.append(
            Figure.compare(
                f"demand beside a replay, {name}, p99 to that without",
                ours=results["beside"]["p99_ns"],
                floor=results["alone"]["p99_ns"],
                at_most=P99_AT_MOST,
                unit=microseconds,
            )
        )
    return figures


def _chunks(settings: Settings, image: Path, packed: Path, pages: int) -> list[Figure]:
    """Touch all pages in order, and few that are scattered, with chunks of several lengths."""
    figures = []
    chunks = CHUNKS if pages > FEWEST else CHUNKS[:2]
    far = int(min(pages, 1024))  # at a millisecond each
    for name, file, delay, most in (
        ("local", image, 0.0, pages),
        ("1 ms a read", image, 0.001, far),
        ("compressed", packed, 0.0, pages),
    ):
        for how, count in (("in order", pages), ("5 % scattered", int(0.05 * most))):
            contestants = {
                str(chunk): _touching(
                    settings, file, pages, count, f"--delay={delay}", f"--chunk={chunk}"
                )
                for chunk in chunks
            }
            results = interleave(contestants, min(settings.runs, 3))
            figures += [
                Figure.compare(
                    f"{name}, {how}, {chunk >> 10} KiB a fault, to 4 KiB",
                    ours=results[str(chunk)]["took_ns"],
                    floor=results[str(CHUNKS[0])]["took_ns"],
                    unit=milliseconds,
                )
                for chunk in chunks[1:]
            ]
    return figures


def _half_random(size: int) -> bytes:
    """Make an image that compresses to about half, as memory does."""
    chance = random.Random(1)
    data = bytearray(pattern(size))
    for page in range(0, size, PAGE):
        data[page + PAGE // 2 : page + PAGE] = chance.randbytes(PAGE // 2)
    return bytes(data)


def _pack(image: Path) -> Path:
    packed = image.with_suffix(".zst")
    command = [sys.executable, "-m", "aiouffd", "image", "pack", str(image), str(packed)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=HERE.parent)
    return packed


if __name__ == "__main__":
    main("prefetch", measure)
