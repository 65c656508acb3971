"""Accesses that a test makes up, and what the kernel tells of them; places that look like ours."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from hypothesis import strategies as st

from aiouffd.testing.places import Layout
from aiouffd.testing.touches import OUTCOMES, Access, Touch

PAGE: Final = 4096
PACKET: Final = Layout("packet", 4, PAGE, {0: "header", 1: "body"})
RING: Final = Layout("ring", 2, PAGE, {0: "header", 1: "slots"})
THREADS: Final = {11: "parser", 12: "writer"}

#: Any touch whose byte lies in its page, with the size of that page.
ANY_TOUCH = st.builds(
    lambda page, page_size, byte, **rest: (
        Touch(page=page, offset=page * page_size + byte % page_size, **rest),
        page_size,
    ),
    page=st.integers(0, 1 << 20),
    page_size=st.sampled_from([4096, 16384, 65536, 2 << 20]),
    byte=st.integers(0, 1 << 21),
    number=st.integers(1, 1 << 40),
    time_ns=st.integers(0, 1 << 60),
    process=st.integers(1, 1 << 22),
    thread=st.integers(1, 1 << 22),
    region=st.text(min_size=1),
    access=st.sampled_from(Access),
    system_call=st.none() | st.integers(0, 500),
    pc=st.none() | st.integers(0, (1 << 64) - 1),
    where=st.text(),
    outcome=st.sampled_from(list(OUTCOMES)),
    waited_ns=st.integers(0, 1 << 50),
)


@dataclass(frozen=True)
class FakeRegion:
    """What a Region shows of itself."""

    name: str
    length: int


@dataclass(frozen=True)
class FakePlace:
    """What a Place shows of itself."""

    region: FakeRegion
    start: int
    length: int
    name: str | None = None


def place(layout: Layout, start: int, length: int, name: str | None = None) -> FakePlace:
    """Some bytes of a region."""
    return FakePlace(FakeRegion(layout.name, layout.length), start, length, name)


def touch(
    number: int,
    offset: int,
    access: Access = Access.READ,
    *,
    layout: Layout = PACKET,
    thread: int = 11,
    process: int = 10,
    waited_ns: int = 0,
) -> Touch:
    """A touch a microsecond after the one before."""
    return Touch(
        number=number,
        time_ns=1_000_000 + 1000 * number,
        process=process,
        thread=thread,
        region=layout.name,
        page=offset // layout.page_size,
        offset=offset,
        access=access,
        waited_ns=waited_ns,
    )


#: Everything that some threads do to two regions: what a record of every touch has.  Few bytes,
#: around the borders, so that threads meet.
HISTORIES = st.lists(
    st.tuples(
        st.sampled_from([PACKET, RING]),
        st.sampled_from([0, 99, 100, 3000, PAGE - 1, PAGE, PAGE + 7, 2 * PAGE, 3 * PAGE]),
        st.sampled_from(Access),
        st.sampled_from([11, 12, 13]),
    ),
    max_size=12,
).map(
    lambda accesses: [
        touch(
            at,
            offset % layout.length,
            access,
            layout=layout,
            thread=thread,
            process=20 if thread == 13 else 10,
        )
        for at, (layout, offset, access, thread) in enumerate(accesses, start=1)
    ]
)


def told(history: Iterable[Touch]) -> list[Touch]:
    """What the kernel tells of it: a page is brought protected for a read, open for a write."""
    is_open: dict[tuple[str, int], bool] = {}
    touches = []
    for each in history:
        page = (each.region, each.page)
        if page not in is_open or (each.access is Access.WRITE and not is_open[page]):
            touches.append(each)
            is_open[page] = each.access is Access.WRITE
    return touches
