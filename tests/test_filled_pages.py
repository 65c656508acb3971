"""aiouffd.filled_pages: a bit for each page, by its place in the source."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aiouffd.filled_pages import FilledPages
from aiouffd.ranges import Range
from tests.targets import HUGE, PAGE

_PAGES = 70
_RANGES = st.lists(st.tuples(st.integers(-3, _PAGES + 3), st.integers(1, 40)), max_size=8)


def _bits(page_size: int = PAGE, offset: int = 0) -> FilledPages:
    memory = bytearray(b"\xaa" + bytes(FilledPages.bytes_for(_PAGES * PAGE, PAGE)) + b"\xaa")
    return FilledPages(memory, 1, offset, _PAGES * page_size, page_size)


@given(_RANGES, st.lists(st.integers(-3, _PAGES + 3), max_size=8), st.sampled_from([PAGE, HUGE]))
def test_like_a_set_of_pages(ranges: list[tuple[int, int]], single: list[int], size: int) -> None:
    """Ranges and single pages give what a set of numbers gives; nothing else is written."""
    base = 5 * size
    bits = _bits(size, base)
    model: set[int] = set()
    for first, count in ranges:
        bits.add_range(base + first * size, count * size)
        model |= set(range(first, first + count))
    for page in single:
        bits.add(base + page * size)
        model.add(page)
    model &= set(range(_PAGES))
    assert {page for page in range(-5, _PAGES + 9) if base + page * size in bits} == model
    assert len(bits) == len(model)
    assert bool(bits) == bool(model)
    gaps = {
        page // size for gap in bits.gaps(Range(base, _PAGES * size)) for page in gap.pages(size)
    }
    assert gaps == {5 + page for page in range(_PAGES)} - {5 + page for page in model}
    for first in range(-2, _PAGES):
        for count in (1, 3, 17):
            every = set(range(first, first + count)) <= model
            none = not set(range(first, first + count)) & model
            inside = first >= 0 and first + count <= _PAGES
            assert bits.covers(base + first * size, count * size) == every
            assert bits.has_none(base + first * size, count * size) == (none and inside)
    memory = bits._memory
    assert memory[0] == memory[len(memory) - 1] == 0xAA


def test_frozen_bits_do_not_change() -> None:
    """What was filled before a moment is not what is filled after it."""
    bits = _bits()
    bits.add(3 * PAGE)
    before = bits.frozen()
    bits.add(4 * PAGE)
    assert [page for page in range(9) if page * PAGE in before] == [3]


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 1500)), max_size=12), st.integers(-9, 9)
)
def test_gaps_of_many_pages(filled: list[tuple[int, int]], shift: int) -> None:
    """Runs are whole, however far they reach, and a range may begin and end outside."""
    pages, base = 5000, 16
    bits = FilledPages.none_yet(base * PAGE, pages * PAGE, PAGE)
    model = set()
    for first, count in filled:
        bits.add_range((base + first) * PAGE, count * PAGE)
        model |= set(range(first, first + count))
    expected: list[tuple[int, int]] = []
    for page in range(shift, pages + shift):
        if page in model and page < pages:
            continue
        if expected and expected[-1][1] == page:
            expected[-1] = expected[-1][0], page + 1
        else:
            expected.append((page, page + 1))
    gaps = bits.gaps(Range((base + shift) * PAGE, pages * PAGE))
    assert [(gap.start // PAGE - base, gap.end // PAGE - base) for gap in gaps] == expected
