"""What of a file the page cache has.

Knows: the system call, its structures.
Must not know: what is done with the file.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import struct
from typing import Final

from . import abi

# struct cachestat_range {__u64 off, len;}
_RANGE: Final = struct.Struct("=QQ")
# struct cachestat {__u64 nr_cache, nr_dirty, nr_writeback, nr_evicted, nr_recently_evicted;}
_STAT: Final = struct.Struct("=QQQQQ")


@functools.cache
def _libc() -> ctypes.CDLL:
    # Not at import, which has to work on every system.
    return ctypes.CDLL(None, use_errno=True)


def holds(fd: int, offset: int, length: int) -> bool:
    """Say whether the page cache has all of a stretch of a file now.

    It may lose some of it the moment after.

    Kernel: cachestat(2), since Linux 6.5; before it, and on file systems that it does not know,
    nothing is known to be there.

    Args:
        fd: The file.
        offset: Where the stretch begins, in bytes.
        length: How long it is, in bytes; above zero.

    Raises:
        OSError: The descriptor is no file.
    """
    stretch = ctypes.create_string_buffer(_RANGE.pack(offset, length), _RANGE.size)
    found = ctypes.create_string_buffer(_STAT.size)
    if _libc().syscall(ctypes.c_long(abi.NR_CACHESTAT), fd, stretch, found, 0):
        number = ctypes.get_errno()
        if number in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return False
        raise OSError(number, os.strerror(number), "cachestat")
    first, last = offset // mmap.PAGESIZE, (offset + length - 1) // mmap.PAGESIZE
    return bool(_STAT.unpack(found.raw)[0] == last - first + 1)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give back pages of a file, in the page cache and in every mapping of it.

    Kernel: fallocate(2) with FALLOC_FL_PUNCH_HOLE and FALLOC_FL_KEEP_SIZE, since Linux 2.6.38
    (tmpfs 3.5, hugetlbfs 4.3).  A userfaultfd is told nothing: the next access is a missing fault.

    Args:
        fd: The file, open for writing.
        offset: Of the first page, in bytes.
        length: Whole pages, in bytes.

    Raises:
        OSError: Not a file that can have holes, or sealed against writing.
    """
    arguments = (ctypes.c_int(fd), ctypes.c_int(3), ctypes.c_long(offset), ctypes.c_long(length))
    if _libc().fallocate(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "fallocate")
