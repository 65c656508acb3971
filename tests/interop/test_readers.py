"""Programs of the distribution that read memory which a pager serves."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
from pathlib import Path
from typing import IO

import pytest

from aiouffd import PAGE_SIZE
from tests.interop.serving import LIMIT, serving

pytestmark = pytest.mark.root


async def test_sha256sum_digests_served_memory(seed: int) -> None:
    """A process writes its lazy memory into sha256sum, and the digest is that of the source."""
    reading, writing = os.pipe()
    with open(reading, "rb") as reader, open(writing, "wb") as writer:
        digest = asyncio.create_task(_output("sha256sum", stdin=reader))
        async with serving(512, seed, stdout=writer) as served:
            writer.close()  # the one that is left is the writer's
            await served.write()
            assert len(served.faults) == 512
        out = await digest
    assert out.split()[0].decode() == hashlib.sha256(served.content).hexdigest()


async def _output(*program: str, stdin: IO[bytes]) -> bytes:
    done = await asyncio.to_thread(
        subprocess.run, program, stdin=stdin, capture_output=True, check=True, timeout=LIMIT
    )
    return done.stdout


async def test_dd_of_proc_mem_is_refused_or_right(tmp_path: Path, seed: int) -> None:
    """dd of /proc/PID/mem fails at once where a page is missing, and is right where it is there.

    The kernel does not let that file wait for a userfault: it is EIO, never a hang and never
    zeros.
    """

    async def dd() -> tuple[int, bytes]:
        first = served.address // PAGE_SIZE
        output = tmp_path / "memory"
        source = f"if=/proc/{served.popen.pid}/mem"
        done = await asyncio.to_thread(
            subprocess.run,
            ["dd", source, f"of={output}", f"bs={PAGE_SIZE}", f"skip={first}", "count=8"],
            check=False,
            capture_output=True,
            timeout=LIMIT,
        )
        return done.returncode, output.read_bytes()

    written = tmp_path / "written"
    # to /dev/null, write(2) would not look at the memory at all
    with written.open("wb") as file:
        async with serving(8, seed, stdout=file) as served:
            assert await dd() == (1, b"")
            assert not served.faults
            await served.write()
            assert await dd() == (0, served.content)
            assert len(served.faults) == 8
    assert written.read_bytes() == served.content
