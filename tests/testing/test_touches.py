"""Touches: what they say, and that they survive the way between two processes."""

from __future__ import annotations

import dataclasses
import marshal

import pytest
from hypothesis import given

from aiouffd.testing.touches import Access, Touch
from tests.touching import ANY_TOUCH

PLAIN = Touch(
    number=3,
    time_ns=1_000_412_000,
    process=4000,
    thread=4012,
    region="packet",
    page=1,
    offset=0x1005,
    access=Access.READ,
    pc=0x7F0000001139,
    where="libparse.so+0x1139",
)


def test_a_touch_reads_as_a_line() -> None:
    """Its number, its thread, the page and the byte in it, and where the program stood."""
    assert str(PLAIN) == "#3 tid 4012 reads packet[1]+0x5 (user mode, libparse.so+0x1139)"


def test_names_and_a_beginning_improve_the_line() -> None:
    """Pages and threads go by their names, and there is a time."""
    line = PLAIN.describe(began_ns=1_000_000_000, page_name="header", thread_name="parser")
    assert line == (
        "#3 +0.412 ms  parser (tid 4012) reads packet[header]+0x5 (user mode, libparse.so+0x1139)"
    )


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        ({"access": Access.WRITE}, "writes packet[1]+0x5 (user mode, libparse.so+0x1139)"),
        ({"system_call": 17}, "(system call 17, libparse.so+0x1139)"),
        ({"system_call": 0, "where": ""}, "(system call 0)"),
        ({"where": ""}, "(user mode)"),
        ({"outcome": "frozen", "waited_ns": 1_500_000}, "): frozen, waited 1.500 ms"),
        ({"outcome": "changed"}, "): saw other bytes"),
        ({"outcome": "failed"}, "): failed"),
        ({"waited_ns": 1000}, "): waited 0.001 ms"),
        ({"outcome": "overdue"}, "): let go at the time limit"),
    ],
)
def test_the_line_says_what_was_special(changes: dict[str, object], end: str) -> None:
    """A system call, an unknown place, an outcome, a wait: each has its words."""
    touch = dataclasses.replace(PLAIN, **changes)  # type: ignore[arg-type]  # of any attribute
    assert str(touch).endswith(end)


@given(ANY_TOUCH)
def test_what_is_sent_arrives(pair: tuple[Touch, int]) -> None:
    """A touch survives marshal, as plain ints, strings and None."""
    touch, _ = pair
    wire = touch.to_wire()
    assert {type(each) for each in wire} <= {int, str, type(None)}
    assert Touch.from_wire(marshal.loads(marshal.dumps(wire))) == touch


@given(ANY_TOUCH)
def test_the_byte_in_its_page_is_found(pair: tuple[Touch, int]) -> None:
    """Whatever the size of a page is."""
    touch, page_size = pair
    assert touch.offset_in_page == touch.offset % page_size


@pytest.mark.parametrize("at", range(13))
def test_another_kind_of_value_is_refused(at: int) -> None:
    """The error names the attribute and says what it is."""
    wire = list(PLAIN.to_wire())
    wire[at] = 1.5  # type: ignore[call-overload]  # which is the point
    name = dataclasses.fields(Touch)[at].name
    with pytest.raises(ValueError, match=f"^{name} of a touch is .*not 1.5"):
        Touch.from_wire(tuple(wire))


@pytest.mark.parametrize(("at", "text"), [(7, "execute"), (11, "vanished")])
def test_unknown_words_are_refused(at: int, text: str) -> None:
    """The error lists those that are known."""
    wire = list(PLAIN.to_wire())
    wire[at] = text
    known = "read or write" if at == 7 else "passed, frozen, delayed"
    with pytest.raises(ValueError, match=f"{known}.*not '{text}'"):
        Touch.from_wire(tuple(wire))


@pytest.mark.parametrize("length", [0, 12, 14])
def test_another_number_of_values_is_refused(length: int) -> None:
    """A touch of another version is not taken for one of this."""
    wire = (*PLAIN.to_wire(), 0)[:length]
    with pytest.raises(ValueError, match=f"has 13 attributes, not {length}"):
        Touch.from_wire(wire)
