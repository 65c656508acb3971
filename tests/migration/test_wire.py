"""The wire, byte by byte: what may be said, what may not, and what neither may cost."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.errors import DamagedFrame, PeerError, UnknownVersion
from aiouffd.migration import wire
from aiouffd.migration.wire import Decoder, Encoder, Extent, Frame, Kind
from tests.migration.frames import (
    BATCH,
    CHECKED,
    EXTENTS,
    LZ4,
    PAGE,
    ZSTD,
    decoder,
    frame,
    preamble,
    runs,
    taken,
)

CONTENTS = bytes(range(256)) * (PAGE // 256)

#: One of each kind: who sends it, the frame, what it means.
FRAMES: dict[Kind, tuple[bool, bytes, dict[str, Any]]] = {
    Kind.HELLO: (True, frame(1, b'{"a": 1}'), {"body": b'{"a": 1}'}),
    Kind.WELCOME: (False, frame(2, b"{}"), {"body": b"{}"}),
    Kind.ERROR: (True, frame(3, b'{"code": "x"}'), {"body": b'{"code": "x"}'}),
    Kind.PAGES: (
        True,
        frame(4, CONTENTS * 2, region=1, number=7, offset=PAGE * 2, span=PAGE * 2),
        {
            "region": 1,
            "number": 7,
            "offset": PAGE * 2,
            "span": PAGE * 2,
            "body": CONTENTS * 2,
        },
    ),
    Kind.BATCH: (
        True,
        frame(5, runs((0, PAGE), (4 * PAGE, PAGE)) + CONTENTS * 2, number=8, span=2),
        {"number": 8, "span": 2, "body": runs((0, PAGE), (4 * PAGE, PAGE)) + CONTENTS * 2},
    ),
    Kind.ZERO: (
        True,
        frame(6, number=9, offset=PAGE, span=32 << 20),
        {"number": 9, "offset": PAGE, "span": 32 << 20},
    ),
    Kind.MISSING: (
        True,
        frame(7, runs((0, 32 << 20), (32 << 20, PAGE)), span=2),
        {"span": 2, "body": runs((0, 32 << 20), (32 << 20, PAGE))},
    ),
    Kind.STATE: (
        True,
        frame(8, b"abc", offset=5, span=9),
        {"offset": 5, "span": 9, "body": b"abc"},
    ),
    Kind.SWITCH: (True, frame(9, number=1 << 63, span=3), {"number": 1 << 63, "span": 3}),
    Kind.RUNNING: (False, frame(10), {}),
    Kind.DEMAND: (
        False,
        frame(11, region=1, number=255, offset=0, span=2 * PAGE),
        {"region": 1, "number": 255, "span": 2 * PAGE},
    ),
    Kind.ACK: (False, frame(12, number=(1 << 64) - 1), {"number": (1 << 64) - 1}),
    Kind.PROGRESS: (False, frame(13, b'{"left": 5}'), {"body": b'{"left": 5}'}),
    Kind.DONE: (False, frame(14, b"{}"), {"body": b"{}"}),
    Kind.END: (True, frame(15, b"{}"), {"body": b"{}"}),
    Kind.CANCEL: (True, frame(16), {}),
    Kind.PING: (False, frame(17), {}),
}
assert list(FRAMES) == list(Kind)

each_kind = pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)


def meant(kind: Kind) -> Frame:
    return Frame(kind, 0, 0, 0, 0, b"")._replace(**FRAMES[kind][2])


# --- what is said -------------------------------------------------------------------------


@each_kind
def test_every_kind_comes_whole_and_in_pieces(kind: Kind) -> None:
    """Whole, byte by byte, cut at every byte, and with the next frame behind it."""
    from_source, data, _ = FRAMES[kind]
    stream = preamble() + data
    ping = Frame(Kind.PING, 0, 0, 0, 0, b"")
    for checked in (False, True):
        assert taken(decoder(from_source=from_source, checked=checked), stream) == [meant(kind)]
    bytewise = (stream[at : at + 1] for at in range(len(stream)))
    assert taken(decoder(from_source=from_source), *bytewise) == [meant(kind)]
    longer = stream + frame(17)
    for cut in (
        *range(200),
        *range(200, len(stream), 67),
        *range(len(stream) - 3, len(longer) + 1),
    ):
        receiver = decoder(from_source=from_source)
        assert taken(receiver, longer[:cut], longer[cut:]) == [meant(kind), ping]


@each_kind
def test_what_is_cut_off_is_no_frame(kind: Kind) -> None:
    """However much of it is there, nothing comes out before its last byte."""
    from_source, data, _ = FRAMES[kind]
    stream = preamble() + data
    receiver = decoder(from_source=from_source)
    for at in range(len(stream) - 1):
        assert not taken(receiver, stream[at : at + 1])
    assert len(taken(receiver, stream[-1:])) == 1


@each_kind
def test_the_encoder_says_the_same(kind: Kind) -> None:
    """Byte for byte, where both sides want checksums."""
    encoder = Encoder()
    encoder.checked = True
    fields = dict(FRAMES[kind][2])
    assert b"".join(encoder.frame(kind, fields.pop("body", b""), **fields)) == FRAMES[kind][1]


@each_kind
def test_a_kind_is_for_its_side_to_send(kind: Kind) -> None:
    """Only errors, progress and pings are for both."""
    from_source, data, _ = FRAMES[kind]
    receiver = decoder(from_source=not from_source)
    if kind in {Kind.ERROR, Kind.PROGRESS, Kind.PING}:
        assert taken(receiver, preamble(), data) == [meant(kind)]
    else:
        with pytest.raises(PeerError, match=f"{kind.name}, which is for us"):
            taken(receiver, preamble(), data)


def test_memory_goes_without_a_checksum_where_none_was_agreed_on() -> None:
    """And everything else never does."""
    encoder = Encoder()
    for kind in Kind:
        from_source, data, fields = FRAMES[kind]
        fields = dict(fields)
        made = b"".join(encoder.frame(kind, fields.pop("body", b""), **fields))
        assert (made == data) is (kind not in {Kind.PAGES, Kind.BATCH})
        assert taken(decoder(from_source=from_source), preamble(), made) == [meant(kind)]


def test_pages_go_where_they_belong() -> None:
    """In whatever pieces they come; other bodies do not."""
    memory = bytearray(64 * PAGE)
    asked: list[wire.Head] = []

    def place(head: wire.Head) -> memoryview:
        asked.append(head)
        return memoryview(memory)[head.offset : head.offset + head.length]

    body = random.Random(1).randbytes(32 * PAGE)
    stream = preamble() + frame(4, body, offset=3 * PAGE, span=len(body), number=1)
    stream += frame(5, runs((PAGE, PAGE)) + CONTENTS, span=1, number=2) + frame(17)
    for size in (1, 7, 4096, 70_000, len(stream)):
        receiver = decoder()
        receiver.place = place
        memory[:] = bytes(len(memory))
        asked.clear()
        seen = []
        for at in range(0, len(stream), size):
            seen += [(each.kind, each.placed) for each in receiver.feed(stream[at : at + size])]
        assert seen == [(Kind.PAGES, True), (Kind.BATCH, False), (Kind.PING, False)]
        assert memory == bytes(3 * PAGE) + body + bytes(29 * PAGE)
        assert [(head.number, head.length) for head in asked] == [(1, len(body))]


def test_a_place_may_be_refused() -> None:
    """Then the decoder has room of its own."""
    receiver = decoder()
    receiver.place = lambda head: None
    (each,) = taken(receiver, preamble(), frame(4, CONTENTS, span=PAGE))
    assert not each.placed
    assert each.body == CONTENTS


def test_long_bodies_come_in_any_pieces() -> None:
    """Their room grows once."""
    body = random.Random(2).randbytes(wire.MAX_DATA)
    data = frame(4, body, span=len(body))
    for size in (5000, 65_536, 65_536 + 52, 300_000, len(data)):
        receiver = decoder()
        pieces = (data[at : at + size] for at in range(0, len(data), size))
        (each,) = taken(receiver, preamble(), *pieces)
        assert each.body == body


def test_the_runs_of_a_table_know_where_their_bytes_are() -> None:
    """Behind the table, one after the other."""
    (each,) = taken(decoder(), preamble(), FRAMES[Kind.BATCH][1])
    assert list(each.runs()) == [(0, PAGE, 24), (4 * PAGE, PAGE, 24 + PAGE)]
    assert wire.table([(0, PAGE), (4 * PAGE, PAGE)]) == runs((0, PAGE), (4 * PAGE, PAGE))


# --- what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "newest, oldest, spoken",
    [(1, 1, 1), (2, 1, 1), (65535, 0, 1), (2, 2, 0), (0, 0, 0), (1, 2, 0), (0, 1, 0)],
)
def test_versions(newest: int, oldest: int, spoken: int) -> None:
    """The newest that both speak, or UnknownVersion."""
    receiver = Decoder(from_source=True)
    if spoken:
        assert not taken(receiver, preamble(newest, oldest))
        assert receiver.version == spoken
    else:
        with pytest.raises(UnknownVersion, match=f"{oldest} to {newest}.*we speak 1 to 1"):
            taken(receiver, preamble(newest, oldest))


@pytest.mark.parametrize(
    "data, says",
    [
        (b"GET / HTTP/1.1\r\n", "does not speak this protocol: it began with b'G"),
        (b"\0" * 16, "does not speak"),
        (b"aiouffdX", "does not speak"),
        (b"a" * 100, "does not speak"),
        (b"\x16\x03\x01\x02\x00", "TLS, which this side was not told"),
        (b"\x15\x03\x03\x00\x02\x02\x46", "TLS"),
        (b"\x16", "TLS"),
        (b"\x16\x00", "began with"),
    ],
)
def test_who_speaks_something_else_is_told_so(data: bytes, says: str) -> None:
    """By the first byte that is wrong."""
    with pytest.raises(PeerError, match=says) as caught:
        taken(Decoder(from_source=True), data)
    assert type(caught.value) is PeerError


FEW = runs((0, PAGE))
MANY = [(at * PAGE, PAGE) for at in range(wire.MAX_RUNS + 1)]

REFUSED: dict[str, tuple[bytes, str]] = {
    "kind 0": (frame(0), "unknown kind 0"),
    "kind 18": (frame(18), "unknown kind 18"),
    "kind 255": (frame(255), "unknown kind 255"),
    "a flag": (frame(17, flags=8), "unknown flags 0x8"),
    "all flags": (frame(17, flags=255), "unknown flags"),
    "zstd and lz4": (frame(4, b"x", flags=CHECKED | ZSTD | LZ4, span=PAGE), "not agreed on"),
    "zstd": (frame(4, b"x", flags=ZSTD, span=PAGE), "compressed a PAGES, which was not agreed on"),
    "lz4": (frame(5, b"x", flags=LZ4, span=1), "compressed a BATCH, which was not agreed on"),
    "a packed state": (frame(8, b"x", flags=ZSTD | CHECKED, span=1), "compressed a STATE"),
    "a packed ping": (frame(17, flags=ZSTD), "compressed a PING"),
    "no checksum": (frame(8, b"x", flags=0, span=1), "STATE without its checksum"),
    "a hello without one": (frame(1, b"{}", flags=0), "HELLO without its checksum"),
    "a body for a ping": (frame(17, b"x"), "PING of 1 bytes; 0 are the most"),
    "a body for zeros": (frame(6, bytes(PAGE), span=PAGE), "ZERO of 4096 bytes; 0 are the most"),
    "a long error": (frame(3, length=(64 << 10) + 1), "65537 bytes; 65536 are the most"),
    "a long hello": (frame(1, length=(1 << 20) + 1), "1048576 are the most"),
    "a long state": (frame(8, length=(1 << 20) + 1), "1048576 are the most"),
    "4 GiB of pages": (frame(4, length=(1 << 32) - 1, span=PAGE), "1048576 are the most"),
    "4 GiB of a table": (frame(7, length=(1 << 32) - 1, span=1), "49152 are the most"),
    "a long batch": (frame(5, length=(1 << 20) + 49153, span=1), "1097728 are the most"),
    "region 2": (frame(4, CONTENTS, region=2, span=PAGE), "region 2; 2 were agreed on"),
    "region 65535": (frame(6, region=65535, span=PAGE), "region 65535"),
    "region 2 of a batch": (frame(5, FEW + CONTENTS, region=2, span=1), "region 2"),
    "region 2 of a table": (frame(7, FEW, region=2, span=1), "region 2"),
    "no pages": (frame(4, span=0), "about 0 bytes"),
    "no zeros": (frame(6, span=0), "about 0 bytes"),
    "half a page": (frame(4, b"x" * 2048, span=2048), "no whole pages of 4096"),
    "half a page further": (frame(4, CONTENTS, offset=2048, span=PAGE), "no whole pages"),
    "half a larger page": (frame(4, CONTENTS, region=1, span=PAGE), "no whole pages of 8192"),
    "the first page behind": (frame(4, CONTENTS, offset=64 << 20, span=PAGE), "behind its end"),
    "over the end": (frame(6, offset=32 << 20, span=(32 << 20) + PAGE), "behind its end"),
    "over 2**64": (frame(6, offset=(1 << 64) - PAGE, span=PAGE), "behind its end"),
    "to 0 again": (frame(6, offset=(1 << 64) - PAGE, span=2 * PAGE), "behind its end"),
    "too many zeros": (frame(6, span=(1 << 30) + PAGE), "1073741824 may be"),
    "too many pages": (frame(4, span=(1 << 20) + PAGE), "1048576 may be"),
    "fewer bytes than pages": (frame(4, CONTENTS, span=2 * PAGE), "4096 bytes for 8192 bytes"),
    "more bytes than pages": (frame(4, CONTENTS * 2, span=PAGE), "8192 bytes for 4096 bytes"),
    "no runs": (frame(5, span=0), "BATCH of 0 runs"),
    "no runs missing": (frame(7, span=0), "MISSING of 0 runs"),
    "too many runs": (frame(7, span=4097), "MISSING of 4097 runs"),
    "2**32 runs": (frame(7, runs(*MANY[:5]), span=(1 << 32) - 1), "4294967295 runs"),
    "half a table": (frame(7, FEW[:6], span=1), "1 runs in 6 bytes"),
    "a longer table": (frame(7, FEW * 2, span=1), "24 bytes whose runs make 12"),
    "a shorter batch": (frame(5, FEW + CONTENTS[1:], span=1), "whose runs make 4108"),
    "a longer batch": (frame(5, FEW + CONTENTS + b"x", span=1), "whose runs make 4108"),
    "a run behind the end": (frame(7, runs((64 << 20, PAGE)), span=1), "behind its end"),
    "a run over 2**64": (frame(7, runs(((1 << 64) - PAGE, PAGE)), span=1), "behind its end"),
    "half a run": (frame(7, runs((0, 100)), span=1), "no whole pages"),
    "an empty run": (frame(7, runs((0, 0)), span=1), "about 0 bytes"),
    "a run too long": (frame(7, runs((0, (1 << 30) + PAGE)), span=1), "1073741824 may be"),
    "a run of a batch too long": (frame(5, runs((0, 2 << 20)), span=1), "1048576 may be"),
    "runs that overlap": (frame(7, runs((0, 2 * PAGE), (PAGE, PAGE)), span=2), "comes behind one"),
    "one run twice": (frame(7, FEW * 2, span=2), "comes behind one"),
    "runs that go back": (frame(7, runs((PAGE, PAGE), (0, PAGE)), span=2), "comes behind one"),
    "two mebibytes": (
        frame(5, runs((0, 1 << 20), (1 << 20, 1 << 20)) + CONTENTS, span=2),
        "whose runs make 2097176",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_source_may_not_send(name: str) -> None:
    """It is named, the decoder gives nothing out, and nothing gets longer than it may."""
    data, says = REFUSED[name]
    receiver = decoder()
    with pytest.raises(PeerError, match=says) as caught:
        taken(receiver, preamble() + data)
    assert type(caught.value) is PeerError


@pytest.mark.parametrize(
    "data, says",
    [
        (frame(11, span=0), "about 0 bytes"),
        (frame(11, span=(1 << 20) + PAGE), "1048576 may be"),
        (frame(11, span=100), "no whole pages"),
        (frame(11, offset=64 << 20, span=PAGE), "behind its end"),
        (frame(11, offset=(1 << 64) - PAGE, span=PAGE), "behind its end"),
        (frame(11, region=9, span=PAGE), "region 9; 2 were"),
        (frame(12, b"x"), "ACK of 1 bytes"),
        (frame(2, length=(64 << 10) + 1), "65536 are the most"),
    ],
)
def test_what_a_destination_may_not_send(data: bytes, says: str) -> None:
    """Demand reaches no further than the regions, and not for more than a frame can bring."""
    with pytest.raises(PeerError, match=says):
        taken(decoder(from_source=False), preamble(), data)


def test_memory_before_regions_were_agreed_on_is_refused() -> None:
    """There is none to be about."""
    for kind in (Kind.PAGES, Kind.BATCH, Kind.ZERO, Kind.MISSING):
        with pytest.raises(PeerError, match="0 were agreed on"):
            taken(Decoder(from_source=True), preamble(), FRAMES[kind][1])


def test_checksums_that_were_agreed_on_are_not_left_out() -> None:
    """Of pages and batches, too."""
    for data in (
        frame(4, CONTENTS, flags=0, span=PAGE),
        frame(5, FEW + CONTENTS, flags=0, span=1),
    ):
        assert len(taken(decoder(), preamble(), data)) == 1
        with pytest.raises(PeerError, match="without its checksum"):
            taken(decoder(checked=True), preamble(), data)


@pytest.mark.parametrize("kind", [*Kind, 0, 18])
def test_a_claim_alone_costs_next_to_nothing(kind: int) -> None:
    """Neither do thousands of claims that are refused, nor a body of which little is there."""
    from_source = kind not in {2, 10, 11, 12, 14}
    tracemalloc.start()
    try:
        receiver = decoder(from_source=from_source)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        most = wire.LIMITS.get(Kind(kind), 0) if kind in set(Kind) else 0
        span = {4: 1 << 20, 5: wire.MAX_RUNS, 7: wire.MAX_RUNS}.get(kind, 0)
        for length in (most, (1 << 32) - 1):
            receiver = decoder(from_source=from_source)
            try:
                taken(receiver, preamble(), frame(kind, length=length, span=span, flags=1))
                taken(receiver, b"x" * 1000)
            except PeerError:
                continue
        assert tracemalloc.get_traced_memory()[1] - before < 256 << 10
    finally:
        tracemalloc.stop()


# --- damage -------------------------------------------------------------------------------


def recorded() -> tuple[bytes, list[range]]:
    """Give all that a source may say, and where in it memory is."""
    stream, memory = preamble(), []
    for kind, (from_source, data, _) in FRAMES.items():
        if from_source:
            stream += data
            if kind in {Kind.PAGES, Kind.BATCH}:
                memory.append(range(len(stream) - len(data) + 36, len(stream)))
    return stream, memory


def flipped(stream: bytes, bit: int) -> bytes:
    changed = bytearray(stream)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def bits_to_flip(stream: bytes, memory: list[range]) -> Iterator[int]:
    """Give every bit outside memory, and those of some bytes inside."""
    for at in range(len(stream)):
        inside = any(at in body for body in memory)
        if not inside or at % 61 == 0:
            yield from range(at * 8, at * 8 + 8)


def test_one_bit_anywhere_is_found_where_there_are_checksums() -> None:
    """In the preamble, in heads and in bodies; what came before it stands as it was sent."""
    stream, memory = recorded()
    wanted = taken(decoder(checked=True), stream)
    assert len(wanted) == 10
    for bit in bits_to_flip(stream, memory):
        receiver = decoder(checked=True)
        seen: list[Frame] = []
        with pytest.raises(PeerError) as caught:
            seen.extend(
                each._replace(body=bytes(each.body)) for each in receiver.feed(flipped(stream, bit))
            )
        assert isinstance(caught.value, DamagedFrame) or bit < 8 * 8
        assert seen == wanted[: len(seen)]
        assert len(seen) < len(wanted)


def test_one_bit_outside_memory_is_always_found() -> None:
    """Without checksums a page may be wrong, never its place, nor anything else."""
    stream, memory = recorded()
    wanted = taken(decoder(), stream)
    for bit in bits_to_flip(stream, memory):
        if any(bit // 8 in body for body in memory):
            continue
        with pytest.raises(PeerError):
            taken(decoder(), flipped(stream, bit))
    bare = frame(4, CONTENTS, flags=0, offset=PAGE, span=PAGE, number=1)
    for bit in range(36 * 8, len(bare) * 8, 997):
        (each,) = taken(decoder(), preamble(), flipped(bare, bit))
        assert (each.offset, each.span, len(bytes(each.body))) == (PAGE, PAGE, PAGE)
    assert taken(decoder(), stream) == wanted


def test_damage_is_found_whatever_it_looks_like() -> None:
    """A checksum comes first: damaged runs are DamagedFrame, not a peer that breaks rules."""
    for data in (FRAMES[Kind.BATCH][1], FRAMES[Kind.MISSING][1], FRAMES[Kind.HELLO][1]):
        with pytest.raises(DamagedFrame, match="body was damaged"):
            taken(decoder(), preamble(), data[:36] + b"\xff" + data[37:])
    with pytest.raises(DamagedFrame, match="head was damaged"):
        taken(decoder(), preamble(), b"\xff" + frame(17)[1:])
    with pytest.raises(DamagedFrame, match="preamble"):
        taken(decoder(), preamble()[:-1] + b"\xff")


@given(st.binary(max_size=400), st.booleans(), st.booleans())
def test_any_bytes_end_in_a_named_error(data: bytes, begun: bool, from_source: bool) -> None:
    """Or in waiting for more; never in another exception."""
    receiver = decoder(from_source=from_source)
    try:
        taken(receiver, preamble() if begun else b"", data)
    except PeerError:
        return
    assert len(receiver.get_buffer()) > 0


@given(
    kind=st.integers(0, 20),
    flags=st.integers(0, 7),
    region=st.integers(0, 3),
    length=st.integers(0, (1 << 32) - 1),
    offset=st.integers(0, (1 << 64) - 1) | st.integers(0, 20).map(lambda at: at * PAGE),
    span=st.integers(0, (1 << 32) - 1) | st.integers(0, 20).map(lambda at: at * PAGE),
    body=st.binary(max_size=100),
    exact=st.booleans(),
)
def test_any_head_ends_in_a_frame_inside_or_in_a_named_error(
    kind: int,
    flags: int,
    region: int,
    length: int,
    offset: int,
    span: int,
    body: bytes,
    exact: bool,
) -> None:
    """A head with the right check may say anything."""
    data = frame(
        kind,
        body,
        flags=flags,
        region=region,
        offset=offset,
        span=span,
        length=None if exact else length,
    )
    try:
        frames = taken(decoder(), preamble(), data)
    except PeerError:
        return
    for each in frames:
        assert_inside(each)


def assert_inside(each: Frame) -> None:
    if each.kind in {Kind.PAGES, Kind.ZERO, Kind.DEMAND}:
        places = [(each.offset, each.span)]
    elif each.kind in {Kind.BATCH, Kind.MISSING}:
        places = [(offset, length) for offset, length, _ in each.runs()]
    else:
        return
    extent = EXTENTS[each.region]
    for offset, length in places:
        assert length > 0
        assert offset % extent.page_size == length % extent.page_size == 0
        assert offset + length <= extent.length


@given(st.data())
def test_a_changed_stream_never_reaches_outside(data: st.DataObject) -> None:
    """Bytes put in, taken out and changed: frames inside, or a named error."""
    stream = bytearray(recorded()[0])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(stream)))
        stream[at : at + data.draw(st.integers(0, 80))] = data.draw(st.binary(max_size=80))
    receiver = decoder(checked=data.draw(st.booleans()))
    try:
        for each in receiver.feed(bytes(stream)):
            assert_inside(each)
    except PeerError:
        pass


# --- round trips --------------------------------------------------------------------------


@st.composite
def any_frames(draw: st.DrawFn) -> tuple[Kind, dict[str, Any]]:
    kind = draw(st.sampled_from(Kind))
    fields: dict[str, Any] = {"number": draw(st.integers(0, (1 << 64) - 1))}
    region = draw(st.integers(0, 1))
    extent = EXTENTS[region]
    pages = min(extent.length // extent.page_size, 1 << 12)
    if kind in {Kind.PAGES, Kind.ZERO, Kind.DEMAND}:
        at = draw(st.integers(0, pages - 1))
        count = draw(st.integers(1, min(pages - at, 3)))
        fields |= {"region": region, "offset": at * extent.page_size}
        fields["span"] = count * extent.page_size
        if kind is Kind.PAGES:
            fields["body"] = draw(st.binary(min_size=1, max_size=9)) * PAGE
            fields["body"] = fields["body"][: fields["span"]].ljust(fields["span"], b"x")
    elif kind in {Kind.BATCH, Kind.MISSING}:
        places = draw(st.sets(st.integers(0, pages - 1), min_size=1, max_size=5))
        size = extent.page_size
        body = runs(*((at * size, size) for at in sorted(places)))
        if kind is Kind.BATCH:
            body += draw(st.binary(min_size=1, max_size=3)) * (size * len(places))
            body = body[: len(places) * (12 + size)]
        fields |= {"region": region, "span": len(places), "body": body}
    elif kind is Kind.STATE:
        fields["body"] = draw(st.binary(max_size=50))
        fields |= {"offset": draw(st.integers(0, 1 << 40)), "span": draw(st.integers(0, 99))}
    elif wire.LIMITS[kind]:
        value = draw(st.dictionaries(st.text(max_size=5), st.integers() | st.text(), max_size=3))
        fields["body"] = json.dumps(value).encode()
    return kind, fields


@given(st.lists(any_frames(), max_size=6), st.booleans(), st.randoms(use_true_random=False))
def test_what_is_said_is_heard(
    frames: list[tuple[Kind, dict[str, Any]]], checked: bool, cuts: random.Random
) -> None:
    """Each side's kinds, by its own encoder, in any pieces."""
    for from_source in (True, False):
        encoder = Encoder()
        encoder.checked = checked
        stream, said = wire.PREAMBLE, []
        for kind, fields in frames:
            if kind in {Kind.ERROR, Kind.PROGRESS, Kind.PING} or FRAMES[kind][0] is from_source:
                given_fields = dict(fields)
                body = given_fields.pop("body", b"")
                stream += b"".join(encoder.frame(kind, body, **given_fields))
                said.append(Frame(kind, 0, 0, 0, 0, b"")._replace(**fields))
        receiver = decoder(from_source=from_source, checked=checked)
        heard: list[Frame] = []
        while stream:
            size = cuts.randint(1, len(stream))
            heard += taken(receiver, stream[:size])
            stream = stream[size:]
        assert heard == said


# --- JSON, regions, texts -----------------------------------------------------------------


@pytest.mark.parametrize(
    "body", [b"[]", b"1", b"{", b'{"a": \xff}', "{}".encode("utf-16"), b"[" * 60_000, b"null"]
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    """UTF-8, and an object."""
    (each,) = taken(decoder(), preamble(), frame(1, body))
    with pytest.raises(PeerError, match="HELLO that is no JSON"):
        each.json()


def test_no_body_is_an_empty_object() -> None:
    """Of a kind that has JSON."""
    (each,) = taken(decoder(from_source=False), preamble(), frame(10))
    assert each.json() == {}


def test_an_encoder_says_nothing_that_is_too_long() -> None:
    """It is found where it is made."""
    with pytest.raises(ValueError, match="at most 65536 bytes"):
        Encoder().json(Kind.PROGRESS, {"text": "x" * 66_000})
    with pytest.raises(ValueError, match="at most 1048576"):
        Encoder().frame(Kind.PAGES, bytes((1 << 20) + 1), span=1 << 20)


def region(**changes: Any) -> dict[str, Any]:
    return {"name": "heap", "length": 16 * PAGE, "page_size": PAGE} | changes


@pytest.mark.parametrize(
    "value, says",
    [
        (None, "without a list"),
        ({}, "without a list"),
        ([region(name=str(each)) for each in range(1025)], "at most 1024 regions"),
        ([7], "no JSON object"),
        ([{}], "named a region"),
        ([region(name=7)], "named a region"),
        ([region(name="x" * 256)], "at most 255 bytes"),
        ([region(name="\u00e9" * 128)], "at most 255 bytes"),
        ([region(name="a\0b")], "can be shown"),
        ([region(name="\ud800")], "can be shown"),
        ([region(name="a\x1b[2J")], "can be shown"),
        ([region(length=0)], "length of 0"),
        ([region(length=-PAGE)], "length of -4096"),
        ([region(length=100)], "no whole pages"),
        ([region(length=4096.0)], "length of 4096.0"),
        ([region(length=True)], "length of True"),
        ([region(length="4096")], "length of '4096'"),
        ([region(length=1 << 56)], "length of"),
        ([region(length=1 << 4000)], "length of"),
        ([region(page_size=0)], "page size of 0"),
        ([region(page_size=2048)], "page size of 2048"),
        ([region(page_size=PAGE * 3)], "page size of 12288"),
        ([region(page_size=2 << 20)], "page size of 2097152"),
        ([region(page_size=None)], "page size of None"),
        ([region(page_size=1 << 20)], "no whole pages"),
        ([region(), region()], "two regions of one name"),
        ([region(), region(name="b", length=32 * PAGE)], "196608 bytes of memory; 131072 are"),
    ],
)
def test_regions_that_are_none(value: Any, says: str) -> None:
    """What is wrong with them is said."""
    with pytest.raises(PeerError, match=says):
        wire.extents_of(value, 32 * PAGE)


def test_regions_of_a_hello() -> None:
    """As many as there are, and none as well."""
    assert wire.extents_of([], 0) == []
    value = [region(), region(name="b\u00e9", page_size=2 * PAGE)]
    assert wire.extents_of(value, 32 * PAGE) == [
        Extent("heap", 16 * PAGE, PAGE),
        Extent("b\u00e9", 16 * PAGE, 2 * PAGE),
    ]


def test_the_largest_hello_fits() -> None:
    """As many regions as may be, of the longest names."""
    regions = [
        Extent(f"{number:05}" + "\u00e9" * 125, 1 << 40, PAGE)._asdict()
        for number in range(wire.MAX_REGIONS)
    ]
    data = Encoder().json(Kind.HELLO, {"regions": regions, "name": "\u00e9" * wire.MAX_TEXT})
    (each,) = taken(Decoder(from_source=True), preamble(), data)
    assert len(wire.extents_of(each.json()["regions"], 1 << 50)) == wire.MAX_REGIONS


@pytest.mark.parametrize(
    "value, text",
    [
        ("a b", "a b"),
        (7, ""),
        (None, ""),
        ("a\nb\x1b[2J\u202e", "a?b?[2J?"),
        ("x" * 5000, "x" * 1024),
        ("\ud800", "?"),
    ],
)
def test_texts_move_no_cursor(value: object, text: str) -> None:
    """They end up in messages to people."""
    assert wire.text_of(value) == text


def test_batches_take_their_kind_from_the_page() -> None:
    """The numbers here are those of the code."""
    assert Kind(BATCH) is Kind.BATCH
    assert (wire.FLAG_CHECKED, wire.FLAG_ZSTD, wire.FLAG_LZ4) == (CHECKED, ZSTD, LZ4)
    assert (wire.HEAD_BYTES, wire.RUN_BYTES, wire.PREAMBLE_BYTES) == (36, 12, 16)
