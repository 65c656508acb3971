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
