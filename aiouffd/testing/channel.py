"""Messages between a test process and its helper, with descriptors beside them.

Knows: a socket that keeps messages apart, and how a message is written.
Must not know: what the messages say.

Both ends are the same interpreter, started by the same user a moment ago, so a message is a
tuple as ``marshal`` writes it: quick, and bytes stay bytes.

Laws of this file:

* A message is whole or not there (SOCK_SEQPACKET); one that is too long is refused by who sends.
* Descriptors that arrive are close-on-exec, and belong to who receives the message.
"""

from __future__ import annotations

import errno
import marshal
import os
import socket
from collections.abc import Sequence
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
            ValueError: The message is longer than ``LONGEST``.
        """
        data = marshal.dumps(message)
        if len(data) > LONGEST:
            raise ValueError(
                f"a message of {len(data)} bytes is too long: {LONGEST} fit; it begins with"
                f" {repr(message)[:60]}"
            )
        if fds:
            socket.send_fds(self.sock, [data], list(fds))
        else:
            self.sock.send(data)

    def receive(self) -> tuple[Message, tuple[int, ...]] | None:
        """Receive one message.

        Returns:
            It and the descriptors that came along; None if the other end has closed.

        Raises:
            OSError: There is none (EAGAIN, ETIMEDOUT), or it was cut off (EMSGSIZE).
        """
        try:
            data, fds, flags, _ = socket.recv_fds(self.sock, LONGEST, _FDS)
        except ConnectionResetError:  # closed before it had read all that we had sent
            return None
        for fd in fds:
            os.set_inheritable(fd, False)
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            for fd in fds:
                os.close(fd)
            raise OSError(errno.EMSGSIZE, f"a message of more than {LONGEST} bytes was cut off")
        if not data:
            return None
        message: Message = marshal.loads(data)  # noqa: S302 - our own child wrote it
        return message, tuple(fds)

    def close(self) -> None:
        """Close this end; a second call does nothing."""
        self.sock.close()


def fitting(items: Sequence[Any]) -> int:
    """Say how many of the first items go into one message; one at the least.

    A message takes ``PIECE`` bytes of them, and has room for a little more beside.
    """
    length = 0
    for count, item in enumerate(items):
        length += len(marshal.dumps(item))
        if length > PIECE:
            return max(count, 1)
    return len(items)


def pair() -> tuple[Channel, socket.socket]:
    """Make both ends: ours, and the socket that the helper inherits."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * LONGEST)
    return Channel(ours), theirs
