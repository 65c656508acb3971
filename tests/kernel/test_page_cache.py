"""cachestat: what of a file is in memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiouffd.kernel import abi, page_cache

PAGE = 4096


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file of 64 pages, of which nothing is cached."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(64 * PAGE))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
    yield fd
    os.close(fd)


def test_only_what_was_read_is_there(fd: int) -> None:
    """Page by page; a stretch counts as a whole."""
    if page_cache.holds(fd, 0, 1):
        pytest.skip("this file system keeps its files in memory: run with TMPDIR on a disk")
    os.pread(fd, 1, 5 * PAGE)
    os.pread(fd, 1, 6 * PAGE)
    if not page_cache.holds(fd, 5 * PAGE, 1):
        pytest.skip("no cachestat here: Linux 6.5 has it")
    assert page_cache.holds(fd, 5 * PAGE, 2 * PAGE)
    assert page_cache.holds(fd, 6 * PAGE - 1, 2)
    assert not page_cache.holds(fd, 5 * PAGE - 1, 2)
    assert not page_cache.holds(fd, 5 * PAGE, 2 * PAGE + 1)


def test_where_the_call_is_missing_nothing_is_known(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Linux 6.4."""
    os.pread(fd, PAGE, 0)
    monkeypatch.setattr(abi, "NR_CACHESTAT", 100_000)
    assert not page_cache.holds(fd, 0, PAGE)


def test_no_file_is_an_error() -> None:
    """With its errno."""
    with pytest.raises(OSError, match="cachestat"):
        page_cache.holds(-1, 0, PAGE)


def test_a_hole_reads_as_zeros() -> None:
    """What is punched out of a memfd is given back, and its neighbours are not."""
    fd = os.memfd_create("holes")
    try:
        os.write(fd, b"x" * 3 * PAGE)
        page_cache.punch_hole(fd, PAGE, PAGE)
        assert os.pread(fd, 3 * PAGE, 0) == b"x" * PAGE + bytes(PAGE) + b"x" * PAGE
        assert os.fstat(fd).st_blocks * 512 == 2 * PAGE
    finally:
        os.close(fd)


def test_no_hole_where_there_can_be_none() -> None:
    """A pipe has none: the kernel's errno."""
    read, write = os.pipe()
    try:
        with pytest.raises(OSError, match="fallocate") as caught:
            page_cache.punch_hole(write, 0, PAGE)
        assert caught.value.errno == errno.ESPIPE
    finally:
        os.close(read)
        os.close(write)
