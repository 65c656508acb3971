"""Ranges of addresses, page arithmetic, and two collections keyed by address.

Knows: integers.
Must not know: what an address means, the kernel, the event loop.

Laws of this file:

* A Range is half-open: ``end`` is the first address behind it.
* RangeMap keeps disjoint ranges in order; setting over an old one cuts the old one.
* PageSet is a bitmap in chunks: however hostile the pattern, it costs at most one bit a page
  and a small object per 4,096 pages touched.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

PAGE_SIZE: Final = mmap.PAGESIZE

V = TypeVar("V")


def align_down(value: int, page_size: int = PAGE_SIZE) -> int:
    """Round down to a multiple of the page size, a power of two."""
    return value & -page_size


def align_up(value: int, page_size: int = PAGE_SIZE) -> int:
    """Round up to a multiple of the page size, a power of two."""
    return (value + page_size - 1) & -page_size


def is_aligned(value: int, page_size: int = PAGE_SIZE) -> bool:
    """Say whether a value is a multiple of the page size, a power of two."""
    return value & (page_size - 1) == 0


def is_power_of_two(value: int) -> bool:
    """Say whether a value is a power of two."""
    return value > 0 and value & (value - 1) == 0


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """``length`` bytes from ``start`` on."""

    start: int
    length: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.length < 0:
            raise ValueError(f"a range has no negative parts: {self.start}, {self.length}")

    @classmethod
    def between(cls, start: int, end: int) -> Range:
        """Make a range from its first address and the one behind its last."""
        return cls(start, end - start)

    @property
    def end(self) -> int:
        """The first address behind the range."""
        return self.start + self.length

    def __contains__(self, address: int) -> bool:
        return self.start <= address < self.start + self.length

    def __bool__(self) -> bool:
        return self.length > 0

    def overlaps(self, other: Range) -> bool:
        """Say whether the two have an address in common."""
        return max(self.start, other.start) < min(self.end, other.end)

    def intersection(self, other: Range) -> Range | None:
        """Give what the two have in common, or None."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return Range(start, end - start) if start < end else None

    def without(self, other: Range) -> list[Range]:
        """Give what is left without another range: none, one or two parts."""
        if not self.overlaps(other):
            return [self] if self else []
        parts = []
        if self.start < other.start:
            parts.append(Range.between(self.start, other.start))
        if other.end < self.end:
            parts.append(Range.between(other.end, self.end))
        return parts

    def moved(self, distance: int) -> Range:
        """Give the range ``distance`` bytes further up."""
        return Range(self.start + distance, self.length)

    def pages(self, page_size: int = PAGE_SIZE) -> range:
        """Give the address of every page that the range touches, in order."""
        return range(align_down(self.start, page_size), self.end, page_size)

    def pieces(self, size: int) -> Iterator[Range]:
        """Cut into parts of at most ``size`` bytes, in order."""
        for start in range(self.start, self.end, size):
            yield Range(start, min(size, self.end - start))

    def __str__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x})"


class RangeMap(Generic[V]):
    """Disjoint ranges in order, each with a value.

    Looking up costs one bisection; setting and cutting cost that and a move of the list's tail.

    Sharing: one thread.
    """

    __slots__ = ("_ends", "_starts", "_values")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._values: list[V] = []

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[Range, V]]:
        for start, end, value in zip(self._starts, self._ends, self._values, strict=True):
            yield Range(start, end - start), value

    def find(self, address: int) -> tuple[int, int, V] | None:
        """Give (start, end, value) of the range that holds an address, or None."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and address < self._ends[index]:
            return self._starts[index], self._ends[index], self._values[index]
        return None

    def get(self, address: int) -> tuple[Range, V] | None:
        """Give the range that holds an address and its value, or None."""
        found = self.find(address)
        return (Range.between(found[0], found[1]), found[2]) if found else None

    def overlapping(self, where: Range) -> list[tuple[Range, V]]:
        """Give what lies in a range, clipped to it, in order."""
        result = []
        index = bisect_right(self._ends, where.start)
        while index < len(self._starts) and self._starts[index] < where.end:
            start = max(self._starts[index], where.start)
            end = min(self._ends[index], where.end)
            if start < end:  # an empty ``where`` overlaps nothing
                result.append((Range(start, end - start), self._values[index]))
            index += 1
        return result

    def cut(self, where: Range) -> list[tuple[Range, V]]:
        """Take out what lies in a range; what reaches beyond it is split and stays.

        Returns:
            What was taken out, clipped, in order.
        """
        taken = self.overlapping(where)
        if not taken:
            return taken
        first = bisect_right(self._ends, where.start)
        last = bisect_left(self._starts, where.end)
        kept: list[tuple[int, int, V]] = []
        if self._starts[first] < where.start:
            kept.append((self._starts[first], where.start, self._values[first]))
        if self._ends[last - 1] > where.end:
            kept.append((where.end, self._ends[last - 1], self._values[last - 1]))
        self._starts[first:last] = [start for start, _, _ in kept]
        self._ends[first:last] = [end for _, end, _ in kept]
        self._values[first:last] = [value for _, _, value in kept]
        return taken

    def set(self, where: Range, value: V) -> list[tuple[Range, V]]:
        """Give a range a value, taking out what was there.

        Returns:
            What was taken out, clipped, in order.
        """
        if not where:
            return []
        taken = self.cut(where)
        index = bisect_left(self._starts, where.start)
        self._starts.insert(index, where.start)
        self._ends.insert(index, where.end)
        self._values.insert(index, value)
        return taken

    def replace_values(self, change: Callable[[V], V]) -> None:
        """Put another value in each value's place."""
        self._values = [change(value) for value in self._values]

    def before(self, address: int) -> tuple[Range, V] | None:
        """Give the last range that ends at or before an address, or None."""
        index = bisect_right(self._ends, address) - 1
        if index < 0:
            return None
        return Range.between(self._starts[index], self._ends[index]), self._values[index]

    def copy(self) -> RangeMap[V]:
        """Give an independent map of the same values."""
        other: RangeMap[V] = RangeMap()
        other._starts = self._starts.copy()
        other._ends = self._ends.copy()
        other._values = self._values.copy()
        return other


CHUNK_PAGES: Final = 4096  #: pages whose bits a PageSet keeps in one integer
_CHUNK_BYTES: Final = CHUNK_PAGES * PAGE_SIZE
_FULL: Final = (1 << CHUNK_PAGES) - 1


class PageSet:
    """A set of pages by address: integers as bitmaps, one per 4,096 pages.

    Ranges must be aligned to PAGE_SIZE; huge pages are simply many of those.

    Sharing: one thread.
    """

    __slots__ = ("_chunks",)

    def __init__(self) -> None:
        self._chunks: dict[int, int] = {}

    @staticmethod
    def _touched(where: Range) -> range:
        """Give the numbers of the chunks that a range touches."""
        if not (is_aligned(where.start) and is_aligned(where.length)):
            raise ValueError(f"{where} is not aligned to pages of {PAGE_SIZE} bytes")
        if not where:
            return range(0)
        return range(where.start // _CHUNK_BYTES, (where.end - 1) // _CHUNK_BYTES + 1)

    def _held(self, where: Range) -> list[int]:
        """Give the numbers of the chunks that a range touches and that have pages, in order.

        An event may name half of the address space: it costs no more than what is held.
        """
        chunks, touched = self._chunks, self._touched(where)
        if len(touched) <= len(chunks):
            return [chunk for chunk in touched if chunk in chunks]
        return sorted(chunk for chunk in chunks if chunk in touched)

    @staticmethod
    def _mask(where: Range, chunk: int) -> int:
        """Give the bits of a range's pages in a chunk that it touches."""
        base = chunk * CHUNK_PAGES
        low = max(where.start // PAGE_SIZE - base, 0)
        high = min(where.end // PAGE_SIZE - base, CHUNK_PAGES)
        if low == 0 and high == CHUNK_PAGES:
            return _FULL  # one integer shared among full chunks
        return (1 << high) - (1 << low)

    def add(self, where: Range) -> None:
        """Put the pages of a range in."""
        chunks = self._chunks
        for chunk in self._touched(where):
            merged = chunks.get(chunk, 0) | self._mask(where, chunk)
            chunks[chunk] = _FULL if merged == _FULL else merged

    def discard(self, where: Range) -> None:
        """Take the pages of a range out."""
        chunks = self._chunks
        for chunk in self._held(where):
            bits = chunks[chunk] & ~self._mask(where, chunk)
            if bits:
                chunks[chunk] = bits
            else:
                del chunks[chunk]

    def __contains__(self, address: int) -> bool:
        bits = self._chunks.get(address // _CHUNK_BYTES)
        return bits is not None and bool(bits >> (address % _CHUNK_BYTES // PAGE_SIZE) & 1)

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def __len__(self) -> int:
        """Count the pages."""
        return sum(bits.bit_count() for bits in self._chunks.values())

    def overlaps(self, where: Range) -> bool:
        """Say whether any page of a range is in the set."""
        chunks = self._chunks
        return any(chunks[chunk] & self._mask(where, chunk) for chunk in self._held(where))

    def runs(self, where: Range) -> Iterator[Range]:
        """Give the runs of pages of a range that are in the set, in order."""
        return self._walk(where, inside=True)

    def gaps(self, where: Range) -> Iterator[Range]:
        """Give the runs of pages of a range that are not in the set, in order."""
        return self._walk(where, inside=False)

    def _walk(self, where: Range, *, inside: bool) -> Iterator[Range]:
        start: int | None = None  # of the run that is still growing
        end = where.start
        for chunk in self._held(where) if inside else self._touched(where):
            bits = self._chunks.get(chunk, 0)
            bits = (bits if inside else ~bits) & self._mask(where, chunk)
            base = chunk * _CHUNK_BYTES
            while bits:
                low = (bits & -bits).bit_length() - 1
                shifted = bits >> low
                count = (~shifted & (shifted + 1)).bit_length() - 1
                bits &= ~(((1 << count) - 1) << low)
                run_start = base + low * PAGE_SIZE
                if start is not None and run_start != end:
                    yield Range(start, end - start)
                    start = None
                if start is None:
                    start = run_start
                end = run_start + count * PAGE_SIZE
        if start is not None:
            yield Range(start, end - start)

    def move(self, where: Range, to: int) -> None:
        """Carry the pages of a range over to ``to``, where they replace what was there."""
        target = Range(to, where.length)
        self._touched(target)  # is aligned, or nothing is done
        carried = [run.moved(to - where.start) for run in self.runs(where)]
        self.discard(where)
        self.discard(target)
        for run in carried:
            self.add(run)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Give the set as it is kept: (number, bitmap) of each stretch of CHUNK_PAGES pages."""
        return iter(self._chunks.items())

    def bits(self, number: int) -> int:
        """Give the bitmap of one chunk; see ``chunks``."""
        return self._chunks.get(number, 0)

    def add_chunk(self, number: int, bits: int) -> None:
        """Put the pages of one chunk in; see ``chunks``."""
        if not 0 < bits <= _FULL:
            raise ValueError(f"a chunk is a bitmap of 1 to {CHUNK_PAGES} bits")
        merged = self._chunks.get(number, 0) | bits
        self._chunks[number] = _FULL if merged == _FULL else merged

    def copy(self) -> PageSet:
        """Give an independent set of the same pages."""
        other = PageSet()
        other._chunks = self._chunks.copy()
        return other
