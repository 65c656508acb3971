"""The page server against clients that are good, many, slow, strange, or just leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme

from aiouffd.errors import SourceError
from aiouffd.kernel import page_cache
from aiouffd.peers import Limits
from aiouffd.protocols.criu import page_wire as wire
from aiouffd.protocols.criu.checkpoint import Checkpoint
from aiouffd.protocols.criu.images import PagemapEntry
from aiouffd.protocols.criu.page_server import Left, PageServer
from aiouffd.protocols.criu.page_wire import LONG, SHORT, Closed, Pages, Puller, pack_header
from aiouffd.protocols.criu.tls import client_context, server_context
from aiouffd.sources import Source
from aiouffd.sources.buffer import BufferSource
from tests.protocols.criu.checkpoints import PAGE, Made, Memory, anonymous, lone_task
from tests.protocols.criu.test_tls import files_of
from tests.serving import within
from tests.targets import until

if TYPE_CHECKING:
    from typing_extensions import Buffer

START = 0x10000000
COUNT = 2048
DATA = random.Random(7).randbytes(COUNT * PAGE)
OTHER = random.Random(8).randbytes(4 * PAGE)
LIVE_AT = START + (COUNT + 64) * PAGE


def page(number: int, count: int = 1) -> bytes:
    return DATA[number * PAGE : (number + count) * PAGE]


@pytest.fixture
async def checkpoint(tmp_path: Path) -> AsyncIterator[Checkpoint]:
    """Two tasks; of one some pages are in no file."""
    memories = {
        1000: Memory(
            [anonymous(START, COUNT), anonymous(LIVE_AT, 8)],
            [PagemapEntry(START, COUNT, 6), PagemapEntry(LIVE_AT, 8, 2)],
            DATA,
        ),
        1001: Memory([anonymous(START, 4)], [PagemapEntry(START, 4, 6)], OTHER),
    }
    made = Made(memories, [lone_task(1000), lone_task(1001, 1000), lone_task(7, 1000, dead=True)])
    async with await Checkpoint.open(made.write(tmp_path / "checkpoint")) as checkpoint:
        yield checkpoint


class Client:
    """Asks as CRIU does, and reads what comes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int):
        self.reader = reader
        self.writer = writer
        self.puller = Puller(size)

    def ask(self, address: int, pages: int, pid: int = 1000) -> None:
        self.writer.write(self.puller.get(pid, address, pages))

    async def answers(self, count: int) -> list[Pages | Closed]:
        events: list[Pages | Closed] = []
        while len(events) < count:
            data = await within(self.reader.read(1 << 16))
            assert data, "the server has closed"
            events += self.puller.feed(data)
        return events

    async def pages(self, address: int, pages: int, pid: int = 1000) -> Buffer:
        self.ask(address, pages, pid)
        (answer,) = await self.answers(1)
        assert isinstance(answer, Pages)
        return answer.data

    async def end(self) -> None:
        self.writer.write(self.puller.close())
        assert await self.answers(1) == [Closed(0)]

    async def cut(self) -> bool:
        """Wait until the other side has closed, whatever it says before."""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while await within(self.reader.read(1 << 16)):
                pass
        return True


@contextlib.asynccontextmanager
async def client(
    server: PageServer, size: int = SHORT, context: ssl.SSLContext | None = None
) -> AsyncIterator[Client]:
    reader, writer = await within(asyncio.open_connection("127.0.0.1", server.port, ssl=context))
    try:
        yield Client(reader, writer, size)
    finally:
        writer.transport.abort()


@contextlib.asynccontextmanager
async def served_meanwhile(server: PageServer) -> AsyncIterator[None]:
    """Around something hostile: a good client is served before, meanwhile and afterwards."""
    async with client(server) as good:
        assert await good.pages(START, 1) == page(0)
        yield
        assert await good.pages(START + 5 * PAGE, 3) == page(5, 3)
        await good.end()


@pytest.mark.parametrize("size", [SHORT, LONG])
async def test_pages_come_in_the_order_of_the_requests(checkpoint: Checkpoint, size: int) -> None:
    """Of all tasks, clamped to what lies together, in the client's header size."""
    server = PageServer(checkpoint, client_name="nobody is asked for it without TLS")
    async with server, client(server, size) as good:
        good.ask(START + 3 * PAGE, 1)
        good.ask(START, 4, pid=1001)
        good.ask(START + (COUNT - 2) * PAGE, 1024)
        assert await good.answers(3) == [
            Pages(1000, START + 3 * PAGE, page(3)),
            Pages(1001, START, OTHER),
            Pages(1000, START + (COUNT - 2) * PAGE, page(COUNT - 2, 2)),
        ]
        assert await good.pages(START, 1024) == page(0, 1024)
        await good.end()
        good.writer.close()
        await until(lambda: server.connections == 0, "it has left")
        assert server.refused == 0
        assert server.answered == 4
        assert server.answered_bytes == (1 + 4 + 2 + 1024) * PAGE


async def test_any_number_of_restores_at_once_and_one_after_the_other(
    checkpoint: Checkpoint,
) -> None:
    """Of both header sizes."""

    async def restore(server: PageServer, number: int) -> None:
        async with client(server, (SHORT, LONG)[number % 2]) as good:
            order = list(range(0, COUNT, 64))
            random.Random(number).shuffle(order)
            for at in order:
                good.ask(START + at * PAGE, 64)
            for at, answer in zip(order, await good.answers(len(order)), strict=True):
                assert answer == Pages(1000, START + at * PAGE, page(at, 64))
            await good.end()

    async with PageServer(checkpoint) as server:
        for _ in range(2):
            await asyncio.gather(*(restore(server, number) for number in range(5)))
        await until(lambda: server.connections == 0, "all have left")
        assert server.refused == 0


async def test_over_tls_a_header_has_a_record_of_its_own(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """CRIU's client reads one record, then waits for the socket."""
    authority = trustme.CA()
    context = server_context(files_of(authority, tmp_path, "server"))
    async with PageServer(checkpoint, ssl=context, client_name="127.0.0.1") as server:
        mine = client_context(files_of(authority, tmp_path, "client"))
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = mine.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)

        async def more() -> None:
            writer.write(outgoing.read())
            data = await within(reader.read(1 << 16))
            assert data
            incoming.write(data)

        async def read(length: int) -> bytes:
            while True:
                with contextlib.suppress(ssl.SSLWantReadError):
                    return tls.read(length)
                await more()

        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
                break
            await more()
        for _ in range(3):
            tls.write(pack_header(LONG, wire.GET, 1024, START, 1000))
        for _ in range(3):
            # However much there is to read, a read gives one record.
            assert await read(1 << 16) == pack_header(LONG, 0x40006, 1024, START, 1000)
            came = bytearray()
            while len(came) < 1024 * PAGE:
                piece = await read(1 << 16)
                assert len(came) + len(piece) <= 1024 * PAGE
                came += piece
            assert came == page(0, 1024)
        writer.close()


async def test_a_client_with_a_certificate_for_somebody_else(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As CRIU does it, the name in it is compared with the address that the server was given."""
    authority = trustme.CA()
    context = server_context(files_of(authority, tmp_path, "server"))
    mine = client_context(files_of(authority, tmp_path, "client", "elsewhere.example.org"))
    async with PageServer(checkpoint, ssl=context, client_name="127.0.0.1") as server:
        async with client(server, context=mine) as other:
            other.ask(START, 1)
            assert await other.cut()
        await until(lambda: server.refused == 1, "it is dropped")
    assert "shows a certificate that is not for 127.0.0.1" in caplog.text
    async with PageServer(checkpoint, ssl=context) as server, client(server, context=mine) as good:
        assert await good.pages(START, 1) == page(0)


@pytest.mark.parametrize(
    "address, pid, why",
    [
        (START, 999, "process 999, which the checkpoint does not have"),
        (START, 7, "process 7, which the checkpoint does not have"),
        (START - PAGE, 1000, "which are not in the checkpoint"),
        (START + COUNT * PAGE, 1000, "which are not in the checkpoint"),
        (LIVE_AT, 1000, "in no file of the checkpoint"),
    ],
)
async def test_what_does_not_exist_ends_that_connection(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture, address: int, pid: int, why: str
) -> None:
    """What was asked before is answered; the log says why; all others are served on."""
    async with PageServer(checkpoint) as server, served_meanwhile(server):
        async with client(server) as other:
            other.ask(address, 2, pid)
            assert await other.cut()
        await until(lambda: server.refused == 1, "it is dropped")
    assert why in caplog.text


@pytest.mark.parametrize(
    "say",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00" * 10,
        b"\xff" * 100,
        b"\0" * 100,
        pack_header(SHORT, wire.OPEN2, 0, 0, 1000 << 8 | 1),
        pack_header(SHORT, wire.GET, 1, START, 1000) + b"\xff" * 24,
        pack_header(SHORT, wire.CLOSE) + b"\xff" * 24,
    ],
)
async def test_strangers_are_dropped_and_named(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture, say: bytes
) -> None:
    """And nobody else notices."""
    async with PageServer(checkpoint) as server, served_meanwhile(server):
        async with client(server) as other:
            other.writer.write(say)
            assert await other.cut()
        await until(lambda: server.refused == 1, "it is dropped")
    assert "dropped 127.0.0.1:" in caplog.text


async def test_the_wrong_size_by_option(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says which option it is."""
    async with PageServer(checkpoint, header_bytes=LONG) as server:
        async with client(server, SHORT) as other:
            other.ask(START, 1)
            other.ask(START, 1)
            assert await other.cut()
        await until(lambda: server.refused == 1, "it is dropped")
    assert "--protocol 24 or 32" in caplog.text


async def test_half_a_header_costs_bounded_time(checkpoint: Checkpoint) -> None:
    """The patience ends, and with it the connection."""
    limits = Limits(patience=0.05)
    async with PageServer(checkpoint, limits=limits) as server, served_meanwhile(server):
        async with client(server) as other:
            other.writer.write(b"\7\0")
            assert await other.cut()
        assert server.refused == 1


@pytest.mark.parametrize("said", [b"", pack_header(SHORT, wire.GET)[:1]], ids=["nothing", "guard"])
async def test_a_client_may_wait_for_its_restore(checkpoint: Checkpoint, said: bytes) -> None:
    """A daemon connects when it starts, and has nothing to ask for before a restore comes."""
    limits = Limits(patience=0.05)
    async with PageServer(checkpoint, limits=limits) as server:
        async with client(server) as other:
            other.writer.write(said)
            await until(lambda: server.connections == 1, "it is there")
            passed = asyncio.get_running_loop().time() + 4 * limits.patience
            await until(lambda: asyncio.get_running_loop().time() > passed, "time passes")
            other.writer.write(pack_header(SHORT, wire.GET, 1, START, 1000)[len(said) :])
            other.puller.get(1000, START, 1)
            assert await other.answers(1) == [Pages(1000, START, page(0))]
        assert server.refused == 0


async def test_one_that_is_through_and_does_not_close(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """It is closed for it, in time."""
    async with (
        PageServer(checkpoint, limits=Limits(patience=0.05)) as server,
        client(server) as other,
    ):
        assert await other.pages(START, 1) == page(0)
        await other.end()
        assert await other.cut()
    assert "does not close" in caplog.text


@pytest.mark.parametrize("cached", [True, False])
async def test_a_client_that_reads_slowly_gets_everything(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    """Long answers go from the page cache to the socket, or the ordinary way, as it comes."""
    if not cached:
        chance = random.Random(1)
        monkeypatch.setattr(page_cache, "holds", lambda *_: chance.random() < 0.5)
    async with PageServer(checkpoint) as server, client(server, LONG) as other:
        peer: socket.socket = other.writer.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        other.writer.transport.pause_reading()  # type: ignore[attr-defined]
        wanted = [(0, 1024), (5, 1), (100, 300), (1024, 1024), (7, 16), (3, 17), (64, 1000)] * 8
        for at, count in wanted:
            other.ask(START + at * PAGE, count)
        (connection,) = server._connections
        await until(lambda: connection._full, "the socket is full")
        other.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert await other.answers(len(wanted)) == [
            Pages(1000, START + at * PAGE, page(at, count)) for at, count in wanted
        ]
        await other.end()
        assert server.answered == len(wanted)
        assert server.answered_bytes == sum(count for _, count in wanted) * PAGE


async def test_the_end_may_be_said_before_all_has_come(checkpoint: Checkpoint) -> None:
    """It is the client's turn to close when it has everything, not when it said that."""
    limits = Limits(patience=0.2)
    async with gated(checkpoint, limits) as (server, source), client(server) as good:
        good.ask(START, 1)
        good.writer.write(good.puller.close())
        await until(lambda: source.in_flight == 1, "it is read")
        passed = asyncio.get_running_loop().time() + 2 * limits.patience
        await until(lambda: asyncio.get_running_loop().time() > passed, "that took longer")
        source.open.set()
        assert await good.answers(2) == [Pages(1000, START, page(0)), Closed(0)]
        assert await good.cut()


async def test_who_never_reads_holds_up_nobody_and_is_dropped(checkpoint: Checkpoint) -> None:
    """Answers wait up to a bound; then nothing is read for it; then it goes."""
    limits = Limits(patience=0.2, in_flight_bytes=1 << 20)
    async with (
        PageServer(checkpoint, limits=limits) as server,
        served_meanwhile(server),
        client(server) as other,
    ):
        other.writer.transport.pause_reading()  # type: ignore[attr-defined]
        before = server.answered_bytes
        for _ in range(1024):
            other.ask(START, 1024)
        await until(lambda: server.refused == 1, "it is dropped")
        # 4 GiB were asked for; what the kernel's buffers and ours took is far less.
        assert server.answered_bytes - before < 64 << 20


class Gated(BufferSource):
    """Answers when it is let go; counts what is in flight."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.open = asyncio.Event()
        self.in_flight = self.most = self.cancelled = 0
        self.error: Exception | None = None

    def read_nowait(self, offset: int, length: int) -> Buffer:
        return None  # type: ignore[return-value]  # as sources that have nothing at hand

    async def read(self, offset: int, length: int) -> Buffer:
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1
        if self.error is not None:
            raise self.error
        return super().read_nowait(offset, length)


@contextlib.asynccontextmanager
async def gated(checkpoint: Checkpoint, limits: Limits) -> AsyncIterator[tuple[PageServer, Gated]]:
    """Serve a checkpoint whose pages are far away."""
    source = Gated(DATA)
    (file,) = checkpoint.memory(1000).files

    async def pages(wanted: object) -> Source:
        return source if wanted == file else BufferSource(OTHER)

    checkpoint.pages = pages  # type: ignore[method-assign, assignment]
    async with PageServer(checkpoint, limits=limits) as server:
        yield server, source


async def test_reads_go_on_at_once_up_to_a_bound(checkpoint: Checkpoint) -> None:
    """Sources far away are asked for many pages at a time; answers are in order all the same."""
    async with (
        gated(checkpoint, Limits(in_flight_bytes=16 * PAGE)) as (server, source),
        client(server) as good,
    ):
        for at in range(64):
            good.ask(START + at * PAGE, 1)
        await until(lambda: source.in_flight == 16, "16 reads are in flight")
        for _ in range(20):
            await asyncio.sleep(0)
        assert source.most == 16
        source.open.set()
        answers = await good.answers(64)
        assert answers == [Pages(1000, START + at * PAGE, page(at)) for at in range(64)]
        assert source.most == 16
        await good.end()


async def test_one_that_dies_while_nothing_is_read_for_it(checkpoint: Checkpoint) -> None:
    """It has asked for more than it takes, and is not read from: its end is noticed yet."""
    told: list[Left] = []
    async with PageServer(checkpoint, on_left=told.append) as server:
        async with client(server) as other:
            other.writer.transport.pause_reading()  # type: ignore[attr-defined]
            for _ in range(3000):
                other.ask(START, 64)
            await until(lambda: server._connections, "it is there")
            (connection,) = server._connections
            transport = connection._transport
            assert transport is not None
            await until(lambda: connection._full and not transport.is_reading(), "it is held up")
            mine = other.writer.transport.get_extra_info("socket")
            mine.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await until(lambda: server.connections == 0, "it has left")
    assert [left.ended for left in told] == [False]
    assert told[0].error


async def test_reads_end_with_their_client(checkpoint: Checkpoint) -> None:
    """Nobody waits for what nobody wants."""
    async with gated(checkpoint, Limits()) as (server, source):
        async with client(server) as other:
            other.ask(START, 1)
            other.ask(START, 1)
            await until(lambda: source.in_flight == 2, "it is read")
        await until(lambda: server.connections == 0, "it has left")
        await until(lambda: source.cancelled == 2, "the reads are cancelled")


@pytest.mark.parametrize("error", [SourceError("the disk is gone"), KeyError("a bug")])
async def test_a_source_that_fails_ends_the_connection(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """The protocol cannot say it otherwise; the log does."""
    async with gated(checkpoint, Limits()) as (server, source):
        source.error = error
        source.open.set()
        async with client(server) as other:
            other.ask(START, 4, pid=1001)
            other.ask(START, 1)
            other.ask(START, 4, pid=1001)
            assert await other.answers(1) == [Pages(1001, START, OTHER)]
            assert await other.cut()
        await until(lambda: server.refused == 1, "it is dropped")
    assert str(error) in caplog.text


async def test_drain_serves_clients_until_they_are_through(checkpoint: Checkpoint) -> None:
    """New clients find nobody, silent ones go; a restored process lives on what it gets."""
    async with PageServer(checkpoint) as server, client(server) as good, client(server) as silent:
        assert await good.pages(START, 1) == page(0)
        draining = asyncio.ensure_future(server.drain())
        assert await silent.cut()
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", server.port)
        assert await good.pages(START + PAGE, 64) == page(1, 64)
        assert not draining.done()
        await good.end()
        good.writer.close()
        await within(draining)
        assert server.connections == server.refused == 0


async def test_who_leaves_is_told(checkpoint: Checkpoint) -> None:
    """What it has had, and how it went; who never asked is nobody."""
    told: list[Left] = []
    async with PageServer(checkpoint, on_left=told.append) as server:
        async with client(server) as silent:
            silent.writer.close()
        async with client(server) as good:
            await good.pages(START, 5)
            await good.end()
            good.writer.close()
            await until(lambda: told, "the good one has left")
        async with client(server) as other:
            other.ask(START, 1, pid=5)
            assert await other.cut()
            await until(lambda: len(told) == 2, "the other one has left")
    assert [tuple(left)[1:4] for left in told] == [(1, 5 * PAGE, True), (0, 0, False)]
    assert told[0].error == ""
    assert "process 5" in told[1].error


async def test_a_thousand_connections_that_say_nothing(checkpoint: Checkpoint) -> None:
    """The oldest silent one goes for a new one; who asks is served."""
    async with (
        PageServer(checkpoint, limits=Limits(connections=16)) as server,
        served_meanwhile(server),
    ):
        sockets = []
        try:
            for number in range(1000):
                each = socket.socket()
                sockets.append(each)
                each.setblocking(False)
                await asyncio.get_running_loop().sock_connect(each, ("127.0.0.1", server.port))
                if number % 100 == 0:
                    async with client(server) as good:
                        assert await good.pages(START, 2) == page(0, 2)
                assert server.connections <= 16
            await until(lambda: server.refused >= 1000 - 16, "they were dropped")
        finally:
            for each in sockets:
                each.close()
        await until(lambda: server.connections == 1, "only the good one is left")


async def test_one_that_is_cut_within_a_request(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """The log knows of it."""
    async with PageServer(checkpoint) as server:
        with caplog.at_level(logging.INFO, "aiouffd.criu"):
            async with client(server) as other:
                assert await other.pages(START, 1) == page(0)
                other.writer.write(b"\7")
                other.writer.write_eof()
                assert await other.cut()
            await until(lambda: server.connections == 0, "it has left")
    assert "without saying that it is through, within a request" in caplog.text


async def test_a_checkpoint_whose_pages_are_in_no_file(tmp_path: Path) -> None:
    """There is nothing to serve, and it says where the pages are."""
    memory = Memory([anonymous(START, 8)], [PagemapEntry(START, 8, 2)])
    folder = Made({1000: memory}).write(tmp_path / "checkpoint")
    async with await Checkpoint.open(folder) as checkpoint:
        with pytest.raises(SourceError, match="was dumped with --lazy-pages"):
            await PageServer(checkpoint).start()
