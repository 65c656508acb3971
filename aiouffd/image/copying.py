"""What is put into a new image: a copy of a source, or what differs between two; and digests.

Knows: sources, pages.
Must not know: what an image is written as.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

from ..errors import SourceError
from ..sources import Extents, Source
from ..threads import in_thread
from . import PAGE, ImageWriter, Watcher, watch_nothing

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Read at once, in bytes; at multiples of it.
PIECE_BYTES: Final = 1 << 20

_AHEAD: Final = 4  # reads under way, for what is far away
_ZEROS: Final = bytes(PAGE)


async def copy(
    source: Source,
    writer: ImageWriter,
    *,
    dig_holes: bool = False,
    watch: Watcher = watch_nothing,
) -> int:
    """Copy what a source holds; its extents are kept.

    Args:
        source: What to copy; it stays open.
        writer: For an image of the same size; it is finished.
        dig_holes: Make holes of pages that are zeros.  Right for an image, wrong for a layer
            over another image, where such a page hides what lies below.
        watch: Called now and then.

    Returns:
        How much of the image is data, in bytes.

    Raises:
        SourceError: The source failed.
        OSError: The image cannot be written.
    """
    count = 0
    async with aclosing(read_in_order(source, pieces(source.extents()))) as reads:
        async for offset, data in reads:
            runs = [(0, len(data))]
            if dig_holes:
                runs = await in_thread(differing_pages, data, None)
            count += await _put(writer, offset, data, runs)
            watch(offset + len(data), source.size)
    await writer.finish()
    watch(source.size, source.size)
    return count


async def diff(
    base: Source, new: Source, writer: ImageWriter, *, watch: Watcher = watch_nothing
) -> int:
    """Write a layer that makes one image of another: the pages that differ.

    Pages that became zeros are data; only what is the same is a hole.

    Args:
        base: What the layer will lie over.
        new: What comes out then.
        writer: For an image of the size of ``new``; it is finished.
        watch: Called now and then.

    Returns:
        How much of the layer is data, in bytes.

    Raises:
        SourceError: A source failed; or the new one is shorter, which no layer can say.
        OSError: The layer cannot be written.
    """
    if new.size < base.size:
        raise SourceError(
            f"the new image has {new.size} bytes, fewer than the {base.size} of its base:"
            " a layer cannot make an image shorter"
        )
    count = 0
    held = (Extents(base.extents()), Extents(new.extents()))
    wanted = [
        (offset, length)
        for offset, length in pieces([(0, new.size)] if new.size else [])
        if any(extents.holds(offset, length) for extents in held)
    ]
    async with (
        aclosing(read_in_order(base, _inside(wanted, base.size))) as befores,
        aclosing(read_in_order(new, wanted)) as afters,
    ):
        async for offset, data in afters:
            before = (await anext(befores))[1] if offset < base.size else b""
            runs = await in_thread(differing_pages, data, before)
            count += await _put(writer, offset, data, runs)
            watch(offset + len(data), new.size)
    await writer.finish()
    watch(new.size, new.size)
    return count


async def _put(
    writer: ImageWriter, offset: int, data: bytes, runs: Iterable[tuple[int, int]]
) -> int:
    """Put stretches of what was read at an offset; count their bytes."""
    count = 0
    view = memoryview(data)
    for start, length in runs:
        await writer.put(offset + start, view[start : start + length])
        count += length
    return count


async def sha256(source: Source, *, watch: Watcher = watch_nothing) -> bytes:
    """Take the digest of all bytes of a source; holes are zeros.

    Raises:
        SourceError: The source failed.
    """
    digest = hashlib.sha256()
    done = 0
    async with aclosing(read_in_order(source, pieces(source.extents()))) as reads:
        async for offset, data in reads:
            await in_thread(_update, digest, offset - done, data)
            done = offset + len(data)
            watch(done, source.size)
    await in_thread(_update, digest, source.size - done, b"")
    watch(source.size, source.size)
    return digest.digest()


def differing_pages(data: bytes, other: bytes | None) -> list[tuple[int, int]]:
    """Find runs of pages that differ.

    Args:
        data: Some pages; the last one need not be whole.
        other: What to compare with; zeros follow if it is shorter, or None for zeros alone.

    Returns:
        (offset, length) of each run, in bytes, in order.
    """
    if data == other:
        return []
    runs = Extents([])
    other = other or b""
    for at in range(0, len(data), PAGE):
        page = data[at : at + PAGE]
        before = other[at : at + PAGE]
        if len(before) < len(page):
            before += _ZEROS[: len(page) - len(before)]
        if page != before[: len(page)]:
            runs.add(at, len(page))
    return list(runs)


def _update(digest: hashlib._Hash, zeros: int, data: bytes) -> None:
    nothing = bytes(min(zeros, PIECE_BYTES))
    while zeros:
        take = min(zeros, PIECE_BYTES)
        digest.update(nothing[:take] if take < len(nothing) else nothing)
        zeros -= take
    digest.update(data)


def pieces(extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Cut extents at multiples of PIECE_BYTES."""
    for start, length in extents:
        at, end = start, start + length
        while at < end:
            take = min(end - at, PIECE_BYTES - at % PIECE_BYTES)
            yield at, take
            at += take


def _inside(wanted: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """Cut pieces off at the end of a shorter source."""
    for offset, length in wanted:
        if offset < size:
            yield offset, min(length, size - offset)


async def read_in_order(
    source: Source, wanted: Iterable[tuple[int, int]]
) -> AsyncGenerator[tuple[int, bytes], None]:
    """Read pieces, some ahead of the one that is given."""
    ahead: deque[tuple[int, asyncio.Task[Buffer]]] = deque()
    try:
        for offset, length in wanted:
            ahead.append((offset, asyncio.ensure_future(_read(source, offset, length))))
            if len(ahead) == _AHEAD:
                first, task = ahead.popleft()
                yield first, _as_bytes(await task)
        while ahead:
            first, task = ahead.popleft()
            yield first, _as_bytes(await task)
    finally:
        left = [task for _, task in ahead]
        for task in left:
            task.cancel()
        if left:
            await asyncio.gather(*left, return_exceptions=True)


async def _read(source: Source, offset: int, length: int) -> Buffer:
    data = source.read_nowait(offset, length)
    return await source.read(offset, length) if data is None else data


def _as_bytes(data: Buffer) -> bytes:
    return data if isinstance(data, bytes) else bytes(memoryview(data))
