"""A command for the keeper, obeyed line by line: stores, asks, dies.

Run as ``python -m tests.keeping PATH``: it connects to the test's socket at PATH, says what it was
started with, and carries out what it is told.

Knows: the fd store's client side.
Must not know: what a test is about.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiouffd.fd_store import FdStore
from aiouffd.sd_notify import notify, take_listen_fds
from tests.targets import DEADLINE

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    told = [False]
    signal.signal(signal.SIGTERM, lambda *_: told.__setitem__(0, True))
    store = FdStore.from_environment(take_listen_fds())
    assert store is not None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(sys.argv[1])
        with sock.makefile("rw", encoding="utf-8") as lines:

            def say(**words: Any) -> None:
                lines.write(json.dumps(words) + "\n")
                lines.flush()

            taken = {
                name: [os.readlink(f"/proc/self/fd/{fd.fileno()}") for fd in fds]
                for name, fds in store.taken.items()
            }
            say(pid=os.getpid(), taken=taken, limit=store.limit)
            for line in lines:
                match json.loads(line):
                    case ["ready"]:
                        notify("READY=1")
                    case ["store", name, *paths]:
                        fds = [os.open(path, os.O_RDONLY) for path in paths]
                        store.put(name, fds)
                        for fd in fds:
                            os.close(fd)
                    case ["pidfd", name, pid]:
                        pidfd = os.pidfd_open(pid)
                        store.put(name, [pidfd])
                        os.close(pidfd)
                    case ["remove", name]:
                        store.remove(name)
                    case ["child stores", name, path]:
                        code = (
                            "import os,sys;from aiouffd.sd_notify import notify;"
                            "notify('FDSTORE=1\\nFDNAME='+sys.argv[1], [os.open(sys.argv[2], 0)])"
                        )
                        subprocess.run([sys.executable, "-c", code, name, path], check=True)
                    case ["exit", status]:
                        os._exit(status)
                    case ["die with", name, path]:
                        store.put(name, [os.open(path, os.O_RDONLY)])
                        os.kill(os.getpid(), signal.SIGKILL)
                    case ["told"]:
                        pass
                say(done=store.barrier(), told=told[0])


class Run:
    """One run of the command, seen from the test."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.hello: dict[str, Any] = {}

    async def answer(self) -> dict[str, Any]:
        line = await asyncio.wait_for(self._reader.readline(), DEADLINE)
        assert line, "the command has died"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def tell(self, *words: Any) -> None:
        self._writer.write(json.dumps(words).encode() + b"\n")

    async def ask(self, *words: Any) -> dict[str, Any]:
        self.tell(*words)
        return await self.answer()

    def close(self) -> None:
        self._writer.close()

    @property
    def taken(self) -> dict[str, list[str]]:
        taken: dict[str, list[str]] = self.hello["taken"]
        return taken


class Kept:
    """A keeper in a process of its own, and the runs of its command."""

    def __init__(self, process: asyncio.subprocess.Process, runs: asyncio.Queue[Run]) -> None:
        self.process = process
        self._runs = runs

    async def next_run(self) -> Run:
        return await asyncio.wait_for(self._runs.get(), DEADLINE)

    async def until_it_says(self, text: str) -> None:
        """Wait until the keeper says something."""
        assert self.process.stderr is not None
        while text.encode() not in (
            line := await asyncio.wait_for(self.process.stderr.readline(), DEADLINE)
        ):
            assert line, "the keeper has ended"

    async def end(self) -> tuple[int, str]:
        """Wait for the keeper's end; give its status and what it had to say."""
        _, text = await asyncio.wait_for(self.process.communicate(), DEADLINE)
        assert self.process.returncode is not None
        return self.process.returncode, text.decode()


@contextlib.asynccontextmanager
async def keeping(folder: Path, *options: str) -> AsyncIterator[Kept]:
    """Start ``aiouffd keep`` with this module as the command."""
    runs: asyncio.Queue[Run] = asyncio.Queue()
    every: list[Run] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        run = Run(reader, writer)
        every.append(run)
        run.hello = await run.answer()
        runs.put_nowait(run)

    path = str(folder / "control")
    server = await asyncio.start_unix_server(connected, path)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aiouffd", "keep", *options, "--"),
        *(sys.executable, "-m", "tests.keeping", path),
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Kept(process, runs)
    finally:
        if process.returncode is None:
            process.kill()
        for run in every:
            run.close()  # which ends the command, and it lets go of the keeper's stderr
        server.close()
        await server.wait_closed()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]
        await asyncio.sleep(0)


if __name__ == "__main__":
    main()
