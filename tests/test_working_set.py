"""Working sets: the file, hostile files, combining and comparing."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.errors import WorkingSetError
from aiouffd.events import decode_fault_word
from aiouffd.working_set import (
    GRANULE,
    MAX_IMAGE_BYTES,
    Header,
    Records,
    WorkingSet,
    combine,
    compare,
    pack_record,
)

HEADER = Header(identity="file-1", image_size=1000 * GRANULE, when=1.5, window=30.0)


def made_of(granules: set[int], header: Header = HEADER) -> WorkingSet:
    result = WorkingSet(header)
    for granule in granules:
        result.add(granule)
    return result


def members(one: WorkingSet) -> set[int]:
    return set(chain.from_iterable(range(first, first + count) for first, count in one.runs()))


def file_of(tmp_path: Path, records: bytes, header: Header = HEADER) -> Path:
    path = tmp_path / "set"
    path.write_bytes(header.encode() + records)
    return path


# --- as a set --------------------------------------------------------------------------

runs = st.lists(st.tuples(st.integers(0, 9999), st.integers(1, 500)), max_size=8)


@given(runs)
def test_a_set_holds_what_was_added(added: list[tuple[int, int]]) -> None:
    """Runs, membership, count and share all tell of the same granules."""
    one = WorkingSet(replace(HEADER, image_size=10_500 * GRANULE - 1))
    expected: set[int] = set()
    for first, count in added:
        one.add(first, count)
        expected |= set(range(first, first + count))
    assert members(one) == expected
    assert len(one) == len(expected)
    assert bool(one) == bool(expected)
    assert one.share == len(expected) / 10_500
    assert one.length == len(expected) * GRANULE
    found = list(one.runs())
    assert all(a + m < b for (a, m), (b, _) in pairwise(found))
    for first in (1, 4095, 4096, 5000, 10_499, 10_500):
        later = set(chain.from_iterable(range(a, a + n) for a, n in one.runs(first)))
        assert later == {granule for granule in expected if granule >= first}
    outside = set(chain.from_iterable(range(a, a + n) for a, n in one.gaps()))
    assert outside == set(range(10_500)) - expected
    for granule in (0, 4095, 4096, 10_499, 10_500, -1):
        assert (granule in one) == (granule in expected)
    for cells in (1, 7, 60):
        densities = one.densities(cells)
        assert len(densities) == cells
        for cell, density in enumerate(densities):
            where = range(cell * 10_500 // cells, (cell + 1) * 10_500 // cells)
            assert density == sum(one in expected for one in where) / len(where)


def test_what_lies_outside_is_refused() -> None:
    """A set never holds more than its image."""
    one = WorkingSet(HEADER)
    for first, count in ((-1, 1), (1000, 1), (999, 2), (5, -1)):
        with pytest.raises(ValueError, match="of an image of 1000"):
            one.add(first, count)
    assert not one
    assert WorkingSet(replace(HEADER, image_size=3 * GRANULE)).densities(80) == [0, 0, 0]


sets = st.lists(st.sets(st.integers(0, 63)), min_size=1, max_size=9)


@given(sets, st.integers(1, 10))
def test_at_least_so_many_of_all(granules: list[set[int]], at_least: int) -> None:
    """1 is the union, all the intersection, and everything in between counts."""
    combined = combine((made_of(one) for one in granules), at_least)
    assert members(combined) == {
        granule for granule in range(64) if sum(granule in one for one in granules) >= at_least
    }
    assert combined.header.combined
    assert combined.header.identity == HEADER.identity


def test_combining_what_does_not_belong_together_is_refused() -> None:
    """Offsets of one image say nothing about another."""
    one, other = made_of({1}), made_of({2}, replace(HEADER, identity="file-2"))
    for wrong in (other, made_of({2}, replace(HEADER, image_size=1 << 20))):
        with pytest.raises(WorkingSetError, match="made for"):
            combine([one, wrong])
        with pytest.raises(WorkingSetError, match="made for"):
            compare(one, wrong)
    unknown = made_of({3}, replace(HEADER, identity=""))
    with pytest.raises(WorkingSetError, match="does not say"):
        combine([one, unknown])
    assert members(combine([one, unknown], any_image=True)) == {1, 3}
    with pytest.raises(WorkingSetError, match="no working set"):
        combine([])
    with pytest.raises(ValueError, match="at least one"):
        combine([one], 0)


@given(st.sets(st.integers(0, 63)), st.sets(st.integers(0, 63)))
def test_comparing(first: set[int], second: set[int]) -> None:
    """Counts of what both have and what only one has."""
    found = compare(made_of(first), made_of(second))
    assert found == (len(first & second), len(first - second), len(second - first))
    either = first | second
    assert found.jaccard == (len(first & second) / len(either) if either else 1.0)


# --- the file --------------------------------------------------------------------------


@given(runs, st.text(max_size=40))
def test_a_file_gives_back_the_set(added: list[tuple[int, int]], identity: str) -> None:
    """Saved and loaded, with its header."""
    header = replace(HEADER, identity=identity, image_size=10_500 * GRANULE, combined=True)
    one = WorkingSet(header)
    for first, count in added:
        one.add(first, count)
    file = io.BytesIO(header.encode())
    assert Header.read(file) == header
    assert len(header.encode()) % 16 == 0
    with tempfile_of(one) as path:
        again = WorkingSet.load(path)
        assert again == one
        assert again.header == header
        assert (again.skipped, again.problem) == (0, "")
        assert [path] == list(path.parent.iterdir())


class tempfile_of:  # noqa: N801 - a context manager; Hypothesis and tmp_path do not mix
    def __init__(self, one: WorkingSet) -> None:
        self._set = one

    def __enter__(self) -> Path:
        import tempfile

        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name, "set")
        self._set.save(path)
        return path

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def test_a_long_run_is_several_records(tmp_path: Path) -> None:
    """A record covers a gigabyte at most, so that no file can make a reader set bits for ever."""
    header = replace(HEADER, image_size=5 << 30)
    one = WorkingSet(header)
    one.add(1, one.granules - 2)
    one.save(tmp_path / "set")
    assert (tmp_path / "set").stat().st_size == len(header.encode()) + 5 * 16
    assert WorkingSet.load(tmp_path / "set") == one


def test_records_tell_the_order(tmp_path: Path) -> None:
    """As they were recorded: offset, length, kind and time; the word is a fault word."""
    records = pack_record(0x5000 | 1, 1_500_000, 1) + pack_record(0x2000, 2_000_000, 2)
    with file_of(tmp_path, records).open("rb") as file:
        found = list(Records(file))
    assert [(one.offset, one.length, one.flags, one.seconds) for one in found] == [
        (0x5000, 4096, 1, 1.5),
        (0x2000, 8192, 0, 2.0),
    ]
    assert decode_fault_word(struct.unpack("<Q", records[:8])[0]) == (0x5000, 1)


@given(st.integers(0, 6 * 16))
def test_every_prefix_is_a_set(length: int) -> None:
    """A recording that was cut off holds what was written until then."""
    records = b"".join(pack_record(number * GRANULE, number, 1) for number in range(6))
    file = io.BytesIO(HEADER.encode() + records[:length])
    assert [one.offset for one in Records(file)] == [n * GRANULE for n in range(length // 16)]


# --- hostile files ---------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    """One error that says what is wrong, whatever the bytes."""
    with pytest.raises(WorkingSetError):
        Records(io.BytesIO(data))


@given(st.data())
def test_a_damaged_header_is_refused_or_read(data: st.DataObject) -> None:
    """No other error, and never a set for an image beyond the limit."""
    encoded = bytearray(HEADER.encode())
    encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        header = Header.read(io.BytesIO(encoded))
    except WorkingSetError:
        return
    assert 0 < header.image_size <= MAX_IMAGE_BYTES


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (0, b"x", "does not begin with a header"),
        (8, b"\x02\0", "version 2"),
        (12, b"\0\0\1\0", "granules of 65536"),
        (16, bytes(8), "an image of 0 bytes"),
        (16, b"\xff" * 8, "at most"),
        (24, b"\1\1\0\0", "no memory has those"),
        (10, b"\xff\xff", "that is not there"),
        (48, b"\xff", "no UTF-8"),
    ],
)
def test_a_header_that_cannot_be_used(at: int, value: bytes, reason: str, tmp_path: Path) -> None:
    """The error names the file and the reason."""
    encoded = bytearray(HEADER.encode())
    encoded[at : at + len(value)] = value
    path = tmp_path / "set"
    path.write_bytes(encoded)
    with pytest.raises(WorkingSetError, match=f"{path}: .*{reason}"):
        WorkingSet.load(path)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (pack_record(1000 * GRANULE, 0, 1), "0x3e8000, which is outside"),
        (pack_record(999 * GRANULE, 0, 2), "outside of the image"),
        (pack_record((1 << 64) - GRANULE, 0, 1), "outside"),
        (pack_record(0x1008, 0, 1), "0x1008 is no fault word"),
        (pack_record(0, 0, 0), "0 granules"),
        (pack_record(0, 0, 0xFFFF_FFFF), "4294967295 granules"),
    ],
)
def test_a_bad_record_is_left_out(record: bytes, reason: str, tmp_path: Path) -> None:
    """The others count; what was wrong with the first is told once."""
    path = file_of(tmp_path, pack_record(0x3000, 0, 1) + record * 3 + pack_record(0x1000, 0, 2))
    one = WorkingSet.load(path)
    assert members(one) == {1, 2, 3}
    assert one.skipped == 3
    assert reason in one.problem


def test_millions_of_records_cost_the_bits_of_the_image(tmp_path: Path) -> None:
    """A bit per granule, however many records; descending and overlapping ones included."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    header = replace(HEADER, image_size=1 << 30)
    block = b"".join(
        pack_record(chance.randrange(1 << 18) * GRANULE, 0, chance.choice((1, 1, 3)))
        for _ in range(4096)
    )
    path = file_of(tmp_path, block * 15, header)
    tracemalloc.start()
    try:
        WorkingSet.load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (1 << 18) // 8 + (256 << 10)


def test_a_set_for_another_image_is_refused() -> None:
    """Another size, another generation, or none that is known."""
    HEADER.check_image("file-1", 1000 * GRANULE)
    for identity, size, reason in (
        ("file-1", 999 * GRANULE, "4096000 bytes; this one has"),
        ("file-2", 1000 * GRANULE, "another generation"),
        ("", 1000 * GRANULE, "the image does not say"),
    ):
        with pytest.raises(WorkingSetError, match=reason):
            HEADER.check_image(identity, size)
    HEADER.check_image("", 1000 * GRANULE, any_image=True)
    with pytest.raises(WorkingSetError, match="another generation"):
        HEADER.check_image("file-2", 1000 * GRANULE, any_image=True)
    with pytest.raises(WorkingSetError, match="the set does not say"):
        replace(HEADER, identity="").check_image("file-1", 1000 * GRANULE)


def test_a_set_that_cannot_be_saved_leaves_nothing(tmp_path: Path) -> None:
    """Neither a part of a file nor an older file that is gone."""
    path = tmp_path / "set"
    path.mkdir()
    with pytest.raises(OSError, match="set"):
        made_of({1}).save(path)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="an identity of 2000 bytes"):
        replace(HEADER, identity="x" * 2000).encode()
