"""Regions as objects: what they give of memory that is gone, and how they are told apart."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from aiouffd import ClosedError
from aiouffd.testing import Harness, Region


@pytest.mark.parametrize(
    "use",
    [
        lambda region: region.address,
        lambda region: region.at(3).address,
        lambda region: region.pointer(),
        lambda region: region.struct(ctypes.c_int),
        lambda region: region.view,
        lambda region: region.memfd,
        lambda region: region.peek(0, 1),
        lambda region: region.page(0).peek(),
        lambda region: region.poke(0, b"x"),
        lambda region: region.poke(0, b""),
        lambda region: region.rearm(),
        lambda region: region.rearm(0),
        lambda region: region.page(0).freeze().__enter__(),
        lambda region: region.page(0).slow(0.001),
        lambda region: region.page(0).fail(),
        lambda region: region.at(0).change(b"x"),
    ],
)
def test_a_closed_region_is_refused(uffd: Harness, use: Callable[[Region], object]) -> None:
    """Whatever needs the memory of a closed region says that it was closed; the harness serves."""
    region = uffd.region(1, name="gone")
    region.close()
    with pytest.raises(ClosedError, match="'gone' was closed"):
        use(region)
    assert uffd.region(1, contents=b"on").peek(0, 2) == b"on"
    assert "gone" in repr(region)


def test_a_structure_keeps_the_memory_of_a_closed_region(uffd: Harness) -> None:
    """It reads what was there, as a view does, and no memory that is no longer mapped."""
    region = uffd.region(1, contents=b"\x2a\0\0\0")
    number: Any = region.struct(ctypes.c_int)
    region.close()
    assert number.value == 42


def test_a_name_is_that_of_one_region(uffd: Harness) -> None:
    """A second region of the name is refused, the first being closed or not: records tell by it."""
    region = uffd.region(1, name="buffer")
    for _ in range(2):
        with pytest.raises(ValueError, match="give each a name of its own"):
            uffd.region(1, name="buffer")
        region.close()
    assert uffd.region(1, name="buffer 2").peek(0, 1) == b"\0"


def test_names_that_nobody_chose_are_unique(uffd: Harness) -> None:
    """Also beside those that somebody did choose, of the same form."""
    for number in range(1, 9):
        uffd.region(1, name=f"region{number}")
    regions = [uffd.region(1) for _ in range(3)]
    assert len({region.name for region in uffd.regions}) == 11
    with uffd.record() as record:
        regions[0].view[0]
    record.assert_untouched(regions[1], regions[2])
    record.assert_touched_only(regions[0])


def test_all_of_a_region_is_slowed_down_and_failed(uffd: Harness) -> None:
    """What a place can be made to do, a region does as a whole."""
    region = uffd.region(2)
    for armed in (region.slow(0.001, access="read"), region.fail(once=True, nth=2)):
        assert (armed.rule.start, armed.rule.end) == (0, region.length)
        armed.disarm()
    assert (armed.rule.nth, armed.rule.every) == (2, False)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (
            lambda uffd: uffd.region("packet"),
            "whole number of pages, not 'packet'; its name goes by name=",
        ),
        (lambda uffd: uffd.region(1.0), "whole number of pages, not 1.0"),
        (lambda uffd: uffd.region(contents="hello"), "contents must be bytes, not 'hello': b'hel"),
        (lambda uffd: uffd.region().poke(0, "hello"), "poked must be bytes, not 'hello': b'hello'"),
        (lambda uffd: uffd.region().at(0, 9).poke(3), "poked must be bytes, not 3"),
        (lambda uffd: uffd.region().page(0).change(b"a", "b"), "a value must be bytes, not 'b'"),
        (lambda uffd: uffd.record("packet"), r"uffd\.region\(\) gives them, not 'packet'"),
        (lambda uffd: uffd.explore([int, int]), "functions by name, not .*'a': first"),
        (lambda uffd: uffd.interleave([int, int], []), "functions by name, not .*'a': first"),
        (lambda uffd: uffd.explore({1: int}), "name is a str, not 1"),
        (
            lambda uffd: uffd.explore({"a": 1}),
            "participant 'a' is a function that is called, not 1",
        ),
    ],
)
def test_a_wrong_type_is_told_in_a_sentence(
    uffd: Harness, wrong: Callable[[Harness], object], text: str
) -> None:
    """It says what was given, and what could have been; nothing is made of it."""
    with pytest.raises(TypeError, match=text):
        wrong(uffd)
    assert all(region.peek(0, 9) == bytes(9) for region in uffd.regions)
