"""Planning what to read ahead: runs of bytes cut into reads of whole pages that hold data.

Knows: offsets, page sizes, extents.
Must not know: pagers, sources, how anything is read or installed.

Laws of this file:

* Plans are lazy: however many runs there are, one read is planned at a time.
* A plan gives its consumer a breath now and then (None), also while there is nothing to give.
* Each page is given once, whole, and only if it holds a byte of an extent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple, TypeAlias

from .ranges import align_down, align_up
from .region import Region
from .sources import Extents

#: A gap that is read along: cheaper than one more read.  It is not filled along unless the rest is
#: wanted as well (``together``): for scattered pages gaps of 16 KiB would save a third of the time
#: and take twice the memory (Linux 6.18).
READ_ACROSS: Final = 64 << 10
_BREATH: Final = 16  # runs that are planned between two turns of the loop


class Stretch(NamedTuple):
    """One read, and the parts of it that are installed."""

    region: Region
    offset: int
    length: int
    parts: list[tuple[int, int]]  # (offset, length), whole pages


#: Stretches by offset; now and then None, for the loop to have its turn.
Plan: TypeAlias = Iterator[Stretch | None]


class Place(NamedTuple):
    """Where a region lies in its source."""

    offset: int
    length: int
    page_size: int


def stretches(
    region: Region,
    place: Place,
    runs: Iterable[tuple[int, int]],
    data: Extents,
    source_size: int,
    limit: Callable[[], int],
) -> Plan:
    """Cut runs of bytes into reads: whole pages that hold data, neighbours together.

    Args:
        region: Goes into each stretch.
        place: Where it lies; what lies outside is left out.
        runs: (offset, length) in the source, ascending.
        data: Where the source has bytes.
        source_size: In bytes.
        limit: Says how long a read may be by now, in bytes.
    """
    size = place.page_size
    parts: list[tuple[int, int]] = []
    start = end = -1
    for low, high in _pages_with_data(place, runs, data, source_size):
        if low == high:
            yield None
        while low < high:
            longest = max(align_down(limit(), size), size)
            if parts and (low - end > READ_ACROSS or low + size - start > longest):
                yield Stretch(region, start, end - start, parts)
                parts = []
                continue  # by now a step may be shorter
            if not parts:
                start = end = low
            stop = min(high, start + longest)
            if parts and low == end:
                parts[-1] = (parts[-1][0], stop - parts[-1][0])
            else:
                parts.append((low, stop - low))
            low = end = stop  # noqa: PLW2901 - what is left of the run
    if parts:
        yield Stretch(region, start, end - start, parts)


def together(
    runs: Iterable[tuple[int, int]], across: Callable[[], int]
) -> Iterator[tuple[int, int]]:
    """Make one of neighbouring runs and what lies between them, a few at a time.

    Args:
        runs: (offset, length) in the source, ascending.
        across: Says how wide a gap may be by now, in bytes.
    """
    start = end = -1
    joined = 0
    for offset, length in runs:
        if start >= 0 and offset - end <= across():
            joined += 1
            if joined == _BREATH:  # the rest is given later: nobody shall wait for all of it
                yield start, offset - start
                start, joined = offset, 0
            end = max(end, offset + length)
            continue
        if start >= 0:
            yield start, end - start
        start, end, joined = offset, offset + length, 0
    if start >= 0:
        yield start, end - start


def _pages_with_data(
    place: Place, runs: Iterable[tuple[int, int]], data: Extents, source_size: int
) -> Iterator[tuple[int, int]]:
    """Give the (start, end) of the whole pages with data that runs touch, each once."""
    first, length, size = place
    last = min(first + length, first + align_up(max(source_size - first, 0), size))
    done = first  # pages before it were given
    for number, (offset, count) in enumerate(runs):
        if offset >= last:
            return
        if not number % _BREATH:
            yield done, done
        low, high = max(offset, first), min(offset + count, last)
        if low >= high:
            continue
        # Regions begin at any offset that is whole small pages: pages count from there.
        low = first + align_down(low - first, size)
        high = first + align_up(high - first, size)
        for start, stop in data.within(low, high):
            page = max(first + align_down(start - first, size), done)
            done = max(first + align_up(stop - first, size), done)
            if page < done:
                yield page, done
