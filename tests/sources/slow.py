"""A source that waits to be told: for tests of the sources that stand around others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from aiouffd.errors import ClosedError
from aiouffd.sources import check_read
from aiouffd.sources.buffer import BufferSource

if TYPE_CHECKING:
    from typing_extensions import Buffer


class SlowSource:
    """Bytes of which none is at hand; each read waits for ``let_go``, and is written down.

    Attributes:
        reads: What was asked for, in order.
        cancelled: Reads that were cancelled while they waited.
        error: What a read raises once it is let go.
        closed: How often it was closed.
    """

    def __init__(
        self, data: bytes, *, wait: bool = True, extents: Sequence[tuple[int, int]] | None = None
    ) -> None:
        self._data = BufferSource(data)
        self.size = len(data)
        self.identity = self._data.identity
        self.reads: list[tuple[int, int]] = []
        self.cancelled = 0
        self.error: BaseException | None = None
        self.closed = 0
        self._extents = extents
        self._gate = asyncio.Event()
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        if not wait:
            self._gate.set()

    def let_go(self) -> None:
        """Let what waits go on, and what comes."""
        self._gate.set()

    def hold(self) -> None:
        """Let what comes wait again."""
        self._gate.clear()

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        if self.closed:
            raise ClosedError("closed")
        check_read(offset, length, self.size)
        return None

    async def read(self, offset: int, length: int) -> Buffer:
        self.read_nowait(offset, length)
        self.reads.append((offset, length))
        self._under_way += 1
        self._idle.clear()
        try:
            await self._gate.wait()
            await asyncio.sleep(0)
            if self.error is not None:
                raise self.error
            return self._data.read_nowait(offset, length)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    def extents(self) -> Iterator[tuple[int, int]]:
        return iter(self._extents) if self._extents is not None else self._data.extents()

    async def aclose(self) -> None:
        self.closed += 1
        await self._idle.wait()


async def turns(count: int = 5) -> None:
    """Let everything that can go on do so, some steps far."""
    for _ in range(count):
        await asyncio.sleep(0)
