"""Dirty tracking: which pages of a process were written, while it runs and nobody waits.

Knows: registering for asynchronous write-protection, get and clear, what a round is.
Must not know: faults and who serves them, what is done about the written pages.

Laws of this file:

* No update is lost.  A page is found and protected anew in one step, so what is written behind
  the walk is in the next round; what a round that failed or was cancelled has found is in the
  next one too.  So read a page's bytes after the round that names it, not before.
* Nothing here waits for the process, and it waits for nothing: a write to a protected page
  costs it one fault within the kernel.
* ``collect`` holds the loop for one bounded piece at a time; ``collect_now`` as long as it takes.
* Memory that is not tracked any more (moved, unmapped, mapped anew) is an error, never clean.
* What was removed reads zero, and is reported like what was written; see ``removals`` for how,
  and for the one case that cannot be seen.

What counts as written is what the kernel knows of this process's own mapping.  Not seen are
writes through another mapping of shared memory, by write(2) to its file, and by devices and
rings into pages that they had pinned before (io_uring's registered buffers, VFIO).

Kernel facts that surprise, seen on Linux 6.18:

* A page of private anonymous memory that was given back (MADV_DONTNEED) is WRITTEN: it has lost
  its mark.  MADV_FREE changes nothing until the page really goes.
* A write into a huge page splits it: what is reported is the one small page.
* A forked child is not tracked, its parent still is.  mremap to another place ends the tracking.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, NamedTuple, Self

from .errors import ClosedError, NotSupported, ResolutionRefused, TargetGone, refusal
from .fds import OwnedFd
from .kernel import abi, calls, maps, pagemap
from .ranges import PAGE_SIZE, Range, is_aligned, is_power_of_two
from .readiness import between_pieces
from .removals import Removals, watch
from .threads import in_thread
from .uffd import Feature, Mode, Userfaultfd

_MANY: Final = 1000  # mappings of a process: to read their list holds up the loop for a while
_PIECE_BYTES: Final = 64 << 20  # of memory in one scan: some tenths of a millisecond
_WRITTEN: Final = abi.PAGE_IS_WRITTEN
_GET_AND_CLEAR: Final = pagemap.WP_MATCHING | pagemap.CHECK_WPASYNC
_new_tuple: Final = tuple.__new__


class DirtyRun(NamedTuple):
    """Neighbouring pages that were written."""

    region: int  #: its number, as ``add`` gave it
    offset: int  #: in the region, in bytes
    length: int  #: in bytes


@dataclass(frozen=True, slots=True)
class DirtyRound:
    """What was written between two looks.

    Attributes:
        number: 1, 2, ...
        runs: In order of region and offset; no two of them touch.
        seconds: Since the round before, or since ``begin``.
    """

    number: int
    runs: list[DirtyRun] = field(repr=False)
    seconds: float

    @property
    def bytes(self) -> int:
        """How much was written, in bytes of whole pages."""
        return sum(run.length for run in self.runs)

    @property
    def rate(self) -> float:
        """Bytes of pages per second: a page that is written often counts once."""
        return self.bytes / self.seconds if self.seconds > 0 else 0.0


class _Region(NamedTuple):
    """What is tracked."""

    number: int
    where: Range
    page_size: int
    removals: list[Removals]

    def runs(self, found: Iterable[Range]) -> list[DirtyRun]:
        """Turn addresses into runs of this region."""
        return [DirtyRun(self.number, one.start - self.where.start, one.length) for one in found]


class DirtyTracker:
    """Says which pages of a process were written, round by round.

    ::

        with DirtyTracker(uffd, pid=pid, pidfd=pidfd) as tracker:
            tracker.add(start, length)
            tracker.begin()
            async for round in tracker.rounds(0.1):
                ...

    Sharing: one task at a time; ``begin`` and ``collect_now`` may be called in any thread.
    """

    def __init__(
        self, uffd: Userfaultfd, *, pid: int | str = "self", pidfd: int | None = None
    ) -> None:
        """Prepare; nothing is tracked yet.

        Args:
            uffd: Opened with Feature.WP_ASYNC by the process whose memory it is; it stays the
                caller's.  If it has events, somebody else reads them.
            pid: Whose memory it is, or ``self``.
            pidfd: Of that process, if there is one: process ids are reused.

        Raises:
            NotSupported: The kernel or the userfaultfd cannot, or this user may not look into
                that process.
            TargetGone: There is no such process.
        """
        if not uffd.features & Feature.WP_ASYNC:
            raise NotSupported(
                "this userfaultfd has no feature WP_ASYNC",
                "It takes Linux 6.7 or newer, and who opens it has to ask for Feature.WP_ASYNC;"
                " `aiouffd info` shows what this kernel has.",
            )
        self._uffd = uffd
        self._pid = pid
        self._regions: dict[int, _Region] = {}
        self._next = 0
        self._began = 0.0  # when the present round did; 0.0 before ``begin``
        self._number = 0
        self._found: list[DirtyRun] = []  # in the present round, and by one that came to nothing
        self._in_order = True  # as they were found
        self._collecting = False
        self._closed = False
        self._long = False  # the list of mappings is
        self._over: asyncio.Event | None = None
        with contextlib.ExitStack() as stack:
            try:
                self._pagemap = stack.enter_context(OwnedFd(pagemap.open_pagemap(pid))).fileno()
                self._maps = stack.enter_context(OwnedFd(maps.open_maps(pid))).fileno()
            except FileNotFoundError as error:
                raise TargetGone("opening its pagemap", errno.ESRCH, 0, 0) from error
            if pidfd is not None and calls.pid_of(pidfd) != (os.getpid() if pid == "self" else pid):
                raise TargetGone("opening its pagemap", errno.ESRCH, 0, 0)
            pagemap.scan(self._pagemap, 0, 0)
            self._files = stack.pop_all()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"after round {self._number}"
        return f"<DirtyTracker of {self._pid} {state}, {len(self._regions)} regions>"

    # --- what is tracked ---------------------------------------------------------------

    def add(
        self,
        start: int,
        length: int,
        *,
        page_size: int = PAGE_SIZE,
        file: int | None = None,
        holes: bool = True,
    ) -> int:
        """Track a range; after ``begin`` from now on, with all of its pages clean.

        Kernel: UFFDIO_REGISTER with MODE_WP, since Linux 5.7.

        Args:
            start: Address in the process, aligned to ``page_size``.
            length: Whole pages, in bytes.
            page_size: Of the memory, in bytes: 2 MiB on hugetlb.
            file: Of shared memory, a descriptor (a memfd); stays the caller's.  Without it one is
                looked for in /proc.
            holes: Set to False if nobody makes holes in the file of shared memory (fallocate,
                MADV_REMOVE, ftruncate): then it is not needed.

        Returns:
            The number of the region: 0, 1, ... in the order of these calls.

        Raises:
            ValueError: Misaligned, empty, overlapping another region, or not memory of the
                process whose pagemap this is.
            NotSupported: The file of shared memory cannot be opened.
            RangeGone: A part of it is not mapped.
            ResolutionRefused: The kernel refuses (EBUSY: another userfaultfd has it).
            TargetGone: The process has exited or called exec.
            ClosedError: The tracker is closed.
        """
        self._check_open()
        where = Range(start, length)
        if not is_power_of_two(page_size) or page_size < PAGE_SIZE:
            raise ValueError(f"{page_size} is no page size of this machine")
        if not (length and is_aligned(start, page_size) and is_aligned(length, page_size)):
            raise ValueError(f"{where} is not made of whole pages of {page_size} bytes")
        for other in self._regions.values():
            if where.overlaps(other.where):
                raise ValueError(f"{where} overlaps region {other.number} at {other.where}")
        self._uffd.register(start, length, Mode.WP)
        region = _Region(self._next, where, page_size, [])
        try:
            self._check_is_ours(region)
            self._watch(region, file, holes=holes)
            if self._began:
                self._protect(region)
        except BaseException:
            self._let_go(region)
            raise
        self._next += 1
        self._regions[region.number] = region
        return region.number

    def _check_is_ours(self, region: _Region) -> None:
        """Refuse memory that the userfaultfd has registered in another process than the pid's."""
        where = region.where
        flags = pagemap.CHECK_WPASYNC
        try:
            pagemap.scan(self._pagemap, where.start, where.start + PAGE_SIZE, flags=flags)
        except ResolutionRefused as error:
            if error.errno != errno.EPERM:
                raise
            raise ValueError(
                f"{where} is not registered in process {self._pid}: the userfaultfd is another's"
            ) from error
        self._check_mapped([region])

    def _watch(self, region: _Region, file: int | None, *, holes: bool) -> None:
        """Choose how to see what is removed of each mapping in a region."""
        for mapping in maps.mappings(self._maps):
            part = region.where.intersection(Range.between(mapping.start, mapping.end))
            if part is not None:
                watcher = watch(
                    *(mapping, part, region.page_size),
                    pid=self._pid,
                    fd=self._pagemap,
                    mark=self._uffd.writeprotect,
                    file=file,
                    holes=holes,
                )
                if watcher is not None:
                    region.removals.append(watcher)

    def _protect(self, region: _Region) -> None:
        where = region.where
        pagemap.protect(self._pagemap, where.start, where.end)
        for removals in region.removals:
            removals.look()

    def remove(self, number: int) -> None:
        """Track a region no longer; its number is not given again.

        What was written to it since the last round is not reported any more.

        Raises:
            KeyError: There is no such region.
            RuntimeError: Another task is collecting.
        """
        if self._collecting:
            raise RuntimeError("this tracker is collecting: remove regions between two rounds")
        self._let_go(self._regions.pop(number))
        self._found = [run for run in self._found if run.region != number]

    def begin(self) -> None:
        """Protect everything: from now on it is known what is written.

        Pages never touched get a mark as well, which takes the process 2 MiB of page tables per
        GiB.  The call takes some milliseconds per GiB; the GIL is free meanwhile.

        Kernel: PAGEMAP_SCAN without a vector, since Linux 6.7; for huge pages that are not there
        UFFDIO_WRITEPROTECT as well.

        Raises:
            RuntimeError: It has begun before.
            RangeGone: A region is not mapped as it was any more.
            LayoutChanging: An event of the userfaultfd is unread.
            TargetGone: The process has exited or called exec.
            ClosedError: The tracker is closed.
        """
        self._check_open()
        if self._began:
            raise RuntimeError("this tracker has begun before; collect() starts the next round")
        self._check_mapped(self._regions.values())
        for region in self._regions.values():
            try:
                self._protect(region)
            except ResolutionRefused as error:
                raise _gone(error, region) from error
        self._began = time.monotonic()

    # --- rounds ------------------------------------------------------------------------

    async def collect(self) -> DirtyRound:
        """Say what was written since the last round, and begin the next, in bounded pieces.

        Kernel: PAGEMAP_SCAN, since Linux 6.7.

        Raises:
            RuntimeError: Before ``begin``, or while another task collects.
            RangeGone: A region is not mapped as it was any more: ``remove`` it.
            TargetGone: The process has exited or called exec.
            ClosedError: The tracker is closed, or was meanwhile.

        Cancellation: what was found so far is in the next round.
        """
        began = self._start_round()
        try:
            for piece in self._pieces():
                self._scan(*piece)
                await between_pieces()
                self._check_open()
            if self._long or any(region.removals for region in self._regions.values()):
                await in_thread(self._look)
                self._check_open()
            else:
                self._look()
            return self._end_round(began)
        finally:
            self._stop_round()

    def collect_now(self) -> DirtyRound:
        """Do the same in one go: for a process that stands still and wants to go on.

        Raises as ``collect``.
        """
        began = self._start_round()
        try:
            for piece in self._pieces():
                self._scan(*piece)
            self._look()
            return self._end_round(began)
        finally:
            self._stop_round()

    async def rounds(self, interval: float) -> AsyncIterator[DirtyRound]:
        """Collect every so often, until the tracker is closed.

        Args:
            interval: Seconds from one round to the next; a round that takes longer is followed
                by the next at once.

        Raises:
            ValueError: The interval is below zero.
            RuntimeError: As ``collect``; so are RangeGone and TargetGone.

        Cancellation: what was found so far is in the next round.
        """
        if interval < 0:
            raise ValueError(f"an interval is not negative: {interval}")
        over = self._over = self._over or asyncio.Event()
        due = time.monotonic() + interval
        while not self.closed:
            try:
                async with asyncio.timeout(max(due - time.monotonic(), 0)):
                    await over.wait()
            except TimeoutError:
                due = max(due + interval, time.monotonic())
            if self.closed:
                return
            try:
                found = await self.collect()
            except ClosedError:
                return
            yield found

    def _start_round(self) -> float:
        self._check_open()
        if not self._began:
            raise RuntimeError("nothing is tracked before begin()")
        if self._collecting:
            raise RuntimeError("this tracker is collecting already: each page is told to one")
        self._collecting = True
        return time.monotonic()

    def _end_round(self, began: float) -> DirtyRound:
        runs = self._found if self._in_order else merged(self._found)
        self._found, self._in_order = [], True
        self._number += 1
        seconds, self._began = began - self._began, began
        return DirtyRound(self._number, runs, seconds)

    def _stop_round(self) -> None:
        self._collecting = False
        if self._found:
            self._in_order = False  # the next round finds more, from the first page on
        if self._closed:
            self._close_files()

    def _pieces(self) -> Iterator[tuple[_Region, int, int]]:
        for region in tuple(self._regions.values()):
            for piece in region.where.pieces(max(_PIECE_BYTES, region.page_size)):
                if region.number in self._regions:  # not removed meanwhile
                    yield region, piece.start, piece.end

    def _scan(self, region: _Region, start: int, end: int) -> None:
        """Get and clear one piece; what is found is kept at once."""
        number, base, runs = region.number, region.where.start, self._found
        while start < end:
            try:
                found, start = pagemap.scan_raw(
                    self._pagemap, start, end, required=_WRITTEN, flags=_GET_AND_CLEAR
                )
            except ResolutionRefused as error:
                raise _gone(error, region) from error
            known = len(runs)
            runs += [
                _new_tuple(DirtyRun, (number, at - base, to - at))  # a third of DirtyRun(...)
                for at, to, _ in pagemap.each_region(found)
            ]
            if 0 < known < len(runs):
                _join(runs, known)

    def _look(self) -> None:
        """See what was removed, where the page tables do not say; the last step of a round."""
        for region in tuple(self._regions.values()):
            for removals in region.removals:
                if lost := removals.look():
                    self._found += region.runs(lost)
                    self._in_order = False
        self._check_mapped(tuple(self._regions.values()))

    # --- checks ------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this tracker is closed")

    def _check_mapped(self, regions: Iterable[_Region]) -> None:
        """Refuse what is not mapped all over: a scan steps over it without a word."""
        todo = sorted(regions, key=lambda region: region.where.start, reverse=True)
        if not todo:
            return
        at = todo[-1].where.start
        found = maps.mappings(self._maps)
        self._long = len(found) > _MANY
        for mapping in found:
            while mapping.start <= at < mapping.end:
                where = todo[-1].where
                at = min(where.end, mapping.end)
                if at < where.end:
                    break
                todo.pop()
                if not todo:
                    return
                at = todo[-1].where.start
            if mapping.start > at:
                break
        number = errno.ENOENT if found else errno.ESRCH
        where = todo[-1].where
        raise refusal("PAGEMAP_SCAN", number, where.start, where.length)

    # --- the end -----------------------------------------------------------------------

    def _let_go(self, region: _Region) -> None:
        for removals in region.removals:
            removals.close()
        with contextlib.suppress(ResolutionRefused, ClosedError):  # its protection is gone as well
            self._uffd.unregister(region.where.start, region.where.length)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def close(self) -> None:
        """Unregister everything, which takes all protection off; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for region in self._regions.values():
            with contextlib.suppress(ResolutionRefused, ClosedError):
                self._uffd.unregister(region.where.start, region.where.length)
        if not self._collecting:  # or it may be in a thread: numbers are reused
            self._close_files()
        if self._over is not None:
            self._over.set()

    def _close_files(self) -> None:
        for region in self._regions.values():
            for removals in region.removals:
                removals.close()
        self._regions.clear()
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _gone(error: ResolutionRefused, region: _Region) -> ResolutionRefused:
    """Make the error for memory that is not what was registered any more."""
    if error.errno != errno.EPERM:
        return error
    return refusal("PAGEMAP_SCAN", errno.ENOENT, region.where.start, region.where.length)


def _join(runs: list[DirtyRun], at: int) -> None:
    """Make one of two neighbours if they touch: what one scan ends with, the next begins with."""
    (number, offset, length), after = runs[at - 1], runs[at]
    if (number, offset + length) == after[:2]:
        runs[at - 1 : at + 1] = [DirtyRun(number, offset, length + after.length)]


def merged(runs: list[DirtyRun]) -> list[DirtyRun]:
    """Put runs in order and make one of those that touch or overlap."""
    runs.sort()
    joined: list[DirtyRun] = []
    number, start, end = -1, 0, 0
    for region, offset, length in runs:
        if region == number and offset <= end:
            end = max(end, offset + length)
        else:
            if number >= 0:
                joined.append(DirtyRun(number, start, end - start))
            number, start, end = region, offset, offset + length
    if number >= 0:
        joined.append(DirtyRun(number, start, end - start))
    return joined
