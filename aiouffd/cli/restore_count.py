"""How many restores there were: counted where a daemon that is started again finds it.

Knows: a memory file in the fd store.
Must not know: restores; when a daemon is through with them.

Laws of this file:

* A restore is in the count from the first process that it has handed over on: whoever takes a
  process over finds its restore, finished or lost.
* A restore that was under way when its daemon died has lost its daemon, and is counted as such.
* Without a store, or in one that is full, it is a count like any other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from typing import TYPE_CHECKING, Final

from ..errors import StoreError
from ..fds import OwnedFd

if TYPE_CHECKING:
    from ..fd_store import FdStore

with contextlib.suppress(ImportError):  # not a Unix: importing works, counting does not
    import fcntl

log: Final = logging.getLogger("aiouffd.criu")

NAME: Final = "aiouffd-restores"  #: in the store

_COUNTS: Final = struct.Struct("<8s4Q")
_MAGIC: Final = b"aiouffdR"


class RestoreCount:
    """Restores, by what has become of them.

    Attributes:
        finished: Have handed everything over.
        failed: Have ended otherwise, or were refused.
        lost: Were under way when a daemon before this one died.
        under_way: Have handed over a part of what they have.

    Sharing: the loop's thread.
    """

    def __init__(self, store: FdStore | None) -> None:
        """Go on counting where a daemon before this one has died, or begin.

        Args:
            store: Stays the caller's to close, later than this.
        """
        self.finished = self.failed = self.lost = self.under_way = 0
        self._store = store
        self._fd = _create()
        taken = store.taken.pop(NAME, []) if store is not None else []
        if not taken:
            return
        self._fd.close()
        self._fd, *more = taken
        for fd in more:
            fd.close()
        data = os.pread(self._fd.fileno(), _COUNTS.size, 0)
        if len(data) < _COUNTS.size or not data.startswith(_MAGIC):
            log.error("the count of restores cannot be read: counting begins anew")
        else:
            _, self.finished, self.failed, self.lost, self.under_way = _COUNTS.unpack(data)
        if self.under_way:
            log.warning(
                "restores that were under way when the daemon before this one died: %d",
                self.under_way,
            )
            self.lost += self.under_way
            self.under_way = 0
        self._write()

    def _write(self) -> None:
        counts = (self.finished, self.failed, self.lost, self.under_way)
        os.pwrite(self._fd.fileno(), _COUNTS.pack(_MAGIC, *counts), 0)
        # Not before there is something to count: who stores something has begun to serve.
        if self._store is not None and not self._store.holds(NAME):
            try:
                self._store.put(NAME, [self._fd])
            except StoreError as error:
                log.warning("the count of restores does not outlive this process: %s", error)

    @property
    def over(self) -> int:
        """How many restores are over."""
        return self.finished + self.failed + self.lost

    def begin(self) -> None:
        """Count a restore that hands its first process over, before that is looked at."""
        self.under_way += 1
        self._write()

    def end(self) -> None:
        """Count it as under way no longer; how it has ended is said next."""
        self.under_way -= 1  # written together with that

    def finish(self) -> None:
        """Count a restore that has handed everything over."""
        self.finished += 1
        self._write()

    def fail(self) -> None:
        """Count a restore that has failed, or was refused."""
        self.failed += 1
        self._write()

    def forget(self) -> None:
        """Take the count out of the store: what it is of is over."""
        if self._store is not None:
            with contextlib.suppress(StoreError):
                self._store.remove(NAME)

    def close(self) -> None:
        """Let go of it; what is in the store stays there."""
        self._fd.close()


def _create() -> OwnedFd:
    fd = OwnedFd(os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        os.ftruncate(fd.fileno(), _COUNTS.size)
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except BaseException:
        fd.close()
        raise
    return fd
