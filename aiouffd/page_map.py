"""How a region's pages stand, counted in cells: what a picture of the memory is made of.

Knows: the pager's books of one region, what the target's page tables say.
Must not know: sessions, terminals, formats.

Laws of this file:

* Nothing is guessed.  Which pages are there only the kernel knows: it is asked (PAGEMAP_SCAN,
  Linux 6.7, in a thread), and where it may not be asked the answer is None.
* Every mapped page is counted once, in this order: there; in flight; removed; absent.  What
  the target has unmapped is counted nowhere.
* The books are read on the loop at one moment, the page tables a moment later: a picture for
  people, not a snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from .errors import NotSupported, ResolutionRefused
from .fds import OwnedFd
from .kernel import abi, pagemap
from .ranges import PageSet, Range
from .region import Region

#: In memory, or swapped out; a poisoned page counts as swapped out too.
_THERE: Final = abi.PAGE_IS_PRESENT | abi.PAGE_IS_SWAPPED


@dataclass(frozen=True, slots=True)
class PageMap:
    """Counts of pages, one per cell; cell n begins ``n * cell_bytes`` behind the region's start.

    Attributes:
        cell_bytes: How much memory a cell stands for; the last one may be shorter.
        filled: Pages that are there; None if the kernel does not tell.
        in_flight: Pages that are being brought.
        removed: Pages that the target gave back and has not touched since.
        absent: Pages that nobody has asked for; None if ``filled`` is.
    """

    cell_bytes: int
    filled: list[int] | None
    in_flight: list[int]
    removed: list[int]
    absent: list[int] | None


@dataclass(frozen=True, slots=True)
class Books:
    """What the pager knows of a region at one moment.

    Attributes:
        length: Of the region, in bytes.
        page_size: Of its memory, in bytes.
        places: Where its memory lies now, each with its distance from the region's start.
        removed: Removed pages, of these places and others.
        in_flight: Addresses of pages in flight, of these places.
    """

    length: int
    page_size: int
    places: list[tuple[Range, int]]
    removed: PageSet
    in_flight: list[int]


def books_of(region: Region) -> Books:
    """Note what the pager knows of a region.

    Sharing: the loop's thread; what it gives may go to another.
    """
    space = region._pager.space
    places = [(where, offset - region.offset) for where, offset in region.ranges]
    return Books(
        region.length,
        region.page_size,
        places,
        space.removed.copy(),
        [page for page in space.in_flight if any(page in where for where, _ in places)],
    )


def open_pages(pid: int) -> OwnedFd | None:
    """Open the page tables of a process.

    Returns:
        A descriptor for ``draw``, or None if this user may not look.
    """
    try:
        return OwnedFd(pagemap.open_pagemap(pid))
    except (NotSupported, OSError):
        return None


def draw(books: Books, fd: OwnedFd | None, cells: int) -> PageMap:
    """Count the pages of a region in cells.

    Kernel: PAGEMAP_SCAN, since Linux 6.7.

    Args:
        books: From ``books_of``.
        fd: From ``open_pages``.
        cells: At most so many.

    Sharing: any thread; it may take milliseconds per gigabyte.
    """
    size = books.page_size
    cell_bytes = -(-(books.length // size) // cells) * size
    count = -(-books.length // cell_bytes)
    mapped, filled, in_flight, removed = ([0] * count for _ in range(4))

    def put(tally: list[int], run: Range, distance: int) -> None:
        for cell, pages in _spread(run.moved(distance), cell_bytes, size):
            if cell < count:  # memory that has grown lies behind the last one
                tally[cell] += pages

    there = _pages_there(books, fd)
    for where, distance in books.places:
        to_start = distance - where.start
        put(mapped, where, to_start)
        busy = PageSet()
        for page in books.in_flight:
            if page in where and (there is None or page not in there):
                busy.add(Range(page, size))
        if there is not None:
            for run in there.runs(where):
                put(filled, run, to_start)
        for run in busy.runs(where):
            put(in_flight, run, to_start)
        for run in books.removed.runs(where):
            for still in there.gaps(run) if there is not None else (run,):
                for idle in busy.gaps(still):
                    put(removed, idle, to_start)
    if there is None:
        return PageMap(cell_bytes, None, in_flight, removed, None)
    known = zip(mapped, filled, in_flight, removed, strict=True)
    absent = [every - sum(rest) for every, *rest in known]
    return PageMap(cell_bytes, filled, in_flight, removed, absent)


def _pages_there(books: Books, fd: OwnedFd | None) -> PageSet | None:
    if fd is None:
        return None
    there = PageSet()
    try:
        for where, _ in books.places:
            for run in pagemap.regions(fd.fileno(), where.start, where.end, any_of=_THERE):
                there.add(Range.between(run.start, run.end))
    except (NotSupported, ResolutionRefused):  # an old kernel, or the target has just gone
        return None
    return there


def _spread(run: Range, cell_bytes: int, page_size: int) -> Iterator[tuple[int, int]]:
    """Cut a run, by its distance from the region's start, into (cell, pages)."""
    at = run.start
    while at < run.end:
        cell = at // cell_bytes
        end = min((cell + 1) * cell_bytes, run.end)
        yield cell, (end - at) // page_size
        at = end
