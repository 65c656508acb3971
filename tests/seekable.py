"""Seekable zstd files made by hand, so that reading is tested apart from packing."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence

from aiouffd.sources import Extents
from aiouffd.sources.seek_table import Note, build, build_note
from aiouffd.sources.zstd_frames import FrameCompressor

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["FRAME", "seekable", "zstd"]

FRAME = 32 << 10


def seekable(
    data: bytes,
    *,
    frame: int = FRAME,
    extents: Sequence[tuple[int, int]] | None = None,
    checksums: bool = True,
) -> bytes:
    """Pack bytes; with a note if there are extents."""
    compressor = FrameCompressor(1)
    pieces = [data[at : at + frame] for at in range(0, len(data), frame)]
    frames, sums = [], []
    for piece in pieces:
        packed, checksum = compressor.compress(piece)
        frames.append(packed)
        sums.append(checksum)
    if extents is not None:
        note = Note(hashlib.sha256(data).digest(), len(data), Extents(extents))
        pieces.append(b"")
        frames.append(build_note(note))
        sums.append(0)
    table = build(map(len, frames), map(len, pieces), sums if checksums else None)
    return b"".join([*frames, table])
