"""Where a region's bytes are: absent pages in a store, the others in the memory itself.

Knows: the mappings of a region, and how a page comes and goes in each.
Must not know: rules, who waits, when.

Laws of this file:

* A page is *absent* (its bytes are in the store) or *present* (they are in the memory): one of
  both, and no byte is lost on the way.  Before a page is taken away it is write-protected, so
  that a store which races with that waits and lands on the page that comes back.
* A page filled for a read is filled write-protected: the first store to it is a touch too.
* A page that was present and is missing was given back by the program: it reads zero.
* Nothing here wakes a thread unless it is told to.

Shared memory (memfd) has one store and one set of present pages whatever maps it, and a hole
punched into it takes the page away everywhere.  Private memory has them for each mapping,
since a forked child's pages go their own way.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from ..errors import ClosedError, LayoutChanging, RangeGone, ResolutionRefused, TargetGone
from ..kernel import abi, page_cache, pagemap
from ..uffd import Userfaultfd

#: Who has not found a page that came for him within that is asleep elsewhere.
_VISIT_NS: Final = 2_000_000
_PATIENCE: Final = 2.0  # seconds that a layout may go on changing
#: One of many mappings was unmapped, or its process has ended: the others are not concerned.
_GONE: Final = (RangeGone, TargetGone, ClosedError)


class Contents:
    """Which pages are present, and the bytes of those that are not (zeros if not stored)."""

    __slots__ = ("leaving", "present", "store", "visits")

    def __init__(self) -> None:
        """Begin with every page absent, and zero."""
        self.present: set[int] = set()
        self.store: dict[int, bytes] = {}
        self.leaving: set[int] = set()
        self.visits: dict[int, list[int]] = {}

    def begin_visit(self, page: int) -> int:
        """Note that a page comes for one access; give what ``end_visit`` wants."""
        now = time.monotonic_ns()
        self.visits.setdefault(page, []).append(now)
        return now

    def end_visit(self, page: int, began: int) -> bool:
        """Note that such an access is made; say whether the page may go."""
        self.visits[page].remove(began)
        if not self.visits[page]:
            del self.visits[page]
        return not self.is_visited(page)

    def is_visited(self, page: int) -> bool:
        """Say whether somebody is about to find a page that has just come for him.

        A system call may sleep with its page there; what has been let through for longer than
        that was found.
        """
        since = time.monotonic_ns() - _VISIT_NS
        return any(began > since for began in self.visits.get(page, ()))

    def copy(self) -> Contents:
        """Give the same again, for a forked child's memory."""
        twin = Contents()
        twin.present = set(self.present)
        twin.store = dict(self.store)
        return twin


class Mapping:
    """A region's memory in one process."""

    __slots__ = (
        "address",
        "comings",
        "contents",
        "end",
        "first",
        "memory",
        "poisoned",
        "process",
        "uffd",
        "woken",
    )

    def __init__(
        self,
        memory: Memory,
        process: int,
        uffd: Userfaultfd,
        address: int,
        contents: Contents,
        *,
        length: int,
        first: int,
    ) -> None:
        """Describe a mapping that is registered with ``uffd``.

        Args:
            memory: What is mapped.
            process: In which process; 0 if not known yet (a forked child).
            uffd: Its userfaultfd.
            address: Where it begins there.
            contents: Its pages.
            length: Bytes that are mapped.
            first: The first page that is.
        """
        self.memory = memory
        self.process = process
        self.uffd = uffd
        self.address = address
        self.end = address + length
        self.first = first
        self.contents = contents
        self.poisoned: set[int] = set()  # absent, and every access fails
        self.comings: Counter[int] = Counter()  # how often each page was filled or poisoned
        self.woken: dict[int, Any] = {}  # whom each page came for last; the performer's own

    @property
    def pages(self) -> range:
        """The pages that are mapped."""
        return range(self.first, self.first + (self.end - self.address) // self.memory.page_size)

    def address_of(self, page: int) -> int:
        """Give the address of a page."""
        return self.address + (page - self.first) * self.memory.page_size

    def offset_of(self, address: int) -> int:
        """Give the offset in the region of an address."""
        return address - self.address + self.first * self.memory.page_size

    def cut(self, start: int, end: int) -> Mapping | None:
        """Take addresses out that are not mapped any more.

        Returns:
            What lies behind them, if that is a piece of its own; this object keeps what lies
            before them, or else what lies behind, or is empty.
        """
        if end <= self.address or self.end <= start:
            return None
        behind = None
        if self.address < start and end < self.end:
            behind = Mapping(
                *(self.memory, self.process, self.uffd, end, self.contents),
                length=self.end - end,
                first=self.first + (end - self.address) // self.memory.page_size,
            )
        if self.address < start:
            self.end = start
        else:
            cut = min(end, self.end) - self.address
            self.first += cut // self.memory.page_size
            self.address += cut
        return behind


class Memory:
    """The memory of one region, wherever it is mapped.

    Sharing: one thread.
    """

    def __init__(
        self,
        number: int,
        page_size: int,
        pages: int,
        kind: str,
        memfd: int | None,
        pump: Callable[[], None],
        complain: Callable[[str], None],
    ) -> None:
        """Know a region's memory.

        Args:
            number: The region's.
            page_size: In bytes.
            pages: How many.
            kind: One of ``rules.KINDS``.
            memfd: Its memfd, which this object closes; None for memory of no file.
            pump: Reads what the userfaultfds have to say, into whatever queue.
            complain: Tells the test of what it should not do.
        """
        self.number = number
        self.page_size = page_size
        self.pages = pages
        self.kind = kind
        self.memfd = memfd
        self.closed = False
        self.shared = kind in ("shmem", "hugetlb")
        self.mappings: list[Mapping] = []
        self._pump = pump
        self._complain = complain
        self._contents = Contents()
        self._window: mmap.mmap | None = None
        if self.shared:
            assert memfd is not None
            self._window = mmap.mmap(memfd, page_size * pages)

    def close(self) -> None:
        """Let go of the memory; nothing of it is unmapped anywhere else."""
        self.closed = True
        if self._window is not None:
            self._window.close()
            self._window = None
        if self.memfd is not None:
            os.close(self.memfd)
            self.memfd = None

    def add(
        self,
        process: int,
        uffd: Userfaultfd,
        address: int,
        *,
        like: Mapping | None = None,
        length: int | None = None,
        first: int = 0,
    ) -> Mapping:
        """Know one more mapping; ``like`` the parent's, for a forked child."""
        if self.shared or not self.mappings:
            contents = self._contents
        else:
            contents = like.contents.copy() if like is not None else Contents()
        mapping = Mapping(
            self,
            process,
            uffd,
            address,
            contents,
            length=self.page_size * self.pages if length is None else length,
            first=first,
        )
        if like is not None:
            mapping.poisoned.update(like.poisoned)
        self.mappings.append(mapping)
        return mapping

    # --- pages come --------------------------------------------------------------------

    def fill(self, mapping: Mapping, page: int, *, protect: bool, wake: bool) -> None:
        """Make a page accessible in a mapping.

        Args:
            mapping: Where.
            page: Which.
            protect: Leave it write-protected.
            wake: Let everybody who waits there try again.

        Raises:
            RangeGone: It is not mapped there any more.
            TargetGone: The process has ended.
            ResolutionRefused: The kernel has no memory for it.
        """
        contents, address, uffd = mapping.contents, mapping.address_of(page), mapping.uffd
        size = self.page_size
        mapping.poisoned.discard(page)
        mapping.comings[page] += 1
        if page not in contents.present:
            data = contents.store.get(page) or bytes(size)
            if self._patiently(lambda: uffd.copy(address, data, wake=wake, protect=protect)):
                contents.present.add(page)
                contents.store.pop(page, None)
                return
            # Somebody else's bytes are there: a write from outside, through the memfd.
            self._adopt(contents, page)
        if self.shared:
            with contextlib.suppress(ResolutionRefused):  # EFAULT: given back; zero follows
                if self._patiently(
                    lambda: uffd.continue_(address, size, wake=wake, protect=protect)
                ):
                    return
        # Mapped already; or given back by the program; or on its way out (``leaving``).
        data = contents.store.get(page) or bytes(size)
        if self._patiently(lambda: uffd.copy(address, data, wake=wake, protect=protect)):
            return
        if not protect:
            self._unprotect(mapping, page)
        self._wake(mapping, page, wake)

    def poison(self, mapping: Mapping, page: int, *, wake: bool) -> None:
        """Make every access to an absent page fail; its bytes stay in the store."""
        address = mapping.address_of(page)
        self._patiently(lambda: mapping.uffd.poison(address, self.page_size, wake=False))
        mapping.poisoned.add(page)
        mapping.comings[page] += 1
        self._wake(mapping, page, wake)

    def wake(self, mapping: Mapping, page: int) -> None:
        """Let everybody who waits at a page try again."""
        self._wake(mapping, page, True)

    def _protect(self, mapping: Mapping, page: int) -> None:
        address = mapping.address_of(page)
        self._patiently(lambda: mapping.uffd.writeprotect(address, self.page_size))

    def _unprotect(self, mapping: Mapping, page: int) -> None:
        address = mapping.address_of(page)
        self._patiently(lambda: mapping.uffd.unprotect(address, self.page_size, wake=False))

    def _wake(self, mapping: Mapping, page: int, wake: bool) -> None:
        if wake:
            mapping.uffd.wake(mapping.address_of(page), self.page_size)

    def _patiently(self, call: Callable[[], int | None]) -> int | None:
        """Do a call that answers EAGAIN while a fork is under way: read on, then again."""
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                return call()
            except LayoutChanging:
                if time.monotonic() > end:
                    raise
                self._pump()
                time.sleep(50e-6)

    def _adopt(self, contents: Contents, page: int) -> None:
        """Take a page as present that somebody has brought who does not map it, or unwatched.

        Its bytes are those of the store, and what is not zero of those that came.
        """
        contents.present.add(page)
        stored = contents.store.pop(page, b"")
        if self._window is None or not any(stored):
            return
        start, end = page * self.page_size, (page + 1) * self.page_size
        came = self._window[start:end]
        self._window[start:end] = bytes(a or b for a, b in zip(came, stored, strict=True))
        self._complain(
            f"page {page} was read or written past the harness, by read() or write() of its memfd"
            " or in a mapping that is not watched: what was there was not seen, and zeros that were"
            " written are not kept"
        )

    def _notice(self, contents: Contents, page: int) -> None:
        """Look whether somebody has written to an absent page through the memfd."""
        if self.shared and page not in contents.present:
            assert self.memfd is not None
            if any(os.pread(self.memfd, self.page_size, page * self.page_size)):
                self._adopt(contents, page)

    # --- pages go ----------------------------------------------------------------------

    def take_away(self, mapping: Mapping, page: int, discard: Callable[[int, int], None]) -> None:
        """Make a present page absent again, its bytes kept.

        Args:
            mapping: Where; shared memory loses it everywhere.
            page: Which; one that is absent stays so.
            discard: Does madvise(MADV_DONTNEED) on private memory: address, length.
        """
        if page not in mapping.contents.present:
            return
        data = self.begin_leaving(mapping, page)
        if self.shared:
            self._punch(page)
        else:
            discard(mapping.address_of(page), self.page_size)
        self.left(mapping, page, data)

    def begin_leaving(self, mapping: Mapping, page: int) -> bytes:
        """Write-protect a present page everywhere and read it."""
        done: set[Mapping] = set()
        # Whoever forks meanwhile is protected in its turn: the call waits for the fork's message.
        while todo := [each for each in self._where(mapping, page) if each not in done]:
            for each in todo:
                done.add(each)
                with contextlib.suppress(*_GONE):
                    self._protect(each, page)
        return self.read(mapping, page * self.page_size, self.page_size)

    def left(self, mapping: Mapping, page: int, data: bytes) -> None:
        """Note that a page which was read by ``begin_leaving`` is gone."""
        mapping.contents.present.discard(page)
        mapping.contents.store[page] = data
        # The mark outlives the page wherever a file is mapped, and POISON would stop at it.
        for each in self._where(mapping, page):
            with contextlib.suppress(*_GONE):
                self._unprotect(each, page)

    def _where(self, mapping: Mapping, page: int) -> list[Mapping]:
        if not self.shared:
            return [mapping]
        return [m for m in self.mappings if m.address <= m.address_of(page) < m.end]

    def _punch(self, page: int) -> None:
        assert self.memfd is not None
        page_cache.punch_hole(self.memfd, page * self.page_size, self.page_size)

    # --- from outside ------------------------------------------------------------------

    def check(self, offset: int, length: int) -> None:
        """Refuse bytes that the region does not have.

        Raises:
            ValueError: It has not all of them.
        """
        if offset < 0 or length < 0 or offset + length > self.pages * self.page_size:
            raise ValueError(
                f"{length} bytes at offset {offset} are not in the"
                f" {self.pages * self.page_size} bytes of this region"
            )

    def read(self, mapping: Mapping, offset: int, length: int) -> bytes:
        """Read without a touch."""
        parts = []
        for page, start, end in self._pieces(offset, length):
            self._notice(mapping.contents, page)
            if self._is_there(mapping, page):
                parts.append(self._present(mapping, page, start, end))
            else:
                stored = mapping.contents.store.get(page)
                parts.append(bytes(end - start) if stored is None else stored[start:end])
        return b"".join(parts)

    def write(self, mapping: Mapping, offset: int, data: bytes) -> None:
        """Write without a touch."""
        done = 0
        for page, start, end in self._pieces(offset, len(data)):
            piece = data[done : done + end - start]
            done += len(piece)
            self._notice(mapping.contents, page)
            if self._is_there(mapping, page):
                self._put(mapping, page, start, piece)
            else:
                stored = bytearray(mapping.contents.store.get(page) or bytes(self.page_size))
                stored[start:end] = piece
                mapping.contents.store[page] = bytes(stored)

    @staticmethod
    def _is_there(mapping: Mapping, page: int) -> bool:
        """Say whether the memory has the last word on a page; not while it is discarded."""
        return page in mapping.contents.present and page not in mapping.contents.leaving

    def _pieces(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        pieces = []
        end = offset + length
        while offset < end:
            page, start = divmod(offset, self.page_size)
            stop = min(self.page_size, start + end - offset)
            pieces.append((page, start, stop))
            offset += stop - start
        return pieces

    def _present(self, mapping: Mapping, page: int, start: int, end: int) -> bytes:
        if self._window is not None:
            base = page * self.page_size
            return self._window[base + start : base + end]
        fd = os.open(f"/proc/{mapping.process}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(fd, end - start, mapping.address_of(page) + start)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            data = b""  # given back by the program
        finally:
            os.close(fd)
        return data.ljust(end - start, b"\0")

    def _put(self, mapping: Mapping, page: int, start: int, piece: bytes) -> None:
        if self._window is not None:
            base = page * self.page_size + start
            self._window[base : base + len(piece)] = piece
            return
        address = mapping.address_of(page)
        with contextlib.suppress(ResolutionRefused):  # it is there, unless it was given back
            zeros = bytes(self.page_size)
            self._patiently(lambda: mapping.uffd.copy(address, zeros, wake=False, protect=True))
        protected = self._is_protected(mapping, address)
        if protected:  # or /proc/PID/mem would wait for us
            self._unprotect(mapping, page)
        fd = os.open(f"/proc/{mapping.process}/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            os.pwrite(fd, piece, address + start)
        finally:
            os.close(fd)
        if protected:
            self._protect(mapping, page)

    @staticmethod
    def _is_protected(mapping: Mapping, address: int) -> bool:
        fd = pagemap.open_pagemap(mapping.process)
        try:
            return any(
                entry & abi.PM_UFFD_WP for entry in pagemap.entries(fd, address, mmap.PAGESIZE)
            )
        finally:
            os.close(fd)
