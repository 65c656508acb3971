"""Ready-made handlers: pages from a source, from a shared image, pages of zeros.

Knows: how a page maps to a stretch of a source, holes, the last partial page.
Must not know: userfaultfds, sessions, how answers are carried out.

Laws of this file:

* A source is never asked for bytes behind its end: what lies there reads as zeros, up to the
  end of the page that holds the last byte; a page wholly behind it is an error, for nobody
  has promised what it holds.
* A hole is a page of zeros without a read.
* What the source has at hand is answered without suspending: that costs no task.
* A page that a minor fault reports is there already: it is mapped, never read and never copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .errors import SourceError
from .events import PageFault
from .ranges import align_up, is_aligned
from .resolutions import Answer, Continue, Copy, Handler, Unprotect, Wake, Zero
from .sources import Extents, Source

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Mapped around a minor fault at most: so much is done at once, before its thread goes on.
#: More would be a task, which the next fault of a thread that reads on overtakes.
_MAPPED_AT_ONCE: Final = 256 * 1024


async def zeroes(fault: PageFault) -> Answer:
    """Answer every fault with zeros; let writers and minor faults go on."""
    return _not_missing(fault) or Zero()


def from_source(
    source: Source,
    *,
    extents: Extents | None = None,
    chunk: int = 0,
    within: tuple[int, int] | None = None,
) -> Handler:
    """Make a handler that fills pages with the bytes of a source.

    Missing pages are filled, writers to protected pages are let go on.  Minor faults are
    answered with the page that is there, in memory that maps the source's own (SharedImage).

    Args:
        source: Where the bytes come from; it stays the caller's to close.
        extents: The source's extents, when they have been collected before.
        chunk: Bring so many bytes around each fault, a power of two; what is there already
            or was removed stays as it is.  0 brings one page.  Around a minor fault it maps
            what the source holds without a hole, at most 256 KiB.
        within: (start, end) offsets that a chunk must not leave: those of the range served.
            Without it a chunk ends at the source's ends.

    Raises:
        ValueError: The chunk is no power of two.

    Sharing: one handler may serve any number of ranges and pagers of one loop.
    """
    if chunk and chunk & (chunk - 1):
        raise ValueError(f"a chunk is a power of two: {chunk}")
    size = source.size
    if extents is None:
        extents = Extents(source.extents())
    has_holes = not extents.cover(size)
    holds = extents.holds
    read_nowait = source.read_nowait
    first, last = within if within is not None else (0, size)
    mapped = min(chunk, _MAPPED_AT_ONCE)

    async def read(offset: int, length: int) -> Buffer:
        """Read a page or a chunk; what lies behind the source's end is zeros."""
        inside = min(length, size - offset)
        data = read_nowait(offset, inside)
        if data is None:
            data = await source.read(offset, inside)
        return data if inside == length else _padded(data, length)

    def continue_(fault: PageFault) -> Continue:
        """Map a page that is there, and its neighbours as far as they are."""
        offset, length = fault.offset, fault.length
        run = extents.around(offset) if mapped > length else None
        if run is None:  # among them: a hole that another clone has touched
            return Continue()
        begin = offset & -mapped
        start = max(begin, first, run[0] & -length)
        end = min(begin + mapped, align_up(last, length), align_up(run[1], length))
        if not (is_aligned(offset - start, length) and is_aligned(end - offset, length)):
            return Continue()
        return Continue(end - start, fault.address - (offset - start))

    async def fill(fault: PageFault) -> Answer:
        if not fault.missing:
            return continue_(fault) if fault.minor else _not_missing(fault)
        offset, length = fault.offset, fault.length
        if offset >= size:
            raise SourceError(
                f"the page at {fault.address:#x} lies at offset {offset:#x},"
                f" behind the end of its source ({size:#x} bytes)",
                fault.address,
            )
        if chunk <= length:
            if has_holes and not holds(offset, length):
                return Zero()
            if offset + length <= size:  # the common case, as short as it gets
                data = read_nowait(offset, length)
                return await source.read(offset, length) if data is None else data
            return await read(offset, length)
        start = max(offset & -chunk, first)
        end = min((offset & -chunk) + chunk, align_up(min(last, size), length))
        if not (is_aligned(offset - start, length) and is_aligned(end - offset, length)):
            start, end = offset, offset + length
        address = fault.address - (offset - start)
        if has_holes and not holds(start, end - start):
            return Zero(end - start, address)
        if has_holes and not holds(offset, length):
            return Zero()  # its neighbours are brought when they are asked for
        return Copy(await read(start, end - start), address)

    return fill


def _padded(data: Buffer, length: int) -> bytes:
    view = memoryview(data).cast("B")
    return bytes(view) + bytes(length - len(view))


def _not_missing(fault: PageFault) -> Answer:
    if fault.missing:
        return None
    return Unprotect() if fault.wp else Continue() if fault.minor else Wake()
