"""Pager: the page faults of one userfaultfd, served by coroutines.

Knows: opening and closing, registered regions, forked children.
Must not know: how a fault is read, dispatched, parked or failed; see ``reader``,
``dispatcher``, ``parking``, ``recovery`` and ``watchdog``, each with its own laws.

Laws of this file:

* A dead target says nothing: a pidfd and a probe tell that it is gone.
* The reader leaves the loop before the descriptor is closed, for numbers are reused at once.
* Closing fails closed: what is missing is poisoned, or the target killed, before the last
  descriptor goes; the kernel by itself would make zeros of it.
* Forks are handled from outside: a process cannot read the event of its own fork.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Final, Self

from .address_space import AddressSpace
from .detaching import Detaching
from .dispatcher import Dispatcher
from .errors import ClosedError, ResolutionRefused, TargetGone
from .failure import Action, FailurePolicy
from .fds import OwnedFd
from .flight import Flight
from .journal import Journal
from .kernel import calls
from .metrics import Counters, Observer
from .parking import Patience
from .ranges import PAGE_SIZE, Range, is_aligned, is_power_of_two
from .reader import READ_ROUNDS, number_of
from .region import Region
from .resolutions import Handler
from .settling import Settling
from .uffd import Feature, Mode, Userfaultfd

log: Final = logging.getLogger("aiouffd")

#: Where the address space of a process may end: x86-64 and arm64, large and small, 32 bits.
_ENDS_OF_MEMORY: Final = tuple(
    (1 << bits) - rest for bits in (56, 52, 48, 47, 42, 39) for rest in (0, PAGE_SIZE)
)
_LOWEST: Final = 1 << 16

_OUTCOME_AT_CLOSE: Final = {
    Action.POISON: "poison",
    Action.KILL: "killed",
    Action.ZERO: "zero",
    Action.HANG: "hanging",
}


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
        children: Pagers of forked children that live; needs Feature.EVENT_FORK.
        on_close: What becomes of missing pages when the pager is closed.

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
        zero_elsewhere: bool = False,
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
            zero_elsewhere: Registered memory that no region holds reads zero, such as what a
                stack has grown by; else a fault there is one that nobody serves.
            observers: Told of every fault and event.
        """
        if max_in_flight < 1:
            raise ValueError("max_in_flight is at least 1")
        self.uffd = uffd
        self.on_close = _checked(on_close)
        self.children: list[Pager] = []
        self._on_fork = on_fork
        self._parent: Pager | None = None
        self._close_task: asyncio.Task[None] | None = None
        self._dispatcher = Dispatcher(
            uffd,
            policy=failure if failure is not None else FailurePolicy(),
            deadline=deadline,
            warn_after=warn_after,
            max_in_flight=max_in_flight,
            observers=observers,
            target=OwnedFd(os.dup(target)) if target is not None else None,
            zero_elsewhere=zero_elsewhere,
            on_child=self._adopt_child,
            on_gone=self._retire_child,
            on_failure=self._tell_parent,
        )

    def __repr__(self) -> str:
        state = "target gone" if self.target_gone else "closing" if self.closing else "serving"
        return f"<Pager {state}, {self.in_flight} in flight, {self.uffd!r}>"

    # --- what it knows -----------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        """What was done so far."""
        return self._dispatcher.counters

    @property
    def space(self) -> AddressSpace[Region, Flight]:
        """Who serves what, what is removed, what is in flight; not to be changed."""
        return self._dispatcher.space

    @property
    def regions(self) -> list[Region]:
        """The regions that serve something now, by address."""
        return list({id(p.region): p.region for _, p in self.space.placements}.values())

    @property
    def parent(self) -> Pager | None:
        """The pager of the process that forked this one; None for the first."""
        return self._parent

    @property
    def in_flight(self) -> int:
        """Faults that have begun and not ended."""
        return len(self.space.in_flight)

    @property
    def closing(self) -> bool:
        """Whether ``aclose`` has begun."""
        return self._dispatcher.closing is not None

    @property
    def target_gone(self) -> bool:
        """Whether the target has exited or called exec."""
        return self._dispatcher.target_gone

    @property
    def journal(self) -> Journal | None:
        """What outlives this process of the books, if anything does."""
        return self._dispatcher.journal

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
        if error is None and self._dispatcher.error is not None:
            raise self._dispatcher.error

    def start(self) -> None:
        """Begin to serve on the running loop, as ``async with`` does; ends with ``aclose``.

        Raises:
            RuntimeError: The userfaultfd has a reader already.
            ValueError: It has EVENT_FORK, and the memory is this process's own.
        """
        if self.uffd.features & Feature.EVENT_FORK and self.uffd.is_own_memory():
            raise ValueError(
                "EVENT_FORK on this process's own memory: its fork would wait, holding the"
                " allocator's locks, for a reader in this very process; open without"
                " Feature.EVENT_FORK, or serve from another process"
            )
        self._dispatcher.start()

    async def wait_closed(self) -> None:
        """Wait until the target and its forked children are gone, or the pager is closed.

        Raises:
            FaultError: A fault failed and the policy says Action.RAISE.
            Exception: The pager itself failed.

        Cancellation: nothing happens to the pager.
        """
        dispatcher = self._dispatcher
        await dispatcher.over.wait()
        while self.children and dispatcher.error is None and not self.closing:
            await self.children[0]._dispatcher.over.wait()
            await asyncio.sleep(0)  # it takes itself off the list, or tells why it failed
        if dispatcher.error is not None:
            raise dispatcher.error

    async def aclose(self, action: Action | None = None) -> None:
        """Stop serving: settle what is missing, unregister, wake everybody, close.

        Until the end the target's events are still read, and its faults get the same action.

        Args:
            action: What becomes of missing pages; None is ``on_close``.  POISON marks each
                (a SIGBUS is seen), KILL ends the target, ZERO gives them up as zeros, HANG
                leaves everything registered and ``uffd`` open for its next owner.

        Raises:
            ResolutionRefused: The kernel cannot poison (that is Linux 6.6) and there is no
                pidfd to kill by: ``uffd`` stays open, so that nothing turns into zeros.

        Cancellation: the close goes on by itself; call again to wait for it.
        """
        action = self.on_close if action is None else _checked(action)
        if not self._dispatcher.started:
            if not self.regions or self.uffd.closed:
                self._release(close=action is not Action.HANG)
                return
            self._dispatcher.start()  # what is registered has missing pages: to settle them
        if self._close_task is None:
            self.resume_reading()
            self._dispatcher.closing = action
            coro = self._close(action)
            self._close_task = self._dispatcher.loop.create_task(coro, name="aiouffd close")
        await asyncio.shield(self._close_task)

    async def _close(self, action: Action) -> None:
        dispatcher = self._dispatcher
        tasks = tuple(dispatcher.tasks)
        for flight in self.space.in_flight.values():
            flight.cancel()
        for task in tasks:
            if not task.cancelling():  # once: another would break into its cleanup
                task.cancel()
        settled = False
        try:
            settled = self.target_gone or await self._settle(action)
        finally:
            if not self.target_gone:
                dispatcher.stop()
            dispatcher.end_all(_OUTCOME_AT_CLOSE[action])
            self._release(close=settled)
            try:
                # Now that no event is read any more there can be no further child; one of an
                # unread event has the marks of its parent, all of them.
                await self._close_children(action)
            finally:
                if tasks:  # last: a handler that will not be cancelled holds up no thread
                    await asyncio.wait(tasks)

    async def _close_children(self, action: Action) -> None:
        failed: Exception | None = None
        tried: set[Pager] = set()
        while rest := [child for child in self.children if child not in tried]:
            tried.add(rest[0])
            try:
                await rest[0].aclose(action)  # its end takes it off the list
            except Exception as error:  # the others are settled all the same
                failed = failed or error
        if failed is not None:
            raise failed

    async def _settle(self, action: Action) -> bool:
        """Do what ``aclose`` promises for missing pages.

        Returns:
            Whether the descriptor may be closed without turning anything into zeros that
            was not to be.
        """
        if action is Action.HANG:
            return False
        if action is Action.KILL and self._dispatcher.recovery.kill():
            # Until it is dead it could still read zeros.
            await self._dispatcher.gone.wait()
            return True
        for region in self.regions:
            if action is Action.ZERO or self.target_gone:
                break
            try:  # KILL without a pidfd is POISON
                await self.poison(region)
            except ResolutionRefused:
                if self._dispatcher.recovery.kill():
                    await self._dispatcher.gone.wait()
                    return True
                raise
        # All at once, and the descriptor right after it: what the target moves now is still
        # registered where no region knows of it, and would not be served.
        for region in self.regions:
            if not self.target_gone:
                self.forget(region)
        return True

    def _release(self, *, close: bool) -> None:
        dispatcher = self._dispatcher
        if dispatcher.target is not None:
            dispatcher.target.close()
        if close:
            journal = dispatcher.reader.forget_journal()
            self.uffd.close()
            if journal is not None:
                journal.end()
        if self._parent is not None and self in self._parent.children:
            self._parent.children.remove(self)
        dispatcher.over.set()

    # --- regions -----------------------------------------------------------------------

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
            TargetGone: The target is gone.
        """
        self.check_serving()
        where = Range(start, length)
        if not is_power_of_two(page_size) or page_size < PAGE_SIZE:
            raise ValueError(f"{page_size} is no page size of this machine")
        if not (length and is_aligned(start, page_size) and is_aligned(length, page_size)):
            raise ValueError(f"{where} is not made of whole pages of {page_size} bytes")
        for other, placement in self.space.placements.overlapping(where):
            # What the target moved away from is only kept as removed: it may be taken anew.
            if any(self.space.removed.gaps(other)):
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
        for flight in self.space.register(where, region, offset, page_size):
            # A zero that waited for what was here before must not land in new memory.
            self._dispatcher.drop(flight)
        self._dispatcher.layout_changed()
        return region

    def forget(self, region: Region) -> None:
        """Unregister a region and let its waiting threads go: missing pages become zeros.

        See Region.drop, which settles them first.
        """
        dispatcher = self._dispatcher
        if self.uffd.closed:  # while the caller settled what is missing
            return
        fd = self.uffd.fileno()
        for where in self.space.all_of(region):
            try:
                if region.modes & Mode.WP:
                    # Protection that outlives its handler would wedge every writer.
                    calls.writeprotect(fd, where.start, where.length, 0)
                self.uffd.unregister(where.start, where.length)
            except TargetGone:
                dispatcher.target_is_gone()
                return
            except ResolutionRefused as error:
                # Unmapped, and the event still unread: there is nothing to unregister.
                log.debug("%r: %s", region, error)
                dispatcher.wake(where.start, where.length)
            if dispatcher.journal is not None:
                dispatcher.journal.dropped(where)
            for flight in self.space.drop(where):
                dispatcher.drop(flight)
            dispatcher.reader.settle()
        dispatcher.layout_changed()

    async def poison(self, region: Region) -> None:
        """Poison every missing page of a region, in pieces between which events are read.

        Removed pages are left out: they are to read zero.  So is a region that is only
        write-protected, whose missing pages are nobody's but the kernel's.

        Kernel: UFFDIO_POISON, since Linux 6.6.

        Raises:
            ResolutionRefused: The kernel cannot.
            LayoutChanging: The target's events went unread for the deadline.
            ClosedError: The pager was closed meanwhile.

        Cancellation: pages poisoned so far stay so.
        """
        await Settling(self._dispatcher, region).run()

    def read_events(self, rounds: int = READ_ROUNDS) -> None:
        """Read and apply what is pending, without waiting for the loop to find it.

        Args:
            rounds: Reads at most, each of a batch: after one, others may have become pending.
        """
        if self._dispatcher.started and not self.target_gone and not self.uffd.closed:
            self._dispatcher.reader.read_some(rounds)

    def hold_reading(self) -> None:
        """Read nothing by itself from now on, only in ``read_events``; see ``live_snapshot``.

        Who faults waits, and whose event is unread sleeps, until ``resume_reading``.
        """
        if self._dispatcher.started and not self.target_gone and not self.uffd.closed:
            self._dispatcher.reader.hold()

    def resume_reading(self) -> None:
        """Read whenever there is something, again.  Closing does so by itself."""
        if self._dispatcher.started and not self.target_gone and not self.uffd.closed:
            self._dispatcher.reader.let_go()

    def detaching(
        self,
        tails: Callable[[list[Range]], Iterable[Range]] | None = None,
        *,
        alone: bool = False,
    ) -> Detaching:
        """Prepare to give all memory back to the kernel; see Detaching.

        Args:
            tails: Finds memory that has grown behind stretches without a word.
            alone: Nobody else has a copy of the userfaultfd.
        """
        return Detaching(self._dispatcher, tails, alone=alone)

    # --- outliving this process --------------------------------------------------------

    def keep_journal(self, journal: Journal) -> None:
        """Keep a journal from here on: the regions must have their numbers.

        Raises:
            JournalError: The books are too large.
        """
        journal.write_books(self.space, number_of)
        self._dispatcher.journal = journal
        self._dispatcher.reader.read_into(journal.inbox)

    def restore(self, space: AddressSpace[Region, Flight]) -> None:
        """Take over the books of a process that served this memory before; ahead of ``start``."""
        self._dispatcher.space = space
        self._dispatcher.layout_changed()

    def wake_all(self) -> None:
        """Let every thread that waits try again, wherever that is.

        What another process had read and not answered comes again by this, and by nothing else.
        """
        for end in _ENDS_OF_MEMORY:
            try:
                self.uffd.wake(_LOWEST, end - _LOWEST)
            except ResolutionRefused:  # this memory is not as large
                continue
            return
        for where, _ in self.space.placements:
            self.uffd.wake(where.start, where.length)

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

    def refused(self, call: str, done: int, start: int, length: int) -> ResolutionRefused:
        """Make the error for a signed result below zero, and note a target that is gone."""
        return self._dispatcher.refused(call, done, start, length)

    def patience(self) -> Patience:
        """Give a fresh wait for a changing layout, limited by the deadline."""
        return Patience(self._dispatcher.watchdog.deadline)

    # --- children ----------------------------------------------------------------------

    def _adopt_child(self, fd: OwnedFd) -> None:
        """Serve a forked child: the same ranges and handlers, through its own userfaultfd."""
        mine = self._dispatcher
        child = Pager(
            Userfaultfd(fd, mine.uffd.features),  # nothing is opened: descriptors may be short
            failure=mine.recovery.policy,
            deadline=mine.watchdog.deadline,
            warn_after=mine.watchdog.warn_after,
            max_in_flight=mine.max_in_flight,
            on_close=self.on_close,
            on_fork=self._on_fork,
            zero_elsewhere=mine.zero_elsewhere,
            observers=mine.observers,
        )
        child._parent = self
        space = mine.space.fork()
        clones = {id(region): region.clone_for(child) for region in self.regions}
        space.placements.replace_values(lambda place: place.served_by(clones[id(place.region)]))
        child._dispatcher.space = space
        self.children.append(child)
        child._dispatcher.start()  # ahead of on_fork, which may raise: only then it fails closed
        if self._dispatcher.closing is not None:
            child._dispatcher.closing = self._dispatcher.closing
        if self._on_fork is not None:
            self._on_fork(child)

    def _tell_parent(self, error: BaseException) -> None:
        """A child's pager failed, and its parent's waiters are all who could learn of it."""
        if self._parent is not None:
            self._parent._dispatcher.fail(error)

    def _retire_child(self) -> None:
        """A child's pager ends by itself with its target: only its parent knows of it."""
        if self._parent is not None and not self.closing:
            for grandchild in self.children:  # they live on, and somebody must close them
                grandchild._parent = self._parent
                self._parent.children.append(grandchild)
            self.children.clear()
            heir = self._parent._dispatcher.tasks
            for task in tuple(self._dispatcher.tasks):  # cancelled, but not through with it yet
                heir[task] = None
                task.add_done_callback(lambda done: heir.pop(done, None))
            self._dispatcher.closing = self.on_close
            self._release(close=True)


def _checked(action: Action) -> Action:
    if action is Action.RAISE:
        raise ValueError("closing takes POISON, KILL, ZERO or HANG: there is nothing to raise")
    return action
