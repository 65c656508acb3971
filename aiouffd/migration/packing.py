"""Bodies made smaller: what can be agreed on, by the library that does it.

Knows: names of features, who compresses.
Must not know: frames, connections.

Law of this file: what does not become smaller by an eighth goes as it is; the other side would
work for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .wire import COMPRESSION, Compress, Decompress

if TYPE_CHECKING:
    from typing_extensions import Buffer

_LEVEL: Final = 1  # of zstd: the fastest but for negative ones


def available() -> list[str]:
    """Give the names of what can be used here, the better ones first."""
    found = []
    for name in COMPRESSION:
        try:
            codec(name)
        except ImportError:
            continue
        found.append(name)
    return found


def codec(name: str) -> tuple[Compress, Decompress]:
    """Give the two directions of one way to make bodies smaller.

    Args:
        name: One of ``wire.COMPRESSION``.

    Raises:
        ImportError: Its library is missing; the error names the extra.
    """
    if name == "lz4":
        from . import lz4_blocks

        return _where_it_pays(lz4_blocks.compress), lz4_blocks.decompress
    from ..sources.zstd_frames import FrameCompressor, ZstdError, decompress_at_most

    compressor = FrameCompressor(_LEVEL)

    def decompress(body: Buffer, most: int) -> Buffer:
        try:
            return decompress_at_most(body, most)
        except ZstdError as error:
            raise ValueError(str(error)) from error

    return _where_it_pays(lambda data: compressor.compress(data)[0]), decompress


def _where_it_pays(compress: Compress) -> Compress:
    def checked(data: bytes) -> bytes | None:
        small = compress(data)
        return None if small is None or len(small) > len(data) * 7 // 8 else small

    return checked
