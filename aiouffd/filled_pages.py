"""Which pages of a region have been filled: one bit each, in memory that outlives this process.

Knows: bits, and the place in the source that each stands for.
Must not know: who fills, where the memory comes from.

A bit is set after its page's fill has succeeded, so that a crash in between repeats a fill at
worst: the kernel says that the page is there.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Final

from .ranges import Range, align_down, align_up

_BITS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
_WINDOW: Final = 1024  # pages that are looked at together


class FilledPages:
    """The bits of one region.

    A place in the source belongs to memory, not to an address: moves change nothing here.

    Sharing: one writer.
    """

    __slots__ = ("_at", "_count", "_end", "_first", "_memory", "_offset", "_page_size", "_shift")

    def __init__(
        self,
        memory: mmap.mmap | bytearray,
        at: int,
        offset: int,
        length: int,
        page_size: int,
    ) -> None:
        """Look at bits that are there already.

        Args:
            memory: That holds them.
            at: Where in it they begin, in bytes.
            offset: Where the region begins in its source, in bytes.
            length: Of the region, in bytes.
            page_size: Of its memory, in bytes.
        """
        self._memory = memory
        self._at = at
        self._offset = offset
        self._page_size = page_size
        self._shift = page_size.bit_length() - 1
        self._count = length >> self._shift
        self._first = 8 * at  # its bits, by number in the memory
        self._end = 8 * at + self._count

    @classmethod
    def none_yet(cls, offset: int, length: int, page_size: int) -> FilledPages:
        """Give bits of their own to a region of which nothing was filled yet."""
        memory = bytearray(cls.bytes_for(length, page_size))
        return cls(memory, 0, offset, length, page_size)

    @staticmethod
    def bytes_for(length: int, page_size: int) -> int:
        """Say how many bytes the bits of a region take."""
        return (length // page_size + 7) // 8

    def add(self, offset: int) -> None:
        """Note that the page at an offset was filled; one behind the region has no bit."""
        bit = ((offset - self._offset) >> self._shift) + self._first
        if self._first <= bit < self._end:
            memory, at = self._memory, bit >> 3
            memory[at] = memory[at] | _BITS[bit & 7]

    def add_range(self, offset: int, length: int) -> None:
        """Note that whole pages from an offset on were filled."""
        first = max((offset - self._offset) >> self._shift, 0)
        end = min((offset + length - self._offset) >> self._shift, self._count)
        memory, at = self._memory, self._at
        low, high = align_up(first, 8), align_down(end, 8)
        if low < high:
            memory[at + (low >> 3) : at + (high >> 3)] = b"\xff" * ((high - low) >> 3)
        else:
            low = high = end
        for page in (*range(first, min(low, end)), *range(max(high, first), end)):
            memory[at + (page >> 3)] |= 1 << (page & 7)

    def __contains__(self, offset: int) -> bool:
        page = (offset - self._offset) >> self._shift
        return 0 <= page < self._count and bool(
            self._memory[self._at + (page >> 3)] >> (page & 7) & 1
        )

    def __len__(self) -> int:
        """Count the pages."""
        return int.from_bytes(self._bytes(), "little").bit_count()

    def __bool__(self) -> bool:
        return any(self._bytes())

    def _bytes(self) -> bytes:
        at, size = self._at, self._page_size
        return bytes(self._memory[at : at + self.bytes_for(self._count * size, size)])

    def gaps(self, where: Range) -> Iterator[Range]:
        """Give the runs of pages in a range of offsets that were not filled, in order.

        What is filled meanwhile may be left out.
        """
        shift = self._shift
        first = (where.start - self._offset) >> shift
        end = -((self._offset - where.end) >> shift)
        start: int | None = None  # of a run that may go on
        for low in range(first, end, _WINDOW):
            high = min(low + _WINDOW, end)
            missing = ~self._window(low, high) & ((1 << (high - low)) - 1)
            at = low
            while missing:
                filled = (missing & -missing).bit_length() - 1
                if start is not None and filled:
                    yield self._pages(start, at)
                    start = None
                at += filled
                if start is None:
                    start = at
                missing >>= filled
                run = (~missing & (missing + 1)).bit_length() - 1
                missing >>= run
                at += run
                if at < high:
                    yield self._pages(start, at)
                    start = None
            if start is not None and at < high:
                yield self._pages(start, at)
                start = None
        if start is not None:
            yield self._pages(start, end)

    def _window(self, first: int, end: int) -> int:
        """Give the bits of some pages as one number; what lies outside has none."""
        low, high = max(first, 0), min(end, self._count)
        if low >= high:
            return 0
        at = self._at
        bits = int.from_bytes(self._memory[at + (low >> 3) : at + ((high + 7) >> 3)], "little")
        return (bits >> (low & 7) & ((1 << (high - low)) - 1)) << (low - first)

    def _pages(self, first: int, end: int) -> Range:
        shift, offset = self._shift, self._offset
        return Range.between(offset + (first << shift), offset + (end << shift))

    def covers(self, offset: int, length: int) -> bool:
        """Whether all pages of a stretch of offsets were filled; in one look, however many."""
        return self._look(offset, length) == 0

    def has_none(self, offset: int, length: int) -> bool:
        """Whether no page of a stretch of offsets was filled; in one look, however many."""
        return self._look(offset, length) == 1

    def _look(self, offset: int, length: int) -> int:
        """Give 0 if all pages of a stretch were filled, 1 if none was, 2 if it is neither."""
        first = (offset - self._offset) >> self._shift
        end = -((self._offset - offset - length) >> self._shift)
        if not 0 <= first < end <= self._count:
            return 2
        at, mask = self._at, (1 << (end - first)) - 1
        window = int.from_bytes(self._memory[at + (first >> 3) : at + ((end + 7) >> 3)], "little")
        window = window >> (first & 7) & mask
        return 0 if window == mask else 2 if window else 1

    def frozen(self) -> FilledPages:
        """Give the bits as they are now, which later fills do not change."""
        size = self._page_size
        memory = bytearray(self._bytes())
        return FilledPages(memory, 0, self._offset, self._count * size, size)
