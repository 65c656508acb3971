"""Protocol buffers: what is written is read again, and nothing else comes out of any bytes."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.protocols.criu.protobuf import (
    Message,
    WireError,
    fields,
    numbers,
    varint,
    write_bytes,
    write_number,
    write_varint,
)

MOST = (1 << 64) - 1


@pytest.mark.parametrize(
    "value, written",
    [
        (0, "00"),
        (1, "01"),
        (127, "7f"),
        (128, "8001"),
        (300, "ac02"),  # the example of the documentation of protocol buffers
        (1 << 35, "808080808001"),
        (MOST, "ffffffffffffffffff01"),
    ],
)
def test_numbers_by_example(value: int, written: str) -> None:
    """Seven bits a byte, the lowest first."""
    data = bytes.fromhex(written)
    assert write_varint(value) == data
    assert varint(data + b"\x05", 0, len(data) + 1) == (value, len(data))


@given(st.integers(0, MOST))
def test_numbers_come_back(value: int) -> None:
    """Written and read, a number is itself; cut off anywhere it is none."""
    data = write_varint(value)
    assert varint(data, 0, len(data)) == (value, len(data))
    for end in range(len(data)):
        with pytest.raises(WireError, match="cut off"):
            varint(data, 0, end)


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_numbers_of_other_sizes_are_not_written(value: int) -> None:
    """Nothing is cut to size in silence."""
    with pytest.raises(ValueError, match="64 bits"):
        write_varint(value)


@pytest.mark.parametrize("written", ["ffffffffffffffffff02", "80808080808080808080"])
def test_numbers_of_more_than_64_bits_are_refused(written: str) -> None:
    """Neither a big value nor a long way to write it gets through."""
    with pytest.raises(WireError, match="at offset 0: a number of more than 64 bits"):
        varint(bytes.fromhex(written), 0, 10)


def test_a_message_by_example() -> None:
    """The examples of the documentation: a number, a text, packed numbers."""
    data = bytes.fromhex("089601120774657374696e673206038e029ea7050d01000000")
    assert [(one.number, one.value, one.long) for one in fields(data, 0, len(data))] == [
        (1, 150, False),
        (2, 0, True),
        (6, 0, True),
        (1, 1, False),
    ]
    message = Message(data, 0, len(data), (1, 2, 3, 6))
    assert message.number(1) == 1  # the last one counts
    assert message.text(2) == "testing"
    assert list(message.numbers(6)) == [3, 270, 86942]
    assert list(message.numbers(1)) == [150, 1]
    assert message.text(3) == ""
    assert message.message(3) is None
    assert message.number(3, default=7) == 7
    with pytest.raises(WireError, match="lacks its field 3"):
        message.number(3)


@pytest.mark.parametrize(
    "written, problem",
    [
        ("08", "a number is cut off"),
        ("0a05aabb", "field 1 of 5 bytes, where 2 are left"),
        ("0affffffff0f", "field 1 of 4294967295 bytes, where 0 are left"),
        ("0affffffffffffffffff01", "field 1 of 18446744073709551615 bytes, where 0 are left"),
        ("0d010203", "field 1 of 4 bytes, where 3 are left"),
        ("09" + "00" * 7, "field 1 of 8 bytes, where 7 are left"),
        ("0b", "field 1 has wire type 3"),
        ("0c", "field 1 has wire type 4"),
        ("0e", "field 1 has wire type 6"),
        ("0001", "cannot have the number 0"),
        ("808080801001", "cannot have the number 536870912"),
    ],
)
def test_what_is_no_message_is_refused(written: str, problem: str) -> None:
    """Behind a good field the offset says where the bad one begins."""
    data = write_number(9, 5) + bytes.fromhex(written)
    for read in (
        lambda: list(fields(data, 0, len(data))),
        lambda: numbers(data, 0, len(data)),
        lambda: Message(data, 0, len(data), (1,)),
    ):
        with pytest.raises(WireError, match=problem) as caught:
            read()
        assert caught.value.offset in (2, 3)


def test_what_is_asked_for_as_what_it_is_not_is_refused() -> None:
    """A text is no number, and a number no text; too big is not cut to size."""
    data = write_bytes(1, b"abc") + write_number(2, 5) + write_number(3, 1 << 32)
    message = Message(data, 0, len(data), (1, 2, 3))
    with pytest.raises(WireError, match="field 1 is no number"):
        message.number(1)
    with pytest.raises(WireError, match="field 2 is no message"):
        message.text(2)
    with pytest.raises(WireError, match="field 3 is 4294967296, more than 32 bits hold"):
        message.number(3, bits=32)
    with pytest.raises(WireError, match="more than 32 bits hold"):
        list(message.numbers(3, bits=32))


@given(st.lists(st.tuples(st.integers(1, 40), st.one_of(st.integers(0, MOST), st.binary()))))
def test_messages_come_back(content: list[tuple[int, int | bytes]]) -> None:
    """Fields come back in order, with their bytes; both ways to read numbers agree."""
    data = b"".join(
        write_number(number, value) if isinstance(value, int) else write_bytes(number, value)
        for number, value in content
    )
    inside = b"\xff" + data + b"\xff"
    got: list[tuple[int, int | bytes]] = [
        (one.number, inside[one.start : one.end] if one.long else one.value)
        for one in fields(inside, 1, len(inside) - 1)
    ]
    assert got == content
    expected = {number: value for number, value in content if isinstance(value, int)}
    assert numbers(inside, 1, len(inside) - 1) == expected


@given(st.binary(max_size=200))
def test_random_bytes_end_in_an_answer_or_a_wire_error(data: bytes) -> None:
    """Nothing else comes out, and both ways to read agree on what is a message."""
    outcomes = []
    for read in (lambda: list(fields(data, 0, len(data))), lambda: numbers(data, 0, len(data))):
        try:
            read()
            outcomes.append("")
        except WireError as error:
            outcomes.append(error.problem)
    assert outcomes[0] == outcomes[1]


def test_a_length_that_lies_costs_no_memory() -> None:
    """Gigabytes that are not there are not made room for."""
    data = write_varint(1 << 3 | 2) + write_varint(1 << 40) + b"x"
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            Message(data, 0, len(data), (1,))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
