"""The receiver of dumps against dumpers that are good, break off, lie, or are none."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trustme

from aiouffd.errors import ClosedError, PeerError
from aiouffd.peers import Limits
from aiouffd.protocols.criu import images
from aiouffd.protocols.criu import page_wire as wire
from aiouffd.protocols.criu.image_folder import ImageFolder
from aiouffd.protocols.criu.images import PagemapEntry
from aiouffd.protocols.criu.page_receiver import PageReceiver
from aiouffd.protocols.criu.page_wire import LONG, SHORT, pack_header
from aiouffd.protocols.criu.tls import client_context, server_context
from tests.protocols.criu.test_tls import files_of
from tests.serving import within
from tests.targets import until

PAGE = 4096
TASK = 1000 << 8 | 1
SHMEM = 77 << 8 | 2
DATA = random.Random(2).randbytes(2048 * PAGE)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[ImageFolder]:
    with contextlib.closing(ImageFolder(str(tmp_path / "images"))) as folder:
        yield folder


class Dumper:
    """Sends as ``criu dump`` does."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.size = size

    def say(self, command: int, pages: int = 0, address: int = 0, image: int = TASK) -> None:
        self.writer.write(pack_header(self.size, command, pages, address, image))

    async def hear(self, length: int) -> bytes:
        return await within(self.reader.readexactly(length))

    async def open(self, image: int = TASK) -> bytes:
        self.say(wire.PARENT, image=image)
        parent = await self.hear(4)
        self.say(wire.OPEN2, image=image)
        assert await self.hear(1) == parent[:1]
        return parent[:1]

    async def run(self, address: int, data: bytes, image: int = TASK, flags: int = 6) -> None:
        self.say(flags << 16 | wire.ADD_F, len(data) // PAGE, address, image)
        self.writer.write(data)
        await within(self.writer.drain())

    async def close(self) -> None:
        self.say(wire.CLOSE, image=0)
        assert await self.hear(4) == bytes(4)
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    async def cut(self) -> bool:
        """Wait until the other side has closed."""
        with contextlib.suppress(ConnectionError):
            while await within(self.reader.read(1 << 16)):
                pass
        return True


@contextlib.asynccontextmanager
async def dumper(
    receiver: PageReceiver, size: int = LONG, context: ssl.SSLContext | None = None
) -> AsyncIterator[Dumper]:
    reader, writer = await within(asyncio.open_connection("127.0.0.1", receiver.port, ssl=context))
    try:
        yield Dumper(reader, writer, size)
    finally:
        writer.transport.abort()


async def whole_dump(one: Dumper) -> None:
    await one.open()
    await one.run(0x10000, DATA)
    one.say(2 << 16 | wire.ADD_F, 3, 0x10000000)
    await one.open(SHMEM)
    await one.run(0, DATA[: 5 * PAGE], SHMEM, flags=4)
    await one.close()


def check(folder: ImageFolder, size: int) -> None:
    """What ``whole_dump`` sends is in the folder."""
    path = Path(folder.path)
    assert sorted(os.listdir(path)) == [
        "pagemap-1000.img",
        "pagemap-shmem-77.img",
        "pages-65537.img",
        "pages-65538.img",
    ]
    data = (path / "pagemap-1000.img").read_bytes()
    assert images.has_wide_counts(data, "x") == (size == LONG)
    assert images.parse_pagemap(data, "x").entries == (
        PagemapEntry(0x10000, len(DATA) // PAGE, 6),
        PagemapEntry(0x10000000, 3, 2),
    )
    assert (path / "pages-65537.img").read_bytes() == DATA
    assert (path / "pages-65538.img").read_bytes() == DATA[: 5 * PAGE]


@pytest.mark.parametrize("size", [SHORT, LONG])
async def test_a_dump_is_received(folder: ImageFolder, size: int) -> None:
    """Before the dumper is told so, everything is on the disk under its name."""
    async with PageReceiver(folder) as receiver, dumper(receiver, size) as one:
        await whole_dump(one)
        check(folder, size)
        await within(receiver.wait_received())
        await within(receiver.finish())
        assert receiver.refused == 0


@pytest.mark.parametrize("size", [SHORT, LONG])
async def test_over_tls(folder: ImageFolder, tmp_path: Path, size: int) -> None:
    """With certificates on both sides."""
    authority = trustme.CA()
    context = server_context(files_of(authority, tmp_path, "server"))
    mine = client_context(files_of(authority, tmp_path, "client"))
    async with (
        PageReceiver(folder, ssl=context, client_name="127.0.0.1") as receiver,
        dumper(receiver, size, mine) as one,
    ):
        await whole_dump(one)
        await within(receiver.wait_received())
        check(folder, size)


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("where", [0, 1, 2, 3])
async def test_a_dump_that_breaks_off_leaves_nothing(
    folder: ImageFolder, where: int, reset: bool
) -> None:
    """Anywhere; and the error says who has sent it."""
    async with PageReceiver(folder) as receiver:
        async with dumper(receiver) as one:
            await one.open()
            if where == 1:
                one.writer.write(b"\6")
            elif where >= 2:
                one.say(6 << 16 | wire.ADD_F, 512, 0x10000)
                one.writer.write(DATA[: 512 * PAGE - (where == 2)])
                await one.writer.drain()
            if reset:
                peer: socket.socket = one.writer.get_extra_info("socket")
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                one.writer.write_eof()
                assert await one.cut()
        with pytest.raises(PeerError, match=r"^127\.0\.0\.1:\d+: the dump broke off"):
            await within(receiver.wait_received())
    assert os.listdir(folder.path) == []


@pytest.mark.parametrize("where", ["in a header", "in pages", "between"])
async def test_a_dumper_that_falls_silent(folder: ImageFolder, where: str) -> None:
    """It is given up, later where it may have other things to do; nothing is left."""
    loop = asyncio.get_running_loop()
    async with PageReceiver(folder, silence=0.05) as receiver, dumper(receiver) as one:
        await one.open()
        await one.run(0x10000, DATA[:PAGE])
        if where == "in a header":
            one.writer.write(pack_header(LONG, wire.OPEN2, 0, 0, SHMEM)[:20])
        elif where == "in pages":
            one.say(6 << 16 | wire.ADD_F, 2, 0x20000)
            one.writer.write(DATA[: 2 * PAGE - 1])
        begun = loop.time()
        limit = 0.5 if where == "between" else 0.05
        with pytest.raises(PeerError, match=rf"broke off: sent nothing for {limit:g} s"):
            await within(receiver.wait_received())
        assert loop.time() - begun >= 0.9 * limit
        assert await one.cut()
    assert os.listdir(folder.path) == []


async def test_a_dumper_that_waits_for_the_disk_is_not_silent(
    folder: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that takes."""
    write = ImageFolder.add_data

    def slowly(self: ImageFolder, pieces: list[memoryview]) -> None:
        time.sleep(0.3)
        write(self, pieces)

    monkeypatch.setattr(ImageFolder, "add_data", slowly)
    limits = Limits(in_flight_bytes=64 << 10)
    async with (
        PageReceiver(folder, limits=limits, silence=0.1) as receiver,
        dumper(receiver) as one,
    ):
        await one.open()
        await one.run(0x10000, DATA[: 64 * PAGE])
        await one.close()
        await within(receiver.wait_received())


@pytest.mark.parametrize(
    "say, why",
    [
        (b"\xff" * 64, "unknown command"),
        (pack_header(LONG, wire.GET, 1, 0x1000, 5), "on a connection that sends some"),
        (pack_header(LONG, wire.OPEN2, 0, 0, TASK), "task 1000 twice"),
        (pack_header(LONG, 2 << 16 | 6, 1, 0x10000, TASK) * 2, "behind one that ends"),
        (pack_header(LONG, 1 << 16 | 6, 1, 0x10000, TASK), "left the page at 0x10000"),
    ],
)
async def test_a_dumper_that_breaks_the_protocol(folder: ImageFolder, say: bytes, why: str) -> None:
    """It is dropped, told apart, and leaves nothing."""
    async with PageReceiver(folder) as receiver:
        async with dumper(receiver) as one:
            await one.open()
            one.writer.write(say)
            assert await one.cut()
        with pytest.raises(PeerError, match=why):
            await within(receiver.wait_received())
    assert os.listdir(folder.path) == []


async def test_a_disk_that_is_full(folder: ImageFolder) -> None:
    """The dumper hears that something is wrong, and its process lives on."""
    async with PageReceiver(folder) as receiver:
        async with dumper(receiver) as one:
            await one.open()
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, folder._images[0].pages_fd)
            os.close(full)
            with contextlib.suppress(ConnectionError):
                await one.run(0x10000, DATA)
            assert await one.cut()
        with pytest.raises(OSError) as caught:
            await within(receiver.wait_received())
        assert caught.value.filename == "pages-65537.img"
    assert os.listdir(folder.path) == []


@pytest.mark.parametrize(
    "say",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        pack_header(SHORT, wire.GET, 1, 0x10000000, 5),
        pack_header(LONG, wire.CLOSE),
        b"\0" * 1000,
    ],
)
async def test_who_is_no_dumper_is_dropped_and_the_dump_waited_for(
    folder: ImageFolder, say: bytes
) -> None:
    """Port scanners end nothing."""
    async with PageReceiver(folder, limits=Limits(patience=0.1)) as receiver:
        for _ in range(2):
            async with dumper(receiver) as other:
                other.writer.write(say)
                assert await other.cut()
        async with dumper(receiver) as one:
            await whole_dump(one)
        await within(receiver.wait_received())
    check(folder, LONG)


async def test_who_only_asks_keeps_no_dump_out(folder: ImageFolder) -> None:
    """Neither for longer than it may wait, nor when there is no room besides."""
    async with PageReceiver(folder, limits=Limits(patience=0.2, connections=2)) as receiver:
        async with dumper(receiver) as other:
            other.say(wire.PARENT, image=TASK)
            assert await other.hear(4) == bytes(4)
            assert await other.cut()
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(2):
                other = await stack.enter_async_context(dumper(receiver))
                other.say(wire.PARENT, image=TASK)
                assert await other.hear(4) == bytes(4)
            one = await stack.enter_async_context(dumper(receiver))
            await whole_dump(one)
        await within(receiver.wait_received())
    check(folder, LONG)


async def test_others_do_not_get_into_a_dump(folder: ImageFolder) -> None:
    """Neither by sending one, nor by saying that it is through."""
    async with PageReceiver(folder) as receiver, dumper(receiver) as one:
        await one.open()
        await one.run(0x10000, DATA)
        async with dumper(receiver) as other:
            other.say(wire.OPEN2, image=TASK)
            assert await other.cut()
        async with dumper(receiver) as other:
            await other.close()
        assert receiver.refused == 1
        assert [name[0] for name in os.listdir(folder.path)] == ["."]
        one.say(2 << 16 | wire.ADD_F, 3, 0x10000000)
        await one.open(SHMEM)
        await one.run(0, DATA[: 5 * PAGE], SHMEM, flags=4)
        await one.close()
        await within(receiver.wait_received())
    check(folder, LONG)


async def test_a_dumper_that_is_quicker_than_the_disk_waits(
    folder: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not written yet stays below a bound."""
    seen: list[int] = []
    write = ImageFolder.add_data

    def slowly(self: ImageFolder, pieces: list[memoryview]) -> None:
        seen.append(sum(map(len, pieces)))
        write(self, pieces)

    monkeypatch.setattr(ImageFolder, "add_data", slowly)
    async with (
        PageReceiver(folder, limits=Limits(in_flight_bytes=1 << 20)) as receiver,
        dumper(receiver) as one,
    ):
        await one.open()
        for number in range(8):
            await one.run(0x10000000 * (number + 1), DATA)
        await one.close()
        await within(receiver.wait_received())
    assert sum(seen) == 8 * len(DATA)
    assert max(seen) <= 2 << 20  # the bound, and what one read brings


async def test_finish_waits_for_a_dump_that_has_begun(folder: ImageFolder) -> None:
    """Nobody new gets in meanwhile."""
    async with PageReceiver(folder) as receiver, dumper(receiver) as one:
        await one.open()
        finish = asyncio.ensure_future(receiver.finish())
        await asyncio.sleep(0)
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", receiver.port)
        await one.run(0x10000, DATA)
        assert not finish.done()
        await one.close()
        await within(finish)
        await receiver.wait_received()
        assert folder.stored_bytes == len(DATA)


async def test_finish_without_a_dump(folder: ImageFolder) -> None:
    """Who waits is told."""
    async with PageReceiver(folder) as receiver, dumper(receiver) as silent:
        waiting = asyncio.ensure_future(receiver.wait_received())
        await within(receiver.finish())
        with pytest.raises(ClosedError):
            await waiting
        assert await silent.cut()


async def test_closing_ends_a_dump_and_leaves_nothing(folder: ImageFolder) -> None:
    """Whoever is in the middle of one."""
    async with PageReceiver(folder) as receiver:
        async with dumper(receiver) as one:
            await one.open()
            await one.run(0x10000, DATA)
            await within(receiver.aclose())
            assert await one.cut()
        with pytest.raises(PeerError, match="broke off"):
            await receiver.wait_received()
    assert os.listdir(folder.path) == []


async def test_holes_are_left_to_a_parent(tmp_path: Path) -> None:
    """The dumper is told that there is one, where there is."""
    parent = tmp_path / "first"
    parent.mkdir()
    pagemap = images.Pagemap(1, (PagemapEntry(0x10000, 8, 6),))
    (parent / "pagemap-1000.img").write_bytes(images.write_pagemap(pagemap, wide=True))
    with contextlib.closing(ImageFolder(str(tmp_path / "second"))) as folder:
        folder.link_parent("../first")
        async with PageReceiver(folder) as receiver, dumper(receiver) as one:
            assert await one.open() == b"\1"
            one.say(1 << 16 | wire.ADD_F, 4, 0x10000)
            await one.run(0x14000, DATA[:PAGE])
            assert await one.open(1001 << 8 | 1) == b"\0"
            await one.close()
            await within(receiver.wait_received())
        assert folder.parent_bytes == 4 * PAGE


async def test_a_thousand_connections_that_say_nothing(folder: ImageFolder) -> None:
    """The dump goes on; no descriptor is left."""
    async with (
        PageReceiver(folder, limits=Limits(connections=16)) as receiver,
        dumper(receiver) as one,
    ):
        await one.open()
        sockets = []
        try:
            for _ in range(1000):
                each = socket.socket()
                sockets.append(each)
                each.setblocking(False)
                await asyncio.get_running_loop().sock_connect(each, ("127.0.0.1", receiver.port))
            await until(lambda: receiver.refused >= 1000 - 16, "they were dropped")
            await one.run(0x10000, DATA)
        finally:
            for each in sockets:
                each.close()
        one.say(2 << 16 | wire.ADD_F, 3, 0x10000000)
        await one.open(SHMEM)
        await one.run(0, DATA[: 5 * PAGE], SHMEM, flags=4)
        await one.close()
        await within(receiver.wait_received())
    check(folder, LONG)
