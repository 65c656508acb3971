"""A stand-in for ``criu restore``: tasks that hand themselves over as its tasks do.

The tasks are targets (``tests/target.c``), and in the images they have the pids that they have.
Each sends its own pid and userfaultfd on the one connection, and its memory is registered
afterwards, as CRIU's restorer does it.

Knows: the bytes on lazy-pages.socket, written anew here; checkpoints made for the tests.
Must not know: the parser, the server under test.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from aiouffd.kernel import calls
from aiouffd.protocols.criu.checkpoint import Checkpoint
from aiouffd.protocols.criu.images import PagemapEntry, Task
from aiouffd.protocols.criu.restore import Restores
from aiouffd.reports import Detached, Ended, HandedOver, Refused, Report, Started
from aiouffd.server import Server
from aiouffd.service import Service
from aiouffd.session import Session
from aiouffd.uffd import Feature
from tests.protocols.criu.checkpoints import Made, Memory, anonymous, lone_task
from tests.serving import LAYOUT
from tests.targets import MISSING, PAGE, Target

LAZY, EAGER = 6, 4
FEATURES = LAYOUT | Feature.EVENT_FORK


def page_of(pid: int, number: int) -> int:
    """Give the word that page NUMBER of a task consists of."""
    return pid << 32 | number + 1


def image_of(pid: int, pages: int) -> bytes:
    """Give the memory of a task."""
    return b"".join(page_of(pid, page).to_bytes(8, "little") * 512 for page in range(pages))


@contextlib.contextmanager
def task(pages: int = 64, **options: Any) -> Iterator[Target]:
    """Start what is to be a restored task; its memory is not registered yet."""
    with Target(
        "anon", pages, features=FEATURES, register=0, keep_uffd=True, threads=6, **options
    ) as target:
        yield target


def checkpoint_of(
    folder: Path,
    *targets: Target,
    runs: Sequence[tuple[int, int, int]] | None = None,
    dead: Sequence[int] = (),
) -> Path:
    """Write a checkpoint that holds the memory of targets.

    Args:
        folder: Where to.
        targets: Their memory lies where it is to be restored.
        runs: Of each: (first page, pages, flags); by default everything is lazy.
        dead: More tasks, which are zombies.
    """
    tasks: list[Task] = [lone_task(target.pid) for target in targets]
    tasks += [lone_task(pid, dead=True) for pid in dead]
    memories = {}
    for target in targets:
        pid = target.pid
        mine = runs if runs is not None else [(0, target.pages, LAZY)]
        whole = image_of(pid, target.pages)
        memories[pid] = Memory(
            [anonymous(target.base, target.pages)],
            [PagemapEntry(target.at(first), count, flags) for first, count, flags in mine],
            b"".join(whole[first * PAGE : (first + count) * PAGE] for first, count, _ in mine),
        )
    return Made(memories, tasks).write(folder)


_RESTORER: Final = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
print(connection.fileno(), flush=True)
connection.send(sys.stdin.buffer.read())
"""


class Restorer:
    """One run of ``criu restore``, as the daemon sees it.

    Its calls do not let the loop run.
    """

    def __init__(self, path: str | os.PathLike[str], *, by_itself: bool = False) -> None:
        """Connect.

        Args:
            path: The daemon's socket.
            by_itself: From a process of its own, which has exited after ``finish`` and ``close``.
        """
        self.sock = socket.socket(socket.AF_UNIX)
        self.process: subprocess.Popen[bytes] | None = None
        self.pid, self.number = os.getpid(), self.sock.fileno()
        if by_itself:
            command = [sys.executable, "-c", _RESTORER, os.fspath(path)]
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe)
            assert self.process.stdout is not None
            self.pid, self.number = self.process.pid, int(self.process.stdout.readline())
        else:
            self.sock.connect(os.fspath(path))

    def hand_over(self, target: Target, *, register: bool = True) -> None:
        """Let a task send its pid and its userfaultfd itself, then register its memory."""
        pidfd = target.call("pidfd_open", self.pid, 0).result()
        there = target.call("pidfd_getfd", pidfd, self.number, 0).result()
        assert min(pidfd, there) > 0, (pidfd, there)
        handed = target.tell(0, "hand", there, target.pid, target.uffd_there, convert=int)
        assert handed.result() == 0
        for fd in (pidfd, there):
            target.call("close", fd).result()
        if register:
            self.register(target)

    def register(self, target: Target) -> None:
        """Register a task's memory: from here on it faults."""
        calls.register(target.uffd, target.base, target.length, MISSING)
        os.close(target.take_uffd())

    def send(self, pid: int, fds: Sequence[int] | None = None, byte: bytes = b"\0") -> None:
        """Send a pid, and a byte with descriptors, as nobody should."""
        self.sock.send(struct.pack("<i", pid))
        if fds is not None:
            socket.send_fds(self.sock, [byte], fds)

    def finish(self) -> None:
        """Say the last word."""
        self._end(b"FTSR")

    def close(self) -> None:
        self._end(b"")

    def _end(self, word: bytes) -> None:
        if self.process is not None:
            process, self.process = self.process, None
            process.communicate(word, timeout=30)
        elif word:
            self.sock.send(word)
        self.sock.close()

    def __enter__(self) -> Restorer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Daemon:
    """A server of restores, and what it has reported."""

    def __init__(self, server: Server, reports: list[Report]) -> None:
        self.server = server
        self.reports = reports

    @property
    def path(self) -> str:
        return self.server.path

    def sessions(self) -> list[Session]:
        """Give all that were ever started."""
        return [one.session for one in self.reports if isinstance(one, Started)]

    def session(self, target: Target) -> Session | None:
        """Give the session of a task, once it has started."""
        part = str(target.pid)
        return next((one for one in self.sessions() if one.handover.part == part), None)

    def refusals(self) -> list[str]:
        return [one.reason for one in self.reports if isinstance(one, Refused)]

    def finished(self) -> int:
        """Count the restores that have handed everything over."""
        return sum(isinstance(one, HandedOver) for one in self.reports)

    def detached(self) -> int:
        return sum(isinstance(one, Detached) for one in self.reports)

    def ended(self) -> int:
        return sum(isinstance(one, Ended) for one in self.reports)


@contextlib.asynccontextmanager
async def daemon(
    images: Path, socket: Path, *, service: Service | None = None, **options: Any
) -> AsyncIterator[Daemon]:
    """Serve the restores of a checkpoint."""
    reports: list[Report] = []
    async with await Checkpoint.open(images) as checkpoint:
        restores = Restores(checkpoint)
        server = Server(
            socket,
            restores.receive,
            options.pop("source", restores),
            service=service,
            handshake_timeout=None,
            senders=True,
            report=reports.append,
            **options,
        )
        async with server:
            yield Daemon(server, reports)
