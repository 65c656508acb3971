"""By what a zstd image is told from other files: a few bytes at its ends.

Knows: those bytes.
Must not know: what lies between them; zstd.
"""

from __future__ import annotations

from typing import Final

from . import Source

#: What a zstd frame begins with.
ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
#: The last word of a seek table.
SEEKABLE_MAGIC: Final = 0x8F92EAB1

_FOOTER_BYTES: Final = 9


async def is_compressed(source: Source) -> bool:
    """Say whether a source holds a seekable zstd image: its last bytes tell.

    Raises:
        SourceError: They cannot be read.
    """
    if source.size < _FOOTER_BYTES:
        return False
    tail = memoryview(await source.read(source.size - _FOOTER_BYTES, _FOOTER_BYTES))
    return bytes(tail[-4:]) == SEEKABLE_MAGIC.to_bytes(4, "little")


async def is_without_table(source: Source) -> bool:
    """Say whether a source that is not ``is_compressed`` begins as a zstd file all the same.

    Raises:
        SourceError: Its first bytes cannot be read.
    """
    if source.size < len(ZSTD_MAGIC):
        return False
    return bytes(memoryview(await source.read(0, len(ZSTD_MAGIC)))) == ZSTD_MAGIC
