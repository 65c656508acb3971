"""PeerSource through a real Export: the contract, lost connections, swapped images."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import trustme

from aiouffd.errors import SourceError
from aiouffd.export import Export
from aiouffd.peers import Limits
from aiouffd.protocols import pages
from aiouffd.sources import Source, identity_of, knows_holes
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.file import FileSource
from aiouffd.sources.peer import PeerSource, open_url
from aiouffd.testing.sources import PAGE, SourceContract, as_bytes, image
from tests.remote_serving import Place, RemoteServing
from tests.serving import within
from tests.sources import slow

if TYPE_CHECKING:
    from typing_extensions import Buffer

ROOT: Final = Path(__file__).resolve().parent.parent.parent


@contextlib.asynccontextmanager
async def exported(
    source: Source, url: str = "aiouffd://127.0.0.1:{}"
) -> AsyncIterator[PeerSource]:
    """Read a source through an export of it."""
    async with Export(source) as export:
        peer = await open_url(url.format(export.port))
        try:
            yield peer
        finally:
            await peer.aclose()


class TestPeerSource(SourceContract):
    """Over plain TCP."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Export a buffer."""
        async with exported(BufferSource(data)) as source:
            yield source


class SlowSource(BufferSource):
    """Has nothing at hand, and answers reads in another order than they came in."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._random = random.Random(0)
        self.reads = 0

    def read_nowait(self, offset: int, length: int) -> Buffer:
        return None  # type: ignore[return-value]  # as sources that have nothing at hand

    async def read(self, offset: int, length: int) -> Buffer:
        self.reads += 1
        for _ in range(self._random.randrange(5)):
            await asyncio.sleep(0)
        return super().read_nowait(offset, length)


class TestPeerSourceOfSlowOne(SourceContract):
    """Over an image that has to be waited for."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Export what is slow."""
        async with exported(SlowSource(data)) as source:
            yield source


# --- TLS -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def files(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The authority's certificate, and a client's certificate and key, as files."""
    folder = tmp_path_factory.mktemp("tls")
    client = authority.issue_cert("client@example.org")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    client.cert_chain_pems[0].write_to_path(str(folder / "client.pem"))
    client.private_key_pem.write_to_path(str(folder / "client.key"))
    return {name: folder / name for name in ("ca.pem", "client.pem", "client.key")}


def server_context(authority: trustme.CA, *, clients: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    if clients:
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class TestPeerSourceOverTls(SourceContract):
    """With certificates on both sides."""

    @pytest.fixture(autouse=True)
    def _certificates(self, authority: trustme.CA, files: dict[str, Path]) -> None:
        self.authority, self.files = authority, files

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Export a buffer."""
        context = server_context(self.authority, clients=True)
        query = "?ca={ca.pem}&cert={client.pem}&key={client.key}"
        query = re.sub(r"{(.*?)}", lambda match: str(self.files[match[1]]), query)
        async with Export(BufferSource(data), ssl=context) as export:
            source = await open_url(f"aiouffds://127.0.0.1:{export.port}/{query}")
            try:
                yield source
            finally:
                await source.aclose()


async def test_tls_that_does_not_fit_is_refused(
    authority: trustme.CA, files: dict[str, Path]
) -> None:
    """An unknown authority, no certificate of ours, TLS against plain: each an error at once."""
    async with Export(BufferSource(b"x"), ssl=server_context(authority, clients=True)) as export:
        where = f"127.0.0.1:{export.port}"
        with pytest.raises(SourceError, match="certificate verify failed"):
            await within(open_url(f"aiouffds://{where}"))
        with pytest.raises(SourceError, match=where):
            await within(open_url(f"aiouffds://{where}?ca={files['ca.pem']}"))
        with pytest.raises(SourceError, match=where):
            await within(open_url(f"aiouffd://{where}?timeout=5"))
    async with Export(BufferSource(b"x")) as export:
        with pytest.raises(SourceError, match=str(export.port)):
            await within(open_url(f"aiouffds://127.0.0.1:{export.port}?ca={files['ca.pem']}"))


# --- what is told of the image ---------------------------------------------------------


async def test_holes_and_identity_come_over(tmp_path: Path) -> None:
    """The peer knows the file's extents and its identity, and reads beyond one request's limit."""
    data = bytearray(3 * pages.MAX_LENGTH)
    data[PAGE : 2 * PAGE] = image(PAGE)
    data[-300 * PAGE :] = image(300 * PAGE, seed=1)
    file = tmp_path / "image"
    with file.open("wb") as holed:
        for start, end in ((PAGE, 2 * PAGE), (len(data) - 300 * PAGE, len(data))):
            holed.seek(start)
            holed.write(data[start:end])
    source = FileSource(file)
    async with exported(source) as peer:
        assert peer.size == len(data)
        assert list(peer.extents()) == list(source.extents())
        assert len(list(peer.extents())) == 2
        assert peer.identity == identity_of(source) != ""
        assert as_bytes(await peer.read(0, len(data))) == data
    await source.aclose()


async def test_a_peer_with_more_extents_than_it_may_tell_is_no_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last extent covers the rest of it, and would hide what lies below."""

    class Holed(BufferSource):
        def extents(self) -> Iterator[tuple[int, int]]:
            yield from ((2 * at * PAGE, PAGE) for at in range(4))

    for limit, known in ((4, False), (5, True)):
        monkeypatch.setattr(pages, "MAX_EXTENTS", limit)
        async with exported(Holed(image(8 * PAGE))) as peer:
            assert knows_holes(peer) is known


async def test_images_have_names() -> None:
    """The URL's path chooses; without it there is only one to choose from, or an error."""
    images = {"one": BufferSource(b"1"), "two ä/": BufferSource(b"2")}
    async with Export(images) as export:
        where = f"aiouffd://127.0.0.1:{export.port}"
        for name, content in (("one", b"1"), ("two%20%C3%A4/", b"2")):
            peer = await open_url(f"{where}/{name}")
            assert as_bytes(await peer.read(0, 1)) == content
            await peer.aclose()
        for name in ("", "/", "/three"):
            with pytest.raises(SourceError, match="there is no image"):
                await open_url(where + name)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("aiouffd://host/name", "is not aiouffd://HOST:PORT"),
        ("aiouffd://:1/name", "is not aiouffd://HOST:PORT"),
        ("http://host:1/name", "is not aiouffd://HOST:PORT"),
        ("aiouffd://host:99999/", "ort"),
        ("aiouffd://host:1/?timeout=soon", "soon"),
        ("aiouffd://host:1/?color=red", "unknown in the query: color"),
        ("aiouffd://host:1/?ca=ca.pem", "for TLS"),
        ("aiouffds://host:1/?ca=/does/not/exist", "No such file"),
    ],
)
async def test_a_url_that_makes_no_sense_is_refused(url: str, why: str) -> None:
    """With a sentence that says why."""
    with pytest.raises(SourceError, match=why):
        await open_url(url)


# --- failures --------------------------------------------------------------------------


async def test_a_source_that_fails_fails_the_read_and_no_more() -> None:
    """The peer's error says what the other server's source said."""

    class Moody(BufferSource):
        def read_nowait(self, offset: int, length: int) -> Buffer:
            if offset == 0:
                raise SourceError("the disk is in a bad mood")
            return super().read_nowait(offset, length)

    async with exported(Moody(b"ab")) as peer:
        for _ in range(2):
            with pytest.raises(SourceError, match=r"aiouffd://127.*the disk is in a bad mood"):
                await peer.read(0, 1)
            assert as_bytes(await peer.read(1, 1)) == b"b"


async def test_a_source_that_cancels_itself_fails_the_read_at_once() -> None:
    """Not when the time is over."""
    source = slow.SlowSource(b"ab", wait=False)
    source.error = asyncio.CancelledError()
    async with exported(source) as peer:
        with pytest.raises(SourceError, match="cancelled by its source"):
            await peer.read(0, 1)


async def test_cancelled_reads_do_not_disturb_others() -> None:
    """Half of many reads are cancelled at any moment; the other half are right."""
    data = image(64 * PAGE)
    choose = random.Random(1)
    async with exported(SlowSource(data)) as peer:
        for _ in range(5):
            reads = {
                asyncio.ensure_future(peer.read(page * PAGE, PAGE)): page for page in range(64)
            }
            cancelled = set(choose.sample(list(reads), 32))
            for read in cancelled:
                for _ in range(choose.randrange(3)):
                    await asyncio.sleep(0)
                read.cancel()
            for read, page in reads.items():
                with contextlib.suppress(asyncio.CancelledError):
                    assert as_bytes(await read) == data[page * PAGE : (page + 1) * PAGE]
            assert sum(read.cancelled() for read in reads) <= 32
        assert as_bytes(await peer.read(0, len(data))) == data


async def test_a_silent_server_costs_a_bounded_time(free_port: Callable[[], int]) -> None:
    """Whether it says no hello or no answer: SourceError within the time limit."""
    async with silent_server() as port:
        with pytest.raises(SourceError, match="no answer within"):
            await within(PeerSource.open("127.0.0.1", port, timeout=0.05))

    class Never(BufferSource):
        def read_nowait(self, offset: int, length: int) -> Buffer:
            return None  # type: ignore[return-value]

        async def read(self, offset: int, length: int) -> Buffer:
            await asyncio.Event().wait()
            raise AssertionError

    async with exported(Never(b"ab"), "aiouffd://127.0.0.1:{}?timeout=0.05") as peer:
        with pytest.raises(SourceError, match="1 bytes at offset 1 did not come within"):
            await within(peer.read(1, 1))


@contextlib.asynccontextmanager
async def silent_server(say: bytes = b"", *, close: bool = False) -> AsyncIterator[int]:
    """A server that says only this, whatever it hears."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(say)
        with contextlib.suppress(ConnectionError):
            while not close and await reader.read(1 << 16):
                pass
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


_HELLO = pages.Holder().hello(pages.Hello(1 << 20, "x", 4096, 0))


@pytest.mark.parametrize(
    ("say", "why"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak this protocol"),
        (_HELLO[:17], "gave no hello"),
        (b"", "gave no hello"),
        (_HELLO[:-5] + b"\xff\xff\xff\xff", "bytes of text"),
        (pages.Holder.refuse("not you\x1b[2J"), r"refused us: not you\?\[2J"),
        (pages.MAGIC + b"\0\2" + _HELLO[10:], "speaks version 2"),
        (_HELLO + pages.Holder.answer(0, 1), "which was not asked"),
    ],
)
async def test_a_hostile_server_is_an_error_that_says_what_was_wrong(say: bytes, why: str) -> None:
    """What it says is looked at before anything is allocated for it."""
    async with silent_server(say, close=True) as port:
        with pytest.raises(SourceError, match=why):
            peer = await within(open_url(f"aiouffd://127.0.0.1:{port}?timeout=0.3"))
            try:
                await within(peer.read(0, 1))
            finally:
                await peer.aclose()


# --- servers that come and go ----------------------------------------------------------


@pytest.fixture
def free_port() -> Iterator[Callable[[], int]]:
    """Ports that nobody listens on, kept from others by a socket that is bound and no more."""
    import socket

    bound: list[socket.socket] = []

    def find() -> int:
        each = socket.socket()
        bound.append(each)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        each.bind(("127.0.0.1", 0))
        port: int = each.getsockname()[1]
        return port

    yield find
    for each in bound:
        each.close()


async def start_server(file: Path, port: int) -> asyncio.subprocess.Process:
    """Start ``aiouffd export`` and wait until it listens."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aiouffd", "export", str(file)),
        *("--listen", f"127.0.0.1:{port}"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        assert b"exporting" in await process.stdout.readline()
    return process


async def kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    await process.communicate()


async def test_a_killed_server_that_comes_back_is_no_error(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """SIGKILL with reads in flight, a while without a server, then the same image again."""
    size = 512 * PAGE
    data = image(size)
    file = tmp_path / "image"
    file.write_bytes(data)
    port = free_port()
    process = await start_server(file, port)
    try:
        source = await open_url(f"aiouffd://127.0.0.1:{port}/image?timeout=30")
        choose = random.Random(2)
        done, enough = 0, False

        async def read_on() -> None:
            nonlocal done
            while not enough:
                page = choose.randrange(size // PAGE)
                got = await source.read(page * PAGE, PAGE)
                assert as_bytes(got) == data[page * PAGE : (page + 1) * PAGE]
                done += 1

        readers = [asyncio.ensure_future(read_on()) for _ in range(16)]
        for _ in range(2):
            until = done + 400
            while done < until:
                await asyncio.sleep(0)
            await kill(process)
            in_between = asyncio.ensure_future(source.read(0, size))  # begins while nobody is there
            await asyncio.sleep(0)
            process = await start_server(file, port)
            assert as_bytes(await within(in_between, 30)) == data
        enough = True
        await within(asyncio.gather(*readers), 30)
        await source.aclose()
    finally:
        await kill(process)


async def test_another_image_after_a_reconnect_is_refused_for_ever(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """Even when the first one comes back: the source cannot know what was handed out."""
    port = free_port()
    file, other = tmp_path / "image", tmp_path / "other"
    file.write_bytes(image(4 * PAGE))
    other.write_bytes(image(4 * PAGE, seed=1))
    one, two = FileSource(file), FileSource(other)
    async with Export(one, port=port):
        peer = await PeerSource.open("127.0.0.1", port)
        await peer.read(0, PAGE)
    async with Export(two, port=port):
        with pytest.raises(SourceError, match="has another image now"):
            await within(peer.read(0, PAGE))
    async with Export(one, port=port):
        with pytest.raises(SourceError, match="has another image now"):
            await within(peer.read(0, PAGE))
    await peer.aclose()
    for source in (one, two):
        await source.aclose()


async def test_an_image_without_identity_is_another_one_after_a_restart(
    free_port: Callable[[], int],
) -> None:
    """Nobody can say that it is the same."""

    class Nameless(BufferSource):
        identity = ""

    port = free_port()
    source = Nameless(b"ab")
    async with Export(source, port=port):
        peer = await PeerSource.open("127.0.0.1", port)
        assert as_bytes(await peer.read(0, 1)) == b"a"
    async with Export(source, port=port):
        with pytest.raises(SourceError, match="has another image now"):
            await within(peer.read(0, 1))
    await peer.aclose()


async def test_a_lost_connection_is_made_anew_only_when_it_is_needed(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """An idle source does not knock at the server's door."""
    port = free_port()
    file = tmp_path / "image"
    file.write_bytes(image(PAGE))
    source = FileSource(file)
    async with Export(source, port=port):
        peer = await PeerSource.open("127.0.0.1", port)
    async with Export(source, port=port) as export:
        for _ in range(10):
            await asyncio.sleep(0)
        assert export.connections == 0
        assert as_bytes(await within(peer.read(0, PAGE))) == image(PAGE)
        assert export.connections == 1
        await peer.aclose()
    await source.aclose()


class LongOnesWait(BufferSource):
    """Answers pages at once, and what is long when it is let go."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.waiting = 0
        self.gate = asyncio.Event()

    def read_nowait(self, offset: int, length: int) -> Buffer:
        return None if length > PAGE else super().read_nowait(offset, length)  # type: ignore[return-value]

    async def read(self, offset: int, length: int) -> Buffer:
        if length > PAGE:
            self.waiting += 1
            await self.gate.wait()
        return super().read_nowait(offset, length)


async def test_a_page_does_not_wait_behind_long_reads() -> None:
    """Though the other server lets no more of these in."""
    data = image(12 << 20)
    source = LongOnesWait(data)
    async with Export(source) as export:
        peer = await PeerSource.open("127.0.0.1", export.port)
        long = [asyncio.ensure_future(peer.read(0, len(data))) for _ in range(2)]
        while source.waiting < 4:
            await asyncio.sleep(0)
        assert as_bytes(await within(peer.read(PAGE, PAGE))) == data[PAGE : 2 * PAGE]
        assert source.waiting == 4  # 8 MiB: a peer has no more in flight
        source.gate.set()
        for read in long:
            assert as_bytes(await read) == data
        assert export.connections == 2
        await peer.aclose()


async def test_without_room_for_a_second_connection_the_first_carries_all(
    free_port: Callable[[], int],
) -> None:
    """It is not asked for again and again, either; but of the server that comes back."""
    data = image(1 << 20)
    port = free_port()
    async with Export(BufferSource(data), port=port, limits=Limits(connections=1)) as export:
        peer = await PeerSource.open("127.0.0.1", port)
        for _ in range(3):
            assert as_bytes(await within(peer.read(0, len(data)))) == data
        assert (export.connections, export.refused) == (1, 1)
    async with Export(BufferSource(data), port=port) as export:
        for _ in range(2):
            assert as_bytes(await within(peer.read(0, len(data)))) == data
        assert export.connections == 2
        await peer.aclose()


async def test_a_long_read_that_finds_another_image_ends_all_reads(
    free_port: Callable[[], int],
) -> None:
    """The connection for pages leads to the first image still, and is not read on."""
    port = free_port()
    size = 1 << 20
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(Export(BufferSource(image(size)), port=port))
        peer = await PeerSource.open("127.0.0.1", port)
        stack.push_async_callback(peer.aclose)
        assert as_bytes(await peer.read(0, PAGE)) == image(size)[:PAGE]
        first._stop_listening()
        second = Export(BufferSource(image(size, seed=1)), port=port)
        await stack.enter_async_context(second)
        for length in (size, PAGE):
            with pytest.raises(SourceError, match="has another image now"):
                await within(peer.read(0, length))


# --- a real process's memory -----------------------------------------------------------


class _OnPeer(Place):
    """An export of a file, with its port kept."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.port = 0
        self._stack = contextlib.AsyncExitStack()

    async def put(self, data: bytes) -> None:
        new = self.file.with_name("new")
        new.write_bytes(data)
        new.rename(self.file)
        if self.port:
            await self.stop()
            await self.start()

    async def open(self) -> Source:
        return await PeerSource.open("127.0.0.1", self.port, timeout=30)

    async def stop(self) -> None:
        await self._stack.aclose()

    async def start(self) -> None:
        source = FileSource(self.file)
        self._stack.push_async_callback(source.aclose)
        export = await self._stack.enter_async_context(Export(source, port=self.port))
        self.port = export.port


class TestFromPeer(RemoteServing):
    """PeerSource under a session."""

    @pytest.fixture(autouse=True)
    def _file(self, tmp_path: Path) -> None:
        self.file = tmp_path / "image"

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[Place]:
        """Export an image."""
        place = _OnPeer(self.file)
        await place.put(image(self.size))
        await place.start()
        try:
            yield place
        finally:
            await place.stop()
