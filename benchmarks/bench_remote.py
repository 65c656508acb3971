"""Reads of remote sources, against a bare client that asks the same server in the same run.

Knows: servers on loopback, and a client of each kind with nothing around it.
Must not know: page faults.

The servers are those of the tests, in processes of their own: written in Python, so what a read
takes here is mostly theirs, and the ratio is what counts.  A kind whose package is missing is
left out, and said so.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from importlib.util import find_spec
from typing import Any

from .build import HERE
from .figures import Figure, Sample, Settings, interleave, main, microseconds

SIZE = 16 << 20
SMALL, LARGE = 4096, 2 << 20
AT_ONCE = 32
WARM_UP = 4

Read = Callable[[int, int], Awaitable[Any]]
Client = Callable[[], contextlib.AbstractAsyncContextManager[Read]]


@contextlib.contextmanager
def program(module: str, *arguments: str) -> Iterator[list[str]]:
    """Run a server of the tests; give the lines that it says first."""
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            lines = [server.stdout.readline().strip()]
            while lines[-1].startswith("export "):
                lines.append(server.stdout.readline().strip())
            yield lines
        finally:
            server.terminate()


@contextlib.contextmanager
def http() -> Iterator[tuple[Client, Client]]:
    """Give HttpSource and a bare aiohttp session."""
    import aiohttp

    from aiouffd.sources.http import HttpSource

    @contextlib.asynccontextmanager
    async def ours() -> AsyncIterator[Read]:
        source = await HttpSource.open(url)
        yield source.read
        await source.aclose()

    @contextlib.asynccontextmanager
    async def bare() -> AsyncIterator[Read]:
        async with aiohttp.ClientSession(auto_decompress=False) as session:

            async def read(offset: int, length: int) -> bytes:
                headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
                async with session.get(url, headers=headers) as response:
                    return await response.read()

            yield read

    with program("tests.http_server", str(SIZE)) as (url,):
        yield ours, bare


@contextlib.contextmanager
def s3() -> Iterator[tuple[Client, Client]]:
    """Give ObjectStoreSource and obstore's own range reads."""
    import obstore
    from obstore.store import S3Store

    from aiouffd.sources.object_store import ObjectStoreSource

    with program("tests.s3_server") as lines:
        words = [shlex.split(line)[1].partition("=") for line in lines if line]
        options: Any = {name.lower(): value for name, _, value in words}
        del options["aws_allow_http"]
        store = S3Store("images", client_options={"allow_http": True}, **options)
        obstore.put(store, "vm.img", random.Random(0).randbytes(SIZE), use_multipart=False)

        @contextlib.asynccontextmanager
        async def ours() -> AsyncIterator[Read]:
            source = await ObjectStoreSource.open("s3://images/vm.img", options=options)
            yield source.read
            await source.aclose()

        @contextlib.asynccontextmanager
        async def bare() -> AsyncIterator[Read]:
            async def read(offset: int, length: int) -> Any:
                return await obstore.get_range_async(store, "vm.img", start=offset, length=length)

            yield read

        yield ours, bare


#: Kinds of sources: the package that each needs, and its clients.
KINDS = {"http": ("aiohttp", http), "s3": ("obstore", s3)}


def timed(client: Client, settings: Settings) -> Callable[[], Sample]:
    """Make a run: small and large reads one after another, then small ones at once."""
    small, large = max(8, settings.faults // 50), max(4, settings.faults // 1000)

    async def one_by_one(read: Read, length: int, count: int) -> float:
        choose, taken = random.Random(length), []
        for number in range(WARM_UP + count):
            offset = choose.randrange(0, SIZE - length, SMALL)
            start = time.perf_counter_ns()
            data = await read(offset, length)
            if number >= WARM_UP:
                taken.append(time.perf_counter_ns() - start)
            if len(data) != length:
                raise ValueError(f"{len(data)} bytes instead of {length}")
        return statistics.median(taken)

    async def at_once(read: Read, count: int) -> float:
        offsets = iter([number * SMALL for number in range(count)])

        async def worker() -> None:
            for offset in offsets:
                await read(offset, SMALL)

        start = time.perf_counter_ns()
        await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
        return (time.perf_counter_ns() - start) / count

    async def run() -> Sample:
        async with client() as read:
            return {
                "small": await one_by_one(read, SMALL, small),
                "large": await one_by_one(read, LARGE, large),
                "many": await at_once(read, max(AT_ONCE, small)),
            }

    return lambda: asyncio.run(run())


def measure(settings: Settings) -> list[Figure]:
    """Take the time of a read, of a page and of 2 MiB, for each kind of source."""
    figures: list[Figure] = []
    for kind, (package, clients) in KINDS.items():
        if find_spec(package) is None:
            missing = f"{package} is missing: pip install 'aiouffd[{kind}]'"
            print(f"{kind}: not measured, {missing}", file=sys.stderr)
            continue
        with clients() as (ours, bare):
            contestants = {"ours": timed(ours, settings), "bare": timed(bare, settings)}
            results = interleave(contestants, settings.runs)
        figures += [
            Figure.compare(
                f"{kind}, {case}",
                ours=results["ours"][name],
                floor=results["bare"][name],
                unit=microseconds,
                note=f"against a bare {package} client",
            )
            for name, case in (
                ("small", "4 KiB, one at a time"),
                ("large", "2 MiB, one at a time"),
                ("many", f"4 KiB, {AT_ONCE} at once, each"),
            )
        ]
    return figures


if __name__ == "__main__":
    main("remote", measure)
