"""The wire between servers, without a socket: both sides fed in pieces, and with nonsense."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.errors import PeerError
from aiouffd.protocols import pages
from aiouffd.protocols.pages import (
    EXTENTS,
    MAGIC,
    MAX_LENGTH,
    MAX_TEXT,
    READ,
    Answer,
    Hello,
    Holder,
    Reader,
    Request,
)

HELLO = Hello(1 << 20, "file:1-2-3", 4096, 3)

#: How a stream may be cut: whole, byte by byte, or at these places.
Cuts = int | Sequence[int]


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    """Cut bytes into pieces of one size."""
    return (data[at : at + size] for at in range(0, len(data), size))


def greeted(hello: Hello = HELLO, name: str = "") -> tuple[Reader, Holder]:
    """Make both sides, past their greeting."""
    reader, holder = Reader(name), Holder()
    assert holder.feed(reader.greeting()) == []
    assert holder.name == name
    assert reader.feed(holder.hello(hello)) == []
    assert reader.hello == hello
    return reader, holder


@pytest.mark.parametrize("size", [1, 2, 7, 24, 4096, 1 << 20])
def test_a_conversation_in_pieces(size: int) -> None:
    """Greeting, requests, answers in another order, a failure: however the stream is cut."""
    reader, holder = Reader("vm ä"), Holder()
    for piece in pieces(reader.greeting(), size):
        assert holder.name is None
        assert holder.feed(piece) == []
    assert holder.name == "vm ä"
    for piece in pieces(holder.hello(HELLO), size):
        assert reader.hello is None
        assert reader.feed(piece) == []
    assert reader.hello == HELLO

    wanted = [(0, 4096, READ), (4096, 1, READ), (0, 48, EXTENTS), (1 << 19, 1 << 19, READ)]
    sent = b"".join(reader.request(*each)[1] for each in wanted)
    requests = [request for piece in pieces(sent, size) for request in holder.feed(piece)]
    assert requests == [Request(number, *each) for number, each in enumerate(wanted)]

    content = {
        number: random.Random(number).randbytes(each[1]) for number, each in enumerate(wanted)
    }
    stream = b"".join(
        holder.answer(number, len(content[number])) + content[number] for number in (2, 0, 3)
    )
    stream += holder.failure(1, "no such page")
    answers = [answer for piece in pieces(stream, size) for answer in reader.feed(piece)]
    assert [answer.id for answer in answers] == [2, 0, 3, 1]
    for answer in answers[:3]:
        assert bytes(memoryview(answer.data)) == content[answer.id]
        assert not answer.error
    assert answers[3].error == "no such page"


def test_an_answer_is_the_readers_own() -> None:
    """What was given is not touched by what comes later."""
    reader, holder = greeted()
    for _ in range(2):
        reader.request(0, 4)
    first = reader.feed(holder.answer(0, 4) + b"abc")
    assert first == []
    (answer,) = reader.feed(b"d" + holder.answer(1, 4)[:3])
    assert answer == Answer(0, b"abcd", "")
    reader.feed(holder.answer(1, 4)[3:] + b"wxyz")
    assert answer.data == b"abcd"


# --- what is refused -------------------------------------------------------------------


def _hello(**fields: int) -> bytes:
    """A hello with some fields as they should not be."""
    values = {"version": 1, "refused": 0, "granularity": 4096, "size": 1 << 20, "extents": 0}
    values |= {"length": 0} | fields
    return struct.pack(">8sHHIQII", MAGIC, *values.values())


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"HTTP/1.1 200 OK\r\n", "does not speak this protocol"),
        (b"aiouffe", "does not speak this protocol"),
        (_hello(version=2), "speaks version 2"),
        (_hello(length=MAX_TEXT + 1), "1025 bytes of text"),
        (_hello(length=0xFFFFFFFF), "4294967295 bytes of text"),
        (_hello(size=1 << 63), "more than a machine can address"),
        (_hello(granularity=0), "granularity of 0"),
        (_hello(granularity=4097), "granularity of 4097"),
        (_hello(granularity=1 << 31), "granularity of 2147483648"),
        (_hello(extents=pages.MAX_EXTENTS + 1), "1048577 extents"),
        (_hello(size=1, extents=2), "2 extents in 1 bytes"),
        (Holder.refuse("go away"), "refused us: go away"),
        (Holder.refuse(""), "refused us: no reason given"),
        (_hello() + Holder.answer(0, 0), "answered request 0, which was not asked"),
    ],
)
def test_a_hello_that_is_none_is_refused(data: bytes, why: str) -> None:
    """By name, and byte by byte as well."""
    for size in (1, len(data)):
        reader = Reader()
        with pytest.raises(PeerError, match=why):
            for piece in pieces(data, size):
                reader.feed(piece)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (Holder.answer(0, 4095), "answered 4095 bytes where 4096 were asked for"),
        (Holder.answer(0, 0xFFFFFFFF), "answered 4294967295 bytes"),
        (Holder.answer(1, 4096), "answered request 1, which was not asked"),
        (struct.pack(">QII", 0, 0, 2), "unknown status 2"),
        (struct.pack(">QII", 0, MAX_TEXT + 1, 1), "a reason of 1025 bytes"),
        (Holder.failure(0, "x") * 2, "answered request 0, which was not asked or was answered"),
    ],
)
def test_an_answer_that_was_not_asked_for_is_refused(data: bytes, why: str) -> None:
    """Nothing is allocated for it: the head says enough."""
    for size in (1, len(data)):
        reader, _ = greeted()
        reader.request(0, 4096)
        with pytest.raises(PeerError, match=why):
            for piece in pieces(data, size):
                reader.feed(piece)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"GET / HTTP/1.1\r\n", "does not speak this protocol"),
        (MAGIC + struct.pack(">HH", 2, 0), "speaks version 2"),
        (MAGIC + struct.pack(">HH", 1, MAX_TEXT + 1), "a name of 1025 bytes"),
        (MAGIC + struct.pack(">HH", 1, 2) + b"\xff\xff", "no UTF-8"),
        (Reader("x").greeting() + b"\0", "went on before it was answered"),
    ],
)
def test_a_greeting_that_is_none_is_refused(data: bytes, why: str) -> None:
    """As a whole; a byte behind it can only be seen if it comes with it."""
    with pytest.raises(PeerError, match=why):
        Holder().feed(data)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ((0, 0, 0, READ), "asked for 0 bytes"),
        ((0, 0, MAX_LENGTH + 1, READ), "asked for 2097153 bytes"),
        ((0, 1 << 20, 1, READ), "behind the end"),
        ((0, (1 << 64) - 1, 1, READ), "behind the end"),
        ((0, 0, 49, EXTENTS), "behind the end"),
        ((0, 0, 1, 2), "unknown kind 2"),
    ],
)
def test_a_request_outside_is_refused(fields: tuple[int, int, int, int], why: str) -> None:
    """Of the image, of the table, of what exists."""
    _, holder = greeted()
    with pytest.raises(PeerError, match=why):
        holder.feed(struct.pack(">QQII", *fields))


def test_a_name_too_long_never_leaves() -> None:
    """It is the caller's mistake."""
    with pytest.raises(ValueError, match="at most 1024 bytes"):
        Reader("x" * (MAX_TEXT + 1))


def test_texts_are_cut_and_move_no_cursor() -> None:
    """A reason goes to people's terminals."""
    reader, holder = greeted()
    reader.request(0, 1)
    (answer,) = reader.feed(holder.failure(0, "\x1b[2J" + "x" * 5000))
    assert answer.error == "?[2J" + "x" * (MAX_TEXT - 4)


# --- extents ---------------------------------------------------------------------------


def test_extents_go_there_and_back() -> None:
    """In a table of sixteen bytes each."""
    extents = [(0, 1), (4096, 4096), (1 << 40, 5)]
    table = pages.pack_extents(iter(extents), 1 << 41)
    assert len(table) == pages.table_length(3)
    assert list(pages.unpack_extents(table, 1 << 41)) == extents


def test_more_extents_than_allowed_become_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one covers the rest: zeros that are read are still zeros."""
    monkeypatch.setattr(pages, "MAX_EXTENTS", 3)
    table = pages.pack_extents(((2 * at, 1) for at in range(5)), 20)
    assert list(pages.unpack_extents(table, 20)) == [(0, 1), (2, 1), (4, 16)]


@pytest.mark.parametrize("extents", [[(0, 0)], [(5, 5), (0, 5)], [(0, 5), (4, 1)], [(9, 2)]])
def test_extents_out_of_place_are_refused(extents: list[tuple[int, int]]) -> None:
    """They ascend, are disjoint and lie inside."""
    table = pages.pack_extents(iter(extents), 10)
    with pytest.raises(PeerError, match="out of place"):
        list(pages.unpack_extents(table, 10))


# --- nonsense --------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=64)), st.booleans())
def test_a_reader_survives_any_bytes(data: list[bytes], past_the_hello: bool) -> None:
    """PeerError or messages, nothing else; and no more memory than was asked for."""
    reader = greeted()[0] if past_the_hello else Reader()
    reader.request(0, 16)
    try:
        for piece in data:
            for answer in reader.feed(piece):
                assert answer.error or len(memoryview(answer.data)) == 16
    except PeerError:
        pass


@given(st.lists(st.binary(max_size=64)), st.sampled_from([b"", Reader("x").greeting()]))
def test_a_holder_survives_any_bytes(data: list[bytes], before: bytes) -> None:
    """PeerError or requests that lie inside."""
    holder = Holder()
    holder.feed(before)
    if holder.name is not None:
        holder.hello(HELLO)
    try:
        for piece in data:
            for request in holder.feed(piece):
                end = (HELLO.size, HELLO.extents * 16)[request.kind]
                assert request.offset + request.length <= end
    except PeerError:
        pass


@given(st.data())
def test_one_wrong_byte_is_an_error_or_a_wrong_byte_of_a_page(data: st.DataObject) -> None:
    """A changed head never changes which bytes are taken for which request."""
    reader, holder = greeted()
    numbers = [reader.request(at * 16, 16)[0] for at in range(3)]
    stream = bytearray(b"".join(holder.answer(each, 16) + bytes([each]) * 16 for each in numbers))
    at = data.draw(st.integers(0, len(stream) - 1))
    stream[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(stream)))
    answers: list[Answer] = []
    try:
        for piece in (bytes(stream[:cut]), bytes(stream[cut:])):
            answers += reader.feed(piece)
    except PeerError:
        return
    assert at % 32 >= 16 or at % 32 == 15  # in a body, or a status that made a body a reason
    for answer in answers:
        body = bytes(memoryview(answer.data))
        assert answer.error or sum(byte != answer.id for byte in body) <= 1
