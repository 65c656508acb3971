"""Write the memory of a dump into a folder: pagemaps and pages, all of them or none.

Knows: names of images, files, what a parent checkpoint holds.
Must not know: connections, the event loop.

Every call may take a disk's time: they are for a thread.

Laws of this file:

* Nothing bears an image's name before ``commit``: until then all lies in a folder within the
  folder.  Pages get their names before pagemaps, and a restore without its pagemaps does not
  begin.
* What ``commit`` has returned from is on the disk.
* Without it a folder is left as it was, without a parent if it had none.
* A pagemap comes out as CRIU reads it: runs in ascending order, none over another, and what is
  left to the parent is there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

from ...errors import PeerError, UffdError
from ...ranges import PAGE_SIZE
from . import images
from .images import PageFlag, PagemapEntry
from .page_wire import LONG, ImageId, ImageKind

with contextlib.suppress(ImportError):  # not a Unix: importing works, receiving does not
    import fcntl

_PREFIX: Final = ".aiouffd-receiving-"
#: The N of the first pages-N.img: as CRIU's page server counts, since the dumper may write files
#: of pages of its own into the same folder.
_FIRST_ID: Final = 0x10001
_PARENT: Final = int(PageFlag.PARENT)
_PRESENT: Final = int(PageFlag.PRESENT)
_ZEROS: Final = bytes(PAGE_SIZE)
_AT_ONCE: Final = 512  # pieces in one system call; the kernel takes 1,024


def _file_of(image: ImageId) -> str:
    middle = "shmem-" if image.kind is ImageKind.SHMEM else ""
    return f"pagemap-{middle}{image.number}.img"


class _Held:
    """Which pages a parent has."""

    def __init__(self, pagemap: images.Pagemap) -> None:
        self._starts = array("Q", (entry.vaddr for entry in pagemap.entries))
        self._ends = array("Q", (entry.end for entry in pagemap.entries))

    def missing(self, start: int, end: int) -> int | None:
        """Give the first address of a stretch that is not in it; None if all are."""
        at = max(bisect_right(self._starts, start) - 1, 0)
        while start < end:
            if at >= len(self._starts) or not self._starts[at] <= start < self._ends[at]:
                return start
            start = self._ends[at]
            at += 1
        return None


class _Image:
    """One pagemap and its pages, as they grow."""

    def __init__(self, folder: str, image: ImageId, number: int, parent: _Held | None) -> None:
        self.name = _file_of(image)
        self.pages_name = f"pages-{number}.img"
        self.parent = parent
        self.entries: list[bytes] = []  # since the last write
        self.end = 0  # of the last run
        self.length = 0  # of the pages, in bytes
        self.pages_fd = self.map_fd = -1
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self.pages_fd = os.open(os.path.join(folder, self.pages_name), flags, 0o600)
            self.map_fd = os.open(os.path.join(folder, self.name), flags, 0o600)
        except BaseException:
            self.close()
            raise
        self.entries.append(images.pagemap_head(number))

    def flush(self) -> None:
        """Write the runs."""
        data = memoryview(b"".join(self.entries))
        self.entries.clear()
        while data:
            data = data[os.write(self.map_fd, data) :]

    def complete(self) -> None:
        """Bring both files to the disk, and close them."""
        self.flush()
        os.ftruncate(self.pages_fd, self.length)  # pages of zeros at its end were left out
        os.fsync(self.pages_fd)
        os.fsync(self.map_fd)
        self.close()

    def close(self) -> None:
        """Close both files."""
        for fd in (self.pages_fd, self.map_fd):
            if fd >= 0:
                os.close(fd)
        self.pages_fd = self.map_fd = -1


class ImageFolder:
    """A folder that the memory of one dump is written to.

    Attributes:
        path: The folder.
        tasks: How many processes' memory is in it.
        shmems: How many pieces of shared memory.
        stored_bytes: How long all files of pages are.
        sparse_bytes: What of that is zeros that take no room on the disk.
        parent_bytes: What is left to the parent.

    Sharing: one thread at a time.
    """

    def __init__(self, path: str) -> None:
        """Take a folder, and make it if it is not there.

        Raises:
            UffdError: The memory of a dump is there already, or another one is being received.
            OSError: It cannot be written to.
        """
        self.path = os.path.abspath(path)
        self.tasks = self.shmems = 0
        self.stored_bytes = self.sparse_bytes = self.parent_bytes = 0
        self._images: list[_Image] = []
        self._names: set[str] = set()
        self._temporary = ""
        self._linked = ""  # to a parent, by us and not for good yet
        os.makedirs(self.path, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._lock()
            self._check()
        except BaseException:
            os.close(self._fd)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                raise UffdError(f"{self.path}: another dump is being received there") from error
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS):
                raise OSError(error.errno, error.strerror, self.path) from error

    def _check(self) -> None:
        for name in sorted(os.listdir(self.path)):
            if name.startswith(_PREFIX):  # of one that was killed: we have the lock
                shutil.rmtree(os.path.join(self.path, name))
            elif name.startswith("pagemap-") and name.endswith(".img"):
                raise UffdError(
                    f"{self.path} holds the memory of a dump already ({name}): give an empty folder"
                )

    def link_parent(self, target: str) -> None:
        """Make another checkpoint the parent, as ``criu dump --prev-images-dir`` does.

        ``close`` takes that back unless a dump was committed.

        Args:
            target: Its path, relative to this folder.

        Raises:
            OSError: It is not there, or there is another parent already.
        """
        path = os.path.join(self.path, target)
        if not os.path.isdir(path):
            raise OSError(errno.ENOENT, "There is no such folder of the parent", path)
        link = os.path.join(self.path, "parent")
        if os.path.islink(link) and os.readlink(link) == target:
            return
        os.symlink(target, link)
        self._linked = target

    def parent_has(self, image: ImageId) -> bool:
        """Say whether the parent holds such an image at all."""
        return os.path.isfile(os.path.join(self.path, "parent", _file_of(image)))

    def open(self, image: ImageId) -> bool:
        """Begin with an image; all runs and data belong to it until the next one.

        Returns:
            Whether the parent holds it, so that its pages may be left to the parent.

        Raises:
            PeerError: It was there before.
            ImageError: The parent's is damaged.
            OSError: The files cannot be made.
        """
        name = _file_of(image)
        if name in self._names:
            raise PeerError(f"sent the memory of {image.kind.value} {image.number} twice")
        held = self._held_by_parent(name)
        if not self._temporary:
            temporary = os.path.join(self.path, _PREFIX + secrets.token_hex(4))
            os.mkdir(temporary, 0o700)
            self._temporary = temporary
        if self._images:
            self._images[-1].complete()
        self._images.append(_Image(self._temporary, image, _FIRST_ID + len(self._images), held))
        self._names.add(name)
        if image.kind is ImageKind.TASK:
            self.tasks += 1
        else:
            self.shmems += 1
        return held is not None

    def _held_by_parent(self, name: str) -> _Held | None:
        try:
            with open(os.path.join(self.path, "parent", name), "rb") as file:
                return _Held(images.parse_pagemap(file.read(), f"parent/{name}"))
        except FileNotFoundError:
            return None

    def add_run(self, address: int, pages: int, flags: int, header_bytes: int) -> None:
        """Add a run of pages to the image.

        Args:
            address: Of the first.
            pages: How many.
            flags: PageFlag; of PRESENT ones the data follow.
            header_bytes: What the dumper speaks, which is how its CRIU counts pages in images.

        Raises:
            PeerError: It lies over, or before, the last one; or the parent should have it and
                has not.
        """
        image = self._images[-1]
        entry = PagemapEntry(address, pages, flags)
        if address < image.end:
            raise PeerError(
                f"sent a run of pages at {address:#x} behind one that ends at {image.end:#x}"
            )
        if flags & _PARENT:
            missing: int | None = address
            if image.parent is not None:
                missing = image.parent.missing(address, entry.end)
            if missing is not None:
                raise PeerError(
                    f"left the page at {missing:#x} of {image.name} to the parent checkpoint,"
                    " which does not have it"
                )
            self.parent_bytes += pages * PAGE_SIZE
        image.end = entry.end
        image.entries.append(images.pagemap_record(entry, wide=header_bytes == LONG))
        if len(image.entries) >= _AT_ONCE:
            image.flush()

    def add_data(self, pieces: Sequence[memoryview]) -> None:
        """Add bytes of PRESENT runs, in order; pages of zeros become holes.

        Raises:
            OSError: They cannot be written, as when the disk is full.
        """
        image = self._images[-1]
        offset = image.length
        ready: list[memoryview] = []
        start = offset  # of what is ready
        for piece in pieces:
            at = 0
            for low, high in _zero_stretches(piece, offset):
                if low > at:
                    ready.append(piece[at:low])
                self._write(image, ready, start)
                ready.clear()
                at, start = high, offset + high
                self.sparse_bytes += high - low
            if at < len(piece):
                ready.append(piece[at:])
            offset += len(piece)
        self._write(image, ready, start)
        self.stored_bytes += offset - image.length
        image.length = offset

    @staticmethod
    def _write(image: _Image, pieces: list[memoryview], offset: int) -> None:
        """Write pieces one behind the other."""
        at = 0
        try:
            while at < len(pieces):
                batch = pieces[at : at + _AT_ONCE]
                done = os.pwritev(image.pages_fd, batch, offset)
                offset += done
                while at < len(pieces) and done >= len(pieces[at]):
                    done -= len(pieces[at])
                    at += 1
                if done:
                    pieces[at] = pieces[at][done:]
        except OSError as error:
            raise OSError(error.errno, error.strerror, image.pages_name) from error

    def commit(self) -> None:
        """Bring everything to the disk and give it its name.

        Raises:
            OSError: With a file's name; then nothing has one, or ``discard`` takes it away.
        """
        if self._images:
            self._images[-1].complete()
        done: list[str] = []
        try:
            for names in (
                [image.pages_name for image in self._images],
                [image.name for image in self._images],
            ):
                for name in names:
                    target = os.path.join(self.path, name)
                    os.rename(os.path.join(self._temporary, name), target)
                    done.append(target)
                os.fsync(self._fd)
        except OSError:
            for target in reversed(done):
                with contextlib.suppress(OSError):
                    os.unlink(target)
            raise
        if self._temporary:
            os.rmdir(self._temporary)
            self._temporary = ""
        self._linked = ""

    def discard(self) -> None:
        """Take everything away that was not committed, for another dump to come."""
        for image in self._images:
            image.close()
        self._images.clear()
        self._names.clear()
        self.tasks = self.shmems = 0
        self.stored_bytes = self.sparse_bytes = self.parent_bytes = 0
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = ""

    def close(self) -> None:
        """Let go of the folder; what was not committed is taken away."""
        if self._temporary:
            self.discard()
        for image in self._images:
            image.close()
        if self._linked:
            link = os.path.join(self.path, "parent")
            with contextlib.suppress(OSError):  # it is no link, or gone
                if os.readlink(link) == self._linked:
                    os.unlink(link)
            self._linked = ""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _zero_stretches(piece: memoryview, offset: int) -> list[tuple[int, int]]:
    """Find whole pages of zeros in a piece that begins at an offset of the file."""
    stretches: list[tuple[int, int]] = []
    end = len(piece)
    for at in range(-offset % PAGE_SIZE, end - PAGE_SIZE + 1, PAGE_SIZE):
        # A look at three bytes spares most pages the comparison.
        if piece[at] or piece[at + 2048] or piece[at + 4088]:
            continue
        if bytes(piece[at : at + PAGE_SIZE]) == _ZEROS:
            if stretches and stretches[-1][1] == at:
                stretches[-1] = (stretches[-1][0], at + PAGE_SIZE)
            else:
                stretches.append((at, at + PAGE_SIZE))
    return stretches
