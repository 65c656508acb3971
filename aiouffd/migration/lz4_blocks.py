"""Bodies of frames as lz4 blocks.

Knows: the lz4 library.
Must not know: frames, connections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

try:
    from lz4 import block
except ImportError as error:
    raise ImportError(
        "lz4 needs the package of that name: pip install 'aiouffd[lz4]'", name="lz4"
    ) from error

if TYPE_CHECKING:
    from typing_extensions import Buffer


def compress(data: bytes) -> bytes:
    """Make one block, which does not say how long its contents are."""
    small: bytes = block.compress(data, store_size=False)
    return small


def decompress(body: Buffer, most: int) -> Buffer:
    """Take a block apart.

    Raises:
        ValueError: It is none, or becomes longer than ``most`` bytes.
    """
    try:
        data: bytes = block.decompress(body, uncompressed_size=most)
    except block.LZ4BlockError as error:
        raise ValueError(str(error)) from error
    return data
