"""A file descriptor with one owner: closed once, handed on once.

Knows: numbers, and how to close them.
Must not know: what a descriptor is for.

A descriptor that arrives with a message (a forked child's userfaultfd, a peer's SCM_RIGHTS)
is put into an OwnedFd before anything else can fail.
"""

from __future__ import annotations

import os
import warnings
from types import TracebackType
from typing import NoReturn, Self

from .errors import ClosedError


class OwnedFd:
    """One file descriptor and the duty to close it.

    Sharing: one owner at a time; not safe to close from two threads at once.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        """Take over ``fd``: from here on nobody else closes it.

        Args:
            fd: An open file descriptor.
        """
        self._fd = -1  # so that __del__ is safe when the check below raises
        if fd < 0:
            raise ValueError(f"a file descriptor is not negative: {fd}")
        self._fd = fd

    def fileno(self) -> int:
        """Give the number, keeping the duty.

        Raises:
            ClosedError: It was closed or handed on.
        """
        if self._fd < 0:
            raise ClosedError("this file descriptor was closed or handed on")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether it was closed or handed on."""
        return self._fd < 0

    def detach(self) -> int:
        """Give the number and the duty to close it; this object is closed from here on.

        Raises:
            ClosedError: It was closed or handed on before.
        """
        fd = self.fileno()
        self._fd = -1
        return fd

    def dup(self) -> OwnedFd:
        """Make a second descriptor of the same open file, close-on-exec, with its own owner."""
        return OwnedFd(os.dup(self.fileno()))

    def close(self) -> None:
        """Close it; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a file descriptor has one owner: it is not copied or pickled; see dup()")

    def __repr__(self) -> str:
        return f"<OwnedFd {'closed' if self._fd < 0 else self._fd}>"

    def __del__(self) -> None:
        if self._fd >= 0:
            text = f"{self!r} was never closed"
            try:
                warnings.warn(text, ResourceWarning, source=self, stacklevel=2)
            finally:  # also where warnings are errors
                self.close()
