"""One zstd frame at a time: compressed with its checksum, decompressed and checked.

Knows: the zstd library, and five bytes of a frame's header.
Must not know: files, seek tables, who wants the bytes.

Law of this file: a frame gives exactly the bytes that are expected, or ZstdError; zstd itself
checks them.  The checksum of a seek table is the one that may stand at the end of a frame.  Where
a frame has none, it is given the table's before it is decompressed.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from typing_extensions import Buffer

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    try:
        from backports import zstd
    except ImportError as error:
        raise ImportError(
            "seekable zstd images need the package backports.zstd: pip install 'aiouffd[zstd]'"
        ) from error

ZstdError: Final = zstd.ZstdError
VERSION: Final = zstd.zstd_version

#: The levels that there are.
LEVELS: Final = zstd.CompressionParameter.compression_level.bounds()

_LEAST_WINDOW: Final = 21  # as a power of two: no less is refused, whatever a frame holds
_FRAME_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_HAS_CHECKSUM: Final = 0x04  # in the frame header's descriptor, its fifth byte
_CHECKSUM_BYTES: Final = 4
_HEADER_BYTES: Final = 5  # of which the last is the descriptor


class FrameCompressor:
    """Makes frames; one for each thread."""

    def __init__(self, level: int) -> None:
        """Set the level.

        Args:
            level: Within LEVELS; more is smaller and slower to make.
        """
        parameter = zstd.CompressionParameter
        self._zstd = zstd.ZstdCompressor(
            options={parameter.compression_level: level, parameter.checksum_flag: 1}
        )

    def compress(self, data: bytes | memoryview) -> tuple[bytes, int]:
        """Compress bytes into one frame.

        Returns:
            The frame, and the checksum of the bytes (low 32 bits of their XXH64).
        """
        frame = self._zstd.compress(data, self._zstd.FLUSH_FRAME)
        return frame, int.from_bytes(frame[-_CHECKSUM_BYTES:], "little")


def decompress(frame: memoryview, size: int, checksum: int | None) -> bytes:
    """Decompress one frame.

    Args:
        frame: The frame and nothing else.
        size: How many bytes it holds; more are not made.
        checksum: What their checksum is, if that is known.

    Raises:
        ZstdError: These are other bytes.
    """
    if checksum is not None:
        has_checksum = len(frame) > _HEADER_BYTES and frame[4] & _HAS_CHECKSUM
        if not has_checksum:
            frame = _with_checksum(frame, checksum)
        elif int.from_bytes(frame[-_CHECKSUM_BYTES:], "little") != checksum:
            raise ZstdError("its checksum and the seek table's differ")
    decompressor = zstd.ZstdDecompressor()
    data = decompressor.decompress(frame, size)
    if len(data) != size or not decompressor.eof or decompressor.unused_data:
        raise ZstdError(f"not one frame of {size} bytes")
    return data


def decompress_at_most(frame: Buffer, most: int) -> bytes:
    """Decompress one frame of which only the most that it may hold is known.

    Args:
        frame: The frame and nothing else.
        most: In bytes; more are not made.  Nor is there a window for more (2 MiB at
            least): zstd would take memory for whatever a frame asks for.

    Raises:
        ZstdError: It is not one frame, or holds more.
    """
    window = max((most - 1).bit_length(), _LEAST_WINDOW)
    decompressor = zstd.ZstdDecompressor(
        options={zstd.DecompressionParameter.window_log_max: window}
    )
    data = decompressor.decompress(frame, most)
    if not decompressor.eof or decompressor.unused_data:
        raise ZstdError(f"not one frame of at most {most} bytes")
    return data


def _with_checksum(frame: memoryview, checksum: int) -> memoryview:
    """Give a frame without a checksum that one."""
    if len(frame) <= _HEADER_BYTES or bytes(frame[:4]) != _FRAME_MAGIC:
        raise ZstdError("no zstd frame begins here")
    descriptor = bytes([frame[4] | _HAS_CHECKSUM])
    stored = checksum.to_bytes(_CHECKSUM_BYTES, "little")
    return memoryview(b"".join((_FRAME_MAGIC, descriptor, frame[5:], stored)))
