"""``aiouffd serve`` as a process, with a control socket; and the commands that speak to it.

Knows: how to start it, what its first line says, how to run another command.
Must not know: what a test is about.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

from aiouffd.testing.sources import image
from tests.stand_in_vmm import PAGE, ROOT

SIZE: Final = 32 * PAGE


class Serve:
    """A running ``aiouffd serve --json``."""

    def __init__(self, process: asyncio.subprocess.Process, socket: Path) -> None:
        self.process = process
        self.socket = socket
        self.listening: dict[str, Any] = {}

    async def event(self, name: str) -> dict[str, Any]:
        """Read its lines up to this event."""
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            while line := await self.process.stdout.readline():
                fields = json.loads(line)
                assert isinstance(fields, dict)
                if fields["event"] == name:
                    return fields
        raise AssertionError(f"it ended without {name}: {await self.diagnostics()}")

    def descriptors(self) -> int:
        """Count its descriptors: a client that has connected is one."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    async def diagnostics(self) -> str:
        """Read what it has to say on stderr, up to its end."""
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()

    async def end(self) -> int:
        """Wait for its exit status."""
        async with asyncio.timeout(30):
            return await self.process.wait()


@contextlib.asynccontextmanager
async def running(
    folder: Path, *options: str, socket: str = "", fds: tuple[int, ...] = (), **environment: str
) -> AsyncIterator[Serve]:
    """Run it over an image of 32 pages until it listens."""
    file = folder / "image"
    if not file.exists():
        file.write_bytes(image(SIZE))
    path = folder / "socket"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aiouffd", "serve", os.fspath(file)),
        *("--socket", socket or os.fspath(path), "--json", *options),
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        pass_fds=fds,
    )
    server = Serve(process, path)
    try:
        server.listening = await server.event("listening")
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def command(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run another command, and give its exit status and what it printed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aiouffd", *arguments),
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()
