"""Pages of a tree that has moved, over connections that break."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aiouffd.errors import SourceError
from aiouffd.migration.tree_pages import TreePages
from aiouffd.protocols.criu.checkpoint import Checkpoint
from aiouffd.protocols.criu.images import PagemapEntry
from aiouffd.protocols.criu.page_server import PageServer
from tests.protocols.criu.checkpoints import PAGE, Made, Memory, anonymous
from tests.serving import within
from tests.targets import until

START = 0x10000000
COUNT = 1024
DATA = random.Random(7).randbytes(COUNT * PAGE)


@pytest.fixture
async def checkpoint(tmp_path: Path) -> AsyncIterator[Checkpoint]:
    """One task, all of whose pages are in a file."""
    memory = Memory([anonymous(START, COUNT)], [PagemapEntry(START, COUNT, 6)], DATA)
    async with await Checkpoint.open(Made({1000: memory}).write(tmp_path / "c")) as checkpoint:
        yield checkpoint


async def test_reads_go_on_over_another_connection(checkpoint: Checkpoint) -> None:
    """Short and long ones that were under way when the server went, and came back."""
    server = PageServer(checkpoint)
    await server.start()
    port = server.port
    async with TreePages("127.0.0.1", port) as pages:
        assert await within(pages.read_pages(1000, START, 1)) == DATA[:PAGE]
        await server.aclose()
        long = bytearray(512 * PAGE)
        reads = [
            asyncio.ensure_future(pages.read_pages(1000, START + at * PAGE, 2)) for at in (9, 70)
        ]
        into = asyncio.ensure_future(pages.read_pages_into(1000, START, memoryview(long)))
        await until(lambda: pages._client is None, "the connection is lost")
        assert not any(read.done() for read in (*reads, into))
        async with PageServer(checkpoint, port=port):
            await within(into)
            for at, read in zip((9, 70), reads, strict=True):
                assert await within(read) == DATA[at * PAGE : (at + 2) * PAGE]
            assert long == DATA[: 512 * PAGE]
            assert pages.connections == 2
            assert not pages.given_up.done()
            await within(pages.finish())


async def test_what_does_not_come_back_is_given_up(checkpoint: Checkpoint) -> None:
    """After the deadline, and for everybody at once."""
    server = PageServer(checkpoint)
    await server.start()
    async with TreePages("127.0.0.1", server.port, deadline=0.1) as pages:
        await server.aclose()
        with pytest.raises(SourceError, match=r"no memory has come for 0\.1 s"):
            await within(pages.read_pages(1000, START, 1))
        assert "no memory has come" in await within(pages.given_up)
        with pytest.raises(SourceError, match="no memory has come"):
            await within(pages.read_pages(1000, START, 1))


async def test_a_page_that_is_not_there(checkpoint: Checkpoint) -> None:
    """The server closes, each time: that has an end."""
    async with (
        PageServer(checkpoint) as server,
        TreePages("127.0.0.1", server.port, deadline=0.1) as pages,
    ):
        with pytest.raises(SourceError):
            await within(pages.read_pages(1001, START, 1))
        assert pages.given_up.done()
        assert pages.connections > 1


async def test_closed(checkpoint: Checkpoint) -> None:
    """Whoever waits hears of it."""
    server = PageServer(checkpoint)
    await server.start()
    async with TreePages("127.0.0.1", server.port) as pages:
        await server.aclose()
        read = asyncio.ensure_future(pages.read_pages(1000, START, 1))
        await until(lambda: pages._client is None, "the connection is lost")
    with pytest.raises(SourceError, match="it was closed"):
        await within(read)


async def test_nobody_there() -> None:
    """The first connection is not tried for long."""
    with pytest.raises(SourceError, match="cannot be used"):
        async with TreePages("127.0.0.1", 1):
            pass
