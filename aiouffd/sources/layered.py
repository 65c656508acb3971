"""A base and any number of sparse layers over it: of what lies over each other, the newest wins.

Knows: which layer each stretch of the image comes from.
Must not know: what the layers are, page faults.

What a layer holds is what its extents say (for a file: what is no hole); where it holds
nothing, the layer below shows.  Where no layer holds anything the image reads as zeros.  The
image is as long as the longest of them: a layer says nothing about what lies behind its end.

Laws of this file:

* The table of who is where is made once; a read looks it up by bisection.
* A read that lies in one layer is that layer's answer as it is, without a copy.
* One read per layer and neighbourhood: stretches of a layer with little between them are read
  together, and what lies between is thrown away.  All are under way at once.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from ..errors import SourceError
from . import Extents, Source, check_read, identity_of, knows_holes
from .reads import ReadsUnderWay, all_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Bytes between two stretches of a layer that are cheaper to read than to leave out.
READ_THROUGH: Final = 64 * 1024

_NOBODY: Final = -1  # owns what reads as zeros

#: A stretch: (start, end, number of the layer that owns it).
_Run: TypeAlias = tuple[int, int, int]


class Layer(NamedTuple):
    """A layer whose extents are known from elsewhere, such as an index beside a full copy.

    Attributes:
        source: Its bytes, at the offsets that they have in the image.
        extents: (offset, length) of what counts, ascending and disjoint.
    """

    source: Source
    extents: Iterable[tuple[int, int]]


class LayeredSource:
    """An image made of a base and sparse diffs.

    ::

        image = LayeredSource(FileSource("base"), FileSource("monday"), FileSource("tuesday"))
    """

    def __init__(self, base: Source | Layer, *layers: Source | Layer) -> None:
        """Lay sources over each other.

        Args:
            base: The lowest.
            layers: From the oldest to the newest.  All are closed with the image.

        Raises:
            SourceError: Extents are out of order, or lie outside of their source; or a layer
                does not know its holes, and would hide all that is below it.
        """
        for number, layer in enumerate(layers, 1):
            if not isinstance(layer, Layer) and not knows_holes(layer):
                raise SourceError(
                    f"layer {number} lies where holes are not kept, and would hide the image with"
                    " zeros: pack it (aiouffd image diff --pack)"
                )
        parts = [
            part if isinstance(part, Layer) else Layer(part, part.extents())
            for part in (base, *layers)
        ]
        self._sources = tuple(part.source for part in parts)
        self._size = max(source.size for source in self._sources)
        self._starts, self._owners = _table(parts, self._size)
        self._identity: str | None = None
        self._reads = ReadsUnderWay("this layered source")

    @property
    def size(self) -> int:
        """Length of the longest layer, in bytes."""
        return self._size

    @property
    def layers(self) -> tuple[Source, ...]:
        """What lies over each other, the base first."""
        return self._sources

    @property
    def identity(self) -> str:
        """A digest of the layers' identities and of where each shows; "" if one has none."""
        if self._identity is None:
            digest = hashlib.sha256()
            names = [identity_of(source) for source in self._sources]
            for name in names:
                digest.update(name.encode() + b"\n")
            digest.update(self._starts.tobytes() + self._owners.tobytes())
            self._identity = f"layers:{digest.hexdigest()}" if all(names) else ""
        return self._identity

    def extents(self) -> Iterator[tuple[int, int]]:
        """Give what any layer holds."""
        merged = Extents(
            (start, end - start)
            for start, end, owner in self._runs(0, self._size)
            if owner != _NOBODY
        )
        return iter(merged)

    def owner_of(self, offset: int) -> Source | None:
        """Say which layer a byte comes from; None if it is a zero that nobody holds."""
        check_read(offset, 1, self._size)
        owner = self._owners[bisect_right(self._starts, offset) - 1]
        return None if owner == _NOBODY else self._sources[owner]

    def _runs(self, start: int, end: int) -> Iterator[_Run]:
        """Walk a stretch of the table."""
        at = bisect_right(self._starts, start) - 1
        while start < end:
            behind = self._starts[at + 1] if at + 1 < len(self._starts) else self._size
            yield start, min(behind, end), self._owners[at]
            start = behind
            at += 1

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """Read what every layer concerned has at hand."""
        self._reads.check()
        check_read(offset, length, self._size)
        runs = list(self._runs(offset, offset + length))
        if len(runs) == 1:
            owner = runs[0][2]
            if owner == _NOBODY:
                return bytes(length)
            return self._sources[owner].read_nowait(offset, length)
        got = []
        for start, end, owner in _spans(runs):
            data = self._sources[owner].read_nowait(start, end - start)
            if data is None:
                return None
            got.append((start, owner, data))
        return _assemble(offset, length, runs, got)

    async def read(self, offset: int, length: int) -> Buffer:
        """Read from every layer concerned, from all at once.

        Raises:
            SourceError: A layer raised it; the reads of the others are cancelled.
            ClosedError: The source is closed.

        Cancellation: the reads of the layers are cancelled with it.
        """
        self._reads.check()
        check_read(offset, length, self._size)
        runs = list(self._runs(offset, offset + length))
        with self._reads:
            if len(runs) == 1:
                owner = runs[0][2]
                if owner == _NOBODY:
                    return bytes(length)
                return await self._sources[owner].read(offset, length)
            spans = _spans(runs)
            answers = await all_of(
                [self._sources[owner].read(start, end - start) for start, end, owner in spans]
            )
        got = [(start, owner, data) for (start, _, owner), data in zip(spans, answers, strict=True)]
        return _assemble(offset, length, runs, got)

    async def aclose(self) -> None:
        """Let reads in flight end, then close every layer.

        Cancellation: some layers may still be open; call again.
        """
        await self._reads.end()
        failed: BaseException | None = None
        for source in self._sources:
            try:
                await source.aclose()
            except Exception as error:  # the others are closed all the same
                failed = failed or error
        if failed is not None:
            raise failed


def _table(parts: list[Layer], size: int) -> tuple[array[int], array[int]]:
    """Lay extents over each other: where runs start, and who owns each."""
    runs: list[tuple[int, int]] = [(0, _NOBODY)]  # start, owner; each ends where the next starts
    for number, (source, pairs) in enumerate(parts):
        try:
            extents = list(Extents(pairs))
        except ValueError as error:
            raise SourceError(f"layer {number}: {error}") from error
        if extents and sum(extents[-1]) > source.size:
            raise SourceError(
                f"layer {number} has {source.size} bytes, but an extent up to {sum(extents[-1])}"
            )
        runs = list(_overlaid(runs, extents, number, size))
    starts, owners = array("Q"), array("i")
    for start, owner in runs:
        if not owners or owners[-1] != owner:
            starts.append(start)
            owners.append(owner)
    return starts, owners


def _overlaid(
    runs: list[tuple[int, int]], extents: list[tuple[int, int]], number: int, size: int
) -> Iterator[tuple[int, int]]:
    """Put one layer over the runs so far; both are walked once."""
    at = 0
    position = 0

    def below(until: int) -> Iterator[tuple[int, int]]:
        """Give the runs below from the position on."""
        nonlocal at, position
        while position < until:
            end = runs[at + 1][0] if at + 1 < len(runs) else size
            yield position, runs[at][1]
            position = min(end, until)
            if position == end:
                at += 1

    for offset, length in extents:
        yield from below(offset)
        yield offset, number
        position = offset + length
        while at + 1 < len(runs) and runs[at + 1][0] <= position:
            at += 1
    yield from below(size)


def _spans(runs: list[_Run]) -> list[_Run]:
    """Give what to read of which layer so that all runs are in it, in few reads."""
    last: dict[int, int] = {}  # by owner: its latest span
    spans: list[_Run] = []
    for start, end, owner in runs:
        if owner == _NOBODY:
            continue
        at = last.get(owner)
        if at is not None and start - spans[at][1] <= READ_THROUGH:
            spans[at] = (spans[at][0], end, owner)
        else:
            last[owner] = len(spans)
            spans.append((start, end, owner))
    return spans


def _assemble(
    offset: int, length: int, runs: list[_Run], got: list[tuple[int, int, Buffer]]
) -> bytearray:
    """Copy each run to its place, once; what nobody owns stays zero."""
    whole = bytearray(length)
    spans: dict[int, list[tuple[int, memoryview]]] = {}
    for start, owner, data in got:
        spans.setdefault(owner, []).append((start, memoryview(data).cast("B")))
    with memoryview(whole) as target:
        for start, end, owner in runs:
            if owner == _NOBODY:
                continue
            mine = spans[owner]
            if len(mine) > 1 and mine[1][0] <= start:
                mine.pop(0)  # runs come in order, and so do the spans of each owner
            first, view = mine[0]
            target[start - offset : end - offset] = view[start - first : end - first]
    return whole
