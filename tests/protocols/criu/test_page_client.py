"""The client of page servers: good ones, clamping ones, hostile, silent and dying ones."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import trustme

from aiouffd.errors import ClosedError, SourceError
from aiouffd.protocols.criu import page_wire as wire
from aiouffd.protocols.criu.checkpoint import Checkpoint
from aiouffd.protocols.criu.images import PagemapEntry
from aiouffd.protocols.criu.page_client import PageClient, header_bytes_of
from aiouffd.protocols.criu.page_server import PageServer
from aiouffd.protocols.criu.page_wire import LONG, SHORT, Acceptor, Ended, Get, pack_header
from aiouffd.protocols.criu.task_source import PageReader, ReadsPagesInto
from aiouffd.protocols.criu.tls import client_context, server_context
from tests.protocols.criu.checkpoints import PAGE, Made, Memory, anonymous, lone_task
from tests.protocols.criu.test_tls import files_of
from tests.serving import within
from tests.targets import until

START = 0x10000000
COUNT = 2048
DATA = random.Random(7).randbytes(COUNT * PAGE)

SIZES = [SHORT, LONG]


def page(number: int, count: int = 1) -> bytes:
    return DATA[number * PAGE : (number + count) * PAGE]


class Stock:
    """A server that does as CRIU's: one connection, one request after the other.

    Attributes:
        asked: All requests, in order.
        clamp: How many pages it gives at most.
        open: Requests are answered while it is set.
        how: How the connection ended: ``success``, as CRIU sees it, or ``failure``.
    """

    def __init__(self, size: int = SHORT, clamp: int = 1 << 20) -> None:
        self.size = size
        self.clamp = clamp
        self.asked: list[Get] = []
        self.open = asyncio.Event()
        self.open.set()
        self.how = ""
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        closed = False
        try:
            while not closed:
                header = await self._header(reader)
                if not header:
                    break
                closed = await self._answer(Acceptor(self.size).feed(header)[0], writer)
            self.how = "success"
        except (ConnectionError, asyncio.IncompleteReadError):
            self.how = "failure"
        finally:
            if closed:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read(1) == b""
            writer.transport.abort()

    async def _header(self, reader: asyncio.StreamReader) -> bytes:
        """Read a header whole, or nothing, if the connection ends before it."""
        first = await reader.read(1)
        return first and first + await reader.readexactly(self.size - 1)

    async def _answer(self, event: wire.Event, writer: asyncio.StreamWriter) -> bool:
        if isinstance(event, Ended):
            writer.write(wire.END)
            return True
        if isinstance(event, wire.ParentAsked):
            writer.write(wire.parent_exists(answer=False))
            return False
        assert isinstance(event, Get)
        self.asked.append(event)
        await self.open.wait()
        count = min(event.pages, self.clamp)
        at = (event.address - START) // PAGE
        writer.write(pack_header(self.size, 0x40006, count, event.address, event.pid))
        writer.write(page(at, count))
        await writer.drain()
        return False


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@contextlib.asynccontextmanager
async def listening(handler: Handler) -> AsyncIterator[int]:
    """Accept as many connections as come; give the port."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await handler(reader, writer)
        except asyncio.CancelledError:
            pass
        finally:
            writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


@contextlib.asynccontextmanager
async def stock(size: int = SHORT, clamp: int = 1 << 20) -> AsyncIterator[Stock]:
    server = Stock(size, clamp)
    async with listening(server.serve) as server.port:
        yield server


@pytest.fixture
async def checkpoint(tmp_path: Path) -> AsyncIterator[Checkpoint]:
    memories = {
        pid: Memory([anonymous(START, COUNT)], [PagemapEntry(START, COUNT, 6)], DATA)
        for pid in (1000, 1001)
    }
    made = Made(memories, [lone_task(1000), lone_task(1001, 1000)])
    async with await Checkpoint.open(made.write(tmp_path / "checkpoint")) as checkpoint:
        yield checkpoint


# --- good servers ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, *SIZES])
async def test_reads_of_any_length_at_once(checkpoint: Checkpoint, size: int | None) -> None:
    """From a server of ours, whatever headers are spoken."""
    async with (
        PageServer(checkpoint) as server,
        await PageClient.connect("127.0.0.1", server.port, header_bytes=size) as client,
    ):
        reader: PageReader = client
        chance = random.Random(3)
        wanted = []
        for _ in range(300):
            count = chance.choice([1, 1, 1, 2, 16, 17, 300, 1024])
            wanted.append((chance.choice([1000, 1001]), chance.randrange(COUNT - count + 1), count))
        answers = await within(
            asyncio.gather(*(reader.read_pages(pid, START + at * PAGE, n) for pid, at, n in wanted))
        )
        for (_, at, count), answer in zip(wanted, answers, strict=True):
            assert answer == page(at, count)
        assert client.answered_bytes <= sum(count for _, _, count in wanted) * PAGE
        await client.finish()
        await until(lambda: server.connections == 0, "the server has seen the end")
        assert server.refused == 0


@pytest.mark.parametrize("size", SIZES)
async def test_over_tls(checkpoint: Checkpoint, tmp_path: Path, size: int) -> None:
    """With certificates on both sides; without one of our authority there is nothing to be had."""
    authority = trustme.CA()
    context = server_context(files_of(authority, tmp_path, "server"))
    mine = client_context(files_of(authority, tmp_path, "client"))
    async with PageServer(checkpoint, ssl=context, client_name="127.0.0.1") as server:
        async with await PageClient.connect(
            "127.0.0.1", server.port, header_bytes=size, ssl=mine
        ) as client:
            reads = [client.read_pages(1000, START + at * PAGE, 64) for at in range(0, COUNT, 64)]
            assert b"".join(await within(asyncio.gather(*reads))) == DATA
            await within(client.finish())
        assert server.refused == 0
        stranger = client_context(files_of(trustme.CA(), tmp_path, "stranger"))
        with pytest.raises(SourceError, match=r"cannot be used.*certificate"):
            await PageClient.connect("127.0.0.1", server.port, header_bytes=size, ssl=stranger)
    with pytest.raises(ValueError, match="over TLS"):
        await PageClient.connect("127.0.0.1", 1, ssl=mine)


@pytest.mark.parametrize("size", SIZES)
async def test_clamped_answers_are_asked_for_again(size: int) -> None:
    """Short reads and long ones, until all has come."""
    async with (
        stock(size, clamp=3) as server,
        await PageClient.connect("127.0.0.1", server.port, header_bytes=size) as client,
    ):
        short, long = await within(
            asyncio.gather(
                client.read_pages(1000, START, 8),
                client.read_pages(1000, START + 100 * PAGE, 200),
            )
        )
        assert short == page(0, 8)
        assert long == page(100, 200)
        await client.finish()
    assert server.how == "success"


@pytest.mark.parametrize("size", SIZES)
async def test_the_size_of_headers_is_asked_for(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stock server of either kind."""
    monkeypatch.setattr("aiouffd.protocols.criu.page_client._PROBE_SECONDS", 0.1)
    async with (
        stock(size) as server,
        await PageClient.connect("127.0.0.1", server.port) as client,
    ):
        assert await within(client.read_pages(1000, START, 1)) == page(0)
        assert [ask.pages for ask in server.asked] == [1]
        await client.finish()
    assert server.how == "success"


@pytest.mark.parametrize("wide", [True, False])
async def test_a_checkpoint_tells_which_headers_its_criu_speaks(tmp_path: Path, wide: bool) -> None:
    """By how its pagemaps count; one without pages tells nothing."""
    memory = Memory([anonymous(START, 8)], [PagemapEntry(START, 8, 2)])
    folder = Made({1000: memory}, wide=wide).write(tmp_path / "live")
    async with await Checkpoint.open(folder) as checkpoint:
        assert await header_bytes_of(checkpoint) == (LONG if wide else SHORT)
    folder = Made({1000: Memory([anonymous(START, 8)], [])}, wide=wide).write(tmp_path / "empty")
    async with await Checkpoint.open(folder) as checkpoint:
        assert await header_bytes_of(checkpoint) is None


# --- what goes first -------------------------------------------------------------------


async def test_demand_goes_before_bulk() -> None:
    """However long a read is, a short one waits behind a bounded part of it."""
    async with (
        stock() as server,
        await PageClient.connect(
            "127.0.0.1",
            server.port,
            header_bytes=SHORT,
            bulk_bytes=64 * PAGE,
            piece_bytes=32 * PAGE,
        ) as client,
    ):
        server.open.clear()
        long = asyncio.ensure_future(client.read_pages(1000, START, 1024))
        await until(lambda: server.asked, "the first piece is asked for")
        short = asyncio.ensure_future(client.read_pages(1000, START + 2000 * PAGE, 1))
        await asyncio.sleep(0)
        server.open.set()
        assert await within(short) == page(2000)
        assert not long.done()
        assert await within(long) == page(0, 1024)
        pages = [ask.pages for ask in server.asked]
        assert pages == [32, 32, 1] + [32] * 30
        await client.finish()


async def test_reads_into_a_buffer_are_bulk_however_short() -> None:
    """Nobody waits for them; they go where they belong, clamped answers, too."""
    async with (
        stock(clamp=5) as server,
        await PageClient.connect(
            "127.0.0.1", server.port, header_bytes=SHORT, bulk_bytes=PAGE, piece_bytes=8 * PAGE
        ) as client,
    ):
        assert isinstance(client, ReadsPagesInto)
        server.open.clear()
        buffers = [bytearray(count * PAGE) for count in (2, 3, 20)]
        reads = [
            asyncio.ensure_future(
                client.read_pages_into(1000, START + 100 * number * PAGE, memoryview(buffer))
            )
            for number, buffer in enumerate(buffers)
        ]
        await until(lambda: server.asked, "the first is asked for")
        short = asyncio.ensure_future(client.read_pages(1000, START + 2000 * PAGE, 1))
        await asyncio.sleep(0)
        server.open.set()
        assert await within(short) == page(2000)
        await within(asyncio.gather(*reads))
        assert buffers == [page(0, 2), page(100, 3), page(200, 20)]
        assert [ask.pages for ask in server.asked] == [2, 1, 3, 8, 3, 8, 3, 4]
        await client.finish()
        with pytest.raises(ClosedError):
            await client.read_pages_into(1000, START, memoryview(bytearray(PAGE)))


async def test_what_is_on_its_way_is_not_asked_for_again() -> None:
    """A fault on a page of a long read that was asked for waits for that one."""
    async with (
        stock() as server,
        await PageClient.connect(
            "127.0.0.1", server.port, header_bytes=SHORT, bulk_bytes=PAGE, piece_bytes=64 * PAGE
        ) as client,
    ):
        server.open.clear()
        long = asyncio.ensure_future(client.read_pages(1000, START, 128))
        twice = [asyncio.ensure_future(client.read_pages(1000, START + PAGE, 2)) for _ in range(2)]
        later = asyncio.ensure_future(client.read_pages(1000, START + 64 * PAGE, 1))
        other = asyncio.ensure_future(client.read_pages(1001, START + PAGE, 1))
        same = asyncio.ensure_future(client.read_pages(1001, START + PAGE, 1))
        await until(lambda: server.asked, "the first is asked for")
        server.open.set()
        for read in twice:
            assert await within(read) == page(1, 2)
        assert await within(later) == page(64)
        assert await within(other) == await within(same) == page(1)
        assert await within(long) == page(0, 128)
        assert [(ask.pid, (ask.address - START) // PAGE, ask.pages) for ask in server.asked] == [
            (1000, 0, 64),
            (1000, 64, 1),
            (1001, 1, 1),
            (1000, 64, 64),
        ]
        await client.finish()


async def test_who_joins_a_read_into_a_buffer_has_bytes_of_its_own() -> None:
    """The buffer is used for other things as soon as it is full."""
    async with (
        stock() as server,
        await PageClient.connect("127.0.0.1", server.port, header_bytes=SHORT) as client,
    ):
        server.open.clear()
        buffer = memoryview(bytearray(64 * PAGE))
        long = asyncio.ensure_future(client.read_pages_into(1000, START, buffer))
        await until(lambda: server.asked, "it is asked for")
        short = asyncio.ensure_future(client.read_pages(1000, START + 5 * PAGE, 2))
        await asyncio.sleep(0)
        server.open.set()
        await within(long)
        assert buffer == page(0, 64)
        buffer[:] = bytes(len(buffer))
        assert await within(short) == page(5, 2)
        assert len(server.asked) == 1
        await client.finish()


@pytest.mark.parametrize("clamp", [1, 4, 32, 63])
async def test_who_joins_a_read_that_comes_in_parts_has_its_bytes_first(clamp: int) -> None:
    """Before the owner of the buffer hears that it is full, and writes something else to it."""
    async with (
        stock(clamp=clamp) as server,
        await PageClient.connect("127.0.0.1", server.port, header_bytes=SHORT) as client,
    ):
        server.open.clear()
        buffer = memoryview(bytearray(64 * PAGE))

        async def own() -> None:
            await client.read_pages_into(1000, START, buffer)
            assert buffer == page(0, 64)
            buffer[:] = b"\xee" * len(buffer)

        owner = asyncio.ensure_future(own())
        await until(lambda: server.asked, "it is asked for")
        joined = [
            asyncio.ensure_future(client.read_pages(1000, START + at * PAGE, 2))
            for at in (0, 5, 62)
        ]
        await asyncio.sleep(0)
        server.open.set()
        await within(owner)
        for at, read in zip((0, 5, 62), joined, strict=True):
            assert await within(read) == page(at, 2)
        await client.read_pages_into(1000, START, memoryview(bytearray(0)))
        await client.finish()


async def test_a_read_that_is_cancelled_is_not_asked_for_any_more() -> None:
    """What was asked for is thrown away; others get theirs."""
    async with (
        stock() as server,
        await PageClient.connect(
            "127.0.0.1", server.port, header_bytes=SHORT, bulk_bytes=PAGE, piece_bytes=32 * PAGE
        ) as client,
    ):
        server.open.clear()
        long = asyncio.ensure_future(client.read_pages(1000, START, 1024))
        short = asyncio.ensure_future(client.read_pages(1000, START + 2000 * PAGE, 1))
        both = [asyncio.ensure_future(client.read_pages(1000, START + PAGE, 1)) for _ in range(2)]
        await until(lambda: server.asked, "the first is asked for")
        for read in (long, short, both[0]):
            read.cancel()
        await asyncio.sleep(0)
        server.open.set()
        assert await within(both[1]) == page(1)
        assert await within(client.read_pages(1000, START + 5 * PAGE, 3)) == page(5, 3)
        assert [ask.pages for ask in server.asked] == [32, 1, 3]
        await client.finish()
    assert server.how == "success"


# --- the end ---------------------------------------------------------------------------


async def test_finish_waits_for_reads_under_way() -> None:
    """And then nothing can be read."""
    async with (
        stock() as server,
        await PageClient.connect("127.0.0.1", server.port, header_bytes=SHORT) as client,
    ):
        server.open.clear()
        reads = [
            asyncio.ensure_future(client.read_pages(1000, START, count)) for count in (1, 16, 1024)
        ]
        await until(lambda: server.asked, "they are asked for")
        finish = asyncio.ensure_future(client.finish())
        await asyncio.sleep(0)
        with pytest.raises(ClosedError):
            await client.read_pages(1000, START, 1)
        assert not finish.done()
        server.open.set()
        for count, read in zip((1, 16, 1024), reads, strict=True):
            assert await within(read) == page(0, count)
        await within(finish)
        with pytest.raises(ClosedError):
            await client.finish()
    assert server.how == "success"


@pytest.mark.parametrize("reads", [0, 1])
@pytest.mark.parametrize("guarded", [True, False])
async def test_without_finish_the_server_sees_a_failure(reads: int, guarded: bool) -> None:
    """Whose tasks then go on."""
    guard = (1000, START) if guarded else None
    async with stock() as server:
        async with await PageClient.connect(
            "127.0.0.1", server.port, header_bytes=SHORT, guard=guard
        ) as client:
            for _ in range(reads):
                assert await within(client.read_pages(1000, START, 1)) == page(0)
        await until(lambda: server.how, "the server has seen the end")
    assert server.how == "failure"
    await client.aclose()


@pytest.mark.parametrize("reads", [0, 1])
async def test_a_client_that_dies_is_a_failure_to_the_server(reads: int) -> None:
    """An end as the kernel makes it for the dead: without a word, and without a reset."""
    async with stock() as server:
        client = await PageClient.connect(
            "127.0.0.1", server.port, header_bytes=SHORT, guard=(1000, START)
        )
        for _ in range(reads):
            assert await within(client.read_pages(1000, START, 1)) == page(0)
        assert client._link.transport is not None
        client._link.transport.close()
        await until(lambda: server.how, "the server has seen the end")
        await client.aclose()
    assert server.how == "failure"


async def test_finish_costs_one_page_for_the_guard() -> None:
    """Which is how the header that was begun is ended."""
    async with (
        stock() as server,
        await PageClient.connect(
            "127.0.0.1", server.port, header_bytes=SHORT, guard=(1000, START + 3 * PAGE)
        ) as client,
    ):
        await within(client.finish())
    assert server.how == "success"
    assert [(ask.address, ask.pages) for ask in server.asked] == [(START + 3 * PAGE, 1)]


async def test_reads_end_with_the_client() -> None:
    """Nobody waits for ever."""
    async with stock() as server:
        client = await PageClient.connect("127.0.0.1", server.port, header_bytes=SHORT)
        server.open.clear()
        reads = [
            asyncio.ensure_future(client.read_pages(1000, START, count)) for count in (1, 1, 1024)
        ]
        await until(lambda: server.asked, "they are asked for")
        await client.aclose()
        for read in reads:
            with pytest.raises(ClosedError):
                await within(read)
        with pytest.raises(ClosedError):
            await client.read_pages(1000, START, 1)


# --- bad servers -----------------------------------------------------------------------


async def read_from(handler: Handler, *, timeout: float = 5.0, size: int = SHORT) -> str:
    """Read one page, and a longer stretch, from a server; give why it cannot be had."""
    async with (
        listening(handler) as port,
        await PageClient.connect("127.0.0.1", port, header_bytes=size, timeout=timeout) as client,
    ):
        one = asyncio.ensure_future(client.read_pages(1000, START, 1))
        long = asyncio.ensure_future(client.read_pages(1000, START + PAGE, 1024))
        with pytest.raises(SourceError) as caught:
            await within(one)
        with pytest.raises(SourceError):
            await within(long)
        with pytest.raises(SourceError) as later:  # at once, with the same reason
            await client.read_pages(1000, START, 1)
        assert str(later.value) == str(caught.value)
        with pytest.raises(SourceError):
            await client.finish()
        return str(caught.value)


@pytest.mark.parametrize(
    "say, why",
    [
        (pack_header(SHORT, 0x40006, 1, START, 7), "answered pages of pid 7 where pid 1000"),
        (pack_header(SHORT, 0x40006, 2, START, 1000), "answered 2 pages where 1 were asked for"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "answered with command"),
        (bytes(24), "answered with command 0x0"),
        (random.Random(5).randbytes(100_000), "answered with command"),
    ],
)
async def test_what_breaks_the_protocol_is_named(say: bytes, why: str) -> None:
    """And ends every read."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(24)
        writer.write(say)
        await reader.read()

    text = await read_from(serve)
    assert why in text
    assert text.startswith("the page server 127.0.0.1:")


async def test_a_server_that_says_nothing_is_given_up() -> None:
    """In the time that it was given, and with a word on what may be wrong."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)

    text = await read_from(serve, timeout=0.2)
    assert "said nothing for 0.2 s" in text
    assert "--protocol 32" in text
    assert "--protocol 24" in await read_from(serve, timeout=0.2, size=LONG)


async def test_a_server_that_answers_slowly_is_not_given_up() -> None:
    """As long as something comes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(24)
        answer = pack_header(SHORT, 0x40006, 1, START, 1000) + page(0)
        for at in range(0, len(answer), 500):
            writer.write(answer[at : at + 500])
            await asyncio.sleep(0.1)
        await reader.read(-1)

    async with (
        listening(serve) as port,
        await PageClient.connect("127.0.0.1", port, header_bytes=SHORT, timeout=0.4) as client,
    ):
        assert await within(client.read_pages(1000, START, 1)) == page(0)


async def test_a_server_is_not_given_up_for_a_silence_in_which_it_owed_nothing() -> None:
    """Its time runs from the question on, however long nobody had asked anything before."""
    timeout = 1.0
    answer = pack_header(SHORT, 0x40006, 1, START, 1000) + page(0)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(24 + 1)
        writer.write(answer)
        await reader.readexactly(24)
        await asyncio.sleep(0.5 * timeout)
        writer.write(answer)
        await reader.read(-1)

    async with (
        listening(serve) as port,
        await PageClient.connect("127.0.0.1", port, header_bytes=SHORT, timeout=timeout) as client,
    ):
        assert await within(client.read_pages(1000, START, 1)) == page(0)
        await asyncio.sleep(0.8 * timeout)
        assert await within(client.read_pages(1000, START, 1)) == page(0)


@pytest.mark.parametrize("cut", [0, 10, 24, 1000])
@pytest.mark.parametrize("reset", [True, False])
async def test_a_server_that_dies_ends_every_read(cut: int, reset: bool) -> None:
    """Anywhere in an answer."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(24)
        writer.write((pack_header(SHORT, 0x40006, 1, START, 1000) + page(0))[:cut])
        await writer.drain()
        if reset:
            peer: socket.socket = writer.get_extra_info("socket")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    text = await read_from(serve)
    assert "closed the connection" in text or "reset" in text.lower() or "was closed" in text


async def test_nobody_there() -> None:
    """It says where it looked."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(SourceError, match=f"the page server 127.0.0.1:{port} cannot be used"):
        await PageClient.connect("127.0.0.1", port, header_bytes=SHORT)


async def test_one_that_does_not_answer_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence and an end are told apart."""
    monkeypatch.setattr("aiouffd.protocols.criu.page_client._PROBE_SECONDS", 0.05)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)

    async with listening(silent) as port:
        with pytest.raises(SourceError, match=r"says nothing: no answer within 0\.2 s"):
            await PageClient.connect("127.0.0.1", port, timeout=0.2)

    async def leaves(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(24)

    async with listening(leaves) as port:
        with pytest.raises(SourceError, match="closed"):
            await PageClient.connect("127.0.0.1", port, timeout=5)


@pytest.mark.parametrize("say", [b"", struct.pack("<i", 5)])
async def test_an_end_that_is_not_taken_note_of(say: bytes) -> None:
    """Is an error: a live dump may have ended otherwise."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(24)
        writer.write(say)
        if not say:
            return
        await reader.read(-1)

    async with (
        listening(serve) as port,
        await PageClient.connect("127.0.0.1", port, header_bytes=SHORT) as client,
    ):
        with pytest.raises(SourceError, match=r"closed|ended with status 5"):
            await within(client.finish())
