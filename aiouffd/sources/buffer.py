"""A source over bytes that are in memory already.

Knows: one buffer.
Must not know: files, the event loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from ..errors import ClosedError
from . import check_read

if TYPE_CHECKING:
    from typing_extensions import Buffer


#: What is longer has no identity: making the digest would hold up the loop.
_DIGEST_BYTES: Final = 16 << 20


class BufferSource:
    """The bytes of a buffer, without a copy.

    The buffer is held as it is: who changes it changes what later faults get, so don't.
    """

    def __init__(self, data: Buffer) -> None:
        """Hold a buffer.

        Args:
            data: Any contiguous buffer; it must not be memory that this process serves.
        """
        self._view: memoryview | None = memoryview(data).cast("B").toreadonly()
        self._size = len(self._view)
        self._identity: str | None = None if self._size <= _DIGEST_BYTES else ""

    @property
    def size(self) -> int:
        """Length of the buffer, in bytes."""
        return self._size

    @property
    def identity(self) -> str:
        """A digest of the bytes, made when it is first asked for; "" beyond 16 MiB."""
        if self._identity is None:
            if self._view is None:
                return ""
            self._identity = f"sha256:{hashlib.sha256(self._view).hexdigest()}"
        return self._identity

    async def read(self, offset: int, length: int) -> Buffer:
        """Give a view of the buffer."""
        return self.read_nowait(offset, length)

    def read_nowait(self, offset: int, length: int) -> Buffer:
        """Give a view of the buffer: it is always at hand."""
        if self._view is None:
            raise ClosedError("this source is closed")
        check_read(offset, length, self._size)
        return self._view[offset : offset + length]

    def extents(self) -> Iterator[tuple[int, int]]:
        """Give one extent: whether a buffer holds zeros is not looked for."""
        if self._size:
            yield 0, self._size

    async def aclose(self) -> None:
        """Let go of the buffer."""
        self._view = None
