"""Dispatcher: one fault, one handler, one resolution.

Knows: the way of a fault from its message to its end.
Must not know: how messages are read, resolutions carried out, or pagers opened and closed.

Laws of this file:

* One handler per page; a later fault on it joins.  Threads, signals and kernel-mode retries
  (which repeat their message in a loop until resolved) all send duplicates.
* What the books call present is still resolved: books can be stale.  Only a message that was
  read before its page's wake is dropped, for that wake was its own.
* A removed page reads zero, whatever its handler would say; so does, where that was asked for,
  memory of which nothing is known.
* A handler is started at once; one that suspends becomes a task that is awaited to its end.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from . import eager
from .address_space import AddressSpace, Placement
from .errors import HandlerError, NoHandler, ResolutionRefused, refusal
from .events import PageFault
from .failure import Action, FailurePolicy
from .fds import OwnedFd
from .flight import Flight, Stage
from .kernel import abi, buffers, calls
from .metrics import Counters, Observer
from .parking import Parking
from .performer import resolution_of
from .ranges import PAGE_SIZE
from .reader import Reader
from .recovery import Recovery
from .resolutions import Answer, Copy, Zero
from .resolver import Resolver
from .timers import Timers
from .uffd import Userfaultfd
from .watchdog import Watchdog

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .journal import Journal
    from .region import Region

log: Final = logging.getLogger("aiouffd")

_QUEUED_AT_ONCE: Final = 64  # queued faults whose handlers are asked in one turn of the loop
_LOST_PATIENCE: Final = 0.25  # seconds for an event to explain an unknown address

_NOWHERE: Final = (0, 0, None)
_new_tuple: Final = tuple.__new__


class Dispatcher:
    """Serves the faults of one userfaultfd; Pager is its public face.

    Attributes:
        over: Set when the target is gone, or the pager failed or was closed.
        gone: Set when the target is gone.
        error: Why the pager failed, if it did.
        closing: What becomes of faults while the pager closes; None as long as it serves.
        crashed: The reader failed: nothing is read any more.
        target_gone: The target has exited or called exec.
        journal: What outlives this process of the books, if anything does.
        tasks: Suspended handlers with their flights, and long fills: awaited when the pager
            closes.

    Sharing: the loop's thread.
    """

    def __init__(
        self,
        uffd: Userfaultfd,
        *,
        policy: FailurePolicy,
        deadline: float | None,
        warn_after: float | None,
        max_in_flight: int,
        observers: Sequence[Observer],
        target: OwnedFd | None,
        zero_elsewhere: bool,
        on_child: Callable[[OwnedFd], None],
        on_gone: Callable[[], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.uffd = uffd
        self.fd = uffd.fileno()
        self.space: AddressSpace[Region, Flight] = AddressSpace()
        self.counters = Counters()
        self.observers = tuple(observers)
        self.target = target
        self.zero_elsewhere = zero_elsewhere
        self.over = asyncio.Event()
        self.gone = asyncio.Event()
        self.error: BaseException | None = None
        self.closing: Action | None = None
        self.crashed = False
        self.target_gone = False
        self.tasks: dict[asyncio.Task[Any], Flight | None] = {}
        self.journal: Journal | None = None
        self.reader = Reader(self, on_child)
        self.parking = Parking(self)
        self.resolver = Resolver(self)
        self.recovery = Recovery(self, policy)
        self.watchdog = Watchdog(self, deadline, warn_after)
        self.max_in_flight = max_in_flight
        self._on_gone = on_gone
        self._on_failure = on_failure
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timers: Timers | None = None
        self._hot: tuple[int, int, Placement[Region] | None] = _NOWHERE
        self._served: set[int] | None = None  # pages ended within this batch of faults
        self._asked = 0  # flights whose handler is suspended
        self._queue: deque[Flight] = deque()

    # --- life --------------------------------------------------------------------------

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that it was started on.

        Raises:
            RuntimeError: It was not started.
        """
        if self._loop is None:
            raise RuntimeError("this pager was not started; use `async with pager:`")
        return self._loop

    @property
    def timers(self) -> Timers:
        """Its timers; see ``loop``."""
        if self._timers is None:
            raise RuntimeError("this pager was not started; use `async with pager:`")
        return self._timers

    @property
    def started(self) -> bool:
        """Whether it was started."""
        return self._loop is not None

    def start(self) -> None:
        """Begin to serve, on the running loop."""
        self.uffd.claim_reader()
        self._loop = asyncio.get_running_loop()
        self._timers = Timers(self._loop)
        self.reader.start()
        if self.target is not None:
            self._loop.add_reader(self.target.fileno(), self.target_is_gone)
        self.watchdog.start()

    def stop(self) -> None:
        """Leave the loop; before any descriptor is closed."""
        self.reader.stop()
        if self.target is not None and not self.target.closed:
            self.loop.remove_reader(self.target.fileno())
        self.timers.cancel_all()

    def fail(self, error: BaseException) -> None:
        """Tell the waiters of the pager that it failed; faults are served on until it closes."""
        if self.error is None:
            self.error = error
        self.over.set()
        self._on_failure(error)

    def crash(self, error: Exception) -> None:
        """An error where none may be: stop reading and fail."""
        log.critical("the reader of %r failed", self.uffd, exc_info=error)
        self.crashed = True
        self.reader.stop()  # not listening for the target's end: a close by KILL waits for it
        self.timers.cancel_all()
        self.parking.clear()  # or its timer comes again
        self.fail(error)

    def target_is_gone(self) -> None:
        """Note that the target has exited or called exec, and stop serving."""
        if self.target_gone:
            return
        self.target_gone = True
        self.stop()
        self.end_all("gone")
        self.gone.set()
        self.over.set()
        self._on_gone()

    def end_all(self, outcome: str) -> None:
        """Cancel and end every fault that is in flight."""
        self._queue.clear()
        self.parking.clear()
        for flight in tuple(self.space.in_flight.values()):
            flight.cancel()
            self.end(flight, outcome)

    def refused(self, call: str, done: int, start: int, length: int) -> ResolutionRefused:
        """Make the error for a signed result below zero, and note a target that is gone."""
        if done == -errno.ESRCH:
            self.target_is_gone()
        return refusal(call, -done, start, length)

    def wake(self, start: int, length: int) -> None:
        """Let threads that wait in a range try again."""
        calls.wake(self.fd, start, length)

    def poison(self, start: int, length: int) -> int:
        """Poison missing pages.

        Returns:
            Bytes done if above zero, else minus the errno.
        """
        return calls.poison(self.fd, start, length)

    def layout_changed(self) -> None:
        """An event came, or a region: forget where the last fault was served."""
        self._hot = _NOWHERE

    # --- taking up ---------------------------------------------------------------------

    def serve(self, faults: Iterable[tuple[int, int, int]]) -> None:
        """Take up the faults of one batch, whose events have been applied."""
        self._served = set()
        try:
            for flags, address, thread_id in faults:
                if self.target_gone:
                    return  # and a child's descriptor is closed: its number may be another's
                self.fault(flags, address, thread_id)
        finally:
            self._served = None

    def fault(self, flags: int, address: int, thread_id: int) -> None:
        """Take up one fault: join, answer zero, queue, or ask its handler."""
        counters = self.counters
        counters.faults += 1
        space = self.space
        start, end, placement = self._hot
        if placement is None or not start <= address < end:
            found = space.find(address)
            if found is None:
                self._lost(flags, address, thread_id)
                return
            self._hot = found
            placement = found[2]
        page = address & placement.mask
        if page in space.in_flight or (self._served is not None and page in self._served):
            # In flight: its end wakes all who wait.  Served in this batch: this message was
            # read before that wake, so its thread is awake already.
            counters.joined += 1
            return
        fault = _new_tuple(  # half the time of PageFault(...)
            PageFault,
            (page, page + placement.delta, placement.page_size, flags, thread_id, address),
        )
        region = placement.region
        started_ns = self._begin(fault) if self.observers else 0
        zero: bool | None = False
        if space.removed and page in space.removed:
            zero = self._reads_zero(fault)
        if zero is None:
            self.parking.add(self._board(fault, region, started_ns))
        elif zero:
            counters.removed += 1
            self.resolver.carry_out(self._board(fault, region, started_ns), Zero())
        elif self.closing is not None:
            self.recovery.last_action(self._board(fault, region, started_ns), self.closing)
        elif self._asked >= self.max_in_flight:
            counters.queued += 1
            flight = self._board(fault, region, started_ns)
            flight.stage = Stage.QUEUED
            self._queue.append(flight)
        else:
            self._ask(fault, region, started_ns)

    def _reads_zero(self, fault: PageFault) -> bool | None:
        """Say whether a fault on a removed page is to be answered with zeros.

        Returns:
            None if that cannot be told while the layout is changing.
        """
        found = self.space.find(fault.address)
        if not fault.missing or found is None:
            return False
        placement = found[2]
        if not placement.vacated:
            return True
        # MREMAP_DONTUNMAP: anonymous memory is empty where it was moved from, but shared memory
        # shows the same pages in both places, and a zero here would become the other's.
        done = calls.continue_(self.fd, fault.address, fault.length)
        if done == -errno.EAGAIN:
            return None
        if done == -errno.EINVAL:
            return True  # anonymous: it has no page cache to continue from
        region = placement.region
        hint = region.start - region.offset
        places = self.space.addresses(region, fault.offset, fault.length, hint)
        return any(place.start in self.space.removed for place in places)

    def _begin(self, fault: PageFault) -> int:
        started_ns = time.perf_counter_ns()
        for observer in self.observers:
            observer.begin(fault)
        return started_ns

    def _board(self, fault: PageFault, region: Region | None, started_ns: int) -> Flight:
        """Enter a fault in the books as in flight."""
        flight = Flight(fault, region, self.loop.time(), started_ns)
        self.space.in_flight[fault.address] = flight
        self.watchdog.watch()
        return flight

    def _ask(self, fault: PageFault, region: Region, started_ns: int) -> None:
        """Ask a handler; carry its answer out at once if it has one."""
        if self.resolver.long and (known := self.resolver.at_hand(fault, region)) is not None:
            self.resolver.carry_out(self._board(fault, region, started_ns), known)
            return
        try:
            task, answer = eager.start(
                self._loop,  # type: ignore[arg-type]  # started, or no fault would come here
                region.handler(fault),
                receive=self._handler_answered,
            )
        except (Exception, asyncio.CancelledError) as error:
            self.recovery.handler_failed(self._board(fault, region, started_ns), error)
            return
        if task is not None:
            self.await_handler(self._board(fault, region, started_ns), task)
            return
        if self._copy_page(fault, region, answer):  # the shortest way: no flight, no match
            self._ended(fault, "copy", started_ns)
        else:
            self._carry_out(self._board(fault, region, started_ns), answer)

    def _copy_page(self, fault: PageFault, region: Region | None, answer: Answer) -> bool:
        """Carry out the commonest of answers: one page, as bytes.

        Returns:
            Whether it was that, and the kernel took it.
        """
        data: Buffer | None = None
        mode = 0
        if type(answer) is Copy and answer.address is None:
            data = answer.data
            mode = abi.UFFDIO_COPY_MODE_WP if answer.protect else 0
        elif type(answer) is bytes:
            data = answer
        page, size = fault.address, fault.length
        if (
            type(data) is bytes
            and len(data) == size
            and calls.copy(self.fd, page, buffers.bytes_address(data), size, mode) == size
        ):
            self.counters.copied_bytes += size
            if region is not None and region.filled is not None:
                region.filled.add(fault.offset)
            if self.resolver.again:
                self.resolver.again.pop(page, None)
            return True
        return False

    # --- handlers that wait ------------------------------------------------------------

    def await_handler(self, flight: Flight, task: asyncio.Task[Any]) -> None:
        """Own a suspended handler until it ends."""
        flight.task = task
        flight.stage = Stage.ASKED
        self._asked += 1
        self.tasks[task] = flight
        task.add_done_callback(partial(self._handler_done, flight))

    def _handler_answered(self, task: asyncio.Task[Answer], answer: Answer) -> None:
        """Serve the fault within the handler's last step: its end as a task is a turn later."""
        flight = self.tasks.get(task)
        if flight is None or flight.task is not task or self.closing is not None:
            return  # nobody waits for the answer any more
        flight.task = None
        try:
            self._answered(flight, answer)
        except Exception as error:
            self.crash(error)
        else:
            self.reader.read_on()

    def _handler_done(self, flight: Flight, task: asyncio.Task[Any]) -> None:
        self._asked -= 1
        self.tasks.pop(task, None)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        try:
            if flight.task is not task:
                if error is not None and not task.cancelled():
                    log.debug("a handler that nobody waited for any more failed", exc_info=error)
                return
            flight.task = None
            if self.closing is not None:
                return
            if error is not None:
                self.recovery.handler_failed(flight, error)
            else:
                self._answered(flight, task.result())
        except Exception as failure:
            self.crash(failure)
        finally:
            self._ask_queued()

    def _ask_queued(self) -> None:
        """Let queued faults have the places that became free; never raises."""
        try:
            self._ask_some_queued()
        except Exception as error:
            self.crash(error)

    def _ask_some_queued(self) -> None:
        """Ask in order, but no more than a batch at once: other work of the loop must run too."""
        for _ in range(_QUEUED_AT_ONCE):
            if not self._queue or self._asked >= self.max_in_flight or self.closing is not None:
                return
            flight = self._queue.popleft()
            if flight.stage is not Stage.QUEUED or flight.region is None:
                continue  # it ended while it waited
            flight.stage = Stage.ASKED
            try:
                task, answer = eager.start(
                    self.loop,
                    flight.region.handler(flight.fault),
                    receive=self._handler_answered,
                )
            except (Exception, asyncio.CancelledError) as error:
                self.recovery.handler_failed(flight, error)
                continue
            if task is not None:
                self.await_handler(flight, task)
            else:
                self._answered(flight, answer)
        self.loop.call_soon(self._ask_queued)

    def _answered(self, flight: Flight, answer: Answer) -> None:
        if self._copy_page(flight.fault, flight.region, answer):
            self.end(flight, "copy")
        else:
            self._carry_out(flight, answer)

    def _carry_out(self, flight: Flight, answer: Answer) -> None:
        try:
            resolution = resolution_of(answer, flight.fault)
        except HandlerError as error:
            self.recovery.handler_failed(flight, error)
            return
        self.resolver.carry_out(flight, resolution)

    # --- ending ------------------------------------------------------------------------

    def end(self, flight: Flight, outcome: str) -> None:
        """Take a fault out of the books; a second call does nothing."""
        if flight.stage is Stage.ENDED:
            return  # the target was found to be gone in the middle of this fault's end
        flight.stage = Stage.ENDED
        self.parking.discard(flight)
        page = flight.fault.address
        if self.space.in_flight.get(page) is flight:
            del self.space.in_flight[page]
        self._ended(flight.fault, outcome, flight.started_ns)

    def _ended(self, fault: PageFault, outcome: str, started_ns: int) -> None:
        self.counters.ended += 1
        if self._served is not None:
            self._served.add(fault.address)
        if self.observers:
            elapsed_ns = time.perf_counter_ns() - started_ns
            for observer in self.observers:
                observer.end(fault, outcome, elapsed_ns)

    def drop(self, flight: Flight) -> None:
        """End a fault whose memory went away: its threads find out by themselves."""
        flight.cancel()
        self.counters.gone += 1
        self.wake(flight.fault.address, flight.fault.length)
        self.end(flight, "gone")

    def removed_in_flight(self, flight: Flight) -> None:
        """The target removed a page whose fault is in flight: it reads zero now."""
        if flight.stage is Stage.ENDED:
            return  # with the target, which the fault before it in the range has shown to be gone
        flight.cancel()
        if flight.fault.missing:
            self.counters.removed += 1
            self.resolver.carry_out(flight, Zero())
        else:
            self.wake(flight.fault.address, flight.fault.length)
            self.end(flight, "wake")

    # --- parked and lost faults --------------------------------------------------------

    def retry_parked(self, flight: Flight, tries: int = 1) -> bool:
        """Try a parked fault again, classified anew.

        Args:
            flight: Parked.
            tries: How often in a row, as long as the kernel says EAGAIN.

        Returns:
            Whether it is worth trying others: an EAGAIN holds up the whole userfaultfd.
        """
        if flight.stage is Stage.LOST:
            self._find_lost(flight)
            return True
        fault, resolution = flight.fault, flight.resolution
        if not flight.final and fault.address in self.space.removed:
            zero = self._reads_zero(fault)
            if zero is None:
                self.parking.add(flight)
                return False
            if zero:
                resolution = Zero()
        if resolution is None:  # not zero, as it turns out: its handler is asked anew
            self.wake(fault.address, fault.length)
            self.end(flight, "wake")
            return True
        self.resolver.carry_out(flight, resolution, tries)
        return flight.stage is not Stage.PARKED

    def _lost(self, flags: int, address: int, thread_id: int) -> None:
        """A fault in no known range: an event not yet read may explain it, or growth."""
        page = address & -PAGE_SIZE
        if page in self.space.in_flight:
            self.counters.joined += 1
            return
        fault = PageFault(page, 0, PAGE_SIZE, flags, thread_id, address)
        started_ns = self._begin(fault) if self.observers else 0
        flight = self._board(fault, None, started_ns)
        if self.zero_elsewhere and fault.missing:
            # If an event that is not read yet explains the address, the kernel answers EAGAIN
            # until it is read; applied, it ends this fault, which comes again.
            self.resolver.carry_out(flight, Zero())
        else:
            self.parking.add(flight, Stage.LOST)

    def _find_lost(self, flight: Flight) -> None:
        """See whether the events since have explained a lost fault."""
        address = flight.fault.reported
        space = self.space
        found = space.find(address)
        grown = space.growth(address)
        if grown is not None and grown.grows:
            if self.journal is not None:
                self.journal.grew(address)
            space.grow(address)
            self.reader.settle()
            found = space.find(address)
        if found is not None:
            # It faults anew, under the right page size and handler.
            self.wake(address & found[2].mask, found[2].page_size)
            self.end(flight, "wake")
        elif self.loop.time() - flight.started >= _LOST_PATIENCE:
            error = NoHandler(
                f"a fault at {address:#x}, which lies in no registered range", flight.fault.address
            )
            self.recovery.give_up(flight, error)
