"""Extents against a naive model, and the check of a read's place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.errors import SourceError
from aiouffd.sources import Extents, check_read


@st.composite
def stretches(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Draw ordered, disjoint stretches, some of which touch."""
    at, found = 0, []
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)))):
        found.append((at + gap, length))
        at += gap + length
    return found


@given(stretches(), st.integers(0, 60), st.integers(1, 20))
def test_holds_agrees_with_a_set_of_bytes(
    pairs: list[tuple[int, int]], offset: int, length: int
) -> None:
    """A stretch is held if any byte of it lies in an extent."""
    covered = {at for start, size in pairs for at in range(start, start + size)}
    extents = Extents(pairs)
    assert extents.holds(offset, length) == bool(covered & set(range(offset, offset + length)))
    assert {at for start, size in extents for at in range(start, start + size)} == covered
    within = list(extents.within(offset, offset + length))
    assert {at for start, end in within for at in range(start, end)} == covered & set(
        range(offset, offset + length)
    )
    assert all(size > 0 for _, size in extents)
    around = extents.around(offset)
    assert (around is not None) == (offset in covered)
    if around is not None:
        assert set(range(*around)) <= covered
        assert around[0] - 1 not in covered
        assert around[1] not in covered


def test_neighbours_become_one() -> None:
    """Extents that touch are joined; those with a gap are not."""
    assert list(Extents([(0, 4), (4, 4), (9, 1)])) == [(0, 8), (9, 1)]


def test_cover_says_whether_there_is_no_hole() -> None:
    """Only one extent from the start to the end covers a source."""
    assert Extents([(0, 8)]).cover(8)
    assert not Extents([(0, 8)]).cover(9)
    assert not Extents([(1, 8)]).cover(8)
    assert not Extents([]).cover(1)


@pytest.mark.parametrize("pairs", [[(4, 1), (0, 1)], [(0, 2), (1, 2)], [(0, 0)], [(0, -1)]])
def test_disorder_is_refused(pairs: list[tuple[int, int]]) -> None:
    """Extents that do not ascend, or are empty, raise ValueError."""
    with pytest.raises(ValueError, match="ascend"):
        Extents(pairs)


def test_check_read_names_the_place() -> None:
    """The refusal says what was asked for and how large the source is."""
    check_read(0, 10, 10)
    with pytest.raises(SourceError, match=r"2 bytes at offset 9 .* source of 10 bytes"):
        check_read(9, 2, 10)
