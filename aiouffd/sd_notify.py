"""The service manager's protocol: say how we are, hand descriptors over, take them back.

Knows: the datagrams of sd_notify(3), the environment of sd_listen_fds(3).
Must not know: what is said, what the descriptors are for, who plays the service manager.

Laws of this file:

* One sender: everything that is said to the service manager goes through a Channel.
* What was handed to us is close-on-exec and owned before anything else is done with it, and
  only the process that was meant takes it.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import MutableMapping, Sequence
from typing import Final

from .fds import OwnedFd

_FIRST_FD: Final = 3
_SEND_TIMEOUT: Final = 5.0  # seconds: its queue is short, and it may be slow for a moment


class Channel:
    """An open way to the service manager, for who has much to say or little time.

    Sharing: any thread.
    """

    def __init__(self, path: str) -> None:
        """Connect.

        Args:
            path: Of its socket; ``@…`` is an abstract one.

        Raises:
            OSError: It does not listen.
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.settimeout(_SEND_TIMEOUT)
            self._socket.connect("\0" + path[1:] if path.startswith("@") else path)
        except BaseException:
            self._socket.close()
            raise

    def send(self, state: str, fds: Sequence[int] = ()) -> None:
        """Say something; see ``notify``."""
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._socket.sendmsg([state.encode()], control, socket.MSG_NOSIGNAL)

    def close(self) -> None:
        """Close it; a second call does nothing."""
        self._socket.close()


def notify(state: str, fds: Sequence[int] = (), *, path: str | None = None) -> bool:
    """Tell the service manager something, with descriptors beside it.

    Once this returns, the message and its descriptors outlive this process.

    Args:
        state: Lines of ``NAME=value``: ``READY=1``, ``WATCHDOG=1``, ``STATUS=…``.
        fds: Descriptors that travel with it; they stay the caller's.
        path: Of its socket, ``@…`` is an abstract one; by default $NOTIFY_SOCKET.

    Returns:
        False if there is no service manager to tell.

    Raises:
        OSError: It does not listen, or has not read for seconds.
    """
    path = os.environ.get("NOTIFY_SOCKET", "") if path is None else path
    if not path:
        return False
    with contextlib.closing(Channel(path)) as channel:
        channel.send(state, fds)
    return True


def take_listen_fds(
    environment: MutableMapping[str, str] | None = None,
) -> list[tuple[str, OwnedFd]]:
    """Take over the descriptors that the service manager has started this process with.

    They are sockets to listen on, and what the fd store kept.  The variables that tell of them
    are taken out of the environment: a second call, and every child, finds none.

    Args:
        environment: Where LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES are; by default ours.

    Returns:
        (name, descriptor) of each, in order; the caller owns them.
    """
    environment = os.environ if environment is None else environment
    count, pid = environment.pop("LISTEN_FDS", ""), environment.pop("LISTEN_PID", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    environment.pop("LISTEN_PIDFDID", None)
    if not count.isdecimal() or pid != str(os.getpid()):
        return []
    taken = []
    for number in range(int(count)):
        os.set_inheritable(_FIRST_FD + number, False)
        name = names[number] if number < len(names) and names[number] else "unknown"
        taken.append((name, OwnedFd(_FIRST_FD + number)))
    return taken
