"""The seek table at the end of a zstd file, and the note that our own files carry before it.

The table is the published zstd seekable format 0.1.0: a skippable frame that lists every frame
before it.  All numbers are little-endian::

    magic 0x184D2A5E u32 | length u32 | entries | frames u32 | descriptor u8 | 0x8F92EAB1 u32
    entry: compressed size u32 | size u32 [| low half of the XXH64 of the content u32]

The note is a skippable frame as well, the last before the table and listed in it as a frame of
no bytes, so that other tools pass it by::

    magic 0x184D2A5A u32 | length u32 | "aiouffd" 0x01 | SHA-256 of the content
    | size of the content u64 | extents u64 | zlib of them: (hole before u64, length u64) each

Knows: these bytes.
Must not know: where they are read from, how frames are decompressed.

Laws of this file:

* Arrays, not objects: a table of a million frames is parsed by a handful of C loops.
* What a hostile file says is bounded before it is believed: frames, their size, extents.
"""

from __future__ import annotations

import hashlib
import struct
import sys
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from ..errors import SourceError
from . import Extents

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: What a file in this format ends with.
SEEKABLE_MAGIC: Final = 0x8F92EAB1
TABLE_MAGIC: Final = 0x184D2A5E
NOTE_MAGIC: Final = 0x184D2A5A

_HEADER: Final = struct.Struct("<II")
_FOOTER: Final = struct.Struct("<IBI")
_NOTE: Final = struct.Struct("<8s32sQQ")
_NOTE_NAME: Final = b"aiouffd\x01"
_CHECKSUMS: Final = 0x80  # in the descriptor
_RESERVED: Final = 0x7C

FOOTER_BYTES: Final = _FOOTER.size
HEADER_BYTES: Final = _HEADER.size

#: More frames than this are refused: half a tebibyte in frames of 32 KiB.
MAX_FRAMES: Final = 1 << 24
#: A frame that holds more is refused: one page of it would cost tens of milliseconds.
MAX_FRAME_BYTES: Final = 64 << 20
#: A note with more extents is refused.
MAX_EXTENTS: Final = 1 << 23
#: A longer note is refused.
MAX_NOTE_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class SeekTable:
    """Where each frame lies in the file, and where its bytes lie in the content.

    Attributes:
        offsets: Where each frame begins in the file; one more, where the last one ends.
        starts: Where each frame's content begins; one more, where the last one's ends.
        checksums: Low 32 bits of the XXH64 of each frame's content; None if the file has none.
        identity: SHA-256 of the table.
    """

    offsets: array[int]
    starts: array[int]
    checksums: array[int] | None
    identity: str

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def size(self) -> int:
        """Length of the content, in bytes."""
        return self.starts[-1]

    def frame_at(self, offset: int) -> int:
        """Find the frame that holds the byte at an offset inside the content."""
        return bisect_right(self.starts, offset) - 1


@dataclass(frozen=True, slots=True)
class Note:
    """What our own files say of themselves.

    Attributes:
        sha256: Digest of the content, holes read as zeros.
        size: Length of the content, in bytes.
        extents: Where there is data.
    """

    sha256: bytes
    size: int
    extents: Extents


def ends_seekable(tail: Buffer) -> bool:
    """Say whether the last bytes of a file are the end of a seek table."""
    view = memoryview(tail)
    return len(view) >= 4 and bytes(view[-4:]) == SEEKABLE_MAGIC.to_bytes(4, "little")


def table_length(footer: Buffer, file_size: int) -> int:
    """Say how long the seek table is, from the last bytes of a file.

    Args:
        footer: The last FOOTER_BYTES of the file.
        file_size: Length of the file, in bytes.

    Returns:
        Length of the table with its header and footer, in bytes.

    Raises:
        SourceError: No seek table ends there, or none that can be right.
    """
    frames: int
    frames, descriptor, magic = _FOOTER.unpack(footer)
    if magic != SEEKABLE_MAGIC:
        raise SourceError("this is no seekable zstd file: it does not end in a seek table")
    if descriptor & _RESERVED:
        raise SourceError(f"the seek table is of a newer format (descriptor {descriptor:#04x})")
    if frames > MAX_FRAMES:
        raise SourceError(f"the seek table lists {frames} frames, more than {MAX_FRAMES}")
    length = HEADER_BYTES + frames * _entry_length(descriptor) + FOOTER_BYTES
    if length > file_size:
        raise SourceError(
            f"the seek table lists {frames} frames and would be {length} bytes long,"
            f" but the file has {file_size} bytes"
        )
    return length


def parse(table: Buffer, file_size: int) -> SeekTable:
    """Read a seek table.

    Args:
        table: The whole table, as long as ``table_length`` said.
        file_size: Length of the file, in bytes.

    Raises:
        SourceError: The table contradicts itself or the file.
    """
    with memoryview(table) as view:
        length = table_length(view[-FOOTER_BYTES:], file_size)
        if length != len(view):
            raise SourceError(f"the seek table is {length} bytes long, not {len(view)}")
        magic, follows = _HEADER.unpack_from(view)
        if magic != TABLE_MAGIC or follows != length - HEADER_BYTES:
            raise SourceError(
                f"no seek table begins {length} bytes before the end of the file,"
                " where its last bytes say that it does"
            )
        descriptor = view[-5]
        words = array("I")
        words.frombytes(view[HEADER_BYTES:-FOOTER_BYTES])
        identity = hashlib.sha256(view).hexdigest()
    if sys.byteorder == "big":
        words.byteswap()
    step = _entry_length(descriptor) // 4
    sizes = words[1::step]
    offsets = array("Q", accumulate(words[0::step], initial=0))
    if offsets[-1] + length != file_size:
        raise SourceError(
            f"the frames of the seek table are {offsets[-1]} bytes together,"
            f" but {file_size - length} lie before it"
        )
    largest = max(sizes, default=0)
    if largest > MAX_FRAME_BYTES:
        raise SourceError(
            f"frame {sizes.index(largest)} holds {largest} bytes; more than {MAX_FRAME_BYTES} are"
            " too many to read at random: pack it again in smaller frames"
        )
    starts = array("Q", accumulate(sizes, initial=0))
    return SeekTable(offsets, starts, words[2::step] if step == 3 else None, identity)


def build(
    compressed_sizes: Iterable[int], sizes: Iterable[int], checksums: Iterable[int] | None = None
) -> bytes:
    """Write a seek table.

    Args:
        compressed_sizes: Of each frame, in bytes.
        sizes: Of the content of each frame, in bytes.
        checksums: Low 32 bits of the XXH64 of the content of each frame; None to leave them out.

    Raises:
        ValueError: There are more frames than can be read again.
    """
    columns = [array("I", compressed_sizes), array("I", sizes)]
    if checksums is not None:
        columns.append(array("I", checksums))
    frames, step = len(columns[0]), len(columns)
    if frames > MAX_FRAMES:
        raise ValueError(f"{frames} frames are more than {MAX_FRAMES}: use larger ones")
    words = array("I", bytes(4 * step * frames))
    for number, column in enumerate(columns):
        words[number::step] = column
    if sys.byteorder == "big":
        words.byteswap()
    descriptor = _CHECKSUMS if step == 3 else 0
    footer = _FOOTER.pack(frames, descriptor, SEEKABLE_MAGIC)
    length = len(words) * 4 + FOOTER_BYTES
    return b"".join((_HEADER.pack(TABLE_MAGIC, length), words.tobytes(), footer))


def parse_note(frame: Buffer, size: int) -> Note | None:
    """Read our own note.

    Args:
        frame: A whole frame of the file, whichever it is.
        size: Length of the content as the seek table has it, in bytes.

    Returns:
        The note, or None if the frame is somebody else's.

    Raises:
        SourceError: It is a note, and wrong.
    """
    with memoryview(frame) as view:
        if len(view) < HEADER_BYTES + _NOTE.size:
            return None
        magic, follows = _HEADER.unpack_from(view)
        name, digest, noted, count = _NOTE.unpack_from(view, HEADER_BYTES)
        if magic != NOTE_MAGIC or name != _NOTE_NAME or follows != len(view) - HEADER_BYTES:
            return None
        if noted != size:
            raise SourceError(
                f"the note of the file is for {noted} bytes, its seek table for {size}"
            )
        if count > MAX_EXTENTS:
            raise SourceError(f"the note of the file has {count} extents, more than {MAX_EXTENTS}")
        # One byte more than there may be, so that too many of them show.
        inflate = zlib.decompressobj()
        try:
            raw = inflate.decompress(view[HEADER_BYTES + _NOTE.size :], count * 16 + 1)
        except zlib.error as error:
            raise SourceError(f"the note of the file is corrupt: {error}") from error
    if len(raw) != count * 16 or (not inflate.eof and inflate.decompress(b"", 1)):
        raise SourceError(f"the note of the file does not have the {count} extents that it counts")
    deltas = array("Q", raw)
    if sys.byteorder == "big":
        deltas.byteswap()
    edges = list(accumulate(deltas))
    if edges and edges[-1] > size:
        raise SourceError(f"the last extent of the note ends at {edges[-1]}, after {size} bytes")
    try:
        extents = Extents(zip(edges[0::2], deltas[1::2], strict=True))
    except ValueError as error:
        raise SourceError(f"the note of the file is wrong: {error}") from error
    return Note(digest, size, extents)


def build_note(note: Note) -> bytes:
    """Write a note as the skippable frame that stands last before the seek table.

    Raises:
        ValueError: It has more extents than can be read again.
    """
    if len(note.extents) > MAX_EXTENTS:
        raise ValueError(f"{len(note.extents)} extents are more than {MAX_EXTENTS}")
    deltas, last = array("Q"), 0
    for offset, length in note.extents:
        deltas.extend((offset - last, length))
        last = offset + length
    if sys.byteorder == "big":
        deltas.byteswap()
    packed = zlib.compress(deltas.tobytes())
    head = _NOTE.pack(_NOTE_NAME, note.sha256, note.size, len(note.extents))
    return b"".join((_HEADER.pack(NOTE_MAGIC, len(head) + len(packed)), head, packed))


def _entry_length(descriptor: int) -> int:
    return 12 if descriptor & _CHECKSUMS else 8
