"""A source of nothing but zeros.

Knows: a size.
Must not know: files, the event loop.

The base under layers that bring all there is, and memory that starts out empty.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import ClosedError
from . import check_read


class ZeroSource:
    """So many zeros; there are no extents, so handlers need not even read them."""

    def __init__(self, size: int) -> None:
        """Say how many.

        Args:
            size: In bytes; not negative.
        """
        if size < 0:
            raise ValueError(f"a size is not negative: {size}")
        self._size = size
        self._closed = False

    @property
    def size(self) -> int:
        """Length, in bytes."""
        return self._size

    @property
    def identity(self) -> str:
        """The size says it all."""
        return f"zero:{self._size:x}"

    async def read(self, offset: int, length: int) -> bytes:
        """Give zeros."""
        return self.read_nowait(offset, length)

    def read_nowait(self, offset: int, length: int) -> bytes:
        """Give zeros: they are always at hand."""
        if self._closed:
            raise ClosedError("this source is closed")
        check_read(offset, length, self._size)
        return bytes(length)

    def extents(self) -> Iterator[tuple[int, int]]:
        """Give none."""
        return iter(())

    async def aclose(self) -> None:
        """Refuse reads from now on."""
        self._closed = True
