"""Memory at both ends: read without being made, laid down without a fault."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.errors import SourceError
from aiouffd.migration.memory import Landing, SourceMemory, seal, split
from aiouffd.migration.wire import Extent
from tests.migration.frames import PAGE


@contextmanager
def memfd(pages: int) -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, pages * PAGE)
        yield fd
    finally:
        os.close(fd)


def held(fd: int) -> int:
    """Count the pages that a memfd has."""
    return os.fstat(fd).st_blocks * 512 // PAGE


def test_a_hole_is_read_and_stays_one() -> None:
    """Reading a memfd makes no pages."""
    with memfd(64) as fd:
        os.pwrite(fd, b"x" * PAGE, 5 * PAGE)
        memory = SourceMemory(fd, Extent("heap", 64 * PAGE, PAGE))
        try:
            assert memory.read(4 * PAGE, 3 * PAGE) == bytes(PAGE) + b"x" * PAGE + bytes(PAGE)
            assert memory.read(0, 64 * PAGE).count(0) == 63 * PAGE
            assert held(fd) == 1
        finally:
            memory.close()
            memory.close()


def test_the_descriptor_is_its_own() -> None:
    """It is open as long as it has to be, and no child gets it."""
    with memfd(1) as fd:
        os.pwrite(fd, b"y" * PAGE, 0)
        memory = SourceMemory(fd, Extent("heap", PAGE, PAGE))
        assert not os.get_inheritable(memory._fd)
    try:
        assert memory.read(0, PAGE) == b"y" * PAGE
    finally:
        memory.close()


def test_a_file_that_is_too_short_is_named() -> None:
    """With where it ends: no zeros are made up."""
    with memfd(3) as fd:
        memory = SourceMemory(fd, Extent("heap", 4 * PAGE, PAGE))
        try:
            with pytest.raises(SourceError, match=r"'heap' ends at offset 12288.*16384 bytes"):
                memory.read(2 * PAGE, 2 * PAGE)
        finally:
            memory.close()


def test_memory_of_a_process_is_read_where_it_lies() -> None:
    """Any kind of it; where nothing is mapped that is said."""
    with mmap.mmap(-1, 4 * PAGE) as area:
        area[PAGE : 2 * PAGE] = b"z" * PAGE
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        memory = SourceMemory.of_process("self", start, Extent("area", 4 * PAGE, PAGE))
        nowhere = SourceMemory.of_process("self", 0, Extent("nowhere", 4 * PAGE, PAGE))
        try:
            assert memory.read(0, 2 * PAGE) == bytes(PAGE) + b"z" * PAGE
            with pytest.raises(SourceError, match="offset 4096 of region 'nowhere' cannot be read"):
                nowhere.read(PAGE, PAGE)
        finally:
            memory.close()
            nowhere.close()


def test_a_process_that_is_not_there_is_an_error() -> None:
    """At once."""
    with pytest.raises(FileNotFoundError):
        SourceMemory.of_process(2**22 + 1, 0, Extent("area", PAGE, PAGE))


@given(
    st.lists(st.sampled_from(["zero", "first", "last", "full"]), min_size=1, max_size=40),
    st.sampled_from([PAGE, 4 * PAGE]),
    st.integers(0, 1000),
)
def test_zeros_are_told_from_the_rest(kinds: list[str], page_size: int, at: int) -> None:
    """Page by page, in runs as long as may be."""
    pages = {
        "zero": bytes(page_size),
        "first": b"\1" + bytes(page_size - 1),
        "last": bytes(page_size - 1) + b"\1",
        "full": b"\1" * page_size,
    }
    offset = at * page_size
    runs, others = split(b"".join(pages[kind] for kind in kinds), offset, page_size)
    assert others is any(kind != "zero" for kind in kinds)
    zeros = [start + page for start, length in runs for page in range(0, length, page_size)]
    assert zeros == [
        offset + number * page_size for number, kind in enumerate(kinds) if kind == "zero"
    ]
    ends = [start + length for start, length in runs]
    assert all(end < start for end, (start, _) in zip(ends, runs[1:], strict=False))


def test_a_whole_mebibyte_of_zeros_is_one_run() -> None:
    """And a bit in its last byte is seen."""
    data = bytes(1 << 20)
    assert split(data, 0, PAGE) == ([(0, 1 << 20)], False)
    assert split(data[:-1] + b"\1", 0, PAGE) == ([(0, (1 << 20) - PAGE)], True)


def test_what_is_laid_down_is_in_the_memfd() -> None:
    """And is gone again where it is discarded; nothing else is touched."""
    with memfd(8) as fd:
        landing = Landing(fd, 8 * PAGE)
        try:
            landing.view[PAGE : 4 * PAGE] = b"a" * 3 * PAGE
            assert held(fd) == 3
            assert os.pread(fd, PAGE, 3 * PAGE) == b"a" * PAGE
            landing.discard(2 * PAGE, 2 * PAGE)
            assert held(fd) == 1
            assert os.pread(fd, 3 * PAGE, PAGE) == b"a" * PAGE + bytes(2 * PAGE)
        finally:
            landing.close()
            landing.close()


def test_a_landing_is_of_memory_that_is_there() -> None:
    """A file that is too short is refused, and so is one that cannot be written to."""
    with memfd(2) as fd:
        with pytest.raises(ValueError, match="length"):
            Landing(fd, 3 * PAGE)
        reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            with pytest.raises(PermissionError):
                Landing(reading, 2 * PAGE)
        finally:
            os.close(reading)


def test_a_landing_that_is_still_received_into_is_let_go_of_later() -> None:
    """Closing it does not pull memory away under a frame."""
    with memfd(1) as fd:
        landing = Landing(fd, PAGE)
        part = landing.view[:PAGE]
        landing.close()
        part[:1] = b"b"
        assert os.pread(fd, 1, 0) == b"b"
        part.release()


def _sealed(pages: int) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, pages * PAGE)
    seal(fd)
    return fd


def test_memory_that_cannot_shrink_is_given_as_it_lies() -> None:
    """Without a copy, unless a hole or a page that may be zeros is among it; its file stays put."""
    fd = _sealed(8)
    try:
        os.pwrite(fd, b"x" * 4 * PAGE, 0)
        with contextlib.closing(SourceMemory(fd, Extent("memory", 8 * PAGE, PAGE))) as memory:
            view = memory.as_it_lies(PAGE, 3 * PAGE)
            assert view is not None
            assert view == b"x" * 3 * PAGE
            os.pwrite(fd, b"y", 2 * PAGE)
            assert view[PAGE] == ord("y")
            assert memory.as_it_lies(PAGE, 4 * PAGE) is None  # the last is a hole
            os.pwrite(fd, bytes(8) + b"z", 4 * PAGE)
            assert memory.as_it_lies(PAGE, 4 * PAGE) is None
            assert os.lseek(fd, 0, os.SEEK_CUR) == 0
            assert os.stat(fd).st_blocks * 512 == 5 * PAGE  # looking has filled no hole
            view.release()
    finally:
        os.close(fd)


def test_memory_that_could_shrink_is_read() -> None:
    """A program that cuts its memory off ends its migration, not the process that reads it."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    try:
        os.pwrite(fd, b"x" * 4 * PAGE, 0)
        with contextlib.closing(SourceMemory(fd, Extent("memory", 4 * PAGE, PAGE))) as memory:
            assert memory.as_it_lies(0, 4 * PAGE) is None
            os.ftruncate(fd, PAGE)
            with pytest.raises(SourceError, match="ends at offset 4096"):
                memory.read(0, 4 * PAGE)
    finally:
        os.close(fd)
    sealed = _sealed(1)
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(sealed, 0)
    finally:
        os.close(sealed)
