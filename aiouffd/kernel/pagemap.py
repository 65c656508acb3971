"""What a process's page tables say: ``/proc/PID/pagemap``, by PAGEMAP_SCAN and entry by entry.

Knows: categories of pages, how to ask for runs of them, get and clear in one go.
Must not know: who writes the pages, and what is done about the written ones.

Laws of this file:

* Nothing here touches the memory it asks about: no call can fault.
* Ranges are half open, addresses are in the process whose pagemap it is.
* Categories are masks (PAGE_IS_*); a category of a newer kernel can be asked for by its bit.

Kernel facts that surprise, seen on Linux 6.18:

* Outside of ranges registered for write-protection every populated or empty page counts as
  WRITTEN: ask for WPALLOWED as well where that matters.
* The marker that write-protects a never-populated page is reported as SWAPPED.
* After exit or exec of the process a scan says ESRCH (TargetGone), also where the kernel just finds
  nothing then, as one build of 6.18 did and another did not; the entries are none.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
from collections.abc import Iterator
from typing import Final, NamedTuple

from ..errors import NotSupported, refusal
from . import abi, calls

WP_MATCHING: Final = abi.PM_SCAN_WP_MATCHING
CHECK_WPASYNC: Final = abi.PM_SCAN_CHECK_WPASYNC

#: Turns what ``scan_raw`` gives into (start, end, categories), in half the time of PageRegions.
each_region: Final = abi.PAGE_REGION_STRUCT.iter_unpack

_REGION_BYTES: Final = abi.PAGE_REGION_STRUCT.size
_ENTRY_BYTES: Final = 8
_ENTRIES_PER_READ: Final = 1 << 16  # half a megabyte: 256 MiB of memory


class PageRegion(NamedTuple):
    """Neighbouring pages with the same reported categories."""

    start: int  #: first address
    end: int  #: one past the last
    categories: int  #: PAGE_IS_*, or'ed, as far as they were asked to be reported

    @property
    def length(self) -> int:
        """Bytes of the region."""
        return self.end - self.start


class Scan(NamedTuple):
    """What one PAGEMAP_SCAN found."""

    regions: list[PageRegion]  #: in order of address
    walk_end: int  #: where the walk stopped; the end of the range if it is complete


def open_pagemap(pid: int | str = "self") -> int:
    """Open the pagemap of a process.

    Args:
        pid: A process id, or ``self``.

    Returns:
        A close-on-exec descriptor; it stays with that process's memory, whatever becomes
        of its number.

    Raises:
        NotSupported: This user may not look into that process.
        FileNotFoundError: There is no such process.
    """
    calls.require_linux()
    path = f"/proc/{pid}/pagemap"
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError as error:
        raise NotSupported(
            f"{path} cannot be opened ({error.strerror})",
            "It takes the process's own user (and a process that may be dumped) or CAP_SYS_PTRACE.",
        ) from error


def scan(
    fd: int,
    start: int,
    end: int,
    *,
    required: int = 0,
    any_of: int = 0,
    inverted: int = 0,
    report: int | None = None,
    flags: int = 0,
    max_pages: int = 0,
    max_regions: int = 512,
) -> Scan:
    """Find the pages of some categories, and write-protect them in the same step if asked to.

    Kernel: PAGEMAP_SCAN, since Linux 6.7.  A page matches if, with ``c`` its categories
    xor ``inverted``, ``c`` has all of ``required`` and, unless that is 0, one of ``any_of``.

    Args:
        fd: A pagemap, from ``open_pagemap``.
        start: Page-aligned address.
        end: One past the last address.
        required: Categories that a page must have (PAGE_IS_*).
        any_of: Categories of which it must have one.
        inverted: Categories that count as their opposite.
        report: Categories to tell apart in the regions; by default those asked about.
        flags: WP_MATCHING to write-protect what matches, CHECK_WPASYNC to refuse a range
            that is not registered for asynchronous write-protection; or'ed.
        max_pages: Stop after this many matching pages; 0 for no limit.
        max_regions: Stop after this many regions; 0 to get none at all and have the flags
            take effect on the whole range.

    Returns:
        The regions, and where the walk stopped.

    Raises:
        NotSupported: The kernel has no PAGEMAP_SCAN.
        TargetGone: The process has exited or called exec.
        ResolutionRefused: EPERM if CHECK_WPASYNC met other memory, EINVAL for an unknown
            category or flag or an unaligned start, EFAULT if the end lies before the start.

    Sharing: any thread; the call holds the target's address space for reading.
    """
    vector = ctypes.create_string_buffer(_REGION_BYTES * max_regions) if max_regions else None
    argument = bytearray(
        abi.PM_SCAN_ARG_STRUCT.pack(
            abi.PM_SCAN_ARG_STRUCT.size,
            flags,
            start,
            end,
            0,
            0 if vector is None else ctypes.addressof(vector),
            max_regions,
            max_pages,
            inverted,
            required,
            any_of,
            required | any_of if report is None else report,
        )
    )
    found = _scan(fd, argument, start, end)
    walk_end = abi.PM_SCAN_ARG_STRUCT.unpack(argument)[4]
    if vector is None:
        return Scan([], walk_end)
    filled = memoryview(vector)[: found * _REGION_BYTES]
    return Scan(
        [PageRegion(*entry) for entry in abi.PAGE_REGION_STRUCT.iter_unpack(filled)], walk_end
    )


def _scan(fd: int, argument: bytearray, start: int, end: int) -> int:
    """Make the call, and raise what ``scan`` does."""
    try:
        found = calls.pagemap_scan(fd, argument)
    except OSError as error:
        number = error.errno or errno.EIO
        if number == errno.ENOTTY:
            raise NotSupported(
                "this kernel has no PAGEMAP_SCAN", "It takes Linux 6.7 or newer."
            ) from error
        raise refusal("PAGEMAP_SCAN", number, start, end - start) from error
    if not found and _has_ended(fd, start):
        raise refusal("PAGEMAP_SCAN", errno.ESRCH, start, end - start)
    return found


def _has_ended(fd: int, address: int) -> bool:
    """Say whether the memory is gone: then it has no entries; what was never mapped has."""
    return not entries(fd, address, calls.PAGE_SIZE)


def regions(
    fd: int,
    start: int,
    end: int,
    *,
    required: int = 0,
    any_of: int = 0,
    inverted: int = 0,
    report: int | None = None,
    flags: int = 0,
    max_regions: int = 512,
) -> Iterator[PageRegion]:
    """Walk a whole range, in as many scans as it takes.

    With WP_MATCHING each page is found and protected in one step, but the range as a whole is
    no snapshot: a page that is written behind the walk is found by the next one.

    Args:
        fd: A pagemap, from ``open_pagemap``.
        start: Page-aligned address.
        end: One past the last address.
        required: As in ``scan``; so are the other categories and flags.
        any_of: See ``scan``.
        inverted: See ``scan``.
        report: See ``scan``.
        flags: See ``scan``.
        max_regions: How many regions one scan may fill; at least 1.
    """
    if max_regions < 1:
        raise ValueError("max_regions must be at least 1: no region would ever come")
    while start < end:
        found, start = scan(
            fd,
            start,
            end,
            required=required,
            any_of=any_of,
            inverted=inverted,
            report=report,
            flags=flags,
            max_regions=max_regions,
        )
        yield from found


def scan_raw(
    fd: int,
    start: int,
    end: int,
    *,
    required: int,
    inverted: int = 0,
    flags: int = 0,
    max_regions: int = 4096,
) -> tuple[memoryview, int]:
    """Do what ``scan`` does where there are many regions, which are left as the kernel wrote them.

    Args:
        fd: As in ``scan``; so are the others.
        start: See ``scan``.
        end: See ``scan``.
        required: Also what is reported.
        inverted: See ``scan``.
        flags: See ``scan``.
        max_regions: At least 1.

    Returns:
        The regions (``abi.PAGE_REGION_STRUCT`` each), and where the walk stopped.

    Raises:
        NotSupported: As ``scan``; so are the others.
    """
    vector = ctypes.create_string_buffer(_REGION_BYTES * max_regions)
    size, at = abi.PM_SCAN_ARG_STRUCT.size, ctypes.addressof(vector)
    argument = bytearray(
        abi.PM_SCAN_ARG_STRUCT.pack(
            *(size, flags, start, end, 0, at, max_regions, 0, inverted, required, 0, required)
        )
    )
    found = _scan(fd, argument, start, end)
    walk_end: int = abi.PM_SCAN_ARG_STRUCT.unpack(argument)[4]
    return memoryview(vector)[: found * _REGION_BYTES], walk_end


def protect(fd: int, start: int, end: int) -> None:
    """Write-protect a range asynchronously: from now on it collects what is written.

    Kernel: PAGEMAP_SCAN without a vector, since Linux 6.7.

    Args:
        fd: A pagemap, from ``open_pagemap``.
        start: Page-aligned address; the range is registered WP with feature WP_ASYNC.
        end: One past the last address.

    Raises:
        NotSupported: The kernel has no PAGEMAP_SCAN.
        ResolutionRefused: EPERM if the range is not so registered.
    """
    scan(
        fd,
        start,
        end,
        required=abi.PAGE_IS_WRITTEN,
        flags=WP_MATCHING | CHECK_WPASYNC,
        max_regions=0,
    )


def entries(fd: int, start: int, length: int) -> array.array[int]:
    """Read the classic pagemap: one number per page.

    Kernel: /proc/PID/pagemap, since Linux 2.6.25; bits PM_*, the low 55 are the page frame
    (0 without CAP_SYS_ADMIN).

    Args:
        fd: A pagemap, from ``open_pagemap``.
        start: Page-aligned address.
        length: Whole pages, in bytes.

    Returns:
        One number per page; fewer behind the end of the address space, or if the process
        has exited.
    """
    found = array.array("Q")
    position = start // calls.PAGE_SIZE * _ENTRY_BYTES
    stop = position + length // calls.PAGE_SIZE * _ENTRY_BYTES
    while position < stop:
        chunk = os.pread(fd, min(stop - position, _ENTRIES_PER_READ * _ENTRY_BYTES), position)
        if not chunk:
            break
        found.frombytes(chunk)
        position += len(chunk)
    return found
