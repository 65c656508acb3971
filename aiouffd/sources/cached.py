"""A cache in front of a source: so many bytes in memory, each of them fetched once.

Knows: blocks of the source below, which of them are kept, and which are being read.
Must not know: what the source below is, page faults.

Laws of this file:

* One read at a time per block: who wants it meanwhile waits for that read.  It belongs to
  nobody: cancelling one of those who wait does not cancel the others, cancelling the last of
  them cancels the read.
* A failed read reaches everyone who waits for it and is forgotten: the next one tries again.
* Blocks are lent, not copied.  A block that somebody still holds a view of is not dropped, for
  that would free nothing: what is kept, lent or not, never exceeds ``max_bytes``.  When all of
  it is lent, what is read is given to those who asked and not kept.  Reads under way, and what
  was given without being kept, belong to who asked and are not counted.
* Least recently used goes first.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from ..errors import ClosedError, SourceError
from ..ranges import is_power_of_two
from . import Source, check_read, identity_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK_BYTES: Final = 64 * 1024

_LENT_AT_MOST: Final = 64  # blocks in use that are passed by in the search for one to drop


@dataclass(frozen=True, slots=True)
class CacheFigures:
    """What a cache has done so far.

    Attributes:
        hits: Reads answered from memory.
        misses: Reads for which at least one block was missing.
        joined: Of these, reads that waited for somebody else's read as well.
        reads: Reads of the source below.
        read_bytes: What these were to bring, in bytes.
        held_bytes: What is kept now, in bytes.
        max_bytes: The bound of it.
    """

    hits: int
    misses: int
    joined: int
    reads: int
    read_bytes: int
    held_bytes: int
    max_bytes: int


class _Flight:
    """A read of the source below that is under way, for any number of waiters."""

    __slots__ = ("blocks", "task", "waiters")

    def __init__(self, blocks: range) -> None:
        self.blocks = blocks
        self.waiters = 0
        self.task: asyncio.Task[memoryview]


#: A stretch of the source that begins with a block: there, or to come.
_Part: TypeAlias = tuple[int, "memoryview | _Flight"]


class CachedSource:
    """A source whose bytes are kept in memory once they were read, up to a bound.

    Sharing: one for all sessions of a server; ``read`` on one loop, ``read_nowait`` anywhere.
    """

    def __init__(self, source: Source, max_bytes: int, *, block: int = BLOCK_BYTES) -> None:
        """Put a cache in front of a source.

        Args:
            source: Closed with the cache.
            max_bytes: How much to keep, in bytes; at least one block.
            block: What is read and dropped as one, in bytes; a power of two.

        Raises:
            ValueError: There is no room for one block, or it is no power of two.
        """
        if not is_power_of_two(block):
            raise ValueError(f"a block is a power of two: {block}")
        if max_bytes < block:
            raise ValueError(f"a cache of {max_bytes} bytes cannot keep a block of {block}")
        self._source = source
        self._size = source.size
        self._max_bytes = max_bytes
        self._block = block
        self._lock = threading.Lock()  # over the four that follow
        self._blocks: OrderedDict[int, bytearray] = OrderedDict()
        self._held = 0
        self._hits = 0
        self._closing = False
        self._flights: dict[int, _Flight] = {}  # by block
        self._tasks: set[asyncio.Task[memoryview]] = set()
        self._misses = self._joined = self._reads = self._read_bytes = 0

    @property
    def size(self) -> int:
        """Length of the source below, in bytes."""
        return self._size

    @property
    def identity(self) -> str:
        """That of the source below."""
        return identity_of(self._source)

    def extents(self) -> Iterator[tuple[int, int]]:
        """Give those of the source below."""
        return self._source.extents()

    def figures(self) -> CacheFigures:
        """Sum up what was done so far."""
        return CacheFigures(
            hits=self._hits,
            misses=self._misses,
            joined=self._joined,
            reads=self._reads,
            read_bytes=self._read_bytes,
            held_bytes=self._held,
            max_bytes=self._max_bytes,
        )

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """Give what is kept: a view of it if it lies in one block.

        What only the source below has at hand is left to ``read``, which keeps it.
        """
        end = offset + length
        if offset < 0 or length <= 0 or end > self._size:
            check_read(offset, length, self._size)
        block = self._block
        number = offset // block
        start = offset - number * block
        with self._lock:
            if self._closing:
                raise ClosedError("this cache is closed")
            kept = self._blocks.get(number)
            if kept is None:
                return None
            if start + length <= block:  # most often: within one block
                self._blocks.move_to_end(number)
                self._hits += 1
                # From here on it is lent, and is not dropped.
                return memoryview(kept)[start : start + length].toreadonly()
            views = []
            for each in range(number, (end - 1) // block + 1):
                kept = self._blocks.get(each)
                if kept is None:
                    return None
                self._blocks.move_to_end(each)
                views.append(memoryview(kept))
            self._hits += 1
        return _cut(views, start, length)

    async def read(self, offset: int, length: int) -> Buffer:
        """Give what is kept; read the blocks that are missing, neighbours in one read.

        Raises:
            SourceError: The source below raised it.
            ClosedError: The source is closed.

        Cancellation: the read below goes on if others wait for it.
        """
        kept = self.read_nowait(offset, length)
        if kept is not None:
            return kept
        self._misses += 1
        block = self._block
        first, last = offset // block, (offset + length - 1) // block
        flights: list[_Flight] = []
        try:
            parts = self._collect(first, last, flights)
            if flights:
                await asyncio.wait([flight.task for flight in flights])
            views = [part if isinstance(part, memoryview) else _outcome(part) for _, part in parts]
        finally:
            for flight in flights:
                self._leave(flight)
        return _cut(views, offset - parts[0][0] * block, length)

    def _collect(self, first: int, last: int, flights: list[_Flight]) -> list[_Part]:
        """Find each block from first to last: kept, under way, or now begun to be read."""
        parts: list[_Part] = []
        begun = len(self._tasks)
        number = first
        while number <= last:
            flight = self._flights.get(number)
            if flight is not None:
                parts.append((flight.blocks.start, flight))
                number = flight.blocks.stop
            elif (kept := self._lend(number)) is not None:
                parts.append((number, kept))
                number += 1
                continue
            else:
                end = number + 1
                while end <= last and end not in self._flights and end not in self._blocks:
                    end += 1
                part = self._bring(range(number, end))
                parts.append((number, part))
                flight = part if isinstance(part, _Flight) else None
                number = end
            if flight is not None:
                flight.waiters += 1
                flights.append(flight)
        self._joined += len(flights) > len(self._tasks) - begun
        return parts

    def _lend(self, number: int) -> memoryview | None:
        with self._lock:
            kept = self._blocks.get(number)
            if kept is None:
                return None
            self._blocks.move_to_end(number)
            return memoryview(kept)

    def _bring(self, blocks: range) -> memoryview | _Flight:
        """Read blocks that are missing: at once if the source below has them at hand."""
        start = blocks.start * self._block
        length = min(blocks.stop * self._block, self._size) - start
        self._reads += 1
        self._read_bytes += length
        data = self._source.read_nowait(start, length)
        if data is not None:
            return self._keep(blocks, data)
        flight = _Flight(blocks)
        flight.task = asyncio.get_running_loop().create_task(
            self._fetch(blocks, start, length), name="aiouffd cache"
        )
        self._tasks.add(flight.task)
        for number in blocks:
            self._flights[number] = flight
        flight.task.add_done_callback(lambda task: self._land(flight, task))
        return flight

    async def _fetch(self, blocks: range, start: int, length: int) -> memoryview:
        return self._keep(blocks, await self._source.read(start, length))

    def _land(self, flight: _Flight, task: asyncio.Task[memoryview]) -> None:
        self._tasks.discard(task)
        self._forget(flight)
        if not task.cancelled():
            task.exception()  # everybody who waited for it may have gone meanwhile

    def _leave(self, flight: _Flight) -> None:
        flight.waiters -= 1
        if not flight.waiters and not flight.task.done():
            self._forget(flight)  # who comes now must not wait for a read that is cancelled
            flight.task.cancel()

    def _forget(self, flight: _Flight) -> None:
        for number in flight.blocks:
            if self._flights.get(number) is flight:
                del self._flights[number]

    def _keep(self, blocks: range, data: Buffer) -> memoryview:
        """Keep blocks as far as there is room; the caller gets them as they came.

        They are copied once: the bytes then lie in no larger buffer of the source below,
        which would stay in memory as a whole, and nobody else holds them.
        """
        view = memoryview(data).cast("B")
        size = self._block
        for index, number in enumerate(blocks):
            kept = bytearray(view[index * size : (index + 1) * size])
            with self._lock:
                if number in self._blocks or self._closing:
                    continue
                if not self._make_room(len(kept)):
                    break
                self._blocks[number] = kept
                self._held += len(kept)
        return view

    def _make_room(self, length: int) -> bool:
        """Drop what was used longest ago and is not lent, until so many bytes are free."""
        lent = 0
        while self._held + length > self._max_bytes:
            if not self._blocks or lent == _LENT_AT_MOST:
                return False
            number, oldest = next(iter(self._blocks.items()))
            size = len(oldest)
            try:
                oldest.clear()  # refused as long as anybody holds a view of it
            except BufferError:
                self._blocks.move_to_end(number)
                lent += 1
                continue
            del self._blocks[number]
            self._held -= size
        return True

    async def aclose(self) -> None:
        """Let reads in flight end, forget what is kept, close the source below.

        Cancellation: the source below may still be open; call again.
        """
        with self._lock:
            self._closing = True
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))
        with self._lock:
            self._blocks.clear()
            self._held = 0
        await self._source.aclose()


def _outcome(flight: _Flight) -> memoryview:
    if flight.task.cancelled():  # by the source below: we cancel it only when nobody waits
        raise SourceError("the read was cancelled by its source")
    return flight.task.result()


def _cut(views: list[memoryview], start: int, length: int) -> Buffer:
    """Give a stretch of views that follow one another; without a copy if it lies in one."""
    if len(views) == 1:
        return views[0].toreadonly()[start : start + length]
    pieces = []
    for view in views:
        if start < len(view) and length:
            piece = view[start : start + length]
            pieces.append(piece)
            length -= len(piece)
        start = max(start - len(view), 0)
    return pieces[0].toreadonly() if len(pieces) == 1 else b"".join(pieces)
