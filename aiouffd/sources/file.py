"""A source over a regular file, read without a thread where the page cache has it.

Knows: one inode, held by a descriptor; its size, times and holes when it was opened.
Must not know: page faults; what the file is for.

Laws of this file:

* The inode is held, not the name: deleting or renaming the file strands nobody.
* Never bytes of two generations.  After each read the inode's size and mtime are compared
  with those at opening; once they differ, this read and every later one raises SourceError.
  write(2) and truncate(2) set the times *before* they change a byte, so a look after the
  read sees every change that could have touched what was read.  From Linux 6.13 on such a
  change always shows in the mtime (multigrain timestamps on ext4, xfs, btrfs, tmpfs);
  before, one within the same clock tick (1 to 10 ms) as the opening does not.
* What no look can see are stores through somebody's shared writable mapping of the file, and
  an mtime that was set back; and what was given to a socket (``send_nowait``) is the file's own
  pages until the other side has it.  Not writing to an image that is served stays the owner's
  duty; the shared lock (flock) held meanwhile tells it to those who ask.
* The loop never waits for a disk: RWF_NOWAIT (Linux 4.14) gives only what is cached, and the
  rest goes to threads.
* What a fault waits for does not stand in line behind megabytes: long reads have threads of
  their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, TypeAlias

from ..errors import ClosedError, SourceError
from ..fds import OwnedFd
from ..kernel import page_cache
from . import Extents, check_read

if TYPE_CHECKING:
    from typing_extensions import Buffer

with contextlib.suppress(ImportError):  # not a Unix: importing works, opening does not
    import fcntl

#: Reads at once that had to go to a thread, short ones and long ones each; more wait in line.
READERS: Final = 4

_LONG: Final = 128 * 1024  # bytes

#: The longest read on the loop: what is longer holds it too long, cached or not.
_INLINE_BYTES: Final = 512 * 1024

_COPIED: Final = 64 << 10  # bytes

#: File systems whose pages are memory: a plain read of them does not wait for a disk, and
#: they refuse RWF_NOWAIT (seen with tmpfs and memfd on Linux 6.18).
_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})


#: What a thread brings back: how many bytes, and size and mtime of the file after reading them.
_Read: TypeAlias = tuple[int, tuple[int, int]]


class FileSource:
    """The bytes of a file as it was when it was opened."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a file, take a shared lock on it, and note where its holes are.

        It waits for the disk: in a coroutine, call it through ``asyncio.to_thread``.

        Args:
            path: A regular file; symbolic links are followed.

        Raises:
            SourceError: It is no regular file, or somebody holds an exclusive lock on it.
            OSError: It cannot be opened.
        """
        self.path = os.fspath(path)
        self._fd = OwnedFd(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        try:
            self._generation = self._check_openable()
            self._size = self._generation[0]
            self._identity = self._identify()
            self._extents = Extents(data_extents(self._fd.fileno(), self._size))
            self._inline_flags: int | None = self._find_inline_flags()
        except BaseException:
            self._fd.close()
            raise
        self._threads: dict[bool, ThreadPoolExecutor] = {}  # by whether they are for long reads
        self._reads: set[Future[_Read]] = set()
        self._closing = False
        self._close_lock = threading.Lock()
        self._changed: str | None = None

    def _check_openable(self) -> tuple[int, int]:
        if not stat.S_ISREG(os.fstat(self._fd.fileno()).st_mode):
            raise SourceError(f"{self.path} is no regular file")
        try:
            fcntl.flock(self._fd.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                raise SourceError(
                    f"{self.path} is locked by somebody who writes it (flock, exclusive);"
                    " serve it when that is done"
                ) from error
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS):
                raise  # those three: a file system without locks; the image is served all the same
        return _generation(self._fd.fileno())

    def _identify(self) -> str:
        status = os.fstat(self._fd.fileno())
        size, mtime = self._generation
        return f"file:{status.st_dev:x}:{status.st_ino:x}:{size:x}:{mtime:x}"

    def _find_inline_flags(self) -> int | None:
        """Find the flags under which a read does not wait; None if there are none."""
        fd = self._fd.fileno()
        try:
            os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return os.RWF_NOWAIT
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            return 0 if _lies_in_memory(fd) else None
        return os.RWF_NOWAIT

    @property
    def size(self) -> int:
        """Length of the file when it was opened, in bytes."""
        return self._size

    @property
    def identity(self) -> str:
        """The inode, its size and its mtime when it was opened."""
        return self._identity

    def extents(self) -> Iterator[tuple[int, int]]:
        """Give the stretches that are no holes (SEEK_DATA, SEEK_HOLE), as of the opening."""
        return iter(self._extents)

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """Read what the page cache has; on a loop's thread no more than would hold it long.

        Kernel: preadv2(RWF_NOWAIT), since Linux 4.14.

        Raises:
            SourceError: The file was changed since it was opened, or the read failed.
            ClosedError: The source is closed.
        """
        if not self._may_be_at_hand(offset, length):
            return None
        data = bytearray(length)
        if not self._read_at_hand(offset, data):
            return None
        # The pager is quickest with bytes; of what is large a copy costs more than that saves.
        return bytes(data) if length <= _COPIED else data

    def readinto_nowait(self, offset: int, buffer: memoryview) -> bool:
        """Read what the page cache has into a buffer of the caller's.

        Kernel: as ``read_nowait``.

        Raises:
            SourceError: As ``read_nowait``.
            ClosedError: As ``read_nowait``.
        """
        return self._may_be_at_hand(offset, len(buffer)) and self._read_at_hand(offset, buffer)

    def _may_be_at_hand(self, offset: int, length: int) -> bool:
        if self._closing:
            raise ClosedError(f"the source over {self.path} is closed")
        check_read(offset, length, self._size)
        return self._inline_flags is not None and not (length > _INLINE_BYTES and _runs_loop())

    def _read_at_hand(self, offset: int, buffer: bytearray | memoryview) -> bool:
        fd, length = self._fd.fileno(), len(buffer)
        try:
            done = os.preadv(fd, [buffer], offset, self._inline_flags or 0)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._failed(offset, length, error) from error
        self._check_generation(_generation(fd))
        # A short read inside an unchanged file: the rest is not in the page cache.
        return done == length

    def send_nowait(self, connection: int, offset: int, length: int) -> int | None:
        """Send what the page cache has straight from there: one copy less, or two.

        Kernel: sendfile(2), and cachestat(2) since Linux 6.5, to be sure not to wait for a disk.

        Raises:
            SourceError: The file was changed since it was opened.
            ClosedError: The source is closed.
            OSError: The connection is broken.
        """
        if self._closing:
            raise ClosedError(f"the source over {self.path} is closed")
        check_read(offset, length, self._size)
        fd = self._fd.fileno()
        if not page_cache.holds(fd, offset, length):
            return None
        try:
            sent = os.sendfile(connection, fd, offset, length)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOSYS, errno.EOVERFLOW):
                return None  # not from this file system, or not to this socket
            raise
        self._check_generation(_generation(fd))
        return sent

    async def read(self, offset: int, length: int) -> Buffer:
        """Read on the loop if the page cache has it, else in a thread.

        Raises:
            SourceError: The file was changed since it was opened, or the read failed.
            ClosedError: The source is closed.

        Cancellation: the thread finishes its read; nobody waits for it but ``aclose``.
        """
        cached = self.read_nowait(offset, length)
        if cached is not None:
            return cached
        data = bytearray(length)
        await self._read_in_thread(offset, memoryview(data))
        return data

    async def readinto(self, offset: int, buffer: memoryview) -> None:
        """Read in a thread, into a buffer of the caller's: nothing is allocated on the way.

        Raises:
            SourceError: The file was changed since it was opened, or the read failed.
            ClosedError: The source is closed.

        Cancellation: the thread finishes its read, and writes to the buffer until then.
        """
        if self._closing:
            raise ClosedError(f"the source over {self.path} is closed")
        check_read(offset, len(buffer), self._size)
        await self._read_in_thread(offset, buffer)

    async def _read_in_thread(self, offset: int, buffer: memoryview) -> None:
        length = len(buffer)
        long = length > _LONG
        if long not in self._threads:
            self._threads[long] = ThreadPoolExecutor(READERS, thread_name_prefix="aiouffd-file")
        future = self._threads[long].submit(_read_all, self._fd.fileno(), offset, buffer)
        self._reads.add(future)
        future.add_done_callback(self._end_read)
        try:
            done, generation = await asyncio.wrap_future(future)
        except OSError as error:
            raise self._failed(offset, length, error) from error
        self._check_generation(generation)
        if done != length:
            raise SourceError(f"{self.path} gave {done} of {length} bytes at offset {offset}")

    async def aclose(self) -> None:
        """Wait for reads in threads, then close the file and drop its lock.

        Cancellation: the file is closed when the last thread is done with it.
        """
        self._closing = True
        for threads in self._threads.values():
            threads.shutdown(wait=False)
        reads = [asyncio.wrap_future(read) for read in self._reads.copy()]
        if reads:
            await asyncio.wait(reads)
        self._close()

    def _end_read(self, read: Future[_Read]) -> None:
        # In the reading thread.  The number of a closed descriptor is reused at once, and a
        # thread that still read from it would read somebody else's file: the last one closes.
        self._reads.discard(read)
        if self._closing and not self._reads:
            self._close()

    def _close(self) -> None:
        # The last readers and ``aclose`` may all come here at once.
        with self._close_lock:
            self._fd.close()

    def _failed(self, offset: int, length: int, error: OSError) -> SourceError:
        return SourceError(f"{self.path}: {length} bytes at offset {offset} unreadable: {error}")

    def _check_generation(self, now: tuple[int, int]) -> None:
        """Raise SourceError if the file is not what it was when it was opened."""
        if self._changed is None:
            if now == self._generation:
                return
            if now[0] != self._generation[0]:
                self._changed = f"its size went from {self._generation[0]} to {now[0]} bytes"
            else:
                self._changed = "it was written to"
        raise SourceError(
            f"{self.path} was changed while it was served: {self._changed};"
            " replace an image by renaming a new file over it"
        )


def _runs_loop() -> bool:
    """Say whether this thread has a loop, which a long copy would hold."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _generation(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns


def _read_all(fd: int, offset: int, buffer: memoryview) -> _Read:
    done = 0
    while done < len(buffer):
        got = os.preadv(fd, [buffer[done:]], offset + done)
        if not got:
            break
        done += got
    return done, _generation(fd)


def data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Walk the data of a file; a file system without SEEK_DATA says that all is data."""
    offset = 0
    while offset < size:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            if error.errno == errno.EINVAL:
                yield offset, size - offset
                return
            raise
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if end <= start:
            return
        yield start, end - start
        offset = end


def _lies_in_memory(fd: int) -> bool:
    """Say whether a file's pages are memory anyway, so that reading it inline is right."""
    if os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:"):
        return True
    number = os.fstat(fd).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            fields = line.split()
            if fields[2] == device:
                return fields[fields.index("-") + 1] in _IN_MEMORY
    return False
