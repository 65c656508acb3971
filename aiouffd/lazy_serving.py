"""The loop's side of lazy memory: take flights from the queue, ask, fill and finish.

Knows: kinds of handlers, tasks, how to bring whole ranges.
Must not know: signals, threads that wait, who holds views.

Laws of this file:

* The loop never touches the memory it serves.
* Every task is in ``tasks`` until it is done; whoever closes cancels and awaits them.
* A flight that was started is finished whatever becomes of the handler, cancellation too.
* A long answer is done piece by piece, and the loop has its turn after each.  Who waits for the
  faulting page goes on as soon as that is there; a page that is still coming is not asked for.
* Handlers start eagerly: an answer without a wait costs no task and no turn of the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, runtime_checkable

from . import eager
from .errors import ClosedError, StuckPage
from .events import WP, WRITE, PageFault
from .lazy_answers import Pieces
from .lazy_faults import Faults
from .lazy_flights import Flight
from .lazy_mapping import LazyMapping, as_bytes
from .ranges import align_down, align_up
from .resolutions import Answer, Handler, Unprotect

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PIECE: Final = 256 * 1024  # bytes that are read from a source at once
_AT_ONCE: Final = 64  # handlers that one ``bring`` has running
_PASSES: Final = 5


@runtime_checkable
class PageSource(Protocol):
    """Where bytes come from; every source of aiouffd.sources is one."""

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """Give bytes that need no waiting, or None.  Called in whatever thread faults."""

    async def read(self, offset: int, length: int) -> Buffer:
        """Give bytes, exactly ``length`` of them."""


#: What fills the pages: a coroutine function; a plain function, which answers at once in the
#: faulting thread (or returns an awaitable for the loop); or a source.
LazyHandler: TypeAlias = Handler | Callable[[PageFault], Answer] | PageSource


@dataclass(frozen=True, slots=True)
class Asking:
    """How to ask a handler, whatever kind it is of.

    Attributes:
        inline: What to call in the faulting thread; None if there is no such thing.
        later: What to await on the loop.
        source: The handler, if it is a source: its None means "not without waiting".
    """

    inline: Callable[[PageFault], Any] | None
    later: Callable[[PageFault], Awaitable[Answer]]
    source: PageSource | None = None


def ask(handler: LazyHandler, size: int) -> Asking:
    """Find out what kind of handler it is.

    Args:
        handler: See LazyHandler.
        size: Of the memory, in bytes: a source is not asked for what lies behind it.

    Raises:
        TypeError: It is none.
    """
    if isinstance(handler, PageSource):
        source: PageSource = handler

        def read_nowait(fault: PageFault) -> Answer:
            if fault.flags & WP:
                return Unprotect()
            return source.read_nowait(fault.offset, min(fault.length, size - fault.offset))

        async def read(fault: PageFault) -> Answer:
            return await source.read(fault.offset, min(fault.length, size - fault.offset))

        return Asking(read_nowait, read, source)
    if not callable(handler):
        raise TypeError(f"a handler is a function or a source, not {handler!r}")
    function: Callable[[PageFault], Any] = handler
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object with async __call__
    ):
        return Asking(None, function)

    async def call(fault: PageFault) -> Answer:
        answer: Any = function(fault)
        if hasattr(answer, "__await__"):
            answer = await answer
        result: Answer = answer
        return result

    return Asking(function, call)


class Serving:
    """One LazyMemory being served by a loop.

    Sharing: the loop's thread, where not said otherwise.
    """

    def __init__(
        self,
        mapping: LazyMapping,
        asking: Asking,
        loop: asyncio.AbstractEventLoop,
        *,
        deadline: float,
        name: str,
    ) -> None:
        """Prepare; ``attach`` starts it.

        Args:
            mapping: The memory.
            asking: What brings a page.
            loop: Who serves.
            deadline: How long an access waits, in seconds.
            name: For messages and tasks.
        """
        self.mapping: Final = mapping
        self.loop: Final = loop
        self.tasks: Final[set[asyncio.Task[None]]] = set()
        self._asking: Final = asking
        self._coming: Final[dict[asyncio.Future[None], Pieces]] = {}  # by what is set at the end
        self._name: Final = name
        self.faults: Final = Faults(
            mapping,
            loop,
            deadline=deadline,
            inline=asking.inline,
            inline_may_pass=asking.source is not None,
            wake_fd=mapping.wake.fileno(),
            name=name,
        )

    async def attach(self) -> None:
        """Begin to serve."""
        self.faults.loop_thread = threading.get_ident()
        self.loop.add_reader(self.mapping.wake.fileno(), self._on_wake)

    def close(self) -> None:
        """Fail whoever waits or touches a hole from now on, and cancel the handlers.

        The loop is ours or closed.
        """
        faults = self.faults
        faults.closed = True
        if not self.loop.is_closed():
            self.loop.remove_reader(self.mapping.wake.fileno())
            for task in self.tasks:
                task.cancel()
        closed = faults.answers.blame(ClosedError(f"{self._name} was closed"), faults.start)
        for flight in list(faults.flights.values()):
            faults.finish(flight, closed)

    def _on_wake(self) -> None:
        try:
            os.eventfd_read(self.mapping.wake.fileno())
        except BlockingIOError:
            pass  # read by an earlier turn
        self.serve_queue()

    def serve_queue(self) -> None:
        """Start a handler for each flight in the queue; not to be called from a task."""
        queue = self.faults.queue
        while queue:
            flight = queue.popleft()
            if flight.done or flight.fault is None:
                continue
            task, _ = eager.start(self.loop, self._serve(flight, flight.fault), self._name)
            if task is not None:
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)

    async def _serve(self, flight: Flight, fault: PageFault) -> None:
        faults = self.faults
        try:
            promise = flight.promise
            if not self._coming or promise is not None or not await self._came(fault):
                answer = await (self._asking.later(fault) if promise is None else promise)
                self._check_open()
                pieces = faults.answers.begin(fault, answer)
                if pieces is not None:
                    await self._walk(pieces, flight)
        except Exception as error:
            faults.finish(flight, faults.answers.blame(error, flight.start))
        except BaseException as error:
            # Cancelled: this memory or the loop is being closed.
            cause = ClosedError(f"{self._name}: the handler was cancelled")
            cause.__cause__ = error
            faults.finish(flight, faults.answers.blame(cause, flight.start))
            raise
        else:
            faults.finish(flight)

    async def _walk(self, pieces: Pieces, flight: Flight | None = None) -> None:
        """Do a long answer, and end its flight once the faulting page is there.

        What fails after that is left missing: the next touch asks, and fails, for itself.
        """
        ended = self.loop.create_future()
        self._coming[ended] = pieces
        try:
            for settled in pieces:
                if settled and flight is not None:
                    self.faults.finish(flight)
                await asyncio.sleep(0)
                self._check_open()
        finally:
            del self._coming[ended]
            with contextlib.suppress(RuntimeError):  # the loop is closed
                ended.set_result(None)

    async def _came(self, fault: PageFault) -> bool:
        """Wait while a page is covered by a long answer, and say whether it was brought."""
        at = fault.address
        ends = [end for end, pieces in self._coming.items() if pieces.start <= at < pieces.end]
        if not ends or fault.flags & WP:
            return False
        await asyncio.wait(ends)
        return self._is_there(at, at + fault.length)

    def _is_there(self, start: int, end: int) -> bool:
        self._check_open()
        return next(self.mapping.pages.holes(start, end), None) is None

    def _check_open(self) -> None:
        # After an await: the descriptors may be closed, and their numbers somebody else's.
        if self.faults.closed:
            raise ClosedError(f"{self._name} was closed")

    # --- whole ranges -------------------------------------------------------------------

    async def bring(self, start: int, end: int, *, write: bool) -> None:
        """Fill the holes of a range without a fault.

        Args:
            start: First address.
            end: One past the last.
            write: Also let write-protected pages be written to.

        Raises:
            FaultError: A page could not be had.
        """
        start, end = align_down(start), align_up(end)
        for _ in range(_PASSES):
            self._check_open()
            clean = True
            for hole in self.mapping.pages.holes(start, end):
                clean = False
                if self._asking.source is not None:
                    await self._bring_from_source(self._asking.source, *hole)
                else:
                    await self._bring_from_handler(*hole, 0)
                self._check_open()
            if write and self.mapping.write_protect:
                for run in list(self.mapping.pages.protected(start, end)):
                    clean = False
                    if self._asking.source is not None:
                        self.mapping.unprotect(run[0], run[1] - run[0])
                    else:
                        await self._bring_from_handler(*run, WRITE | WP)
            # A shared page that was pushed out to swap looks like a hole and needs no filling.
            if clean or (self.mapping.shared and not write):
                return
        raise StuckPage(f"{self._name}: pages vanish as fast as they are brought", start)

    def _blocks(self, start: int, end: int) -> range:
        base, size = self.faults.start, self.mapping.page_size
        return range(base + align_down(start - base, size), end, size)

    def _take_off(self, block: int, flags: int) -> tuple[Flight, bool]:
        faults = self.faults
        faults.answers.refuse_poisoned(block)
        flight = Flight(block, threading.get_ident())
        flight.fault = PageFault(
            block, block - faults.start, self.mapping.page_size, flags, 0, block
        )
        flight.posted = True
        current = faults.flights.setdefault(block, flight)
        return current, current is flight

    async def _bring_from_handler(self, start: int, end: int, flags: int) -> None:
        blocks = self._blocks(start, end)
        for at in range(0, len(blocks), _AT_ONCE):
            some = blocks[at : at + _AT_ONCE]
            if not flags and self._is_there(some[0], some[-1] + self.mapping.page_size):
                continue  # a longer answer to an earlier one has brought them
            flights = []
            for block in some:
                flight, mine = self._take_off(block, flags)
                flights.append(flight)
                if mine:
                    self.faults.queue.append(flight)
            # Not from within this task: handlers start eagerly, as tasks of their own.
            self.loop.call_soon(self.serve_queue)
            await self._landed(flights)

    async def _bring_from_source(self, source: PageSource, start: int, end: int) -> None:
        blocks = self._blocks(start, end)
        at_once = max(1, _PIECE // self.mapping.page_size)
        for at in range(0, len(blocks), at_once):
            mine: list[Flight] = []
            others: list[Flight] = []
            try:
                for block in blocks[at : at + at_once]:
                    flight, is_mine = self._take_off(block, 0)
                    (mine if is_mine else others).append(flight)
                for run in _runs(mine, self.mapping.page_size):
                    await self._read_run(source, run)
            finally:
                for flight in mine:  # not brought: whoever joined tries by himself
                    self.faults.finish(flight)
            await self._landed(others)
            await asyncio.sleep(0)
            self._check_open()

    async def _read_run(self, source: PageSource, run: list[Flight]) -> None:
        faults, first = self.faults, run[0].start
        offset = first - faults.start
        length = min(len(run) * self.mapping.page_size, self.mapping.length - offset)
        failure: Callable[[], BaseException] | None = None
        try:
            data = source.read_nowait(offset, length)
            if data is None:
                data = await source.read(offset, length)
            self._check_open()
            content = as_bytes(data)
            if len(content) != length:
                raise ValueError(f"{len(content)} bytes came of {length} at {offset}")
            fault = PageFault(first, offset, self.mapping.page_size)
            pieces = faults.answers.begin(fault, content)
            if pieces is not None:
                await self._walk(pieces)
        except Exception as error:
            failure = faults.answers.blame(error, first)
        for flight in run:
            faults.finish(flight, failure)
        if failure is not None:
            raise failure()

    async def _landed(self, flights: list[Flight]) -> None:
        """Wait for flights, then raise for the first that failed."""
        for flight in flights:
            if not flight.done:
                waiter = _Waiter(self.loop)
                flight.waiters.append(waiter)
                if not flight.done:
                    await waiter.future
        for flight in flights:
            if flight.failure is not None:
                raise flight.failure()


class _Waiter:
    """A flight's waiter that is a future."""

    __slots__ = ("_loop", "future")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.future: asyncio.Future[None] = loop.create_future()

    def release(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the future with it
            self._loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


def _runs(flights: list[Flight], page_size: int) -> list[list[Flight]]:
    """Cut flights in order of address into runs of neighbours."""
    runs: list[list[Flight]] = []
    for flight in flights:
        if runs and runs[-1][-1].start + page_size == flight.start:
            runs[-1].append(flight)
        else:
            runs.append([flight])
    return runs
