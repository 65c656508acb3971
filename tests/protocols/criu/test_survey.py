"""What a task's memory amounts to, and its picture."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aiouffd.protocols.criu.images import Pagemap, PagemapEntry
from aiouffd.protocols.criu.survey import Kind, Picture, Survey, picture, survey
from aiouffd.protocols.criu.task_memory import Level, TaskMemory
from tests.protocols.criu.checkpoints import PAGE, anonymous, of_file

BASE = 0x7F00_0000_0000


def memory_of(*runs: tuple[int, int, int], parents: int = 0) -> TaskMemory:
    """A task with two lazy mappings of 16 pages, one of a file between, and one without a page.

    Args:
        runs: (page, pages, flags).
        parents: How many pages at the front the parent has.
    """
    vmas = [
        anonymous(BASE, 16),
        of_file(BASE + 16 * PAGE, 4),
        anonymous(BASE + 1000 * PAGE, 16),
        anonymous(BASE + 2000 * PAGE, 1 << 20),
    ]
    entries = tuple(PagemapEntry(BASE + page * PAGE, pages, flags) for page, pages, flags in runs)
    below = (PagemapEntry(BASE, parents, 4),) if parents else ()
    parent = Level("parent/pagemap-1.img", Pagemap(1, below), 1, None)
    level = Level("pagemap-1.img", Pagemap(1, entries), 0, parent)
    return TaskMemory(1, vmas, [level, parent])


def test_sums() -> None:
    """Zeros are not dumped; what lies in parents and at the page server is counted besides."""
    memory = memory_of((0, 2, 1), (2, 3, 6), (10, 8, 4), (1000, 4, 2), (1010, 1, 0), parents=2)
    assert survey(memory) == Survey(
        mappings=4,
        runs=6,  # one is cut at a border
        mapped_bytes=(36 + (1 << 20)) * PAGE,
        dumped_bytes=17 * PAGE,
        lazy_bytes=7 * PAGE,
        live_bytes=4 * PAGE,
        parent_bytes=2 * PAGE,
    )
    assert survey(memory).lazy_share == 7 / 17
    assert survey(memory_of()).lazy_share == 0


def test_pictures() -> None:
    """Mappings without a page are left out; each cell says what it has, and how much."""
    memory = memory_of((0, 4, 6), (4, 2, 4), (6, 1, 6), (1012, 3, 2), (1015, 1, 0))
    drawn = picture(memory, 8)
    assert (drawn.cell_bytes, drawn.length) == (4 * PAGE, 32 * PAGE)
    assert [cell.address for cell in drawn.cells] == [
        BASE + page * PAGE for page in (0, 4, 8, 12, 1000, 1004, 1008, 1012)
    ]
    shares = {number: cell.shares for number, cell in enumerate(drawn.cells) if cell.share}
    assert shares == {0: (1, 0, 0), 1: (0.25, 0, 0.5), 7: (0, 0.75, 0)}
    assert [drawn.cells[number].kind for number in shares] == [Kind.LAZY, Kind.AT_ONCE, Kind.LIVE]


def test_a_picture_of_nothing() -> None:
    """It has no cells."""
    assert picture(memory_of(), 8) == Picture(PAGE, 0, ())


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 4), st.sampled_from([2, 4, 6])), max_size=8
    ),
    st.integers(1, 100),
)
def test_pictures_hold_all_that_there_is(runs: list[tuple[int, int, int]], most: int) -> None:
    """However many cells there are, together they hold every byte of every kind."""
    at, placed = 0, []
    for gap, pages, flags in runs:
        if at + gap + pages > 16:
            break
        placed.append((at + gap, pages, flags))
        at += gap + pages
    memory = memory_of(*placed)
    drawn = picture(memory, most)
    assert len(drawn.cells) <= most
    sizes = [
        min(drawn.cell_bytes, drawn.length - number * drawn.cell_bytes)
        for number in range(len(drawn.cells))
    ]
    sums = [
        round(sum(cell.shares[kind] * size for cell, size in zip(drawn.cells, sizes, strict=True)))
        for kind in Kind
    ]
    one = survey(memory)
    assert sums == [
        one.lazy_bytes - one.live_bytes,
        one.live_bytes,
        one.dumped_bytes - one.lazy_bytes,
    ]
