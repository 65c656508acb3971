"""Reads of a page from a peer and from Redis, against a bare client in the same run.

Knows: servers on loopback, and a client of each kind with nothing around it.
Must not know: page faults.

Server and client run on one CPU: between two, waking the other is what one measures.  The bare
client of the peer exchanges the same bytes over asyncio streams with a server that looks at
nothing but the length; that of Redis is redis-py's own GETRANGE.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .bare_pages import bare_client
from .bench_remote import AT_ONCE, SIZE, Client, Read, program, timed
from .figures import Figure, Settings, interleave, main, microseconds


@contextlib.contextmanager
def peer(folder: Path) -> Iterator[tuple[Client, Client]]:
    """Give PeerSource, and streams that exchange as many bytes."""
    from aiouffd.sources.peer import open_url

    image = folder / "image"
    image.write_bytes(random.Random(0).randbytes(SIZE))
    with (
        program("aiouffd", "export", str(image), "--json", "--cache", "64M") as (line,),
        program("benchmarks.bare_pages") as (port,),
    ):
        url = json.loads(line)["url"]

        @contextlib.asynccontextmanager
        async def ours() -> AsyncIterator[Read]:
            source = await open_url(url)
            yield source.read
            await source.aclose()

        @contextlib.asynccontextmanager
        async def bare() -> AsyncIterator[Read]:
            async with bare_client(int(port)) as client:
                yield client.read

        yield ours, bare


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[tuple[Client, Client]]:
    """Give RedisSource over chunks, and redis-py over a value."""
    import asyncio

    import redis.asyncio as bare_redis

    from aiouffd.sources.buffer import BufferSource
    from aiouffd.sources.redis import RedisSource, store_image
    from tests.redis_servers import RedisServer, real

    with RedisServer(folder, program=real()) as server:
        data = random.Random(0).randbytes(SIZE)
        url = f"{server.url}chunks"
        asyncio.run(store_image(BufferSource(data), url))

        @contextlib.asynccontextmanager
        async def ours() -> AsyncIterator[Read]:
            source = await RedisSource.open(url)
            yield source.read
            await source.aclose()

        @contextlib.asynccontextmanager
        async def bare() -> AsyncIterator[Read]:
            client: Any = bare_redis.Redis(port=server.port, protocol=2)
            await client.set("value", data)

            async def read(offset: int, length: int) -> Any:
                return await client.getrange("value", offset, offset + length - 1)

            yield read
            await client.aclose()

        yield ours, bare


def _missing_for_redis() -> str:
    from tests.redis_servers import real

    if find_spec("redis") is None:
        return "redis-py is missing: pip install 'aiouffd[redis]'"
    return "" if real() else "there is no server: apt install redis-server"


KINDS = {"peer": peer, "redis": redis}
AGAINST = {"peer": "asyncio streams that exchange as many bytes", "redis": "redis-py's GETRANGE"}


def measure(settings: Settings) -> list[Figure]:
    """Take the time of a read, of a page and of 2 MiB, for each kind of source."""
    figures: list[Figure] = []
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {settings.cpu} if settings.cpu >= 0 else {max(before)})
    try:
        for kind, clients in KINDS.items():
            missing = _missing_for_redis() if kind == "redis" else ""
            if missing:
                print(f"{kind}: not measured, {missing}", file=sys.stderr)
                continue
            with (
                tempfile.TemporaryDirectory(prefix="aiouffd-bench-") as folder,
                clients(Path(folder)) as (ours, bare),
            ):
                contestants = {"ours": timed(ours, settings), "bare": timed(bare, settings)}
                results = interleave(contestants, settings.runs)
            figures += [
                Figure.compare(
                    f"{kind}, {case}",
                    ours=results["ours"][name],
                    floor=results["bare"][name],
                    unit=microseconds,
                    note=f"{kind}: against {AGAINST[kind]}",
                )
                for name, case in (
                    ("small", "4 KiB, one at a time"),
                    ("large", "2 MiB, one at a time"),
                    ("many", f"4 KiB, {AT_ONCE} at once, each"),
                )
            ]
    finally:
        os.sched_setaffinity(0, before)
    return figures


if __name__ == "__main__":
    main("network", measure)
