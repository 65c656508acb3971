"""A source around a source that counts what it gives and how long that took.

Knows: reads of any source, plain counters, one histogram.
Must not know: what the source is; who reads the counters, and in which format.

What is at hand costs two additions and no clock; what must be waited for is timed.  Errors are
counted and passed on as they are.  Whenever no read is under way:
``reads`` = ``latency.count`` + ``errors`` + ``cancelled``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ..metrics import Histogram
from . import ReadsInto, ReadsIntoNowait, Source, identity_of, knows_holes

if TYPE_CHECKING:
    from typing_extensions import Buffer

_Data = TypeVar("_Data")


@dataclass(slots=True, eq=False)
class Reads:
    """What has been read from one source, or from several under one name."""

    name: str
    at_hand: int = 0  #: reads that were answered without waiting
    at_hand_bytes: int = 0  #: what those gave, in bytes
    reads: int = 0  #: reads that had to wait, those under way included
    waited_bytes: int = 0  #: what those gave, in bytes
    errors: int = 0  #: of these, reads that raised
    errors_at_hand: int = 0  #: reads that raised without waiting
    cancelled: int = 0  #: reads that nobody waited for any more
    latency: Histogram = field(default_factory=Histogram)  #: of reads that waited and succeeded

    @property
    def bytes(self) -> int:
        """All that was given, in bytes."""
        return self.at_hand_bytes + self.waited_bytes


class MeasuredSource:
    """Gives what another source gives, and counts it.

    Attributes:
        source: The one that is measured; closed with this one.
        figures: What was counted so far.

    Sharing: as the source's; a count may be missed where threads read at the same moment.
    """

    def __init__(self, source: Source, name: str, figures: Reads | None = None) -> None:
        """Measure a source.

        Args:
            source: Any.
            name: What the figures are called, such as ``image`` or ``fallback``.
            figures: Count here instead, together with others: a server's sessions have
                sources of their own and one account.
        """
        self.source: Final = source
        self.figures: Final = figures if figures is not None else Reads(name)
        self._read_nowait = source.read_nowait
        if isinstance(source, ReadsInto):  # or nobody must believe that it can do that
            self._source_readinto = source.readinto
            self.readinto = self._readinto
        if isinstance(source, ReadsIntoNowait):
            self._source_readinto_nowait = source.readinto_nowait
            self.readinto_nowait = self._readinto_nowait

    @property
    def size(self) -> int:
        """Length of the source, in bytes."""
        return self.source.size

    @property
    def identity(self) -> str:
        """Which generation of which image it is, if the source says so."""
        return identity_of(self.source)

    @property
    def holes_known(self) -> bool:
        """Whether the source's extents are what it holds."""
        return knows_holes(self.source)

    def extents(self) -> Iterator[tuple[int, int]]:
        """Give the source's extents."""
        return self.source.extents()

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """Read what is at hand, and count it."""
        try:
            data = self._read_nowait(offset, length)
        except Exception:
            self.figures.errors_at_hand += 1
            raise
        if data is not None:
            self._count_at_hand(length)
        return data

    def _readinto_nowait(self, offset: int, buffer: memoryview) -> bool:
        try:
            found = self._source_readinto_nowait(offset, buffer)
        except Exception:
            self.figures.errors_at_hand += 1
            raise
        if found:
            self._count_at_hand(buffer.nbytes)
        return found

    def _count_at_hand(self, length: int) -> None:
        self.figures.at_hand += 1
        self.figures.at_hand_bytes += length

    async def read(self, offset: int, length: int) -> Buffer:
        """Read, count and time it.

        Cancellation: as the source's; counted.
        """
        return await self._counted(self.source.read(offset, length), length)

    async def _readinto(self, offset: int, buffer: memoryview) -> None:
        await self._counted(self._source_readinto(offset, buffer), buffer.nbytes)

    async def _counted(self, reading: Coroutine[Any, Any, _Data], length: int) -> _Data:
        figures = self.figures
        figures.reads += 1
        began_ns = time.perf_counter_ns()
        try:
            data = await reading
        except asyncio.CancelledError:
            figures.cancelled += 1
            raise
        except Exception:
            figures.errors += 1
            raise
        figures.latency.add(time.perf_counter_ns() - began_ns)
        figures.waited_bytes += length
        return data

    async def aclose(self) -> None:
        """Close the source."""
        await self.source.aclose()
