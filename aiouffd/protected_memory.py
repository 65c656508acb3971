"""Protected memory: a target's bytes as they were at an instant, and what of them is saved.

Knows: /proc/PID/mem and the page tables of one target, blocks of one stretch.
Must not know: when the instant is, who waits, where the bytes go.

Laws of this file:

* Bytes count only if they were still protected after they were read.
* What was not there at the instant is not read: that could make pages of it.
* Nothing is unprotected here.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from .errors import NotSupported, SourceError, TargetGone
from .fds import OwnedFd
from .kernel import abi, maps, pagemap
from .ranges import PAGE_SIZE, PageSet, Range, align_down, align_up
from .removals import data_between, open_file

BLOCK_BYTES: Final = 64 << 10  #: saved for one writer, unless a page is larger
PIECE_BYTES: Final = 1 << 20  #: saved at a time in the background, unless a page is larger
_SWAPS: Final = Path("/proc/swaps")


class ProtectedMemory:
    """A target's memory, seen from outside."""

    def __init__(self, pid: int, stack: contextlib.AsyncExitStack) -> None:
        """Open what tells of a process's memory.

        Args:
            pid: Whose.
            stack: Closes it.

        Raises:
            NotSupported: This user may not look into it, or the kernel has no PAGEMAP_SCAN.
            TargetGone: There is no such process.
        """
        self._pid = pid
        try:
            self._pagemap = _owned(pagemap.open_pagemap(pid), stack)
            self._maps = _owned(maps.open_maps(pid), stack)
            self._memory = _owned(os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC), stack)
        except FileNotFoundError as error:
            raise TargetGone("opening its memory", errno.ESRCH, 0, 0) from error
        except PermissionError as error:
            raise NotSupported(
                f"/proc/{pid}/mem cannot be opened ({error.strerror})",
                "It takes the process's own user (and a process that may be dumped) or"
                " CAP_SYS_PTRACE.",
            ) from error
        pagemap.scan(self._pagemap, 0, 0)  # or it would be refused when everybody waits

    def is_gone(self) -> bool:
        """Say whether the process has exited or called exec."""
        return not maps.mappings(self._maps)

    def saved(self, start: int, length: int) -> bytes:
        """Read bytes that have been there since the instant.

        Raises:
            SourceError: They may have changed since.
        """
        try:
            data = os.pread(self._memory, length, start)
            if len(data) < length:  # the next byte gives the error, if there is one
                data += os.pread(self._memory, length - len(data), start + len(data))
        except OSError as error:
            raise SourceError(f"the page near {start:#x} cannot be read: {error}", start) from error
        if len(data) < length or not self.is_protected(start, length):
            raise SourceError(
                f"memory at {Range(start, length)} was removed before it was saved", start
            )
        return data

    def is_protected(self, start: int, length: int) -> bool:
        """Say whether every page has its protection, or its mark where none is there."""
        return not pagemap.scan(
            self._pagemap, start, start + length, required=abi.PAGE_IS_WRITTEN, max_regions=1
        ).regions

    def populated(self, where: Range, page_size: int) -> Iterator[Range]:
        """Give what may be other than zeros.  It is protected, and stays as it is."""
        for mapping in maps.mappings(self._maps):
            part = where.intersection(Range.between(mapping.start, mapping.end))
            if part is None:
                continue
            anonymous = not mapping.inode or (page_size > PAGE_SIZE and not mapping.shared)
            if mapping.shared and page_size == PAGE_SIZE:
                yield from self._data(mapping, part)
            elif anonymous:
                swap = 0 if page_size > PAGE_SIZE else _swap_category()
                for run in pagemap.regions(
                    *(self._pagemap, part.start, part.end),
                    any_of=abi.PAGE_IS_PRESENT | swap,
                    report=0,
                ):
                    yield Range.between(run.start, run.end)
            else:
                yield part

    def _data(self, mapping: maps.Mapping, part: Range) -> Iterator[Range]:
        try:
            fd = open_file(mapping, self._pid, None)
        except NotSupported:
            yield part  # what is a hole becomes a page of zeros by being read
            return
        with OwnedFd(fd):
            to_file = mapping.offset - mapping.start
            for start, end in data_between(fd, part.start + to_file, part.end + to_file):
                yield Range.between(start - to_file, end - to_file)


def _owned(fd: int, stack: contextlib.AsyncExitStack) -> int:
    return stack.enter_context(OwnedFd(fd)).fileno()


def _swap_category() -> int:
    """Say what else may hold bytes: a mark and a page in swap look alike."""
    try:
        lines = _SWAPS.read_text(encoding="ascii").splitlines()
    except OSError:
        return abi.PAGE_IS_SWAPPED
    return abi.PAGE_IS_SWAPPED if len(lines) > 1 else 0


class Saving:
    """One stretch: which of its blocks are saved."""

    def __init__(self, memory: ProtectedMemory, where: Range, offset: int, page_size: int) -> None:
        """Prepare.

        Args:
            memory: The target's.
            where: Addresses.
            offset: Where it goes in the image, in bytes.
            page_size: Of the memory, in bytes.
        """
        self.where = where
        self.page_size = page_size
        self.offset = offset
        self.block = max(BLOCK_BYTES, page_size)
        self._memory = memory
        self._to_offset = offset - where.start
        self._there = PageSet()  # at the instant
        self._todo = bytearray(-(-where.length // self.block))  # 1 for each block to be saved

    def instant(self) -> None:
        """Find out what there is to save: the rest is zeros."""
        for found in self._memory.populated(self.where, self.page_size):
            run = Range.between(align_down(found.start), align_up(found.end))
            self._there.add(run)
            first = (run.start - self.where.start) // self.block
            end = -(-(run.end - self.where.start) // self.block)
            self._todo[first:end] = b"\1" * (end - first)

    def extent(self, first: int, count: int) -> Range:
        """Give the addresses of some blocks."""
        start = self.where.start + first * self.block
        return Range.between(start, min(start + count * self.block, self.where.end))

    def block_of(self, address: int) -> int:
        """Give the number of the block that holds an address."""
        return (address - self.where.start) // self.block

    def needs(self, first: int) -> bool:
        """Say whether a block is still to be saved."""
        return bool(self._todo[first])

    def save(self, first: int, count: int) -> list[tuple[int, bytes]]:
        """Read blocks, or what is there of them; see ProtectedMemory.saved.

        Returns:
            Bytes, each with their offset in the image.
        """
        saved = [
            (run.start + self._to_offset, self._memory.saved(run.start, run.length))
            for run in self._there.runs(self.extent(first, count))
        ]
        self._todo[first : first + count] = bytes(count)
        return saved

    def next(self, first: int) -> tuple[int, int] | None:
        """Give the (first, count) of blocks to be saved next, at most a piece."""
        first = self._todo.find(1, first)
        if first < 0:
            return None
        most = max(PIECE_BYTES // self.block, 1)
        end = self._todo.find(0, first, first + most)
        return first, (min(first + most, len(self._todo)) if end < 0 else end) - first

    def needs_any_of(self, where: Range) -> bool:
        """Say whether a block that a range touches is still to be saved."""
        part = self.where.intersection(where)
        if part is None:
            return False
        return self._todo.find(1, self.block_of(part.start), self.block_of(part.end - 1) + 1) >= 0
