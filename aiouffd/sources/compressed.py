"""A source over a seekable zstd image, of which a read decompresses only the frames it needs.

Knows: frames, their places from the seek table, which of them were decompressed lately.
Must not know: where the compressed bytes come from; another source has them.

Laws of this file:

* Never wrong bytes: a frame is the size and has the checksum that the table says, or whoever
  wants it gets a SourceError that names it, and nobody else does.
* One flight at a time per frame: who wants it meanwhile waits for it.  It belongs to nobody:
  cancelling one of those who wait does not cancel the others, cancelling the last of them does.
* The loop is not held: more than INLINE_BYTES are decompressed in a thread, which does not hold
  the GIL meanwhile.  Less is done at once, for a thread would take longer to wake.
* What holds no data, as the image's own note says, is zeros without a look into the frame.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Self, TypeAlias

from ..errors import ClosedError, SourceError
from . import Source, check_read
from .buffer_pool import BufferPool
from .compressed_layout import Layout, read_layout
from .decompressing import in_thread
from .reads import ReadsUnderWay
from .zstd_marks import is_compressed

__all__ = ["CompressedSource", "is_compressed"]

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Decompressed on the loop at most, in bytes: some 200 us at 32 KiB a frame.
INLINE_BYTES: Final = 128 << 10
#: Decompressed frames that are kept, in bytes; there is always room for one.
CACHE_BYTES: Final = 512 << 10
#: One thread decompresses so much, then gives it back.
RUN_BYTES: Final = 2 << 20

#: What a frame gave.
_Outcome: TypeAlias = "bytes | SourceError"

#: For all images of this process: what is decompressed in threads, in order, is given as it is.
_WHOLE: Final = BufferPool(RUN_BYTES, 4)


class _Landed:
    """What a run of frames gave: frame by frame, or all in one piece."""

    __slots__ = ("outcomes", "whole")

    def __init__(self, outcomes: dict[int, _Outcome], whole: memoryview | None = None) -> None:
        self.outcomes = outcomes  # of all frames; if there is a whole, of the corrupt ones
        self.whole = whole


class _Flight:
    """A run of frames that is being brought, for any number of waiters."""

    __slots__ = ("run", "task", "waiters")

    def __init__(self, run: range, task: asyncio.Task[_Landed]) -> None:
        self.run = run
        self.task = task
        self.waiters = 0


class CompressedSource:
    """The content of a seekable zstd image.

    Sharing: ``read`` on one loop, ``read_nowait`` in any thread.
    """

    @classmethod
    async def open(cls, source: Source, *, cache_bytes: int = CACHE_BYTES) -> Self:
        """Read the seek table of an image.

        Args:
            source: The compressed image; closed with this source, but not if opening fails.
            cache_bytes: How much of what was decompressed to keep, in bytes.

        Raises:
            SourceError: This is no seekable zstd file, or its table is wrong.
            ImportError: The zstd library is missing; the message says how to get it.
        """
        return cls(source, await read_layout(source), cache_bytes=cache_bytes)

    def __init__(self, source: Source, layout: Layout, *, cache_bytes: int = CACHE_BYTES) -> None:
        """Hold an image whose layout has been read; ``open`` does both."""
        from .zstd_frames import ZstdError, decompress  # here: asking is_compressed needs none

        self._decompress = decompress
        self._zstd_error = ZstdError
        self.layout = layout
        self.table = table = layout.table
        self.identity = layout.identity
        self._source = source
        self._size = table.size
        self._extents = layout.extents
        self._holes = not self._extents.cover(table.size)
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()  # over the two that follow
        self._cached: OrderedDict[int, bytes] = OrderedDict()
        self._held = 0
        self._flights: dict[int, _Flight] = {}  # by frame
        self._tasks: set[asyncio.Task[_Landed]] = set()
        self._reads = ReadsUnderWay("this source")  # into buffers; others are flights
        self._closing = False

    @property
    def size(self) -> int:
        """Length of the content, in bytes."""
        return self._size

    @property
    def stored_size(self) -> int:
        """Length of the compressed image, in bytes."""
        return self._source.size

    @property
    def holes_known(self) -> bool:
        """Whether the image has a note of them; those that other tools packed have none."""
        return self.layout.note is not None

    def extents(self) -> Iterator[tuple[int, int]]:
        """Give the extents that the image was packed with; all of it, if it has no note."""
        return iter(self._extents)

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """Give what was decompressed lately, or decompress a little whose bytes are at hand.

        Raises:
            SourceError: A frame is corrupt, or the source below failed.
            ClosedError: The source is closed.
        """
        if self._closing:
            raise ClosedError("this source is closed")
        check_read(offset, length, self._size)
        if self._holes and not self._extents.holds(offset, length):
            return bytes(length)
        starts = self.table.starts
        first = self.table.frame_at(offset)
        if offset + length <= starts[first + 1]:  # most often: within one frame
            frame = self._frame_nowait(first)
            if frame is None:
                return None
            start = offset - starts[first]
            return frame[start : start + length]
        last = self.table.frame_at(offset + length - 1)
        if not self._is_little(first, last):
            return None
        frames: list[bytes | memoryview] = []
        for number in range(first, last + 1):
            frame = self._frame_nowait(number)
            if frame is None:
                return None
            frames.append(frame)
        return _cut(frames, offset - starts[first], length)

    async def read(self, offset: int, length: int) -> Buffer:
        """Give bytes; decompress the frames that are missing.

        Raises:
            SourceError: A frame is corrupt, or the source below failed.
            ClosedError: The source is closed.

        Cancellation: nothing is left behind; others who wait for the same frames get them.
        """
        at_hand = self.read_nowait(offset, length)
        if at_hand is not None:
            return at_hand
        first = self.table.frame_at(offset)
        last = self.table.frame_at(offset + length - 1)
        parts, start = await self._bring(first, last)
        skip = offset - start
        if len(parts) > 1 and length > RUN_BYTES:
            return await in_thread(_cut, parts, skip, length)
        return _cut(parts, skip, length)

    async def readinto(self, offset: int, buffer: memoryview) -> None:
        """Decompress into a buffer of the caller's, in a thread: what is much is copied once.

        Others do not wait for the frames of such a read; who wants one decompresses it.

        Raises:
            SourceError: A frame is corrupt, or the source below failed.
            ClosedError: The source is closed.

        Cancellation: the buffer is written to for a while; do not use it again.
        """
        if self._closing:
            raise ClosedError("this source is closed")
        check_read(offset, len(buffer), self._size)
        starts = self.table.starts
        at, end = offset, offset + len(buffer)
        with self._reads:
            while at < end:
                first, last = self.table.frame_at(at), self.table.frame_at(end - 1)
                if starts[last + 1] - starts[first] > RUN_BYTES:
                    last = max(first, self.table.frame_at(starts[first] + RUN_BYTES) - 1)
                stop = min(end, starts[last + 1])
                await self._unpack_run_into(first, last, at, buffer[at - offset : stop - offset])
                at = stop

    async def _unpack_run_into(
        self, first: int, last: int, offset: int, buffer: memoryview
    ) -> None:
        if self._holes and not self._extents.holds(offset, len(buffer)):
            buffer[:] = bytes(len(buffer))
            return
        place, end = self._place(first, last)

        def at_hand() -> bool:  # reading what is at hand is work as well, and may be done anywhere
            packed = self._source.read_nowait(place, end - place)
            if packed is not None:
                self._unpack_into(range(first, last + 1), packed, offset, buffer)
            return packed is not None

        if not await in_thread(at_hand):
            packed = await self._source.read(place, end - place)
            await in_thread(self._unpack_into, range(first, last + 1), packed, offset, buffer)

    def _unpack_into(self, run: range, packed: Buffer, offset: int, buffer: memoryview) -> None:
        """Put the stretch of some frames that a buffer asks for into it; in any thread."""
        starts = self.table.starts
        untouched = self._is_untouched(run[0], run[-1])
        for number, frame in self._packed_frames(run, memoryview(packed).cast("B")):
            content: _Outcome | None = None if untouched else self._frame_at_hand(number)
            if content is None:
                content = self._unpack(number, frame)
            if isinstance(content, SourceError):
                raise content
            at = starts[number] - offset
            if at < 0 or at + len(content) > len(buffer):
                skip = max(-at, 0)
                content, at = content[skip : len(buffer) - at], at + skip
            buffer[at : at + len(content)] = content

    async def aclose(self) -> None:
        """Wait for what is being decompressed, then close the source below.

        Cancellation: the source below stays open; call again.
        """
        self._closing = True
        await self._reads.end()
        while self._tasks:
            await asyncio.wait(self._tasks)
        with self._lock:
            self._cached.clear()
            self._held = 0
        await self._source.aclose()

    # --- one frame -------------------------------------------------------------------------

    def _is_little(self, first: int, last: int) -> bool:
        """Say whether some frames may be decompressed on the loop."""
        starts = self.table.starts
        return starts[last + 1] - starts[first] <= INLINE_BYTES

    def _frame_at_hand(self, number: int) -> bytes | None:
        """Give a frame that is decompressed already, or holds no data."""
        with self._lock:
            frame = self._cached.get(number)
            if frame is not None:
                self._cached.move_to_end(number)
                return frame
        start, end = self.table.starts[number], self.table.starts[number + 1]
        if start == end or (self._holes and not self._extents.holds(start, end - start)):
            return bytes(end - start)
        return None

    def _frame_nowait(self, number: int) -> bytes | None:
        frame = self._frame_at_hand(number)
        if frame is not None or not self._is_little(number, number):
            return frame
        offset, end = self._place(number, number)
        packed = self._source.read_nowait(offset, end - offset)
        if packed is None:
            return None
        outcome = self._unpack(number, memoryview(packed).cast("B"))
        if isinstance(outcome, SourceError):
            raise outcome
        self._keep(number, outcome)
        return outcome

    def _place(self, first: int, last: int) -> tuple[int, int]:
        """Say where frames lie in the compressed image.

        Raises:
            SourceError: They are longer there than any way to compress their content makes them.
        """
        table = self.table
        offset, end = table.offsets[first], table.offsets[last + 1]
        content = table.starts[last + 1] - table.starts[first]
        # zstd's own bound is lower; this one keeps a hostile table from asking for the whole file.
        if end - offset > 2 * content + 4096 * (last + 1 - first):
            raise SourceError(
                f"frames {first} to {last} of the image are {end - offset} bytes for {content}:"
                " its seek table is wrong"
            )
        return offset, end

    def _unpack(self, number: int, packed: memoryview) -> _Outcome:
        """Decompress one frame; in any thread."""
        table = self.table
        start, end = table.starts[number], table.starts[number + 1]
        if start == end:
            return b""
        checksum = None if table.checksums is None else table.checksums[number]
        try:
            return self._decompress(packed, end - start, checksum)
        except self._zstd_error as error:
            return SourceError(
                f"frame {number} of the image is corrupt (its bytes {start} to {end}, compressed"
                f" {table.offsets[number]} to {table.offsets[number + 1]}): {error}"
            )

    def _keep(self, number: int, frame: bytes) -> None:
        with self._lock:
            if self._closing or number in self._cached:
                return
            self._cached[number] = frame
            self._held += len(frame)
            while self._held > self._cache_bytes and len(self._cached) > 1:
                self._held -= len(self._cached.popitem(last=False)[1])

    # --- many ------------------------------------------------------------------------------

    async def _bring(self, first: int, last: int) -> tuple[list[bytes | memoryview], int]:
        """Collect frames: those at hand, those in flight, and the rest in new flights.

        Returns:
            Parts of the content without a gap, and the offset at which they begin.
        """
        found: dict[int, bytes] = {}
        joined: dict[int, _Flight] = {}
        if self._is_untouched(first, last):
            missing = list(range(first, last + 1))
        else:
            missing = []
            for number in range(first, last + 1):
                frame = self._frame_at_hand(number)
                if frame is not None:
                    found[number] = frame
                elif number in self._flights:
                    joined[number] = self._flights[number]
                else:
                    missing.append(number)
        for run in self._runs(missing):
            joined.update(dict.fromkeys(run, self._start(run)))
        flights = set(joined.values())
        await self._wait(flights)
        starts = self.table.starts
        if len(flights) == 1 and not found:
            flight = flights.pop()
            landed = flight.task.result()
            if landed.whole is not None and not landed.outcomes:
                return [landed.whole], starts[flight.run[0]]
        parts = [
            found[number] if number in found else self._part(joined[number], number)
            for number in range(first, last + 1)
        ]
        return parts, starts[first]

    def _is_untouched(self, first: int, last: int) -> bool:
        """Say whether all of these frames hold data that nobody has brought or brings."""
        starts = self.table.starts
        with self._lock:
            if any(first <= number <= last for number in self._cached):
                return False
        around = self._extents.around(starts[first])
        return not self._flights and around is not None and around[1] >= starts[last + 1]

    def _part(self, flight: _Flight, number: int) -> bytes | memoryview:
        """Give one frame of a flight that has landed."""
        landed = flight.task.result()
        outcome = landed.outcomes.get(number)
        if isinstance(outcome, SourceError):
            raise outcome
        if outcome is not None:
            return outcome
        starts = self.table.starts
        base = starts[flight.run[0]]
        return memoryview(landed.whole or b"")[starts[number] - base : starts[number + 1] - base]

    async def _wait(self, flights: set[_Flight]) -> None:
        """Wait for flights as one of their waiters."""
        if not flights:
            return
        for flight in flights:
            flight.waiters += 1
        try:
            await asyncio.wait([flight.task for flight in flights])
        finally:
            for flight in flights:
                flight.waiters -= 1
                if not flight.waiters and not flight.task.done():
                    self._forget(flight)
                    flight.task.cancel()

    def _runs(self, numbers: list[int]) -> Iterator[range]:
        """Cut frames into neighbours of RUN_BYTES at most; one that is larger stands alone."""
        starts = self.table.starts
        begin = 0
        for at in range(1, len(numbers) + 1):
            if (
                at == len(numbers)
                or numbers[at] != numbers[at - 1] + 1
                or starts[numbers[at] + 1] - starts[numbers[begin]] > RUN_BYTES
            ):
                yield range(numbers[begin], numbers[at - 1] + 1)
                begin = at

    def _start(self, run: range) -> _Flight:
        """Begin to bring a run of frames."""
        task = asyncio.get_running_loop().create_task(self._fly(run))
        flight = _Flight(run, task)
        self._flights.update(dict.fromkeys(run, flight))
        self._tasks.add(task)

        def land(done: asyncio.Task[_Landed]) -> None:
            self._tasks.discard(done)
            self._forget(flight)
            if not done.cancelled():
                done.exception()  # whoever waited has it; nobody may be left

        task.add_done_callback(land)
        return flight

    def _forget(self, flight: _Flight) -> None:
        for number in flight.run:
            if self._flights.get(number) is flight:
                del self._flights[number]

    async def _fly(self, run: range) -> _Landed:
        """Read and decompress neighbours; what is little is kept."""
        first, last = run[0], run[-1]
        offset, end = self._place(first, last)
        packed = self._source.read_nowait(offset, end - offset)
        if packed is None:
            packed = await self._source.read(offset, end - offset)
        view = memoryview(packed).cast("B")
        if self._is_little(first, last):
            landed = _Landed(self._unpack_each(run, view))
        elif first == last:
            landed = _Landed(await in_thread(self._unpack_each, run, view))
        else:
            return await in_thread(self._unpack_whole, run, view)
        for number, outcome in landed.outcomes.items():
            if not isinstance(outcome, SourceError):
                self._keep(number, outcome)
        return landed

    def _packed_frames(self, run: range, packed: memoryview) -> Iterator[tuple[int, memoryview]]:
        offsets = self.table.offsets
        base = offsets[run[0]]
        for number in run:
            yield number, packed[offsets[number] - base : offsets[number + 1] - base]

    def _unpack_each(self, run: range, packed: memoryview) -> dict[int, _Outcome]:
        return {
            number: self._unpack(number, frame)
            for number, frame in self._packed_frames(run, packed)
        }

    def _unpack_whole(self, run: range, packed: memoryview) -> _Landed:
        """Decompress neighbours into one piece: each is copied while it is in the CPU's cache."""
        starts = self.table.starts
        whole = _WHOLE.take(starts[run[-1] + 1] - starts[run[0]])
        corrupt: dict[int, _Outcome] = {}
        at = 0
        for number, frame in self._packed_frames(run, packed):
            outcome = self._unpack(number, frame)
            if isinstance(outcome, SourceError):
                corrupt[number] = outcome
            else:
                whole[at : at + len(outcome)] = outcome
            at += starts[number + 1] - starts[number]
        return _Landed(corrupt, whole.toreadonly())


def _cut(parts: list[bytes | memoryview], skip: int, length: int) -> bytes | memoryview:
    """Take a stretch of parts, joined if there are several."""
    if len(parts) == 1:
        return parts[0][skip : skip + length]
    over = sum(map(len, parts)) - skip - length
    cut = list(parts)
    if skip:
        cut[0] = memoryview(parts[0])[skip:]
    if over:
        cut[-1] = memoryview(parts[-1])[: len(parts[-1]) - over]
    return b"".join(cut)
