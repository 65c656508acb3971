"""Both ends of a migration in one process, and a peer that says whatever a test wants.

Knows: how to make memory, take a migration in, and what the page says of the wire.
Must not know: what a test is about; the package's own decoder.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import mmap
import os
import random
import ssl
import struct
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from aiouffd.failure import Action
from aiouffd.migration.incoming import Incoming
from aiouffd.migration.listener import Listener
from aiouffd.migration.memory import Landing, SourceMemory
from aiouffd.migration.outgoing import Outgoing, Plan
from aiouffd.migration.wire import Extent
from aiouffd.pager import Pager
from aiouffd.uffd import Feature, Userfaultfd
from tests.migration import frames
from tests.migration.frames import PAGE
from tests.serving import within

STATE: Final = b"where it was"


# --- memory -------------------------------------------------------------------------------


@contextlib.contextmanager
def memfd(length: int) -> Iterator[int]:
    fd = os.memfd_create("moving", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, length)
        yield fd
    finally:
        os.close(fd)


def contents(extents: Sequence[Extent], seed: int = 0) -> list[bytes]:
    """Give each region bytes of its own: pages of noise, of text and of zeros."""
    chance = random.Random(seed)
    made = []
    for each in extents:
        pages = []
        for _ in range(each.length // each.page_size):
            kind = chance.randrange(3)
            page = chance.randbytes(each.page_size) if kind else bytes(each.page_size)
            pages.append(page if kind < 2 else page[:64] * (each.page_size // 64))
        made.append(b"".join(pages))
    return made


@contextlib.contextmanager
def memory_of(extents: Sequence[Extent], data: Sequence[bytes]) -> Iterator[list[SourceMemory]]:
    """Give what a source reads."""
    with contextlib.ExitStack() as stack:
        made = []
        for extent, each in zip(extents, data, strict=True):
            fd = stack.enter_context(memfd(extent.length))
            os.pwrite(fd, each, 0)
            made.append(SourceMemory(fd, extent))
            stack.callback(made[-1].close)
        yield made


@dataclass
class Standing:
    """A program that stands still by itself; what it was told is kept."""

    state: bytes = STATE
    told: list[str] = field(default_factory=list)

    async def stop(self) -> bytes:
        """Stand still."""
        self.told.append("stop")
        return self.state

    async def restart(self) -> None:
        """Go on."""
        self.told.append("restart")

    async def leave(self) -> None:
        """Leave."""
        self.told.append("leave")


# --- a destination that is good ------------------------------------------------------------


@contextlib.asynccontextmanager
async def landed(incoming: Incoming) -> AsyncIterator[list[int]]:
    """Prepare a migration, with memory of this process that nobody touches; give its memfds."""
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(incoming.aclose)
        uffd = Userfaultfd.open(Feature.MISSING_SHMEM, allow_user_mode_only=True)
        pager = Pager(uffd, on_close=Action.ZERO)
        await stack.enter_async_context(pager)
        fds, landings = [], []
        for number, extent in enumerate(incoming.extents):
            fd = stack.enter_context(memfd(extent.length))
            fds.append(fd)
            landings.append(Landing(fd, extent.length))
            stack.callback(landings[-1].close)
            area = mmap.mmap(fd, extent.length)
            start = ctypes.addressof(ctypes.c_char.from_buffer(area))
            # In this system's pages: the mapping is aligned to no larger ones.
            region = pager.register(start, extent.length, incoming.handler(number))
            incoming.attach(number, region)
            stack.callback(area.close)
        await incoming.prepare(landings)
        yield fds
        await pager.aclose(Action.ZERO)


async def take_in(listener: Listener) -> tuple[list[bytes], bytes]:
    """Take one migration, to its end; give its memory and its state."""
    incoming = await within(listener.accept())
    async with landed(incoming) as fds:
        state = await within(incoming.switched())
        incoming.note_running()
        await within(incoming.wait_done())
        await incoming.aclose()
        return [
            os.pread(fd, each.length, 0) for fd, each in zip(fds, incoming.extents, strict=True)
        ], state


async def goes_through(
    listener: Listener,
    *,
    ssl: ssl.SSLContext | None = None,
    plan: Plan | None = None,
) -> None:
    """Let a good migration go through: all of it arrives."""
    extents = [Extent("heap", 24 * PAGE, PAGE), Extent("stack", 16 * PAGE, 2 * PAGE)]
    data = contents(extents)
    plan = plan if plan is not None else Plan(rounds=0)
    with memory_of(extents, data) as memory:
        outgoing = Outgoing(memory, "127.0.0.1", listener.port, plan=plan, ssl=ssl)
        receiving = asyncio.create_task(take_in(listener))
        try:
            await within(asyncio.gather(receiving, outgoing.run(Standing())))
            assert receiving.result() == (data, STATE)
        finally:
            receiving.cancel()
            await asyncio.wait((receiving,))


# --- a peer that says anything --------------------------------------------------------------


class Said(NamedTuple):
    """A frame, as the page describes it."""

    kind: int
    flags: int
    region: int
    number: int
    offset: int
    span: int
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body) if self.body else {}


class Raw:
    """One connection, spoken on by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, port: int, *, ssl: ssl.SSLContext | None = None) -> Raw:
        name = "127.0.0.1" if ssl is not None else None
        return cls(
            *await within(asyncio.open_connection("127.0.0.1", port, ssl=ssl, server_hostname=name))
        )

    @classmethod
    async def greeted(cls, port: int, greeting: bytes = b"", **context: Any) -> Raw:
        """Open one and send a preamble and a hello, a good one by default."""
        raw = await cls.open(port, **context)
        raw.say(frames.preamble() + (greeting or frames.hello()))
        return raw

    def say(self, data: bytes) -> None:
        self.writer.write(data)

    async def hear_preamble(self) -> None:
        assert await within(self.reader.readexactly(16)) == frames.preamble()

    async def hear(self, *, but: Sequence[int] = (frames.PING,)) -> Said:
        """Read the next frame, but for some kinds."""
        while True:
            head = await within(self.reader.readexactly(36))
            kind, flags, region, length, number, offset, span, check, own = struct.unpack(
                ">BBHIQQIII", head
            )
            assert own == zlib.crc32(head[:32])
            body = await within(self.reader.readexactly(length)) if length else b""
            if flags & frames.CHECKED:
                assert check == zlib.crc32(body)
            if kind not in but:
                return Said(kind, flags, region, number, offset, span, body)

    async def hear_error(self) -> dict[str, Any]:
        """Read to the error that ends the connection, and to its end."""
        while (said := await self.hear()).kind != frames.ERROR:
            pass
        self.close()
        value = said.json()
        assert isinstance(value, dict)
        return value

    async def is_ended(self) -> bool:
        """Read to the end."""
        try:
            while await within(self.reader.read(1 << 16)):
                pass
        except OSError:
            pass
        return True

    def close(self) -> None:
        self.writer.transport.abort()


async def source_of(
    port: int, *, token: str = "", epoch: int = 1, **more: Any
) -> tuple[Raw, Raw, dict[str, Any]]:
    """Come as a source with both connections; a test has the destination prepare meanwhile.

    Returns:
        Those for demand and for bulk, and the welcome of the first.
    """
    demand = await Raw.greeted(port, frames.hello(token=token, epoch=epoch, **more))
    await demand.hear_preamble()
    welcome = await demand.hear()
    assert welcome.kind == frames.WELCOME
    token = welcome.json()["token"]
    bulk = await Raw.greeted(port, frames.hello("bulk", token=token, epoch=epoch))
    await bulk.hear_preamble()
    assert (await bulk.hear()).kind == frames.WELCOME
    return demand, bulk, welcome.json()
