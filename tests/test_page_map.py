"""The picture of a region's pages: every mapped page counted once, by what is true of it."""

from __future__ import annotations

import os
from typing import Final

from hypothesis import given
from hypothesis import strategies as st

from aiouffd import Copy, Feature, PageFault, Resolution
from aiouffd.page_map import Books, books_of, draw, open_pages
from aiouffd.ranges import PAGE_SIZE, PageSet, Range
from tests.serving import MADV_DONTNEED, Gate, from_image, image, serving
from tests.targets import PAGE, until

START: Final = 0x7F00_0000_0000


@st.composite
def books(draw_: st.DrawFn) -> tuple[Books, set[int], set[int], set[int]]:
    """A region of some pages in one or two places, removed pages, pages in flight."""
    pages = draw_(st.integers(1, 40))
    split = draw_(st.integers(0, pages))
    far = START + (1 << 30)
    places = [(Range(START, split * PAGE), 0), (Range(far, (pages - split) * PAGE), split * PAGE)]
    places = [place for place in places if place[0]]
    numbers = st.sets(st.integers(0, pages - 1))
    removed, busy = draw_(numbers), draw_(numbers)

    def at(number: int) -> int:
        return START + number * PAGE if number < split else far + (number - split) * PAGE

    held = PageSet()
    for number in removed:
        held.add(Range(at(number), PAGE))
    every = Books(pages * PAGE, PAGE, places, held, [at(number) for number in busy])
    return every, set(range(pages)), removed, busy


@given(books(), st.integers(1, 50))
def test_every_page_is_counted_in_its_cell(
    made: tuple[Books, set[int], set[int], set[int]], cells: int
) -> None:
    """Cells have one size, cover the region, and hold what a page-by-page count says."""
    every, pages, removed, busy = made
    drawn = draw(every, None, cells)
    assert drawn.filled is drawn.absent is None
    step = drawn.cell_bytes // PAGE
    count = -(-len(pages) // step)
    assert count <= cells
    assert drawn.cell_bytes % PAGE_SIZE == 0

    def tally(numbers: set[int]) -> list[int]:
        return [sum(number // step == cell for number in numbers) for cell in range(count)]

    assert drawn.in_flight == tally(busy)
    assert drawn.removed == tally(removed - busy)


async def test_the_kernel_says_what_is_there() -> None:
    """Filled, in flight, removed and absent pages of a real target, each in its cell."""
    gate = Gate()

    async def answer(fault: PageFault) -> Resolution:
        if fault.offset >= 24 * PAGE:
            return Copy(await gate(fault) and image(fault.offset))
        return await from_image(fault)

    async with serving(answer, features=Feature.EVENT_REMOVE, pages=32) as served:
        target = served.target
        for page in (0, 1, 2, 3, 8, 9):
            await target.start_read(page)
        await target.start_madvise(MADV_DONTNEED, 2, 2)
        await target.start_madvise(MADV_DONTNEED, 16, 4)
        assert await target.start_read(2) == 0  # there again, as zeros
        waiting = target.start_read(24)
        await until(lambda: gate.faults, "the fault is in flight")
        noted = books_of(served.region)
        pages = open_pages(target.pid)
        assert pages is not None
        try:
            drawn = draw(noted, pages, 4)
        finally:
            pages.close()
        assert drawn.cell_bytes == 8 * PAGE
        assert drawn.filled == [3, 2, 0, 0]
        assert drawn.in_flight == [0, 0, 0, 1]
        assert drawn.removed == [1, 0, 4, 0]
        assert drawn.absent == [4, 6, 4, 7]
        gate.let_go()
        assert await waiting == image(24 * PAGE)[0]


async def test_memory_that_moved_is_counted_where_it_belongs() -> None:
    """A map is of the region, wherever the target has put it; what it unmapped is in no cell."""
    features = Feature.EVENT_REMAP | Feature.EVENT_UNMAP
    async with serving(features=features, pages=16) as served:
        target = served.target
        await target.start_read(5)
        space = target.reserve(4 * PAGE)
        assert await target.start_mremap(4, 4, flags=3, to=space) == space
        assert await target.start_munmap(12, 4) == 0
        await until(lambda: len(served.region.ranges) == 3, "both events are applied")
        pages = open_pages(target.pid)
        assert pages is not None
        try:
            drawn = draw(books_of(served.region), pages, 4)
        finally:
            pages.close()
        assert drawn.filled == [0, 1, 0, 0]
        assert drawn.absent == [4, 3, 4, 0]


def test_a_process_that_is_not_there_has_no_pages() -> None:
    """Where nothing can be looked at the answer is None, and so is what follows from it."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    assert open_pages(pid) is None
