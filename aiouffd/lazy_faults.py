"""The faulting thread's side of lazy memory: answer inline, or hand over to the loop and wait.

Knows: pages in flight, who waits for them, placeholders; when waiting must not be done.
Must not know: how the loop runs coroutines; it takes flights from a queue and finishes them.

Laws of this file:

* Once per page: the first thread to fault on a page owns its *flight*, later ones join it.
* No lock is held anywhere.  A Python signal handler may run between any two lines and fault
  itself; dict.setdefault, append and pop are the only shared steps.
* A flight is finished exactly once and then releases each of its waiters once, whatever
  happened.  Waiters look at ``done`` after queueing up, so none is overlooked.
* Every wait has a deadline, and looks now and then whether the loop still lives.
* ``fault`` and what it calls are two or three frames deep: see sigbus.

After a flight a waiter touches its page again.  If that was evicted meanwhile, it faults again.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Final

from .errors import (
    ClosedError,
    DeadlineExceeded,
    FaultError,
    HandlerError,
    LoopThreadTouch,
    SourceError,
    StuckPage,
)
from .events import WP, WRITE, PageFault
from .kernel import abi, calls
from .lazy_answers import Answers, Counters
from .lazy_flights import Flight, Placeholder, release_all
from .lazy_mapping import BYTES_HEADER, LazyMapping
from .ranges import PAGE_SIZE

_PAGE_MASK: Final = -PAGE_SIZE
_PROTECTED: Final = abi.PM_PRESENT | abi.PM_UFFD_WP
_SLICE: Final = 0.25  # seconds between looks whether the loop still lives
_LOOP_SLICE: Final = 0.005  # the same while the loop's own thread waits for another's inline answer
_SPINS: Final = 20_000  # faults in a row on a page that is there: a tenth of a second or so

# Bound once: this is the hot path.
_copy = calls.copy
_new_tuple = tuple.__new__  # half the time of PageFault(...)
_new_lock = threading.Lock
_eventfd_write = os.eventfd_write
_get_ident = threading.get_ident
_get_native_id = threading.get_native_id


class Faults:
    """The sigbus.Target of one LazyMemory.

    Sharing: any thread.
    """

    def __init__(
        self,
        mapping: LazyMapping,
        loop: asyncio.AbstractEventLoop,
        *,
        deadline: float,
        inline: Callable[[PageFault], Any] | None,
        inline_may_pass: bool,
        wake_fd: int,
        name: str,
    ) -> None:
        """Prepare to answer for a mapping.

        Args:
            mapping: The memory.
            loop: Who serves what cannot be answered inline.
            deadline: How long an access waits, in seconds.
            inline: What to ask in the faulting thread first.
            inline_may_pass: Its None means "not without waiting", not Wake.
            wake_fd: An eventfd that the loop reads.
            name: For messages.
        """
        self.mapping: Final = mapping
        self.start: Final = mapping.start
        self.end: Final = mapping.end
        self.loop: Final = loop
        self.loop_thread = 0
        self.deadline: Final = deadline
        self.inline = inline
        self.inline_may_pass: Final = inline_may_pass
        self.wake_fd = wake_fd
        self.name: Final = name
        self.closed = False
        self.is_copy = False  # this is a forked child, and the loop is the parent's
        self.flights: dict[int, Flight] = {}
        self.queue: deque[Flight] = deque()
        self.counters: Final = Counters()
        self.answers: Final = Answers(
            mapping, self.counters, SourceError if inline_may_pass else HandlerError, name
        )
        self._placeholders: dict[int, Placeholder] = {}
        self._spins: dict[int, tuple[int, int]] = {}
        self._block_mask: Final = -mapping.page_size
        self._block_shift: Final = mapping.page_size.bit_length() - 1
        self._mode: Final = mapping.fill_mode
        self._page_size: Final = mapping.page_size
        self._wp: Final = mapping.write_protect

    # --- the faulting thread ------------------------------------------------------------

    def fault(self, address: int, write: bool | None) -> BaseException | None:
        """See sigbus.Target."""
        mapping = self.mapping
        page = address & _PAGE_MASK
        thread = _get_ident()
        base = self.start
        offset = address - base & self._block_mask
        start = base + offset
        flights = self.flights
        flight = Flight(start, thread)
        try:
            current = flights.setdefault(start, flight)
            if current is flight:
                if self.closed:
                    raise ClosedError(f"{self.name} is closed")
                flags = WRITE if write else 0
                # Looked at only now: before, another thread's flight may just have ended.
                if mapping.maybe_filled[offset >> self._block_shift]:
                    entry = mapping.pages.entry(page)
                    if entry & _PROTECTED == _PROTECTED and write is not False:
                        flags = WRITE | WP
                    elif not mapping.pages.is_missing(entry):
                        self.finish(flight)
                        if self._is_spinning(thread, page):
                            raise StuckPage(
                                f"{self.name}: touching {address:#x} never ends", address
                            )
                        return self._wait_for_placeholder(page, thread)
                if start in self.answers.poisoned:
                    self.answers.refuse_poisoned(start)
                counters = self.counters
                counters.faults += 1
                size = self._page_size
                flight.fault = asked = _new_tuple(
                    PageFault, (start, offset, size, flags, _get_native_id(), address)
                )
                if self.inline is not None:
                    try:
                        answer = self.inline(asked)
                    except Exception as caught:
                        blamed = self.answers.blame(caught, start)()
                        raise blamed from blamed.__cause__
                    done = True
                    if type(answer) is bytes and len(answer) == size and flags <= WRITE:
                        # The usual answer, short and flat: see sigbus on frames.
                        mapping.maybe_filled[offset >> self._block_shift] = 1
                        if (
                            _copy(mapping.fd, start, id(answer) + BYTES_HEADER, size, self._mode)
                            != size
                        ):
                            mapping.fill(start, answer)  # which also says what is wrong
                        counters.filled_bytes += size
                        counters.inline += 1
                        del flights[start]
                        flight.done = True
                        if flight.waiters:
                            release_all(flight.waiters)
                        return None
                    if hasattr(answer, "__await__"):
                        flight.promise = answer
                        done = False
                    elif answer is None and self.inline_may_pass:
                        done = False
                    else:
                        self.answers.perform(asked, answer)
                    if done:
                        counters.inline += 1
                        self.finish(flight)
                        return None
                if thread == self.loop_thread:
                    raise self._would_wait_for_itself(address)
                self.queue.append(flight)
                flight.posted = True
                _eventfd_write(self.wake_fd, 1)
            else:
                self.counters.joined += 1
                if current.owner == thread and not current.posted:
                    raise HandlerError(
                        f"{self.name}: the handler touches the page it is to fill", address
                    )
            error = self._wait(current, thread)
            if error is None:
                return self._wait_for_placeholder(page, thread)
        except FaultError as caught:
            error = caught
        except Exception as caught:
            error = (
                caught if isinstance(caught, ClosedError) else self.answers.blame(caught, start)()
            )
        except BaseException:  # Ctrl-C while waiting, or in an inline handler
            if flight.posted:
                _eventfd_write(self.wake_fd, 1)  # again, if it had not come to that yet
            elif flights.get(start) is flight:
                self._abandon(flight)
            raise
        if flights.get(start) is flight and not flight.posted:
            self._abandon(flight, error)
        self.counters.failures += 1
        return error

    def _wait(self, flight: Flight, thread: int) -> BaseException | None:
        waiter = _new_lock()
        waiter.acquire()
        flight.waiters.append(waiter)
        limit = time.monotonic() + self.deadline
        pause = _LOOP_SLICE if thread == self.loop_thread else _SLICE
        while not flight.done:
            if thread == self.loop_thread and flight.posted:
                return self._would_wait_for_itself(flight.start)
            if flight.posted and self.loop.is_closed():
                return ClosedError(f"{self.name}: its event loop is closed")
            left = limit - time.monotonic()
            if left <= 0:
                return DeadlineExceeded(
                    f"{self.name}: no page at {flight.start:#x} within {self.deadline:g} seconds",
                    flight.start,
                )
            if waiter.acquire(True, min(left, pause)):
                break
        return flight.failure() if flight.failure is not None else None

    def _wait_for_placeholder(self, page: int, thread: int) -> BaseException | None:
        # The page is there, but it may be another thread's page of zeros, on which a failed
        # access completes: wait until that is gone, then touch again.
        placeholder = self._placeholders.get(page)
        if placeholder is None or placeholder.owner == thread:
            return None
        waiter = _new_lock()
        waiter.acquire()
        placeholder.waiters.append(waiter)
        if self._placeholders.get(page) is placeholder:
            waiter.acquire(True, _SLICE)  # then fault, and look, again
        return None

    def _is_spinning(self, thread: int, page: int) -> bool:
        last, count = self._spins.get(thread, (0, 0))
        if last != page:
            if len(self._spins) > 1000:  # threads that have ended
                self._spins.clear()
            count = 0
        self._spins[thread] = page, count + 1
        return count >= _SPINS

    def _would_wait_for_itself(self, address: int) -> LoopThreadTouch:
        return LoopThreadTouch(
            f"{self.name}: the loop's own thread touched {address:#x}, which only the loop can"
            " bring; `await memory.ensure(offset, length)` first",
            address,
        )

    def _abandon(self, flight: Flight, error: BaseException | None = None) -> None:
        # Those who joined try again by themselves (and one of them owns the next flight), or,
        # after a failure of the handler, fail alike.
        if flight.promise is not None and isinstance(flight.promise, Coroutine):
            flight.promise.close()  # nobody will await it
        if error is None or isinstance(error, LoopThreadTouch):
            self.finish(flight)
        else:
            self.finish(flight, self.answers.blame(error, flight.start))

    # --- placeholders -------------------------------------------------------------------

    def let_through(self, address: int) -> None:
        """See sigbus.Target."""
        page = address & _PAGE_MASK
        entry = self.mapping.pages.entry(page)
        if self._wp and entry & abi.PM_PRESENT and entry & abi.PM_UFFD_WP:
            self._placeholders[page] = Placeholder(_get_ident(), protect=True)
            self.mapping.unprotect(page, PAGE_SIZE)
        elif not entry & abi.PM_PRESENT:
            mine = Placeholder(_get_ident(), protect=False)
            planted = self._placeholders.setdefault(page, mine)
            if planted.owner == mine.owner and not self.mapping.plant(page):
                self._clear_placeholder(page)  # the page came meanwhile

    def undo(self, address: int) -> None:
        """See sigbus.Target."""
        page = address & _PAGE_MASK
        placeholder = self._placeholders.get(page)
        if placeholder is None or placeholder.owner != _get_ident():
            return
        try:
            if not placeholder.protect:
                self.mapping.drop(page, PAGE_SIZE)
            elif not self.closed:
                self.mapping.protect(page, PAGE_SIZE)
        except OSError:
            pass  # unmapped meanwhile, and the page with it
        finally:
            self._clear_placeholder(page)

    def _clear_placeholder(self, page: int) -> None:
        placeholder = self._placeholders.pop(page, None)
        if placeholder is not None:
            release_all(placeholder.waiters)

    def forget_placeholders(self, start: int, end: int) -> None:
        """Note that these pages are missing again by other means."""
        for page in [page for page in list(self._placeholders) if start <= page < end]:
            self._clear_placeholder(page)

    def report(self, error: BaseException, address: int) -> None:
        """See sigbus.Target.  Waits a second at most for the loop's exception handler."""
        told = _new_lock()
        told.acquire()

        def tell() -> None:
            try:
                self.loop.call_exception_handler(
                    {
                        "message": f"{self.name}: no page at {address:#x} for a thread that"
                        " Python did not start; the process cannot go on",
                        "exception": error,
                    }
                )
            finally:
                told.release()

        if not self.loop.is_closed() and _get_ident() != self.loop_thread:
            self.loop.call_soon_threadsafe(tell)
            told.acquire(True, 1.0)

    # --- the end of a flight----------------------------------------------------------------

    def finish(self, flight: Flight, failure: Callable[[], BaseException] | None = None) -> None:
        """End a flight and let its waiters go on; a second call does nothing.

        Args:
            flight: One of ``flights``.
            failure: Makes each waiter's own exception; None after success.
        """
        if flight.done:
            return
        if self.flights.get(flight.start) is flight:
            del self.flights[flight.start]
        flight.failure = failure
        flight.done = True
        release_all(flight.waiters)

    def forked(self) -> None:
        """See sigbus.Target."""
        self.closed = self.is_copy = True
        self.mapping.forked()
