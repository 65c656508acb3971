"""Pager: faults to handlers to resolutions, in order, once per page.

Knows: the order of things: read, apply the layout, serve, park, fail, close.
Must not know: where bytes come from, or who the target is beyond a pidfd.

The laws it keeps (each has a test that fails without it):

1. Every wake-up reads until nothing is pending, applies every event, then serves faults.
   Page faults are delivered before older events, so a fault read first may be about memory
   that an event behind it has moved or removed.
2. One handler per page: duplicates join.  Threads, signals and kernel-mode retries (which
   repeat their message in a loop until resolved) all send them.
3. Every fault ends: filled and woken, or by the failure policy within the deadline.
4. EEXIST wakes nobody: wake.  The same page over and over is an error.
5. EAGAIN does nothing: park, read on, try again by our own timer; no event may ever come.
6. A removed page reads zero, whoever wants to fill it.
7. A dead target says nothing: a pidfd and a probe tell.
8. The reader leaves the loop before the descriptor is closed.
9. Closing poisons what is missing (or as asked), for the kernel would make it zeros.
10. No more than one bounded ioctl at a time; demand before the rest of a long answer.
11. Handlers start at once; one that suspends becomes a task of this pager.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from . import eager
from .address_space import AddressSpace, Placement
from .errors import (
    ClosedError,
    DeadlineExceeded,
    FaultError,
    HandlerError,
    LayoutChanging,
    NoHandler,
    ResolutionRefused,
    StuckPage,
    TargetGone,
    refusal,
)
from .events import (
    MESSAGE_SIZE,
    PAGEFAULT,
    Event,
    Forked,
    PageFault,
    RawFault,
    Remapped,
    Removed,
    Unmapped,
    decode,
)
from .failure import Action, FailurePolicy
from .fds import OwnedFd
from .flight import Flight, Stage, where_it_waits
from .kernel import abi, buffers, calls
from .metrics import Counters, Observer
from .performer import PIECE_BYTES, Walk, outcome_of, perform, resolution_of, span_of
from .ranges import PAGE_SIZE, Range, is_aligned, is_power_of_two
from .region import Region
from .resolutions import (
    Answer,
    Continue,
    Copy,
    Handler,
    Poison,
    Resolution,
    Unprotect,
    Wake,
    Zero,
)
from .uffd import Mode, Userfaultfd

if TYPE_CHECKING:
    from typing_extensions import Buffer

log: Final = logging.getLogger("aiouffd")

_BATCH: Final = 64  # messages per read
_ROUNDS: Final = 64  # reads per wake-up: other work of the loop must run too
_PARK_FIRST: Final = 0.0005  # seconds until a parked fault is tried again, doubling ...
_PARK_MAX: Final = 0.02  # ... up to this
_LOST_PATIENCE: Final = 0.25  # seconds for an event to explain an unknown address
_ALIVE_EVERY: Final = 1.0  # seconds between questions whether the target is alive
_FD_SHORTAGE_PAUSE: Final = 0.05  # seconds without reading while no descriptor is to be had
_STUCK_AFTER: Final = 1000  # answers in a row that left the same page faulting
_NOMEM_TRIES: Final = 8
_INLINE_REST: Final = 256 * 1024  # bytes of a long answer done at once behind its page

_unpack_fault = abi.UFFD_MSG_PAGEFAULT.unpack_from
_NOWHERE: Final = (0, 0, None)
_CANCELLED_OR_FAILED = (Exception, asyncio.CancelledError)

Space = AddressSpace[Region, Flight]


class Patience:
    """Waits between tries while the layout changes: doubling, and with an end."""

    def __init__(self, limit: float | None) -> None:
        self._delay = _PARK_FIRST
        self._left = limit

    async def wait(self) -> None:
        """Wait a little longer than the last time.

        Raises:
            LayoutChanging: The waits together would exceed the limit.
        """
        if self._left is not None:
            self._left -= self._delay
            if self._left < 0:
                raise LayoutChanging("a fill", errno.EAGAIN, 0, 0)
        await asyncio.sleep(self._delay)
        self._delay = min(self._delay * 2, _PARK_MAX)


class Pager:
    """Serves the page faults of one userfaultfd by coroutines.

    ::

        async with Pager(uffd) as pager:
            pager.register(start, length, handler)
            await pager.wait_closed()

    The pager owns the userfaultfd from ``async with`` on: it is its one reader, and closes
    it at the end.

    Attributes:
        uffd: The userfaultfd.
        space: The books: who serves what, what is removed, what is in flight.
        counters: What was done so far.
        children: Pagers of forked children that live; needs Feature.EVENT_FORK.
        failure: The policy for faults that handlers cannot answer.
        on_close: What becomes of missing pages when the pager is closed.
        closing: ``aclose`` has begun.
        target_gone: The target has exited or called exec.

    Sharing: everything belongs to the thread of the loop that entered it.
    """

    def __init__(
        self,
        uffd: Userfaultfd,
        *,
        failure: FailurePolicy | None = None,
        deadline: float | None = 30.0,
        warn_after: float | None = 5.0,
        max_in_flight: int = 256,
        on_close: Action = Action.POISON,
        on_fork: Callable[[Pager], object] | None = None,
        target: int | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        """Prepare; nothing is read before ``async with``.

        Args:
            uffd: Opened or adopted; non-blocking.
            failure: What happens when a handler fails; by default two retries, then poison.
            deadline: Seconds that a fault may take before the policy's last action; None is
                for ever.
            warn_after: Seconds after which a fault is logged as overdue, with the line on
                which its handler waits; None is never.
            max_in_flight: Handlers suspended at once; beyond it faults wait in order, while
                events are still applied.
            on_close: For missing pages at the end; Action.RAISE is not possible here.
            on_fork: Called with the pager of each forked child before it serves.
            target: A pidfd of the target; duplicated.  With it exits are seen at once and
                Action.KILL is possible.
            observers: Told of every fault and event.
        """
        if max_in_flight < 1:
            raise ValueError("max_in_flight is at least 1")
        if on_close is Action.RAISE:
            raise ValueError("on_close is one of POISON, KILL, ZERO, HANG: there is nothing to fail")
        self.uffd = uffd
        self.fd = uffd.fileno()
        self.failure: FailurePolicy = failure if failure is not None else FailurePolicy()
        self.on_close = on_close
        self.space: Space = AddressSpace()
        self.counters = Counters()
        self.children: list[Pager] = []
        self.closing = False
        self.target_gone = False
        self._deadline = deadline
        self._warn_after = warn_after
        self._max_in_flight = max_in_flight
        self._on_fork = on_fork
        self._target = OwnedFd(os.dup(target)) if target is not None else None
        self._observers = tuple(observers)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._parent: Pager | None = None
        self._error: BaseException | None = None
        self._over: asyncio.Event = asyncio.Event()
        self._close_task: asyncio.Task[None] | None = None
        self._buffer = bytearray(_BATCH * MESSAGE_SIZE)
        self._view = memoryview(self._buffer)
        self._buffers = (self._buffer,)
        self._hot: tuple[int, int, Placement[Region] | None] = _NOWHERE
        self._served: set[int] | None = None  # pages ended in this batch of faults
        self._tasks: set[asyncio.Task[Any]] = set()  # handlers and fills: awaited at the end
        self._asked = 0  # flights whose handler is suspended
        self._queue: deque[Flight] = deque()
        self._parked: dict[Flight, None] = {}
        self._park_delay = _PARK_FIRST
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._again: dict[int, int] = {}  # answers in a row that did not settle a page

    # --- life --------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()
        if error is None and self._error is not None:
            raise self._error

    def start(self) -> None:
        """Begin to read, on the running loop; ``async with`` does this.

        Raises:
            RuntimeError: The userfaultfd has a reader already.
        """
        self.uffd.claim_reader()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.fd, self._on_readable)
        if self._target is not None:
            self._loop.add_reader(self._target.fileno(), self.target_is_gone)
        self._set_timer("alive", _ALIVE_EVERY, self._check_alive)

    async def wait_closed(self) -> None:
        """Wait until the target is gone or the pager is closed.

        Raises:
            FaultError: A fault failed and the policy says Action.RAISE.
            Exception: The pager itself failed.

        Cancellation: nothing happens to the pager.
        """
        await self._over.wait()
        if self._error is not None:
            raise self._error

    async def aclose(self, action: Action | None = None) -> None:
        """Stop serving: settle what is missing, unregister, wake everybody, close.

        Until the end the target's events are still read and its faults get the same action.

        Args:
            action: What becomes of missing pages; None is ``on_close``.  POISON marks each
                (a SIGBUS is seen), KILL ends the target, ZERO gives them up as zeros, HANG
                leaves everything registered and ``uffd`` open for its next owner.

        Cancellation: the close goes on by itself; call again to wait for it.
        """
        if self._loop is None:  # never started
            self._release()
            self._over.set()
            if action is not Action.HANG:
                self.uffd.close()
            return
        if self._close_task is None:
            self.closing = True
            coro = self._close(self.on_close if action is None else action)
            self._close_task = self._loop.create_task(coro, name="aiouffd close")
        await asyncio.shield(self._close_task)

    async def _close(self, action: Action) -> None:
        for child in tuple(self.children):
            await child.aclose(action)
        flights = tuple(self.space.in_flight.values())
        for flight in flights:
            flight.cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))
        self._queue.clear()
        self._parked.clear()
        try:
            if not self.target_gone:
                await self._settle_all(action)
        finally:
            self._stop_reading()
            self._release()
            for flight in tuple(self.space.in_flight.values()):
                self._end(flight, "hanging" if action is Action.HANG else outcome_at_close(action))
            if action is not Action.HANG or self.target_gone:
                self.uffd.close()
            if self._parent is not None and self in self._parent.children:
                self._parent.children.remove(self)
            self._over.set()

    async def _settle_all(self, action: Action) -> None:
        """Do at the end what ``aclose`` promises for missing pages."""
        if action is Action.KILL and self._kill():
            await self._over.wait()  # the pidfd says when it is dead: then nobody reads zeros
            return
        if action is Action.HANG:
            return
        for region in {id(p.region): p.region for _, p in self.space.placements}.values():
            if action is not Action.ZERO:  # KILL without a pidfd falls back to poison
                await self.poison_region(region)
            if self.target_gone:
                return
            self.forget(region)

    def _stop_reading(self) -> None:
        """Leave the loop: always before a descriptor is closed, for numbers are reused."""
        assert self._loop is not None
        self._loop.remove_reader(self.fd)
        if self._target is not None and not self._target.closed:
            self._loop.remove_reader(self._target.fileno())
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _release(self) -> None:
        if self._target is not None:
            self._target.close()

    def _fail(self, error: BaseException) -> None:
        """End the whole pager with an error; what is missing is settled by ``aclose``."""
        if self._error is None:
            self._error = error
        self._over.set()

    def check_serving(self) -> None:
        """Refuse work on a pager that no longer serves.

        Raises:
            ClosedError: It is closed or being closed.
            TargetGone: Its target is gone.
        """
        if self.target_gone:
            raise TargetGone("serving", errno.ESRCH, 0, 0)
        if self.closing or self.uffd.closed:
            raise ClosedError("this pager is closed")

    def patience(self) -> Patience:
        """Give a fresh wait for a changing layout, limited by the deadline."""
        return Patience(self._deadline)

    def refused(self, call: str, done: int, start: int, length: int) -> ResolutionRefused:
        """Make the error for a signed result below zero, and note a target that is gone."""
        if done == -errno.ESRCH:
            self.target_is_gone()
        return refusal(call, -done, start, length)

    def _set_timer(self, name: str, delay: float, call: Callable[[], None]) -> None:
        """Run a method later, unless its timer runs already."""
        if name not in self._timers and self._loop is not None:

            def fire() -> None:
                del self._timers[name]
                call()

            self._timers[name] = self._loop.call_later(delay, fire)

    # --- regions -----------------------------------------------------------------------

    @property
    def regions(self) -> list[Region]:
        """The regions that serve something now, by address."""
        return list({id(p.region): p.region for _, p in self.space.placements}.values())

    @property
    def in_flight(self) -> int:
        """Faults that have begun and not ended."""
        return len(self.space.in_flight)

    def register(
        self,
        start: int,
        length: int,
        handler: Handler,
        *,
        modes: int = Mode.MISSING,
        page_size: int = PAGE_SIZE,
        offset: int = 0,
        name: str = "",
        grows: bool = False,
        registered: bool = False,
    ) -> Region:
        """Serve the faults of a range by a coroutine.

        Kernel: UFFDIO_REGISTER, since Linux 4.3.

        Args:
            start: Address in the target, aligned to ``page_size``.
            length: Whole pages, in bytes.
            handler: ``async (PageFault) -> Resolution | Buffer | None``.
            modes: Mode.MISSING, WP, MINOR, or'ed.
            page_size: Of the memory, in bytes: 2 MiB on hugetlb.
            offset: Where the range begins in its source, in bytes.
            name: For messages to people.
            grows: The target may grow the memory with mremap; the new tail reads zero.
                Without it a fault there is one that nobody serves.
            registered: The peer has called UFFDIO_REGISTER already.

        Raises:
            ValueError: Misaligned, empty, or overlapping a region of this pager.
            ResolutionRefused: The kernel refuses; the errno says why.
            ClosedError: The pager is closed.
        """
        self.check_serving()
        where = Range(start, length)
        if not is_power_of_two(page_size) or page_size < PAGE_SIZE:
            raise ValueError(f"{page_size} is no page size of this machine")
        if not (length and is_aligned(start, page_size) and is_aligned(length, page_size)):
            raise ValueError(f"{where} is not made of whole pages of {page_size} bytes")
        for other, placement in self.space.placements.overlapping(where):
            if not self.space.removed.overlaps(other):  # what was moved away may be taken anew
                raise ValueError(f"{where} overlaps {placement.region!r}")
        ioctls = 0 if registered else self.uffd.register(start, length, modes)
        region = Region(
            self,
            where,
            handler,
            modes=Mode(modes),
            page_size=page_size,
            offset=offset,
            name=name,
            grows=grows,
            ioctls=ioctls,
        )
        self.space.register(where, region, offset, page_size)
        self._hot = _NOWHERE
        return region

    def forget(self, region: Region) -> None:
        """Unregister a region and let its waiting threads go; missing pages become zeros."""
        for where, _ in region.ranges:
            try:
                if region.modes & Mode.WP:
                    calls.writeprotect(self.fd, where.start, where.length, 0)
                self.uffd.unregister(where.start, where.length)
            except TargetGone:
                self.target_is_gone()
                return
            except ResolutionRefused as error:
                # Unmapped with its event still unread: there is nothing to unregister.
                log.debug("%r: %s", region, error)
                self.wake(where.start, where.length)
            for flight in self.space.drop(where):
                self._drop_flight(flight, "gone")
        self._hot = _NOWHERE

    async def poison_region(self, region: Region) -> None:
        """Poison every missing page of a region, in pieces between which events are read.

        Raises:
            ResolutionRefused: The kernel cannot (POISON is Linux 6.6).
        """
        patience = self.patience()
        for where, _ in region.ranges:
            walk = Walk(where, region.page_size)
            while walk and not self.target_gone:
                done = walk.step(lambda start, length: calls.poison(self.fd, start, length), self.wake)
                if done == -errno.EAGAIN:
                    await patience.wait()
                elif done == -errno.ESRCH:
                    self.target_is_gone()
                elif done < 0 and done not in (-errno.EEXIST, -errno.ENOENT):
                    raise self.refused("UFFDIO_POISON", done, walk.at, walk.end - walk.at)
                elif walk.at % (PIECE_BYTES * 4) == 0:
                    await asyncio.sleep(0)

    def wake(self, start: int, length: int) -> None:
        """Let threads that wait in a range try again."""
        calls.wake(self.fd, start, length)

    # --- reading -----------------------------------------------------------------------

    def _on_readable(self) -> None:
        try:
            self._drain()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                self._reader_failed(error)
                return
            # No descriptor for a forked child: its event stays queued and the fd readable.
            assert self._loop is not None
            log.error("a fork event waits for a file descriptor: %s", error)
            self._loop.remove_reader(self.fd)
            self._set_timer("fds", _FD_SHORTAGE_PAUSE, self._read_again)
        except Exception as error:
            self._reader_failed(error)

    def _read_again(self) -> None:
        assert self._loop is not None
        self._loop.add_reader(self.fd, self._on_readable)

    def _reader_failed(self, error: Exception) -> None:
        log.critical("the reader of %r failed", self.uffd, exc_info=error)
        self._stop_reading()
        self._fail(error)

    def _drain(self) -> None:
        """Read until nothing is pending; apply events before serving faults."""
        fd, buffer, read = self.fd, self._buffer, calls.read_messages
        for _ in range(_ROUNDS):
            count = read(fd, self._buffers)
            if count == MESSAGE_SIZE and buffer[0] == PAGEFAULT:
                # A short read means that nothing else was pending: the common case.
                _, flags, address, thread_id = _unpack_fault(buffer)
                self._fault(flags, address, thread_id)
            elif count:
                self._batch(count)
            else:
                return
            if self._over.is_set() and (self.target_gone or self.uffd.closed):
                return

    def _batch(self, count: int) -> None:
        faults: list[RawFault] = []
        for _ in range(_ROUNDS):
            for message in decode(self._view[:count]):
                if type(message) is RawFault:
                    faults.append(message)
                else:
                    self._apply(message)  # type: ignore[arg-type]  # the rest of the union
            if count < len(self._buffer):
                break
            count = calls.read_messages(self.fd, self._buffers)
        self._served = set()
        try:
            for fault in faults:
                self._fault(*fault)
        finally:
            self._served = None

    def _apply(self, event: Event) -> None:
        """Bring the books up to date, and what was in flight with them."""
        self.counters.events += 1
        self._hot = _NOWHERE
        match event:
            case Removed(where):
                for flight in self.space.remove(where):
                    self._removed_in_flight(flight)
            case Unmapped(where):
                for flight in self.space.unmap(where):
                    self._drop_flight(flight, "gone")
            case Remapped(start, to, length):
                for flight in self.space.remap(start, to, length):
                    self._drop_flight(flight, "gone")
            case Forked(fd):
                self._adopt_child(fd)
            case _:
                log.warning("an event that this version does not know: %r", event)
        for observer in self._observers:
            observer.event(event)

    def _adopt_child(self, fd: OwnedFd) -> None:
        child = Pager(
            Userfaultfd.adopt(fd),
            failure=self.failure,
            deadline=self._deadline,
            warn_after=self._warn_after,
            max_in_flight=self._max_in_flight,
            on_close=self.on_close,
            on_fork=self._on_fork,
            observers=self._observers,
        )
        child._parent = self
        child.space = self.space.fork()
        clones = {id(region): region.clone_for(child) for region in self.regions}
        child.space.placements.replace_values(
            lambda placement: placement.served_by(clones[id(placement.region)])
        )
        self.children.append(child)
        child.start()
        if self._on_fork is not None:
            self._on_fork(child)

    # --- serving -----------------------------------------------------------------------

    def _fault(self, flags: int, address: int, thread_id: int) -> None:
        """Take up one fault: join, queue, or ask its handler."""
        counters = self.counters
        counters.faults += 1
        space = self.space
        start, end, placement = self._hot
        if placement is None or not start <= address < end:
            found = space.find(address)
            if found is None:
                self._lost_fault(flags, address, thread_id)
                return
            self._hot = found
            placement = found[2]
        page = address & placement.mask
        if page in space.in_flight or (self._served is not None and page in self._served):
            # In flight: its end wakes all who wait.  Served in this batch: this message was
            # read before that wake, so its thread is awake already.
            counters.joined += 1
            return
        fault = PageFault(
            page, page + placement.delta, placement.page_size, flags, thread_id, address
        )
        region = placement.region
        started_ns = 0
        if self._observers:
            started_ns = time.perf_counter_ns()
            for observer in self._observers:
                observer.begin(fault)
        if self.closing:
            self._last_action(self._board(fault, region, started_ns), self.on_close)
        elif space.removed and page in space.removed and fault.missing:
            counters.removed += 1
            self._carry_out(self._board(fault, region, started_ns), Zero())
        elif self._asked >= self._max_in_flight:
            counters.queued += 1
            flight = self._board(fault, region, started_ns)
            flight.stage = Stage.QUEUED
            self._queue.append(flight)
        else:
            self._ask(fault, region, started_ns)

    def _board(self, fault: PageFault, region: Region | None, started_ns: int) -> Flight:
        """Enter a fault in the books as in flight."""
        assert self._loop is not None
        flight = Flight(fault, region, self._loop.time(), started_ns)
        self.space.in_flight[fault.address] = flight
        self._watch()
        return flight

    def _ask(self, fault: PageFault, region: Region, started_ns: int) -> None:
        """Ask a handler; carry its answer out at once if it has one."""
        assert self._loop is not None
        try:
            task, answer = eager.start(self._loop, region.handler(fault))
        except _CANCELLED_OR_FAILED as error:
            self._handler_failed(self._board(fault, region, started_ns), error)
            return
        if task is not None:
            flight = self._board(fault, region, started_ns)
            self._await(flight, task)
            return
        if type(answer) is Copy and answer.address is None:
            data: Buffer = answer.data
            mode = abi.UFFDIO_COPY_MODE_WP if answer.protect else 0
        elif type(answer) is bytes:
            data, mode = answer, 0
        else:
            self._answered(self._board(fault, region, started_ns), answer)
            return
        page, size = fault.address, fault.length
        if type(data) is bytes and len(data) == size and size <= buffers.STAGING_BYTES:
            # The shortest way: one page of bytes, no flight, no match.
            if calls.copy(self.fd, page, buffers.staged(data, size), size, mode) == size:
                self.counters.copied_bytes += size
                if self._again:
                    self._again.pop(page, None)
                self._ended(fault, "copy", started_ns)
                return
        self._answered(self._board(fault, region, started_ns), answer)

    def _await(self, flight: Flight, task: asyncio.Task[Any]) -> None:
        """Own a suspended handler until it ends."""
        flight.task = task
        flight.stage = Stage.ASKED
        self._asked += 1
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._handler_done(flight, done))

    def _handler_done(self, flight: Flight, task: asyncio.Task[Any]) -> None:
        self._asked -= 1
        self._tasks.discard(task)
        try:
            failed = None if task.cancelled() else task.exception()
            if flight.task is not task:
                if failed is not None:
                    log.debug("a handler that was no longer wanted failed", exc_info=failed)
            elif task.cancelled() or failed is not None:
                flight.task = None
                if not self.closing:
                    self._handler_failed(flight, failed or asyncio.CancelledError())
            else:
                flight.task = None
                if not self.closing:
                    self._answered(flight, task.result())
        except Exception as error:
            self._reader_failed(error)
        finally:
            self._ask_queued()

    def _ask_queued(self) -> None:
        """Let queued faults have the places that became free, in order."""
        while self._queue and self._asked < self._max_in_flight and not self.closing:
            flight = self._queue.popleft()
            if flight.stage is not Stage.QUEUED or flight.region is None:
                continue  # it ended while it waited
            assert self._loop is not None
            flight.stage = Stage.ASKED
            try:
                task, answer = eager.start(self._loop, flight.region.handler(flight.fault))
            except _CANCELLED_OR_FAILED as error:
                self._handler_failed(flight, error)
                continue
            if task is not None:
                self._await(flight, task)
            else:
                self._answered(flight, answer)

    def _answered(self, flight: Flight, answer: Answer) -> None:
        try:
            resolution = resolution_of(answer, flight.fault)
        except HandlerError as error:
            self._handler_failed(flight, error)
            return
        self._carry_out(flight, resolution)

    # --- carrying out ------------------------------------------------------------------

    def _carry_out(self, flight: Flight, resolution: Resolution) -> None:
        """Perform a resolution on the faulting page; then what else it covers."""
        fault = flight.fault
        page, size = fault.address, fault.length
        flight.resolution = resolution
        whole = span_of(resolution, fault)
        done = perform(self.fd, resolution, whole.start, page, size, size)
        if done == size:
            if type(resolution) is Wake:
                if self._is_stuck(flight):
                    return
            else:
                self._again.pop(page, None)
            if type(resolution) is Copy:
                self.counters.copied_bytes += size
            self._end(flight, outcome_of(resolution))
            if whole.length > size:
                self._rest(flight, resolution, whole)
        else:
            self._refused(flight, resolution, done)

    def _refused(self, flight: Flight, resolution: Resolution, done: int) -> None:
        """React to what the kernel said instead of doing it; see errors.ERRNO_MEANING."""
        page, size = flight.fault.address, flight.fault.length
        match -done:
            case errno.EAGAIN:
                self._park(flight)
            case errno.EEXIST:
                self.counters.already += 1
                self.wake(page, size)
                if not self._is_stuck(flight):
                    self._end(flight, "already")
            case errno.ENOENT:
                self.counters.gone += 1
                self.wake(page, size)
                if not self._is_stuck(flight):
                    self._end(flight, "gone")
            case errno.EFAULT if type(resolution) is Continue:
                # The page left the page cache meanwhile: let the thread fault anew.
                self.wake(page, size)
                if not self._is_stuck(flight):
                    self._end(flight, "wake")
            case errno.ESRCH:
                self.target_is_gone()
            case errno.ENOMEM if flight.tries < _NOMEM_TRIES:
                flight.tries += 1
                self._park(flight)
            case number:
                call = f"the answer {outcome_of(resolution)!r}"
                self._give_up(flight, refusal(call, number, page, size))

    def _is_stuck(self, flight: Flight) -> bool:
        """Count an answer that may leave the page faulting; give up after very many in a row.

        Threads that fault on one page together make some of these harmlessly; an exhausted
        pool of huge pages makes them for ever.
        """
        page = flight.fault.address
        if len(self._again) > 4096:
            self._again.clear()  # forgetting only delays the verdict
        count = self._again[page] = self._again.get(page, 0) + 1
        if count < _STUCK_AFTER or flight.final:
            return False
        del self._again[page]
        error = StuckPage(
            f"the page at {page:#x} was answered {count} times and faults on; on hugetlb memory"
            " the pool of huge pages is empty (see /proc/sys/vm/nr_hugepages)",
            page,
        )
        self._give_up(flight, error)
        return True

    def _rest(self, flight: Flight, resolution: Resolution, whole: Range) -> None:
        """Do the rest of a long answer, behind the page that was asked for."""
        page, size = flight.fault.address, flight.fault.length
        parts = [Range.between(whole.start, page), Range.between(page + size, whole.end)]
        if whole.length <= _INLINE_REST:
            for part in parts:
                self._speculate(resolution, whole, part, size)
            return
        assert self._loop is not None
        task = self._loop.create_task(self._speculate_slowly(resolution, whole, parts, size))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _speculate_slowly(
        self, resolution: Resolution, whole: Range, parts: list[Range], size: int
    ) -> None:
        for part in parts:
            for piece in part.pieces(max(PIECE_BYTES, size)):
                await asyncio.sleep(0)
                if self.target_gone or not self._speculate(resolution, whole, piece, size):
                    return

    def _speculate(self, resolution: Resolution, whole: Range, part: Range, size: int) -> bool:
        """Do a part that nobody waits for; what the kernel refuses is simply left out.

        Returns:
            Whether it is worth going on.
        """
        space = self.space

        def fill(start: int, length: int) -> int:
            return perform(self.fd, resolution, whole.start, start, length, size)

        for where, _ in space.placements.overlapping(part):
            for run in space.removed.gaps(where) if space.removed else (where,):
                walk = Walk(run, size)
                while walk:
                    done = walk.step(fill, self.wake)
                    if done < 0 and done not in (-errno.EEXIST, -errno.ENOENT):
                        return False
                if type(resolution) is Copy:
                    self.counters.filled_bytes += walk.done
        return True

    def _end(self, flight: Flight, outcome: str) -> None:
        """Take a fault out of the books."""
        flight.stage = Stage.ENDED
        self._parked.pop(flight, None)
        page = flight.fault.address
        if self.space.in_flight.get(page) is flight:
            del self.space.in_flight[page]
        self._ended(flight.fault, outcome, flight.started_ns)

    def _ended(self, fault: PageFault, outcome: str, started_ns: int) -> None:
        self.counters.ended += 1
        if self._served is not None:
            self._served.add(fault.address)
        if self._observers:
            elapsed_ns = time.perf_counter_ns() - started_ns
            for observer in self._observers:
                observer.end(fault, outcome, elapsed_ns)

    def _drop_flight(self, flight: Flight, outcome: str) -> None:
        """End a fault whose memory went away: its threads find out by themselves."""
        flight.cancel()
        self.counters.gone += 1
        self.wake(flight.fault.address, flight.fault.length)
        self._end(flight, outcome)

    def _removed_in_flight(self, flight: Flight) -> None:
        """The target removed a page whose fault is in flight: it reads zero now."""
        flight.cancel()
        if flight.fault.missing:
            self.counters.removed += 1
            self._carry_out(flight, Zero())
        else:
            self.wake(flight.fault.address, flight.fault.length)
            self._end(flight, "wake")

    # --- parking -----------------------------------------------------------------------

    def _park(self, flight: Flight) -> None:
        """Wait for the layout to settle; one timer for all, slower each time."""
        if flight.stage is not Stage.PARKED:
            flight.stage = Stage.PARKED
            self.counters.parked += 1
        self._parked[flight] = None
        self._set_timer("park", self._park_delay, self._retry_parked)

    def _retry_parked(self) -> None:
        """Read on, then try what is parked, each classified anew, until one must wait again."""
        self._on_readable()
        if self._over.is_set():
            return
        assert self._loop is not None
        before = len(self._parked)
        for flight in tuple(self._parked):
            if flight not in self._parked:
                continue
            if flight.stage is Stage.LOST:
                self._find_lost(flight)
                continue
            resolution = flight.resolution
            assert resolution is not None
            page = flight.fault.address
            if flight.fault.missing and not flight.final and page in self.space.removed:
                resolution = Zero()
            self._carry_out(flight, resolution)
            if flight.stage is Stage.PARKED:
                break  # the whole userfaultfd is held up: the others would fare no better
        if not self._parked:
            self._park_delay = _PARK_FIRST
        else:
            if len(self._parked) >= before:
                self._park_delay = min(self._park_delay * 2, _PARK_MAX)
            self._set_timer("park", self._park_delay, self._retry_parked)

    def _lost_fault(self, flags: int, address: int, thread_id: int) -> None:
        """A fault in no known range: an event not yet read may explain it, or growth."""
        page = address & -PAGE_SIZE
        if page in self.space.in_flight:
            self.counters.joined += 1
            return
        fault = PageFault(page, 0, PAGE_SIZE, flags, thread_id, address)
        started_ns = time.perf_counter_ns() if self._observers else 0
        for observer in self._observers:
            observer.begin(fault)
        flight = self._board(fault, None, started_ns)
        self._park(flight)
        flight.stage = Stage.LOST

    def _find_lost(self, flight: Flight) -> None:
        """See whether the events since have explained a lost fault."""
        assert self._loop is not None
        address = flight.fault.reported
        found = self.space.find(address)
        grown = self.space.growth(address)
        if grown is not None and grown.grows:
            self.space.grow(address)
            found = self.space.find(address)
        if found is not None:
            # It faults anew, under the right page size and handler.
            page = address & found[2].mask
            self.wake(page, found[2].page_size)
            self._end(flight, "wake")
        elif self._loop.time() - flight.started >= _LOST_PATIENCE:
            error = NoHandler(
                f"a fault at {address:#x}, which lies in no registered range", flight.fault.address
            )
            self._give_up(flight, error)

    # --- failing -----------------------------------------------------------------------

    def _handler_failed(self, flight: Flight, error: BaseException) -> None:
        """A handler raised or made no sense: retry, or give up."""
        page = flight.fault.address
        if not isinstance(error, FaultError):
            cause = error
            error = HandlerError(
                f"the handler of the fault at {page:#x} raised {type(cause).__name__}: {cause}",
                page,
            )
            error.__cause__ = cause
        if flight.recovering or not (self.failure.retries or self.failure.fallback):
            self._give_up(flight, error)
            return
        assert self._loop is not None
        flight.recovering = True
        task = self._loop.create_task(self._recover(flight, error), name="aiouffd retry")
        self._await(flight, task)

    async def _recover(self, flight: Flight, error: Exception) -> Resolution:
        """Ask again with backoff, then the fallback; the last error is raised."""
        fault, policy = flight.fault, self.failure
        assert flight.region is not None
        for attempt in range(policy.retries):
            await asyncio.sleep(policy.delay(attempt))
            self.counters.retries += 1
            try:
                return resolution_of(await flight.region.handler(fault), fault)
            except Exception as failed:
                log.debug("retry %d of the fault at %#x", attempt + 1, fault.address, exc_info=failed)
                error = failed
        if policy.fallback is None:
            raise error
        self.counters.fallbacks += 1
        return resolution_of(await policy.fallback(fault), fault)

    def _give_up(self, flight: Flight, error: Exception) -> None:
        """Nothing answered a fault: the policy's last action."""
        self.counters.failures += 1
        flight.cancel()
        for observer in self._observers:
            observer.failure(flight.fault, error)
        action = self.failure.then
        log.error("%s; then: %s", error, action.value, exc_info=error.__cause__)
        if action is Action.RAISE:
            self._fail(error)
        self._last_action(flight, action)

    def _last_action(self, flight: Flight, action: Action) -> None:
        """End a fault without its handler."""
        fault = flight.fault
        if flight.final:  # the last action itself was refused
            action = Action.KILL
        flight.final = True
        if action is Action.KILL or (fault.wp and action in (Action.POISON, Action.RAISE)):
            # A page that is there cannot be poisoned: a write that must not be is a kill.
            if self._kill():
                self._end(flight, "killed")
                return
            if flight.resolution is not None and type(flight.resolution) is Poison:
                action = Action.HANG  # neither poison nor kill is to be had
        if action is Action.HANG:
            flight.stage = Stage.HANGING
            self._parked.pop(flight, None)
            log.critical("the thread at %#x is left hanging", fault.address)
        elif fault.wp:
            self._carry_out(flight, Unprotect())
        elif action is Action.ZERO:
            self._carry_out(flight, Continue() if fault.minor else Zero())
        else:
            self._carry_out(flight, Poison())

    def _kill(self) -> bool:
        """Send SIGKILL to the target, if there is a pidfd of it."""
        if self._target is None or self._target.closed:
            return False
        try:
            signal.pidfd_send_signal(self._target.fileno(), signal.SIGKILL)
        except ProcessLookupError:
            self.target_is_gone()
        return True

    def target_is_gone(self) -> None:
        """Note that the target has exited or called exec, and stop serving."""
        if self.target_gone or self._loop is None:
            return
        self.target_gone = True
        self._stop_reading()
        self._queue.clear()
        self._parked.clear()
        for flight in tuple(self.space.in_flight.values()):
            flight.cancel()
            self._end(flight, "gone")
        self._over.set()
        if self._parent is not None and not self.closing:
            # Nobody awaits a child's pager but its parent: it ends by itself.
            self._parent.children.remove(self)
            self.closing = True
            self.uffd.close()

    def _check_alive(self) -> None:
        if self._over.is_set():
            return
        if self.uffd.target_alive():
            self._set_timer("alive", _ALIVE_EVERY, self._check_alive)
        else:
            self.target_is_gone()

    # --- watching ----------------------------------------------------------------------

    def _watch(self) -> None:
        """See that a timer looks at the oldest fault when it may be overdue."""
        limits = [limit for limit in (self._deadline, self._warn_after) if limit is not None]
        if limits:
            self._set_timer("watch", min(limits), self._look_for_overdue)

    def _look_for_overdue(self) -> None:
        assert self._loop is not None
        now = self._loop.time()
        next_look: float | None = None
        for flight in tuple(self.space.in_flight.values()):  # oldest first
            if flight.stage is Stage.HANGING or flight.final:
                continue
            age = now - flight.started
            if self._deadline is not None and age >= self._deadline:
                text = self._describe(flight, age)
                self._give_up(flight, DeadlineExceeded(text, flight.fault.address))
                continue
            if self._warn_after is not None and age >= self._warn_after and not flight.warned:
                flight.warned = True
                self.counters.overdue += 1
                log.warning("overdue: %s", self._describe(flight, age))
            limits = [self._deadline] if self._deadline is not None else []
            if not flight.warned and self._warn_after is not None:
                limits.append(self._warn_after)
            if limits:
                left = min(limits) - age
                next_look = left if next_look is None else min(next_look, left)
        if next_look is not None:
            self._set_timer("watch", max(next_look, 0.001), self._look_for_overdue)

    def _describe(self, flight: Flight, age: float) -> str:
        """Say of a fault in flight: range, offset, thread, age, and where its handler waits."""
        fault = flight.fault
        where = where_it_waits(flight.task) if flight.task is not None else "no handler at work"
        thread = f" of thread {fault.thread_id}" if fault.thread_id else ""
        return (
            f"the {fault.kind} fault{thread} at {fault.address:#x} (offset {fault.offset:#x} of"
            f" {flight.region!r}) is {flight.stage.value} since {age:.3f} s; waits at {where}"
        )


def outcome_at_close(action: Action) -> str:
    """Name how a fault ended that was in flight when its pager closed."""
    return {Action.ZERO: "zero", Action.KILL: "killed"}.get(action, "poison")
