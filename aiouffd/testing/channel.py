"""Messages between a test process and its helper, with descriptors beside them.

Knows: a socket that keeps messages apart, and how a message is written.
Must not know: what the messages say.

Both ends are the same interpreter, started by the same user a moment ago, so a message is a
tuple as ``marshal`` writes it: quick, and bytes stay bytes.

Laws of this file:

* A message is whole or not there (SOCK_SEQPACKET).
* Descriptors that arrive are close-on-exec, and belong to who receives the message.
"""

from __future__ import annotations

import marshal
import os
import socket
from typing import Any, Final

Message = tuple[Any, ...]

#: The longest message; larger contents are cut by who sends them (``PIECE``).
LONGEST: Final = 128 * 1024
#: Bytes of contents that go into one message.
PIECE: Final = 96 * 1024
_FDS: Final = 4


class Channel:
    """One end of a pair of sockets that carries tuples.

    Sharing: sends may come from any thread; one thread receives.
    """

    __slots__ = ("sock",)

    def __init__(self, sock: socket.socket) -> None:
        """Take over one end of ``pair``."""
        self.sock = sock

    def fileno(self) -> int:
        """Give the socket's descriptor, to poll."""
        return self.sock.fileno()

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Send one message.

        Raises:
            OSError: The other end is gone (EPIPE), or does not read (EAGAIN, ETIMEDOUT).
        """
        data = marshal.dumps(message)
        if fds:
            socket.send_fds(self.sock, [data], list(fds))
        else:
            self.sock.send(data)

    def receive(self) -> tuple[Message, tuple[int, ...]] | None:
        """Receive one message.

        Returns:
            It and the descriptors that came along; None if the other end has closed.
        """
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, LONGEST, _FDS)
        except ConnectionResetError:  # closed before it had read all that we had sent
            return None
        for fd in fds:
            os.set_inheritable(fd, False)
        if not data:
            return None
        message: Message = marshal.loads(data)  # noqa: S302 - our own child wrote it
        return message, tuple(fds)

    def close(self) -> None:
        """Close this end; a second call does nothing."""
        self.sock.close()


def pair() -> tuple[Channel, socket.socket]:
    """Make both ends: ours, and the socket that the helper inherits."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * LONGEST)
    return Channel(ours), theirs
