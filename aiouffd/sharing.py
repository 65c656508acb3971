"""What sharing one image between clones saves.

Knows: the page tables of served targets, what the shared copy takes.
Must not know: how the copy was made, how targets are served.

What is counted, for each living target and what it has mapped at this moment:

* *mapped*: pages of its regions that are pages of the shared copy;
* *private*: pages of its regions that it has written: copies of its own;
* *saved*: all that is mapped, less what the copy takes.  It is what the targets' memory would
  take more if each had its own copy of the pages that it maps; below zero as long as they map
  less than the copy takes.

The kernel is asked (PAGEMAP_SCAN, Linux 6.7), in a thread, only when somebody wants to know:
counting faults would miss what is unmapped, and writes say nothing.  Children that a target has
forked are not looked at; neither is a target that this user may not look into.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .errors import NotSupported, ResolutionRefused
from .fds import OwnedFd
from .kernel import abi, pagemap
from .session import Session
from .sources.shared import SharedImage


class Mapped(NamedTuple):
    """Pages of one target.

    Attributes:
        mapped_bytes: Pages of the shared copy, in bytes.
        private_bytes: Its own copies, in bytes.
    """

    mapped_bytes: int
    private_bytes: int


@dataclass(frozen=True, slots=True)
class SharingFigures:
    """What all clones together share; see the top of this module.

    Attributes:
        clones: Targets that were looked at.
        image_bytes: What the one copy takes, in bytes.
        hole_bytes: Of these, zeros that clones have put into holes, in bytes.
        mapped_bytes: In bytes, over all clones.
        private_bytes: In bytes, over all clones.
    """

    clones: int
    image_bytes: int
    hole_bytes: int
    mapped_bytes: int
    private_bytes: int

    @property
    def saved_bytes(self) -> int:
        """What sharing saves, in bytes; below zero if it costs."""
        return self.mapped_bytes - self.image_bytes

    def as_dict(self) -> dict[str, int]:
        """Give all figures by name."""
        return dataclasses.asdict(self) | {"saved_bytes": self.saved_bytes}


def mapped(pid: int, ranges: Iterable[tuple[int, int]]) -> Mapped:
    """Count the pages of a process that come from a file, and those that do not.

    Kernel: PAGEMAP_SCAN, since Linux 6.7.

    Args:
        pid: The process.
        ranges: (start, end) of memory that maps the shared copy.

    Raises:
        NotSupported: This user may not look, or the kernel cannot.
        TargetGone: The process has exited.
    """
    shared = private = 0
    with OwnedFd(pagemap.open_pagemap(pid)) as fd:
        for start, end in ranges:
            for region in pagemap.regions(
                fd.fileno(),
                start,
                end,
                any_of=abi.PAGE_IS_PRESENT | abi.PAGE_IS_SWAPPED,
                report=abi.PAGE_IS_FILE,
            ):
                if region.categories & abi.PAGE_IS_FILE:
                    shared += region.length
                else:
                    private += region.length
    return Mapped(shared, private)


async def figures(image: SharedImage, sessions: Iterable[Session]) -> SharingFigures:
    """Look at all clones that live.

    Args:
        image: What they share.
        sessions: Those that serve them; others are passed over.

    Cancellation: nothing is left behind.
    """
    clones = shared = private = 0
    for session in tuple(sessions):
        if session.peer is None or not session.handover.backed or session.state.ended:
            continue
        ranges = [
            (where.start, where.end)
            for region in session.pager.regions
            for where, _ in region.ranges
        ]
        try:
            found = await asyncio.to_thread(mapped, session.peer.pid, ranges)
        except (NotSupported, ResolutionRefused, OSError):
            continue
        if session.peer.exited():  # its number may have become another's
            continue
        clones += 1
        shared += found.mapped_bytes
        private += found.private_bytes
    taken = image.figures()
    return SharingFigures(clones, taken.resident_bytes, taken.hole_bytes, shared, private)
