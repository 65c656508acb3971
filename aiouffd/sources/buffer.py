"""A source over bytes that are in memory already.

Knows: one buffer.
Must not know: files, the event loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import ClosedError
from . import check_read

if TYPE_CHECKING:
    from typing_extensions import Buffer


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

    @property
    def size(self) -> int:
        """Length of the buffer, in bytes."""
        return self._size

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
