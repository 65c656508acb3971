"""One lazy restore by real CRIU, its memory served by the stock daemon or by ours.

Knows: which programs play which part, what to measure of them and when.
Must not know: which ratio matters.

Every run has new processes: a daemon, a page server where there is one, a restore in a fresh pid
namespace.  All restore the same checkpoint, whose images are in the page cache.  The restored
program goes on as soon as it runs, checks every word that it touches, and says how long that
took; a run with one wrong word raises, and yields no figure.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from tests.interop.criu import Stage, large_pipes
from tests.interop.criu_relay import LazyRelay
from tests.interop.criu_running import Restored, Running
from tests.suites import CRIU, Foreign

from .contest import RunFailed
from .figures import Sample

THREADS = 4
SEED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Who serves, and how.

    Attributes:
        daemon: "stock" or "ours".
        server: The page server: "" for images here, "stock" or "ours".
        push: False serves only what is touched.
        replay: A recorded set to replay; ours only.
        record: Where to record one; ours only.
    """

    daemon: str
    server: str = ""
    push: bool = True
    replay: Path | None = None
    record: Path | None = None


def available() -> Foreign | None:
    """Give the newest CRIU that is unpacked here."""
    found = [foreign for foreign in CRIU if foreign.is_there()]
    return found[-1] if found and os.geteuid() == 0 else None


@contextmanager
def checkpoint(criu: Foreign, mib: int) -> Iterator[tuple[Stage, Path]]:
    """Make a checkpoint of a program with so much memory; what runs with it ends with it."""
    with large_pipes(), Stage(criu) as stage:
        images = stage.dump(stage.pages(mib, threads=THREADS, seed=SEED))
        yield stage, images


def restore(
    stage: Stage, images: Path, parts: Parts, *, go: str, seconds: float, drain: bool
) -> Sample:
    """Restore once and let the program check its memory.

    Args:
        stage: Where the checkpoint is.
        images: Its folder.
        parts: Who serves.
        go: What the program is to touch.
        seconds: When to give up.
        drain: Wait until the daemon has brought all memory and ended; its processor time is
            then complete.

    Returns:
        ``took_ns`` from the first touch to the last; ``whole_ns`` from the start of the restore;
        latencies of the touches; ``cpu_ns`` of the daemon and ``serving_cpu_ns`` since it was
        ready.
    """
    work = stage.folder / f"work-{time.monotonic_ns()}"
    work.mkdir()
    address: tuple[object, ...] = ()
    server = None
    if parts.server:
        server, port = stage.server(parts.server, images, level=0)
        address = ("--page-server", "--address", "127.0.0.1", "--port", port)
    daemon = _daemon(stage, images, work, parts, address)
    ready = _cpu_ns(daemon.pid)
    hold_back = parts.daemon == "stock" and not parts.push
    place = work / "held" if hold_back else work
    place.mkdir(exist_ok=True)
    with LazyRelay(place, work) if hold_back else nullcontext():
        start = time.time_ns()  # the restored program may have a time namespace of its own
        restored = stage.restore(images, work=place, go=go)
        try:
            return _outcome(restored, daemon, start, ready, seconds, drain=drain)
        finally:
            restored.end()
            for running in (daemon, server):
                if running is not None:
                    running.end()
            stage.forget()


def _daemon(
    stage: Stage, images: Path, work: Path, parts: Parts, address: tuple[object, ...]
) -> Running:
    options: list[object] = [*address]
    if parts.daemon == "ours":
        options += [] if parts.push else ["--no-push"]
        options += [] if parts.replay is None else ["--replay", parts.replay]
        options += [] if parts.record is None else ["--record", parts.record]
    return stage.daemon(parts.daemon, images, *options, work=work, level=0)


def _outcome(
    restored: Restored, daemon: Running, start: int, ready: float, seconds: float, *, drain: bool
) -> Sample:
    found = restored.result(seconds)
    if not found["right"]:
        raise RunFailed(f"wrong memory: {found}\n{restored.crew.report()}")
    if drain:
        _until_ended(daemon, seconds)
    used = _cpu_ns(daemon.pid)
    if drain:
        daemon.wait()
    sample = {name: float(value) for name, value in found.items() if name.endswith("_ns")}
    return {
        **sample,
        "whole_ns": found["ended_ns"] - start,
        "cpu_ns": used,
        "serving_cpu_ns": used - ready,
        "touched": found["touched"],
    }


def _cpu_ns(pid: int) -> float:
    """Give the processor time of a process that runs, or that nobody has waited for."""
    return time.clock_gettime_ns((~pid << 3) | 2)  # CPUCLOCK_SCHED of another process


def _until_ended(running: Running, seconds: float) -> None:
    """Wait for the end of a process, and leave it to be asked about."""
    with open(os.pidfd_open(running.pid), "rb", buffering=0) as pidfd:
        if not select.select([pidfd], [], [], seconds)[0]:
            raise RunFailed(f"{running.name} does not end\n{running.crew.report()}")
