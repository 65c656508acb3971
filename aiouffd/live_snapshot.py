"""Live snapshots: the memory of a running process as it was at one instant, without stopping it.

Knows: write protection, when the instant is, what must be saved before which writer goes on.
Must not know: how the file is written; how a target is restored from it.

Everything is protected first, while nobody who wants to write is let go on.  *The instant is the
end of the last UFFDIO_WRITEPROTECT*: from there on a page keeps its bytes until they have been
saved and its protection is taken off.  Who writes to a page waits until it is saved, which is
done at once; the rest follows in the background.

Laws of this file:

* A page's bytes count only if it was still protected after they were read: it has not changed
  since the instant then.  If it was not, the snapshot fails; it never is of two instants.
* A page is unprotected only when its bytes are in our hands.
* Who gives memory back (MADV_DONTNEED and its like, which send EVENT_REMOVE) sleeps until that
  event is read.  So it is not read before everything is saved; writers wait for that long.
* However it ends, all protection is taken off and nobody waits.

Kernel facts that matter, seen on Linux 6.18: an event that is unread makes every fill and
unprotect say EAGAIN, by which it is known before it is read.  Between that question and the
reading of faults an event can slip in; its memory is gone within microseconds, and the snapshot
fails if it was not saved yet: try again.  Private anonymous memory that was removed has lost its
protection in any case.  Shared memory keeps it, and holes that are punched into a file (fallocate)
send no event: where somebody does that, he has to be stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from .errors import (
    LayoutChanging,
    NotSupported,
    ResolutionRefused,
    SourceError,
    TargetGone,
)
from .events import Event, Forked, PageFault, Removed
from .image.sparse import SparseWriter
from .pager import Pager
from .parking import Patience
from .protected_memory import BLOCK_BYTES, PIECE_BYTES, ProtectedMemory, Saving
from .ranges import PAGE_SIZE, Range, is_aligned
from .readiness import between_pieces
from .resolutions import Unprotect
from .threads import in_thread
from .uffd import Feature, Mode, Userfaultfd

_HELD_BYTES: Final = 64 << 20  # saved and not written yet; then writers wait for the file
_PROTECTED_BYTES: Final = 64 << 20  # in one call: some milliseconds at most
_ZEROS: Final = memoryview(bytes(PIECE_BYTES))
#: What the userfaultfd has to be opened with.
FEATURES: Final = Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED | Feature.EVENT_REMOVE


class Stretch(NamedTuple):
    """Memory of the target, and where it goes."""

    start: int  #: address
    length: int  #: in bytes
    offset: int = 0  #: in the image, in bytes
    page_size: int = PAGE_SIZE  #: in bytes


@dataclass(frozen=True, slots=True)
class LiveSnapshot:
    """What a live snapshot took.

    Attributes:
        path: The file.
        size: Its length, in bytes.
        written_bytes: Of these, what is not a hole.
        demand_bytes: What was saved because somebody wanted to write there, in bytes.
        protect_seconds: Until everything was protected: who writes meanwhile waits.
        longest_wait_seconds: That a writer has waited; those who waited for the protection, and
            for a removal, count from its beginning.
        held: Somebody gave memory back, and writers waited until everything was saved.
        seconds: All of it.
    """

    path: str
    size: int
    written_bytes: int
    demand_bytes: int
    protect_seconds: float
    longest_wait_seconds: float
    held: bool
    seconds: float


async def take_live_snapshot(
    uffd: Userfaultfd,
    stretches: Sequence[Stretch],
    path: str | os.PathLike[str],
    *,
    pid: int,
    pidfd: int | None = None,
    deadline: float = 30.0,
) -> LiveSnapshot:
    """Write what a process's memory holds at one instant, while it runs on.

    Writers wait until everything is protected (some milliseconds per GiB), and then each for its
    page to be saved.  The whole image takes its own length in time, not in memory.

    Kernel: UFFDIO_WRITEPROTECT, since Linux 5.7, of what was never populated since 6.4;
    PAGEMAP_SCAN, since Linux 6.7.

    Args:
        uffd: Opened by the process with ``FEATURES``, not for user-mode faults only, or its
            system calls fail on protected pages; with WP_HUGETLBFS_SHMEM for shared or huge
            memory.  It stays the caller's; nobody else reads it meanwhile.
        stretches: Disjoint, in memory and in the image.
        path: A new sparse file, for this user alone: memory holds secrets.
        pid: Whose memory it is.
        pidfd: Of that process, if there is one; stays the caller's.
        deadline: Seconds to wait at most, while it protects, for changes of the layout to end.

    Returns:
        What was taken.

    Raises:
        NotSupported: The kernel or the userfaultfd cannot, or this user may not look into that
            process.
        ValueError: A stretch is not made of whole pages, or two overlap.
        SourceError: A page was removed or unmapped before it was saved: there is no snapshot,
            but there may be one of the next instant.
        TargetGone: The process has exited or called exec.
        LayoutChanging: It changes its memory all the time.
        OSError: The file cannot be written.

    Cancellation: no file is left, all protection is taken off, and nobody waits.
    """
    _check(uffd, stretches)
    began = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        memory = ProtectedMemory(pid, stack)
        size = max(one.offset + one.length for one in stretches)
        writer = await stack.enter_async_context(SparseWriter(path, size))
        savings = [
            Saving(memory, Range(one.start, one.length), one.offset, one.page_size)
            for one in stretches
        ]
        copying = _Copying(memory, writer, deadline)
        pager = Pager(
            Userfaultfd.adopt(uffd.dup()), target=pidfd, deadline=None, observers=[copying]
        )
        try:
            async with pager:
                await copying.run(pager, savings)
        except (SourceError, OSError) as error:
            if pager.target_gone or memory.is_gone():
                raise TargetGone("saving its memory", errno.ESRCH, 0, 0) from error
            raise
        finally:
            _let_events_go(uffd)
        await writer.finish()
    return LiveSnapshot(
        path=os.fspath(path),
        size=size,
        written_bytes=copying.written_bytes,
        demand_bytes=copying.demand_bytes,
        protect_seconds=round(copying.protect_seconds, 6),
        longest_wait_seconds=round(copying.longest_wait, 6),
        held=copying.held,
        seconds=round(time.monotonic() - began, 6),
    )


def _let_events_go(uffd: Userfaultfd) -> None:
    """Read events of before the end, for our caller's descriptor keeps their threads asleep.

    No new one comes, as nothing is registered any more.  Each of these threads has been counted
    as changing the layout by then, and runs on within the kernel once its event is read.
    """
    while not uffd.closed and uffd.is_changing():
        for message in uffd.read():
            if isinstance(message, Forked):
                message.fd.close()
        time.sleep(0.00002)


def _check(uffd: Userfaultfd, stretches: Sequence[Stretch]) -> None:
    if uffd.features & Feature.WP_ASYNC:
        raise NotSupported(
            "with feature WP_ASYNC nobody waits for a page to be saved",
            "Open the userfaultfd without it; see aiouffd.dirty for what it is good for.",
        )
    missing = FEATURES & ~uffd.features & ~Feature.PAGEFAULT_FLAG_WP
    if missing:
        raise NotSupported(
            f"this userfaultfd lacks {missing!r}",
            "Who opens it has to ask for aiouffd.live_snapshot.FEATURES, on Linux 6.7 or newer.",
        )
    if uffd.is_own_memory():
        raise ValueError("this is our own memory: who saves it must not wait for itself")
    if not stretches:
        raise ValueError("there is nothing to save")
    for one in stretches:
        if not (one.length and all(is_aligned(n, one.page_size) for n in one[:3])):
            raise ValueError(f"{one} is not made of whole pages")
    for ranges in (
        sorted((one.start, one.length) for one in stretches),
        sorted((one.offset, one.length) for one in stretches),
    ):
        for (start, length), (after, _) in itertools.pairwise(ranges):
            if start + length > after:
                raise ValueError(f"two stretches overlap at {after:#x}")


class _Copying:
    """Saves, for writers and in the background; also the pager's observer.

    Sharing: the loop's thread.
    """

    def __init__(self, memory: ProtectedMemory, writer: SparseWriter, deadline: float) -> None:
        self._memory = memory
        self._writer = writer
        self._deadline = deadline
        self._savings: list[Saving] = []
        self._instant = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._waiting: deque[tuple[int, bytes]] = deque()  # for the file
        self._waiting_bytes = 0
        self._failed: Exception | None = None
        self._since: float | None = None  # who is read about now may wait since
        self._faults: dict[int, float] = {}
        self.held = False
        self.written_bytes = 0
        self.demand_bytes = 0
        self.protect_seconds = 0.0
        self.longest_wait = 0.0

    async def run(self, pager: Pager, savings: list[Saving]) -> None:
        """Protect, let go on, save."""
        self._savings = savings
        for saving in savings:
            pager.register(
                saving.where.start,
                saving.where.length,
                self._on_write,
                modes=Mode.WP,
                page_size=saving.page_size,
                offset=saving.offset,
            )
        self._since = time.monotonic()
        try:
            await self._protect(pager)
            self.protect_seconds = time.monotonic() - self._since
            for saving in savings:
                await in_thread(saving.instant)
            self._read_on(pager)
            for saving in savings:
                await self._save_all(pager, saving)
            await self._put_waiting()
        finally:
            self._stop_reading(pager)
        self._check(pager)

    async def _protect(self, pager: Pager) -> None:
        """Protect everything; the instant is the end of the last of these calls.

        In the end nobody reads: neither faults, whose threads would go on, nor events.
        """
        uffd = pager.uffd
        patience = Patience(self._deadline)
        while True:
            try:
                for piece in self._pieces():
                    uffd.writeprotect(piece.start, piece.length)
                    await between_pieces()
            except LayoutChanging:
                await patience.wait()
                continue
            # What was given back meanwhile has lost its protection.
            pager.hold_reading()
            if all(self._memory.is_protected(one.start, one.length) for one in self._pieces()):
                return
            pager.resume_reading()
            await patience.wait()

    def _pieces(self) -> Iterator[Range]:
        for saving in self._savings:
            yield from saving.where.pieces(max(_PROTECTED_BYTES, saving.page_size))

    def _read_on(self, pager: Pager) -> None:
        """Read in the pager's stead until everything is saved: faults, but no events."""
        loop, fd = asyncio.get_running_loop(), pager.uffd.fileno()

        def read() -> None:
            if pager.uffd.closed or pager.target_gone:
                loop.remove_reader(fd)
            elif pager.uffd.is_changing():
                loop.remove_reader(fd)
                self.held, self._since = True, self._since or time.monotonic()
            else:
                pager.read_events(1)  # by the next read an event may have come
                self._since = None

        self._instant.set()
        loop.add_reader(fd, read)
        read()

    def _stop_reading(self, pager: Pager) -> None:
        if not pager.uffd.closed:
            asyncio.get_running_loop().remove_reader(pager.uffd.fileno())
            pager.resume_reading()
            pager.read_events()

    async def _on_write(self, fault: PageFault) -> Unprotect:
        """Save what somebody wants to write to, and let him."""
        if not self._instant.is_set():
            await self._instant.wait()
        while not self._room.is_set() and self._failed is None:
            await self._room.wait()
        saving = next(one for one in self._savings if fault.address in one.where)
        block = saving.block_of(fault.address)
        where = saving.extent(block, 1)
        if self._failed is None and saving.needs(block):
            try:
                self._keep(saving, block)
            except Exception as error:
                self._fail(error)
            else:
                self.demand_bytes += where.length
        return Unprotect(where.length, where.start)

    def _keep(self, saving: Saving, block: int) -> None:
        """Save a block, for the file to have later."""
        saved = saving.save(block, 1)
        self._waiting += saved
        self._waiting_bytes += sum(len(data) for _, data in saved)
        if self._waiting_bytes > _HELD_BYTES:
            self._room.clear()

    def _fail(self, error: Exception) -> None:
        self._failed = self._failed or error
        self._room.set()

    def _check(self, pager: Pager) -> None:
        if self._failed is not None:
            raise self._failed
        if pager.target_gone:
            raise TargetGone("saving its memory", errno.ESRCH, 0, 0)

    async def _save_all(self, pager: Pager, saving: Saving) -> None:
        at = 0
        while (found := saving.next(at)) is not None:
            self._check(pager)
            first, count = found
            saved = saving.save(first, count)
            where = saving.extent(first, count)
            if not self.held:
                try:
                    pager.uffd.unprotect(where.start, where.length)
                except LayoutChanging:
                    pass  # it is unprotected in the end, with the rest
                except ResolutionRefused as error:
                    raise SourceError(f"{where} is not mapped any more", where.start) from error
            await self._put(saved)
            await self._put_waiting()
            await between_pieces()
            at = first + count

    async def _put_waiting(self) -> None:
        """Write what was saved for writers; who waits for room goes on as soon as there is some."""
        while self._waiting:
            offset, data = self._waiting.popleft()
            await self._put([(offset, data)])
            self._waiting_bytes -= len(data)
            if self._waiting_bytes <= _HELD_BYTES:
                self._room.set()

    async def _put(self, saved: list[tuple[int, bytes]]) -> None:
        """Write what is not zeros."""
        for offset, data in saved:
            for at in range(0, len(data), BLOCK_BYTES):
                part = memoryview(data)[at : at + BLOCK_BYTES]
                if part != _ZEROS[: len(part)]:
                    self.written_bytes += len(part)
                    await self._writer.put(offset + at, part)

    # --- the pager's observer ----------------------------------------------------------

    def begin(self, fault: PageFault) -> None:
        """Somebody waits."""
        self._faults[fault.address] = self._since or time.monotonic()

    def end(self, fault: PageFault, _outcome: str, _elapsed_ns: int) -> None:
        """Nobody waits there any more."""
        since = self._faults.pop(fault.address, None)
        if since is not None:
            self.longest_wait = max(self.longest_wait, time.monotonic() - since)

    def event(self, event: Event) -> None:
        """An event slipped in: what it removes may be gone before it could be saved now."""
        if self._instant.is_set() and isinstance(event, Removed):
            where = event.range
            if any(saving.needs_any_of(where) for saving in self._savings):
                self._fail(SourceError(f"{where} was removed before it was saved", where.start))

    def failure(self, _fault: PageFault, error: Exception) -> None:
        """Our handler does not fail."""
        self._fail(error)
