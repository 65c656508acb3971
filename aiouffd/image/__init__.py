"""Images made and looked at: packed, unpacked, compared, checked.

A feed (``copying``: a copy, a difference) reads sources and puts stretches of data, in order,
into a writer (``sparse``: a file with holes, ``packed``: a seekable zstd file).  What was not put
is a hole.

Knows: what a writer and somebody who watches look like.
Must not know: command lines, terminals.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol, Self, TypeAlias

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: What differs, and what is a hole, is told page by page.
PAGE: Final = 4096

#: Called with the bytes that are done and those there are.
Watcher: TypeAlias = Callable[[int, int], None]


class ImageWriter(Protocol):
    """Makes one image; leaving the context without ``finish`` leaves nothing behind."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    async def put(self, offset: int, data: Buffer) -> None:
        """Add data.

        Args:
            offset: Where it stands in the image, in bytes; after all that was put before.
            data: Must not change any more.

        Raises:
            OSError: It cannot be written.
        """

    async def finish(self) -> None:
        """Bring the image to the disk and give it its name.

        Raises:
            OSError: It cannot be written.
        """


def watch_nothing(done: int, total: int) -> None:
    """Watch nothing."""
