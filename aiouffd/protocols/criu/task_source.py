"""The lazily servable memory of one task of a checkpoint, as a source.

Knows: where pages lie, files of pages, a reader of pages that lie nowhere else.
Must not know: page faults, what the images look like.

Its offsets are those of ``TaskMemory``: the registered mappings, end to end.  What may be served
lazily is what its extents say; all else reads as zeros.

Laws of this file:

* A read that lies in one run is one read of its file, without a copy.
* A long read is one read per file and neighbourhood, however many runs it spans: what little
  lies between them is read along and thrown away.
* The sources of the files belong to who opened them, and stay open.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias, runtime_checkable

from ...errors import SourceError
from ...ranges import PAGE_SIZE, align_down, align_up
from ...sources import ReadsInto, ReadsIntoNowait, Source, check_read, identity_of
from ...sources.reads import ReadsUnderWay, all_of
from .task_memory import LIVE, TaskMemory

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Bytes between two runs of a file that are cheaper to read than to leave out.
READ_THROUGH: Final = 64 << 10


class PageReader(Protocol):
    """Who has the pages that lie in no file: the client of a page server."""

    async def read_pages(self, pid: int, address: int, pages: int) -> Buffer:
        """Give pages that may be served lazily.

        Args:
            pid: Of the task, as the checkpoint has it.
            address: Of the first page.
            pages: How many; all of one run.

        Returns:
            Their bytes, all of them.

        Raises:
            SourceError: They cannot be had.

        Cancellation: nothing is left behind.
        """


@runtime_checkable
class ReadsPagesInto(Protocol):
    """What a reader of pages may have besides: long reads into buffers of the caller's."""

    async def read_pages_into(self, pid: int, address: int, buffer: memoryview) -> None:
        """Read as ``PageReader.read_pages``, as many pages as the buffer has room for.

        Nobody waits for them at a fault: what is asked for by ``read_pages`` goes before.

        Raises:
            SourceError: They cannot be had.

        Cancellation: the buffer may be written to for a while; do not use it again.
        """


#: What of a read lies in one run: its offsets in the source, and the place of its first byte.
_Piece: TypeAlias = tuple[int, int, int]


@dataclass(slots=True)
class _Span:
    """Pieces that are read together, from one place of a file to another, in ascending order."""

    file: int
    place: int
    end: int
    pieces: list[_Piece]

    @property
    def length(self) -> int:
        return self.end - self.place


class TaskSource:
    """The memory of one task that a lazy restore leaves out.

    Attributes:
        memory: Where it lies.

    Sharing: as the sources of its files.
    """

    #: Pages that were not dumped read as zeros in the task, and are left out.
    holes_known: Final = True

    def __init__(
        self, memory: TaskMemory, files: Sequence[Source], reader: PageReader | None = None
    ) -> None:
        """Put files under a task's memory; ``Checkpoint.source`` does it all.

        Args:
            memory: Whose, and where it lies.
            files: The sources of ``memory.files``; they stay the caller's.
            reader: Who has the pages that lie in no file.

        Raises:
            SourceError: A file is too short; or there are such pages, and there is no reader.
        """
        for file, source in zip(memory.files, files, strict=True):
            if source.size < file.length:
                raise SourceError(f"{file} has {source.size} bytes of {file.length}")
        if reader is None and memory.live_bytes:
            raise SourceError(
                f"process {memory.pid}: {memory.live_bytes} bytes of its memory are in no file:"
                " it was dumped with --lazy-pages, and only the page server of that dump has them"
            )
        self.memory = memory
        self._files = tuple(files)
        self._reader = reader
        self._starts = list(memory.lazy_starts)  # looked up twice as quickly as in an array
        self._ends = memory.lazy_ends
        self._owners, self._places = memory.lazy_files, memory.lazy_places
        self._size = memory.size
        self._reads = ReadsUnderWay(f"the memory of process {memory.pid}")
        self._identity: str | None = None

    @property
    def size(self) -> int:
        """Length of all registered mappings together, in bytes."""
        return self._size

    @property
    def identity(self) -> str:
        """A digest of what the checkpoint says of this task; "" if it could be another's, too."""
        if self._identity is None:
            names = [] if self.memory.unique else [identity_of(file) for file in self._files]
            known = self.memory.digest and all(names)
            self._identity = "-".join(["criu:" + self.memory.digest, *names]) if known else ""
        return self._identity

    def extents(self) -> Iterator[tuple[int, int]]:
        """Give what may be served lazily; neighbours that lie in different files are one."""
        low = high = 0
        for start, end in zip(self._starts, self._ends, strict=True):
            if start != high:
                if low < high:
                    yield low, high - low
                low = start
            high = end
        if low < high:
            yield low, high - low

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """Read what the files concerned have at hand."""
        if self._reads.closed:
            self._reads.check()
        if offset < 0 or length <= 0 or offset + length > self._size:
            check_read(offset, length, self._size)
        at = bisect_right(self._starts, offset) - 1
        if at >= 0 and offset + length <= self._ends[at]:  # a page, nearly always
            owner = self._owners[at]
            if owner < 0:
                return None
            place = self._places[at] + offset - self._starts[at]
            return self._files[owner].read_nowait(place, length)
        spans = self._spans(offset, length)
        if not spans:
            return bytes(length)
        whole = bytearray(length)
        for span in spans:
            if span.file < 0:
                return None
            data = self._files[span.file].read_nowait(span.place, span.length)
            if data is None:
                return None
            _scatter(span, memoryview(data).cast("B"), memoryview(whole), offset)
        return whole

    def readinto_nowait(self, offset: int, buffer: memoryview) -> bool:
        """Read what the file has at hand, of what lies in one run of one that can do that.

        Raises:
            SourceError: As ``read``.
            ClosedError: As ``read``.
        """
        self._reads.check()
        length = len(buffer)
        check_read(offset, length, self._size)
        at = bisect_right(self._starts, offset) - 1
        if at >= 0 and offset + length <= self._ends[at] and self._owners[at] >= 0:
            file = self._files[self._owners[at]]
            if isinstance(file, ReadsIntoNowait):
                return file.readinto_nowait(self._places[at] + offset - self._starts[at], buffer)
        data = self.read_nowait(offset, length)
        if data is None:
            return False
        buffer[:] = data
        return True

    async def read(self, offset: int, length: int) -> Buffer:
        """Read from every file concerned, from all places at once.

        Raises:
            SourceError: A file or the reader of pages failed; other reads are cancelled.
            ClosedError: The source is closed.

        Cancellation: the reads of the files are cancelled with it.
        """
        self._reads.check()
        check_read(offset, length, self._size)
        with self._reads:
            spans = self._spans(offset, length)
            if not spans:
                return bytes(length)
            if len(spans) == 1 and spans[0].pieces[0][:2] == (offset, offset + length):
                return await self._read_span(spans[0])
            whole = bytearray(length)
            await self._read_spans(spans, memoryview(whole), offset)
        return whole

    async def readinto(self, offset: int, buffer: memoryview) -> None:
        """Read into a buffer of the caller's; few and long reads, in threads.

        Raises:
            SourceError: As ``read``.
            ClosedError: As ``read``.

        Cancellation: the buffer may be written to for a while; do not use it again.
        """
        self._reads.check()
        length = len(buffer)
        check_read(offset, length, self._size)
        with self._reads:
            spans = self._spans(offset, length)
            if len(spans) == 1:
                (span,) = spans
                source = self._files[span.file] if span.file >= 0 else None
                if isinstance(source, ReadsInto) and _only_moves_up(span, offset, length):
                    await _read_in_place(source, span, buffer, offset)
                    return
            if isinstance(self._reader, ReadsPagesInto) and spans and all(map(_is_live, spans)):
                await self._read_live(self._reader, spans, buffer, offset)
                return
            buffer[:] = bytes(length)
            if spans:
                await self._read_spans(spans, buffer, offset)

    async def aclose(self) -> None:
        """Let reads in flight end; the files stay open.

        Cancellation: new reads stay refused; call again to wait.
        """
        await self._reads.end()

    def _spans(self, offset: int, length: int) -> list[_Span]:
        """Give what to read so that all runs of a stretch are in it, in few reads."""
        starts, ends, owners, places = self._starts, self._ends, self._owners, self._places
        spans: list[_Span] = []
        last: dict[int, _Span] = {}  # by file: its latest span
        behind = offset + length
        first = max(bisect_right(starts, offset) - 1, 0)
        for at in range(first, bisect_left(starts, behind, first)):
            low, high, file, place = starts[at], ends[at], owners[at], places[at]
            if low < offset:
                place += offset - low
                low = offset
            high = min(high, behind)
            if low >= high:
                continue
            span = last.get(file)
            if span is None or file == LIVE or not 0 <= place - span.end <= READ_THROUGH:
                span = last[file] = _Span(file, place, place, [])
                spans.append(span)
            span.pieces.append((low, high, place))
            span.end = place + high - low
        return spans

    async def _read_span(self, span: _Span) -> Buffer:
        if span.file != LIVE:
            return await self._files[span.file].read(span.place, span.length)
        if self._reader is None:
            raise SourceError(f"process {self.memory.pid}: there is no page server to ask")
        start = align_down(span.place)
        pages = (align_up(span.end) - start) // PAGE_SIZE
        data = memoryview(await self._reader.read_pages(self.memory.pid, start, pages)).cast("B")
        if len(data) != pages * PAGE_SIZE:
            raise SourceError(
                f"process {self.memory.pid}: {len(data)} bytes came for {pages} pages at {start:#x}"
            )
        return data[span.place - start : span.end - start]

    async def _read_live(
        self, reader: ReadsPagesInto, spans: list[_Span], buffer: memoryview, offset: int
    ) -> None:
        """Let pages be put where they belong, and zeros between them."""
        reads = []
        behind = 0
        for span in spans:
            ((low, high, place),) = span.pieces
            buffer[behind : low - offset] = bytes(low - offset - behind)
            behind = high - offset
            into = buffer[low - offset : behind]
            reads.append(reader.read_pages_into(self.memory.pid, place, into))
        buffer[behind:] = bytes(len(buffer) - behind)
        await all_of(reads)

    async def _read_spans(self, spans: list[_Span], target: memoryview, offset: int) -> None:
        """Read everything at once; the first error ends the other reads."""
        answers = await all_of([self._read_span(span) for span in spans])
        for span, data in zip(spans, answers, strict=True):
            _scatter(span, memoryview(data).cast("B"), target, offset)


def _is_live(span: _Span) -> bool:
    """Say whether a span is whole pages that only a page server has."""
    return span.file == LIVE and not span.place % PAGE_SIZE and not span.end % PAGE_SIZE


def _scatter(span: _Span, data: memoryview, target: memoryview, offset: int) -> None:
    """Copy every piece of a span from what was read to where it belongs."""
    for start, end, place in span.pieces:
        at = place - span.place
        target[start - offset : end - offset] = data[at : at + end - start]


def _only_moves_up(span: _Span, offset: int, length: int) -> bool:
    """Say whether a span, read to the front of a buffer, can be moved to its places from there."""
    return span.length <= length and all(
        start - offset >= place - span.place for start, _, place in span.pieces
    )


async def _read_in_place(source: ReadsInto, span: _Span, buffer: memoryview, offset: int) -> None:
    """Read a span to the front of a buffer, then move its pieces apart, from the last on."""
    await source.readinto(span.place, buffer[: span.length])
    behind = len(buffer)
    begin = span.place
    for start, end, place in reversed(span.pieces):
        low, high = start - offset, end - offset
        if high < behind:
            buffer[high:behind] = bytes(behind - high)
        if start - place != offset - begin:
            buffer[low:high] = buffer[place - begin : place - begin + end - start]
        behind = low
    if behind:
        buffer[:behind] = bytes(behind)
