"""Settling: poison what is missing in a region, so that closing does not make it zeros.

Knows: how to go over memory that its owner moves, frees and forks meanwhile.
Must not know: why it is to be poisoned.

Laws of this file:

* Removed pages are left out: they are to read zero.
* What is settled is kept by its place in the source: memory that moves takes its marks along,
  and a target that moves it all the time must not hold up the close.
* Events are read between the pieces; where nobody reads them any more, waiting is in vain.
"""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING

from .errors import ClosedError, LayoutChanging
from .kernel import abi, calls
from .parking import Patience
from .performer import PIECE_BYTES, Walk
from .ranges import PageSet, Range
from .uffd import Mode

if TYPE_CHECKING:
    from .dispatcher import Dispatcher
    from .region import Region


class Settling:
    """One pass over one region."""

    def __init__(self, dispatcher: Dispatcher, region: Region) -> None:
        self._dispatcher = dispatcher
        self._region = region
        self._settled = PageSet()

    async def run(self) -> None:
        """Poison every missing page; see Pager.poison."""
        dispatcher, region = self._dispatcher, self._region
        if not region.modes & (Mode.MISSING | Mode.MINOR):
            return
        space = dispatcher.space
        epoch, todo = -1, list[tuple[Range, int]]()
        patience = self._patience()
        while not dispatcher.target_gone:
            if dispatcher.uffd.closed:
                raise ClosedError("the pager was closed while a region was settled")
            if epoch != space.epoch:
                epoch, todo = space.epoch, self._unsettled()
            if not todo:
                return
            budget = PIECE_BYTES
            while todo and budget > 0:
                where, offset = todo.pop()
                done = self._poison_piece(where)
                self._settled.add(Range(offset, done))
                if done < where.length:
                    todo.append((Range.between(where.start + done, where.end), offset + done))
                if not done:
                    break
                budget -= done
            if budget < PIECE_BYTES:
                patience = self._patience()
                await asyncio.sleep(0)
            elif dispatcher.crashed:
                raise LayoutChanging("UFFDIO_POISON", errno.EAGAIN, region.start, region.length)
            elif not dispatcher.target_gone:
                await patience.wait()

    def _patience(self) -> Patience:
        return Patience(self._dispatcher.watchdog.deadline)

    def _unsettled(self) -> list[tuple[Range, int]]:
        """List the stretches of addresses, each with its offset, that are not settled."""
        return [
            (gap.moved(where.start - offset), gap.start)
            for where, offset in self._dispatcher.space.ranges_of(self._region)
            for gap in self._settled.gaps(Range(offset, where.length))
        ]

    def _poison_piece(self, where: Range) -> int:
        """Poison the beginning of a range, save what is there or removed.

        Returns:
            Bytes settled; 0 if the layout is changing or the target is gone.
        """
        dispatcher, page_size = self._dispatcher, self._region.page_size
        piece = Range(where.start, min(where.length, max(PIECE_BYTES, page_size)))
        # Asked right before the ioctls: what was removed a moment ago is to read zero.
        for run in tuple(dispatcher.space.removed.gaps(piece)):
            if self._region.modes & Mode.WP:
                # Where nothing is there protection leaves a mark, which POISON stops at.
                mode = abi.UFFDIO_WRITEPROTECT_MODE_DONTWAKE
                if calls.writeprotect(dispatcher.fd, run.start, run.length, mode) == -errno.EAGAIN:
                    return run.start - piece.start
            walk = Walk(run, page_size)
            while walk:
                done = walk.step(dispatcher.poison, dispatcher.wake)
                if done == -errno.EAGAIN:
                    return walk.at - piece.start
                if done == -errno.ESRCH:
                    dispatcher.target_is_gone()
                    return 0
                if done < 0 and done not in (-errno.EEXIST, -errno.ENOENT):
                    raise dispatcher.refused("UFFDIO_POISON", done, walk.at, walk.end - walk.at)
        return piece.length
