"""Where the memory of one task of a checkpoint lies: pagemaps over each other, cut at mappings.

Knows: mappings, pagemaps of a checkpoint and of its parents.
Must not know: files, the event loop, bytes of pages.

Two ways to say where a page is:

* its *address* in the task, as images and page servers have it;
* its *offset* in the regions, which are the mappings that ``criu restore --lazy-pages``
  registers with userfaultfd, laid end to end in order of their addresses.  Between them nothing
  is counted: records and maps made in offsets stay small.

Laws of this file:

* A run lies in one mapping, as a copy into a task has to, and in one file, without a gap.
* Pages that the checkpoint leaves to its parent are looked up there, and so on.  What its
  parent should have and has not is ImageError: it is never taken for zeros.
* What is made is made of numbers in arrays: 100,000 runs take some megabytes, and are found by
  bisection.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from ...errors import ImageError
from ...handover import HandedRegion
from ...ranges import PAGE_SIZE
from .images import VMA_AREA_GUARD, PageFlag, Pagemap, Vma

#: In place of the number of a file: the pages are zeros, and lie nowhere.
ZEROS: Final = -1
#: In place of the number of a file: only the process that was dumped has the pages, and a page
#: server gives them.
LIVE: Final = -2

_PARENT: Final = int(PageFlag.PARENT)
_LAZY: Final = int(PageFlag.LAZY)
_PRESENT: Final = int(PageFlag.PRESENT)


class Run(NamedTuple):
    """A run of pages in one mapping, and where its bytes lie.

    Attributes:
        address: Of the first page, in the task.
        length: Bytes.
        lazy: Whether the pages may come after the task runs; others are there when it does.
        file: Number of the file in ``TaskMemory.files``; or ZEROS, or LIVE.
        place: Where in the file, in bytes; what is LIVE has its address here.
    """

    address: int
    length: int
    lazy: bool
    file: int
    place: int


@dataclass(frozen=True, slots=True)
class PagesFile:
    """One file of pages that a task's memory lies in.

    Attributes:
        level: How many parents away its checkpoint is.
        name: ``pages-N.img``.
        length: How long it has to be, in bytes.
    """

    level: int
    name: str
    length: int

    def __str__(self) -> str:
        return "parent/" * self.level + self.name


class Level:
    """A pagemap of a checkpoint in a chain, made ready to be looked up in.

    Attributes:
        file: The pages beside it.
    """

    def __init__(self, name: str, pagemap: Pagemap, number: int, parent: Level | None) -> None:
        """Take a pagemap.

        Args:
            name: Of its file, for errors.
            pagemap: What it says.
            number: How many parents away its checkpoint is.
            parent: The one that it builds on, if it does.
        """
        self.file = PagesFile(number, f"pages-{pagemap.pages_id}.img", pagemap.stored)
        self._name = name
        self._number = number
        self._parent = parent
        self._starts, self._ends = array("Q"), array("Q")
        self._flags, self._places = array("Q"), array("Q")
        place = 0
        for vaddr, pages, flags in pagemap.entries:
            length = pages * PAGE_SIZE
            self._starts.append(vaddr)
            self._ends.append(vaddr + length)
            self._flags.append(flags)
            self._places.append(place)
            if flags & _PRESENT:
                place += length

    def pieces(self) -> Iterator[tuple[int, int, bool, int, int]]:
        """Say where all of it lies.

        Returns:
            (start, end, whether it may come lazily, file, place) of one piece after the other, in
            order of their addresses.

        Raises:
            ImageError: In a parent some of it is missing.
        """
        for start, end, flags, place in zip(
            self._starts, self._ends, self._flags, self._places, strict=True
        ):
            lazy = bool(flags & _LAZY)
            if flags & _PARENT:
                low = start
                for stop, file, where in self.find(start, end):
                    yield low, stop, lazy, file, where
                    low = stop
            elif flags & _PRESENT:
                yield start, end, lazy, self._number, place
            elif lazy:
                yield start, end, lazy, LIVE, start
            else:
                yield start, end, lazy, ZEROS, 0

    def find(self, start: int, end: int, wanted_by: str = "") -> Iterator[tuple[int, int, int]]:
        """Say where a stretch of addresses lies.

        Args:
            start: The first address.
            end: The first one behind.
            wanted_by: The pagemap that says that it lies here.

        Returns:
            (end, file, place) of one piece after the other, without a gap.

        Raises:
            ImageError: Here or in a parent some of it is missing.
        """
        at = max(bisect_right(self._starts, start) - 1, 0)
        while start < end:
            if at >= len(self._starts) or not self._starts[at] <= start < self._ends[at]:
                raise ImageError(
                    self._name,
                    None,
                    f"the page at {start:#x} is not in it, though {wanted_by} says so",
                )
            stop = min(end, self._ends[at])
            flags = self._flags[at]
            if flags & _PARENT:
                if self._parent is None:
                    raise ImageError(
                        self._name, None, f"the page at {start:#x} is in a parent that is not there"
                    )
                yield from self._parent.find(start, stop, self._name)
            elif flags & _PRESENT:
                yield stop, self._number, self._places[at] + start - self._starts[at]
            elif not flags & _LAZY:
                yield stop, ZEROS, 0
            elif self._number:
                raise ImageError(
                    self._name,
                    None,
                    f"the page at {start:#x} was left to a page server, which has gone since",
                )
            else:
                yield stop, LIVE, start
            start = stop
            at += 1


class TaskMemory:
    """The memory of one task.

    Attributes:
        pid: Whose.
        vmas: Its mappings, in order of their addresses; guards behind them.
        files: The files of pages that it lies in.
        regions: The mappings that a lazy restore registers; ``HandedRegion.offset`` is the sum of
            the lengths before it.
        size: The sum of all their lengths, in bytes.
        digest: What names this memory; two that have it in common are of one dump.
        unique: Whether it does even if the files of pages were exchanged.
    """

    def __init__(
        self,
        pid: int,
        vmas: Sequence[Vma],
        levels: Sequence[Level],
        *,
        digest: str = "",
        unique: bool = False,
    ) -> None:
        """Put together what the images say.

        Args:
            pid: Whose memory it is.
            vmas: As ``images.parse_mm`` gives them.
            levels: The pagemap of its checkpoint, then its parent's, and so on.
            digest: See the attribute.
            unique: See the attribute.

        Raises:
            ImageError: A page should lie in a parent, and does not.
        """
        self.pid = pid
        self.vmas = tuple(vmas)
        self.files = tuple(level.file for level in levels)
        self.digest = digest
        self.unique = unique
        self.regions = _regions(self.vmas)
        self.size = sum(region.length for region in self.regions)
        self._region_starts = array("Q", (region.start for region in self.regions))
        self._region_offsets = array("Q", (region.offset for region in self.regions))
        self._addresses, self._lengths = array("Q"), array("Q")
        self._lazy = array("b")
        self._files, self._places = array("i"), array("Q")
        #: The lazy ones again, by offset, neighbours joined: what a source looks up in.
        self.lazy_starts, self.lazy_ends = array("Q"), array("Q")
        self.lazy_files, self.lazy_places = array("i"), array("Q")
        if levels:
            self._resolve(levels[0])

    def _resolve(self, level: Level) -> None:
        """Look up every run, and cut it at the borders of mappings; both are walked once."""
        borders, shifts = _borders(self.vmas, self.regions)
        last = len(borders) - 1
        at = 0
        for start, end, may_be_lazy, file, place in level.pieces():
            while start < end:
                while at < last and borders[at + 1] <= start:
                    at += 1
                stop = min(end, borders[at + 1]) if at < last else end
                shift = shifts[at]
                lazy = may_be_lazy and shift is not None
                self._add(start, stop - start, lazy, file, place)
                if lazy and shift is not None and file != ZEROS:
                    self._add_lazy(start + shift, stop - start, file, place)
                if file != ZEROS:
                    place += stop - start  # noqa: PLW2901 - the rest of the same piece
                start = stop  # noqa: PLW2901

    def _add(self, address: int, length: int, lazy: bool, file: int, place: int) -> None:
        self._addresses.append(address)
        self._lengths.append(length)
        self._lazy.append(lazy)
        self._files.append(file)
        self._places.append(place)

    def _add_lazy(self, offset: int, length: int, file: int, place: int) -> None:
        ends = self.lazy_ends
        if (
            ends
            and ends[-1] == offset
            and self.lazy_files[-1] == file
            and self.lazy_places[-1] + offset - self.lazy_starts[-1] == place
        ):
            ends[-1] = offset + length
            return
        self.lazy_starts.append(offset)
        ends.append(offset + length)
        self.lazy_files.append(file)
        self.lazy_places.append(place)

    @property
    def runs(self) -> Iterator[Run]:
        """Every run of pages that the checkpoint holds, in order of their addresses."""
        for address, length, lazy, file, place in zip(
            self._addresses, self._lengths, self._lazy, self._files, self._places, strict=True
        ):
            yield Run(address, length, bool(lazy), file, place)

    def run_at(self, address: int) -> Run | None:
        """Give the run that an address lies in; None if the checkpoint has no page there."""
        at = bisect_right(self._addresses, address) - 1
        if at < 0 or address >= self._addresses[at] + self._lengths[at]:
            return None
        return Run(
            self._addresses[at],
            self._lengths[at],
            bool(self._lazy[at]),
            self._files[at],
            self._places[at],
        )

    @property
    def lazy_bytes(self) -> int:
        """How much of the memory may come after the task runs."""
        return sum(self.lazy_ends) - sum(self.lazy_starts)

    @property
    def live_bytes(self) -> int:
        """How much of that only the process that was dumped has."""
        return sum(
            end - start
            for start, end, file in zip(
                self.lazy_starts, self.lazy_ends, self.lazy_files, strict=True
            )
            if file == LIVE
        )

    def left_to_a_server(self) -> TaskMemory:
        """Give the same memory, all that is lazy of it with a page server and in no file."""
        left = TaskMemory(
            self.pid, self.vmas, (), digest=self.digest if self.unique else "", unique=self.unique
        )
        for run in self.runs:
            left._add(run.address, run.length, run.lazy, LIVE if run.lazy else run.file, run.place)
        regions = iter(self.regions)
        region = next(regions, None)
        for start, end in zip(self.lazy_starts, self.lazy_ends, strict=True):
            at = start
            while at < end and region is not None:
                stop = min(end, region.offset + region.length)
                if at < stop:
                    left._add_lazy(at, stop - at, LIVE, region.start + at - region.offset)
                    at = stop
                else:
                    region = next(regions, None)
        return left

    def address_of(self, offset: int) -> int:
        """Say which address an offset in the regions is.

        Raises:
            ValueError: It lies outside of them.
        """
        if not 0 <= offset < self.size:
            raise ValueError(f"offset {offset} lies outside of {self.size} bytes of regions")
        region = self.regions[bisect_right(self._region_offsets, offset) - 1]
        return region.start + offset - region.offset

    def offset_of(self, address: int) -> int:
        """Say which offset in the regions an address is.

        Raises:
            ValueError: It lies in none of them.
        """
        at = bisect_right(self._region_starts, address) - 1
        if at < 0 or address >= self.regions[at].end:
            raise ValueError(f"{address:#x} lies in no mapping that is restored lazily")
        return self.regions[at].offset + address - self.regions[at].start


def _borders(
    vmas: Sequence[Vma], regions: Sequence[HandedRegion]
) -> tuple[list[int], list[int | None]]:
    """Give the borders of mappings, in order, and what lies behind each.

    Returns:
        The borders, 0 first; and for each what to add to an address behind it to have its offset,
        None if it has none.
    """
    borders: list[int] = [0]
    shifts: list[int | None] = [None]
    offsets = {region.start: region.offset for region in regions}
    for vma in vmas:
        if not vma.status & VMA_AREA_GUARD:
            offset = offsets.get(vma.start)
            borders += (vma.start, vma.end)
            shifts += (None if offset is None else offset - vma.start, None)
    return borders, shifts


def _regions(vmas: Sequence[Vma]) -> tuple[HandedRegion, ...]:
    regions = []
    offset = 0
    for vma in vmas:
        if vma.lazy:
            regions.append(HandedRegion(vma.start, vma.length, offset, PAGE_SIZE))
            offset += vma.length
    return tuple(regions)
