"""The page-server protocol: every command in both sizes, whole, byte by byte, cut anywhere."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.errors import PeerError
from aiouffd.protocols.criu import page_wire as wire
from aiouffd.protocols.criu.page_wire import (
    LONG,
    SHORT,
    Acceptor,
    Closed,
    Data,
    Direction,
    Ended,
    Event,
    Get,
    ImageId,
    ImageKind,
    Opened,
    Pages,
    ParentAsked,
    Puller,
    Run,
    pack_header,
)

PAGE = 4096
SIZES = [SHORT, LONG]
TASK = 4711 << 8 | 1
SHMEM = 99 << 8 | 2


def content(pages: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(pages * PAGE)


def joined(events: Sequence[Event]) -> list[Event | bytes]:
    """Put the pieces of data together, as they are cut by chance."""
    result: list[Event | bytes] = []
    for event in events:
        if not isinstance(event, Data):
            result.append(event)
        elif result and isinstance(result[-1], bytes):
            result[-1] += bytes(event.data)
        else:
            result.append(bytes(event.data))
    return result


def cut(data: bytes, places: Sequence[int]) -> Iterator[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return (data[start:end] for start, end in itertools.pairwise(edges))


# --- the headers -----------------------------------------------------------------------


def test_headers_are_as_criu_has_them() -> None:
    """Seen on the wire, from 4.1.1 and 4.2.1."""
    short = bytes.fromhex("070000000200000000 40ea6376550000 e018000000000000")
    assert pack_header(SHORT, wire.GET, 2, 0x557663EA4000, 0x18E0) == short
    long = bytes.fromhex("0700000000000000 0200000000000000 0090e6ed84550000 2e1a000000000000")
    assert pack_header(LONG, wire.GET, 2, 0x5584EDE69000, 0x1A2E) == long


# --- pulling ---------------------------------------------------------------------------


def answered(size: int, pid: int, address: int, data: bytes, flags: int = 4) -> bytes:
    command = flags << 16 | wire.ADD_F
    return pack_header(size, command, len(data) // PAGE, address, pid) + data


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", [1, 7, 4096, 1 << 20])
def test_answers_in_pieces_of_any_size(size: int, step: int) -> None:
    """Whole ones, clamped ones, lazy ones, and the end."""
    puller = Puller(size)
    sent = puller.get(5, 0x1000, 3) + puller.get(6, 0x7FFF00000000, 1) + puller.get(5, 0x9000, 2)
    assert len(sent) == 3 * size
    assert puller.unanswered == 3
    sent += puller.close()
    a, b, c = content(2), content(1, 2), content(2, 3)
    came = (
        answered(size, 5, 0x1000, a)
        + answered(size, 6, 0x7FFF00000000, b)
        + answered(size, 5, 0x9000, c, flags=6)
        + struct.pack("<i", 0)
    )
    events = []
    for at in range(0, len(came), step):
        events += puller.feed(came[at : at + step])
    assert events == [
        Pages(5, 0x1000, a),
        Pages(6, 0x7FFF00000000, b),
        Pages(5, 0x9000, c),
        Closed(0),
    ]
    assert puller.unanswered == 0


@pytest.mark.parametrize("size", SIZES)
def test_bytes_may_be_put_where_they_belong(size: int) -> None:
    """A long answer is never copied."""
    puller = Puller(size)
    puller.get(5, 0x1000, 300)
    data = content(300)
    assert puller.room() is None
    came = answered(size, 5, 0x1000, data)
    assert puller.feed(came[: size + 100]) == []
    at, whole = size + 100, None
    while (room := puller.room()) is not None:
        taken = min(len(room), 70_001)
        room[:taken] = came[at : at + taken]
        at += taken
        whole = puller.filled(taken)
    assert whole == Pages(5, 0x1000, data)
    assert at == len(came)


@pytest.mark.parametrize("step", [1, 1000, 1 << 20])
def test_answers_go_where_the_asker_wants_them(step: int) -> None:
    """Clamped ones to the front of it."""
    puller = Puller(SHORT)
    room = bytearray(3 * PAGE)
    puller.get(5, 0x1000, 3, memoryview(room))
    came = answered(SHORT, 5, 0x1000, content(2))
    events = []
    for at in range(0, len(came), step):
        events += puller.feed(came[at : at + step])
    assert events == [Pages(5, 0x1000, content(2))]
    assert room == content(2) + bytes(PAGE)


def test_a_probe_has_one_answer_of_either_size() -> None:
    """The second part is nothing but the end of a long header, and nonsense to a short one."""
    first, second = Puller.probe()
    (asked,) = Acceptor(SHORT).feed(first)
    assert isinstance(asked, ParentAsked)
    acceptor = Acceptor(LONG)
    assert acceptor.feed(first) == []
    assert acceptor.feed(second) == [asked]
    acceptor = Acceptor(SHORT)
    acceptor.feed(first)
    with pytest.raises(PeerError, match="unknown command"):
        acceptor.feed(second + bytes(16))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "answer, why",
    [
        ((4 << 16 | 6, 1, 0x1000, 7), "pages of pid 7 where pid 5 was asked for"),
        ((4 << 16 | 6, 1, 0x2000, 5), "pages at 0x2000 where 0x1000 was asked for"),
        ((4 << 16 | 6, 0, 0x1000, 5), "0 pages where 2 were asked for"),
        ((4 << 16 | 6, 3, 0x1000, 5), "3 pages where 2 were asked for"),
        ((4 << 16 | 6, 0xFFFFFFFF, 0x1000, 5), "pages where 2 were asked for"),
        ((6, 1, 0x1000, 5), "command 0x6 where 0x40006"),
        ((5 << 16 | 6, 1, 0x1000, 5), "command 0x50006"),
        ((7, 1, 0x1000, 5), "command 0x7"),
        ((0, 0, 0, 0), "--protocol 24 or 32"),
    ],
)
def test_wrong_answers_say_what_is_wrong(
    size: int, answer: tuple[int, int, int, int], why: str
) -> None:
    """Nothing is made of them."""
    puller = Puller(size)
    puller.get(5, 0x1000, 2)
    with pytest.raises(PeerError, match=why):
        puller.feed(pack_header(size, *answer))


def test_what_nobody_asked_for() -> None:
    """Such as the greeting of another program."""
    with pytest.raises(PeerError, match=r"nobody asked for.*SSH-2.0"):
        Puller(SHORT).feed(b"SSH-2.0-OpenSSH\r\n")
    puller = Puller(SHORT)
    puller.close()
    assert puller.feed(struct.pack("<i", -7)) == [Closed(-7)]
    with pytest.raises(PeerError, match="nobody asked for"):
        puller.feed(b"\0")


@pytest.mark.parametrize("size", SIZES)
def test_a_guarded_client_is_in_the_middle_of_a_header_until_it_closes(size: int) -> None:
    """A server that loses it sees that it did not end as it should."""
    puller, acceptor = Puller(size), Acceptor()
    assert acceptor.feed(puller.guard(5, 0x1000)) == []
    assert puller.guard(6, 0x2000) == b""
    assert puller.guarded
    assert not acceptor.in_order
    assert acceptor.feed(puller.get(5, 0x3000, 2)) == [Get(5, 0x3000, 2)]
    assert not acceptor.in_order
    data = content(2)
    assert puller.feed(answered(size, 5, 0x3000, data)) == [Pages(5, 0x3000, data)]
    assert acceptor.feed(puller.close()) == [Get(5, 0x1000, 1), Ended()]
    assert acceptor.in_order
    came = answered(size, 5, 0x1000, content(1)) + wire.END
    assert puller.feed(came[:1000]) == []  # what the guard has cost is nobody's answer
    assert puller.feed(came[1000:]) == [Closed(0)]
    assert puller.guard(5, 0x1000) == b""


@pytest.mark.parametrize("size", SIZES)
def test_the_answer_that_a_guard_costs_is_nobodys_when_it_comes_whole(size: int) -> None:
    """However it is cut."""
    puller = Puller(size)
    puller.guard(5, 0x1000)
    puller.close()
    assert puller.feed(answered(size, 5, 0x1000, content(1)) + wire.END) == [Closed(0)]


# --- being asked -----------------------------------------------------------------------


def pushed(size: int) -> tuple[bytes, list[Event | bytes]]:
    """Everything that a dumper may send, and what is to be made of it."""
    a, b, c = content(3), content(1, 2), content(1, 3)
    say = [
        pack_header(size, wire.PARENT, 0, 0, TASK),
        pack_header(size, wire.OPEN2, 0, 0, TASK),
        pack_header(size, 6 << 16 | wire.ADD_F, 3, 0x1000, TASK) + a,
        pack_header(size, 1 << 16 | wire.ADD_F, 5, 0x8000, TASK),
        pack_header(size, 2 << 16 | wire.ADD_F, 7, 0x80000, TASK),
        pack_header(size, wire.OPEN, 0, 0, SHMEM),
        pack_header(size, wire.ADD, 1, 0, SHMEM) + b,
        pack_header(size, wire.HOLE, 9, 0x1000, SHMEM),
        pack_header(size, wire.ADD, 1, 0x1000, 8 << 8 | 17) + c,
        pack_header(size, wire.FORCE_CLOSE),
    ]
    task = ImageId(ImageKind.TASK, 4711, TASK)
    shmem = ImageId(ImageKind.SHMEM, 99, SHMEM)
    return b"".join(say), [
        ParentAsked(task),
        Opened(task, True),
        Run(0x1000, 3, 6),
        a,
        Run(0x8000, 5, 1),
        Run(0x80000, 7, 2),
        Opened(shmem, False),
        Run(0, 1, 4),
        b,
        Run(0x1000, 9, 1),
        Opened(ImageId(ImageKind.TASK, 8, 8 << 8 | 17), False),
        Run(0x1000, 1, 4),
        c,
        Ended(),
    ]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", [1, 13, 4096, 1 << 20])
def test_a_push_in_pieces_of_any_size(size: int, step: int, told: bool) -> None:
    """The size of headers is told, or found out."""
    say, events = pushed(size)
    acceptor = Acceptor(size if told else None)
    seen: list[Event] = []
    for at in range(0, len(say), step):
        assert not acceptor.in_order or at == 0 or acceptor.direction is None
        seen += acceptor.feed(say[at : at + step])
    assert joined(seen) == events
    assert acceptor.header_bytes == size
    assert acceptor.direction is Direction.PUSH
    assert acceptor.in_order


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", [1, 13, 4096])
def test_a_pull_in_pieces_of_any_size(size: int, step: int) -> None:
    """Requests, then the end."""
    say = (
        pack_header(size, wire.GET, 1, 0x400000, 77)
        + pack_header(size, wire.GET, 1024, 0x7FFFFFFFE000, 78)
        + pack_header(size, wire.CLOSE)
    )
    acceptor = Acceptor()
    seen: list[Event] = []
    for at in range(0, len(say), step):
        seen += acceptor.feed(say[at : at + step])
    assert seen == [Get(77, 0x400000, 1), Get(78, 0x7FFFFFFFE000, 1024), Ended()]
    assert acceptor.direction is Direction.PULL
    assert acceptor.in_order
    answer = acceptor.answer(Get(77, 0x400000, 2), 1)
    assert answer == pack_header(size, 0x40006, 1, 0x400000, 77)


def test_answers_are_as_criu_has_them() -> None:
    """A byte, and numbers of four bytes."""
    assert (wire.has_parent(answer=True), wire.has_parent(answer=False)) == (b"\1", b"\0")
    assert wire.parent_exists(answer=True) == struct.pack("<i", 1)
    assert wire.parent_exists(answer=False) == wire.END == struct.pack("<i", 0)


addresses = st.integers(1, (1 << 47) // PAGE - 1).map(lambda page: page * PAGE)
counts = st.integers(1, wire.MAX_PAGES)
pids = st.integers(1, (1 << 22) - 1)


@given(st.sampled_from(SIZES), counts, addresses, pids, st.integers(0, LONG))
def test_the_size_of_any_request_is_found_out(
    size: int, pages: int, address: int, pid: int, place: int
) -> None:
    """Whatever is asked for, as long as it is what CRIU asks for (1,024 pages at most)."""
    pages = pages if size == SHORT else min(pages, 1024)
    acceptor = Acceptor()
    header = pack_header(size, wire.GET, pages, address, pid)
    events = acceptor.feed(header[:place]) + acceptor.feed(header[place:])
    assert events == [Get(pid, address, pages)]
    assert acceptor.header_bytes == size


@given(
    st.sampled_from(SIZES),
    st.sampled_from([wire.OPEN, wire.OPEN2, wire.PARENT, wire.ADD, wire.HOLE]),
    st.integers(0, (1 << 47) // PAGE).map(lambda page: page * PAGE),
    pids,
    st.sampled_from([1, 2, 10, 11, 16, 17, 27, 28, 29, 32, 33, 34]),
)
def test_the_size_of_any_push_is_found_out(
    size: int, command: int, address: int, number: int, kind: int
) -> None:
    """Old commands without an OPEN before them, too."""
    acceptor = Acceptor()
    with_pages = command in (wire.ADD, wire.HOLE)
    header = (command, 3 if with_pages else 0, address if with_pages else 0, number << 8 | kind)
    events = acceptor.feed(pack_header(size, *header))
    assert acceptor.header_bytes == size
    first = events[0]
    assert isinstance(first, (Opened, ParentAsked))
    assert first.image.number == number
    assert (first.image.kind is ImageKind.TASK) == (kind in (1, 10, 11, 16, 17))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("told", [True, False])
def test_a_client_that_ends_at_once(size: int, told: bool) -> None:
    """Its header is zeros, in either size."""
    acceptor = Acceptor(size if told else None)
    assert acceptor.feed(pack_header(size, wire.CLOSE)) == [Ended()]
    assert acceptor.in_order
    with pytest.raises(PeerError, match="went on"):
        acceptor.feed(b"\0" * 9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "headers, why",
    [
        ([(wire.GET, 1, 0x1001, 5)], "asked for 1 pages at 0x1001"),
        ([(wire.GET, 0, 0x1000, 5)], "asked for 0 pages"),
        ([(wire.GET, 1, 0x1000, 0)], "of pid 0"),
        ([(wire.GET, 1, 0x1000, 1 << 22)], "of pid 4194304"),
        ([(wire.GET, (1 << 20) + 1, 0x1000, 5)], "asked for 1048577 pages"),
        ([(wire.GET, 2, (1 << 64) - PAGE, 5)], "asked for 2 pages at 0xfffffffffffff000"),
        ([(wire.OPEN2, 0, 0, 5 << 8 | 3)], "image 0x503"),
        ([(wire.OPEN2, 0, 0, 1)], "image 0x1 "),
        ([(wire.OPEN2, 0, 0, TASK), (9, 0, 0, TASK)], "unknown command 0x9"),
        ([(wire.OPEN2, 0, 0, TASK), (wire.GET, 1, 0x1000, 5)], "on a connection that sends some"),
        ([(wire.GET, 1, 0x1000, 5), (wire.OPEN2, 0, 0, TASK)], "on a connection that asks"),
        ([(wire.OPEN2, 0, 0, TASK), (8 << 16 | 6, 1, 0x1000, TASK)], "with the flags 0x8"),
        ([(wire.OPEN2, 0, 0, TASK), (6, 1, 0x1000, TASK)], "with the flags 0x0"),
        ([(wire.OPEN2, 0, 0, TASK), (5 << 16 | 6, 1, 0x1000, TASK)], "with the flags 0x5"),
        ([(wire.OPEN2, 0, 0, TASK), (4 << 16 | 6, 0, 0x1000, TASK)], "sent 0 pages"),
        ([(wire.OPEN2, 0, 0, TASK), (4 << 16 | 6, 1, 0x1008, TASK)], "sent 1 pages at 0x1008"),
        ([(wire.CLOSE, 0, 0, 0), (wire.GET, 1, 0x1000, 5)], "went on after"),
    ],
)
def test_nonsense_is_refused_and_named(
    size: int, headers: list[tuple[int, int, int, int]], why: str
) -> None:
    """By the first wrong field."""
    acceptor = Acceptor(size)
    with pytest.raises(PeerError, match=why):
        acceptor.feed(b"".join(pack_header(size, *header) for header in headers))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("first", [(wire.OPEN2, 0, 0, TASK), (wire.GET, 1, 0x400000, 5)])
def test_the_wrong_size_says_which_option_to_set(size: int, first: tuple[int, ...]) -> None:
    """Where the first header does not fit the size that was told."""
    acceptor = Acceptor(SHORT + LONG - size)
    with pytest.raises(PeerError, match="--protocol 24 or 32"):
        acceptor.feed(pack_header(size, *first) * 2)


@pytest.mark.parametrize(
    "say", [b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"\x16\x03\x01" * 9, b"\0" * 24]
)
def test_strangers_are_told_from_dumpers(say: bytes) -> None:
    """By their first 24 bytes."""
    with pytest.raises(PeerError, match=r"began with b|unknown command"):
        Acceptor().feed(say)


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5), st.booleans())
def test_random_bytes_are_a_peer_error_or_nothing(
    data: bytes, places: list[int], asked: bool
) -> None:
    """No other error comes out, on either side, wherever they are cut."""
    for size in (SHORT, LONG):
        puller = Puller(size)
        if asked:
            puller.get(5, 0x1000, 3)
        for machine in (Acceptor(), Acceptor(size), puller):
            try:
                for piece in cut(data, places):
                    machine.feed(piece)
            except PeerError:
                pass


requests = st.lists(
    st.tuples(pids, addresses, st.integers(1, 8), st.integers(1, 8), st.booleans()), max_size=12
)


@given(
    st.sampled_from(SIZES), requests, st.booleans(), st.lists(st.integers(0, 1 << 20), max_size=20)
)
def test_both_sides_understand_each_other(
    size: int, wanted: list[tuple[int, int, int, int, bool]], guard: bool, places: list[int]
) -> None:
    """Whatever is asked, however the bytes of either direction are cut."""
    puller, acceptor = Puller(size), Acceptor()
    say = puller.guard(1, 0x10000) if guard else b""
    for pid, address, pages, _, _ in wanted:
        say += puller.get(pid, address, pages)
    say += puller.close()
    heard: list[Event] = []
    for piece in cut(say, places):
        heard += acceptor.feed(piece)
    assert heard.pop() == Ended()
    expected: list[Pages | Closed] = []
    answer = b""
    for number, event in enumerate(heard):
        assert isinstance(event, Get)
        pages = min(event.pages, wanted[number][3]) if number < len(wanted) else 1
        data = content(pages, number)
        answer += acceptor.answer(event, pages) + data
        if number < len(wanted):
            assert event == Get(*wanted[number][:3])
            expected.append(Pages(event.pid, event.address, data))
    came: list[Pages | Closed] = []
    for piece in cut(answer + wire.END, places):
        came += puller.feed(piece)
    assert came == [*expected, Closed(0)]
