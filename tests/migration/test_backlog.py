"""What is to be sent and what is in doubt: nothing is left out, whatever breaks when."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aiouffd.migration.backlog import Backlog, InDoubt, Taken
from aiouffd.migration.wire import Extent
from tests.migration.frames import PAGE

EXTENTS = [
    Extent("a", 40 * PAGE, PAGE),
    Extent("b", 1 * PAGE, PAGE),
    Extent("c", 24 * PAGE, 4 * PAGE),
    Extent("large", 5000 * PAGE, PAGE),  # reaches over two chunks of a PageSet
]

#: A page: region, number of the page.
Page = tuple[int, int]


def pages_of(taken: Taken) -> list[Page]:
    return [
        (taken.region, page)
        for offset, length in taken.runs
        for page in range(offset // PAGE, (offset + length) // PAGE)
    ]


def runs_of(pages: Iterable[Page]) -> list[tuple[int, int, int]]:
    """Join pages that lie one behind the other."""
    found: list[tuple[int, int, int]] = []
    for region, page in sorted(pages):
        if found and found[-1][0] == region and sum(found[-1][1:]) == page * PAGE:
            found[-1] = region, found[-1][1], found[-1][2] + PAGE
        else:
            found.append((region, page * PAGE, PAGE))
    return found


@st.composite
def places(draw: st.DrawFn) -> tuple[int, int, int]:
    region = draw(st.integers(0, len(EXTENTS) - 1))
    extent = EXTENTS[region]
    count = extent.length // extent.page_size
    first = draw(st.integers(0, count - 1))
    many = draw(st.integers(1, count - first) | st.integers(1, min(count - first, 3)))
    return region, first * extent.page_size, many * extent.page_size


@given(st.lists(places()), st.lists(places()))
def test_many_runs_are_put_in_as_one_by_one(
    before: list[tuple[int, int, int]], runs: list[tuple[int, int, int]]
) -> None:
    """In any order, over what is there, across chunks and regions."""
    one, many = Backlog(EXTENTS), Backlog(EXTENTS)
    for each in before:
        one.add(*each)
        many.add(*each)
    for each in runs:
        one.add(*each)
    many.add_runs(runs)
    assert many.bytes == one.bytes
    assert list(many.runs()) == list(one.runs())


class Sending(RuleBasedStateMachine):
    """A source with one connection, against sets of pages.

    A page is in the backlog, in doubt, or there; one that was written is in the backlog again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backlog, self.in_doubt = Backlog(EXTENTS), InDoubt()
        self.left: set[Page] = set()
        self.sent: list[tuple[int, list[Page], int]] = []  # number, pages, size
        self.arrived: set[Page] = set()
        self.number = 0

    @rule(place=places())
    def write(self, place: tuple[int, int, int]) -> None:
        region, offset, length = place
        pages = set(pages_of(Taken(region, [(offset, length)])))
        assert self.backlog.add(region, offset, length) == len(pages - self.left) * PAGE
        self.left |= pages

    @rule()
    def write_all(self) -> None:
        self.backlog.add_all()
        for region, extent in enumerate(EXTENTS):
            self.left |= {(region, page) for page in range(extent.length // PAGE)}

    @rule(place=places())
    def demand(self, place: tuple[int, int, int]) -> None:
        """What is waited for leaves the backlog and goes at once."""
        region, offset, length = place
        pages = set(pages_of(Taken(region, [(offset, length)])))
        assert self.backlog.discard(region, offset, length) == len(pages & self.left) * PAGE
        self.left -= pages
        self.send(Taken(region, [(offset, length)]))
        self.backlog.near(
            region, offset + length if offset + length < EXTENTS[region].length else 0
        )

    @rule(
        most_bytes=st.integers(1, 64).map(lambda pages: pages * 4 * PAGE),
        most_runs=st.integers(1, 5),
    )
    def take(self, most_bytes: int, most_runs: int) -> None:
        taken = self.backlog.take(most_bytes, most_runs)
        if not self.left:
            assert taken is None
            return
        assert taken is not None
        page_size = EXTENTS[taken.region].page_size
        pages = pages_of(taken)
        assert 0 < len(taken.runs) <= most_runs
        assert 0 < len(pages) * PAGE <= most_bytes
        assert all(offset % page_size == length % page_size == 0 for offset, length in taken.runs)
        # In order, and joined as far as may be.
        assert all(
            offset + length < after
            for (offset, length), (after, _) in zip(taken.runs, taken.runs[1:], strict=False)
        )
        assert set(pages) <= self.left
        self.left -= set(pages)
        self.send(taken)

    def send(self, taken: Taken) -> None:
        self.number += 1 + self.number % 3
        size = 36 + len(pages_of(taken)) * PAGE
        self.in_doubt.add(self.number, taken, size, now=self.number / 2)
        self.sent.append((self.number, pages_of(taken), size))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, self.number + 1))
        landed = [each for each in self.sent if each[0] <= number]
        assert list(self.in_doubt.landed(number)) == [
            (size, number / 2) for number, _, size in landed
        ]
        self.sent = self.sent[len(landed) :]
        for _, pages, _ in landed:
            self.arrived |= set(pages)

    @rule()
    def break_off(self) -> None:
        """What may not have arrived is to be sent again."""
        again = self.in_doubt.give_back()
        assert [pages_of(taken) for taken in again] == [pages for _, pages, _ in self.sent]
        for taken in again:
            for offset, length in taken.runs:
                self.backlog.add(taken.region, offset, length)
        self.left |= {page for _, pages, _ in self.sent for page in pages}
        self.sent.clear()

    @invariant()
    def nothing_is_left_out(self) -> None:
        assert self.backlog.bytes == len(self.left) * PAGE
        assert list(self.backlog.runs()) == runs_of(self.left)
        assert len(self.in_doubt) == len(self.sent)
        assert self.in_doubt.bytes == sum(size for _, _, size in self.sent)

    def teardown(self) -> None:
        """All of it goes in the end."""
        for _ in range(10_000):
            taken = self.backlog.take(1 << 20, 100)
            if taken is None:
                break
            self.left -= set(pages_of(taken))
        assert not self.left


Sending.TestCase.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
TestSending = Sending.TestCase


def test_an_empty_one_has_nothing() -> None:
    """Nor has one of no regions."""
    for backlog in (Backlog(EXTENTS), Backlog([])):
        assert backlog.take(1 << 20, 10) is None
        assert list(backlog.runs()) == []
        assert not backlog.bytes


def test_taking_goes_on_around_the_last_demand() -> None:
    """A little before it, on to the end, and round."""
    backlog = Backlog([Extent("a", 100 * PAGE, PAGE), Extent("b", PAGE, PAGE)])
    backlog.add_all()
    backlog.near(0, 50 * PAGE)
    order: list[Page] = []
    while (taken := backlog.take(PAGE, 1)) is not None:
        order += pages_of(taken)
    assert order == [*((0, page) for page in range(34, 100)), (1, 0), *((0, n) for n in range(34))]


@pytest.mark.parametrize("where", [0, PAGE, 3 * PAGE, 100 * PAGE])
def test_before_the_beginning_there_is_nothing(where: int) -> None:
    """Nor behind the end: taking goes round."""
    backlog = Backlog([Extent("a", 100 * PAGE, 4 * PAGE)])
    backlog.add_all()
    backlog.near(0, where)
    taken = backlog.take(1 << 30, 1)
    assert taken is not None
    assert taken.runs[0][0] == max(where - 16 * PAGE, 0) // (4 * PAGE) * (4 * PAGE)


def test_less_than_a_page_of_a_region_is_not_taken() -> None:
    """Whole pages, of its own size."""
    backlog = Backlog([Extent("a", 16 * PAGE, 4 * PAGE)])
    backlog.add_all()
    taken = backlog.take(7 * PAGE, 10)
    assert taken == Taken(0, [(0, 4 * PAGE)])
