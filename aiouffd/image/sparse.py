"""A plain image file in which what was not put is a hole.

Knows: holes in files.
Must not know: where the data comes from.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from ..errors import NotSupported
from ..sources import Extents
from ..sources.file import data_extents
from ..threads import in_thread
from .new_file import NewFile

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BATCH_BYTES: Final = 1 << 20  # to one thread, in one go


class SparseWriter:
    """Writes a plain image file.

    Attributes:
        exact: After ``finish``: whether the file's holes are just what was not put.  Some file
            systems have them in larger units only, or make them out of zeros.  For an image
            that makes no difference; for a layer over another one it does.
    """

    def __init__(
        self, path: str | os.PathLike[str], size: int, *, must_be_exact: bool = False
    ) -> None:
        """Begin an image.

        Args:
            path: Where it will stand.
            size: Its length, in bytes.
            must_be_exact: Fail at the end rather than make an image that is not ``exact``.

        Raises:
            OSError: It cannot be made.
        """
        self.exact = True
        self._must_be_exact = must_be_exact
        self._size = size
        self._put: list[tuple[int, int]] = []
        self._waiting: list[tuple[int, Buffer]] = []
        self._waiting_bytes = 0
        self._file = NewFile(path)
        try:
            os.truncate(self._file.fd, size)
        except OSError as error:
            self._file.discard()
            raise OSError(error.errno, error.strerror, self._file.path) from error

    async def put(self, offset: int, data: Buffer) -> None:
        """Write data at its place, together with its neighbours.

        Args:
            offset: In the image, in bytes; in any order, but nothing twice.
            data: Stays as it is until the next put or ``finish`` has returned.

        Cancellation: the thread that writes ends first.
        """
        length = memoryview(data).nbytes
        if self._put and sum(self._put[-1]) == offset:  # in order, it stays short
            offset_before, length_before = self._put.pop()
            self._put.append((offset_before, length_before + length))
        elif length:
            self._put.append((offset, length))
        self._waiting.append((offset, data))
        self._waiting_bytes += length
        if self._waiting_bytes >= _BATCH_BYTES:
            await self._write_waiting()

    async def _write_waiting(self) -> None:
        batch, self._waiting, self._waiting_bytes = self._waiting, [], 0
        await in_thread(self._write, batch)

    def _write(self, batch: list[tuple[int, Buffer]]) -> None:
        for offset, data in batch:
            self._file.write(offset, [data])

    async def finish(self) -> None:
        """Bring the file to the disk and give it its name.

        Raises:
            NotSupported: It must be exact, and is not.
        """
        await self._write_waiting()
        self.exact = await in_thread(self._finish)

    def _finish(self) -> bool:
        put = Extents(sorted(self._put))
        exact = list(data_extents(self._file.fd, self._size)) == list(put)
        if self._must_be_exact and not exact:
            raise NotSupported(
                f"The file system of {self._file.path} does not keep holes as they are",
                "Without exact holes this is no layer: write it packed, or on ext4, xfs or tmpfs.",
            )
        self._file.commit()
        return exact

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.discard()
