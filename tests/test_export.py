"""Export against peers that are hostile, slow, many, or just leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

import pytest

from aiouffd.errors import PeerError, SourceError
from aiouffd.export import Export
from aiouffd.peers import Limits
from aiouffd.protocols import pages
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.peer import PeerSource
from aiouffd.testing.sources import PAGE, as_bytes, image
from tests.serving import within
from tests.targets import until

if TYPE_CHECKING:
    from typing_extensions import Buffer

SIZE = 1024 * PAGE
DATA = image(SIZE)


class Gated(BufferSource):
    """Answers when it is let go; counts what is in flight."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.open = asyncio.Event()
        self.in_flight = self.most = self.cancelled = 0

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
        return super().read_nowait(offset, length)


class Stranger:
    """A peer that sends what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def greet(self) -> pages.Reader:
        wire = pages.Reader()
        self.writer.write(wire.greeting())
        while wire.hello is None:
            wire.feed(await self.reader.read(1 << 16))
        return wire

    async def closed(self) -> bool:
        """Wait until the other side has closed."""
        with contextlib.suppress(ConnectionError):
            while await within(self.reader.read(1 << 16)):
                pass
        return True


@contextlib.asynccontextmanager
async def stranger(export: Export) -> AsyncIterator[Stranger]:
    reader, writer = await asyncio.open_connection("127.0.0.1", export.port)
    try:
        yield Stranger(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def served_meanwhile(export: Export) -> AsyncIterator[None]:
    """Around something hostile: a good peer is served before, meanwhile and afterwards."""
    peer = await PeerSource.open("127.0.0.1", export.port)
    try:
        assert as_bytes(await peer.read(0, PAGE)) == DATA[:PAGE]
        yield
        assert as_bytes(await within(peer.read(0, SIZE))) == DATA
    finally:
        await peer.aclose()


@pytest.mark.parametrize(
    "say",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        pages.MAGIC + b"\xff" * 4,
        pages.Reader("nothing of that name").greeting(),
        b"\0",
        b"\x16\x03\x01\x02\x00\x01\x00",  # a TLS client
    ],
)
async def test_who_does_not_greet_is_dropped(say: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """At the first wrong byte, and the others are served on."""
    async with Export(BufferSource(DATA)) as export, served_meanwhile(export):
        with caplog.at_level(logging.WARNING, "aiouffd.export"):
            async with stranger(export) as other:
                other.writer.write(say)
                if say.endswith(b"name"):
                    with pytest.raises(PeerError, match="there is no image"):
                        pages.Reader().feed(await within(other.reader.read(1 << 16)))
                assert await other.closed()
            await until(lambda: export.connections == 1, "the stranger is gone")
        assert export.refused == 1
        assert "dropped 127.0.0.1:" in caplog.text


@pytest.mark.parametrize(
    "request_",
    [
        struct.pack(">QQII", 0, 0, 0xFFFFFFFF, 0),
        struct.pack(">QQII", 0, SIZE, 1, 0),
        struct.pack(">QQII", 0, (1 << 64) - 1, 1, 0),
        struct.pack(">QQII", 0, 0, 1, 77),
        b"\xff" * 240,
    ],
)
async def test_a_hostile_request_ends_its_connection_only(request_: bytes) -> None:
    """Nothing is read for it."""
    async with Export(BufferSource(DATA)) as export, served_meanwhile(export):
        async with stranger(export) as other:
            await other.greet()
            other.writer.write(request_)
            assert await other.closed()
        await until(lambda: export.connections == 1, "the stranger is gone")
        assert export.refused == 1


async def test_half_a_greeting_costs_bounded_time() -> None:
    """The patience ends, and with it the connection."""
    limits = Limits(patience=0.05)
    async with Export(BufferSource(DATA), limits=limits) as export, served_meanwhile(export):
        async with stranger(export) as other:
            other.writer.write(pages.MAGIC[:5])
            assert await other.closed()
        assert export.refused == 1


async def test_who_never_reads_holds_up_nobody_and_is_dropped() -> None:
    """Answers wait up to a bound; then nothing is read for it; then it goes."""
    limits = Limits(patience=0.2, in_flight_bytes=1 << 20)
    async with (
        Export(BufferSource(DATA), limits=limits) as export,
        served_meanwhile(export),
        stranger(export) as other,
    ):
        wire = await other.greet()
        other.writer.transport.pause_reading()  # type: ignore[attr-defined]
        before = export.answered_bytes
        for _ in range(64):
            other.writer.write(b"".join(wire.request(0, 1 << 20)[1] for _ in range(16)))
        await until(lambda: export.refused == 1, "it is dropped")
        # 1 GiB was asked for; what the kernel's buffers and ours took is far less.
        assert export.answered_bytes - before < 64 << 20


async def test_who_takes_answers_slowly_is_not_dropped() -> None:
    """Patience ends when next to nothing was taken since the last look, and not before."""
    async with (
        Export(BufferSource(DATA), limits=Limits(patience=3600)) as export,
        stranger(export) as other,
    ):
        wire = await other.greet()
        other.writer.transport.pause_reading()  # type: ignore[attr-defined]
        other.writer.write(b"".join(wire.request(0, 1 << 20)[1] for _ in range(64)))
        (connection,) = export._connections
        await until(lambda: connection._full, "it takes nothing")

        connection._written_bytes += 1 << 20  # as if it had taken so much
        connection._look_whether_it_takes()
        assert not connection.error
        connection._look_whether_it_takes()
        assert "takes no answers" in connection.error


async def test_a_peer_has_so_much_in_flight_and_no_more() -> None:
    """More requests than that wait their turn, and are all answered in the end."""
    source = Gated(DATA)
    async with Export(source, limits=Limits(in_flight_bytes=16 * PAGE)) as export:
        peer = await PeerSource.open("127.0.0.1", export.port)
        reads = [asyncio.ensure_future(peer.read(at * PAGE, PAGE)) for at in range(1024)]
        await until(lambda: source.in_flight == 16, "16 reads are in flight")
        for _ in range(20):
            await asyncio.sleep(0)
        assert source.most == 16
        source.open.set()
        answers = await within(asyncio.gather(*reads))
        assert b"".join(map(as_bytes, answers)) == DATA
        await peer.aclose()


@pytest.mark.parametrize("count", [500, 100_000])
async def test_tiny_requests_count_too(count: int) -> None:
    """Any number of requests of a byte are no way around the limit; they end with their peer."""
    source = Gated(DATA)
    async with Export(source, limits=Limits(in_flight_bytes=16 * PAGE)) as export:
        async with stranger(export) as other:
            wire = await other.greet()
            other.writer.write(b"".join(wire.request(at, 1)[1] for at in range(count)))
            await until(lambda: source.in_flight == 16, "16 reads are in flight")
            for _ in range(20):
                await asyncio.sleep(0)
            assert source.most == 16
            if count > 500:  # a long backlog is not read on, and so its end is not seen
                other.writer.transport.abort()
                source.open.set()
        await until(lambda: export.connections == 0, "it has left")
        assert count > 500 or source.cancelled == 16
        assert source.most == 16


async def test_a_thousand_connections_that_say_nothing() -> None:
    """The oldest silent one goes for a new one; who has said what it wants stays."""
    limits = Limits(connections=16)
    async with Export(BufferSource(DATA), limits=limits) as export, served_meanwhile(export):
        sockets = []
        try:
            for number in range(1000):
                each = socket.socket()
                sockets.append(each)
                each.setblocking(False)
                await asyncio.get_running_loop().sock_connect(each, ("127.0.0.1", export.port))
                if number % 100 == 0:  # a good one gets in all the while
                    other = await within(PeerSource.open("127.0.0.1", export.port))
                    assert as_bytes(await within(other.read(PAGE, PAGE))) == DATA[PAGE : 2 * PAGE]
                    await other.aclose()
                assert export.connections <= 16
            await until(lambda: export.refused >= 1000 - 16, "they were dropped")
        finally:
            for each in sockets:
                each.close()
        await until(lambda: export.connections == 1, "only the good one is left")


async def test_a_full_house_refuses_new_peers() -> None:
    """Nobody who is served goes for a new one."""
    async with Export(BufferSource(DATA), limits=Limits(connections=1)) as export:
        async with served_meanwhile(export):
            with pytest.raises(SourceError):
                await PeerSource.open("127.0.0.1", export.port, timeout=0.5)
        await until(lambda: export.connections == 0, "it has left")
        peer = await PeerSource.open("127.0.0.1", export.port)
        await peer.aclose()


async def test_drain_answers_what_was_asked() -> None:
    """New peers find nobody; reads in flight end well; then it is over."""
    source = Gated(DATA)
    export = Export(source)
    async with export:
        peer = await PeerSource.open("127.0.0.1", export.port, timeout=5)
        read = asyncio.ensure_future(peer.read(0, 64 * PAGE))
        await until(lambda: source.in_flight == 1, "it is read")
        draining = asyncio.ensure_future(export.drain())
        await asyncio.sleep(0)
        with pytest.raises(SourceError):
            await PeerSource.open("127.0.0.1", export.port, timeout=0.5)
        assert not draining.done()
        source.open.set()
        assert as_bytes(await within(read)) == DATA[: 64 * PAGE]
        await within(draining)
        await within(export.wait_closed())
        assert export.connections == 0
        await peer.aclose()
    await export.aclose()


async def test_closing_ends_what_is_in_flight() -> None:
    """Nobody waits for a source that does not answer."""
    source = Gated(DATA)
    async with Export(source) as export:
        peer = await PeerSource.open("127.0.0.1", export.port, timeout=0.2)
        read = asyncio.ensure_future(peer.read(0, PAGE))
        await until(lambda: source.in_flight == 1, "it is read")
        await within(export.aclose())
        await until(lambda: source.cancelled == 1, "the read is cancelled")
        with pytest.raises(SourceError, match="did not come within"):
            await within(read)
        await peer.aclose()
    assert export.refused == 0  # nobody has done anything wrong


async def test_closing_with_a_handshake_in_progress(
    server_context: Callable[[], object],
) -> None:
    """A TLS client that says nothing does not hold it up, nor leave a descriptor."""
    async with Export(BufferSource(DATA), ssl=server_context()) as export:  # type: ignore[arg-type]
        async with stranger(export) as other:
            await until(lambda: export.connections == 1, "it is accepted")
            await within(export.aclose())
            assert await other.closed()
        assert export.connections == 0


@pytest.fixture
def server_context() -> Callable[[], object]:
    import ssl

    import trustme

    def make() -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
        return context

    return make


async def test_a_source_with_a_bug_ends_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    """The peer does not wait for ever, and the log has the traceback."""

    class Buggy(BufferSource):
        def read_nowait(self, offset: int, length: int) -> Buffer:
            return None  # type: ignore[return-value]

        async def read(self, offset: int, length: int) -> Buffer:
            raise KeyError("a bug")

    async with Export(Buggy(DATA)) as export:
        peer = await PeerSource.open("127.0.0.1", export.port, timeout=0.2)
        with pytest.raises(SourceError, match="did not come within"):
            await within(peer.read(0, 1))
        await peer.aclose()
    assert "KeyError" in caplog.text


async def test_a_port_that_is_taken_is_an_error_and_leaves_nothing() -> None:
    """OSError, as from any server."""
    async with Export(BufferSource(DATA)) as export:
        with pytest.raises(OSError):
            await Export(BufferSource(DATA), port=export.port).start()


async def test_localhost_has_one_port_on_all_its_addresses() -> None:
    """A name may stand for two addresses."""
    async with Export(BufferSource(DATA), "localhost") as export:
        peer = await PeerSource.open("localhost", export.port)
        assert as_bytes(await peer.read(0, 1)) == DATA[:1]
        await peer.aclose()
