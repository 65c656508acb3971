"""A migration by aiouffd between processes on loopback, as qemu_migration makes one by QEMU.

    python -m benchmarks.moving --memory 256 --writes 0.1 --rounds 1 --bandwidth 100 --times 3

    sample = migrate(MoveSettings(memory_mib=256, writes=0.1, rounds=1))
    rate = bulk("uvloop", size=1 << 30, through=16 << 20)

Knows: how the two sides of a migration are started, and what they print.
Must not know: QEMU, which ratio matters.

Law of this file: no figure without proof: the program has gone on to check all of its memory at the
destination, and found it right.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from aiouffd.dirty import DirtyRound, DirtyRun
from aiouffd.errors import MigrationFailed
from aiouffd.migration.listener import Listener
from aiouffd.migration.memory import Landing, SourceMemory, seal
from aiouffd.migration.moving import Leaving, arriving
from aiouffd.migration.outgoing import Cancelled, Outgoing, Plan
from aiouffd.migration.wire import Extent

from .build import HERE
from .contest import RunFailed
from .figures import Sample

_SECONDS: Final = 120.0
_PAGE: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveSettings:
    """What is migrated, and how.

    Attributes:
        memory_mib: The program's memory, in MiB.
        writes: Which part of it the program rewrites all the time, from 0 to 1.
        rounds: Of pre-copy.
        behind: Bytes that may follow after the switch; None is any number.
        downtime: Seconds that the rest may take, for the switch to be early.
        bandwidth: The most that bulk may send, in bytes/s; None for no limit.
        loop: "asyncio" or "uvloop", for both sides.
    """

    memory_mib: int = 256
    writes: float = 0.0
    rounds: int = 0
    behind: int | None = None
    downtime: float = 0.001
    bandwidth: float | None = None
    loop: str = "asyncio"


def migrate(settings: MoveSettings) -> Sample:
    """Migrate a program once.

    Returns:
        ``stopped_ns`` from the order to stop until it is known to run at the destination,
        ``total_ns``, ``sent_ratio``, ``requests``, and if anything was waited for ``p50_ns`` and
        ``p99_ns``; ``converged`` is 0 where it did not, and the program ran on.

    Raises:
        RunFailed: A side failed, or the program found its memory wrong.
    """
    with tempfile.TemporaryDirectory(prefix="aiouffd-bench-") as folder:
        path = os.path.join(folder, "socket")
        program = ["benchmarks.moving_program", path, str(settings.memory_mib)]
        program.append(str(settings.writes))
        options = ["--settings", json.dumps(asdict(settings))]
        with (
            _process("-m", *program) as moving,
            _process("-m", "benchmarks.moving", "--side", "destination", *options) as destination,
        ):
            _line(moving)  # "ready"
            port = _line(destination)
            side = ["benchmarks.moving", "--side", "source", "--port", port, "--socket", path]
            with _process("-m", *side, *options) as source:
                ours: dict[str, float] = json.loads(_line(source))
            if not ours["converged"]:
                moving.kill()
                return ours
            theirs: dict[str, float] = json.loads(_line(destination))
            if moving.wait(_SECONDS):
                raise RunFailed(f"the program ended with {moving.returncode} at the source")
    return {**ours, **theirs}


def bulk(loop: str = "asyncio", *, size: int = 1 << 30, through: int = 16 << 20) -> float:
    """Send memory that nobody writes to, and nobody waits for.

    Args:
        loop: "asyncio" or "uvloop", for both sides.
        size: Bytes to send in all.
        through: Of the region, which is sent as often as it takes: as much as stays in the
            processor's cache, or ``size`` for memory that is new on both sides.

    Returns:
        Bytes per second, from the first frame until all have landed.
    """
    options = ["--loop", loop, "--size", str(size), "--through", str(through)]
    with _process("-m", "benchmarks.moving", "--side", "landing", *options) as landing:
        port = _line(landing)
        side = ["benchmarks.moving", "--side", "pushing", "--port", port]
        with _process("-m", *side, *options) as pushing:
            return float(_line(pushing))


@contextlib.contextmanager
def _process(*command: str) -> Iterator[subprocess.Popen[str]]:
    environment = dict(os.environ, PYTHONPATH=str(HERE.parent), PYTHONDONTWRITEBYTECODE="1")
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def _line(process: subprocess.Popen[str]) -> str:
    """Wait for the next line of a side; its program's are passed over."""
    assert process.stdout is not None
    while True:
        line = process.stdout.readline().strip()
        if not line:
            raise RunFailed(f"{process.args!r} ended with {process.wait(_SECONDS)}")
        if not line.startswith("complete"):
            return line


# --- the sides -------------------------------------------------------------------------


async def _destination(settings: MoveSettings) -> None:
    async with Listener() as listener:
        print(listener.port, flush=True)
        incoming = await listener.accept()
        program = ["benchmarks.moving_program", "", "0", str(settings.writes)]
        async with arriving(incoming, [sys.executable, "-m", *program]) as arrived:
            try:
                await arrived.run()
            except MigrationFailed:
                return
            await arrived.complete()
        if status := await asyncio.to_thread(arrived.process.wait, _SECONDS):
            raise RunFailed(f"the program ended with {status} at the destination")
    stalls = incoming.stalls.as_dict()
    waits = {name: stalls[name] * 1e9 for name in ("p50", "p99") if stalls["faults"]}
    print(json.dumps({f"{name}_ns": value for name, value in waits.items()}), flush=True)


async def _source(settings: MoveSettings, port: int, path: str) -> None:
    plan = Plan(
        rounds=settings.rounds,
        behind=settings.behind,
        downtime=settings.downtime,
        bandwidth=settings.bandwidth,
    )
    async with await Leaving.open(path) as leaving:
        outgoing = Outgoing(leaving.memory, "127.0.0.1", port, tracker=leaving.tracker, plan=plan)
        converged = True
        try:
            await outgoing.run(leaving)
            await leaving.end()
        except MigrationFailed as error:
            if error.outcome != "source" or settings.behind is None:
                raise
            converged = False
    figures = outgoing.figures
    sample = {
        "stopped_ns": figures.downtime * 1e9,
        "total_ns": figures.seconds * 1e9,
        "sent_ratio": figures.as_dict()["sent_over_memory"],
        "requests": figures.demand,
        "converged": converged,
    }
    print(json.dumps(sample), flush=True)


async def _landing(through: int) -> None:
    async with Listener() as listener:
        print(listener.port, flush=True)
        incoming = await listener.accept()
        fd = os.memfd_create("landing", os.MFD_CLOEXEC)
        os.ftruncate(fd, through)
        await incoming.prepare([Landing(fd, through)])
        with contextlib.suppress(MigrationFailed):  # the end is a cancellation
            await incoming.wait_done()


class _AllDirty:
    """A tracker of a program that has written everything: by it one region is sent many times."""

    def __init__(self, length: int) -> None:
        self._length = length
        self.began = 0.0

    def begin(self) -> None:
        self.began = time.perf_counter()

    async def collect(self) -> DirtyRound:
        return DirtyRound(1, [DirtyRun(0, 0, self._length)], 1.0)


class _StaysHere:
    """A program that is not to move at all."""

    def __init__(self) -> None:
        self.stopped = 0.0

    async def stop(self) -> bytes:
        self.stopped = time.perf_counter()
        raise Cancelled("it was all for the figures", outcome="source")

    async def restart(self) -> None:
        pass

    async def leave(self) -> None:
        pass


async def _pushing(port: int, size: int, through: int) -> None:
    fd = os.memfd_create("pushing", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    block = os.urandom(min(through, 1 << 20))
    for _ in range(0, through, len(block)):
        os.write(fd, block)
    seal(fd)
    tracker: Any = _AllDirty(through)
    program = _StaysHere()
    plan = Plan(rounds=max(1, size // through), downtime=0.0)
    memory = SourceMemory(fd, Extent("memory", through, _PAGE))
    outgoing = Outgoing([memory], "127.0.0.1", port, tracker=tracker, plan=plan)
    with contextlib.suppress(Cancelled):
        await outgoing.run(program)  # stops when what will follow is known there: all has landed
    print(outgoing.figures.page_bytes / (program.stopped - tracker.began), flush=True)


def _side(options: argparse.Namespace) -> None:
    settings = MoveSettings(**json.loads(options.settings))
    loop = options.loop or settings.loop
    if loop == "uvloop":
        import uvloop

        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    else:
        runner = asyncio.Runner()
    with runner:
        runner.run(
            {
                "destination": lambda: _destination(settings),
                "source": lambda: _source(settings, options.port, options.socket),
                "landing": lambda: _landing(options.through),
                "pushing": lambda: _pushing(options.port, options.size, options.through),
            }[options.side]()
        )


# --- by hand ---------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Migrate some times and print what each took."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--memory", type=int, default=256, help="MiB")
    parser.add_argument("--writes", type=float, default=0.1, help="part of the memory, 0 to 1")
    parser.add_argument("--rounds", type=int, default=1, help="of pre-copy")
    parser.add_argument("--behind", type=int, help="bytes that may follow; any number if not given")
    parser.add_argument("--bandwidth", type=int, help="MiB/s; no limit if not given")
    parser.add_argument("--downtime", type=float, default=0.001, help="seconds")
    parser.add_argument("--loop", default="")
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--bulk", action="store_true", help="only throughput")
    for name in ("side", "socket"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    parser.add_argument("--settings", default="{}", help=argparse.SUPPRESS)
    for name in ("port", "size", "through"):
        parser.add_argument(f"--{name}", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.side:
        _side(options)
        return
    loop = options.loop or "asyncio"
    if options.bulk:
        for through in (16 << 20, 1 << 30):
            rates = [bulk(loop, through=through) for _ in range(options.times)]
            print(f"through {through >> 20} MiB: {statistics.median(rates) / 2**20:.0f} MiB/s")
        return
    settings = MoveSettings(
        memory_mib=options.memory,
        writes=options.writes,
        rounds=options.rounds,
        behind=options.behind,
        downtime=options.downtime,
        bandwidth=None if options.bandwidth is None else options.bandwidth << 20,
        loop=loop,
    )
    for _ in range(options.times):
        sample = migrate(settings)
        shown = {
            name.replace("_ns", " ms"): round(value / 1e6 if name.endswith("_ns") else value, 3)
            for name, value in sample.items()
        }
        print(", ".join(f"{name} {value}" for name, value in shown.items()), flush=True)


if __name__ == "__main__":
    main()
