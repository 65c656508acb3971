"""What is still to be sent, and what was sent and may not have arrived.

Knows: regions' lengths, runs of pages, numbers of frames.
Must not know: connections, bytes, when anything is sent.

Laws of this file:

* A page is sent because it is in the backlog, and leaves it when it is taken out to be sent.
* What was taken stays in doubt until the other side has said that it landed.  What is in doubt
  when a connection breaks comes back: it may be sent twice, it is never left out.
* Taking goes on from where the last demand was, to the end and round: what a program touches next
  lies nearby more often than not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from ..ranges import CHUNK_PAGES, PAGE_SIZE, PageSet, Range, align_down
from .wire import Extent

_STRETCH: Final = CHUNK_PAGES * PAGE_SIZE
_BEFORE: Final = 64 << 10  # bytes: programs that go backwards want what lies before, too


class Taken(NamedTuple):
    """What is to be sent in one frame: runs of one region."""

    region: int
    runs: list[tuple[int, int]]  #: offset and length of each, in bytes, by offset


class Backlog:
    """What is still to be sent.

    Attributes:
        bytes: How much that is.

    Sharing: none needed.
    """

    def __init__(self, extents: Sequence[Extent]) -> None:
        self.bytes = 0
        self._extents = extents
        self._pages = [PageSet() for _ in extents]
        self._region = 0  # where taking goes on
        self._offset = 0

    def add(self, region: int, offset: int, length: int) -> int:
        """Put a run in.

        Returns:
            Bytes that were not there already.
        """
        pages, where = self._pages[region], Range(offset, length)
        new = sum(gap.length for gap in pages.gaps(where))
        if new:
            pages.add(where)
            self.bytes += new
        return new

    def add_runs(self, runs: Iterable[tuple[int, int, int]]) -> None:
        """Put many runs in, quicker than one by one.

        Args:
            runs: Region, offset and length of each, in bytes; the nearer the next the better.
        """
        region = chunk = -1
        bits = 0
        for number, offset, length in runs:
            first, last = offset // _STRETCH, (offset + length - 1) // _STRETCH
            if first != last:
                self.add(number, offset, length)
                continue
            if first != chunk or number != region:
                self._add_bits(region, chunk, bits)
                region, chunk, bits = number, first, 0
            at = offset % _STRETCH // PAGE_SIZE
            bits |= ((1 << length // PAGE_SIZE) - 1) << at
        self._add_bits(region, chunk, bits)

    def _add_bits(self, region: int, chunk: int, bits: int) -> None:
        if bits:
            pages = self._pages[region]
            there = pages.bits(chunk)
            pages.add_chunk(chunk, bits)
            self.bytes += (bits & ~there).bit_count() * PAGE_SIZE

    def add_all(self) -> None:
        """Put everything in."""
        for number, extent in enumerate(self._extents):
            self.add(number, 0, extent.length)

    def discard(self, region: int, offset: int, length: int) -> int:
        """Take a run out.

        Returns:
            Bytes that were there.
        """
        pages, where = self._pages[region], Range(offset, length)
        gone = sum(run.length for run in pages.runs(where))
        if gone:
            pages.discard(where)
            self.bytes -= gone
        return gone

    def near(self, region: int, offset: int) -> None:
        """Go on taking around there."""
        self._region = region
        self._offset = align_down(max(offset - _BEFORE, 0), self._extents[region].page_size)

    def take(self, most_bytes: int, most_runs: int) -> Taken | None:
        """Take out what is to be sent next.

        Args:
            most_bytes: In all, at least a page of any region.
            most_runs: At least 1.

        Returns:
            Runs of one region; None if there is nothing.
        """
        if not self.bytes:
            return None
        while True:
            taken = self._take(most_bytes, most_runs)
            if taken is not None:
                return taken
            self._region, self._offset = (self._region + 1) % len(self._extents), 0

    def _take(self, most_bytes: int, most_runs: int) -> Taken | None:
        """Take from the current region, from the current place on."""
        number = self._region
        extent, pages = self._extents[number], self._pages[number]
        runs: list[tuple[int, int]] = []
        left = align_down(most_bytes, extent.page_size)
        at = self._offset
        # In stretches: where all is to be sent, a run would be looked for to the region's end.
        while left and len(runs) < most_runs and at < extent.length:
            stretch = Range.between(at, min(align_down(at, _STRETCH) + _STRETCH, extent.length))
            for run in pages.runs(stretch):
                length = min(run.length, left)
                if runs and sum(runs[-1]) == run.start:
                    runs[-1] = runs[-1][0], runs[-1][1] + length
                else:
                    runs.append((run.start, length))
                left -= length
                if not left or len(runs) == most_runs:
                    break
            at = stretch.end
        if not runs:
            return None
        for offset, length in runs:
            pages.discard(Range(offset, length))
            self.bytes -= length
        self._offset = runs[-1][0] + runs[-1][1]
        return Taken(number, runs)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Give (region, offset, length) of everything, in order."""
        for number, (extent, pages) in enumerate(zip(self._extents, self._pages, strict=True)):
            for run in pages.runs(Range(0, extent.length)):
                yield number, run.start, run.length


class InDoubt:
    """What was sent on one connection and may not have landed.

    Sharing: none needed.
    """

    def __init__(self) -> None:
        self.bytes = 0  #: in doubt now
        self._sent: deque[tuple[int, Taken, int, float]] = deque()

    def __len__(self) -> int:
        return len(self._sent)

    def add(self, number: int, taken: Taken, size: int, now: float) -> None:
        """Note what a frame carries.

        Args:
            number: Of the frame; they go up.
            taken: Its runs.
            size: Its bytes on the connection.
            now: When it was sent.
        """
        self._sent.append((number, taken, size, now))
        self.bytes += size

    def landed(self, number: int) -> Iterator[tuple[int, float]]:
        """Forget the frames up to a number: give the size and the time of each."""
        sent = self._sent
        while sent and sent[0][0] <= number:
            _, _, size, when = sent.popleft()
            self.bytes -= size
            yield size, when

    def give_back(self) -> Iterable[Taken]:
        """Forget all: give what has to be sent again."""
        sent, self._sent = self._sent, deque()
        self.bytes = 0
        return [taken for _, taken, _, _ in sent]
