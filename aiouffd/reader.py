"""Reader: from the descriptor to the books and the dispatcher, and nothing in between.

Knows: how messages are read, and in which order they count.
Must not know: handlers and resolutions.

Laws of this file:

* Every turn reads until nothing is pending (bounded; ``readiness`` shares a wake-up out among all
  userfaultfds), applies every event of the batch, and only then serves faults: page faults are
  delivered before older events, so a fault read first may be about memory that an event behind
  it has moved or removed.
* No await, no lock and no source stands between the descriptor and its reader.
* With a journal, messages are read into it: what the kernel has said is written down before
  anybody could forget it.
* The callback never raises: an error ends the pager, and its waiters are told.
"""

from __future__ import annotations

import contextvars
import errno
import logging
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Final

from . import readiness
from .events import (
    MESSAGE_SIZE,
    PAGEFAULT,
    Event,
    Forked,
    RawFault,
    Remapped,
    Removed,
    Unmapped,
    decode,
)
from .fds import OwnedFd
from .journal import Journal, JournalError
from .kernel import abi, calls
from .ranges import Range

if TYPE_CHECKING:
    from .dispatcher import Dispatcher
    from .region import Region

log: Final = logging.getLogger("aiouffd")

_BATCH: Final = 64  # messages per read
READ_ROUNDS: Final = 64  #: reads per wake-up: other work of the loop must run too
_FD_SHORTAGE_PAUSE: Final = 0.05  # seconds without reading while no descriptor is to be had

_OF_RANGES: Final = frozenset((abi.UFFD_EVENT_REMOVE, abi.UFFD_EVENT_UNMAP))
_OF_NO_RANGE: Final = frozenset((PAGEFAULT, abi.UFFD_EVENT_FORK))

_unpack_fault: Final = abi.UFFD_MSG_PAGEFAULT.unpack_from
_each_fault: Final = abi.UFFD_MSG_PAGEFAULT.iter_unpack
_unpack_range = abi.UFFD_MSG_RANGE.unpack_from


def number_of(region: Region) -> int | None:
    """Give a region's number in the journal, if it has one."""
    return None if region.number < 0 else region.number


class Reader:
    """The one reader of a userfaultfd.

    Sharing: the loop's thread.
    """

    def __init__(self, dispatcher: Dispatcher, on_child: Callable[[OwnedFd], None]) -> None:
        """Prepare; nothing is read before ``start``.

        Args:
            dispatcher: Takes the faults, and owns the books.
            on_child: Takes the userfaultfd of each forked child.
        """
        self._dispatcher = dispatcher
        self._on_child = on_child
        self._pausing = False
        self._reading = False
        self._held = False
        self._given_up: Journal | None = None  # too small for the books, and to be ended still
        self.read_into(memoryview(bytearray(_BATCH * MESSAGE_SIZE)))

    def read_into(self, buffer: memoryview) -> None:
        """Read into another buffer of 64 messages from now on."""
        self._buffer = buffer
        self._read = calls.reader(self._dispatcher.fd, buffer)

    def forget_journal(self) -> Journal | None:
        """Write into the journal no longer, and give it to who ends it."""
        journal, self._dispatcher.journal = self._dispatcher.journal, None
        if journal is not None and not self._dispatcher.uffd.closed:
            self.read_into(memoryview(bytearray(_BATCH * MESSAGE_SIZE)))
        return journal or self._given_up

    def settle(self) -> None:
        """What was read is in the books: let the journal, if there is one, make room for more.

        Call it whenever a record of our own was written, too: the next read must not land on it.
        """
        dispatcher = self._dispatcher
        journal = dispatcher.journal
        if journal is None:
            return
        try:
            if journal.settled(dispatcher.space, number_of):
                self.read_into(journal.inbox)
        except JournalError as error:
            # Not the error itself, whose frames hold on to the journal.
            log.critical("%r will not outlive this process: %s", dispatcher.uffd, str(error))
            self._given_up = self.forget_journal()

    def start(self) -> None:
        """Begin to read whenever there is something."""
        dispatcher = self._dispatcher
        readiness.add_reader(dispatcher.loop, dispatcher.fd, self.read_some)
        self._context = contextvars.copy_context()
        self._reading = True

    def stop(self) -> None:
        """Leave the loop: always before the descriptor is closed, for numbers are reused."""
        dispatcher = self._dispatcher
        readiness.remove_reader(dispatcher.loop, dispatcher.fd)
        self._reading = False

    def hold(self) -> None:
        """Read only by ``read_some``, from now on."""
        self._held = True
        readiness.pause_reader(self._dispatcher.loop, self._dispatcher.fd)

    def let_go(self) -> None:
        """Read whenever there is something, again."""
        self._held = False
        if not self._pausing:
            readiness.resume_reader(self._dispatcher.loop, self._dispatcher.fd)

    def _resume(self) -> None:
        """Read again, after a pause."""
        self._pausing = False
        if not self._held:
            readiness.resume_reader(self._dispatcher.loop, self._dispatcher.fd)

    def read_on(self) -> None:
        """Read what came meanwhile, from within a task, in a context as the loop's.

        A thread that an answer has woken may fault again within microseconds: to look costs
        half a microsecond, a turn of the loop two.
        """
        if self._reading:
            self._context.run(self.read_all)

    def read_all(self) -> None:
        """Read until nothing is pending, apply events, serve faults; never raises.

        Nothing while it is held: then only who holds it knows when to read.
        """
        if not self._held:
            self.read_some(READ_ROUNDS)

    def read_some(self, rounds: int) -> int:
        """Read so often at most, apply events, serve faults; never raises.

        Returns:
            How often there was something.
        """
        return self._guarded(self._drain, rounds)

    def read_and_try(self, where: Range, fill: Callable[[], object]) -> None:
        """Read one batch, call ``fill`` at once, and only then apply and serve the batch.

        The thread whose event was read runs for a few microseconds until it may change the
        layout again, and only then are fills let through: applying the batch takes longer.
        The order does not matter where the batch has nothing to do with ``where``; if it
        has, ``fill`` is left out.
        """
        if self._held:
            fill()
            return

        def read_fill_apply(_rounds: int) -> int:
            count = self._take(self._read() or 0)
            if not self._concerns(count, where):
                fill()
            if count and not self._dispatcher.target_gone:
                self._batch(count)
            return 1

        self._guarded(read_fill_apply, 1)

    def _take(self, count: int) -> int:
        """See that what was read is not lost, before anything is done with it."""
        if count and self._dispatcher.journal is not None:
            self._dispatcher.journal.took(count)
        return count

    def _concerns(self, count: int, where: Range) -> bool:
        """Whether an event of the batch is about a range."""
        for at in range(0, count, MESSAGE_SIZE):
            number = self._buffer[at]
            if number in _OF_RANGES:
                _, start, end = _unpack_range(self._buffer, at)
                if start < where.end and where.start < end:
                    return True
            elif number not in _OF_NO_RANGE:
                return True
        return False

    def _guarded(self, read: Callable[[int], int], rounds: int) -> int:
        if self._pausing:
            return 0
        try:
            return read(rounds)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                self._dispatcher.crash(error)
                return 1
            # No descriptor for a forked child: its event stays queued and the fd readable,
            # so that going on to listen would spin.
            log.exception("a fork event waits for a file descriptor")
            self._pausing = True
            readiness.pause_reader(self._dispatcher.loop, self._dispatcher.fd)
            self._dispatcher.timers.set("fds", _FD_SHORTAGE_PAUSE, self._resume)
        except Exception as error:
            self._dispatcher.crash(error)
        return 1

    def _drain(self, rounds: int) -> int:
        dispatcher = self._dispatcher
        counters = dispatcher.counters
        end = perf_counter() + readiness.LONGEST_TURN
        for used in range(rounds):
            buffer, read = self._buffer, self._read  # others next time, if there is a journal
            ended = counters.ended
            count = read()
            if count == MESSAGE_SIZE and buffer[0] == PAGEFAULT:
                # A short read means that nothing else was pending: the common case.
                _, flags, address, thread_id = _unpack_fault(buffer)
                dispatcher.fault(flags, address, thread_id)
            elif count:
                self._batch(self._take(count))
            else:
                return used
            if counters.ended == ended or dispatcher.target_gone or perf_counter() > end:
                return used + 1  # nobody was woken who could fault at once; or enough for now
        return rounds

    def _batch(self, count: int) -> None:
        faults: list[tuple[int, int, int]] = []
        failed: Exception | None = None
        try:
            for _ in range(READ_ROUNDS):
                messages = self._buffer[:count]
                for n, (kind, flags, address, thread_id) in enumerate(_each_fault(messages)):
                    if kind == PAGEFAULT:
                        faults.append((flags, address, thread_id))
                        continue
                    for event in decode(messages[n * MESSAGE_SIZE : (n + 1) * MESSAGE_SIZE]):
                        if not isinstance(event, RawFault):
                            # The rest is applied all the same: a fork event behind it has put
                            # a descriptor into this process already.
                            try:
                                self._apply(event)
                            except Exception as error:
                                failed = failed or error
                self.settle()
                if count < _BATCH * MESSAGE_SIZE:
                    break
                count = self._take(self._read() or 0)
            if failed is not None:
                raise failed
        finally:  # a later read may fail for want of a descriptor: these are read already
            self._dispatcher.serve(faults)

    def _apply(self, event: Event) -> None:
        """Bring the books up to date, and what was in flight with them."""
        dispatcher = self._dispatcher
        space = dispatcher.space
        dispatcher.counters.events += 1
        dispatcher.layout_changed()
        match event:
            case Removed(where):
                for flight in space.remove(where):
                    dispatcher.removed_in_flight(flight)
            case Unmapped(where):
                for flight in space.unmap(where):
                    dispatcher.drop(flight)
            case Remapped(start, to, length):
                for flight in space.remap(start, to, length):
                    dispatcher.drop(flight)
            case Forked(fd):
                self._on_child(fd)
            case _:
                log.warning("an event that this version does not know: %r", event)
        for observer in dispatcher.observers:
            observer.event(event)
