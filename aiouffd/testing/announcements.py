"""What child programs say of themselves: that they run under the harness, and what they map.

Knows: the messages of ``preload.c``, and the socket on which they come.
Must not know: rules, pages, how a mapping is watched; who is called for one does.

Laws of this file:

* Who does not know a program's key is not heard, and costs a bounded number of descriptors.
* A program waits for each answer, so an answer follows at once.
* A descriptor that comes with a message is handed on or closed.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Self

from ..errors import UffdError
from ..fds import OwnedFd
from .turning import Turning

KEY_BYTES: Final = 16
LOADED: Final = 1
MAPPED: Final = 2
REFUSED: Final = 3

#: key, what, region, address, length, offset, errno, reason; its twin is in preload.c.
_MESSAGE: Final = struct.Struct("=16sIIQQQI60s")
_ANSWER: Final = struct.Struct("=I")
_CREDENTIALS: Final = struct.Struct("=3i")
_WAITING: Final = 64  # programs that have connected and not spoken yet


@dataclass(frozen=True, slots=True)
class Announcement:
    """One message of a program.

    Attributes:
        key: Says which program it is, and that it is one of the harness's.
        what: LOADED, MAPPED or REFUSED.
        region: The region's number.
        address: Where the mapping begins.
        length: Of the mapping, in bytes.
        offset: Of the mapping in the region, in bytes.
        error: Why it was refused: an errno.
        reason: ... in words.
    """

    key: bytes
    what: int
    region: int = 0
    address: int = 0
    length: int = 0
    offset: int = 0
    error: int = 0
    reason: str = ""

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read one message.

        Raises:
            ValueError: It is not as long as one, or of no known kind.
        """
        if len(data) != _MESSAGE.size:
            raise ValueError(f"an announcement has {_MESSAGE.size} bytes, not {len(data)}")
        key, what, region, address, length, offset, error, reason = _MESSAGE.unpack(data)
        words = reason.partition(b"\0")[0].decode(errors="replace")
        found = cls(key, what, region, address, length, offset, error, words)
        if found.what not in (LOADED, MAPPED, REFUSED):
            raise ValueError(f"{found.what} is no kind of announcement")
        return found

    def to_bytes(self) -> bytes:
        """Write it as a program does."""
        return _MESSAGE.pack(
            *(self.key, self.what, self.region, self.address, self.length, self.offset),
            *(self.error, self.reason.encode()),
        )


@dataclass(slots=True)
class Known:
    """What has been heard of one program and of those that it has started.

    Attributes:
        loaded: Process ids that run under the harness.
        mapped: (process, region) of each mapping.
        refused: (process, region, errno, reason) of each mapping that was not made.
    """

    loaded: list[int] = field(default_factory=list)
    mapped: list[tuple[int, int]] = field(default_factory=list)
    refused: list[tuple[int, int, int, str]] = field(default_factory=list)


class Announcements:
    """Hears programs on one socket.

    Sharing: one thread.
    """

    def __init__(
        self,
        turning: Turning,
        *,
        loaded: Callable[[], None],
        mapped: Callable[[int, Announcement, OwnedFd], None],
    ) -> None:
        """Begin without a socket.

        Args:
            turning: The loop.
            loaded: Called when a program begins, or is another one from now on (exec).
            mapped: Called for a mapping: process id, announcement, userfaultfd, which it owns.
        """
        self._turning = turning
        self._loaded = loaded
        self._mapped = mapped
        self._keys: dict[bytes, Known] = {}
        self._programs: dict[int, Known] = {}
        self._listener: socket.socket | None = None
        self._waiting: list[socket.socket] = []

    def listen(self, fd: OwnedFd) -> None:
        """Accept programs on a listening socket, which this object closes."""
        self._listener = socket.socket(fileno=fd.detach())
        self._listener.setblocking(False)
        self._turning.watch(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Hear nobody any more; who waits for an answer finds that the harness has ended."""
        for sock in [*self._waiting, *([self._listener] if self._listener else [])]:
            self._turning.forget(sock.fileno())
            sock.close()
        self._waiting.clear()
        self._listener = None

    def expect(self, program: int, key: bytes) -> None:
        """Know a program that is about to start."""
        self._programs[program] = self._keys[key] = Known()

    def known(self, program: int) -> Known:
        """Say what was heard of a program."""
        return self._programs[program]

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        sock.setblocking(False)
        if len(self._waiting) == _WAITING:
            self._drop(self._waiting[0])
        self._waiting.append(sock)
        self._turning.watch(sock.fileno(), lambda: self._hear(sock))

    def _drop(self, sock: socket.socket) -> None:
        if sock not in self._waiting:
            return  # dropped in the same round
        self._waiting.remove(sock)
        self._turning.forget(sock.fileno())
        sock.close()

    def _hear(self, sock: socket.socket) -> None:
        try:
            data, numbers, _, _ = socket.recv_fds(sock, _MESSAGE.size + 1, 1)
            fds = [OwnedFd(number) for number in numbers]
            answer = self._answer(sock, data, fds)
            for fd in fds:
                fd.close()  # unless it was handed on
            sock.send(_ANSWER.pack(answer))
        except OSError:
            pass  # it has gone
        self._drop(sock)

    def _answer(self, sock: socket.socket, data: bytes, fds: list[OwnedFd]) -> int:
        """Take in one message; give 0 or an errno."""
        try:
            message = Announcement.parse(data)
        except ValueError:
            return errno.EPROTO
        known = self._keys.get(message.key)
        if known is None:
            return errno.EACCES
        process, _, _ = _CREDENTIALS.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        if message.what == LOADED:
            known.loaded.append(process)
            self._loaded()
        elif message.what == REFUSED:
            known.refused.append((process, message.region, message.error, message.reason))
        elif not fds:
            return errno.EPROTO
        else:
            try:
                self._mapped(process, message, OwnedFd(fds.pop().detach()))
            except (UffdError, OSError, ValueError):
                return errno.EPROTO
            known.mapped.append((process, message.region))
        return 0
