"""Resolver: carries a resolution out, and knows what the kernel's answers mean.

Knows: which answer of an ioctl ends a fault, parks it or fails it.
Must not know: where the resolution came from.

Laws of this file:

* EEXIST wakes nobody: wake, after arming the page if the fill would have protected it.
  The same page over and over is an error.
* EAGAIN has done nothing: park.
* No more than one bounded ioctl at a time: the faulting page first, then the rest.
* The rest of a long answer never touches a removed page.
"""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Final

from .errors import HandlerError, StuckPage, refusal
from .events import PageFault
from .flight import Flight
from .kernel import abi, calls
from .performer import PIECE_BYTES, Walk, outcome_of, perform, span_of
from .ranges import Range
from .readiness import between_pieces
from .resolutions import Continue, Copy, Resolution, Wake

if TYPE_CHECKING:
    from .dispatcher import Dispatcher
    from .region import Region

_STUCK_AFTER: Final = 1000  # answers in a row that left the same page faulting
_STUCK_PAGES: Final = 4096  # pages for which those are counted
_NOMEM_TRIES: Final = 8
_INLINE_REST: Final = 256 * 1024  # bytes of a long answer done at once behind its page


class Resolver:
    """Carries out the resolutions of one pager.

    Attributes:
        again: Answers in a row that did not settle a page, by address.
        long: Answers of many pages whose rest is under way, with the fault and their range.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self.again: dict[int, int] = {}
        self.long: dict[asyncio.Task[None], tuple[Flight, Copy, Range]] = {}

    def carry_out(self, flight: Flight, resolution: Resolution, tries: int = 1) -> None:
        """Perform a resolution on the faulting page; then what else it covers.

        Args:
            flight: In flight.
            resolution: That suits it.
            tries: How often in a row, as long as the kernel says EAGAIN.
        """
        fault = flight.fault
        page, size = fault.address, fault.length
        flight.resolution = resolution
        try:
            whole = span_of(resolution, fault)
        except HandlerError as error:  # its buffer was released while it was parked
            self._dispatcher.recovery.give_up(flight, error)
            return
        fd, start = self._dispatcher.fd, whole.start
        done = perform(fd, resolution, start, page, size, size)
        while done == -errno.EAGAIN and tries > 1:
            tries -= 1
            done = perform(fd, resolution, start, page, size, size)
        if done != size:
            self._refused(flight, resolution, done)
            return
        if type(resolution) is Wake:
            if self._is_stuck(flight):
                return
        else:
            self.again.pop(page, None)
        if type(resolution) is Copy:
            self._dispatcher.counters.copied_bytes += size
            if flight.region is not None and flight.region.filled is not None:
                flight.region.filled.add(fault.offset)
        self._dispatcher.end(flight, outcome_of(resolution))
        if whole.length > size:
            self._rest(flight, resolution, whole)

    def _refused(self, flight: Flight, resolution: Resolution, done: int) -> None:
        """React to what the kernel said instead of doing it; see errors.ERRNO_MEANING."""
        page, size = flight.fault.address, flight.fault.length
        match -done:
            case errno.EAGAIN:
                self._dispatcher.parking.add(flight)
            case errno.EEXIST:
                self._dispatcher.counters.already += 1
                if not isinstance(resolution, Copy | Continue) or not resolution.protect:
                    self._wake_and_end(flight, "already")
                elif self._protect(page, size) == -errno.EAGAIN:
                    self._dispatcher.parking.add(flight)
                else:
                    self._wake_and_end(flight, "already")
            case errno.ENOENT:
                self._dispatcher.counters.gone += 1
                self._wake_and_end(flight, "gone")
            case errno.EFAULT if type(resolution) is Continue:
                # The page has left the page cache meanwhile: let the thread fault anew.
                self._wake_and_end(flight, "wake")
            case errno.ESRCH:
                self._dispatcher.target_is_gone()
            case errno.ENOMEM if flight.tries < _NOMEM_TRIES:
                flight.tries += 1
                self._dispatcher.parking.add(flight)
            case number:
                call = f"the answer {outcome_of(resolution)!r}"
                self._dispatcher.recovery.give_up(flight, refusal(call, number, page, size))

    def _protect(self, page: int, size: int) -> int:
        """Arm a page that was there before a protecting fill: EEXIST has changed nothing.

        Woken unarmed, its next write would go unseen.
        """
        mode = abi.UFFDIO_WRITEPROTECT_MODE_WP
        return calls.writeprotect(self._dispatcher.fd, page, size, mode)

    def _wake_and_end(self, flight: Flight, outcome: str) -> None:
        self._dispatcher.wake(flight.fault.address, flight.fault.length)
        if not self._is_stuck(flight):
            self._dispatcher.end(flight, outcome)

    def _is_stuck(self, flight: Flight) -> bool:
        """Count an answer that may leave the page faulting; give up after very many in a row.

        Threads that fault on one page together make some of these harmlessly; an exhausted
        pool of huge pages makes them for ever.
        """
        page = flight.fault.address
        if len(self.again) > _STUCK_PAGES:
            self.again.clear()  # forgetting only delays the verdict
        count = self.again[page] = self.again.get(page, 0) + 1
        if count < _STUCK_AFTER or flight.final:
            return False
        del self.again[page]
        error = StuckPage(
            f"the page at {page:#x} was answered {count} times and faults on; on hugetlb memory"
            " the pool of huge pages is empty (see /proc/sys/vm/nr_hugepages)",
            page,
        )
        self._dispatcher.recovery.give_up(flight, error)
        return True

    def at_hand(self, fault: PageFault, region: Region) -> Copy | None:
        """Give the answer to another fault that holds this page too, while it is carried out.

        Who reads on in order overtakes the rest of a long answer: its bytes are there already.
        """
        for flight, answer, whole in self.long.values():
            if (
                flight.region is region
                and fault.missing
                and fault.address in whole
                and fault.offset - fault.address == flight.fault.offset - flight.fault.address
            ):
                return answer
        return None

    def _rest(self, flight: Flight, resolution: Resolution, whole: Range) -> None:
        """Do the rest of a long answer: what lies behind the page first, as readers go on."""
        page, size = flight.fault.address, flight.fault.length
        before, after = Range.between(whole.start, page), Range.between(page + size, whole.end)
        near = Range(after.start, min(after.length, max(_INLINE_REST - size, 0)))
        going = self._speculate(flight, resolution, whole, near)
        if any(resolution is answer for _, answer, _ in self.long.values()):
            return  # its rest is under way
        if whole.length <= _INLINE_REST:
            self._speculate(flight, resolution, whole, before)
        elif going:
            far = Range.between(near.end, after.end)
            self._begin_rest(flight, resolution, whole, [far, before])

    def _begin_rest(
        self, flight: Flight, resolution: Resolution, whole: Range, parts: list[Range]
    ) -> None:
        dispatcher = self._dispatcher
        task = dispatcher.loop.create_task(self._rest_slowly(flight, resolution, whole, parts))
        dispatcher.tasks[task] = None
        task.add_done_callback(self._rest_done)
        if type(resolution) is Copy and resolution.address is not None:
            self.long[task] = flight, resolution, whole

    def _rest_done(self, task: asyncio.Task[None]) -> None:
        self._dispatcher.tasks.pop(task)
        self.long.pop(task, None)

    async def _rest_slowly(
        self, flight: Flight, resolution: Resolution, whole: Range, parts: list[Range]
    ) -> None:
        for part in parts:
            for piece in part.pieces(max(PIECE_BYTES, flight.fault.length)):
                await between_pieces()
                if self._dispatcher.target_gone or not self._speculate(
                    flight, resolution, whole, piece
                ):
                    return

    def _speculate(self, flight: Flight, resolution: Resolution, whole: Range, part: Range) -> bool:
        """Do a part that nobody waits for; what the kernel refuses is simply left out.

        So is memory that is no neighbour of the faulting page in the source: the target has
        moved it there, and the answer was not made for it.

        Returns:
            Whether it is worth going on.
        """
        space, size = self._dispatcher.space, flight.fault.length
        delta = flight.fault.offset - flight.fault.address
        region = flight.region
        if region is None or not part.length:
            return True

        def fill(start: int, length: int) -> int:
            return perform(self._dispatcher.fd, resolution, whole.start, start, length, size)

        offset = part.start + delta
        if region.is_untouched(offset, part.length, -delta):  # as it is nearly always
            done = fill(part.start, part.length)
            self._note_filled(region, resolution, offset, done)
            if done == part.length:
                return True
        for where, placement in space.placements.overlapping(part):
            if placement.region is not region or placement.delta != delta:
                continue
            for run in region.fillable(where):
                walk = Walk(run, size)
                while walk:
                    at = walk.at
                    done = walk.step(fill, self._dispatcher.wake)
                    self._note_filled(region, resolution, at + delta, done)
                    if done < 0 and done not in (-errno.EEXIST, -errno.ENOENT):
                        return False
        return True

    def _note_filled(self, region: Region, resolution: Resolution, offset: int, done: int) -> None:
        if done > 0 and type(resolution) is Copy:
            self._dispatcher.counters.filled_bytes += done
            if region.filled is not None:
                region.filled.add_range(offset, done)
