"""Snapshots of targets that are not resident yet: what they changed, as a layer over their image.

Knows: which pages a target has (its pagemap), their bytes (/proc/PID/mem), its image, what it
removed.
Must not know: how the file is written; how a target's owner pauses it.

A target that was restored lazily has only a part of its memory.  Reading all of it would bring
the rest through page faults; writing zeros for what is missing would lose it.  So either
everything is brought first (``whole``), or only what the target has is compared with the image:
the rest is the image's still.

Laws of this file:

* A page that is not there is never touched, and never taken for zeros.
* Memory is read in a thread, while the loop serves on: pages may have to come from swap, and
  a thread of the target may have to be served before it can stop.  A page that goes away after
  all is refused with EIO (seen on Linux 6.18), and so is a poisoned one.
* Removed pages are written as zeros: a hole would let the image show through.
* The target is paused meanwhile, by its owner or by us.  That it was cannot be proved, but
  faults or changes of its layout prove that it was not.
* /proc/PID files are opened by number, and count only if the pidfd says that it still lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple
from weakref import WeakKeyDictionary

from .errors import LayoutChanging, NotPaused, NotSupported, SourceError, TargetGone
from .handover import Peer
from .image import PAGE
from .image.sparse import SparseWriter
from .kernel import abi, pagemap
from .parking import Patience
from .ranges import PageSet, Range
from .region import Region
from .session import Session

if TYPE_CHECKING:
    from .sources import Source

_PIECE_BYTES: Final = 1 << 20  # read, compared and written at a time
_THERE: Final = abi.PAGE_IS_PRESENT | abi.PAGE_IS_SWAPPED
#: One snapshot at a time stops a target: the end of another would let it go on.
_stopping: Final[WeakKeyDictionary[Session, asyncio.Lock]] = WeakKeyDictionary()
_STOPPED: Final = frozenset("TtZX")  # states of threads that do not run


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a snapshot took.

    Attributes:
        path: The file.
        size: Its length, in bytes.
        compared_bytes: What the target had, in bytes.
        written_bytes: Of these, what is in the file, in bytes.
        zero_bytes: What the target had removed, written as zeros, in bytes.
        fill_seconds: What bringing everything took before; 0.0 without.
        pause_seconds: What the target had to be paused for.
    """

    path: str
    size: int
    compared_bytes: int
    written_bytes: int
    zero_bytes: int
    fill_seconds: float
    pause_seconds: float


class _Run(NamedTuple):
    """A stretch of the image that the target has, or has removed."""

    offset: int
    length: int
    address: int | None  # None: removed


async def take_snapshot(
    session: Session,
    path: str | os.PathLike[str],
    *,
    whole: bool = False,
    stop: bool = False,
    deadline: float = 10.0,
) -> Snapshot:
    """Write what a target's memory holds now.

    ::

        snapshot = await take_snapshot(session, "monday.diff", stop=True)
        image = LayeredSource(FileSource("base"), FileSource("monday.diff"))

    The target itself counts; children that it forked are not looked at.  Memory that it grew
    by mremap has no place in the image, and is left out.

    Args:
        session: Serving; its target is paused, unless ``stop``.
        path: A new sparse file, for this user alone: memory holds secrets.  It is
            a layer over the session's image: removed pages are zeros in it, and what is as it
            was in the image is a hole.
        whole: Bring everything first, while the target runs on, and write all of it: a file
            that needs no image under it.
        stop: Stop the target by SIGSTOP for the time of the copy, and let it go on after it
            unless it was stopped before.  Of several such calls each waits for the one before.
        deadline: Seconds until all its threads have to be stopped.

    Raises:
        NotPaused: The target ran: it faulted or changed its layout, or could not be stopped.
        NotSupported: Its pid is unknown or its memory may not be read; or the file system
            does not keep holes exactly.
        SourceError: A page of the target is lost (poisoned), or the image cannot be read.
        TargetGone: It has exited.
        ClosedError: The session has ended.
        OSError: The file cannot be written.

    Cancellation: no file is left, and the target goes on.
    """
    peer = session.peer
    if peer is None:
        raise NotSupported(
            "whose memory it is is unknown", "A snapshot takes the target's pid and pidfd."
        )
    began = time.monotonic()
    if whole:
        await session.fill()
    fill_seconds = time.monotonic() - began if whole else 0.0
    session.pager.check_serving()
    async with contextlib.AsyncExitStack() as stack:
        memory = _Memory(session, peer, stack)
        if stop:
            await stack.enter_async_context(_stopping.setdefault(session, asyncio.Lock()))
        paused = time.monotonic()
        if stop:
            await stack.enter_async_context(stopped(peer, deadline))
        session.pager.read_events()
        ends = [region.offset + region.length for region in session.handover.regions]
        size = max(session.source.size, *ends)  # the rest of the last page may be written
        writer = await stack.enter_async_context(SparseWriter(path, size, must_be_exact=not whole))
        moved = memory.movements()
        copying = _Copying(memory, None if whole else session.source, writer)
        for run in await memory.runs():
            try:
                await copying.run(run)
            except SourceError:
                if memory.movements() == moved:
                    raise
                break  # a page has gone away
        if memory.movements() != moved:
            raise NotPaused(
                f"{session.name} ran while its snapshot was taken; pause it, or stop=True"
            )
        pause_seconds = time.monotonic() - paused
        await writer.finish()
    return Snapshot(
        path=os.fspath(path),
        size=size,
        compared_bytes=copying.compared_bytes,
        written_bytes=copying.written_bytes,
        zero_bytes=copying.zero_bytes,
        fill_seconds=round(fill_seconds, 6),
        pause_seconds=round(pause_seconds, 6),
    )


class _Memory:
    """A target's memory, seen from outside."""

    def __init__(self, session: Session, peer: Peer, stack: contextlib.AsyncExitStack) -> None:
        self._session = session
        self._pagemap = pagemap.open_pagemap(peer.pid)
        stack.callback(os.close, self._pagemap)
        path = f"/proc/{peer.pid}/mem"
        try:
            self._memory = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError as error:
            raise NotSupported(
                f"{path} cannot be opened ({error.strerror})",
                "It takes the process's own user (and a process that may be dumped) or"
                " CAP_SYS_PTRACE.",
            ) from error
        stack.callback(os.close, self._memory)
        if peer.exited():
            raise TargetGone("reading its memory", errno.ESRCH, 0, 0)

    def movements(self) -> tuple[int, int]:
        """Count what shows that the target runs."""
        self._session.pager.read_events()
        counters = self._session.pager.counters
        return counters.faults, counters.events

    async def runs(self) -> list[_Run]:
        """List what is there and what was removed, by offset.

        Raises:
            NotPaused: The layout did not hold still.
        """
        pager = self._session.pager
        patience = Patience(self._session.service.deadline)
        while True:
            pager.read_events()
            epoch, events = pager.space.epoch, pager.counters.events
            owned = [(region, place) for region in pager.regions for place in _own(region)]
            places = [place for _, place in owned]
            gone = [list(_removed(region, where)) for region, (where, _) in owned]
            found = await asyncio.to_thread(self._scan, places, gone)
            pager.read_events()
            held_still = (epoch, events) == (pager.space.epoch, pager.counters.events)
            if held_still and not pager.uffd.is_changing():
                return found
            try:
                await patience.wait()
            except LayoutChanging as error:
                raise NotPaused(f"{self._session.name} changes its memory all the time") from error

    def _scan(self, places: list[tuple[Range, int]], removed: list[list[Range]]) -> list[_Run]:
        found: list[_Run] = []
        for (where, offset), gone in zip(places, removed, strict=True):
            to_offset = offset - where.start
            there = PageSet()
            for run in pagemap.regions(
                self._pagemap, where.start, where.end, any_of=_THERE, report=0
            ):
                there.add(Range(run.start, run.length))
                found.append(_Run(run.start + to_offset, run.length, run.start))
            zeros = (gap for stretch in gone for gap in there.gaps(stretch))
            found += [_Run(gap.start + to_offset, gap.length, None) for gap in zeros]
        found.sort(key=lambda run: run.offset)
        return found

    def read(self, address: int, length: int) -> bytes:
        """Read what is there; in a thread, for it waits where it is not there after all."""
        data = os.pread(self._memory, length, address)
        if len(data) < length:  # the next byte gives the error, if there is one
            data += os.pread(self._memory, length - len(data), address + len(data))
        if len(data) < length:
            raise OSError(errno.EIO, f"only {len(data)} of {length} bytes at {address:#x}")
        return data


def _own(region: Region) -> Iterator[tuple[Range, int]]:
    """Give where a region lies, less what was grown by mremap: it has no place in the image."""
    end = region.offset + region.length
    for where, offset in region.ranges:
        if offset < end:
            yield Range(where.start, min(where.length, end - offset)), offset


def _removed(region: Region, where: Range) -> Iterator[Range]:
    """Give what reads zero unless it is there: removed now, or while another server had it."""
    at = where.start
    for run in region.fillable(where):
        if at < run.start:
            yield Range.between(at, run.start)
        at = run.end
    if at < where.end:
        yield Range.between(at, where.end)


class _Copying:
    """Compares stretches with the image, page by page, and writes what differs."""

    def __init__(self, memory: _Memory, image: Source | None, writer: SparseWriter) -> None:
        self._memory = memory
        self._image = image
        self._writer = writer
        self.compared_bytes = 0
        self.written_bytes = 0
        self.zero_bytes = 0

    async def run(self, run: _Run) -> None:
        """Do one stretch."""
        for at in range(run.offset, run.offset + run.length, _PIECE_BYTES):
            length = min(_PIECE_BYTES, run.offset + run.length - at)
            before = await self._before(at, length)
            if run.address is None:
                now = bytes(length)
            else:
                address = run.address + at - run.offset
                try:
                    now = await asyncio.to_thread(self._memory.read, address, length)
                except OSError as error:
                    raise SourceError(
                        f"the target's page near {address:#x} is lost: {error}", address
                    ) from error
                self.compared_bytes += length
            for offset, data in _differences(at, before, now):
                await self._writer.put(offset, data)
                if run.address is None:
                    self.zero_bytes += len(data)
                else:
                    self.written_bytes += len(data)

    async def _before(self, offset: int, length: int) -> bytes:
        """Read what the image has; behind its end, and without one, zeros."""
        if self._image is None or offset >= self._image.size:
            return bytes(length)
        inside = min(length, self._image.size - offset)
        data = self._image.read_nowait(offset, inside)
        if data is None:
            data = await self._image.read(offset, inside)
        return bytes(data) + bytes(length - inside)


def _differences(offset: int, before: bytes, now: bytes) -> Iterator[tuple[int, bytes]]:
    """Give the stretches of whole pages that differ."""
    if before == now:
        return
    start: int | None = None
    for at in range(0, len(now), PAGE):
        if now[at : at + PAGE] == before[at : at + PAGE]:
            if start is not None:
                yield offset + start, now[start:at]
            start = None
        elif start is None:
            start = at
    if start is not None:
        yield offset + start, now[start:]


@contextlib.asynccontextmanager
async def stopped(peer: Peer, deadline: float = 10.0) -> AsyncIterator[None]:
    """Stop a process by SIGSTOP until the block ends, unless it was stopped before.

    Args:
        peer: Who; signalled through its pidfd.
        deadline: Seconds until all its threads have to be stopped: one that waits in a page
            fault stops when it has been served.

    Raises:
        NotPaused: They were not.
        TargetGone: It has exited.
    """
    was_stopped = _is_stopped(peer)
    try:
        if not was_stopped:
            _signal(peer, signal.SIGSTOP)
        end = time.monotonic() + deadline
        pause = 0.0005
        while not _is_stopped(peer):
            if time.monotonic() > end:
                raise NotPaused(f"{peer} has threads that did not stop within {deadline:g} s")
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.02)
        yield
    finally:
        if not was_stopped:
            with contextlib.suppress(TargetGone):
                _signal(peer, signal.SIGCONT)


def _signal(peer: Peer, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(peer.pidfd.fileno(), number)
    except ProcessLookupError as error:
        raise TargetGone("stopping it", errno.ESRCH, 0, 0) from error


def _is_stopped(peer: Peer) -> bool:
    """Say whether no thread of a process runs.

    Raises:
        TargetGone: It has exited.
    """
    states = []
    for task in Path(f"/proc/{peer.pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # a thread that has ended
            states.append(task.read_text(errors="replace").rpartition(")")[2].split()[0])
    if peer.exited():
        raise TargetGone("stopping it", errno.ESRCH, 0, 0)
    return bool(states) and _STOPPED.issuperset(states)
