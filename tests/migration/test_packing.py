"""Bodies made smaller: both ways, and what a peer cannot make of them."""

from __future__ import annotations

import random
import struct
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.errors import DamagedFrame, PeerError
from aiouffd.migration import packing, wire
from aiouffd.migration.wire import COMPRESSION, Decoder, Encoder, Kind
from aiouffd.sources.zstd_frames import FrameCompressor
from tests.migration.frames import CHECKED, LZ4, PAGE, ZSTD, decoder, frame, preamble, runs, taken
from tests.seekable import zstd

both = pytest.mark.parametrize("name", sorted(COMPRESSION))

#: Pages that become smaller, and such that do not.
TEXT = b"what a page may look like; " * 4096
NOISE = random.Random(3).randbytes(1 << 20)


def unpacking(name: str, *, checked: bool = False) -> Decoder:
    receiver = decoder(checked=checked)
    receiver.decompress_by(name, packing.codec(name)[1])
    return receiver


def packer(name: str) -> Encoder:
    encoder = Encoder()
    encoder.compress_by(name, packing.codec(name)[0])
    return encoder


def test_what_can_be_used_is_named_the_better_first() -> None:
    """Both have their library here."""
    assert packing.available() == ["zstd", "lz4"]


@both
@pytest.mark.parametrize("checked", [False, True])
def test_bodies_come_back(name: str, checked: bool) -> None:
    """Pages and batches; a checksum is that of what goes over the wire."""
    encoder, receiver = packer(name), unpacking(name, checked=checked)
    encoder.checked = checked
    taken(receiver, preamble())
    pages = TEXT[: 8 * PAGE]
    batch = runs((0, PAGE), (3 * PAGE, PAGE)) + TEXT[: 2 * PAGE]
    for kind, body, span in ((Kind.PAGES, pages, len(pages)), (Kind.BATCH, batch, 2)):
        data = b"".join(encoder.frame(kind, body, span=span))
        assert len(data) < len(body) // 2
        for size in (1, len(data)):
            pieces = (data[at : at + size] for at in range(0, len(data), size))
            (each,) = taken(receiver, *pieces)
            assert (each.kind, each.body) == (kind, body)


@both
def test_what_does_not_become_smaller_goes_as_it_is(name: str) -> None:
    """And so does everything that is no memory."""
    encoder = packer(name)
    for kind, body, span in (
        (Kind.PAGES, NOISE[:PAGE], PAGE),
        (Kind.STATE, bytes(PAGE), PAGE),
        (Kind.PROGRESS, b'{"a": "' + b"a" * PAGE + b'"}', 0),
    ):
        head, sent = encoder.frame(kind, body, span=span)
        assert sent == body
        assert head[1] & (ZSTD | LZ4) == 0


@both
@given(data=st.data())
def test_any_pages_come_back(name: str, data: st.DataObject) -> None:
    """Of any contents."""
    page = data.draw(st.binary(min_size=1, max_size=64)) * PAGE
    count = data.draw(st.integers(1, 4))
    body = (page[:PAGE] * count)[:-8] + data.draw(st.binary(min_size=8, max_size=8))
    receiver = unpacking(name)
    (each,) = taken(
        receiver,
        preamble(),
        b"".join(packer(name).frame(Kind.PAGES, body, span=len(body))),
    )
    assert each.body == body


def packed(name: str, data: bytes) -> bytes:
    """Compress, whether it pays or not."""
    if name == "lz4":
        return pytest.importorskip("lz4.block").compress(data, store_size=False)  # type: ignore[no-any-return]
    return FrameCompressor(1).compress(data)[0]


def bomb(name: str) -> bytes:
    """Make 64 MiB of zeros out of a few bytes (lz4: 264 KiB)."""
    return packed(name, bytes(64 << 20))


@both
@pytest.mark.parametrize("kind", [Kind.PAGES, Kind.BATCH])
def test_a_bomb_makes_no_more_than_a_frame_may_hold(name: str, kind: Kind) -> None:
    """Whatever it would like to be; neither on the way to finding out."""
    data = bomb(name)
    flag, span = COMPRESSION[name], PAGE if kind is Kind.PAGES else 1
    receiver = unpacking(name)
    stream = preamble() + frame(kind, data, flags=flag | CHECKED, span=span)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFrame, match="cannot be decompressed"):
            taken(receiver, stream)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def with_window(log: int) -> bytes:
    """Make a frame that does not say how long its contents are, but how large its window."""
    options: dict[int, int] = {
        zstd.CompressionParameter.window_log: log,
        zstd.CompressionParameter.content_size_flag: 0,
    }
    compressor = zstd.ZstdCompressor(options=options)
    return compressor.compress(TEXT[:PAGE]) + compressor.flush(compressor.FLUSH_FRAME)


def test_a_window_is_no_larger_than_a_frame_may_be() -> None:
    """A zstd frame of a hundred bytes may ask for one of 128 MiB."""

    def stream(log: int) -> bytes:
        return preamble() + frame(4, with_window(log), flags=ZSTD | CHECKED, span=PAGE)

    for log in (22, 27, 30):
        with pytest.raises(DamagedFrame, match="memory"):
            taken(unpacking("zstd"), stream(log))
    (each,) = taken(unpacking("zstd"), stream(21))
    assert each.body == TEXT[:PAGE]


@both
@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE + 1, 2 * PAGE])
def test_pages_of_another_length_are_refused(name: str, size: int) -> None:
    """Shorter or longer than the head says."""
    data = packed(name, TEXT[:size])
    with pytest.raises(DamagedFrame, match="decompress"):
        taken(
            unpacking(name),
            preamble(),
            frame(4, data, flags=COMPRESSION[name] | CHECKED, span=PAGE),
        )


@both
def test_a_batch_whose_runs_are_wrong_inside_is_refused(name: str) -> None:
    """Tables are looked at once they can be read."""
    for table, says in (
        (runs((1 << 40, PAGE)), "behind its end"),
        (runs((0, 2 * PAGE)), "whose runs make"),
        (runs((0, PAGE))[:7], "in 7 bytes"),
    ):
        body = table if len(table) < 12 else table + TEXT[:PAGE]
        data = frame(5, packed(name, body), flags=COMPRESSION[name] | CHECKED, span=1)
        with pytest.raises(PeerError, match=says):
            taken(unpacking(name), preamble(), data)


@both
def test_only_what_was_agreed_on_is_understood(name: str) -> None:
    """The other one is not."""
    (other,) = set(COMPRESSION) - {name}
    data = packed(other, TEXT[:PAGE])
    with pytest.raises(PeerError, match="not agreed on"):
        taken(unpacking(name), preamble(), frame(4, data, flags=COMPRESSION[other], span=PAGE))


@both
@given(data=st.binary(max_size=200), begun=st.booleans())
def test_any_bytes_end_in_a_named_error(name: str, data: bytes, begun: bool) -> None:
    """A compressed body may be anything."""
    body = packed(name, TEXT[:PAGE])[: len(data)] + data if begun else data
    receiver = unpacking(name)
    try:
        (each,) = taken(
            receiver, preamble(), frame(4, body, flags=COMPRESSION[name] | CHECKED, span=PAGE)
        )
    except DamagedFrame:
        return
    assert len(bytes(each.body)) == PAGE


def test_more_than_one_zstd_frame_is_refused() -> None:
    """Nor is anything behind it."""
    one = packed("zstd", TEXT[:PAGE])
    for body in (one + one, one + b"x", one[:-1], packed("zstd", b"") + one):
        with pytest.raises(DamagedFrame):
            taken(unpacking("zstd"), preamble(), frame(4, body, flags=ZSTD | CHECKED, span=PAGE))


def test_a_block_of_lz4_has_no_length_before_it() -> None:
    """Its page says so; with one it is another block."""
    block = pytest.importorskip("lz4.block").compress(TEXT[:PAGE], store_size=False)
    with_size = struct.pack("<I", PAGE) + block
    receiver = unpacking("lz4")
    (each,) = taken(receiver, preamble(), frame(4, block, flags=LZ4 | CHECKED, span=PAGE))
    assert each.body == TEXT[:PAGE]
    with pytest.raises(DamagedFrame):
        taken(receiver, frame(4, with_size, flags=LZ4 | CHECKED, span=PAGE))


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the extra that brings it; what is left can be used."""
    monkeypatch.setitem(sys.modules, "lz4", None)
    monkeypatch.delitem(sys.modules, "aiouffd.migration.lz4_blocks", raising=False)
    monkeypatch.delattr("aiouffd.migration.lz4_blocks", raising=False)
    with pytest.raises(ImportError, match=r"aiouffd\[lz4\]"):
        packing.codec("lz4")
    assert packing.available() == ["zstd"]


def test_the_largest_frames_come_back() -> None:
    """A mebibyte in one run, and in as many runs as fit."""
    body = (TEXT * 10)[: wire.MAX_DATA]
    many = wire.MAX_DATA // PAGE
    batch = runs(*((2 * at * PAGE, PAGE) for at in range(many))) + body
    for name in COMPRESSION:
        receiver = unpacking(name)
        taken(receiver, preamble())
        encoder = packer(name)
        (each,) = taken(receiver, b"".join(encoder.frame(Kind.PAGES, body, span=len(body))))
        assert each.body == body
        (each,) = taken(receiver, b"".join(encoder.frame(Kind.BATCH, batch, span=many)))
        assert each.body == batch
