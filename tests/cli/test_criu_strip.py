"""``aiouffd criu strip``: what it says, and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from aiohttp import web

from aiouffd.cli import main
from aiouffd.protocols.criu.images import PagemapEntry
from tests.http_server import ImageServer
from tests.protocols.criu.checkpoints import PAGE, Made, Memory, anonymous

BASE = 0x7F00_0000_0000


def checkpoint(folder: Path) -> Path:
    """A megabyte of lazy pages, and some that are not."""
    memory = Memory(
        [anonymous(BASE, 1024)],
        [PagemapEntry(BASE, 256, 6), PagemapEntry(BASE + 256 * PAGE, 4, 4)],
        bytes(260 * PAGE),
    )
    return Made({1000: memory}).write(folder)


def test_a_copy_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says what is in it and what is not."""
    folder, out = checkpoint(tmp_path / "c"), tmp_path / "out"
    assert main(["criu", "strip", str(folder), str(out)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith(f"{out}: 16.0 KiB of pages and ")
    assert said.out.endswith(" of other images; 1.0 MiB may be brought later\n")
    assert (out / "pages-1.img").stat().st_size == 260 * PAGE
    assert main(["criu", "strip", str(folder), str(out)]) == 1
    assert capsys.readouterr().err == f"aiouffd: {out}: It is there, and not empty\n"


async def test_ended_midway_nothing_stays(tmp_path: Path) -> None:
    """SIGTERM, while it waits for pages from far away: no copy, and nothing beside it."""
    folder, work = checkpoint(tmp_path / "c"), tmp_path / "work"
    work.mkdir()
    asked = asyncio.Event()
    async with ImageServer((folder / "pages-1.img").read_bytes()) as server:

        async def answer(request: web.Request) -> web.StreamResponse:
            if not request.headers.get("Range", "").startswith(f"bytes={256 * PAGE}-"):
                return await server.give(request)
            asked.set()
            return await server.stall(request)

        server.always(answer)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "aiouffd", "criu", "strip", str(folder), str(work / "out")),
            *("--pages", server.base),
        )
        async with asyncio.timeout(30):
            await asked.wait()
            assert [name for name in os.listdir(work) if name.startswith(".out.")] != []
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 128 + signal.SIGTERM
    assert os.listdir(work) == []
