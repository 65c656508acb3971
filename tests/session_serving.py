"""A target that is served by a session, for tests of sessions: no server, no protocol.

Knows: how to start one, which bytes it has to hold, and sources with moods.
Must not know: what a test is about.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from aiouffd import Feature, OwnedFd
from aiouffd.errors import SourceError
from aiouffd.handover import HandedRegion, Handover, Peer
from aiouffd.kernel import calls
from aiouffd.service import Service
from aiouffd.session import Session
from aiouffd.sources import Source
from tests.serving import LAYOUT, image
from tests.targets import MISSING, PAGE, Target

if TYPE_CHECKING:
    from typing_extensions import Buffer

EVENTS: Final = LAYOUT | Feature.EVENT_FORK


class Moody:
    """A source that is not at hand, takes its time, and may fail for a while."""

    def __init__(
        self, data: bytes, rng: random.Random, failing: float = 0.0, at_hand: float = 0.0
    ) -> None:
        self.data = data
        self.size = len(data)
        self.rng = rng
        self.failing = failing
        self.at_hand = at_hand
        self.reads = 0
        self.open = asyncio.Event()
        self.open.set()

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        if self.rng.random() < self.at_hand:
            return self.data[offset : offset + length]
        return None

    async def read(self, offset: int, length: int) -> Buffer:
        self.reads += 1
        await self.open.wait()
        for _ in range(self.rng.randrange(1, 5)):
            await asyncio.sleep(0)
        if self.rng.random() < self.failing:
            raise SourceError(f"moody at {offset}")
        return self.data[offset : offset + length]

    def extents(self) -> Iterator[tuple[int, int]]:
        yield 0, self.size

    async def aclose(self) -> None:
        """Nothing is held."""


@contextlib.asynccontextmanager
async def served(
    source: Source,
    *,
    kind: str = "anon",
    pages: int = 64,
    leave_out: int = 0,
    alone: bool = False,
    **settings: Any,
) -> AsyncIterator[tuple[Target, Session]]:
    """A target that keeps its own userfaultfd, and the session that serves it.

    Args:
        leave_out: The first so many pages are left unregistered.
        alone: The target does not keep it.
    """
    keeping: dict[str, Any] = {"keep_uffd": not alone, "threads": 6}
    with Target(kind, pages, features=EVENTS, register=0, **keeping) as target:
        offset = leave_out * target.page_size
        length = target.length - offset
        calls.register(target.uffd, target.base + offset, length, MISSING)
        region = HandedRegion(target.base + offset, length, offset, target.page_size)
        peer = Peer(target.pid, 0, 0, OwnedFd(os.dup(target.pidfd)))
        handover = Handover(OwnedFd(target.take_uffd()), (region,), alone=alone)
        service = Service(warn_after=None, **settings)
        with peer:
            async with Session(handover, source, peer=peer, service=service) as session:
                yield target, session


def is_registered(target: Target, address: int) -> bool:
    return bool({"um", "uw", "ui"} & target.vm_flags(address))


def model(pages: int, zero: Iterable[int] = (), size: int = PAGE) -> bytes:
    """What the memory has to hold."""
    data = bytearray(image(0, pages * size, size))
    for page in zero:
        data[page * size : (page + 1) * size] = bytes(size)
    return bytes(data)


async def holds(target: Target, data: bytes, thread: int = 5) -> bool:
    """Whether the target's memory is this, byte by byte, each page touched."""
    found = await target.start_crc32(target.base, len(data), thread)
    return found == zlib.crc32(data)
