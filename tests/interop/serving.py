"""Start a program of ours (tests/interop/lazy_writer.py) and serve its memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from aiouffd import PAGE_SIZE, PageFault, Pager, Userfaultfd

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIMIT = 30.0 * float(os.environ.get("AIOUFFD_TIME_SCALE", "1"))


def command(program: str, *arguments: object) -> list[str]:
    """Make the command line of one of our programs."""
    return [sys.executable, str(HERE / program), *map(str, arguments)]


def environment() -> dict[str, str]:
    """Make an environment in which our programs find this checkout, and no other."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@dataclass
class Served:
    """A writer that runs, and what was served to it.

    Attributes:
        content: What its memory holds, as far as the server is concerned.
        address: Where in the writer.
        popen: It, or the program it was started under.
        faults: Those answered.
    """

    content: bytes
    address: int
    popen: subprocess.Popen[bytes]
    control: socket.socket
    faults: list[PageFault] = field(default_factory=list)

    async def write(self) -> None:
        """Let it write its memory to its standard output; return when it has."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(LIMIT):
            await loop.sock_sendall(self.control, b"!")
            assert await loop.sock_recv(self.control, 1) == b"!"


@contextlib.asynccontextmanager
async def serving(
    pages: int,
    seed: int,
    *,
    under: Sequence[str] = (),
    stdout: int | IO[bytes] = subprocess.DEVNULL,
) -> AsyncIterator[Served]:
    """Start a writer, perhaps under another program, and serve its memory with random bytes."""
    content = random.Random(seed).randbytes(pages * PAGE_SIZE)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours:
        with theirs:
            popen = _start(
                theirs, [*under, *command("lazy_writer.py", theirs.fileno(), pages)], stdout
            )
        with popen:
            try:
                async with asyncio.timeout(LIMIT):
                    uffd, address = await _receive(ours)
                served = Served(content, address, popen, ours)

                async def fill(fault: PageFault) -> bytes:
                    served.faults.append(fault)
                    return content[fault.offset : fault.offset + fault.length]

                async with Pager(uffd) as pager:
                    pager.register(address, len(content), fill)
                    yield served
            finally:
                ours.close()  # the writer waits for a byte, and reads the end
                await asyncio.to_thread(_end, popen)


def _start(
    control: socket.socket, arguments: list[str], stdout: int | IO[bytes]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        arguments,
        pass_fds=[control.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        env=environment(),
    )


def _end(popen: subprocess.Popen[bytes]) -> None:
    try:
        popen.wait(LIMIT)
    finally:
        popen.kill()


async def _receive(connection: socket.socket) -> tuple[Userfaultfd, int]:
    readable = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(connection, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(connection)
    data, fds, _, _ = socket.recv_fds(connection, 8, 1)
    return Userfaultfd.adopt(fds[0]), int.from_bytes(data, "little")
