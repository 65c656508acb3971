"""Residency: finding out that a target has all of its pages, though only demand brought them.

Knows: one pager's counters, where its source has data, the target's page tables.
Must not know: sessions; what is done about it.

Counting alone cannot tell: a page may be brought twice, or removed before it ever came.  So
what was brought is compared with what there is to bring, in one subtraction for many faults,
and only when that may be all of it the page tables are asked.

Laws of this file:

* A fault costs no more for it than counting down by one.
* The page tables are walked in a thread: it takes long in large memory.
* Who may not look into the target, or finds pages missing again and again, gives up: then only
  whoever brings everything on purpose knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Final

from .errors import NotSupported, ResolutionRefused
from .handover import Peer
from .kernel import abi, pagemap
from .pager import Pager
from .ranges import PAGE_SIZE, Range
from .region import Region

NEVER: Final = 1 << 62  #: faults until somebody should ask again
_LOOKS: Final = 64  # in vain
_REST_SECONDS: Final = 0.05  # until the rest of a long answer is there
_THERE: Final = abi.PAGE_IS_PRESENT | abi.PAGE_IS_SWAPPED


class Residency:
    """Watches one target until it is resident.

    Sharing: the loop's thread.
    """

    def __init__(
        self,
        pager: Pager,
        data: list[tuple[Region, int, int]],
        *,
        peer: Peer | None,
        most: int,
        on_resident: Callable[[], object],
        ask_again: Callable[[], object],
    ) -> None:
        """Prepare.

        Args:
            pager: The target's.
            data: Each region with the (start, end) of a stretch of its pages that hold data.
            peer: The target; without it nothing can be found out.
            most: Bytes that one fault may bring at most.
            on_resident: Called once, if it comes to that.
            ask_again: Called when ``faults_left`` has something new to say.
        """
        self._pager = pager
        self._data = data
        self._peer = peer
        self._most = most
        self._on_resident = on_resident
        self._ask_again = ask_again
        self._goal = sum(end - start for _, start, end in data)
        self._before: int | None = None  # bytes that the process before us had brought
        self._looks = 0
        self._looking: asyncio.Task[None] | None = None
        self._over = peer is None or not data

    def faults_left(self) -> int:
        """Say after how many faults to ask again; begin to look if this may be all."""
        if self._over or self._looking is not None:
            return NEVER
        missing = self._goal - self._brought()
        if missing >= self._most:
            return missing // self._most
        # The rest of a long answer comes right behind the end of its fault.
        self._looking = asyncio.create_task(self._look(), name="aiouffd residency")
        return NEVER

    async def aclose(self) -> None:
        """Look no more."""
        self._over = True
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])

    def _brought(self) -> int:
        counters = self._pager.counters
        removed = len(self._pager.space.removed) * PAGE_SIZE
        if self._before is None:
            self._before = sum(
                len(region.filled_before) * region.page_size
                for region in {region for region, _, _ in self._data}
                if region.filled_before is not None
            )
        return self._before + counters.copied_bytes + counters.filled_bytes + removed

    async def _look(self) -> None:
        pager = self._pager
        again = self._most > PAGE_SIZE  # a long answer may still be under way
        while not self._over and not pager.closing and not pager.target_gone:
            pager.read_events()
            brought, events = self._brought(), pager.counters.events
            with contextlib.suppress(NotSupported, ResolutionRefused, OSError):
                missing = await asyncio.to_thread(self._missing, self._places())
                if missing == 0 and events == pager.counters.events:
                    self._over = True
                    self._on_resident()
                    return
                self._looks += 1
                self._over = self._looks >= _LOOKS
                self._goal = brought + max(missing, PAGE_SIZE)
                if self._brought() >= self._goal or missing == 0:
                    continue  # more has come meanwhile
                if again:
                    again = False
                    await asyncio.sleep(_REST_SECONDS)
                    continue
                self._looking = None
                self._ask_again()
                return
            return  # it cannot be found out

    def _places(self) -> list[Range]:
        """List where there has to be a page."""
        space = self._pager.space
        return [
            gap
            for region, start, end in self._data
            for where in space.addresses(region, start, end - start, region.start - region.offset)
            for gap in region.fillable(where)
        ]

    def _missing(self, places: list[Range]) -> int:
        """Count the bytes of pages that are not there."""
        assert self._peer is not None  # noqa: S101 - or it would be over
        fd = pagemap.open_pagemap(self._peer.pid)
        try:
            if self._peer.exited():
                raise ProcessLookupError(self._peer.pid)
            return sum(
                run.length
                for place in places
                for run in pagemap.regions(
                    fd, place.start, place.end, required=_THERE, inverted=_THERE, report=0
                )
            )
        finally:
            os.close(fd)
