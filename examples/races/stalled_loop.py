"""An asyncio server that stops answering everybody while it reads slow memory, and its repair.

    python examples/races/stalled_loop.py

The server sends records out of memory that is slow now and then: an mmap of a file on a disk
under load, swapped out, or filled from elsewhere.  A heartbeat beside it shows when the loop
ran; the record of the harness shows when the memory was waited for.
"""

import asyncio
import contextlib
import ctypes
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from aiouffd.testing import Harness, Region

RECORD = 64
SLOW = 0.05  # seconds

Read = Callable[[Region, int], Awaitable[bytes]]


async def plainly(region: Region, at: int) -> bytes:
    """The bug: it looks like any access to a bytes object, and the loop waits inside it."""
    return bytes(region.view[at : at + RECORD])


async def in_a_thread(region: Region, at: int) -> bytes:
    """No repair: the thread waits in the middle of a bytecode, and keeps the GIL as it does."""
    return await asyncio.to_thread(lambda: bytes(region.view[at : at + RECORD]))


async def without_the_gil(region: Region, at: int) -> bytes:
    """The repair: ctypes gives the GIL back before it calls memmove."""
    record = ctypes.create_string_buffer(RECORD)
    await asyncio.to_thread(ctypes.memmove, record, region.address + at, RECORD)
    return record.raw


@contextlib.asynccontextmanager
async def heartbeat() -> AsyncIterator[list[int]]:
    """Write down when the loop ran, every millisecond."""
    beats: list[int] = []

    async def beat() -> None:
        while True:
            beats.append(time.monotonic_ns())
            await asyncio.sleep(0.001)

    task = asyncio.create_task(beat())
    try:
        yield beats
    finally:
        task.cancel()
        await asyncio.wait([task])


async def serve_one(region: Region, read: Read) -> list[int]:
    """Ask a server for one record; give the heartbeats meanwhile."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await read(region, int(await reader.readline()) * RECORD))
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, heartbeat() as beats:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"2\n")
        assert await reader.read() == b"record 2".ljust(RECORD)
        writer.close()
        await writer.wait_closed()
    return beats


CONTENTS = b"".join(b"record %d".ljust(RECORD + 1) % number for number in range(9))

for read in (plainly, in_a_thread, without_the_gil):
    with Harness() as uffd:
        region = uffd.region(1, contents=CONTENTS, name="records")
        with region.page(0).slow(SLOW), uffd.record() as record:
            beats = asyncio.run(serve_one(region, read))
        (touch,) = record
        during = [beat for beat in beats if 0 < beat - touch.time_ns < SLOW * 1e9]
        print(f"{read.__name__}: {len(during)} heartbeats while the memory was waited for")
