"""Removals: pages that read zero again, of which the page tables tell too little.

Knows: files behind shared memory and their holes; what was present and is not any more.
Must not know: rounds, who tracks what and why.

Private anonymous memory needs none of this: a page that is given back loses its mark, and so
counts as written.  All other memory keeps the mark where a page was (seen on Linux 6.18), and
what was removed looks clean.

Laws of this file:

* A look comes after the scan for written pages: what is removed behind it is seen by the next.
* Rather a page too many than one too few.  A page that is only not mapped any more is told as
  well, unless there is a file to ask, which still has it.
* A huge page that is not there and has no mark has had bytes that were not marked, and lost them
  since: it is told, and marked.  (Small ones like it count as written.)

Two removals stay unseen: of a page that is read again, and not written, before the next look,
for it then is a page of zeros with a mark, like any other that is clean; and in a private mapping
of a file of a page that had gone to swap, which was told when it went there.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from typing import Final

from .errors import NotSupported
from .kernel import abi, maps, pagemap
from .ranges import PAGE_SIZE, PageSet, Range, align_down, align_up

_ABSENT: Final = abi.PAGE_IS_PRESENT | abi.PAGE_IS_WRITTEN  # as the opposite of both
_UNMARKED: Final = _ABSENT | abi.PAGE_IS_SWAPPED  # as the opposite of all three


class Removals:
    """Watches one stretch of one mapping.

    Of private memory what was present and is not any more has changed.  Of shared memory it has
    only if its file has lost it, too: swap takes it from the page tables as well.

    Sharing: one thread at a time.
    """

    def __init__(
        self,
        where: Range,
        fd: int,
        *,
        mark: Callable[[int, int], None] | None = None,
        file: int | None = None,
        offset: int = 0,
    ) -> None:
        """Prepare.

        Args:
            where: Addresses of the stretch.
            fd: The pagemap; stays the caller's.
            mark: Protects (start, length) of huge pages; None for small ones.
            file: Of shared memory, opened for this object alone (its position moves), and closed
                with it.
            offset: Of the first byte in the file.
        """
        self._where = where
        self._fd = fd
        self._mark = mark
        self._file = file
        self._to_file = offset - where.start
        self._scanned: list[bytes] = []  # what is absent, as the kernel said
        self._empty = PageSet()  # what was absent, and known to be zero
        self._unsure = False  # something is absent that the file has

    def look(self) -> list[Range]:
        """Say what was removed since the last look.

        Returns:
            Addresses; the first time everything that is not there.
        """
        scanned, lost = self._scan(_ABSENT), self._mark_anew()
        if scanned == self._scanned and not self._unsure:
            return lost
        absent = _pages(scanned)
        fresh, empty = without(absent, self._empty), absent
        if self._file is not None:
            data = PageSet()
            for run in fresh.runs(self._where):
                at, to_file = run.start, self._to_file
                for start, end in data_between(self._file, at + to_file, run.end + to_file):
                    data.add(Range.between(align_down(start), align_up(end)).moved(-to_file))
            self._unsure = bool(data)
            fresh, empty = without(fresh, data), without(absent, data)
        self._scanned, self._empty = scanned, empty
        return [*lost, *fresh.runs(self._where)]

    def _mark_anew(self) -> list[Range]:
        """Mark what is not there and has no mark, and give it."""
        if self._mark is None:
            return []
        found = list(_pages(self._scan(_UNMARKED)).runs(self._where))
        for run in found:
            self._mark(run.start, run.length)
        return found

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        fd, self._file = self._file, None
        if fd is not None:
            os.close(fd)

    def _scan(self, none_of: int) -> list[bytes]:
        """Ask which pages have none of some categories; gives what the kernel wrote."""
        found, at, end = [], self._where.start, self._where.end
        while at < end:
            raw, at = pagemap.scan_raw(self._fd, at, end, required=none_of, inverted=none_of)
            if raw:
                found.append(bytes(raw))
        return found


def watch(
    mapping: maps.Mapping,
    where: Range,
    page_size: int,
    *,
    pid: int | str,
    fd: int,
    mark: Callable[[int, int], None],
    file: int | None = None,
    holes: bool = True,
) -> Removals | None:
    """Choose how to see what is removed.

    Args:
        mapping: What is there.
        where: The part of it that matters.
        page_size: Of the memory, in bytes.
        pid: Whose memory it is.
        fd: Its pagemap; stays the caller's.
        mark: Protects (start, length).
        file: The file of shared memory, if the caller has it.
        holes: Somebody may make holes in that file.

    Returns:
        Who looks; None where the page tables tell all.

    Raises:
        NotSupported: The file of shared memory cannot be opened.
    """
    if not mapping.inode and not mapping.shared:
        return None
    if page_size > PAGE_SIZE:  # hugetlb files do not tell of their holes
        return Removals(where, fd, mark=mark)
    if not mapping.shared:
        return Removals(where, fd)
    if not holes:
        return None
    offset = mapping.offset + where.start - mapping.start
    return Removals(where, fd, file=open_file(mapping, pid, file), offset=offset)


def data_between(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Walk the data of a part of a file.

    Args:
        fd: Its position moves.
        start: Offset, in bytes.
        end: One past the last.

    Returns:
        The (start, end) of each stretch that is no hole, clipped.
    """
    while start < end:
        try:
            data = os.lseek(fd, start, os.SEEK_DATA)
            start = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end of the file, or behind it
                return
            raise
        if data >= end:
            return
        yield data, start


def open_file(mapping: maps.Mapping, pid: int | str, file: int | None) -> int:
    """Open the file of a mapping anew, for reading, with a position of its own."""
    span = f"{mapping.start:x}-{mapping.end:x}"
    paths = [] if file is None else [f"/proc/self/fd/{file}"]
    paths.append(f"/proc/{pid}/map_files/{span}")
    with contextlib.suppress(OSError):
        paths += (f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd"))
    for path in paths:
        with contextlib.suppress(OSError):
            if not _is_file_of(os.stat(path), mapping):
                continue
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if _is_file_of(os.fstat(fd), mapping):
                return fd
            os.close(fd)
    raise NotSupported(
        f"the file of the shared memory at {span} cannot be opened, and so not be asked for holes",
        "Pass it as file=; or run with CAP_SYS_ADMIN; or pass holes=False if nobody makes any.",
    )


def _is_file_of(status: os.stat_result, mapping: maps.Mapping) -> bool:
    device = os.major(status.st_dev), os.minor(status.st_dev)
    return (device, status.st_ino) == (mapping.device, mapping.inode)


def _pages(scanned: list[bytes]) -> PageSet:
    found = PageSet()
    for chunk in scanned:
        for start, end, _ in pagemap.each_region(chunk):
            found.add(Range.between(start, end))
    return found


def without(pages: PageSet, others: PageSet) -> PageSet:
    """Give the pages of one set that are not in the other."""
    left, taken = PageSet(), dict(others.chunks())
    for number, bits in pages.chunks():
        if rest := bits & ~taken.get(number, 0):
            left.add_chunk(number, rest)
    return left
