"""The distribution's Redis as the place that images lie in: alone, behind TLS, as a cluster.

All that tests/sources/test_redis.py has is run again here, against that server.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
import trustme

from aiouffd.errors import SourceError
from aiouffd.sources import Source
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.redis import store_image
from aiouffd.testing.sources import PAGE, SourceContract, as_bytes, image
from tests import redis_servers
from tests.redis_servers import RedisServer, cluster, free_port, new_key, wait_for_cluster
from tests.remote_serving import Place, RemoteServing
from tests.serving import within
from tests.sources.test_redis import *  # noqa: F403 - its tests, to be run here
from tests.sources.test_redis import OnRedis, opened

PROGRAM = redis_servers.on_path()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs redis-server: sudo make interop")


@pytest.fixture(scope="module")  # type: ignore[no-redef]  # instead of theirs
def server(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RedisServer]:
    """The distribution's, whatever else there is."""
    with RedisServer(tmp_path_factory.mktemp("redis"), program=PROGRAM) as running:
        yield running


async def test_by_unix_socket(server: RedisServer) -> None:
    """Without a port."""
    key = new_key()
    await store_image(BufferSource(image(8 * PAGE)), server.url + key)
    async with opened(f"redis+unix://{server.unix_socket}?key={key}") as source:
        assert as_bytes(await source.read(0, 8 * PAGE)) == image(8 * PAGE)


async def test_with_a_password_and_another_database(tmp_path: Path) -> None:
    """A wrong one is an error at once, which does not repeat it."""
    options = ("--requirepass", "right")
    with RedisServer(tmp_path, *options, program=PROGRAM, password="right") as locked:
        where = f"127.0.0.1:{locked.port}/3/{new_key()}"
        await store_image(BufferSource(image(PAGE)), f"redis://:right@{where}")
        async with opened(f"valkey://default:right@{where}") as source:
            assert as_bytes(await source.read(0, PAGE)) == image(PAGE)
        with pytest.raises(SourceError, match="there is nothing"):
            await within(opened_once(f"redis://:right@{where.replace('/3/', '/2/')}"))
        for wrong in ("", ":wrongest@"):
            with pytest.raises(SourceError) as raised:
                await within(opened_once(f"redis://{wrong}{where}"))
            assert "wrongest" not in str(raised.value)


async def test_a_password_that_has_changed_is_an_error_at_once(tmp_path: Path) -> None:
    """It would not be right the next time either."""
    options = ("--requirepass", "right")
    with RedisServer(tmp_path, *options, program=PROGRAM, password="right") as locked:
        url = f"redis://:right@127.0.0.1:{locked.port}/0/{new_key()}?timeout=60"
        await store_image(BufferSource(image(PAGE)), url)
        async with opened(url) as source:
            locked.cli("-a", "right", "--no-auth-warning", "config", "set", "requirepass", "other")
            locked.cli("-a", "other", "--no-auth-warning", "client", "kill", "type", "normal")
            with pytest.raises(SourceError, match="invalid username-password"):
                await within(source.read(0, PAGE))


async def opened_once(url: str) -> None:
    async with opened(url):
        pass


async def test_behind_tls(tmp_path: Path) -> None:
    """Both sides show certificates."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    for name in ("127.0.0.1", "client"):
        issued = authority.issue_cert(f"{name}.example.org" if name == "client" else name)
        issued.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / f"{name}.pem"))
    port = free_port()
    options = ["--tls-port", str(port), "--tls-ca-cert-file", str(tmp_path / "ca.pem")]
    for what in ("--tls-cert-file", "--tls-key-file"):
        options += [what, str(tmp_path / "127.0.0.1.pem")]
    with RedisServer(tmp_path, *options, program=PROGRAM):
        url = f"rediss://127.0.0.1:{port}/0/{new_key()}?ca={tmp_path}/ca.pem"
        with pytest.raises(SourceError):
            await within(store_image(BufferSource(image(PAGE)), url))
        url += f"&cert={tmp_path}/client.pem&cert_key={tmp_path}/client.pem"
        await store_image(BufferSource(image(PAGE)), url)
        async with opened(url) as source:
            assert as_bytes(await source.read(0, PAGE)) == image(PAGE)
        with pytest.raises(SourceError, match="certificate verify failed"):
            await within(opened_once(url.partition("?")[0]))


# --- a cluster -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sequence[RedisServer]]:
    """Three primaries that share the slots."""
    assert PROGRAM is not None
    with cluster(tmp_path_factory.mktemp("cluster"), PROGRAM) as running:
        yield running


def url_of(nodes: Sequence[RedisServer]) -> str:
    where = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
    return f"redis+cluster://{where}/"


class TestStringValueInCluster(SourceContract):
    """An image as one value, which lies in one node."""

    @pytest.fixture(autouse=True)
    def _nodes(self, nodes: Sequence[RedisServer]) -> None:
        self.nodes = nodes

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        key = new_key()
        connected: Any = redis.asyncio.RedisCluster(port=self.nodes[0].port, host="127.0.0.1")
        await connected.set(key, data)
        await connected.aclose()
        async with opened(url_of(self.nodes) + key) as source:
            yield source


class TestChunksInCluster(SourceContract):
    """An image in chunks, which lie in all nodes."""

    @pytest.fixture(autouse=True)
    def _nodes(self, nodes: Sequence[RedisServer]) -> None:
        self.nodes = nodes

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        url = url_of(self.nodes) + new_key()
        await store_image(BufferSource(data), url, chunk=4096)
        async with opened(url) as source:
            yield source


async def test_a_cluster_spreads_the_chunks(nodes: Sequence[RedisServer]) -> None:
    """Every node has about its share."""
    key = new_key()
    await store_image(BufferSource(image(300 * PAGE)), url_of(nodes) + key, chunk=PAGE)
    counts = [len(node.cli("--raw", "keys", f"{key}:*").split()) for node in nodes]
    assert sum(counts) == 300
    assert min(counts) > 50


@contextlib.asynccontextmanager
async def read_on(url: str, size: int, seed: int) -> AsyncIterator[tuple[Source, list[int]]]:
    """Read at random, in eight tasks, as long as the block runs and some time longer.

    Yields the source, and how many reads are done.
    """
    data = image(size)
    choose = random.Random(seed)
    done = [0]
    ending = False

    async def reader() -> None:
        while not ending:
            page = choose.randrange(size // PAGE)
            got = await source.read(page * PAGE, PAGE)
            assert as_bytes(got) == data[page * PAGE : (page + 1) * PAGE]
            done[0] += 1

    async with opened(url) as source:
        readers = [asyncio.ensure_future(reader()) for _ in range(8)]
        try:
            yield source, done
            before = done[0]
            while done[0] < before + 200 and not any(each.done() for each in readers):
                await asyncio.sleep(0.001)
        finally:
            ending = True
            await asyncio.wait_for(asyncio.gather(*readers), 30)


@pytest.mark.leaky("the node that comes back is the module's")
async def test_a_node_that_is_killed_comes_back(nodes: Sequence[RedisServer], seed: int) -> None:
    """Reads of what it holds wait; all end right."""
    size = 300 * PAGE
    url = f"{url_of(nodes)}{new_key()}?timeout=30"
    await store_image(BufferSource(image(size)), url, chunk=PAGE)
    async with read_on(url, size, seed) as (source, done):
        while done[0] < 200:
            await asyncio.sleep(0.001)
        nodes[1].kill()
        whole = asyncio.ensure_future(source.read(0, size))  # of which a third lies there
        await asyncio.sleep(0.3)
        assert not whole.done()
        await asyncio.to_thread(nodes[1].start)
        assert as_bytes(await within(whole, 30)) == image(size)
        await asyncio.to_thread(wait_for_cluster, nodes)


async def test_slots_that_move_are_followed(nodes: Sequence[RedisServer], seed: int) -> None:
    """A third of a node's slots go to another one while their keys are read."""
    size = 300 * PAGE
    url = f"{url_of(nodes)}{new_key()}?timeout=30"
    await store_image(BufferSource(image(size)), url, chunk=PAGE)
    names = [node.cli("cluster", "myid").strip() for node in nodes]
    async with read_on(url, size, seed):
        await asyncio.to_thread(
            nodes[0].cli,
            *("--cluster", "reshard", f"127.0.0.1:{nodes[0].port}", "--cluster-yes"),
            *("--cluster-from", names[0], "--cluster-to", names[2], "--cluster-slots", "1800"),
        )
    moved = nodes[0].cli("cluster", "nodes")
    assert moved.count("connected") >= 3
    async with opened(url) as source:
        assert as_bytes(await source.read(0, size)) == image(size)


@pytest.mark.leaky("the nodes that come back are the module's")
class TestFromRedisCluster(RemoteServing):
    """A session over a cluster, all of whose nodes are killed in the middle."""

    @pytest.fixture(autouse=True)
    def _nodes(self, nodes: Sequence[RedisServer]) -> None:
        self.nodes = nodes

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[Place]:
        """Store an image."""
        place = OnRedis(url_of(self.nodes), self.nodes)
        await place.put(image(self.size))
        yield place
        await asyncio.to_thread(wait_for_cluster, self.nodes)
