"""examples/serve_snapshot.py, run as its first lines say."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from aiouffd.testing.sources import image
from tests.stand_in_vmm import PAGE, ROOT, StandInVmm


async def test_it_serves_machines_until_sigterm(tmp_path: Path) -> None:
    """Two machines read the image; SIGTERM lets them finish; each has its two lines."""
    file, path = tmp_path / "memory.img", tmp_path / "uffd.sock"
    file.write_bytes(image(64 * PAGE))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "examples/serve_snapshot.py",
        file,
        path,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.fspath(ROOT)},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            assert await process.stdout.readline() == f"ready on {path}\n".encode()
            async with (
                StandInVmm.start(path, 64 * PAGE) as one,
                StandInVmm.start(path, 32 * PAGE, offset=32 * PAGE) as two,
            ):
                lines = [await process.stdout.readline() for _ in range(2)]
                process.send_signal(signal.SIGTERM)
                assert await one.read(0, 64 * PAGE) == image(64 * PAGE)
                assert await two.read(0, 32 * PAGE) == image(64 * PAGE)[32 * PAGE :]
            rest = await process.stdout.read()
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert all(b"started" in line for line in lines)
    assert rest.count(b"ended after") == 2
    assert rest.count(b" 0 failures") == 2


def test_it_fits_on_a_page() -> None:
    """It stays under sixty lines."""
    assert len((ROOT / "examples/serve_snapshot.py").read_text().splitlines()) < 60
