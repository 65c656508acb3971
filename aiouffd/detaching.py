"""Detaching: give a target's memory back to the kernel while the target goes on using it.

Knows: one pager's registered memory, and that its owner moves, frees and forks it meanwhile.
Must not know: whether the memory is complete; whoever begins has seen to that.

Laws of this file:

* ``begin`` is one step without an await: before it everything is served, after it nothing has
  to be.  What is missing then reads as the kernel makes it: zeros, in anonymous memory.
* A thread that moves, frees or forks memory waits for its event to be read, and the event may
  come behind the unregistration.  So events are read on until none is under way: such a thread
  has marked the userfaultfd as changing before the unregistration could get its lock.
* What such an event has moved or copied is registered still, elsewhere: it is found in the
  books once the event is applied, and given back as well.
* Where nobody else has a copy of the userfaultfd, nothing is unregistered: the close that
  follows gives everything back, in one step.  An unregistration of a part cuts the target's
  mapping in two until the rest follows, and mremap across the cut fails meanwhile, or moves
  one half (seen on Linux 6.18).
* A fault that was read before, or that lies in such memory, is let go, never answered: its
  thread tries again, and finds the kernel's own memory.  Where nothing is unregistered it would
  only come again until the close, and after so many times count as stuck: there it gets zeros,
  which is what the kernel would make.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from .errors import ResolutionRefused, TargetGone
from .events import PageFault
from .ranges import Range
from .resolutions import Handler, Zero

if TYPE_CHECKING:
    from .dispatcher import Dispatcher

log: Final = logging.getLogger("aiouffd")

_CALLS_AT_ONCE: Final = 4096  # unregistrations of one stretch, when it has to be cut up


async def let_go(fault: PageFault) -> None:
    """Wake whoever faults."""


async def give_zeros(fault: PageFault) -> Zero:  # noqa: ARG001 - as every handler
    """Give the zeros that the kernel would: what has bytes was brought before."""
    return Zero()


class Detaching:
    """One pager's memory on its way back to the kernel.

    Sharing: the loop's thread.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        tails: Callable[[list[Range]], Iterable[Range]] | None,
        *,
        alone: bool = False,
    ) -> None:
        """Prepare; nothing is changed before ``begin``.

        Args:
            dispatcher: Of the pager.
            tails: Given all stretches, finds what the target has grown behind them without a
                word: mremap tells nothing of a new tail.
            alone: Nobody else has a copy: the pager's close gives everything back.
        """
        self._dispatcher = dispatcher
        self._tails = tails
        self._alone = alone
        self._handler: Handler = give_zeros if alone else let_go
        self._epoch = -1

    def begin(self) -> None:
        """Let every waiting thread go, and unregister everything; no way back from here."""
        dispatcher = self._dispatcher
        for _, placement in dispatcher.space.placements:
            placement.region.handler = self._handler
        self._unregister_all()
        for task in tuple(dispatcher.tasks):
            if not task.cancelling():
                task.cancel()
        for flight in tuple(dispatcher.space.in_flight.values()):
            if dispatcher.target_gone:
                return
            flight.cancel()
            dispatcher.wake(flight.fault.address, flight.fault.length)
            dispatcher.end(flight, "wake")

    def settle(self) -> bool:
        """Apply what has come meanwhile.

        Returns:
            Whether nothing is registered or under way any more.
        """
        dispatcher = self._dispatcher
        dispatcher.reader.read_all()
        if dispatcher.target_gone or dispatcher.crashed or dispatcher.uffd.closed:
            return True
        if self._epoch != dispatcher.space.epoch:
            for _, placement in dispatcher.space.placements:
                placement.region.handler = self._handler  # a child that was forked before
            self._unregister_all()
            return False
        return self._alone or not dispatcher.uffd.is_changing()

    def finish(self) -> None:
        """Forget all memory: it is none of ours any more."""
        space = self._dispatcher.space
        for where, _ in tuple(space.placements):
            for flight in space.drop(where):
                self._dispatcher.drop(flight)

    def _unregister_all(self) -> None:
        dispatcher = self._dispatcher
        self._epoch = dispatcher.space.epoch
        if self._alone:
            return
        stretches = [(where, place.page_size) for where, place in dispatcher.space.placements]
        try:
            for where, page_size in stretches:
                self._unregister(where, page_size)
            if self._tails is not None:
                for tail in self._tails([where for where, _ in stretches]):
                    self._unregister(tail, tail.length)
        except TargetGone:
            dispatcher.target_is_gone()

    def _unregister(self, where: Range, page_size: int) -> None:
        """Unregister a stretch; parts of it may be unmapped by now, or be another's memory."""
        uffd = self._dispatcher.uffd
        todo, calls = [where], 0
        while todo:
            part = todo.pop()
            calls += 1
            try:
                uffd.unregister(part.start, part.length)
            except TargetGone:
                raise
            except ResolutionRefused as error:
                pages = part.length // page_size
                if error.errno != errno.EINVAL or calls > _CALLS_AT_ONCE:
                    log.warning("%s could not be unregistered: %s", part, error)
                elif pages > 1:
                    half = part.start + pages // 2 * page_size
                    todo.append(Range.between(half, part.end))
                    todo.append(Range.between(part.start, half))
                uffd.wake(part.start, part.length)
