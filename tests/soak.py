"""Serve processes that do everything at random, badly: the other side of ``soak_target.c``.

Knows: how to start such a process, serve it with handlers that fail, wait and get cancelled, watch
for hangs, and see that it ended well.
Must not know: how long, how many, which mixture: that is for the tests.

A Life is one process from its start to its end.  The process itself compares every byte; here it
is seen that nothing hangs, that the books balance, and that nothing is left.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import mmap
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from aiouffd import (
    Action,
    ClosedError,
    Continue,
    Copy,
    FailurePolicy,
    Feature,
    Mode,
    PageFault,
    Pager,
    Region,
    ResolutionRefused,
    SourceError,
    Unprotect,
    Userfaultfd,
)
from aiouffd.watchdog import describe
from tests.serving import LAYOUT, check_books, image
from tests.targets import HUGE, PAGE, TIME_SCALE

#: Without a step of any of its threads for so long a process counts as hanging, in seconds.
PATIENCE: Final = float(os.environ.get("AIOUFFD_SOAK_PATIENCE", "20")) * TIME_SCALE

_FIELDS: Final = (
    *("stop", "closing", "errors", "checked", "forks", "moves", "removals", "sigbus"),
    "telling",
)
_THREADS: Final = 16
_PROGRESS: Final = 8 * len(_FIELDS)
_DOING: Final = _PROGRESS + 16 * _THREADS
_MESSAGE: Final = _DOING + 16 * _THREADS
_CONTROL_BYTES: Final = _MESSAGE + 1024
_LOST_OF: Final = 64  # the last page of so many is one that cannot be answered


@functools.cache
def executable() -> str:
    """Compile ``soak_target.c``, once per test session."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for tests/soak_target.c: apt install gcc, or set CC")
    folder = tempfile.mkdtemp(prefix="aiouffd-soak-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program = str(Path(folder, "soak_target"))
    source = str(Path(__file__).with_name("soak_target.c"))
    options = ["-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *options, "-o", program, source], check=True, timeout=120)
    return program


class Hang(AssertionError):
    """A thread of the target has made no step for too long."""


class Wrong(AssertionError):
    """The target has seen a byte that must not be."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What one life is like.

    Attributes:
        kind: anon, shmem, shmem-private or hugetlb.
        threads: How many, each with a slice of its own.
        pages: Per thread; a multiple of 64.
        operations: Letters with weights; see do_operation in soak_target.c.
        life: Operations per thread; 0 is until told to stop.
        alarm_us: How often a signal strikes the process; 0 is never.
        wp: Register for write protection too, and protect pages at random.
        minor: Register for minor faults too (shmem).
        trouble: How often a handler waits, fails or is cancelled, from 0 to 1.
        fills: Fill ahead of demand at random.
        max_in_flight: Of the pager.
    """

    kind: str = "anon"
    threads: int = 4
    pages: int = 512
    operations: str = "r20n2w8d4m4u1p3f1k3K2"
    life: int = 1500
    alarm_us: int = 0
    wp: bool = False
    minor: bool = False
    trouble: float = 0.3
    fills: bool = True
    max_in_flight: int = 256

    @property
    def page_size(self) -> int:
        return HUGE if self.kind == "hugetlb" else PAGE


class Totals(NamedTuple):
    """What a life has done."""

    checked: int
    forks: int
    moves: int
    removals: int
    sigbus: int
    faults: int


class Handlers:
    """Answers from the image, after waits, failures and cancellations."""

    def __init__(self, mixture: Mixture, rng: random.Random) -> None:
        self._mixture = mixture
        self._rng = rng
        self._size = mixture.page_size
        self._waits: set[asyncio.Future[None]] = set()

    def _is_lost(self, offset: int) -> bool:
        return offset // self._size % _LOST_OF == _LOST_OF - 1

    def fallback_answer(self, fault: PageFault) -> Any:
        """The right answer."""
        if fault.wp:
            return Unprotect()
        if fault.minor:
            return Continue()
        if self._is_lost(fault.offset):
            raise SourceError(f"the image has no page at {fault.offset:#x}")
        return self._copy(fault)

    async def fallback(self, fault: PageFault) -> Any:
        if self._rng.random() < 0.2:
            await asyncio.sleep(0)
        return self.fallback_answer(fault)

    def _copy(self, fault: PageFault) -> Any:
        rng, size = self._rng, self._size
        # What one process removes of shared memory the pager of its child is not told.
        alone = size > PAGE or (self._mixture.kind == "shmem" and "f" in self._mixture.operations)
        if alone or rng.random() < 0.7:
            return image(fault.offset, size, size)
        # Neighbours too, as far as they can be answered.
        page = fault.offset // size % _LOST_OF
        before = rng.randrange(min(page, 16) + 1)
        after = rng.randrange(min(_LOST_OF - 2 - page, 16) + 1)
        data = image(fault.offset - before * size, (before + 1 + after) * size, size)
        return Copy(data, address=fault.address - before * size)

    async def __call__(self, fault: PageFault) -> Any:
        rng = self._rng
        if rng.random() >= self._mixture.trouble:
            return self.fallback_answer(fault)
        match rng.randrange(6):
            case 0:
                await asyncio.sleep(0)
            case 1:
                await asyncio.sleep(rng.expovariate(500))
            case 2:
                raise SourceError("the source has a bad day")
            case 3:
                await asyncio.sleep(0)
                raise SourceError("the source has a bad day, it turns out")
            case 4:
                return None  # try again
            case _:
                await self._until_cancelled()
        return self.fallback_answer(fault)

    async def _until_cancelled(self) -> None:
        """Wait for a source that somebody cancels, or that answers in the end."""
        wait = asyncio.get_running_loop().create_future()
        self._waits.add(wait)
        try:
            async with asyncio.timeout(0.05):
                await wait
        except TimeoutError:
            pass
        finally:
            self._waits.discard(wait)

    async def cancel_some(self) -> None:
        """Cancel handlers' waits at random, for ever."""
        while True:
            await asyncio.sleep(self._rng.expovariate(300))
            for wait in tuple(self._waits)[: self._rng.randrange(4)]:
                wait.cancel()


class Life:
    """One process, from its start to its end."""

    def __init__(self, mixture: Mixture, seed: int) -> None:
        self.mixture = mixture
        self.seed = seed
        self.rng = random.Random(seed)
        self.handlers = Handlers(mixture, self.rng)
        self.pagers: list[Pager] = []
        self._last = b""
        self._since = time.monotonic()

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.mixture}"

    @contextlib.asynccontextmanager
    async def serve(self, **settings: Any) -> AsyncIterator[tuple[Pager, Region]]:
        """Start the process and serve it; at the end it must have gone, and gone well."""
        control_fd = os.memfd_create("control")
        try:
            os.ftruncate(control_fd, _CONTROL_BYTES)
            self.control = mmap.mmap(control_fd, _CONTROL_BYTES)
            ours, theirs = socket.socketpair()
            with ours:
                with theirs:
                    self.popen = self._spawn(theirs.fileno(), control_fd)
                with self.control:
                    try:
                        async with self._pager(ours, settings) as (pager, region):
                            yield pager, region
                        self._check_end(pager)
                    finally:
                        self.popen.kill()
                        self.popen.wait()
        finally:
            os.close(control_fd)

    def _spawn(self, socket_fd: int, control_fd: int) -> subprocess.Popen[bytes]:
        mixture = self.mixture
        features = LAYOUT
        if "f" in mixture.operations:
            features |= Feature.EVENT_FORK
        if mixture.wp:
            features |= Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
        words = [
            *(socket_fd, control_fd, mixture.kind, mixture.threads, mixture.pages),
            *(mixture.page_size, self.seed, mixture.operations, mixture.life),
            *(int(features), mixture.alarm_us),
        ]
        return subprocess.Popen(
            [executable(), *map(str, words)],
            pass_fds=(socket_fd, control_fd),
            stdin=subprocess.DEVNULL,
            process_group=0,
        )

    @contextlib.asynccontextmanager
    async def _pager(
        self, ours: socket.socket, settings: dict[str, Any]
    ) -> AsyncIterator[tuple[Pager, Region]]:
        mixture = self.mixture
        ours.settimeout(PATIENCE)
        data, fds, _, _ = socket.recv_fds(ours, 100, 1)
        base, length = map(int, data.split())
        modes = Mode.MISSING
        if mixture.wp:
            modes |= Mode.WP
        if mixture.minor:
            modes |= Mode.MINOR
        settings.setdefault("max_in_flight", mixture.max_in_flight)
        policy = FailurePolicy(retries=1, backoff=0.001, fallback=self.handlers.fallback)
        pidfd = os.pidfd_open(self.popen.pid)
        try:
            pager = Pager(
                Userfaultfd.adopt(fds[0]),
                target=pidfd,
                failure=policy,
                on_fork=self.pagers.append,
                **settings,
            )
        finally:
            os.close(pidfd)
        self.pagers.append(pager)
        async with pager:
            region = pager.register(
                base, length, self.handlers, modes=modes, page_size=mixture.page_size
            )
            ours.send(b"g")
            async with asyncio.TaskGroup() as group:
                chores = [group.create_task(self._watch())]
                chores.append(group.create_task(self.handlers.cancel_some()))
                if mixture.fills:
                    chores.append(group.create_task(self._fill(region)))
                if mixture.wp:
                    chores.append(group.create_task(self._protect(pager, region)))
                try:
                    yield pager, region
                except BaseException:
                    # What it and its children would see from here on is no finding.
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(self.popen.pid, signal.SIGKILL)
                    raise
                finally:
                    for chore in chores:
                        chore.cancel()

    async def ends(self, pager: Pager) -> None:
        """Wait until the process and all its forked children have ended."""
        await pager.wait_closed()
        while pager.children:
            await asyncio.sleep(0.01)

    def _check_end(self, pager: Pager) -> None:
        status = self.popen.wait(PATIENCE)
        self._check_errors()
        if status not in (0, -signal.SIGKILL):
            raise Wrong(f"the target ended with status {status}; {self}")
        for served in self.pagers:
            check_books(served)
            assert served.in_flight == 0, served
            assert served.uffd.closed, served
        assert not pager.children

    # --- the control page --------------------------------------------------------------

    def get(self, name: str) -> int:
        value: int = struct.unpack_from("<Q", self.control, 8 * _FIELDS.index(name))[0]
        return value

    def put(self, name: str, value: int) -> None:
        struct.pack_into("<Q", self.control, 8 * _FIELDS.index(name), value)

    def totals(self) -> Totals:
        faults = sum(pager.counters.faults for pager in self.pagers)
        get = self.get
        return Totals(
            get("checked"), get("forks"), get("moves"), get("removals"), get("sigbus"), faults
        )

    def _check_errors(self) -> None:
        if self.get("errors"):
            message = self.control[_MESSAGE:].split(b"\0", 1)[0].decode()
            raise Wrong(f"{self.get('errors')} wrong; first: {message}; {self}")

    # --- what goes on meanwhile --------------------------------------------------------

    async def _watch(self) -> None:
        """Look for wrong bytes and for threads that make no step."""
        while True:
            await asyncio.sleep(0.05)
            self._check_errors()
            now = self.control[_PROGRESS:_MESSAGE]
            at = time.monotonic()
            if now != self._last or self.popen.poll() is not None:
                self._last, self._since = now, at
            elif at - self._since > PATIENCE:
                raise Hang(self.report())

    async def _fill(self, region: Region) -> None:
        rng, size = self.rng, self.mixture.page_size
        blocks = self.mixture.threads * self.mixture.pages // _LOST_OF
        while True:
            await asyncio.sleep(rng.expovariate(100))
            first = rng.randrange(_LOST_OF - 1)
            count = rng.randrange(1, _LOST_OF - first)
            offset = (rng.randrange(blocks) * _LOST_OF + first) * size
            try:
                await region.fill(offset, image(offset, count * size, size))
            except (ResolutionRefused, ClosedError):
                return  # the target has gone, or the pager was closed

    async def _protect(self, pager: Pager, region: Region) -> None:
        rng, size = self.rng, self.mixture.page_size
        while True:
            await asyncio.sleep(rng.expovariate(100))
            where, _ = rng.choice(region.ranges or [(None, 0)])
            if where is None or pager.closing or pager.target_gone:
                continue
            pages = where.length // size
            first = rng.randrange(pages)
            count = rng.randrange(1, min(pages - first, 32) + 1)
            with contextlib.suppress(ResolutionRefused):  # it has moved, is moving, or is gone
                pager.uffd.writeprotect(where.start + first * size, count * size)

    # --- when it hangs -----------------------------------------------------------------

    def report(self) -> str:
        """Say who waits, where, and what the pager knows of it."""
        lines = [f"no step for {PATIENCE:g} s; {self}"]
        processes = [self.popen.pid, *_descendants(self.popen.pid)]
        for pid in processes:
            with contextlib.suppress(OSError):
                for tid in sorted(map(int, os.listdir(f"/proc/{pid}/task"))):
                    task = Path(f"/proc/{pid}/task/{tid}")
                    state = (task / "stat").read_text().rpartition(")")[2].split()[0]
                    lines.append(
                        f"  process {pid} thread {tid}: {state} in "
                        f"{(task / 'wchan').read_text() or '-'}"
                    )
        doing = struct.unpack_from(f"<{2 * _THREADS}Q", self.control, _DOING)
        lines.append("  doing: " + " ".join(chr(letter) if letter else "-" for letter in doing))
        now = asyncio.get_running_loop().time()
        for pager in self.pagers:
            if pager.uffd.closed:
                continue
            lines.append(f"  {pager!r} {pager.counters}")
            lines.append(f"    {pager.uffd.info()}")
            lines += [
                f"    {describe(flight, now - flight.started)}"
                for flight in tuple(pager.space.in_flight.values())[:20]
            ]
        return "\n".join(lines)


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                found += [int(child), *_descendants(int(child))]
    return found


async def live(mixture: Mixture, seed: int, end: str = "itself") -> Totals:
    """Live one life.

    Args:
        mixture: What it is like.
        seed: Of the process, its handlers and its end.
        end: ``itself``; ``close`` (the pager is closed under it, then it is told to stop); or
            ``kill``.
    """
    life = Life(mixture, seed)
    async with life.serve() as (pager, _):
        if end != "itself":
            await asyncio.sleep(life.rng.uniform(0.02, 0.3))
        if end == "close":
            life.put("closing", 1)
            await pager.aclose(Action.POISON)
            life.put("stop", 1)
            while life.popen.poll() is None:
                await asyncio.sleep(0.005)
        elif end == "kill":
            life.popen.kill()
        await life.ends(pager)
        return life.totals()
