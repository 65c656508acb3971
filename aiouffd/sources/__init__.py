"""Where the bytes of pages come from: the Source protocol, and the extents of a source.

Knows: offsets and lengths in a source.
Must not know: addresses, page faults, page sizes; the handlers know those.

The contract of a Source (``aiouffd.testing.sources`` holds every source to it):

* A source never changes: the same offset gives the same bytes for its whole life.  A source
  that cannot keep that promise raises SourceError from then on, and never mixes.
* A read lies inside the source and gives exactly what was asked for, never less.
* ``read_nowait`` never waits.  None means: not at hand, ask ``read``.
* What lies in no extent reads as zeros; a handler then need not read at all.
* Who cannot tell holes from zeros says so by ``holes_known = False``: it is no layer over
  another source, which its zeros would hide.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..errors import SourceError

if TYPE_CHECKING:
    from typing_extensions import Buffer


@runtime_checkable
class Source(Protocol):
    """Bytes with addresses of their own, read at random."""

    @property
    def size(self) -> int:
        """Length of the source, in bytes; it does not change."""

    async def read(self, offset: int, length: int) -> Buffer:
        """Read exactly ``length`` bytes.

        Args:
            offset: Where to start, in bytes; not negative.
            length: How much, in bytes; above zero, and within ``size``.

        Returns:
            A buffer that the source never changes again.

        Raises:
            SourceError: The bytes cannot be had, or lie outside of the source.
            ClosedError: The source is closed.

        Cancellation: nothing is left behind; the same read may be asked for again.

        Sharing: any number of reads at once, all on one event loop.
        """

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """Read like ``read``, but only what can be had without waiting.

        Returns:
            The bytes, or None if they are not at hand.

        Raises:
            SourceError: As ``read``.
            ClosedError: As ``read``.

        Sharing: any thread, several at once: LazyMemory asks in the thread that touches.
        """

    def extents(self) -> Iterator[tuple[int, int]]:
        """Give the (offset, length) pairs that hold data, in order and disjoint.

        A source that does not know gives one pair that covers it all.
        """

    async def aclose(self) -> None:
        """Let go of what the source holds; a second call does nothing.

        Reads in flight end first; later ones raise ClosedError.
        """


@runtime_checkable
class Identified(Protocol):
    """A source that can say which generation of which bytes it is."""

    @property
    def identity(self) -> str:
        """One word that two sources share only if they hold the same bytes; "" if unknown.

        It does not change as long as the source is open, and asking costs little.
        """


@runtime_checkable
class ReadsInto(Protocol):
    """What a source may have besides: long reads into buffers that are used again and again."""

    async def readinto(self, offset: int, buffer: memoryview) -> None:
        """Read as ``Source.read``, so many bytes as the buffer has, without holding the loop.

        Raises:
            SourceError: As ``Source.read``.
            ClosedError: As ``Source.read``.

        Cancellation: the buffer may be written to for a while; do not use it again.
        """


@runtime_checkable
class ReadsIntoNowait(Protocol):
    """What a source may have besides: what is at hand, into a buffer that is used again and again.

    To make room for half a megabyte takes longer than to copy it from the page cache.
    """

    def readinto_nowait(self, offset: int, buffer: memoryview) -> bool:
        """Read as ``Source.read_nowait``, so many bytes as the buffer has.

        Returns:
            Whether they were at hand; if not, the buffer may hold anything.

        Raises:
            SourceError: As ``Source.read``.
            ClosedError: As ``Source.read``.

        Sharing: as ``Source.read_nowait``.
        """


@runtime_checkable
class SendsItself(Protocol):
    """What a source may have besides: bytes that go to a socket without coming through here."""

    def send_nowait(self, connection: int, offset: int, length: int) -> int | None:
        """Send bytes to a socket, as many as it takes now, without waiting.

        Args:
            connection: The socket's descriptor; it does not block.
            offset: As ``Source.read``.
            length: As ``Source.read``.

        Returns:
            How many it took; None if they are not at hand, or cannot be sent so: read them.

        Raises:
            SourceError: As ``Source.read``.
            ClosedError: As ``Source.read``.
            OSError: The connection is broken.
        """


def identity_of(source: Source) -> str:
    """Say which generation of which bytes a source holds.

    What was recorded about one generation (a working set, a session's page states) must not
    be used on another.

    Returns:
        The source's ``identity``, or "" if it has none.
    """
    return source.identity if isinstance(source, Identified) else ""


def knows_holes(source: Source) -> bool:
    """Say whether a source's extents are what it holds, and not just where it may hold data.

    Returns:
        The source's ``holes_known``, or True if it has none.
    """
    return bool(getattr(source, "holes_known", True))


def check_read(offset: int, length: int, size: int) -> None:
    """Refuse a read that does not lie inside a source.

    Raises:
        SourceError: It does not; the message says where it lies.
    """
    if offset < 0 or length <= 0 or offset + length > size:
        raise SourceError(
            f"a read of {length} bytes at offset {offset} lies outside of a source of {size} bytes"
        )


class Extents:
    """Which stretches of a source hold data: two sorted arrays, sixteen bytes per extent."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Collect extents; neighbours that touch become one.

        Args:
            pairs: (offset, length), in ascending order and disjoint.

        Raises:
            ValueError: They are not.
        """
        self._starts = array("Q")
        self._ends = array("Q")
        for offset, length in pairs:
            self.add(offset, length)

    def add(self, offset: int, length: int) -> None:
        """Add an extent behind all others.

        Raises:
            ValueError: It does not lie behind them, or is empty.
        """
        last = self._ends[-1] if self._ends else 0
        if offset < last or length <= 0:
            raise ValueError(f"extents ascend and are disjoint: {offset}, {length}")
        if self._ends and offset == last:
            self._ends[-1] = offset + length
        else:
            self._starts.append(offset)
            self._ends.append(offset + length)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for start, end in zip(self._starts, self._ends, strict=True):
            yield start, end - start

    def __len__(self) -> int:
        return len(self._starts)

    def holds(self, offset: int, length: int) -> bool:
        """Say whether any byte of a stretch lies in an extent."""
        at = bisect_right(self._starts, offset) - 1
        if at >= 0 and self._ends[at] > offset:
            return True
        return at + 1 < len(self._starts) and self._starts[at + 1] < offset + length

    def within(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Give the (start, end) of what lies between two offsets, clipped, in order."""
        at = max(bisect_right(self._starts, start) - 1, 0)
        while at < len(self._starts) and self._starts[at] < end:
            low, high = max(self._starts[at], start), min(self._ends[at], end)
            if low < high:
                yield low, high
            at += 1

    def around(self, offset: int) -> tuple[int, int] | None:
        """Give start and end of the extent that a byte lies in; None if it lies in none."""
        at = bisect_right(self._starts, offset) - 1
        if at < 0 or self._ends[at] <= offset:
            return None
        return self._starts[at], self._ends[at]

    def cover(self, size: int) -> bool:
        """Say whether there is no hole in the first ``size`` bytes."""
        return len(self) == 1 and self._starts[0] == 0 and self._ends[0] >= size
