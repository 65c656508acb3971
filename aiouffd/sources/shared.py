"""One copy of an image in memory, sealed, for any number of processes to map.

Knows: a memory file, its seals and its holes.
Must not know: page faults, who maps it.

Laws of this file:

* First filled, then sealed, then handed out: from the seal on nobody can change a byte of it,
  cut it or punch holes, this process neither.  A file without the seals is refused.
* Holes of the source stay holes, and take no memory.  Who reads one through a mapping makes the
  kernel put a page of zeros there, once for all: the file then takes more than when it was
  sealed, and the figures say how much.
* Huge folios are no danger here.  Where the kernel takes one for a piece of the file it makes
  all of its 512 pages present; each has been filled with its bytes before the seal, or is zeros
  where the image has a hole.  They cost memory, and count as such.

The pages are charged to this process's memory cgroup, not to those that map them; each page
that one of those writes becomes its own, private copy.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from ..errors import ClosedError, SourceError
from ..fds import OwnedFd
from ..ranges import PAGE_SIZE, align_up
from ..threads import in_thread
from . import Extents, Source, check_read, identity_of
from .file import data_extents

if TYPE_CHECKING:
    from typing_extensions import Buffer

with contextlib.suppress(ImportError):  # not a Unix: importing works, sealing does not
    import fcntl

_PIECE: Final = 1 << 20
_AT_ONCE: Final = 4  # pieces that are read at the same time
_MFD_NOEXEC_SEAL: Final = 8  # Linux 6.3; before it, EINVAL


@dataclass(frozen=True, slots=True)
class SharedFigures:
    """What the one copy takes.

    Attributes:
        size: Of the image, in bytes.
        filled_bytes: Memory taken when it was sealed, in bytes.
        resident_bytes: Memory taken now, swap included, in bytes.
    """

    size: int
    filled_bytes: int
    resident_bytes: int

    @property
    def hole_bytes(self) -> int:
        """Zeros that those who map it have put into holes, in bytes."""
        return self.resident_bytes - self.filled_bytes


class SharedImage:
    """A sealed memory file with the bytes of an image; a source, and something to map.

    ::

        image = await SharedImage.fill(source)
    """

    def __init__(self, file: OwnedFd, *, size: int | None = None, identity: str = "") -> None:
        """Take over a memory file that was filled and sealed.

        Args:
            file: From here on this object's to close, unless it is refused.
            size: Of the image, in bytes; None is the file's size.
            identity: Of what it was filled with.

        Raises:
            SourceError: It is no memory file of ordinary pages, or lacks a seal.
        """
        _check_sealed(file)
        self._file = file
        status = os.fstat(file.fileno())
        self._size = status.st_size if size is None else size
        self._identity = identity
        self._filled = status.st_blocks * 512
        self._extents = Extents(data_extents(file.fileno(), self._size))

    @classmethod
    async def fill(cls, source: Source, *, name: str = "aiouffd-image") -> Self:
        """Copy a source into memory and seal the copy.

        Args:
            source: Read once; stays the caller's.
            name: What /proc/PID/maps shows for it.

        Raises:
            SourceError: The source could not be read.
            OSError: There is no memory for it.

        Cancellation: nothing is left behind.
        """
        file = _make_file(name)
        try:
            os.truncate(file.fileno(), align_up(source.size, PAGE_SIZE))
            await _copy(source, file)
            fcntl.fcntl(file.fileno(), fcntl.F_ADD_SEALS, _seals())
            return cls(file, size=source.size, identity=identity_of(source))
        except BaseException:
            file.close()
            raise

    def fileno(self) -> int:
        """Give the file's number: to be mapped privately, or passed on."""
        return self._file.fileno()

    @property
    def size(self) -> int:
        """Length of the image, in bytes; the file is longer by the rest of its last page."""
        return self._size

    @property
    def identity(self) -> str:
        """That of the source it was filled with."""
        return self._identity

    def figures(self) -> SharedFigures:
        """Say what the copy takes now."""
        status = os.fstat(self._file.fileno())
        return SharedFigures(self._size, self._filled, status.st_blocks * 512)

    def extents(self) -> Iterator[tuple[int, int]]:
        """Give what was no hole when the copy was sealed."""
        return iter(self._extents)

    def read_nowait(self, offset: int, length: int) -> bytes:
        """Read from memory; what is swapped out is waited for."""
        if self._file.closed:
            raise ClosedError("this image is closed")
        check_read(offset, length, self._size)
        data = os.pread(self._file.fileno(), length, offset)
        if len(data) != length:
            raise SourceError(f"{len(data)} of {length} bytes at offset {offset} could be read")
        return data

    async def read(self, offset: int, length: int) -> Buffer:
        """Read from memory."""
        return self.read_nowait(offset, length)

    async def aclose(self) -> None:
        """Close the file; the memory stays as long as anybody maps it."""
        self._file.close()


def _seals() -> int:
    return fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def _check_sealed(file: OwnedFd) -> None:
    try:
        seals = fcntl.fcntl(file.fileno(), fcntl.F_GET_SEALS)
    except OSError as error:
        raise SourceError("this is no memory file: it cannot be sealed") from error
    if seals & _seals() != _seals():
        raise SourceError(
            "this memory file is not sealed against writing, shrinking, growing and further"
            " seals: who maps it could change it for all others"
        )
    if os.fstatvfs(file.fileno()).f_bsize != PAGE_SIZE:
        raise SourceError("this memory file is made of huge pages, which are not shared here")


def _make_file(name: str) -> OwnedFd:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return OwnedFd(os.memfd_create(name, flags | _MFD_NOEXEC_SEAL))
    except OSError:
        return OwnedFd(os.memfd_create(name, flags))


async def _copy(source: Source, file: OwnedFd) -> None:
    """Copy what a source holds, some pieces at a time."""
    pieces = (
        (at, min(_PIECE, offset + length - at))
        for offset, length in source.extents()
        for at in range(offset, offset + length, _PIECE)
    )

    async def work() -> None:
        for offset, length in pieces:
            data = source.read_nowait(offset, length)
            if data is None:
                data = await source.read(offset, length)
            await in_thread(_write, file.fileno(), data, offset)

    workers = [asyncio.ensure_future(work()) for _ in range(_AT_ONCE)]
    try:
        await asyncio.gather(*workers)
    finally:
        # A thread that still writes ends before the file is closed: its number is reused at once.
        for worker in workers:
            worker.cancel()
        while not all(worker.done() for worker in workers):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait(workers)


def _write(number: int, data: Buffer, offset: int) -> None:
    with memoryview(data) as view, view.cast("B") as left:
        done = 0
        while done < len(left):
            done += os.pwrite(number, left[done:], offset + done)
