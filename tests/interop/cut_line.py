"""A line between two programs that breaks, with a reset on both sides, after so many bytes.

Knows: TCP.
Must not know: what the bytes mean.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from types import TracebackType
from typing import Final, Self

_RESET: Final = struct.pack("ii", 1, 0)  # linger for no time at all
_PIECE: Final = 64 << 10


class CutLine:
    """Passes one connection on, until the server has answered ``after`` bytes.

    Attributes:
        port: Where it listens.
    """

    def __init__(self, to_port: int, *, after: int) -> None:
        self._to, self._left = to_port, after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._pass_on)
        self._thread.start()

    def _pass_on(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return  # shut down
        with client, socket.create_connection(("127.0.0.1", self._to)) as server:
            to = {client: server, server: client}
            while self._left > 0:
                for ready in select.select(list(to), [], [])[0]:
                    data = ready.recv(_PIECE)
                    if not data:
                        return
                    if ready is server:
                        self._left -= len(data)
                    to[ready].sendall(data)
            for each in to:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
