"""The seek table and our note: written and read again, and what hostile ones are told."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.errors import SourceError
from aiouffd.sources import Extents
from aiouffd.sources import seek_table as table
from tests.seekable import seekable

ENTRIES = st.lists(
    st.tuples(st.integers(0, 1 << 20), st.integers(0, 1 << 20), st.integers(0, 2**32 - 1))
)


@given(ENTRIES, st.booleans())
def test_what_is_built_is_parsed(entries: list[tuple[int, int, int]], summed: bool) -> None:
    """A table says what it was built from, and finds each byte's frame."""
    packed = [entry[0] for entry in entries]
    sizes = [entry[1] for entry in entries]
    sums = [entry[2] for entry in entries]
    raw = table.build(packed, sizes, sums if summed else None)
    file_size = sum(packed) + len(raw)
    assert table.table_length(raw[-table.FOOTER_BYTES :], file_size) == len(raw)
    found = table.parse(raw, file_size)
    assert len(found) == len(entries)
    assert found.size == sum(sizes)
    assert [b - a for a, b in zip(found.offsets, found.offsets[1:], strict=False)] == packed
    assert [b - a for a, b in zip(found.starts, found.starts[1:], strict=False)] == sizes
    assert (found.checksums is None) == (not summed)
    assert found.checksums is None or list(found.checksums) == sums
    for number, size in enumerate(sizes):
        if size:
            assert found.frame_at(found.starts[number]) == number
            assert found.frame_at(found.starts[number + 1] - 1) == number


def test_the_bytes_are_those_of_the_published_format() -> None:
    """One frame of 5 bytes for 7, checksum 9: byte by byte."""
    assert table.build([5], [7], [9]).hex(" ", -4) == (
        "5e2a4d18 15000000 05000000 07000000 09000000 01000000 80b1ea92 8f"
    )
    assert table.build([5], [7]).hex() == "5e2a4d181100000005000000070000000100000000b1ea928f"


def test_unused_bits_of_the_descriptor_are_not_read() -> None:
    """Bits 0 and 1 may be anything."""
    raw = bytearray(table.build([5], [7]))
    raw[-5] |= 3
    assert table.parse(bytes(raw), 5 + len(raw)).size == 7


def _changed(at: int, value: int) -> Callable[[bytearray], None]:
    def change(raw: bytearray) -> None:
        raw[at] = value

    return change


def _frames(count: int) -> Callable[[bytearray], None]:
    def change(raw: bytearray) -> None:
        struct.pack_into("<I", raw, len(raw) - 9, count)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_changed(-1, 0), "does not end in a seek table"),
        (_changed(-5, 0x04), r"newer format \(descriptor 0x04\)"),
        (_changed(-5, 0x40), "newer format"),
        (_frames(table.MAX_FRAMES + 1), "16777217 frames, more than"),
        (_frames(5), "57 bytes long, but the file has 43 bytes"),
        (_frames(1), "no seek table begins 25 bytes"),
        (_changed(0, 0x5F), "no seek table begins"),
        (_changed(4, 0), "no seek table begins"),
        (_changed(8, 6), "are 11 bytes together, but 10 lie before"),
        (_changed(15, 0x40), "frame 0 holds 1073741831 bytes"),
    ],
)
def test_a_hostile_table_is_told_what_is_wrong(
    change: Callable[[bytearray], None], says: str
) -> None:
    """Each contradiction is refused in its own words."""
    raw = bytearray(table.build([5, 5], [7, 7]))
    change(raw)
    file_size = 10 + len(raw)
    with pytest.raises(SourceError, match=says):
        length = table.table_length(raw[-table.FOOTER_BYTES :], file_size)
        table.parse(raw[-length:], file_size)


def test_a_table_of_another_length_is_refused() -> None:
    """What is parsed must be the whole table."""
    raw = table.build([5], [7])
    with pytest.raises(SourceError, match="25 bytes long, not 26"):
        table.parse(b"x" + raw, 31)


def test_more_frames_than_can_be_read_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer keeps to what the reader takes."""
    monkeypatch.setattr(table, "MAX_FRAMES", 2)
    assert table.build([1, 1], [1, 1])
    with pytest.raises(ValueError, match="use larger ones"):
        table.build([1, 1, 1], [1, 1, 1])


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_parsed(raw: bytes) -> None:
    """No bytes whatever end in anything but a table or a SourceError."""
    raw = raw + b"\x00\x00\x00\x00\x00\xb1\xea\x92\x8f"
    try:
        length = table.table_length(raw[-9:], len(raw))
        table.parse(raw[-length:], len(raw))
    except SourceError:
        pass


def test_the_tail_tells() -> None:
    """Four bytes at the end tell a seekable file from all else."""
    assert table.ends_seekable(seekable(b"bytes"))
    assert not table.ends_seekable(seekable(b"bytes")[:-1])
    assert not table.ends_seekable(b"")


# --- the note --------------------------------------------------------------------------

NOTE = table.Note(b"d" * 32, 100, Extents([(0, 10), (50, 50)]))


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5))))
def test_a_note_is_read_as_it_was_written(gaps: list[tuple[int, int]]) -> None:
    """Extents, size and digest come back."""
    pairs, at = [], 0
    for gap, length in gaps:
        pairs.append((at + gap, length))
        at += gap + length
    note = table.Note(b"d" * 32, at, Extents(pairs))
    found = table.parse_note(table.build_note(note), at)
    assert found is not None
    assert (found.sha256, found.size, list(found.extents)) == (note.sha256, at, pairs)


def test_the_frames_of_others_are_no_notes() -> None:
    """Another magic, another name, a cut frame: passed by."""
    raw = table.build_note(NOTE)
    assert table.parse_note(raw[:-1], 100) is None
    assert table.parse_note(b"", 100) is None
    assert table.parse_note(b"\x5b" + raw[1:], 100) is None
    assert table.parse_note(raw[:8] + b"A" + raw[9:], 100) is None


def _note(count: int, deltas: list[int], *, more: bytes = b"") -> bytes:
    packed = zlib.compress(struct.pack(f"<{len(deltas)}Q", *deltas)) + more
    head = struct.pack("<8s32sQQ", b"aiouffd\x01", b"d" * 32, 100, count)
    return struct.pack("<II", table.NOTE_MAGIC, len(head) + len(packed)) + head + packed


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (_note(1, [0, 101]), "ends at 101, after 100"),
        (_note(2, [0, 2**64 - 1, 2, 3]), "ends at"),
        (_note(1, [5, 0]), "ascend"),
        (_note(2, [0, 10]), "does not have the 2 extents"),
        (_note(0, [0, 10]), "does not have the 0 extents"),
        (_note(1, [0, 10, 5, 5]), "does not have the 1 extents"),
        (_note(table.MAX_EXTENTS + 1, []), "more than"),
    ],
)
def test_a_hostile_note_is_told_what_is_wrong(raw: bytes, says: str) -> None:
    """Extents outside, empty, too many, too few."""
    with pytest.raises(SourceError, match=says):
        table.parse_note(raw, 100)


def test_a_corrupt_note_is_refused() -> None:
    """A bit that fell over in the extents is seen, and so is another image's note."""
    raw = bytearray(table.build_note(NOTE))
    with pytest.raises(SourceError, match="is for 100 bytes, its seek table for 99"):
        table.parse_note(raw, 99)
    raw[-1] ^= 1
    with pytest.raises(SourceError, match="corrupt"):
        table.parse_note(raw, 100)


def test_more_extents_than_can_be_read_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer keeps to what the reader takes."""
    monkeypatch.setattr(table, "MAX_EXTENTS", 1)
    with pytest.raises(ValueError, match="2 extents"):
        table.build_note(NOTE)
