"""What a process has mapped where: ``/proc/PID/maps``.

Knows: the lines of that file.
Must not know: what the mappings are for, what lies in their pages.

Laws of this file:

* A descriptor of it stays with one process's memory; when that has ended it lists nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Final, NamedTuple

from ..errors import NotSupported
from . import calls

_READ_BYTES: Final = 64 * 1024  # the kernel gives a page's worth at a time


class Mapping(NamedTuple):
    """One mapping of a process."""

    start: int  #: first address
    end: int  #: one past the last
    shared: bool  #: MAP_SHARED: what is written is the file's
    offset: int  #: of its first byte in the file
    device: tuple[int, int]  #: major and minor number of the file's file system
    inode: int  #: of the file; 0 for anonymous memory


def open_maps(pid: int | str = "self") -> int:
    """Open the list of a process's mappings.

    Kernel: /proc/PID/maps.

    Args:
        pid: A process id, or ``self``.

    Returns:
        A close-on-exec descriptor, for ``mappings``.

    Raises:
        NotSupported: This user may not look into that process.
        FileNotFoundError: There is no such process.
    """
    calls.require_linux()
    path = f"/proc/{pid}/maps"
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError as error:
        raise NotSupported(
            f"{path} cannot be opened ({error.strerror})",
            "It takes the process's own user (and a process that may be dumped) or CAP_SYS_PTRACE.",
        ) from error


def mappings(fd: int) -> list[Mapping]:
    """List what is mapped, in order of address.

    Args:
        fd: From ``open_maps``.

    Returns:
        The mappings; none if the process has exited or called exec.

    Sharing: any thread, one at a time for a descriptor.
    """
    text = bytearray()
    try:
        while chunk := os.pread(fd, _READ_BYTES, len(text)):
            text += chunk
    except ProcessLookupError:
        return []
    return list(parsed(bytes(text).splitlines()))


def parsed(lines: Iterable[bytes]) -> Iterable[Mapping]:
    """Read lines such as ``7f00-7f10 rw-s 00001000 00:01 4711   /memfd:ram (deleted)``."""
    for line in lines:
        where, rights, offset, device, inode = line.split(None, 5)[:5]
        start, _, end = where.partition(b"-")
        major, _, minor = device.partition(b":")
        yield Mapping(
            int(start, 16),
            int(end, 16),
            rights[3:4] == b"s",
            int(offset, 16),
            (int(major, 16), int(minor, 16)),
            int(inode),
        )
