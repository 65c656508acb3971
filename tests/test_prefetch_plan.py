"""Plans: every wanted page once, in reads that are not too long."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from aiouffd import Region
from aiouffd.prefetch_plan import Place, stretches, together
from aiouffd.sources import Extents
from aiouffd.working_set import GRANULE, Header, WorkingSet


@given(
    runs=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=12),
    holes=st.lists(st.integers(0, 299), max_size=6, unique=True),
    first=st.integers(0, 100),
    pages=st.integers(1, 40),
    size=st.sampled_from([1, 4, 8]),
    limit=st.integers(1, 50),
)
def test_a_plan_brings_every_wanted_page_once(
    runs: list[tuple[int, int]],
    holes: list[int],
    first: int,
    pages: int,
    size: int,
    limit: int,
) -> None:
    """Whole pages, in order, none outside of the region, none that holds no data."""
    source_pages = 300
    wanted = WorkingSet(Header(identity="", image_size=400 * GRANULE))
    for run in runs:
        wanted.add(*run)
    edges = sorted({0, *holes, source_pages})
    # every other stretch between two edges is a hole
    data = [(a, b) for n, (a, b) in enumerate(pairwise(edges)) if n % 2 == 0]
    extents = Extents([(a * GRANULE, (b - a) * GRANULE) for a, b in data])
    place = Place(first * GRANULE, pages * size * GRANULE, size * GRANULE)
    byte_runs = [(a * GRANULE, n * GRANULE) for a, n in wanted.runs()]
    found = list(
        stretches(
            cast("Region", None),
            place,
            byte_runs,
            extents,
            source_pages * GRANULE,
            lambda: limit * GRANULE,
        )
    )
    plan = [stretch for stretch in found if stretch is not None]
    held = {granule for a, b in data for granule in range(a, b)}
    ask = {granule for a, n in wanted.runs() for granule in range(a, a + n)}
    must = set()
    for page in range(pages):
        of_page = set(range(first + page * size, first + (page + 1) * size))
        if held & of_page and ask & of_page:
            must |= of_page
    brought: list[int] = []
    for stretch in plan:
        assert stretch.offset == stretch.parts[0][0]
        assert stretch.offset + stretch.length == sum(stretch.parts[-1])
        assert stretch.length <= max(limit // size * size, size) * GRANULE
        for offset, length in stretch.parts:
            assert length > 0
            assert length % (size * GRANULE) == 0
            assert (offset - place.offset) % (size * GRANULE) == 0
            brought += range(offset // GRANULE, (offset + length) // GRANULE)
    assert brought == sorted(set(brought))
    assert all(first <= granule < first + pages * size for granule in brought)
    assert set(brought) == must


@given(
    runs=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=20),
    across=st.integers(0, 20),
)
def test_neighbours_are_put_together(runs: list[tuple[int, int]], across: int) -> None:
    """All gaps up to a width are in, none that is wider, and nothing is lost."""
    wanted = {byte for offset, length in runs for byte in range(offset, offset + length)}
    found = list(together(sorted(runs), lambda: across))
    brought = [byte for offset, length in found for byte in range(offset, offset + length)]
    assert brought == sorted(set(brought))
    assert wanted <= set(brought)
    assert all(b == a + n or b - a - n > across for (a, n), (b, _) in pairwise(found))
    for byte in set(brought) - wanted:
        before = max(other for other in wanted if other < byte)
        behind = min(other for other in wanted if other > byte)
        assert behind - before - 1 <= across


def test_nothing_waits_for_a_whole_set_to_be_put_together() -> None:
    """However many neighbours there are, a few of them are enough to begin with."""
    taken = 0

    def runs() -> Iterator[tuple[int, int]]:
        nonlocal taken
        for offset in range(0, 100_000, 2):
            taken += 1
            yield offset, 1

    first = next(together(runs(), lambda: 10))
    assert first[0] == 0
    assert taken <= 32
    assert sum(length for _, length in together(runs(), lambda: 10)) == 99_999
