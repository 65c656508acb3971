"""A clone in Python: a process that attaches to a server of a shared image, and obeys.

Run as a program it is that process: each line on its stdin is ``digest``, or
``write OFFSET BYTE``, and each answer is one line.  ``Attached`` starts it and speaks to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from aiouffd.protocols.shared import attach
from tests.stand_in_vmm import ROOT


class Attached:
    """A clone that runs, seen from the test."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            return (await self.process.stdout.readline()).decode().strip()

    async def ask(self, command: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        return await self.line()

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, path: Path, size: int) -> AsyncIterator[Attached]:
        """Run a clone until it is served; killed and reaped at the end."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.attached", path),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
        )
        clone = cls(process)
        try:
            assert await clone.line() == f"attached {size}"
            yield clone
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()


def obey(path: str) -> None:
    """Be the clone."""
    memory = attach(path)
    print("attached", len(memory), flush=True)
    for line in sys.stdin:
        command, *numbers = line.split()
        if command == "digest":
            print(hashlib.sha256(memory).hexdigest(), flush=True)
        else:
            offset, byte = map(int, numbers)
            memory[offset] = byte
            print("written", flush=True)


if __name__ == "__main__":
    obey(sys.argv[1])
