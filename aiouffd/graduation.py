"""Graduation: a target gets all of its memory, and lives on without us.

Knows: the pagers of one target and its forked children, their source.
Must not know: sessions and servers; how bytes are brought (Prefetch does) and memory is
unregistered (Detaching does).

Laws of this file:

* First everything is brought, only then anything is unregistered: what is missing at that
  moment reads zero from then on.  So it may only be holes, removed and grown memory.
* What is complete stays complete: only the target itself can take pages away again, and those
  are to read zero.  Fills are refused while a fork is unread, so a child that is taken up after
  its parent was complete has been copied from complete memory, and is complete as well.
* The point of no return is one step: read what is pending, find nothing incomplete, unregister
  everything, without an await.  Whoever is cancelled before it has a target that is served.
* Huge pages are looked at: on their memory EEXIST also says that their pool is empty.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

from .detaching import Detaching
from .errors import (
    ClosedError,
    LayoutChanging,
    NotSupported,
    StuckPage,
    TargetGone,
    UffdError,
)
from .handover import Peer
from .kernel import abi, calls, pagemap
from .pager import Pager
from .parking import Patience
from .prefetch import Prefetch
from .ranges import PAGE_SIZE, Range, align_down, align_up
from .region import Region
from .sources import Extents, Source
from .uffd import Feature, Mode

log: Final = logging.getLogger("aiouffd.graduation")

_RETRY_FIRST: Final = 0.5  # seconds, doubling ...
_RETRY_MOST: Final = 30.0  # ... up to this
_LINGER: Final = 30.0  # seconds of waiting for threads whose events are under way


class Graduation:
    """Makes a target complete, and lets go of it.

    Sharing: the loop's thread.
    """

    def __init__(
        self,
        pagers: Callable[[], list[Pager]],
        source: Source,
        extents: Extents,
        *,
        peer: Peer | None = None,
        alone: bool = False,
    ) -> None:
        """Prepare; nothing is brought yet.

        Args:
            pagers: Gives those that serve: the target's first, then its children's.
            source: Of all of them.
            extents: Where it has data.
            peer: The target, if known.
            alone: Closing the userfaultfds gives the memory back: nobody else has copies.
        """
        self._pagers = pagers
        self._source = source
        self._extents = extents
        self._peer = peer
        self._alone = alone
        self._complete: set[Pager] = set()
        self._prefetch: dict[Pager, Prefetch] = {}
        self._detaching: dict[Pager, Detaching] = {}

    def bring_by(self, pager: Pager, prefetch: Prefetch) -> None:
        """Let a Prefetch that knows what it has brought already do the rest."""
        self._prefetch[pager] = prefetch

    def adopted(self, child: Pager) -> None:
        """Note a forked child that has just been taken up."""
        self._complete = {one for one in self._complete if not one.uffd.closed}
        if child.parent in self._complete:
            self._complete.add(child)

    # --- bringing ----------------------------------------------------------------------

    async def fill(self) -> None:
        """Bring everything, for the target and every child it has by then.

        When it returns, and until the next await, nothing is incomplete.

        Raises:
            SourceError: Bytes could not be had.
            ResolutionRefused: The kernel refused (LayoutChanging: for the pager's deadline).
            StuckPage: Huge pages are missing: their pool is empty.
            NotSupported: There are huge pages, and we may not look whether they are there.
            TargetGone: The target and its children are gone.
            ClosedError: A pager or the source was closed.

        Cancellation: what was brought so far is there.
        """
        while todo := self._incomplete():
            for pager in todo:
                try:
                    await self._fill_pager(pager)
                except (TargetGone, ClosedError):
                    if pager in self._pagers():
                        raise  # the source is closed
                    self._prefetch.pop(pager, None)
                    continue  # a child that has ended, or was one too many
                self._complete.add(pager)
        if not self._pagers():
            raise TargetGone("filling everything", errno.ESRCH, 0, 0)

    def _incomplete(self) -> list[Pager]:
        for pager in self._pagers():
            pager.read_events()  # a fork that is pending, too
        return [pager for pager in self._pagers() if pager not in self._complete]

    async def _fill_pager(self, pager: Pager) -> None:
        prefetch = self._prefetch.get(pager)
        if prefetch is None:  # kept until all is there: another try goes on where this one ends
            prefetch = Prefetch(pager, self._source, extents=self._extents)
            self._prefetch[pager] = prefetch
        await prefetch.fill_all()
        for region in pager.regions:
            if region.modes & Mode.MISSING and region.page_size > PAGE_SIZE:
                self._check_huge(pager, region)
        self._prefetch.pop(pager, None)

    def _check_huge(self, pager: Pager, region: Region) -> None:
        """See that huge pages with data are there."""
        main = self._peer is not None and pager.parent is None
        if not main:
            raise NotSupported(
                "whether a process has its huge pages cannot be told without its pid",
                "Forked children on huge pages are served to their end.",
            )
        assert self._peer is not None  # noqa: S101 - as was just asked
        try:
            fd = pagemap.open_pagemap(self._peer.pid)
        except FileNotFoundError as error:
            if self._peer.exited():
                raise TargetGone("looking for huge pages", errno.ESRCH, 0, 0) from None
            raise NotSupported(
                f"whether {self._peer} has its huge pages cannot be told: it is not seen here",
                "It is served to its end; /proc of its pid namespace, without hidepid, would do.",
            ) from error
        try:
            if self._peer.exited():
                raise TargetGone("looking for huge pages", errno.ESRCH, 0, 0)
            for start, end in pages_with_data(region, self._extents):
                hint = region.start - region.offset
                for where in pager.space.addresses(region, start, end - start, hint):
                    for gap in region.fillable(where):
                        self._check_gap(pager, fd, gap, region.page_size)
        finally:
            os.close(fd)

    def _check_gap(self, pager: Pager, fd: int, where: Range, page_size: int) -> None:
        there = abi.PAGE_IS_PRESENT | abi.PAGE_IS_SWAPPED
        for missing in pagemap.regions(
            fd, where.start, where.end, required=there, inverted=there, report=0
        ):
            for page in range(align_down(missing.start, page_size), missing.end, page_size):
                # In the page cache and only not mapped is there, too.
                done = calls.continue_(pager.uffd.fileno(), page, page_size)
                if done not in (page_size, -errno.EEXIST, -errno.EAGAIN):
                    raise StuckPage(
                        f"the huge page at {page:#x} could not be brought: the pool of huge pages"
                        " is empty (see /proc/sys/vm/nr_hugepages)",
                        page,
                    )

    # --- letting go --------------------------------------------------------------------

    def detach(self) -> None:
        """Unregister everything: the point of no return.  Right behind ``fill``.

        Raises:
            TargetGone: The target and its children are gone.
        """
        for pager in self._pagers():
            self._begin(pager)
        if not self._pagers():
            raise TargetGone("detaching", errno.ESRCH, 0, 0)

    def _begin(self, pager: Pager) -> Detaching:
        detaching = self._detaching[pager] = pager.detaching(
            self._tails if pager.parent is None else None, alone=self._alone
        )
        detaching.begin()
        return detaching

    async def settle(self) -> None:
        """See to the threads that were changing memory at that moment; then nothing is ours."""
        patience = Patience(_LINGER)
        with contextlib.suppress(LayoutChanging):  # a thread that was stopped within a call
            while not self._settled():
                await patience.wait()
        for detaching in self._detaching.values():
            detaching.finish()

    def _settled(self) -> bool:
        settled = True
        for pager in self._pagers():
            detaching = self._detaching.get(pager) or self._begin(pager)
            settled = detaching.settle() and settled
        return settled and all(pager in self._detaching for pager in self._pagers())

    def _tails(self, stretches: list[Range]) -> Iterator[Range]:
        """Find memory right behind the target's stretches: what it may have grown by mremap."""
        peer, pagers = self._peer, self._pagers()
        if peer is None or not pagers or not pagers[0].uffd.features & Feature.EVENT_REMAP:
            return
        ends = {where.end for where in stretches} - {where.start for where in stretches}
        try:
            with open(f"/proc/{peer.pid}/maps", encoding="utf-8", errors="replace") as file:
                mappings = [line.split(maxsplit=1)[0].split("-") for line in file]
        except OSError:
            return
        if peer.exited():
            return  # the number may be another's
        for start, end in mappings:
            if int(start, 16) in ends:
                yield Range.between(int(start, 16), int(end, 16))


async def keep_trying(complete: Callable[[], Awaitable[None]], name: str) -> None:
    """Complete a target, however often its source fails meanwhile; errors are only logged.

    What is short for a while, as descriptors are, is a failure like a source's.

    Args:
        complete: Completes it, and goes on where it has failed before.
        name: Whose memory it is, for the log.

    Cancellation: as of ``complete``.
    """
    delay = _RETRY_FIRST
    while True:
        try:
            await complete()
        except (TargetGone, ClosedError):
            pass
        except NotSupported as error:
            log.warning("%s is served on: %s", name, error)
        except (UffdError, OSError) as error:  # also for want of a descriptor to look with
            log.warning(
                "%s cannot be completed yet, and is served on; again in %g s: %s",
                *(name, delay, error),
            )
            await asyncio.sleep(delay)
            delay = min(2 * delay, _RETRY_MOST)
            continue
        except Exception:  # a mistake, of a source's or ours, which another try only repeats
            log.exception("%s cannot be completed, and is served on", name)
        return


def pages_with_data(region: Region, extents: Extents) -> Iterator[tuple[int, int]]:
    """Give the (start, end) of whole pages of a region that hold data, each once."""
    first, last, size = region.offset, region.offset + region.length, region.page_size
    done = first
    for low, high in extents.within(first, last):
        # A region begins at any offset of small pages: its pages count from there.
        start = max(first + align_down(low - first, size), done)
        done = first + align_up(high - first, size)
        if start < done:
            yield start, done
