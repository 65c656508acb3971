"""What a server tells of itself, as plain data for JSON: health, sums, sessions, page maps.

Knows: a server, its sessions, their sources' accounts.
Must not know: HTTP, sockets, terminals.

``docs/reference/openapi.json`` describes what is given here, and a test compares the two.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Final, TypeAlias

from . import __version__, sharing
from .page_map import Books, PageMap, books_of, draw, open_pages
from .server import Server
from .session import Session
from .sources.measured import Reads
from .sources.shared import SharedImage
from .totals import Totals

#: What ``json.dumps`` takes.
Json: TypeAlias = dict[str, object]

MAX_CELLS: Final = 4096

_AT_ONCE: Final = 16  # sessions that are told of before the loop turns


class Status:
    """Gives a server's state as plain data.

    Attributes:
        server: The server.
        reads: The accounts of its sources.
        image: The name of what it serves, for people.
        shared: The copy of it that clones share, if they do.

    Sharing: the loop's thread.
    """

    def __init__(
        self,
        server: Server,
        *,
        reads: Sequence[Reads] = (),
        image: str = "",
        shared: SharedImage | None = None,
    ) -> None:
        self.server: Final = server
        self.reads: Final = tuple(reads)
        self.image: Final = image
        self.shared: Final = shared
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long it has been running, in seconds."""
        return round(time.monotonic() - self._began, 3)

    async def totals(self) -> Totals:
        """Add up all sessions, those that have ended included."""
        return await self.server.totals_in_steps()

    async def sharing(self) -> sharing.SharingFigures | None:
        """Give what clones share, looked up in their page tables, in threads.

        Returns:
            None if they do not share the image.

        Cancellation: nothing is left behind but a thread that finishes its scan.
        """
        if self.shared is None:
            return None
        return await sharing.figures(self.shared, self.server.sessions)

    def find(self, name: str) -> Session | None:
        """Find a living session by its id."""
        return next((one for one in self.server.sessions if one.id == name), None)

    def health(self) -> Json:
        """Say whether it takes new peers."""
        return {
            "status": "draining" if self.server.draining else "serving",
            "version": __version__,
            "pid": os.getpid(),
            "seconds": self.seconds,
            "socket": self.server.path,
            "image": self.image,
        }

    async def stats(self) -> Json:
        """Give the sums over all sessions since the server began.

        Cancellation: as ``sharing``.
        """
        shares = await self.sharing()
        totals = await self.totals()
        latency = totals.metrics.latency
        return {
            "seconds": self.seconds,
            "served": self.server.served,
            "refused": self.server.refused,
            "failed": self.server.failed,
            "living": len(self.server.sessions),
            "handshakes": len(self.server.handshakes),
            "memory_bytes": sum(
                region.length for one in self.server.sessions for region in one.handover.regions
            ),
            "in_flight": totals.in_flight,
            "sessions": totals.sessions,
            "counters": totals.counters.as_dict(),
            "outcomes": totals.metrics.outcomes,
            "events": totals.metrics.events,
            "errors": totals.metrics.failures,
            "failures": totals.failures,
            "prefetch": totals.prefetch.as_dict(),
            "latency": {
                "count": latency.count,
                "total_us": latency.total_ns / 1000,
                "p50_us": latency.quantile(0.5) / 1000,
                "p99_us": latency.quantile(0.99) / 1000,
            },
            "sources": [_reads(one) for one in self.reads],
            "sharing": None if shares is None else {**shares.as_dict()},
        }

    async def sessions(self) -> Json:
        """Give the living sessions, the oldest first."""
        living = sorted(self.server.sessions, key=lambda one: (len(one.id), one.id))
        told = []
        for number, one in enumerate(living, 1):
            told.append(summary(one))
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
        return {"sessions": told}

    async def session(self, session: Session, cells: int) -> Json | None:
        """Give all about one session, its page map included.

        Args:
            session: A living one.
            cells: How finely to draw each region, at most MAX_CELLS.

        Returns:
            None if it has ended meanwhile.

        Cancellation: nothing is left behind but a thread that finishes its scan.
        """
        regions = sorted(session.pager.regions, key=lambda region: region.offset)
        books = [books_of(region) for region in regions]
        peer = session.peer
        maps = await asyncio.to_thread(_draw_all, None if peer is None else peer.pid, books, cells)
        # Its pid was looked up before: if it lives now, that was no stranger's memory.
        if session.state.ended or (peer is not None and peer.exited()):
            return None
        return summary(session) | {
            "counters": session.counters().as_dict(),
            "outcomes": session.metrics.outcomes,
            "events": session.metrics.events,
            "errors": session.metrics.failures,
            "prefetch": session.prefetch.figures.as_dict(),
            "regions": [
                {
                    "name": region.name,
                    "start": region.start,
                    "length": region.length,
                    "offset": region.offset,
                    "page_size": region.page_size,
                    "map": asdict(drawn),
                }
                for region, drawn in zip(regions, maps, strict=True)
            ],
        }


def summary(session: Session) -> Json:
    """Give what a table of sessions shows of one."""
    peer = session.peer
    return {
        "id": session.id,
        "state": session.state.name.lower(),
        "outcome": session.outcome,
        "error": None if session.error is None else str(session.error),
        "peer": None if peer is None else {"pid": peer.pid, "uid": peer.uid, "gid": peer.gid},
        "dialect": session.handover.dialect,
        "in_flight": session.in_flight,
        "figures": session.figures().as_dict(),
    }


def _reads(one: Reads) -> Json:
    return {
        "name": one.name,
        "at_hand": one.at_hand,
        "waited": one.latency.count,
        "bytes": one.bytes,
        "errors": one.errors + one.errors_at_hand,
        "cancelled": one.cancelled,
        "p50_us": one.latency.quantile(0.5) / 1000,
        "p99_us": one.latency.quantile(0.99) / 1000,
    }


def _draw_all(pid: int | None, books: list[Books], cells: int) -> list[PageMap]:
    """Draw the regions of a session; in a thread."""
    pages = None if pid is None else open_pages(pid)
    try:
        return [draw(one, pages, cells) for one in books]
    finally:
        if pages is not None:
            pages.close()
