"""Stand between ``criu restore`` and the lazy-pages daemon, and hold back one word.

    with LazyRelay(work, daemon_work) as relay:
        ...                     restores connect to work/lazy-pages.socket
        relay.release()         now the daemon hears that they are finished

The last word of a restore is that it has finished; upon it a daemon begins to push the pages that
nobody has touched.  Held back, it pushes nothing: what it serves is faults alone, and all of
them come before the restore is finished, as far as the daemon can know.

Knows: ``lazy-pages.socket``: pids, descriptors, the last word.
Must not know: CRIU, aiouffd.
"""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Final, Self

NAME: Final = "lazy-pages.socket"
FINISHED: Final = 0x52535446.to_bytes(4, "little")


class LazyRelay:
    """Passes numbers and descriptors on, and the last word when it is told to.

    Attributes:
        tasks: Pids that were passed on so far, as restores named them; zombies are negative.
        finished: How many restores have said their last word.
    """

    def __init__(self, work: Path, daemon_work: Path) -> None:
        self.tasks: list[int] = []
        self.finished = 0
        self._to = str(daemon_work / NAME)
        path = work / NAME
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._open: list[socket.socket] = []
        self._released = threading.Event()
        self._closing = False
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def release(self) -> None:
        """Pass the last words on, from now on without delay."""
        self._released.set()

    def _accept(self) -> None:
        while True:
            try:
                restore, _ = self._listener.accept()
            except OSError:
                return  # shut down
            daemon = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            daemon.connect(self._to)
            self._open += [restore, daemon]
            thread = threading.Thread(target=self._pass_on, args=(restore, daemon))
            self._threads.append(thread)
            thread.start()

    def _pass_on(self, restore: socket.socket, daemon: socket.socket) -> None:
        try:
            while len(word := restore.recv(4, socket.MSG_WAITALL)) == 4:
                if word == FINISHED:
                    self.finished += 1
                    self._released.wait()
                    if not self._closing:
                        daemon.sendall(word)
                    return
                daemon.sendall(word)
                pid = int.from_bytes(word, "little", signed=True)
                if pid > 0:
                    data, fds, _, _ = socket.recv_fds(restore, 1, 1)
                    socket.send_fds(daemon, [data], fds)
                    os.close(fds[0])
                self.tasks.append(pid)
        finally:
            daemon.shutdown(socket.SHUT_RDWR)
            restore.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing = not self._released.is_set()
        self._released.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for each in self._open:
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the other end has gone
        for thread in self._threads:
            thread.join()
        for each in (self._listener, *self._open):
            each.close()
