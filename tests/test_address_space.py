"""The books of a target's address space, against a naive model: a dict of single pages."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aiouffd.address_space import AddressSpace, PageState
from aiouffd.ranges import PAGE_SIZE, Range

SPACE = 32  # units of addresses
EXAMPLES = settings().max_examples * 2 // 5  # each is many steps


@dataclass(frozen=True)
class Page:
    """What the model knows of one page."""

    region: int
    offset: int
    removed: bool = False
    vacated: bool = False


@dataclass
class Model:
    """One address space: its pages and flights by address."""

    pages: dict[int, Page] = field(default_factory=dict)
    flights: dict[int, str] = field(default_factory=dict)


Space = AddressSpace[int, str]


class Machine(RuleBasedStateMachine):
    """Registrations, events, growth, forks and faults, at any address and of any length."""

    unit_pages = 1  # the page size of the memory, in pages

    def __init__(self) -> None:
        super().__init__()
        self.unit = self.unit_pages * PAGE_SIZE
        self.space: Space = AddressSpace()
        self.model = Model()
        self.forked: list[tuple[Space, Model]] = []
        self.count = 0

    # --- drawing -------------------------------------------------------------------------

    def where(self, ends: tuple[int, int]) -> Range:
        return Range.between(min(ends) * self.unit, max(ends) * self.unit)

    def parts(self, where: Range) -> range:
        return range(where.start, where.end, PAGE_SIZE)

    def take(self, *where: Range) -> list[str]:
        taken = [a for r in where for a in self.model.flights if a in r]
        return [self.model.flights.pop(a) for a in dict.fromkeys(taken)]

    ends = st.tuples(st.integers(0, SPACE), st.integers(0, SPACE))

    # --- registration --------------------------------------------------------------------

    @rule(ends=ends, offset=st.integers(0, 8))
    def register(self, ends: tuple[int, int], offset: int) -> None:
        where = self.where(ends)
        self.count += 1
        taken = self.space.register(where, self.count, offset * self.unit, self.unit)
        assert taken == self.take(where)
        for address in self.parts(where):
            place = offset * self.unit + address - where.start
            self.model.pages[address] = Page(self.count, place)

    @rule(ends=ends)
    def drop(self, ends: tuple[int, int]) -> None:
        where = self.where(ends)
        assert self.space.drop(where) == self.take(where)
        self.forget(where)

    @rule(ends=ends)
    def unmap(self, ends: tuple[int, int]) -> None:
        where = self.where(ends)
        assert self.space.unmap(where) == self.take(where)
        self.forget(where)

    def forget(self, where: Range) -> None:
        for address in self.parts(where):
            self.model.pages.pop(address, None)

    # --- events --------------------------------------------------------------------------

    @rule(ends=ends, ragged=st.booleans())
    def remove(self, ends: tuple[int, int], ragged: bool) -> None:
        where = self.where(ends)
        asked = Range(where.start + 1, where.length - 2) if ragged and where else where
        affected = self.space.remove(asked)
        assert affected == [f for a, f in self.model.flights.items() if a in where]
        for address in self.parts(where):
            if page := self.model.pages.get(address):
                self.model.pages[address] = Page(page.region, page.offset, True, page.vacated)

    @rule(start=st.integers(0, SPACE), to=st.integers(0, SPACE), length=st.integers(0, SPACE))
    def remap(self, start: int, to: int, length: int) -> None:
        """Also onto itself in part, which no kernel does."""
        old = Range(start * self.unit, length * self.unit)
        new = Range(to * self.unit, length * self.unit)
        taken = self.space.remap(old.start, new.start, old.length)
        assert sorted(taken) == sorted(self.take(old, new))
        pages = self.model.pages
        moving = {a: pages[a] for a in self.parts(old) if a in pages}
        for address, page in moving.items():
            pages[address] = Page(page.region, page.offset, removed=True, vacated=True)
        self.forget(new)
        for address, page in moving.items():
            pages[address + new.start - old.start] = page

    @rule(start=st.integers(0, SPACE), to=st.integers(0, SPACE), length=st.integers(0, SPACE))
    def remap_as_the_kernel_tells(self, start: int, to: int, length: int) -> None:
        """A plain mremap: the target range is unmapped, moved to, and the old one unmapped."""
        old, new = (Range(at * self.unit, length * self.unit) for at in (start, to))
        if not old.overlaps(new):
            self.space.unmap(new)
            self.space.remap(old.start, new.start, old.length)
            self.space.unmap(old)
            self.take(old, new)
            pages = self.model.pages
            moving = {a: pages[a] for a in self.parts(old) if a in pages}
            self.forget(new)
            self.forget(old)
            for address, page in moving.items():
                pages[address + new.start - old.start] = page

    @rule(at=st.integers(0, SPACE + 4))
    def grow(self, at: int) -> None:
        address = at * self.unit + 1
        page_address = at * self.unit
        before = [a for a in self.model.pages if a < page_address]
        if page_address in self.model.pages or not before:
            assert self.space.growth(address) is None
            return
        last = max(before)
        page = self.model.pages[last]
        assert self.space.growth(address) == page.region
        self.space.grow(address)
        for tail in range(last + PAGE_SIZE, page_address + self.unit, PAGE_SIZE):
            offset = page.offset + tail - last
            self.model.pages[tail] = Page(page.region, offset, True, page.vacated)

    # --- forks ---------------------------------------------------------------------------

    @precondition(lambda self: len(self.forked) < 3)
    @rule()
    def fork(self) -> None:
        """The child starts with the same pages and nothing in flight."""
        self.forked.append((self.space.fork(), Model(dict(self.model.pages))))

    @precondition(lambda self: self.forked)
    @rule(which=st.integers(0, 2))
    def go_on_with_another(self, which: int) -> None:
        """Whatever parent and child do from here on, they do apart."""
        which %= len(self.forked)
        other = self.forked[which]
        self.forked[which] = (self.space, self.model)
        self.space, self.model = other

    # --- faults --------------------------------------------------------------------------

    @rule(at=st.integers(0, SPACE))
    def begin(self, at: int) -> None:
        """Also where nothing is registered: such faults are in flight too."""
        address = at * self.unit
        if address not in self.model.flights:
            self.count += 1
            flight = f"flight {self.count:06}"
            self.model.flights[address] = flight
            self.space.in_flight[address] = flight

    @rule(at=st.integers(0, SPACE))
    def end(self, at: int) -> None:
        address = at * self.unit
        flight = self.model.flights.pop(address, None)
        assert self.space.in_flight.pop(address, None) == flight

    # --- comparing -----------------------------------------------------------------------

    @rule(data=st.data(), offset=st.integers(0, SPACE), length=st.integers(1, SPACE))
    def addresses(self, data: st.DataObject, offset: int, length: int) -> None:
        """Where a stretch of a source lies now, whatever was the address at first."""
        regions = sorted({page.region for page in self.model.pages.values()})
        if regions:
            region = data.draw(st.sampled_from(regions))
            hint = data.draw(st.integers(-8, SPACE)) * self.unit
            wanted = Range(offset * self.unit, length * self.unit)
            found = self.space.addresses(region, wanted.start, wanted.length, hint)
            if self.space.lies_at(region, wanted.start, wanted.length, hint):
                assert found == [wanted.moved(hint)]
            assert [a for where in found for a in self.parts(where)] == sorted(
                address
                for address, page in self.model.pages.items()
                if page.region == region and page.offset in wanted and not page.vacated
            )

    @invariant()
    def same_pages(self) -> None:
        for address in range(0, (SPACE + 6) * self.unit * 2, PAGE_SIZE):
            page = self.model.pages.get(address)
            found = self.space.find(address + 7)
            if page is None:
                assert found is None
                assert self.space.state(address) is PageState.UNREGISTERED
                with pytest.raises(LookupError):
                    self.space.delta(address)
                assert address not in self.space.removed
                continue
            assert found is not None
            start, end, placement = found
            assert start <= address < end
            assert (placement.region, placement.vacated) == (page.region, page.vacated)
            assert placement.page_size == -placement.mask == self.unit
            assert address + placement.delta == page.offset
            assert self.space.delta(address) == placement.delta
            assert (address in self.space.removed) == page.removed
            state = PageState.REMOVED if page.removed else PageState.SERVED
            if address & -self.unit in self.model.flights:
                state = PageState.IN_FLIGHT
            assert self.space.state(address + 7) is state

    @invariant()
    def same_flights(self) -> None:
        assert list(self.space.in_flight.items()) == list(self.model.flights.items())

    @invariant()
    def same_ranges(self) -> None:
        for region in {page.region for page in self.model.pages.values()}:
            own = {a: p for a, p in self.model.pages.items() if p.region == region}
            everything = [a for where in self.space.all_of(region) for a in self.parts(where)]
            assert everything == sorted(own)
            now = {
                where.start + at: offset + at
                for where, offset in self.space.ranges_of(region)
                for at in range(0, where.length, PAGE_SIZE)
            }
            assert now == {a: p.offset for a, p in own.items() if not p.vacated}


class HugeMachine(Machine):
    """The same for memory whose pages are twice as large."""

    unit_pages = 2


SmallPagesTest = Machine.TestCase
HugePagesTest = HugeMachine.TestCase
SmallPagesTest.settings = HugePagesTest.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=20
)


# --- one by one ------------------------------------------------------------------------


def pages(first: int, count: int) -> Range:
    return Range(first * PAGE_SIZE, count * PAGE_SIZE)


@pytest.fixture
def space() -> Space:
    """Region 1 at pages 4 to 12, from offset 0 of its source."""
    space: Space = AddressSpace()
    space.register(pages(4, 8), 1, 0, PAGE_SIZE)
    return space


def test_a_placement_passes_to_another_region(space: Space) -> None:
    """As for a forked child, whose books start as a copy: the parent's stay as they were."""
    child = space.fork()
    child.placements.replace_values(lambda placement: placement.served_by(2))
    assert child.ranges_of(2) == space.ranges_of(1) == [(pages(4, 8), 0)]
    assert child.ranges_of(1) == space.ranges_of(2) == []


def test_a_remap_carries_offsets_and_removed_pages_along(space: Space) -> None:
    """A page keeps its place in the source; what read zero reads zero at the new address."""
    space.remove(pages(5, 1))
    space.remap(4 * PAGE_SIZE, 100 * PAGE_SIZE, 8 * PAGE_SIZE)
    assert space.ranges_of(1) == [(pages(100, 8), 0)]
    assert list(space.removed.runs(pages(100, 8))) == [pages(101, 1)]


def test_what_was_moved_away_reads_zero(space: Space) -> None:
    """With MREMAP_DONTUNMAP the old range stays registered, as empty memory."""
    space.remap(4 * PAGE_SIZE, 100 * PAGE_SIZE, 8 * PAGE_SIZE)
    assert space.state(4 * PAGE_SIZE) is PageState.REMOVED
    assert space.all_of(1) == [pages(4, 8), pages(100, 8)]


def test_filling_follows_the_memory_to_where_it_was_moved(space: Space) -> None:
    """The address at registration is only a hint."""
    hint = 4 * PAGE_SIZE
    assert space.lies_at(1, PAGE_SIZE, PAGE_SIZE, hint)
    assert space.addresses(1, PAGE_SIZE, PAGE_SIZE, hint) == [pages(5, 1)]
    space.remap(4 * PAGE_SIZE, 100 * PAGE_SIZE, 8 * PAGE_SIZE)
    assert not space.lies_at(1, PAGE_SIZE, PAGE_SIZE, hint)
    assert space.addresses(1, PAGE_SIZE, PAGE_SIZE, hint) == [pages(101, 1)]


def test_registering_anew_hands_back_what_was_in_flight(space: Space) -> None:
    """A fault on what was there before must not be answered into the new memory."""
    space.in_flight[5 * PAGE_SIZE] = "old"
    assert space.register(pages(4, 8), 2, 0, PAGE_SIZE) == ["old"]
    assert not space.in_flight


def test_removing_leaves_faults_in_flight(space: Space) -> None:
    """Their threads wait still, for zeros now."""
    space.in_flight[5 * PAGE_SIZE] = "waits"
    assert space.remove(pages(5, 1)) == ["waits"]
    assert space.in_flight == {5 * PAGE_SIZE: "waits"}


def test_nothing_to_grow(space: Space) -> None:
    """Below the first range there is nothing whose growth an address could be."""
    assert space.growth(0) is None
    with pytest.raises(ValueError, match="nothing before 0x0"):
        space.grow(0)


def test_growth_makes_no_list_of_pages(space: Space) -> None:
    """What grows a page at a time stays one stretch."""
    for page in range(12, 100):
        space.grow(page * PAGE_SIZE)
    assert space.ranges_of(1) == [(pages(4, 96), 0)]
    assert list(space.removed.runs(pages(0, 200))) == [pages(12, 88)]


def test_what_changes_the_layout_grows_the_epoch(space: Space) -> None:
    """Removing pages moves nothing."""
    epoch = space.epoch
    space.remove(pages(5, 1))
    assert space.epoch == epoch
    for change in (
        lambda: space.remap(4 * PAGE_SIZE, 100 * PAGE_SIZE, PAGE_SIZE),
        lambda: space.grow(200 * PAGE_SIZE),
        lambda: space.unmap(pages(5, 1)),
        lambda: space.drop(pages(6, 1)),
        lambda: space.register(pages(6, 1), 2, 0, PAGE_SIZE),
    ):
        change()
        assert space.epoch > epoch
        epoch = space.epoch


def test_an_unmap_of_half_the_address_space() -> None:
    """The kernel reports the whole range of the system call, most of it never registered."""
    space: Space = AddressSpace()
    space.register(pages(4, 8), 1, 0, PAGE_SIZE)
    space.remove(pages(4, 2))
    space.unmap(Range(0, 1 << 47))
    assert not len(space.placements)
    assert not space.removed


def test_what_lies_elsewhere_is_no_address_of_a_stretch() -> None:
    """A region in two places: only the one that holds the wanted offsets is given."""
    space: AddressSpace[str, object] = AddressSpace()
    space.register(Range(16 * PAGE_SIZE, 4 * PAGE_SIZE), "region", 0, PAGE_SIZE)
    space.remap(18 * PAGE_SIZE, 64 * PAGE_SIZE, 2 * PAGE_SIZE)
    space.unmap(Range(18 * PAGE_SIZE, 2 * PAGE_SIZE))
    wanted = space.addresses("region", 2 * PAGE_SIZE, PAGE_SIZE, 16 * PAGE_SIZE)
    assert wanted == [Range(64 * PAGE_SIZE, PAGE_SIZE)]
