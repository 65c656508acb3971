"""What an image holds: how large, how much of it is data, zeros, stored.

Knows: kinds of sources that have more to say than a Source must.
Must not know: how it is shown.
"""

from __future__ import annotations

import os
from contextlib import aclosing
from dataclasses import dataclass
from itertools import pairwise

from ..sources import Source, identity_of
from ..sources.compressed import CompressedSource
from ..sources.file import FileSource
from ..sources.layered import LayeredSource
from ..threads import in_thread
from . import Watcher, watch_nothing
from .copying import differing_pages, pieces, read_in_order


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What is known of an image.

    Attributes:
        kind: ``file``, ``compressed``, ``layers`` or the name of a class of sources.
        size: Length of the image, in bytes.
        stored_bytes: What it takes where it lies; None if that is not known.
        extents: How many stretches hold data.
        data_bytes: How much they hold; the rest are holes, which read as zeros.
        zero_bytes: How much reads as zeros: the holes, and pages of zeros in the data.  None if
            the data was not read.
        frames: How many compressed frames hold data; None if it is not compressed.
        frame_bytes: Content of the largest of these.
        checksums: Whether each frame is checked when it is read.
        sha256: Digest of the content, as the image says; "" if it does not.
        identity: The same for copies of the image; "" if it has none.
    """

    kind: str
    size: int
    stored_bytes: int | None
    extents: int
    data_bytes: int
    zero_bytes: int | None
    frames: int | None
    frame_bytes: int | None
    checksums: bool | None
    sha256: str
    identity: str


async def survey(source: Source, *, scan: bool = False, watch: Watcher = watch_nothing) -> Survey:
    """Look at an image.

    Args:
        source: The image; it stays open.
        scan: Read all data, to count the zeros in it.
        watch: Called now and then while it is read.

    Raises:
        SourceError: The source failed.
    """
    extents = list(source.extents())
    data_bytes = sum(length for _, length in extents)
    zero_bytes = None
    if scan:
        zero_bytes = source.size - await _nonzero_bytes(source, watch)
    kind, stored = type(source).__name__, None
    frames = frame_bytes = checksums = None
    sha256 = ""
    if isinstance(source, FileSource):
        kind, stored = "file", os.stat(source.path).st_blocks * 512
    elif isinstance(source, LayeredSource):
        kind = "layers"
    elif isinstance(source, CompressedSource):
        kind, stored = "compressed", source.stored_size
        held = source.layout.extents
        contents = [
            end - start
            for start, end in pairwise(source.table.starts)
            if start < end and held.holds(start, end - start)
        ]
        frames, frame_bytes = len(contents), max(contents, default=0)
        checksums = source.table.checksums is not None
        if source.layout.note is not None:
            sha256 = source.layout.note.sha256.hex()
    return Survey(
        kind=kind,
        size=source.size,
        stored_bytes=stored,
        extents=len(extents),
        data_bytes=data_bytes,
        zero_bytes=zero_bytes,
        frames=frames,
        frame_bytes=frame_bytes,
        checksums=checksums,
        sha256=sha256,
        identity=identity_of(source),
    )


async def _nonzero_bytes(source: Source, watch: Watcher) -> int:
    found = 0
    async with aclosing(read_in_order(source, pieces(source.extents()))) as reads:
        async for offset, data in reads:
            runs = await in_thread(differing_pages, data, None)
            found += sum(length for _, length in runs)
            watch(offset + len(data), source.size)
    watch(source.size, source.size)
    return found
