"""Sharing one image between clones: the server hands a sealed memory file out, first.

Knows: the messages, the client's steps.
Must not know: sessions, servers; how the image got into memory.

======= ================================================== ===================================
Who     Sends                                              And with it
======= ================================================== ===================================
client  connects
server  8 bytes: the image's size, little-endian           the sealed memory file
client  the regions, as Firecracker says them (JSON)       the userfaultfd
server  2 bytes, when the memory is served                 nothing
======= ================================================== ===================================

In between the client maps the file **privately** (``MAP_PRIVATE``), wherever and in as many
pieces as it likes, and registers them for minor faults (``UFFDIO_REGISTER_MODE_MINOR``, Linux
5.14).  A region's ``offset`` is its place in the file.  Once it has the 2 bytes it should close
its own copy of the userfaultfd: if the server dies, the memory goes on reading right.

Laws of this file:

* The parsers make no system call; descriptors are closed if their message is refused.
* A client is never believed about the image: all it can spoil is its own memory.
* Nor that it maps it: the kernel is asked.  One that has handed over other memory instead, as a
  VMM that knows nothing of sharing does, is served page by page, and closed by the policy.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import json
import mmap
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from ..errors import PeerError
from ..fds import OwnedFd
from ..handover import HandedRegion, Handover, Receive
from ..kernel import calls
from ..ranges import PAGE_SIZE, align_up
from ..sources.shared import SharedImage
from ..uffd import Feature, Mode, Userfaultfd
from ..unix_socket import MAX_FDS, Connection
from . import firecracker

ACKNOWLEDGE: Final = b"ok"
DIALECT: Final = "shared memory"

_INVITATION: Final = struct.Struct("<Q")


class Invitation(NamedTuple):
    """What the server says first.

    Attributes:
        size: Of the image, in bytes; the file is longer by the rest of its last page.
        file: The memory file, sealed.
    """

    size: int
    file: OwnedFd


class InvitationParser:
    """Bytes and descriptors in, one Invitation out; the client's half."""

    def __init__(self) -> None:
        self._data = b""
        self._fds: list[OwnedFd] = []

    def feed(self, data: bytes, fds: Sequence[OwnedFd] = ()) -> Invitation | None:
        """Take in what one read gave.

        Args:
            data: Any bytes, in any pieces.
            fds: The descriptors that came with them; from now on the parser's to close.

        Returns:
            The invitation once it is complete; its file is the caller's.

        Raises:
            PeerError: The server broke the protocol; every descriptor is closed.
        """
        self._fds += fds
        self._data += data
        if len(self._data) > _INVITATION.size or len(self._fds) > 1:
            text = f"sent {len(self._data)} bytes and {len(self._fds)} descriptors"
            self.close()
            raise PeerError(f"{text}; {_INVITATION.size} and 1 were expected")
        if len(self._data) < _INVITATION.size:
            return None
        if not self._fds:
            raise PeerError("sent no memory file")
        (size,) = _INVITATION.unpack(self._data)
        return Invitation(size, self._fds.pop())

    def close(self) -> None:
        """Close every descriptor that has not become part of an invitation."""
        fds, self._fds = self._fds, []
        for fd in fds:
            fd.close()


def invitation(size: int) -> bytes:
    """Make the bytes that go with the memory file."""
    return _INVITATION.pack(size)


def describe(regions: Iterable[HandedRegion]) -> bytes:
    """Make the bytes that go with the userfaultfd."""
    return json.dumps(
        [
            {
                "base_host_virt_addr": region.start,
                "size": region.length,
                "offset": region.offset,
                "page_size": region.page_size,
            }
            for region in regions
        ]
    ).encode()


def receiver(image: SharedImage) -> Receive:
    """Make what a Server needs to hand an image out.

    Args:
        image: Sealed; stays the caller's.
    """

    async def receive(connection: Connection) -> Handover:
        await connection.send(invitation(image.size), [image.fileno()])
        handover = await firecracker.receive(connection)
        if not all(_maps_a_file(handover, region) for region in handover.regions):
            return handover
        return dataclasses.replace(
            handover,
            regions=tuple(
                dataclasses.replace(region, modes=Mode.MINOR) for region in handover.regions
            ),
            acknowledge=ACKNOWLEDGE,
            dialect=DIALECT,
        )

    return receive


def _maps_a_file(handover: Handover, region: HandedRegion) -> bool:
    """Ask the kernel whether memory can be continued from a file's pages, by its first page."""
    if region.page_size != PAGE_SIZE:
        return False
    done = calls.continue_(handover.fd.fileno(), region.start, PAGE_SIZE)
    return done in (PAGE_SIZE, -errno.EEXIST, -errno.EFAULT)  # the last one is a hole


def attach(path: str | os.PathLike[str]) -> mmap.mmap:
    """Map the image of a server into this process, as its own copy to write to.

    It waits for the server: in a coroutine, call it through ``asyncio.to_thread``.

    Args:
        path: The server's socket.

    Returns:
        The memory, of whole pages.  Other processes see nothing of what is written to it.

    Raises:
        PeerError: What listens there is no server of a shared image, or it refused us.
        OSError: Nobody listens there, or we may not connect.
        NotSupported: This kernel, user or container allows no userfaultfd.
    """
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        server.connect(os.fspath(path))
        size, file = _receive_invitation(server)
        stack.enter_context(file)
        length = align_up(size, PAGE_SIZE)
        if not length:
            raise PeerError("the image is empty: there is nothing to map")
        memory = mmap.mmap(
            file.fileno(), length, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
        )
        try:
            start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            uffd = stack.enter_context(
                Userfaultfd.open(Feature.MINOR_SHMEM, allow_user_mode_only=True)
            )
            uffd.register(start, length, Mode.MINOR)
            text = describe([HandedRegion(start, length, 0, PAGE_SIZE, Mode.MINOR)])
            socket.send_fds(server, [text], [uffd.fileno()])
            answer = server.recv(len(ACKNOWLEDGE), socket.MSG_WAITALL)
            if answer != ACKNOWLEDGE:
                raise PeerError("refused to serve us" if not answer else f"answered {answer!r}")
        except BaseException:
            memory.close()
            raise
    return memory


def _receive_invitation(server: socket.socket) -> Invitation:
    parser = InvitationParser()
    try:
        while True:
            data, fds, _, _ = socket.recv_fds(server, _INVITATION.size, MAX_FDS)
            owned = [OwnedFd(fd) for fd in fds]
            found = parser.feed(data, owned)
            if found is not None:
                return found
            if not data:
                raise PeerError("closed the connection without an image")
    finally:
        parser.close()
