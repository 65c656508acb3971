"""The log of touches: how it grows, what it knows, and what is left of it when it is filtered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.testing.touch_log import TouchLog
from aiouffd.testing.touches import Access, Touch
from tests.touching import HISTORIES, PACKET, PAGE, RING, THREADS, FakeRegion, place, touch

pytestmark = pytest.mark.once


def log(touches: list[Touch], *, every: bool = False) -> TouchLog:
    return TouchLog(touches, regions=(PACKET, RING), threads=THREADS, every=every)


def test_it_is_a_sequence() -> None:
    """Of touches, in the order in which they were added."""
    touches = [touch(1, 0), touch(2, PAGE), touch(5, 0, Access.WRITE)]
    mine = log(touches)
    assert list(mine) == touches
    assert len(mine) == 3
    assert mine[-1] == touches[-1]
    assert list(mine[1:]) == touches[1:]
    assert mine[1:].openers == (touches[0],)
    assert touches[1] in mine
    assert repr(mine) == "<TouchLog of first touches: 3 by 1 threads>"


def test_a_touch_gets_its_outcome_later() -> None:
    """The one with the same number is replaced, in its place."""
    mine = log([touch(1, 0), touch(2, 0, Access.WRITE)])
    mine.add(dataclasses.replace(touch(1, 0), outcome="frozen", waited_ns=5000))
    assert [(each.number, each.outcome) for each in mine] == [(1, "frozen"), (2, "passed")]


def test_who_iterates_has_what_was_there() -> None:
    """Touches that come meanwhile are not among them."""
    mine = log([touch(1, 0)])
    for each in mine:
        mine.add(touch(each.number + 1, PAGE))
    assert len(mine) == 2


def test_names_may_come_later() -> None:
    """Of pages and threads; lines have them then."""
    mine = TouchLog([touch(1, PAGE + 5)], began_ns=0)
    assert mine.describe(mine[0]) == "#1 +1.001 ms  tid 11 reads packet[1]+0x5 (user mode)"
    mine.add_region(PACKET)
    mine.name_thread(11, "parser")
    line = "#1 +1.001 ms  parser (tid 11) reads packet[body]+0x5 (user mode)"
    assert mine.describe(mine[0]) == line
    assert mine.regions == (PACKET,)


def test_time_is_counted_from_the_first_touch() -> None:
    """Unless it was said from when; a part of the log counts as the whole does."""
    assert TouchLog().began_ns == 0
    mine = log([touch(1, 0), touch(2, 0, thread=12)])
    assert mine.began_ns == 1_001_000
    assert mine.of(thread=12).began_ns == 1_001_000


def test_pages_and_threads_are_listed() -> None:
    """In the order of their first touches, with their names."""
    mine = log([touch(1, PAGE), touch(2, 0, thread=13), touch(3, PAGE + 1), touch(4, 3 * PAGE)])
    assert [str(each) for each in mine.pages()] == ["packet[body]", "packet[header]", "packet[3]"]
    assert [str(each) for each in mine.threads()] == ["parser (tid 11)", "tid 13"]


class Child:
    """What a child program shows of itself."""

    pid = 20


FILTERS: dict[str, tuple[Callable[[TouchLog], TouchLog], Callable[[Touch], bool]]] = {
    "region": (lambda all_: all_.of(region="ring"), lambda each: each.region == "ring"),
    "region object": (
        lambda all_: all_.of(FakeRegion("ring", 2 * PAGE)),
        lambda each: each.region == "ring",
    ),
    "page by number": (lambda all_: all_.of(page=1), lambda each: each.page == 1),
    "page by name": (
        lambda all_: all_.of(page="body"),
        lambda each: (each.region, each.page) == ("packet", 1),
    ),
    "two places": (
        lambda all_: all_.of("body", "ring[header]"),
        lambda each: (each.region, each.page) in {("packet", 1), ("ring", 0)},
    ),
    "bytes": (
        lambda all_: all_.of(place(PACKET, 100, PAGE)),
        lambda each: each.region == "packet" and 100 <= each.offset < PAGE + 100,
    ),
    "thread": (lambda all_: all_.of(thread="writer"), lambda each: each.thread == 12),
    "process": (lambda all_: all_.of(process=20), lambda each: each.process == 20),
    "process object": (lambda all_: all_.of(process=Child()), lambda each: each.process == 20),
    "access": (lambda all_: all_.of(access="write"), lambda each: each.access is Access.WRITE),
    "any access": (lambda all_: all_.of(access="any"), lambda _: True),
    "several": (
        lambda all_: all_.of("packet", thread=11, access=Access.READ),
        lambda each: each.region == "packet" and each.thread == 11 and each.access is Access.READ,
    ),
}


@given(HISTORIES)
@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_picks_what_it_says(name: str, history: list[Touch]) -> None:
    """And nothing else, in the same order, with the same names."""
    pick, holds = FILTERS[name]
    picked = pick(log(history))
    assert list(picked) == [each for each in history if holds(each)]
    assert (picked.regions, picked.thread_names) == ((PACKET, RING), THREADS)
    assert not set(picked.openers) & set(picked)


@given(HISTORIES, st.sampled_from([11, 12, 13]))
def test_filters_follow_one_another(history: list[Touch], thread: int) -> None:
    """In whatever order, what is left and what is hidden is the same."""
    whole = log(history)
    one = whole.of("packet").of(thread=thread)
    other = whole.of(thread=thread).of("packet")
    assert list(one) == list(other) == list(whole.of("packet", thread=thread))
    assert set(one.openers) == set(other.openers)


def test_a_name_that_nothing_has_is_refused() -> None:
    """Rather than give an empty log, of which anything holds."""
    mine = log([touch(1, 0)])
    with pytest.raises(ValueError, match="no page here is named 'tail': there are header, body"):
        mine.of(page="tail")
    with pytest.raises(ValueError, match="nothing here is named 'socket'"):
        mine.of(region="socket")
    with pytest.raises(ValueError, match="no thread here is named 'reader'"):
        mine.of(thread="reader")
    with pytest.raises(ValueError, match="an access is read, write or any, not 'execute'"):
        mine.of(access="execute")


def test_of_many_touches_only_the_first_are_shown() -> None:
    """A message of thousands of lines helps nobody."""
    lines = log([]).lines([touch(number, 0) for number in range(1, 1001)])
    assert len(lines) == 21
    assert lines[-1] == "  ... and 980 more"
