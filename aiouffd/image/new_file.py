"""A file that has its name only when it is complete.

Knows: temporary names, fsync, rename.
Must not know: what is written.

Law of this file: whatever happens before ``commit`` has returned, what bore the name before
bears it still, or the new file does, whole.  Only a killed process leaves a temporary file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from typing_extensions import Buffer


class NewFile:
    """A file being written; only its owner may read it, as memory may hold secrets."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Begin a file beside where it will stand.

        Args:
            path: Its name in the end; what stands there is replaced.  Symbolic links are followed.

        Raises:
            OSError: It cannot be made, or something other than a regular file stands there.
        """
        self.path = os.path.realpath(path)
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                raise OSError(errno.EINVAL, "This is no regular file to be replaced", self.path)
        folder, name = os.path.split(self.path)
        self._temporary = os.path.join(folder, f".{name[:200]}.{secrets.token_hex(4)}.part")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self.fd = os.open(self._temporary, flags, 0o600)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from error

    def write(self, offset: int, pieces: Iterable[Buffer]) -> int:
        """Write pieces one behind the other.

        Returns:
            The offset behind them.

        Raises:
            OSError: With the file's name.
        """
        try:
            for piece in pieces:
                view = memoryview(piece).cast("B")
                while view:
                    done = os.pwrite(self.fd, view, offset)
                    offset += done
                    view = view[done:]
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from error
        return offset

    def commit(self) -> None:
        """Bring the file to the disk and give it its name.

        Raises:
            OSError: With the file's name.
        """
        try:
            os.fsync(self.fd)
            os.rename(self._temporary, self.path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from error
        self._close()
        folder = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)  # the name, too, is to survive
        finally:
            os.close(folder)

    def discard(self) -> None:
        """Take the file away, unless it has its name already."""
        if self.fd >= 0:
            self._close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)

    def _close(self) -> None:
        fd, self.fd = self.fd, -1
        os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.discard()
