"""Unix stream sockets that carry descriptors: connections, and where a server listens.

Knows: sockets, SCM_RIGHTS, a socket's name in the file system.
Must not know: what the bytes mean, what the descriptors are for.

Laws of this file:

* Every descriptor that arrives is in an OwnedFd before anything else can fail, is
  close-on-exec, and is closed if the message that carried it is refused.
* A socket is created 0600 in a directory that belongs to the server, and appears under its
  name with a rename: there is no moment with other rights or without a listener.
* Only the server's own socket is unlinked: a newer server's on the same path stays, and so
  does one that the service manager made.
* A message whose descriptors find no room is left in the socket until there is some: the last
  copy of a userfaultfd may be in it, and lost its memory would read zeros.
* Leave the loop, then close: descriptor numbers are reused at once.

A stream socket keeps no message borders.  A descriptor comes with the read that covers the
byte it was sent with, and no read goes on past bytes that carried one (seen on Linux 6.18).
asyncio's streams cannot carry descriptors, hence the plain loop calls here.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from .errors import ClosedError, PeerError
from .fds import OwnedFd
from .kernel.abi import SCM_PIDFD, SO_PASSPIDFD

log: Final = logging.getLogger("aiouffd.server")

#: Descriptors that one read can bring; a sender of more is refused (the kernel drops the rest).
MAX_FDS: Final = 16

_SHORTAGE_PAUSE: Final = 0.1  # seconds until a message is looked at again
_SHORTAGES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_SHORT: Final = (
    "this process has no descriptor left for what a peer hands over; raise its limit (ulimit -n,"
    " LimitNOFILE=)"
)
_QUEUE_FULL_PAUSE: Final = 0.005  # seconds between tries to connect
_FD_BYTES: Final = array.array("i").itemsize
_CONTROL_BYTES: Final = socket.CMSG_SPACE(MAX_FDS * _FD_BYTES)
_SENDER_BYTES: Final = socket.CMSG_SPACE(_FD_BYTES)  # its pidfd has a record of its own


class Connection:
    """A Unix stream socket on the event loop that carries bytes and descriptors.

    Sharing: one task receives, one task sends.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected socket.

        Args:
            sock: A Unix stream socket; it becomes non-blocking.
        """
        sock.setblocking(False)
        self._socket = sock
        self._waiters: dict[str, asyncio.Future[None]] = {}

    @classmethod
    async def open(cls, path: str | os.PathLike[str]) -> Self:
        """Connect to a listening socket.

        Raises:
            OSError: Nobody listens there, or we may not connect.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # With the listener's queue full connect(2) says EAGAIN, and nothing to poll for
            # says when there is room; loop.sock_connect takes that for a connection.
            while number := sock.connect_ex(os.fspath(path)):
                if number != errno.EAGAIN:
                    raise OSError(number, os.strerror(number), os.fspath(path))
                await asyncio.sleep(_QUEUE_FULL_PAUSE)
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    @property
    def socket(self) -> socket.socket:
        """The socket, for its options."""
        return self._socket

    async def receive(self, limit: int = 65536) -> tuple[bytes, list[OwnedFd]]:
        """Receive what has come, with the descriptors that came with it.

        If this process has no room for them they are waited for.

        Args:
            limit: At most so many bytes.

        Returns:
            Bytes and descriptors; no bytes at all at the end of the stream.  The caller
            owns the descriptors.

        Raises:
            PeerError: More than MAX_FDS descriptors came at once.
            ClosedError: ``close`` was called meanwhile.

        Cancellation: nothing is lost; what comes is there for the next call.
        """
        data, fds, sender = await self._receive(limit, _CONTROL_BYTES)
        if sender is not None:  # nobody has asked for it
            sender.close()
        return data, fds

    async def receive_from(self, limit: int = 65536) -> tuple[bytes, list[OwnedFd], OwnedFd | None]:
        """Receive what one process has sent, and hold that process.

        Kernel: SO_PASSPIDFD, since Linux 6.5; see Listener.pass_senders.

        Args:
            limit: At most so many bytes.

        Returns:
            As ``receive``, and a pidfd of the sender, the caller's; None if the kernel gives
            none.  Bytes of two senders never come together.

        Raises:
            PeerError: As ``receive``.
            ClosedError: As ``receive``.

        Cancellation: as ``receive``.
        """
        return await self._receive(limit, _CONTROL_BYTES + _SENDER_BYTES)

    async def _receive(
        self, limit: int, control_bytes: int
    ) -> tuple[bytes, list[OwnedFd], OwnedFd | None]:
        warned = False
        while True:
            try:
                # A look first: what finds no free number in this process the kernel throws away.
                there, missing = self._look(limit, control_bytes)
                if missing and not _are_free(missing):
                    if not warned:
                        log.warning(_SHORT)
                        warned = True
                    await asyncio.sleep(_SHORTAGE_PAUSE)
                    if self._socket.fileno() < 0:
                        raise ClosedError("this connection is closed")
                    continue
                # No more than that: what has come since may bring more descriptors.
                data, control, flags, _ = self._socket.recvmsg(
                    there, control_bytes, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await self._wait("reader")
                continue
            except ConnectionResetError:  # it closed with unread bytes of ours: the end, too
                return b"", [], None
            fds = _descriptors(control, socket.SCM_RIGHTS)
            senders = _descriptors(control, SCM_PIDFD)
            if flags & socket.MSG_CTRUNC:
                for fd in (*fds, *senders):
                    fd.close()
                raise PeerError(
                    f"sent more than {MAX_FDS} descriptors at once"
                    if len(fds) >= MAX_FDS
                    else "sent descriptors that this process may not have, or has no room for"
                    " (ulimit -n, LimitNOFILE=)"
                )
            return data, fds, senders[0] if senders else None

    def _look(self, limit: int, control_bytes: int) -> tuple[int, int]:
        """Look at what the next read would bring, without taking it.

        Returns:
            How many bytes; and, if descriptors were missing, how many free numbers it takes.
        """
        data, control, flags, _ = self._socket.recvmsg(
            limit, control_bytes, socket.MSG_CMSG_CLOEXEC | socket.MSG_PEEK
        )
        fds = _descriptors(control, socket.SCM_RIGHTS) + _descriptors(control, SCM_PIDFD)
        for fd in fds:
            fd.close()
        cut = flags & socket.MSG_CTRUNC and len(fds) < MAX_FDS
        if cut or _has_no_sender_for_want_of_room(control):
            return len(data), len(fds) + 2  # another one, and the sender's
        return len(data), 0

    async def send(self, data: bytes, fds: Sequence[OwnedFd | int] = ()) -> None:
        """Send bytes, and descriptors with the first of them.

        Args:
            data: At least one byte if there are descriptors.
            fds: Descriptors; they stay the caller's.

        Raises:
            ValueError: There are descriptors, but no byte to carry them.
            OSError: The peer is gone.
            ClosedError: ``close`` was called meanwhile.

        Cancellation: a part may have been sent; close the connection.
        """
        if fds and not data:
            raise ValueError("descriptors travel with a byte; there is none")
        numbers = array.array("i", [fd if isinstance(fd, int) else fd.fileno() for fd in fds])
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if fds else []
        view = memoryview(data)
        while view:
            try:
                done = self._socket.sendmsg([view], control, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                await self._wait("writer")
                continue
            view = view[done:]
            control = []

    async def _wait(self, side: str) -> None:
        """Wait until the socket is ready on one side, with one waiter per side."""
        if self._socket.fileno() < 0:
            raise ClosedError("this connection is closed")
        if side in self._waiters:
            raise RuntimeError(f"another task is the {side} of this connection")
        loop = asyncio.get_running_loop()
        waiter = self._waiters[side] = loop.create_future()
        add = loop.add_reader if side == "reader" else loop.add_writer
        remove = loop.remove_reader if side == "reader" else loop.remove_writer
        number = self._socket.fileno()
        add(number, _resolve, waiter)
        try:
            await waiter
        finally:
            if self._waiters.pop(side, None) is not None:  # else close() has removed it
                remove(number)

    def close(self) -> None:
        """Close the socket; who waits on it gets ClosedError.  A second call does nothing."""
        # The number is reused at once: leave the loop before it is closed.
        waiters, self._waiters = self._waiters, {}
        for side, waiter in waiters.items():
            loop = waiter.get_loop()
            remove = loop.remove_reader if side == "reader" else loop.remove_writer
            remove(self._socket.fileno())
            if not waiter.done():
                waiter.set_exception(ClosedError("this connection was closed"))
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _descriptors(control: Sequence[tuple[int, int, bytes]], wanted: int) -> list[OwnedFd]:
    """Take the descriptors out of a message's ancillary records of one kind."""
    fds: list[OwnedFd] = []
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == wanted:
            numbers = array.array("i")
            # A cut record may end in the middle of a number.
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            # A sender that has been reaped has no pidfd: the kernel puts minus an errno there.
            fds.extend(OwnedFd(number) for number in numbers if number >= 0)
    return fds


def _has_no_sender_for_want_of_room(control: Sequence[tuple[int, int, bytes]]) -> bool:
    """Say whether the kernel had no descriptor to hold the sender by."""
    return any(
        level == socket.SOL_SOCKET
        and kind == SCM_PIDFD
        and -int.from_bytes(data, sys.byteorder, signed=True) in _SHORTAGES
        for level, kind, data in control
    )


def _are_free(count: int) -> bool:
    """Say whether this process can have so many more descriptors."""
    with contextlib.ExitStack() as stack:
        try:
            first = os.eventfd(0, os.EFD_CLOEXEC)
            stack.callback(os.close, first)
            for _ in range(count - 1):
                stack.callback(os.close, os.dup(first))
        except OSError:
            return False
    return True


class Listener:
    """A listening Unix socket under a name in the file system."""

    def __init__(
        self, sock: socket.socket, directory: OwnedFd | None, name: str, path: str
    ) -> None:
        """Use ``bind`` or ``adopt`` instead."""
        self._socket = sock
        self._directory = directory
        self._name = name
        self._identity = self._identify()
        self.path = path

    @classmethod
    def bind(
        cls,
        path: str | os.PathLike[str],
        *,
        mode: int = 0o600,
        replace: bool = False,
        any_directory: bool = False,
        backlog: int = 128,
    ) -> Self:
        """Listen under a path; a socket that a dead server left there is replaced.

        Args:
            path: The socket's name; its directory is created (0700) if there is none.
            mode: Rights of the socket; who may write to it may connect.
            replace: Take the name over from a server that still listens there.
            any_directory: Put it into a directory that others own or may write to.
            backlog: Connections that the kernel holds until they are accepted.

        Raises:
            PermissionError: The directory belongs to somebody else, or others may write to it.
            OSError: EADDRINUSE: a server listens there; EEXIST: no socket has this name.
        """
        path = os.path.abspath(path)
        parent, name = os.path.split(path)
        with contextlib.suppress(FileExistsError):
            os.mkdir(parent, 0o700)
        directory = OwnedFd(os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            if not any_directory:
                _check_directory(directory, parent)
            # Through the descriptor: no length limit (108 bytes), no directory put in its place.
            place = f"/proc/self/fd/{directory.fileno()}"
            _check_name(f"{place}/{name}", path, replace=replace)
            new = f".{os.getpid():x}.{os.urandom(4).hex()}"
            os.fchmod(sock.fileno(), mode)  # before bind: the name is born with these rights
            sock.bind(f"{place}/{new}")
            try:
                if mode & 0o066:  # the umask has taken these
                    os.chmod(f"{place}/{new}", mode)
                sock.listen(backlog)
                os.rename(f"{place}/{new}", f"{place}/{name}")
            except BaseException:
                os.unlink(f"{place}/{new}")
                raise
            return cls(sock, directory, name, path)
        except BaseException:
            sock.close()
            directory.close()
            raise

    @classmethod
    def adopt(cls, fd: OwnedFd) -> Self:
        """Listen on a socket that somebody else has made and keeps the name of.

        Args:
            fd: Taken over, or closed.

        Raises:
            ValueError: It is no listening Unix stream socket.
        """
        with contextlib.closing(fd):
            if not stat.S_ISSOCK(os.fstat(fd.fileno()).st_mode):
                raise ValueError(f"descriptor {fd.fileno()} is no socket")
            sock = socket.socket(fileno=os.dup(fd.fileno()))
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM) or not listens:
            sock.close()
            raise ValueError("the socket does not listen for Unix streams")
        sock.setblocking(False)
        name = sock.getsockname()
        abstract = isinstance(name, bytes)
        path = "@" + os.fsdecode(name[1:]) if abstract else str(name)
        return cls(sock, None, "", path)

    @classmethod
    def resume(
        cls, fd: OwnedFd, path: str | os.PathLike[str], identity: tuple[int, int]
    ) -> Self | None:
        """Listen on, on a socket that a process before us has bound; the descriptor is owned.

        Args:
            fd: Listening.
            path: The socket's name.
            identity: What ``identity`` was there.

        Returns:
            None if the name is another's by now; the descriptor is closed then.
        """
        path = os.path.abspath(path)
        parent, name = os.path.split(path)
        sock = socket.socket(fileno=fd.detach())
        sock.setblocking(False)
        try:
            directory = OwnedFd(os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError:
            sock.close()
            return None
        listener = cls(sock, directory, name, path)
        if listener.identity == identity:
            return listener
        listener._identity = None
        listener.close()
        return None

    @property
    def identity(self) -> tuple[int, int] | None:
        """(device, inode) of the name when it was bound."""
        return self._identity

    def fileno(self) -> int:
        """Give the listening descriptor's number.

        Raises:
            ClosedError: It is closed.
        """
        if self._socket.fileno() < 0:
            raise ClosedError(f"the socket {self.path} is closed")
        return self._socket.fileno()

    def pass_senders(self) -> bool:
        """Let whoever is accepted from now on be told by ``receive_from`` who sends what.

        A connection hands more than one process over where several write to it: each is known
        by what it has sent itself.  Set here and not on what was accepted, there is no message
        that comes too early.

        Kernel: SO_PASSPIDFD, since Linux 6.5.

        Returns:
            Whether the kernel can.
        """
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, 1)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
            return False
        return True

    def accept(self) -> Connection | None:
        """Take the next connection, without waiting.

        Returns:
            The connection, or None if nobody waits.

        Raises:
            OSError: EMFILE, ENFILE and the like: try again later.
        """
        try:
            sock, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        return Connection(sock)

    def _identify(self) -> tuple[int, int] | None:
        if self._directory is None:
            return None
        try:
            status = os.stat(self._name, dir_fd=self._directory.fileno(), follow_symlinks=False)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def close(self) -> None:
        """Stop listening; unlink the name if it is still ours.  A second call does nothing."""
        directory = self._directory
        if directory is not None and not directory.closed:
            # While our socket is open its inode number cannot come to mean another socket.
            if self._identity is not None and self._identify() == self._identity:
                os.unlink(self._name, dir_fd=directory.fileno())
            directory.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _check_directory(directory: OwnedFd, path: str) -> None:
    status = os.fstat(directory.fileno())
    if status.st_uid != os.geteuid():
        raise PermissionError(
            errno.EPERM,
            f"the socket's directory belongs to uid {status.st_uid}, who could put another"
            f" socket in its place; use one of uid {os.geteuid()}, or say"
            " any_directory (--any-directory)",
            path,
        )
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        raise PermissionError(
            errno.EPERM,
            f"others may write to the socket's directory ({stat.filemode(status.st_mode)})"
            " and put another socket in its place; chmod go-w, or say"
            " any_directory (--any-directory)",
            path,
        )


def _check_name(place: str, path: str, *, replace: bool) -> None:
    """Refuse a name that is taken by anything but a socket without a listener."""
    try:
        status = os.lstat(place)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise FileExistsError(errno.EEXIST, "something that is no socket has this name", path)
    if replace:
        return
    # Of another type than ours: a living socket refuses it by that (EPROTOTYPE), and its server
    # hears nothing of it; a dead one refuses everybody.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        if probe.connect_ex(place) in (errno.ECONNREFUSED, errno.ENOENT):
            return
    raise OSError(
        errno.EADDRINUSE, "a server listens there; stop it, or take the name over (--replace)", path
    )
