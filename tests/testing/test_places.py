"""Places and threads, as users may write them."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.testing.places import Layout, Stretch, merged, stretch_of, tids_of
from tests.touching import PACKET, PAGE, RING, THREADS, FakeRegion, place

LAYOUTS = {each.name: each for each in (PACKET, RING)}


@pytest.mark.parametrize(
    ("given", "stretch"),
    [
        ("packet", Stretch("packet", 0, 4 * PAGE, "packet")),
        ("packet[header]", Stretch("packet", 0, PAGE, "packet[header]")),
        ("packet[0]", Stretch("packet", 0, PAGE, "packet[header]")),
        ("packet[3]", Stretch("packet", 3 * PAGE, 4 * PAGE, "packet[3]")),
        ("body", Stretch("packet", PAGE, 2 * PAGE, "packet[body]")),
        ("slots", Stretch("ring", PAGE, 2 * PAGE, "ring[slots]")),
        (FakeRegion("ring", 2 * PAGE), Stretch("ring", 0, 2 * PAGE, "ring")),
        (place(PACKET, PAGE, PAGE), Stretch("packet", PAGE, 2 * PAGE, "packet[body]")),
        (place(PACKET, PAGE, PAGE, "body"), Stretch("packet", PAGE, 2 * PAGE, "packet[body]")),
        (place(PACKET, 0, 4 * PAGE), Stretch("packet", 0, 4 * PAGE, "packet")),
        (place(PACKET, 4, 2), Stretch("packet", 4, 6, "packet+0x4..0x6")),
        (place(PACKET, 4, 2, "length"), Stretch("packet", 4, 6, "length (packet+0x4..0x6)")),
        (
            place(Layout("elsewhere", 9), PAGE, PAGE),
            Stretch("elsewhere", PAGE, 2 * PAGE, "elsewhere+0x1000..0x2000"),
        ),
    ],
)
def test_a_place_is_understood(given: str, stretch: Stretch) -> None:
    """Regions, pages, bytes and their names all end as bytes of a region, with a label."""
    assert stretch_of(given, LAYOUTS) == stretch


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("packet[tail]", r"nothing here is named 'packet\[tail\]': there are packet, packet\[head"),
        ("packet[4]", r"nothing here is named 'packet\[4\]'"),
        ("tail", "nothing here is named 'tail'"),
        ("header", r"'header' may be any of packet\[header\], ring\[header\]: say which"),
    ],
)
def test_an_unknown_or_unclear_name_is_refused(name: str, error: str) -> None:
    """With the names that there are."""
    with pytest.raises(ValueError, match=error):
        stretch_of(name, LAYOUTS)


def test_without_regions_no_name_means_anything() -> None:
    """The error says that there are none."""
    with pytest.raises(ValueError, match="there are no regions"):
        stretch_of("packet", {})


def test_other_objects_are_no_places() -> None:
    """An offset by itself, say."""
    with pytest.raises(TypeError, match=r"a place is a region, a page, region\.at"):
        stretch_of(4096, LAYOUTS)  # type: ignore[arg-type]  # which is the point


def test_a_page_may_be_named_like_a_number() -> None:
    """Its name goes before the number of another page."""
    layout = Layout("odd", 3, PAGE, {2: "1"})
    assert stretch_of("odd[1]", {"odd": layout}).start == 2 * PAGE


def test_a_region_may_have_brackets_in_its_name() -> None:
    """The last brackets are the page's."""
    layout = Layout("a[b]", 2, PAGE, {1: "end"})
    assert stretch_of("a[b]", {"a[b]": layout}).end == 2 * PAGE
    assert stretch_of("a[b][end]", {"a[b]": layout}).start == PAGE


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 20), st.integers(1, 5))))
def test_stretches_are_merged(parts: list[tuple[str, int, int]]) -> None:
    """The same bytes afterwards, and no two parts touch."""
    stretches = [Stretch(region, start, start + length, "") for region, start, length in parts]

    def bytes_of(those: list[Stretch]) -> set[tuple[str, int]]:
        return {(each.region, at) for each in those for at in range(each.start, each.end)}

    joined = merged(stretches)
    assert bytes_of(joined) == bytes_of(stretches)
    for one in joined:
        assert not any(one.region == other.region and one.end == other.start for other in joined)
    assert sum(each.end - each.start for each in joined) == len(bytes_of(joined))


@dataclass
class Started:
    """What ``start`` gives shows its thread's id like this."""

    tid: int


def test_a_thread_is_understood() -> None:
    """Its id, its name, an object that knows it; a name may be that of several."""
    assert tids_of(12, THREADS) == {12}
    assert tids_of("writer", THREADS) == {12}
    assert tids_of("writer", THREADS | {14: "writer"}) == {12, 14}
    assert tids_of(Started(7), THREADS) == {7}
    assert tids_of(threading.current_thread(), THREADS) == {threading.get_native_id()}


def test_what_is_no_thread_is_refused() -> None:
    """A name that none has, a thread that has not begun, anything else."""
    with pytest.raises(ValueError, match="no thread here is named 'reader': parser, writer"):
        tids_of("reader", THREADS)
    with pytest.raises(ValueError, match="none has a name"):
        tids_of("reader", {})
    with pytest.raises(ValueError, match="has not started"):
        tids_of(threading.Thread(), THREADS)
    with pytest.raises(TypeError, match=r"a thread is its id or name.*not 1\.5"):
        tids_of(1.5, THREADS)  # type: ignore[arg-type]  # which is the point
