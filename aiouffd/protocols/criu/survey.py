"""What the memory of a task of a checkpoint amounts to, and where in it the pages lie.

Knows: mappings and runs.
Must not know: terminals, figures.
"""

from __future__ import annotations

import enum
from array import array
from bisect import bisect_right
from dataclasses import dataclass

from ...ranges import PAGE_SIZE, align_up
from .images import VMA_AREA_GUARD
from .task_memory import LIVE, ZEROS, Run, TaskMemory


class Kind(enum.IntEnum):
    """How the pages of a task come."""

    LAZY = 0
    """When they are touched; the checkpoint has them."""
    LIVE = 1
    """When they are touched; only the page server of the dump has them."""
    AT_ONCE = 2
    """Before the task runs."""


def kind_of(run: Run) -> Kind:
    """Say how the pages of a run come."""
    if run.file == LIVE:
        return Kind.LIVE
    return Kind.LAZY if run.lazy else Kind.AT_ONCE


@dataclass(frozen=True, slots=True)
class Survey:
    """What the memory of a task amounts to.

    Attributes:
        mappings: How many it has.
        runs: Of pages, cut at the borders of mappings.
        mapped_bytes: What they span together.
        dumped_bytes: What of that the checkpoint holds, or its page server.
        lazy_bytes: What of that may come after the task runs.
        live_bytes: What of that only the page server of the dump has.
        parent_bytes: What of the dumped lies in parents of the checkpoint.
    """

    mappings: int
    runs: int
    mapped_bytes: int
    dumped_bytes: int
    lazy_bytes: int
    live_bytes: int
    parent_bytes: int

    @property
    def lazy_share(self) -> float:
        """How much of what was dumped may come after the task runs, from 0 to 1."""
        return self.lazy_bytes / self.dumped_bytes if self.dumped_bytes else 0.0


def survey(memory: TaskMemory) -> Survey:
    """Add up what a task's memory amounts to."""
    vmas = [vma for vma in memory.vmas if not vma.status & VMA_AREA_GUARD]
    runs = dumped = lazy = live = parents = 0
    for run in memory.runs:
        runs += 1
        if run.file == ZEROS:
            continue
        dumped += run.length
        lazy += run.length if run.lazy else 0
        live += run.length if run.file == LIVE else 0
        parents += run.length if run.file > 0 else 0
    mapped = sum(vma.length for vma in vmas)
    return Survey(len(vmas), runs, mapped, dumped, lazy, live, parents)


@dataclass(frozen=True, slots=True)
class Cell:
    """A piece of a picture of a task's memory.

    Attributes:
        address: Where it begins.
        shares: By ``Kind``: how much of it is there, from 0 to 1.
    """

    address: int
    shares: tuple[float, float, float]

    @property
    def share(self) -> float:
        """How much of it is there at all."""
        return min(sum(self.shares), 1.0)

    @property
    def kind(self) -> Kind:
        """What there is most of in it."""
        return max(Kind, key=lambda kind: self.shares[kind])


@dataclass(frozen=True, slots=True)
class Picture:
    """Where in a task's memory its pages lie.

    Only mappings that hold pages are in it, end to end: an address space is nearly all gaps.

    Attributes:
        cell_bytes: How much memory a cell stands for.
        length: How much all of them do.
        cells: In order of addresses.
    """

    cell_bytes: int
    length: int
    cells: tuple[Cell, ...]


def picture(memory: TaskMemory, most: int) -> Picture:
    """Draw a task's memory in so many cells at most."""
    vmas = [vma for vma in memory.vmas if not vma.status & VMA_AREA_GUARD]
    starts = [vma.start for vma in vmas]
    held: dict[int, list[Run]] = {}  # by mapping, in order
    for run in memory.runs:
        at = bisect_right(starts, run.address) - 1
        if run.file != ZEROS and at >= 0 and run.address < vmas[at].end:
            held.setdefault(at, []).append(run)
    shown = [vmas[at] for at in held]
    length = sum(vma.length for vma in shown)
    cell = align_up(-(-length // most)) if length else PAGE_SIZE
    count = -(-length // cell)
    amounts = [array("Q", bytes(8 * count)) for _ in Kind]
    begins: list[int] = []  # where in the picture each mapping begins
    offset = 0
    for vma, runs in zip(shown, held.values(), strict=True):
        begins.append(offset)
        for run in runs:
            amount = amounts[kind_of(run)]
            low = offset + run.address - vma.start
            high = low + run.length
            while low < high:
                number = low // cell
                take = min(high, (number + 1) * cell) - low
                amount[number] += take
                low += take
        offset += vma.length
    cells = []
    for number in range(count):
        low = number * cell
        size = min(cell, length - low)
        at = bisect_right(begins, low) - 1
        lazy, live, at_once = (amount[number] / size for amount in amounts)
        cells.append(Cell(shown[at].start + low - begins[at], (lazy, live, at_once)))
    return Picture(cell, length, tuple(cells))
