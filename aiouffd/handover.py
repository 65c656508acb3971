"""A userfaultfd handed over by another process: what comes with it, and who it came from.

Knows: the values of a hand-over, peers' credentials and pidfds.
Must not know: any protocol's bytes, what is done with a userfaultfd.

Laws of this file:

* A peer is pinned by SO_PEERPIDFD, which cannot name a stranger.  Credentials followed by
  pidfd_open can (the peer exits, its pid is reused): only when asked for.
* Signals go through the pidfd, never to a pid.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self, TypeAlias

from .errors import NotSupported, PeerError
from .fds import OwnedFd
from .kernel.abi import SO_PEERPIDFD
from .uffd import Mode
from .unix_socket import Connection

_UCRED: Final = struct.Struct("=iII")  # pid, uid, gid


@dataclass(frozen=True, slots=True)
class HandedRegion:
    """One stretch of a peer's memory, and where its bytes begin in the source.

    Attributes:
        start: First address in the peer.
        length: Bytes, a multiple of the page size.
        offset: Where the bytes of ``start`` lie in the source.
        page_size: Size of the memory's pages, in bytes.
        modes: What the peer has registered it for.
    """

    start: int
    length: int
    offset: int
    page_size: int
    modes: Mode = Mode.MISSING

    @property
    def end(self) -> int:
        """The first address behind the region."""
        return self.start + self.length

    def __str__(self) -> str:
        return f"{self.start:#x}-{self.end:#x}"


@dataclass(frozen=True, slots=True)
class Handover:
    """What a peer hands over: a userfaultfd, the memory it covers, perhaps more descriptors.

    Attributes:
        fd: The userfaultfd, whose regions the peer has registered.
        regions: The memory; disjoint.
        others: Further descriptors, such as a memfd with the guest's memory.
        acknowledge: What the peer waits for once it is served; empty if it waits for nothing.
        dialect: Which protocol, and which flavour of it, the peer spoke.
        part: Which part of the image it is, where images have parts: a restored task, by the
            pid that it has in there.
        zero_elsewhere: What is registered and lies in no region reads zero.
        alone: Nobody else has a copy of the userfaultfd, so that closing it gives the memory
            back, all at once.
        peer: Whose memory it is, where that is not the process that has connected; pinned.
            Whoever takes the hand-over closes it.
    """

    fd: OwnedFd
    regions: tuple[HandedRegion, ...]
    others: tuple[OwnedFd, ...] = ()
    acknowledge: bytes = b""
    dialect: str = ""
    part: str = ""
    zero_elsewhere: bool = False
    alone: bool = False
    peer: Peer | None = None

    @property
    def backed(self) -> bool:
        """Whether it is registered for minor faults alone: the memory maps the image itself.

        Unregistered it has the right bytes, so nothing in it is ever missing, and closing
        needs no policy.
        """
        return not any(region.modes & Mode.MISSING for region in self.regions)

    def close(self) -> None:
        """Close every descriptor that nobody has taken over."""
        for fd in (self.fd, *self.others):
            fd.close()


#: The receiving half of a protocol: takes a new connection, gives what the peer hands over.  If
#: that is several hand-overs, one after the other, each is served as soon as it is given; but
#: nothing is brought ahead of demand before the last: until then memory may not be registered.
#: The end of the generator is that moment; if it raises, the peer has failed in the middle.
Receive: TypeAlias = Callable[[Connection], Awaitable[Handover] | AsyncGenerator[Handover, None]]


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end, held so that its pid cannot come to mean another.

    Attributes:
        pid: Its process id, in our pid namespace; for messages, never for signals.
        uid: Its effective user when it connected.
        gid: Its effective group when it connected.
        pidfd: Readable as soon as it has exited.
    """

    pid: int
    uid: int
    gid: int
    pidfd: OwnedFd = field(repr=False)

    def __str__(self) -> str:
        return f"pid {self.pid} (uid {self.uid})"

    def exited(self) -> bool:
        """Say whether the process has exited (a zombie has)."""
        poll = select.poll()
        poll.register(self.pidfd.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def kill(self) -> None:
        """Send SIGKILL, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd.fileno(), signal.SIGKILL)

    def close(self) -> None:
        """Close the pidfd; a second call does nothing."""
        self.pidfd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Give (pid, uid, gid) of who connected, or listened, at the time it did.

    Kernel: SO_PEERCRED.
    """
    return _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))


def pin_peer(sock: socket.socket, *, allow_pid_race: bool = False) -> Peer:
    """Find out who is at the other end, and hold it.

    Kernel: SO_PEERPIDFD, since Linux 6.5.

    Args:
        sock: A connected Unix socket.
        allow_pid_race: On an older kernel go by SO_PEERCRED and pidfd_open.  If the peer
            exits in between and its pid is reused, a stranger is pinned, and perhaps killed.

    Raises:
        PeerError: The peer has exited, or cannot be named (it runs in a foreign pid
            namespace).
        NotSupported: The kernel has no SO_PEERPIDFD, and ``allow_pid_race`` is not set.
    """
    pid, uid, gid = peer_credentials(sock)
    who = f"pid {pid} (uid {uid})"
    try:
        pidfd = OwnedFd(sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            # ESRCH, EINVAL: exited and reaped.  ENODATA: a socket without a peer process.
            raise PeerError(f"cannot be pinned, it has exited: {error.strerror}", who) from error
        if not allow_pid_race:
            raise NotSupported(
                "SO_PEERPIDFD is missing (Linux before 6.5): a peer cannot be pinned safely",
                "Use a newer kernel, or accept the race of pid and pidfd_open"
                " (allow_pid_race=True, --allow-pid-race).",
            ) from error
        pidfd = _pidfd_by_pid(pid, who)
    peer = Peer(pid, uid, gid, pidfd)
    if peer.exited():
        peer.close()
        raise PeerError("has exited", who)
    return peer


def _pidfd_by_pid(pid: int, who: str) -> OwnedFd:
    if pid <= 0:
        raise PeerError("has no pid in this pid namespace", who)
    try:
        return OwnedFd(os.pidfd_open(pid))
    except ProcessLookupError as error:
        raise PeerError("has exited", who) from error
