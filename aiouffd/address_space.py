"""Who serves which address of a target now, which pages were removed, what is in flight.

Knows: registered ranges (as placements), removed pages, pages in flight; what fork, remap,
remove and unmap do to all three.
Must not know: the kernel, the event loop, what a handler is.

Laws of this file:

* A place in the source (offset) belongs to memory, not to an address: a remap carries both
  the placement and the removed pages along, and offsets do not change.
* A removed page reads zero until its memory is unmapped or registered anew; nothing else
  takes it out of the set.
* What an event puts out of date is handed back to the caller, never dropped here.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from .ranges import PAGE_SIZE, PageSet, Range, RangeMap, align_down, align_up

R = TypeVar("R")  # what serves: the pager's Region
F = TypeVar("F")  # what is in flight: the pager's Flight


class PageState(enum.Enum):
    """What is known of one page; whether it is present only the kernel knows."""

    UNREGISTERED = "unregistered"
    SERVED = "served"  #: a registered range holds it; it may be present or absent
    IN_FLIGHT = "in flight"
    REMOVED = "removed"  #: reads zero


@dataclass(frozen=True, slots=True)
class Placement(Generic[R]):
    """One stretch of addresses and who serves it.

    Attributes:
        region: Who serves.
        delta: Offset in the source minus address; a remap changes it.
        page_size: Of the memory, in bytes.
        mask: ``-page_size``: and'ed with an address it gives the page.
        vacated: The target has moved the memory away; if the addresses are mapped still
            (MREMAP_DONTUNMAP), they are empty memory.
    """

    region: R
    delta: int
    page_size: int
    mask: int
    vacated: bool = False

    def served_by(self, region: R) -> Placement[R]:
        """Give the same placement with another region."""
        return replace(self, region=region)


class AddressSpace(Generic[R, F]):
    """The books of one userfaultfd.

    Sharing: one thread.
    """

    def __init__(self) -> None:
        self.placements: RangeMap[Placement[R]] = RangeMap()
        self.removed = PageSet()
        self.in_flight: dict[int, F] = {}  # by page address, oldest first
        self.epoch = 0  # grows with every change of the layout

    # --- registration ------------------------------------------------------------------

    def register(self, where: Range, region: R, offset: int, page_size: int) -> list[F]:
        """Let a region serve a range; what was known of the range is forgotten.

        Args:
            where: Aligned to the page size.
            region: Who serves.
            offset: Where the range begins in the region's source, in bytes.
            page_size: Of the memory, in bytes.

        Returns:
            What was in flight there; it is taken out, to fault again.
        """
        self.epoch += 1
        self.placements.set(where, Placement(region, offset - where.start, page_size, -page_size))
        self.removed.discard(where)
        return self._take(where)

    def drop(self, where: Range) -> list[F]:
        """Forget a range.

        Returns:
            What was in flight there; it is taken out.
        """
        self.epoch += 1
        self.placements.cut(where)
        self.removed.discard(_whole_pages(where))
        return self._take(where)

    # --- looking up --------------------------------------------------------------------

    def find(self, address: int) -> tuple[int, int, Placement[R]] | None:
        """Give (start, end, placement) of the stretch that holds an address, or None."""
        return self.placements.find(address)

    def delta(self, address: int) -> int:
        """Give offset minus address where something is placed.

        Raises:
            LookupError: Nothing is placed there.
        """
        found = self.placements.find(address)
        if found is None:
            raise LookupError(f"no region holds {address:#x}")
        return found[2].delta

    def state(self, address: int) -> PageState:
        """Say what is known of the page at an address."""
        found = self.placements.find(address)
        if found is None:
            return PageState.UNREGISTERED
        page = address & found[2].mask
        if page in self.in_flight:
            return PageState.IN_FLIGHT
        return PageState.REMOVED if page in self.removed else PageState.SERVED

    def ranges_of(self, region: R) -> list[tuple[Range, int]]:
        """Give every stretch where a region's memory lies now, with its offset in the source."""
        return [
            (where, where.start + placement.delta)
            for where, placement in self.placements
            if placement.region is region and not placement.vacated
        ]

    def all_of(self, region: R) -> list[Range]:
        """Give every stretch that a region answers for, what was moved away included."""
        return [where for where, placement in self.placements if placement.region is region]

    def addresses(self, region: R, offset: int, length: int, hint: int) -> list[Range]:
        """Give where a stretch of a region's source lies in the target now, in order.

        Args:
            region: Who serves.
            offset: In the source, in bytes.
            length: In bytes.
            hint: Address minus offset when the region was registered: the usual answer.
        """
        if self.lies_at(region, offset, length, hint):
            return [Range(offset + hint, length)]
        wanted = Range(offset, length)
        result = []
        for where, start in self.ranges_of(region):
            part = Range(start, where.length).intersection(wanted)
            if part is not None:
                result.append(part.moved(where.start - start))
        return result

    def lies_at(self, region: R, offset: int, length: int, hint: int) -> bool:
        """Say whether a stretch of a region's source lies, whole, where it was registered.

        Args:
            region: As ``addresses``.
            offset: As ``addresses``.
            length: As ``addresses``.
            hint: As ``addresses``.
        """
        found = self.placements.find(offset + hint)
        if found is None:
            return False
        _, end, placement = found
        return (
            placement.region is region
            and placement.delta == -hint
            and not placement.vacated
            and offset + length + hint <= end
        )

    # --- events ------------------------------------------------------------------------

    def remove(self, where: Range) -> list[F]:
        """Note that the target freed pages: they read zero from now on.

        Returns:
            What was in flight there; it stays in flight, since its threads still wait.
        """
        where = _whole_pages(where)
        for part, _ in self.placements.overlapping(where):
            self.removed.add(part)
        return self._affected(where)

    def unmap(self, where: Range) -> list[F]:
        """Note that the target unmapped a range, registered or not.

        Returns:
            What was in flight there; it is taken out.
        """
        return self.drop(where)

    def remap(self, start: int, to: int, length: int) -> list[F]:
        """Note that the target moved memory; offsets and removed pages move along.

        The old range stays, as removed: with MREMAP_DONTUNMAP it is empty memory that is
        registered still; otherwise an unmap of it follows.

        Returns:
            What was in flight at either place; it is taken out, to fault again.
        """
        self.epoch += 1
        old, new = Range(start, length), Range(to, length)
        taken = self._take(old)
        taken += self._take(new)
        distance = to - start
        moving = self.placements.overlapping(old)
        self.placements.cut(new)
        for part, placement in moving:
            moved = replace(placement, delta=placement.delta - distance)
            self.placements.set(part.moved(distance), moved)
        self.removed.move(old, to)
        for rest in old.without(new):
            for part, placement in self.placements.overlapping(rest):
                self.placements.set(part, replace(placement, vacated=True))
                self.removed.add(part)
        return taken

    def growth(self, address: int) -> R | None:
        """Give the region whose memory an address in no known range would be the growth of.

        A growing mremap tells nothing of the new tail: only a fault there shows it.
        """
        before = self.placements.before(address)
        if before is None or self.placements.find(address) is not None:
            return None
        return before[1].region

    def grow(self, address: int) -> None:
        """Let the stretch before an address reach up to it, as memory that reads zero."""
        before = self.placements.before(address)
        if before is None:
            raise ValueError(f"there is nothing before {address:#x} that could grow")
        where, placement = before
        tail = Range.between(where.end, (address & placement.mask) + placement.page_size)
        self.epoch += 1
        # One stretch: memory that grows by a page at a time makes no list of pages.
        self.placements.set(Range.between(where.start, tail.end), placement)
        self.removed.add(tail)

    def fork(self) -> AddressSpace[R, F]:
        """Give the child's books: the same ranges and removed pages, nothing in flight."""
        child: AddressSpace[R, F] = AddressSpace()
        child.placements = self.placements.copy()
        child.removed = self.removed.copy()
        return child

    # --- in flight ---------------------------------------------------------------------

    def _affected(self, where: Range) -> list[F]:
        flights = self.in_flight
        return [flight for page, flight in flights.items() if page in where]

    def _take(self, where: Range) -> list[F]:
        flights = self.in_flight
        pages = [page for page in flights if page in where]
        return [flights.pop(page) for page in pages]


def _whole_pages(where: Range) -> Range:
    """Round outwards to whole pages; the kernel's events are aligned anyway."""
    start = align_down(where.start, PAGE_SIZE)
    return Range.between(start, align_up(where.end, PAGE_SIZE))
