"""Records: what is asserted of them against what really happened, their table, their files."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiouffd.testing.places import AnyPlace
from aiouffd.testing.record import Record, RecordMismatch
from aiouffd.testing.touches import Access, Touch
from tests.touching import HISTORIES, PACKET, PAGE, RING, THREADS, place, told, touch


def record(touches: list[Touch], *, every: bool = False) -> Record:
    return Record(touches, regions=(PACKET, RING), threads=THREADS, began_ns=0, every=every)


def mismatch(assertion: Callable[[], None]) -> RecordMismatch | None:
    """What an assertion raises; that is its whole effect."""
    try:
        assertion()
    except RecordMismatch as error:
        return error
    return None


# --- against what really happened --------------------------------------------------------

#: Places that are whole pages, parts of pages, and parts that are whole pages together.
PLACES: dict[str, tuple[AnyPlace, ...]] = {
    "region": ("packet",),
    "page": ("body",),
    "two pages": ("packet[header]", "ring[slots]"),
    "part": (place(PACKET, 0, 100),),
    "across": (place(PACKET, PAGE - 8, 16),),
    "halves": (place(PACKET, 0, 2048), place(PACKET, 2048, 2048)),
}


def inside(each: Touch, places: tuple[AnyPlace, ...]) -> bool:
    """Say it the slow way."""
    ranges = {
        "packet": ("packet", 0, 4 * PAGE),
        "body": ("packet", PAGE, 2 * PAGE),
        "packet[header]": ("packet", 0, PAGE),
        "ring[slots]": ("ring", PAGE, 2 * PAGE),
    }
    for one in places:
        if isinstance(one, str):
            region, start, end = ranges[one]
        else:
            region, start, end = "packet", one.start, one.start + one.length  # type: ignore[union-attr]
        if each.region == region and each.offset in range(start, end):
            return True
    return False


ASSERTIONS: dict[
    str, tuple[Callable[..., None], Callable[[list[Touch], tuple[AnyPlace, ...]], bool]]
] = {
    "touched only": (
        Record.assert_touched_only,
        lambda all_, places: all(inside(each, places) for each in all_),
    ),
    "untouched": (
        Record.assert_untouched,
        lambda all_, places: not any(inside(each, places) for each in all_),
    ),
    "never wrote": (
        Record.assert_never_wrote,
        lambda all_, places: (
            not any(inside(each, places) and each.access is Access.WRITE for each in all_)
        ),
    ),
}

#: Filters, and what is true of the touches that they pick.
PICKS: dict[str, tuple[Callable[[Record], Record], Callable[[Touch], bool]]] = {
    "all": (lambda whole: whole, lambda _: True),
    "a thread": (lambda whole: whole.of(thread=11), lambda each: each.thread == 11),
    "a process": (lambda whole: whole.of(process=10), lambda each: each.process == 10),
    "writes": (
        lambda whole: whole.of(access="write"),
        lambda each: each.access is Access.WRITE,
    ),
    "reads": (lambda whole: whole.of(access="read"), lambda each: each.access is Access.READ),
    "a thread's writes": (
        lambda whole: whole.of(thread=11, access="write"),
        lambda each: each.thread == 11 and each.access is Access.WRITE,
    ),
    "some bytes": (
        lambda whole: whole.of(place(PACKET, 0, 100)),
        lambda each: each.region == "packet" and each.offset < 100,
    ),
}


@pytest.mark.parametrize("name", ASSERTIONS)
@settings(max_examples=500)
@given(HISTORIES, st.sampled_from(sorted(PLACES)), st.sampled_from(sorted(PICKS)))
def test_what_first_touches_tell_is_true(
    name: str, history: list[Touch], where: str, who: str
) -> None:
    """An assertion that passes holds of everything that happened; one that fails says why.

    Where the first touches leave it open, it fails too, and says that it cannot tell.
    """
    assertion, truth = ASSERTIONS[name]
    places = PLACES[where]
    pick, holds = PICKS[who]
    is_true = truth([each for each in history if holds(each)], places)
    error = mismatch(lambda: assertion(pick(record(told(history))), *places))
    if error is None:
        assert is_true
    elif not str(error).startswith("cannot tell"):
        assert not is_true
        assert {*error.touches} <= {*history}
        assert error.touches


@pytest.mark.parametrize("name", ASSERTIONS)
@given(HISTORIES, st.sampled_from(sorted(PLACES)), st.sampled_from(sorted(PICKS)))
def test_of_every_touch_all_is_told(name: str, history: list[Touch], where: str, who: str) -> None:
    """A record of every touch decides each assertion, and rightly."""
    assertion, truth = ASSERTIONS[name]
    places = PLACES[where]
    pick, holds = PICKS[who]
    error = mismatch(lambda: assertion(pick(record(history, every=True)), *places))
    assert (error is None) == truth([each for each in history if holds(each)], places)


@pytest.mark.parametrize("name", ASSERTIONS)
@given(HISTORIES, st.sampled_from(["region", "page", "two pages", "halves"]))
def test_whole_pages_are_always_told(name: str, history: list[Touch], where: str) -> None:
    """First touches decide each assertion about whole pages and all threads."""
    assertion, truth = ASSERTIONS[name]
    error = mismatch(lambda: assertion(record(told(history)), *PLACES[where]))
    if where != "halves" or name == "touched only":  # what is left out is no whole page by itself
        assert (error is None) == truth(history, PLACES[where])


@given(
    HISTORIES,
    st.lists(
        st.tuples(
            st.sampled_from([None, 11, 12]),
            st.sampled_from([None, "packet", "body", "ring[slots]"]),
            st.sampled_from([None, "read", "write"]),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_an_order_is_found_if_there_is_one(
    history: list[Touch], patterns: list[tuple[int | None, str | None, str | None]]
) -> None:
    """Among all ways to pick so many touches in their order."""

    def fits(each: Touch, pattern: tuple[int | None, str | None, str | None]) -> bool:
        thread, where, access = pattern
        return (
            thread in (None, each.thread)
            and (where is None or inside(each, (where,)))
            and access in (None, each.access)
        )

    is_there = any(
        all(map(fits, picked, patterns)) for picked in combinations(history, len(patterns))
    )
    error = mismatch(lambda: record(history).assert_order(*patterns))
    assert (error is None) == is_there


@given(HISTORIES, st.integers(0, 6))
def test_pages_are_counted(history: list[Touch], most: int) -> None:
    """First touches are enough to count pages."""
    pages = {(each.region, each.page) for each in history}
    error = mismatch(lambda: record(told(history)).assert_at_most(pages=most))
    assert (error is None) == (len(pages) <= most)


@given(HISTORIES, st.integers(0, 6))
def test_pages_of_a_thread_are_counted_if_that_can_be_told(history: list[Touch], most: int) -> None:
    """Pages that another one opened may be its own, too."""
    pages = {(each.region, each.page) for each in history if each.thread == 11}
    error = mismatch(lambda: record(told(history)).of(thread=11).assert_at_most(pages=most))
    if error is None:
        assert len(pages) <= most
    elif not str(error).startswith("cannot tell"):
        assert len(pages) > most


# --- what it says ------------------------------------------------------------------------

SOME = [
    touch(1, 0),
    touch(2, PAGE + 5, thread=12),
    touch(3, 0, Access.WRITE),
    touch(4, 16, layout=RING, thread=13, process=20, waited_ns=2_500_000),
]


def test_a_touch_elsewhere_is_shown() -> None:
    """With what was allowed, in a few lines."""
    with pytest.raises(RecordMismatch) as info:
        record(SOME).assert_touched_only("packet[header]", place(RING, 0, 8, "head"))
    assert str(info.value) == (
        "touched elsewhere than allowed: 2 of 4 touches\n"
        "allowed: packet[header], head (ring+0x0..0x8)\n"
        "  #2 +1.002 ms  writer (tid 12) reads packet[body]+0x5 (user mode)\n"
        "  #4 +1.004 ms  tid 13 reads ring[header]+0x10 (user mode): waited 2.500 ms"
    )
    assert info.value.touches == (SOME[1], SOME[3])
    assert isinstance(info.value, AssertionError)


def test_a_write_is_shown() -> None:
    """Places may be left out: nothing was to be written."""
    with pytest.raises(RecordMismatch) as info:
        record(SOME).assert_never_wrote()
    assert str(info.value) == (
        "written though it should not be: 1 of 4 touches\n"
        "not to be written: anything\n"
        "  #3 +1.003 ms  parser (tid 11) writes packet[header]+0x0 (user mode)"
    )
    record(SOME).assert_never_wrote("ring", "body")


def test_a_touch_at_all_is_shown() -> None:
    """Places may be left out here, too."""
    with pytest.raises(RecordMismatch, match="4 of 4 touches\nnot to be touched: anything"):
        record(SOME).assert_untouched()
    with pytest.raises(RecordMismatch, match=r"1 of 4 touches\nnot to be touched: packet\[body\]"):
        record(SOME).assert_untouched("body")
    record(SOME).assert_untouched("packet[3]", "slots")
    Record().assert_untouched()


def test_what_cannot_be_told_fails() -> None:
    """The writer's later touches of a page that the parser opened were not recorded."""
    with pytest.raises(RecordMismatch) as info:
        record(SOME).of(thread="writer").assert_untouched("packet[header]")
    assert str(info.value) == (
        "cannot tell: these touches opened their pages, and what came later, to other bytes or by"
        " other threads, was not recorded\n"
        "record with every=True, or assert about whole pages and all threads\n"
        "not to be touched: packet[header]\n"
        "  #1 +1.001 ms  parser (tid 11) reads packet[header]+0x0 (user mode)\n"
        "  #3 +1.003 ms  parser (tid 11) writes packet[header]+0x0 (user mode)"
    )
    record(SOME, every=True).of(thread="writer").assert_untouched("packet[header]")


def test_an_order_that_is_not_there_is_told() -> None:
    """What was asked for, what was found of it, and what was there but too early."""
    with pytest.raises(RecordMismatch) as info:
        record(SOME).assert_order(
            "body", (None, "packet[header]", "write"), ("writer", "body", "read")
        )
    assert str(info.value) == (
        "after the touches found, none was a read of packet[body] by writer (3 of 3)\n"
        "order asked for: a touch of packet[body], then a write of packet[header],"
        " then a read of packet[body] by writer\n"
        "found:\n"
        "  #2 +1.002 ms  writer (tid 12) reads packet[body]+0x5 (user mode)\n"
        "  #3 +1.003 ms  parser (tid 11) writes packet[header]+0x0 (user mode)\n"
        "too early, or taken already:\n"
        "  #2 +1.002 ms  writer (tid 12) reads packet[body]+0x5 (user mode)"
    )
    with pytest.raises(RecordMismatch, match=r"found: nothing$"):
        record(SOME).assert_order((13, "body", None))
    with pytest.raises(RecordMismatch, match="none was a write of anything by tid 13"):
        record(SOME).assert_order((13, None, "write"))


def test_an_order_must_be_one() -> None:
    """Nothing at all, and patterns of another form, are refused."""
    with pytest.raises(ValueError, match="an order of nothing always holds"):
        record(SOME).assert_order()
    with pytest.raises(
        ValueError, match=r"a place or \(thread, place, access\), not \('parser',\)"
    ):
        record(SOME).assert_order(("parser",))  # type: ignore[arg-type]  # which is the point


def test_too_many_pages_are_told() -> None:
    """All of them, and the touches of those beyond what was allowed."""
    with pytest.raises(RecordMismatch) as info:
        record(SOME).assert_at_most(pages=2)
    assert str(info.value) == (
        "3 pages were touched, at most 2 allowed\n"
        "touched: packet[header], packet[body], ring[header]\n"
        "first touches of those beyond:\n"
        "  #4 +1.004 ms  tid 13 reads ring[header]+0x10 (user mode): waited 2.500 ms"
    )
    record(SOME).assert_at_most(pages=3)


def test_the_summary_is_a_table() -> None:
    """Threads by pages: when first read, when first written, how often, how long it waited."""
    assert record(SOME).summary().splitlines() == [
        "thread           page            first read  first write  touches    waited",
        "parser (tid 11)  packet[header]   +1.001 ms    +1.003 ms        2         -",
        "writer (tid 12)  packet[body]     +1.002 ms            -        1         -",
        "tid 13           ring[header]     +1.004 ms            -        1  2.500 ms",
    ]
    assert str(Record()) == "no touches"


@pytest.mark.parametrize(
    "assertion",
    [
        lambda mine: mine.assert_touched_only("packet"),
        lambda mine: mine.assert_untouched("ring"),
        lambda mine: mine.of(region="packet").assert_untouched("ring"),
        lambda mine: mine.assert_never_wrote("ring"),
        lambda mine: mine.assert_at_most(pages=4),
    ],
)
def test_what_was_dropped_may_be_anything(
    tmp_path: Path, assertion: Callable[[Record], None]
) -> None:
    """A record in which touches are missing satisfies no assertion that they could contradict."""
    whole = Record([touch(1, 0)], regions=(PACKET, RING), every=True)
    assertion(whole)
    cut = Record([touch(1, 0)], regions=(PACKET, RING), every=True, dropped=7)
    cut.save(tmp_path / "cut")
    for mine in (cut, Record.load(tmp_path / "cut")):
        with pytest.raises(RecordMismatch, match="cannot tell: there was no room for 7 touches"):
            assertion(mine)


def test_a_record_says_what_was_dropped() -> None:
    """In its summary, in its repr and where an order was not found; one that was found stands."""
    cut = Record([touch(1, 0)], regions=(PACKET, RING), every=True, dropped=7)
    assert "no room for 7 touches" in cut.summary()
    assert "no room for 7 touches" in Record(dropped=7).summary()
    assert repr(cut) == "<Record of every touch: 1 by 1 threads, 7 dropped>"
    cut.assert_order("packet")
    with pytest.raises(RecordMismatch, match="no room for 7 touches"):
        cut.assert_order("packet", "ring")


def test_the_summary_names_a_thread_once() -> None:
    """Its further pages follow under it, also where others came between."""
    rows = record([touch(1, 0), touch(2, 0, thread=12), touch(3, PAGE)]).summary().splitlines()
    assert [row[:6].strip() for row in rows] == ["thread", "parser", "", "writer"]


@given(HISTORIES)
def test_a_saved_record_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, history: list[Touch]
) -> None:
    """With its names, its beginning and what it does not know."""
    path = tmp_path_factory.getbasetemp() / "record.json"
    saved = record(told(history)).of(thread=11)
    saved.save(path)
    loaded = Record.load(path)
    assert list(loaded) == list(saved)
    assert loaded.openers == saved.openers
    assert loaded.regions == saved.regions
    assert loaded.thread_names == saved.thread_names
    assert (loaded.began_ns, loaded.every) == (saved.began_ns, saved.every)
    assert loaded.summary() == saved.summary()


def test_a_loaded_record_is_asserted_upon_by_names(tmp_path: Path) -> None:
    """The memory is long gone; its names are not."""
    record(SOME).save(tmp_path / "record.json")
    loaded = Record.load(tmp_path / "record.json")
    loaded.assert_order("packet[header]", ("writer", "body", "read"))
