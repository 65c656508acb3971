"""FileSource: the contract on disk and in memory, and what happens when the file changes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import struct
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest

from aiouffd.errors import ClosedError, SourceError
from aiouffd.fds import OwnedFd
from aiouffd.kernel import page_cache
from aiouffd.sources import ReadsInto, ReadsIntoNowait, SendsItself, Source, file, identity_of
from aiouffd.sources.file import FileSource
from aiouffd.testing.sources import PAGE, SourceContract, as_bytes, image
from tests.serving import within


class TestFileSource(SourceContract):
    """A file on whatever file system temporary files have."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Write the bytes to a file."""
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            source = FileSource(file.name)
            try:
                yield source
            finally:
                await source.aclose()


class TestFileSourceInMemory(SourceContract):
    """A memfd: its file system refuses RWF_NOWAIT, and its pages need no waiting."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Write the bytes to a memfd."""
        with OwnedFd(os.memfd_create("image")) as file:
            os.pwrite(file.fileno(), data, 0)
            source = FileSource(f"/proc/self/fd/{file.fileno()}")
            try:
                assert not data or source.read_nowait(0, 1) is not None
                yield source
            finally:
                await source.aclose()


class TestFileSourceByThread(SourceContract):
    """A file of which nothing is ever at hand: each read goes to a thread."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Write the bytes to a file and drop it from the page cache before each read."""
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            source = _NeverAtHand(file.name)
            try:
                yield source
            finally:
                await source.aclose()


class _NeverAtHand(FileSource):
    """What a file system without RWF_NOWAIT gives."""

    def _find_inline_flags(self) -> int | None:
        return None


class TestFileSourceOnTmpfs(SourceContract):
    """A file on tmpfs, found to be memory by its mount."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Write the bytes to a file in /dev/shm."""
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
            file.write(data)
            file.flush()
            source = FileSource(file.name)
            try:
                assert not data or source.read_nowait(0, 1) is not None
                yield source
            finally:
                await source.aclose()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give a file of eight pages."""
    file = tmp_path / "image"
    file.write_bytes(image(8 * PAGE))
    return file


@contextlib.asynccontextmanager
async def opened(path: Path) -> AsyncIterator[FileSource]:
    """Open a file and close it again."""
    source = FileSource(path)
    try:
        yield source
    finally:
        await source.aclose()


def write_sparse(path: Path, *, pages: int, held: Sequence[int]) -> None:
    """Make a file with data in the held pages and holes elsewhere."""
    with open(path, "wb") as file:
        file.truncate(pages * PAGE)
        for page in held:
            os.pwrite(file.fileno(), image(PAGE, seed=page), page * PAGE)


async def test_what_the_page_cache_has_needs_no_thread(path: Path) -> None:
    """A file that was just written is at hand."""
    async with opened(path) as source:
        assert as_bytes(await source.read(PAGE, PAGE)) == image(8 * PAGE)[PAGE : 2 * PAGE]
        assert source.read_nowait(0, PAGE) is not None


async def test_what_only_the_disk_has_is_read_in_a_thread(path: Path) -> None:
    """After the page cache dropped the file, nothing is at hand and a read brings it."""
    async with opened(path) as source:
        with OwnedFd(os.open(path, os.O_RDONLY)) as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            at_hand = source.read_nowait(4 * PAGE, PAGE)
        if at_hand is not None:
            pytest.skip("this file system keeps dropped pages; use a TMPDIR on a disk")
        assert as_bytes(await source.read(4 * PAGE, PAGE)) == path.read_bytes()[4 * PAGE :][:PAGE]
        assert source.read_nowait(4 * PAGE, PAGE) is not None


async def test_a_file_system_without_nowait_is_read_by_thread() -> None:
    """sysfs refuses RWF_NOWAIT and is no plain memory: nothing is at hand, all can be read."""
    path = Path("/sys/kernel/btf/vmlinux")
    if not path.exists():
        pytest.skip(f"needs {path}: a kernel with CONFIG_DEBUG_INFO_BTF")
    async with opened(path) as source:
        assert source.read_nowait(0, 64) is None
        assert as_bytes(await source.read(64, 8 * PAGE)) == path.read_bytes()[64 : 64 + 8 * PAGE]


async def test_holes_are_no_extents(tmp_path: Path) -> None:
    """A sparse file has extents only where something was written."""
    file = tmp_path / "sparse"
    write_sparse(file, pages=64, held=(3, 4, 40))
    async with opened(file) as source:
        extents = list(source.extents())
        held = [
            page
            for page in range(64)
            if any(
                start < (page + 1) * PAGE and page * PAGE < start + length
                for start, length in extents
            )
        ]
        assert {3, 4, 40} <= set(held)
        if held == list(range(64)):
            pytest.skip("this file system knows no holes; use a TMPDIR on ext4, xfs or tmpfs")
        assert held == [3, 4, 40]


async def test_a_file_of_nothing_but_a_hole_has_no_extents(tmp_path: Path) -> None:
    """A truncated-up file is one hole and reads as zeros."""
    file = tmp_path / "hole"
    file.touch()
    os.truncate(file, 4 * PAGE)
    async with opened(file) as source:
        assert list(source.extents()) == []
        assert as_bytes(await source.read(0, 4 * PAGE)) == bytes(4 * PAGE)


def _write_in_place(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"new")


def _truncate(path: Path) -> None:
    os.truncate(path, 4 * PAGE)


def _grow(path: Path) -> None:
    os.truncate(path, 9 * PAGE)


def _truncate_and_rewrite(path: Path) -> None:
    path.write_bytes(image(8 * PAGE, seed=1))


def _punch(path: Path) -> None:
    with open(path, "r+b") as file:
        os.ftruncate(file.fileno(), 0)
        os.ftruncate(file.fileno(), 8 * PAGE)


@pytest.mark.parametrize("kind", [FileSource, _NeverAtHand])
@pytest.mark.parametrize(
    "change", [_write_in_place, _truncate, _grow, _truncate_and_rewrite, _punch]
)
async def test_a_file_that_changes_is_refused_for_good(
    path: Path, change: object, kind: type[FileSource]
) -> None:
    """Scenario 22a, 23: after any change in place, every read raises, on both sides of it."""
    assert callable(change)
    source = kind(path)
    try:
        await source.read(0, PAGE)
        change(path)
        for page in (0, 3, 4, 7, 0):
            with pytest.raises(SourceError, match="changed while it was served"):
                await source.read(page * PAGE, PAGE)
            if kind is FileSource:
                with pytest.raises(SourceError, match="changed while it was served"):
                    source.read_nowait(page * PAGE, PAGE)
    finally:
        await source.aclose()


async def test_a_change_right_after_the_opening_is_seen(path: Path) -> None:
    """However soon a write follows the opening, no new byte is served."""
    for turn in range(200):
        async with opened(path) as source:
            with OwnedFd(os.open(path, os.O_WRONLY)) as file:
                os.write(file.fileno(), turn.to_bytes(4, "little"))
            with pytest.raises(SourceError):
                await source.read(0, PAGE)


async def test_the_inode_is_held_and_not_the_name(path: Path) -> None:
    """Scenario 22b, 23: a file renamed over it, or its deletion, changes nothing."""
    old = path.read_bytes()
    async with opened(path) as source:
        new = path.with_name("new")
        new.write_bytes(image(8 * PAGE, seed=1))
        os.link(path, path.with_name("second name"))
        new.rename(path)
        assert as_bytes(await source.read(0, 8 * PAGE)) == old
        path.with_name("second name").unlink()
        assert as_bytes(await source.read(0, 8 * PAGE)) == old
    async with opened(path) as source:
        assert as_bytes(await source.read(0, 8 * PAGE)) == image(8 * PAGE, seed=1)


@pytest.fixture
def other(path: Path) -> Iterator[int]:
    """Open the file as a stranger who wants to write it."""
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


async def test_the_shared_lock_keeps_an_exclusive_locker_out(path: Path, other: int) -> None:
    """Scenario 23: who asks for the lock before writing is held back until the last close."""
    async with opened(path):
        async with opened(path):
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


async def test_a_file_that_is_being_written_is_refused(path: Path, other: int) -> None:
    """An image whose writer holds the lock is not opened."""
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(SourceError, match="locked"):
        FileSource(path)


async def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A directory, a device or a pipe is refused at once, and waits for nobody."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, Path("/dev/zero"), tmp_path / "pipe"):
        with pytest.raises(SourceError, match="no regular file"):
            FileSource(path)
    with pytest.raises(OSError) as missing:
        FileSource(tmp_path / "nothing")
    assert missing.value.errno == errno.ENOENT


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Hold reads in threads up until the event is set; then they read as ever."""
    gate = threading.Event()
    read_all = file._read_all

    def wait_and_read(fd: int, offset: int, buffer: memoryview) -> file._Read:
        assert gate.wait(30)
        return read_all(fd, offset, buffer)

    monkeypatch.setattr(file, "_read_all", wait_and_read)
    yield gate
    gate.set()


async def test_a_page_does_not_wait_behind_long_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many of them wait for a disk."""
    path = tmp_path / "image"
    data = image(1 << 20)
    path.write_bytes(data)
    gate = threading.Event()
    read_all = file._read_all

    def wait_if_long(fd: int, offset: int, buffer: memoryview) -> file._Read:
        assert len(buffer) == PAGE or gate.wait(30)
        return read_all(fd, offset, buffer)

    monkeypatch.setattr(file, "_read_all", wait_if_long)
    source = _NeverAtHand(path)
    try:
        long = [asyncio.ensure_future(source.read(0, len(data))) for _ in range(16)]
        await asyncio.sleep(0)
        assert as_bytes(await within(source.read(PAGE, PAGE))) == data[PAGE : 2 * PAGE]
    finally:
        gate.set()
    for read in long:
        assert as_bytes(await read) == data
    await source.aclose()


async def test_closing_waits_for_the_threads_that_read(path: Path, gate: threading.Event) -> None:
    """The descriptor's number is not reused while a thread still reads from it."""
    source = _NeverAtHand(path)
    reads = [asyncio.ensure_future(source.read(0, 8 * PAGE)) for _ in range(8)]
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(source.aclose())
    await asyncio.sleep(0)
    assert not source._fd.closed
    assert not closing.done()
    with pytest.raises(ClosedError):
        source.read_nowait(0, 1)
    gate.set()
    await closing
    assert source._fd.closed
    for data in await asyncio.gather(*reads):
        assert as_bytes(data) == path.read_bytes()


async def test_a_cancelled_close_leaks_nothing(path: Path, gate: threading.Event) -> None:
    """A close that is cancelled leaves the closing to the last reading thread."""
    source = _NeverAtHand(path)
    reads = [asyncio.ensure_future(source.read(0, 8 * PAGE)) for _ in range(8)]
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(source.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert not source._fd.closed
    gate.set()
    await asyncio.gather(*reads)
    await source.aclose()
    assert source._fd.closed


async def test_a_cancelled_read_is_waited_for_by_the_close(
    path: Path, gate: threading.Event
) -> None:
    """Nobody wants its bytes any more, but its thread still has the descriptor."""
    source = _NeverAtHand(path)
    read = asyncio.ensure_future(source.read(0, PAGE))
    await asyncio.sleep(0)
    read.cancel()
    with pytest.raises(asyncio.CancelledError):
        await read
    closing = asyncio.ensure_future(source.aclose())
    await asyncio.sleep(0)
    assert not source._fd.closed
    gate.set()
    await closing
    assert source._fd.closed


async def test_the_identity_is_a_generation_of_an_inode(path: Path) -> None:
    """The same file is the same image, until it is written; a copy of it is another."""
    async with opened(path) as first, opened(path) as second:
        assert identity_of(first) == identity_of(second)
    before = identity_of(first)
    os.utime(path, ns=(1, 1))
    async with opened(path) as source:
        assert identity_of(source) not in (before, "")


async def test_what_is_at_hand_goes_into_a_buffer(path: Path) -> None:
    """The same bytes as without, refused as any other read; no more than may hold the loop."""
    source = FileSource(path)
    assert isinstance(source, ReadsIntoNowait)
    buffer = memoryview(bytearray(3 * PAGE))
    await source.read(0, source.size)  # whatever was cached before
    assert source.readinto_nowait(PAGE, buffer)
    assert bytes(buffer) == as_bytes(await source.read(PAGE, 3 * PAGE))
    with pytest.raises(SourceError, match="outside"):
        source.readinto_nowait(source.size, buffer)
    os.truncate(path, 1 << 20)
    with pytest.raises(SourceError, match="was changed"):
        source.readinto_nowait(0, buffer)
    await source.aclose()
    with pytest.raises(ClosedError):
        source.readinto_nowait(0, buffer)
    async with opened(path) as longer:
        assert isinstance(longer, ReadsIntoNowait)
        assert not longer.readinto_nowait(0, memoryview(bytearray(1 << 20)))


async def test_a_read_into_a_buffer_gives_the_same_bytes(path: Path) -> None:
    """In a thread, and refused as any other read."""
    source = FileSource(path)
    assert isinstance(source, ReadsInto)
    buffer = memoryview(bytearray(3 * PAGE))
    await source.readinto(PAGE, buffer)
    assert bytes(buffer) == as_bytes(await source.read(PAGE, 3 * PAGE))
    with pytest.raises(SourceError, match="outside"):
        await source.readinto(source.size, buffer)
    os.utime(path, ns=(1, 1))
    with pytest.raises(SourceError, match="was changed"):
        await source.readinto(0, buffer)
    await source.aclose()
    with pytest.raises(ClosedError):
        await source.readinto(0, buffer)


async def test_long_reads_hold_up_no_loop(tmp_path: Path) -> None:
    """Cached or not, they go to a thread."""
    long = tmp_path / "long"
    data = image(1 << 20)
    long.write_bytes(data)
    source = FileSource(long)
    assert not source._threads
    assert source.read_nowait(0, 1 << 20) is None
    at_hand = await asyncio.to_thread(source.read_nowait, 0, 1 << 20)  # a thread may copy it
    assert at_hand is not None
    assert as_bytes(at_hand) == data
    assert as_bytes(await source.read(0, 1 << 20)) == data
    assert source._threads
    await source.aclose()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection; the first does not block."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = socket.create_connection(listener.getsockname())
        second, _ = listener.accept()
    with first, second:
        first.setblocking(False)
        second.settimeout(10)
        yield first, second


def received(peer: socket.socket, length: int) -> bytes:
    """Read so many bytes."""
    data = b""
    while len(data) < length:
        data += peer.recv(length - len(data))
    return data


async def test_it_sends_itself(tmp_path: Path, pair: tuple[socket.socket, socket.socket]) -> None:
    """As much as the socket takes; not what would have to be read from a disk."""
    first, second = pair
    path = tmp_path / "image"
    data = image(4096 * PAGE)
    path.write_bytes(data)
    source = FileSource(path)
    assert isinstance(source, SendsItself)
    sent = source.send_nowait(first.fileno(), 3 * PAGE, 5 * PAGE)
    if sent is None:
        pytest.skip("no cachestat here: Linux 6.5 has it")
    assert sent == 5 * PAGE
    assert received(second, 5 * PAGE) == data[3 * PAGE : 8 * PAGE]
    total = 0
    while sent := source.send_nowait(first.fileno(), total, len(data) - total):
        total += sent
    assert 0 < total < len(data)  # what it does not take now it takes later
    assert received(second, total) == data[:total]
    os.fsync(source._fd.fileno())
    os.posix_fadvise(source._fd.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if not page_cache.holds(source._fd.fileno(), 0, PAGE):  # else it lies in memory anyway
        assert source.send_nowait(first.fileno(), 0, PAGE) is None
    with pytest.raises(SourceError):
        source.send_nowait(first.fileno(), len(data), 1)
    await source.aclose()
    with pytest.raises(ClosedError):
        source.send_nowait(first.fileno(), 0, 1)


async def test_what_was_changed_is_not_sent(
    tmp_path: Path, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is not read; and a connection that is broken is the connection's error."""
    first, second = pair
    path = tmp_path / "image"
    path.write_bytes(image(16 * PAGE))
    source = FileSource(path)
    monkeypatch.setattr(page_cache, "holds", lambda *_: True)
    assert source.send_nowait(first.fileno(), 0, PAGE) == PAGE
    second.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    second.close()
    with pytest.raises(ConnectionError):
        while source.send_nowait(first.fileno(), 0, PAGE):
            pass
    path.write_bytes(image(17 * PAGE))
    here, there = socket.socketpair()
    with here, there, pytest.raises(SourceError, match="was changed while it was served"):
        source.send_nowait(here.fileno(), 0, PAGE)
    await source.aclose()
