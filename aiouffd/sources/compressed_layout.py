"""How a seekable zstd image is laid out, read from the end of it.

Knows: in what order the end of a file is read; what makes two images the same.
Must not know: zstd; what the image is for.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from ..errors import SourceError
from . import Extents, Source, identity_of
from .seek_table import (
    FOOTER_BYTES,
    MAX_NOTE_BYTES,
    Note,
    SeekTable,
    parse,
    parse_note,
    table_length,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

_TAIL_BYTES: Final = 64 << 10  # read first: the whole table, more often than not
_PARSE_INLINE: Final = 64 << 10  # more bytes of a table are parsed in a thread

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Layout:
    """What is known of a compressed image without decompressing any of it.

    Attributes:
        table: Where its frames lie.
        note: What it says of itself, if one of our own.
        extents: Where there is data: all of it, if there is no note.
        identity: The same for copies of an image; "" if sizes are all that is known.
    """

    table: SeekTable
    note: Note | None
    extents: Extents
    identity: str


async def read_layout(source: Source) -> Layout:
    """Read seek table and note of an image.

    Raises:
        SourceError: This is no seekable zstd file, or its table or its note is wrong.
    """
    length, tail = await _read_table(source)
    table = await _in_thread_if_long(length, parse, tail[-length:], source.size)
    note = None
    frame = await _read_note_frame(source, table, tail)
    if frame is not None:
        note = await _in_thread_if_long(len(frame), parse_note, frame, table.size)
    extents = note.extents if note is not None else Extents([(0, table.size)] * bool(table.size))
    identity = _identity(source, table, frame if note is not None else None)
    return Layout(table, note, extents, identity)


async def _in_thread_if_long(
    length: int, read: Callable[[Buffer, int], _T], data: memoryview, size: int
) -> _T:
    """Parse a few bytes here, and many in a thread."""
    if length > _PARSE_INLINE:
        return await asyncio.to_thread(read, data, size)
    return read(data, size)


async def _read_table(source: Source) -> tuple[int, memoryview]:
    """Read the end of a file.

    Returns:
        The length of the seek table, and the last bytes of the file: at least the table.
    """
    size = source.size
    if size < FOOTER_BYTES:
        raise SourceError(f"this is no seekable zstd file: it has {size} bytes")
    length = min(size, _TAIL_BYTES)
    tail = memoryview(await source.read(size - length, length)).cast("B")
    wanted = table_length(tail[-FOOTER_BYTES:], size)
    if wanted > length:
        tail = memoryview(await source.read(size - wanted, wanted)).cast("B")
    return wanted, tail


async def _read_note_frame(source: Source, table: SeekTable, tail: memoryview) -> memoryview | None:
    """Read the frame that stands last before the table, if it may be our note."""
    last = len(table) - 1
    if last < 0 or table.starts[last] != table.size:
        return None
    offset, end = table.offsets[last], table.offsets[last + 1]
    if not 0 < end - offset <= MAX_NOTE_BYTES:
        return None
    at = offset - (source.size - len(tail))
    if at >= 0:
        return tail[at : at + end - offset]
    return memoryview(await source.read(offset, end - offset)).cast("B")


def _identity(source: Source, table: SeekTable, note_frame: memoryview | None) -> str:
    """Name a generation: copies of a file have the same, wherever they lie."""
    digest = hashlib.sha256(table.identity.encode())
    if note_frame is not None:  # it has the digest of the content
        digest.update(note_frame)
    elif table.checksums is None:  # sizes alone: what the file is must tell
        below = identity_of(source)
        if not below:
            return ""
        digest.update(below.encode())
    return f"zstd:{digest.hexdigest()[:32]}"
