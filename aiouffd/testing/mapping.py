"""Memory of each kind, mapped into this process.

Knows: mmap, memfds, huge pages.
Must not know: who touches it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

from ..errors import NotSupported
from .rules import SHARED_KINDS

HUGE_PAGE: Final = 2 * 1024 * 1024
_MAP_HUGETLB: Final = 0x40000
_MFD_HUGETLB: Final = 4
_MADV_DONTNEED: Final = 4
_MADV_DONTFORK: Final = 10


def page_size_of(memory: str) -> int:
    """Give the size of a page of this kind of memory, in bytes."""
    return HUGE_PAGE if memory.startswith("hugetlb") else mmap.PAGESIZE


def map_memory(memory: str, length: int, name: str) -> tuple[mmap.mmap, int | None]:
    """Map memory of a kind.

    Kernel: memfd_create(2), since Linux 3.17; on huge pages since 4.14.

    Args:
        memory: One of ``rules.KINDS``.
        length: Whole pages, in bytes.
        name: What /proc calls it.

    Returns:
        It, and its memfd if it has one.

    Raises:
        NotSupported: There are no free huge pages.
    """
    huge = memory.startswith("hugetlb")
    memfd = None
    try:
        if memory in ("shmem", "hugetlb", "shmem-private"):
            flags = os.MFD_CLOEXEC | (_MFD_HUGETLB if huge else 0)
            memfd = os.memfd_create(f"aiouffd-{name}"[:200], flags)
            os.ftruncate(memfd, length)
            how = mmap.MAP_SHARED if memory in SHARED_KINDS else mmap.MAP_PRIVATE
            return mmap.mmap(memfd, length, how), memfd
        how = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_HUGETLB if huge else 0)
        return mmap.mmap(-1, length, how), None
    except OSError as error:
        if memfd is not None:
            os.close(memfd)
        if not huge:
            raise
        raise NotSupported(
            f"{length // HUGE_PAGE} free huge pages of 2 MiB ({error})",
            "Reserve some: echo 16 | sudo tee /proc/sys/vm/nr_hugepages",
        ) from error


def discard(address: int, length: int) -> None:
    """Drop private pages: the next access finds them missing."""
    _madvise(address, length, _MADV_DONTNEED)


def keep_from_children(address: int, length: int) -> None:
    """Have children that fork not get this memory."""
    _madvise(address, length, _MADV_DONTFORK)


def _madvise(address: int, length: int, advice: int) -> None:
    # Not mmap.madvise, which keeps the GIL.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "madvise")
