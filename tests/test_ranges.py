"""Ranges, RangeMap and PageSet: tables, and against dicts and sets of single addresses."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aiouffd.ranges import (
    _CHUNK_BYTES,
    CHUNK_PAGES,
    PAGE_SIZE,
    PageSet,
    Range,
    RangeMap,
    align_down,
    align_up,
    is_aligned,
    is_power_of_two,
)

# --- arithmetic ------------------------------------------------------------------------


@given(st.integers(0, 2**64), st.integers(0, 40).map(lambda n: 1 << n))
def test_alignment(value: int, size: int) -> None:
    """Rounding gives the nearest multiples on both sides, and a multiple stays."""
    low, high = align_down(value, size), align_up(value, size)
    assert low <= value <= high
    assert high - low in {0, size}
    assert is_aligned(low, size)
    assert is_aligned(high, size)
    assert is_aligned(value, size) == (value % size == 0) == (low == high)


@pytest.mark.parametrize("value", [-4, 0, 3, 6, 4097])
def test_no_power_of_two(value: int) -> None:
    """Zero and negative numbers are none either."""
    assert not is_power_of_two(value)


def test_powers_of_two() -> None:
    """One is the first."""
    assert all(is_power_of_two(1 << n) for n in range(65))


# --- Range -----------------------------------------------------------------------------

small_ranges = st.builds(Range, st.integers(0, 40), st.integers(0, 24))


@given(small_ranges, small_ranges)
def test_ranges_are_sets_of_addresses(one: Range, other: Range) -> None:
    """Holding, overlapping and intersecting mean what they mean for the sets of addresses."""
    first, second = set(range(one.start, one.end)), set(range(other.start, other.end))
    assert {address for address in range(70) if address in one} == first
    assert bool(one) == bool(first)
    assert one.overlaps(other) == bool(first & second)
    common = one.intersection(other)
    assert (common is None) == (not first & second)
    if common is not None:
        assert set(range(common.start, common.end)) == first & second
    rest = one.without(other)
    assert [a for part in rest for a in range(part.start, part.end)] == sorted(first - second)
    assert all(rest)


@given(small_ranges, st.integers(1, 30))
def test_pieces_make_the_whole(where: Range, size: int) -> None:
    """Pieces follow each other, none longer than asked for, and only the last one shorter."""
    pieces = list(where.pieces(size))
    assert [a for piece in pieces for a in range(piece.start, piece.end)] == list(
        range(where.start, where.end)
    )
    assert all(piece.length == size for piece in pieces[:-1])
    assert all(0 < piece.length <= size for piece in pieces)


def test_range_between() -> None:
    """The end is the first address behind."""
    assert Range.between(5, 9) == Range(5, 4)
    assert Range(5, 4).end == 9


def test_range_moved() -> None:
    """A distance may be negative; the length stays."""
    assert Range(5, 4).moved(-2) == Range(3, 4)


def test_range_touches_pages() -> None:
    """Every page that is touched counts, also in part; none for nothing."""
    size = PAGE_SIZE
    assert list(Range(size + 1, size).pages()) == [size, 2 * size]
    assert list(Range(size, size).pages()) == [size]
    assert list(Range(4 * size, 0).pages()) == []
    assert list(Range(1 << 21, 1 << 22).pages(1 << 21)) == [1 << 21, 2 << 21]


def test_range_in_text() -> None:
    """Messages show hexadecimal bounds, the end excluded."""
    assert str(Range(0x1000, 0x2000)) == "[0x1000, 0x3000)"


@pytest.mark.parametrize("start, length", [(-1, 4), (4, -1)])
def test_range_refuses_negative_parts(start: int, length: int) -> None:
    """What ends before it starts, or starts below zero, is no range."""
    with pytest.raises(ValueError, match="no negative parts"):
        Range(start, length)


# --- RangeMap --------------------------------------------------------------------------

SPACE = 48
EXAMPLES = settings().max_examples * 2 // 5  # each is many steps
ranges = st.tuples(st.integers(0, SPACE), st.integers(0, SPACE)).map(
    lambda pair: Range.between(min(pair), max(pair))
)


class RangeMapMachine(RuleBasedStateMachine):
    """A RangeMap beside a dict of single addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.map: RangeMap[int] = RangeMap()
        self.model: dict[int, int] = {}
        self.count = 0

    def in_model(self, where: Range) -> dict[int, int]:
        return {a: self.model[a] for a in range(where.start, where.end) if a in self.model}

    def check_taken(self, taken: list[tuple[Range, int]], expected: dict[int, int]) -> None:
        assert unroll(taken) == expected
        assert [r for r, _ in taken] == sorted(r for r, _ in taken)
        assert all(r for r, _ in taken)

    @rule(where=ranges)
    def set(self, where: Range) -> None:
        self.count += 1
        expected = self.in_model(where)
        self.check_taken(self.map.set(where, self.count), expected)
        self.model.update(dict.fromkeys(range(where.start, where.end), self.count))

    @rule(where=ranges)
    def cut(self, where: Range) -> None:
        expected = self.in_model(where)
        self.check_taken(self.map.cut(where), expected)
        for address in expected:
            del self.model[address]

    @rule(where=ranges)
    def overlapping(self, where: Range) -> None:
        self.check_taken(self.map.overlapping(where), self.in_model(where))

    @rule()
    def replace_values(self) -> None:
        self.map.replace_values(lambda value: value + 1000)
        self.model = {address: value + 1000 for address, value in self.model.items()}

    @rule(where=ranges)
    def copy_is_independent(self, where: Range) -> None:
        other = self.map.copy()
        assert list(other) == list(self.map)
        other.cut(where)
        other.replace_values(lambda value: -value)

    @invariant()
    def same_at_every_address(self) -> None:
        for address in range(SPACE + 2):
            found = self.map.get(address)
            assert (found[1] if found else None) == self.model.get(address)
            assert found is None or address in found[0]
            triple = self.map.find(address)
            assert (triple is None) == (found is None)
            if triple is not None and found is not None:
                assert triple == (found[0].start, found[0].end, found[1])

    @invariant()
    def in_order_and_disjoint(self) -> None:
        items = list(self.map)
        assert unroll(items) == self.model
        assert all(a.end <= b.start for (a, _), (b, _) in pairwise(items))
        assert len(self.map) == len(items)
        assert all(where for where, _ in items)

    @invariant()
    def what_ends_before(self) -> None:
        for address in range(SPACE + 2):
            ended = [item for item in self.map if item[0].end <= address]
            assert self.map.before(address) == (ended[-1] if ended else None)


def unroll(items: list[tuple[Range, int]]) -> dict[int, int]:
    """The same as a dict of single addresses."""
    return {a: value for where, value in items for a in range(where.start, where.end)}


RangeMapTest = RangeMapMachine.TestCase
RangeMapTest.settings = settings(max_examples=EXAMPLES, stateful_step_count=25)


# --- PageSet ---------------------------------------------------------------------------

#: Pages at both sides of two borders between chunks, so that few steps meet them often.
BORDERS = (0, CHUNK_PAGES, 2 * CHUNK_PAGES)
page_numbers = st.one_of(
    st.sampled_from(BORDERS).flatmap(lambda n: st.integers(max(n - 8, 0), n + 8)),
    st.integers(0, 2 * CHUNK_PAGES + 8),
)
page_ranges = st.tuples(page_numbers, page_numbers).map(
    lambda pair: Range.between(min(pair) * PAGE_SIZE, max(pair) * PAGE_SIZE)
)


def numbers(where: Range) -> set[int]:
    """The numbers of the pages of an aligned range."""
    return set(range(where.start // PAGE_SIZE, where.end // PAGE_SIZE))


class PageSetMachine(RuleBasedStateMachine):
    """A PageSet beside a set of page numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = PageSet()
        self.model: set[int] = set()

    @rule(where=page_ranges)
    def add(self, where: Range) -> None:
        self.pages.add(where)
        self.model |= numbers(where)

    @rule(where=page_ranges)
    def discard(self, where: Range) -> None:
        self.pages.discard(where)
        self.model -= numbers(where)

    @rule(where=page_ranges, to=page_numbers)
    def move(self, where: Range, to: int) -> None:
        """Moves may overlap themselves."""
        self.pages.move(where, to * PAGE_SIZE)
        distance = to - where.start // PAGE_SIZE
        carried = {page + distance for page in self.model & numbers(where)}
        self.model -= numbers(where)
        self.model -= {page + distance for page in numbers(where)}
        self.model |= carried

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def poke_a_hole(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.model)))
        self.discard(Range(page * PAGE_SIZE, PAGE_SIZE))

    @rule(where=page_ranges)
    def runs_and_gaps(self, where: Range) -> None:
        runs, gaps = list(self.pages.runs(where)), list(self.pages.gaps(where))
        for found, expected in (
            (runs, self.model & numbers(where)),
            (gaps, numbers(where) - self.model),
        ):
            listed = [page for run in found for page in sorted(numbers(run))]
            assert listed == sorted(expected)
            # Longest runs: no two touch.
            assert all(a.end < b.start for a, b in pairwise(found))
        assert self.pages.overlaps(where) == bool(runs)

    @rule(where=page_ranges)
    def copy_is_independent(self, where: Range) -> None:
        other = self.pages.copy()
        assert len(other) == len(self.pages)
        other.discard(where)
        other.add(where.moved(PAGE_SIZE))

    @rule(page=page_numbers, inside=st.integers(0, PAGE_SIZE - 1))
    def holds(self, page: int, inside: int) -> None:
        """Any address within a page stands for it."""
        assert (page * PAGE_SIZE + inside in self.pages) == (page in self.model)

    @invariant()
    def same_size(self) -> None:
        assert len(self.pages) == len(self.model)
        assert bool(self.pages) == bool(self.model)


PageSetTest = PageSetMachine.TestCase
PageSetTest.settings = settings(max_examples=EXAMPLES, stateful_step_count=20)


@pytest.mark.parametrize("where", [Range(1, PAGE_SIZE), Range(0, PAGE_SIZE + 1)])
def test_page_set_refuses_parts_of_pages(where: Range) -> None:
    """Half a page is neither in nor out."""
    for call in (PageSet().add, PageSet().discard, PageSet().overlaps):
        with pytest.raises(ValueError, match="not aligned"):
            call(where)


def test_page_set_move_to_half_a_page_changes_nothing() -> None:
    """A refused move leaves the set as it was."""
    pages = PageSet()
    pages.add(Range(0, PAGE_SIZE))
    with pytest.raises(ValueError, match="not aligned"):
        pages.move(Range(0, PAGE_SIZE), PAGE_SIZE + 1)
    assert 0 in pages


def test_page_set_full_chunks_cost_no_bitmap() -> None:
    """Full chunks share one integer, however they became full."""
    pages = PageSet()
    pages.add(Range(0, 3 * _CHUNK_BYTES))
    pages.add(Range(3 * _CHUNK_BYTES, _CHUNK_BYTES // 2))
    pages.add(Range(3 * _CHUNK_BYTES + _CHUNK_BYTES // 2, _CHUNK_BYTES // 2))
    assert len({id(bits) for bits in pages._chunks.values()}) == 1


def test_page_set_asks_nothing_of_what_it_does_not_hold() -> None:
    """A range of half the address space costs what is held in it, not what it spans."""

    class Counted(dict[int, int]):
        looked = 0

        def __contains__(self, chunk: object) -> bool:
            self.looked += 1
            assert self.looked < 100, "it goes over the range, not over what is held"
            return super().__contains__(chunk)

    pages = PageSet()
    pages._chunks = Counted()
    first, last = Range(PAGE_SIZE, PAGE_SIZE), Range((1 << 47) - PAGE_SIZE, PAGE_SIZE)
    pages.add(first)
    pages.add(last)
    everything = Range(0, 1 << 47)
    assert list(pages.runs(everything)) == [first, last]
    assert pages.overlaps(everything)
    pages.discard(everything)
    assert not pages


def test_an_empty_range_takes_no_place() -> None:
    """Setting nothing changes nothing."""
    ranges: RangeMap[str] = RangeMap()
    assert ranges.set(Range(4096, 0), "nobody") == []
    assert not len(ranges)


def test_an_empty_range_overlaps_nothing_wherever_it_lies() -> None:
    """Inside a range, at its ends and outside of it."""
    numbers: RangeMap[int] = RangeMap()
    numbers.set(Range(PAGE_SIZE, 2 * PAGE_SIZE), 1)
    for start in range(0, 5 * PAGE_SIZE, PAGE_SIZE):
        assert numbers.overlapping(Range(start, 0)) == []
        assert numbers.cut(Range(start, 0)) == []
    assert len(numbers) == 1


def test_a_set_is_kept_and_made_again_by_its_chunks() -> None:
    """What chunks() gives makes the same set, on top of what is there; nonsense is refused."""
    pages = PageSet()
    pages.add(Range(0, 3 * PAGE_SIZE))
    pages.add(Range(CHUNK_PAGES * PAGE_SIZE, CHUNK_PAGES * PAGE_SIZE))
    again = PageSet()
    again.add(Range(5 * PAGE_SIZE, PAGE_SIZE))
    for number, bits in pages.chunks():
        again.add_chunk(number, bits)
    pages.add(Range(5 * PAGE_SIZE, PAGE_SIZE))
    assert dict(again.chunks()) == dict(pages.chunks())
    assert (again.bits(0), again.bits(7)) == (0b100111, 0)
    for bits in (0, 1 << CHUNK_PAGES):
        with pytest.raises(ValueError, match="bitmap"):
            again.add_chunk(0, bits)
