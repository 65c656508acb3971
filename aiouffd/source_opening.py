"""Which source a session gets: one for all, one of its own, or that of its part of the image.

Knows: sources, their extents, when they are opened and closed.
Must not know: sessions, peers, what a part is.

Laws of this file:

* What was opened for a session is closed behind it, also if nobody waits for it any more.
* Nothing here holds up serving: opening and collecting extents is done in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Protocol, TypeAlias, runtime_checkable

from .errors import SourceError, UffdError
from .sources import Extents, Source


@runtime_checkable
class ImageParts(Protocol):
    """An image of several parts, each of which is somebody's memory."""

    async def open_part(self, part: str) -> Source:
        """Open the source of a part, the caller's to close.

        Args:
            part: As ``Handover.part`` has it.

        Raises:
            SourceError: There is no such part, or it cannot be read.

        Cancellation: nothing is left open.
        """


#: One source for all sessions, which stays its maker's to close; or a function that opens one
#: for each session, in a thread, which the session closes.
SourceOrOpener: TypeAlias = Source | Callable[[], Source]


class SourceOpening:
    """Gives each session its source, and the source's extents.

    Sharing: the loop's thread.
    """

    def __init__(self, source: SourceOrOpener | ImageParts) -> None:
        """Prepare; nothing is opened yet.

        Args:
            source: Of all, or an image in parts.
        """
        self._source = source
        self._extents: Extents | None = None

    async def try_it(self) -> None:
        """Find out whether the source can be had: better now than with the first peer.

        Parts are not tried.

        Raises:
            SourceError: It cannot.
        """
        if callable(self._source):
            async with self.open():
                pass
        elif not isinstance(self._source, ImageParts):
            self._extents = await asyncio.to_thread(_extents_of, self._source)

    @contextlib.asynccontextmanager
    async def open(self, part: str = "") -> AsyncIterator[tuple[Source, Extents]]:
        """Give a session its source; what was opened for it is closed at the end of the block.

        Args:
            part: Of the image, where it has parts.

        Raises:
            SourceError: It cannot be opened.
        """
        if isinstance(self._source, ImageParts):
            source = await self._source.open_part(part)
            collecting = asyncio.ensure_future(asyncio.to_thread(_extents_of, source))
            try:
                yield source, await asyncio.shield(collecting)
            finally:
                await asyncio.wait([collecting])  # a thread cannot be cancelled
                await source.aclose()
            return
        if not callable(self._source):
            if self._extents is None:
                self._extents = await asyncio.to_thread(_extents_of, self._source)
            yield self._source, self._extents
            return
        # A thread cannot be cancelled: whatever it opens is closed, wanted or not.
        opening = asyncio.ensure_future(_open(self._source))
        try:
            source, extents = await asyncio.shield(opening)
        except asyncio.CancelledError:
            with contextlib.suppress(UffdError, OSError):
                await (await opening)[0].aclose()
            raise
        try:
            yield source, extents
        finally:
            await source.aclose()


async def _open(opener: Callable[[], Source]) -> tuple[Source, Extents]:
    """Open a source and collect its extents, in threads: both may take a while."""
    source = await asyncio.to_thread(opener)
    try:
        return source, await asyncio.to_thread(_extents_of, source)
    except BaseException:
        await source.aclose()
        raise


def _extents_of(source: Source) -> Extents:
    try:
        return Extents(source.extents())
    except ValueError as error:
        raise SourceError(f"the source's extents are unusable: {error}") from error
