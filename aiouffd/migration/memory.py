"""The memory that moves: read at the source, laid down at the destination before the switch.

Knows: files that are memory: a memfd, ``/proc/PID/mem``.
Must not know: who writes to it meanwhile, connections, page faults.

Laws of this file:

* Reading allocates nothing: a hole of a memfd stays one.
* Memory of a program that could take it away is read, never mapped: to touch a page of a file that
  has become shorter is death.
* Nothing is laid down once the program runs: from then on bytes get in by the pager alone.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import Final, Self

from ..errors import SourceError
from ..kernel import page_cache
from .wire import Extent

_ZEROS: Final = bytes(1 << 20)


class SourceMemory:
    """One region at the source.

    Attributes:
        extent: Its name, length and page size, as the other side will know it.

    Sharing: the loop's thread.
    """

    def __init__(self, fd: int, extent: Extent, *, base: int = 0) -> None:
        """Read from a file that is memory; the descriptor is duplicated.

        Args:
            fd: A memfd, or ``/proc/PID/mem``.
            extent: Of the region.
            base: Where the region begins in the file, in bytes: 0 in a memfd of its own, the
                address in ``/proc/PID/mem``.
        """
        self.extent: Final = extent
        self._base = base
        self._map: mmap.mmap | None = None
        self._fd = os.dup(fd)
        if base == 0 and _cannot_shrink(fd) and os.fstat(fd).st_size >= extent.length:
            self._map = mmap.mmap(fd, extent.length, mmap.MAP_SHARED, mmap.PROT_READ)

    @classmethod
    def of_process(cls, pid: int | str, start: int, extent: Extent) -> Self:
        """Read the memory of a process, of any kind.

        Kernel: /proc/PID/mem; it takes the right to trace the process.

        Args:
            pid: Its number, or ``self``.
            start: Address of the region.
            extent: Of the region.

        Raises:
            OSError: There is no such process, or this user may not look into it.
        """
        fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return cls(fd, extent, base=start)
        finally:
            os.close(fd)

    def read(self, offset: int, length: int) -> bytes:
        """Read whole pages, as they are at the moment.

        Args:
            offset: In the region, in bytes.
            length: In bytes.

        Raises:
            SourceError: They cannot be read: the file is too short, or the process is gone.
        """
        try:
            data = os.pread(self._fd, length, self._base + offset)
        except OSError as error:
            raise SourceError(
                f"{length} bytes at offset {offset} of region {self.extent.name!r} cannot be read:"
                f" {error.strerror}"
            ) from error
        if len(data) != length:
            raise SourceError(
                f"region {self.extent.name!r} ends at offset {offset + len(data)}; it should have"
                f" {self.extent.length} bytes"
            )
        return data

    def as_it_lies(self, offset: int, length: int) -> memoryview | None:
        """Give whole pages without a copy: they may change as long as they are looked at.

        Kernel: F_GET_SEALS, since Linux 3.17: only of a memfd that cannot shrink, for its missing
        pages would kill who looks at them; cachestat, since 6.5, says that none of these is a hole.

        Returns:
            None if they have to be read: there is no such memfd, or a hole or a page of zeros may
            be among them.
        """
        if self._map is None:
            return None
        if not page_cache.holds(self._fd, offset, length):  # SEEK_HOLE would look to the file's end
            return None
        view = memoryview(self._map)[offset : offset + length]
        # A page that begins with eight zeros may have no others.
        return None if 0 in view.cast("Q")[:: self.extent.page_size // 8].tolist() else view

    def close(self) -> None:
        """Let go of the memory; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if self._map is not None:
            with contextlib.suppress(BufferError):  # on its way yet: it goes with the last frame
                self._map.close()


def seal(fd: int) -> None:
    """See to it that a memfd keeps its length: then it can be mapped by who does not trust others.

    Kernel: F_ADD_SEALS, since Linux 3.17, on a memfd made with MFD_ALLOW_SEALING.
    """
    import fcntl  # which only Unix has; importing this module works elsewhere

    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)


def is_memfd(fd: int) -> bool:
    """Say whether a file is memory: to read it never waits for anybody."""
    return _seals(fd) is not None


def _cannot_shrink(fd: int) -> bool:
    import fcntl

    return bool((_seals(fd) or 0) & fcntl.F_SEAL_SHRINK)


def _seals(fd: int) -> int | None:
    import fcntl

    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # no memfd
        return None


def split(data: bytes, offset: int, page_size: int) -> tuple[list[tuple[int, int]], bool]:
    """Tell runs of zero pages from the others.

    Args:
        data: Whole pages, at most a mebibyte.
        offset: Of the first one, in bytes.
        page_size: In bytes.

    Returns:
        Runs of pages that are all zeros: offset and length of each; and whether there are others.
    """
    if _ZEROS.startswith(data):
        return [(offset, len(data))], False
    runs: list[tuple[int, int]] = []
    zero = _ZEROS[:page_size]
    # Most pages differ from zeros in their first bytes: comparing costs less than slicing.
    for at in range(0, len(data), page_size):
        if data.startswith(zero, at):
            if runs and runs[-1][0] + runs[-1][1] == offset + at:
                runs[-1] = runs[-1][0], runs[-1][1] + page_size
            else:
                runs.append((offset + at, page_size))
    return runs, True


class Landing:
    """One region at the destination, before its program runs: a memfd that it will map.

    The program's own mapping is registered with a userfaultfd; this is another one of the same
    memory, which is not.  What is written here is there when the program looks, without a fault.

    Attributes:
        view: All of it.

    Sharing: the loop's thread.
    """

    def __init__(self, fd: int, length: int) -> None:
        """Map a memfd; the descriptor stays the caller's.

        Args:
            fd: The memfd, writable.
            length: In bytes.

        Raises:
            ValueError: It is shorter.
            OSError: It is not to be mapped.
        """
        self._map = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._fd = os.dup(fd)
        self.view: memoryview = memoryview(self._map)

    def write(self, offset: int, data: memoryview) -> None:
        """Lay whole pages down.

        Where there were none this is twice as fast as by the mapping: pages that are written
        from end to end need not be cleared before, nor mapped.

        Raises:
            OSError: There is no room for them.
        """
        while data:
            done = os.pwrite(self._fd, data, offset)
            data, offset = data[done:], offset + done

    def discard(self, offset: int, length: int) -> None:
        """Make pages missing again.

        Kernel: MADV_REMOVE, since Linux 2.6.16, on hugetlb memory since 4.3.

        Args:
            offset: In bytes.
            length: In bytes; whole pages.
        """
        self._map.madvise(mmap.MADV_REMOVE, offset, length)

    def close(self) -> None:
        """Unmap it, at the latest when nobody looks at it any more; a second call does nothing."""
        self.view.release()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        with contextlib.suppress(BufferError):  # a frame comes into it: dropped with that
            self._map.close()
