"""Hundreds of targets at once: one process that forks them all, which is quick.

Run as ``python -m tests.crowd SOCKET COUNT PAGES``.  Each child hands its own memory over, reads
its first ``number % PAGES + 1`` pages and compares them, then waits; when a line comes on stdin
all of them read the rest.  The parent tells the children's pids, then how each ended.

Knows: what the targets do, and what every page has to hold.
Must not know: the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from tests.serving import image
from tests.stand_in_vmm import PAGE, ROOT, Guest, Options, _hand_over

ALL_RIGHT: Final = 0
WRONG: Final = 1
ZEROS: Final = 2  # the rest read as zeros, every page of it
REFUSED: Final = 3  # even the first pages read as zeros


def first_pages(number: int, pages: int) -> int:
    """Say how many pages a child reads at once."""
    return number % pages + 1


def _child(number: int, path: str, pages: int, ready: int, go: int) -> int:
    from aiouffd.uffd import Userfaultfd

    options = Options(socket=path, size=pages * PAGE)
    guest = Guest(options)
    uffd = Userfaultfd.open(allow_user_mode_only=True)
    uffd.register(guest.starts[0], guest.length)
    server = _hand_over(options, guest, uffd.fileno())
    whole = image(0, pages * PAGE)
    first = first_pages(number, pages) * PAGE
    begin = guest.read(0, first)
    os.write(ready, b".")
    if begin == bytes(first):
        return REFUSED
    if begin != whole[:first]:
        return WRONG
    os.read(go, 1)  # until the parent closes it
    rest = guest.read(first, guest.length - first) if first < guest.length else b""
    server.close()
    if rest == whole[first:]:
        return ALL_RIGHT
    return ZEROS if rest == bytes(len(rest)) else WRONG


def main(path: str, count: int, pages: int) -> None:
    """Fork the targets, and tell how they end."""
    ready, ready_writer = os.pipe()
    go, go_writer = os.pipe()
    pids = []
    for number in range(count):
        pid = os.fork()
        if not pid:
            status = WRONG
            try:
                os.close(go_writer)
                status = _child(number, path, pages, ready_writer, go)
            finally:
                os._exit(status)
        pids.append(pid)
    os.close(ready_writer)
    print(json.dumps(pids), flush=True)
    for _ in range(count):
        os.read(ready, 1)
    print("ready", flush=True)
    sys.stdin.readline()
    os.close(go_writer)
    print(json.dumps([os.waitpid(pid, 0)[1] for pid in pids]), flush=True)


# --- the test's half -------------------------------------------------------------------


class Crowd:
    """The targets, seen from the test.

    Attributes:
        pids: One per target, in order of their numbers.
    """

    def __init__(self, process: asyncio.subprocess.Process, pids: list[int]) -> None:
        self.process = process
        self.pids = pids

    async def ready(self) -> None:
        """Wait until each has read its first pages."""
        assert await _line(self.process) == "ready"

    async def finish(self) -> list[int]:
        """Let them read the rest.

        Returns:
            The wait status of each.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        statuses = json.loads(await _line(self.process))
        assert isinstance(statuses, list)
        return statuses


async def _line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(60):
        return (await process.stdout.readline()).decode().strip()


@contextlib.asynccontextmanager
async def crowd(path: Path, count: int, pages: int) -> AsyncIterator[Crowd]:
    """Run so many targets until the block ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.crowd",
        os.fspath(path),
        str(count),
        str(pages),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 20,
        start_new_session=True,
    )
    pids: list[int] = []
    try:
        pids += json.loads(await _line(process))
        yield Crowd(process, pids)
    finally:
        # The children are the parent's to reap: none is a stranger as long as it lives.
        if process.returncode is None:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
