"""One typed function per ioctl and system call on a userfaultfd; nothing else calls them.

Knows: how to pack an argument, make the call and decode its outcome.
Must not know: ranges, handlers, loops.

Laws of this file:

* A *fill* (copy, zeropage, continue, poison, move) and ``writeprotect`` return one signed
  number and never raise: bytes done if above zero, else minus the errno.  A refused fill is
  normal traffic, and an exception per refusal would cost more than the call.
* Everything else raises OSError, as ``os`` functions do.
* Each call has an argument buffer of its own (40 ns more than one kept for reuse): another
  thread, a Python signal handler or a finaliser may make the same call in its middle.
* The result field is preset to zero and believed only if it is a whole number of pages
  within the length: older kernels leave it untouched, newer ones write a negative errno.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import io
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, NoReturn

from ..errors import NotSupported
from . import abi


def _not_linux(*_: object) -> NoReturn:
    raise NotSupported(
        "userfaultfd exists on Linux only",
        "Run this on Linux 4.3 or newer; elsewhere aiouffd can be imported but not used.",
    )


try:
    from fcntl import ioctl as _ioctl
except ImportError:  # not a Unix: importing works, using raises NotSupported
    _ioctl = _not_linux

PAGE_SIZE: Final = mmap.PAGESIZE
_EAGAIN: Final = errno.EAGAIN


_FIVE: Final = abi.UFFDIO_COPY_STRUCT.size
_FOUR: Final = abi.UFFDIO_ZEROPAGE_STRUCT.size
_THREE: Final = abi.UFFDIO_WRITEPROTECT_STRUCT.size
_TWO: Final = abi.UFFDIO_RANGE_STRUCT.size
_pack_five = abi.UFFDIO_COPY_STRUCT.pack_into
_pack_four = abi.UFFDIO_ZEROPAGE_STRUCT.pack_into
_pack_three = abi.UFFDIO_WRITEPROTECT_STRUCT.pack_into
_pack_two = abi.UFFDIO_RANGE_STRUCT.pack_into


def require_linux() -> None:
    """Refuse to go on where there is no userfaultfd at all.

    Raises:
        NotSupported: This is not Linux.
    """
    if sys.platform != "linux" or _ioctl is _not_linux:
        _not_linux()


# --- opening ---------------------------------------------------------------------------


def open_device(flags: int) -> int:
    """Open a userfaultfd through ``/dev/userfaultfd``.

    Kernel: USERFAULTFD_IOC_NEW, since Linux 6.1.

    Args:
        flags: O_CLOEXEC, O_NONBLOCK and UFFD_USER_MODE_ONLY, or'ed.

    Returns:
        The new file descriptor.
    """
    # Reading is enough for the ioctl, and may be allowed where writing is not.
    device = os.open(abi.DEVICE_PATH, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _ioctl(device, abi.USERFAULTFD_IOC_NEW, flags)
    finally:
        os.close(device)


def open_syscall(flags: int) -> int:
    """Open a userfaultfd by the system call, for which the C library has no wrapper.

    Kernel: userfaultfd(2), since Linux 4.3.

    Args:
        flags: O_CLOEXEC, O_NONBLOCK and UFFD_USER_MODE_ONLY, or'ed.

    Returns:
        The new file descriptor.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(ctypes.c_long(abi.NR_USERFAULTFD), ctypes.c_long(flags))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "userfaultfd")
    return fd


def api(fd: int, features: int) -> tuple[int, int]:
    """Shake hands: must be the first ioctl, and succeeds once in an fd's life.

    Kernel: UFFDIO_API, since Linux 4.3.

    Args:
        fd: A userfaultfd.
        features: What to enable; an unknown bit is refused with EINVAL.

    Returns:
        The features that the kernel has (all of them) and the fd's ioctls mask.
    """
    argument = bytearray(abi.UFFDIO_API_STRUCT.pack(abi.UFFD_API, features, 0))
    _ioctl(fd, abi.UFFDIO_API, argument)
    _, available, ioctls = abi.UFFDIO_API_STRUCT.unpack(argument)
    return available, ioctls


def is_userfaultfd(fd: int) -> bool:
    """Say whether a file descriptor is a userfaultfd."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == abi.ANON_INODE_LINK
    except FileNotFoundError:
        return False


class FdInfo(NamedTuple):
    """What ``/proc/PID/fdinfo/FD`` says of a userfaultfd."""

    pending: int  #: faults not yet read
    total: int  #: faults not yet resolved, read or not
    features: int  #: the features that were enabled; 0 before UFFDIO_API
    initialised: bool  #: UFFDIO_API has been done


def is_pidfd(fd: int) -> bool:
    """Say whether a descriptor is a pidfd."""
    return pid_of(fd) is not None


def pid_of(pidfd: int) -> int | None:
    """Say whose pidfd it is; -1 if that process is dead, None if it is no pidfd."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as file:
        _, found, rest = file.read().partition("\nPid:")
    return int(rest.split("\n", 1)[0]) if found else None


def fdinfo(fd: int, pid: int | str = "self") -> FdInfo:
    """Read the kernel's own account of a userfaultfd.

    Kernel: /proc/PID/fdinfo/FD, since Linux 4.3.

    Args:
        fd: The descriptor's number in that process.
        pid: A process id, or ``self``.
    """
    with open(f"/proc/{pid}/fdinfo/{fd}", "rb") as file:
        fields = dict(line.split(b":", 1) for line in file if b":" in line)
    # "API:  aa:<features, bit 31 set once initialised>:<ioctls>", hexadecimal
    _, bits, _ = fields[b"API"].split(b":")
    features = int(bits, 16)
    return FdInfo(
        pending=int(fields[b"pending"]),
        total=int(fields[b"total"]),
        features=features & ~(1 << 31),
        initialised=bool(features >> 31 & 1),
    )


def set_nonblocking(fd: int) -> None:
    """Set O_NONBLOCK: without it poll reports POLLERR for ever and an event loop spins."""
    os.set_blocking(fd, False)


def read_messages(fd: int, buffers: Sequence[bytearray | memoryview]) -> int:
    """Read as many whole messages as there are and fit.

    Kernel: read(2); page faults come before events, whatever their order of arrival.

    Args:
        fd: A non-blocking userfaultfd after UFFDIO_API.
        buffers: Where to; at least 32 bytes.

    Returns:
        Bytes read, a multiple of 32; 0 if nothing is pending.
    """
    try:
        return os.readv(fd, buffers)
    except BlockingIOError:
        return 0


def reader(fd: int, buffer: bytearray | memoryview) -> Callable[[], int | None]:
    """Make a function that does what ``read_messages`` does, always into one buffer.

    A read that finds nothing is no exception here: half a microsecond less.

    Args:
        fd: A non-blocking userfaultfd after UFFDIO_API; it stays the caller's.
        buffer: Where to; at least 32 bytes.

    Returns:
        A function that gives bytes read, a multiple of 32; None if nothing is pending.
    """
    return functools.partial(io.FileIO(fd, "rb", closefd=False).readinto, buffer)


# --- ranges ----------------------------------------------------------------------------


def register(fd: int, start: int, length: int, mode: int) -> int:
    """Ask for the faults of a range.

    Kernel: UFFDIO_REGISTER, since Linux 4.3.  Registering again with other modes *replaces*
    the old ones, unless the range has all of them already.

    Args:
        fd: A userfaultfd; any holder of it may register.
        start: Page-aligned address in the process that opened it.
        length: Whole pages, in bytes.
        mode: UFFDIO_REGISTER_MODE_MISSING, _WP, _MINOR, or'ed.

    Returns:
        The mask of ioctls for the range.
    """
    argument = bytearray(_FOUR)
    _pack_four(argument, 0, start, length, mode, 0)
    _ioctl(fd, abi.UFFDIO_REGISTER, argument)
    ioctls: int = abi.UFFDIO_REGISTER_STRUCT.unpack(argument)[3]
    return ioctls


def unregister(fd: int, start: int, length: int) -> None:
    """Give a range back to the kernel: its missing pages become zeros from then on.

    Kernel: UFFDIO_UNREGISTER, since Linux 4.3.  It wakes waiters only where MISSING was
    registered: follow it with ``wake``.
    """
    argument = bytearray(_TWO)
    _pack_two(argument, 0, start, length)
    _ioctl(fd, abi.UFFDIO_UNREGISTER, argument)


def wake(fd: int, start: int, length: int) -> None:
    """Let every thread that waits in a range try its access again.

    Kernel: UFFDIO_WAKE, since Linux 4.3.  Matches the reported address, so wake whole pages
    of the mapping's own size.  Works on any aligned range, registered or not, and says
    nothing about a target that is gone.
    """
    argument = bytearray(_TWO)
    _pack_two(argument, 0, start, length)
    _ioctl(fd, abi.UFFDIO_WAKE, argument)


# --- fills: one signed result ----------------------------------------------------------


def signed_result(number: int, field: int, length: int) -> int:
    """Turn a refused fill into one signed number.

    Args:
        number: The errno of the call.
        field: The result field afterwards: bytes done, minus an errno, or untouched (0).
        length: Bytes asked for.

    Returns:
        Bytes done, if the kernel stopped in the middle; else minus the errno.
    """
    if number == _EAGAIN and 0 < field <= length and field % PAGE_SIZE == 0:
        return field
    return -number


def copy(fd: int, destination: int, source: int, length: int, mode: int = 0) -> int:
    """Fill missing pages with bytes of this process.

    Kernel: UFFDIO_COPY, since Linux 4.3.

    Args:
        fd: A userfaultfd.
        destination: Page-aligned address in the target.
        source: Any address in this process, outside of what this process serves.
        length: Whole pages, in bytes, within one mapping.
        mode: UFFDIO_COPY_MODE_DONTWAKE, _WP, or'ed.

    Returns:
        Bytes done if above zero, else minus the errno.
    """
    argument = bytearray(_FIVE)
    _pack_five(argument, 0, destination, source, length, mode, 0)
    try:
        _ioctl(fd, abi.UFFDIO_COPY, argument)
    except OSError as error:
        return signed_result(
            error.errno or errno.EIO, abi.UFFDIO_COPY_STRUCT.unpack(argument)[4], length
        )
    return length


def move(fd: int, destination: int, source: int, length: int, mode: int = 0) -> int:
    """Fill missing pages by moving pages of the same process, without a copy.

    Kernel: UFFDIO_MOVE, since Linux 6.8; private anonymous memory, caller in the target.

    Args:
        fd: The very userfaultfd that the destination is registered with.
        destination: Page-aligned address.
        source: Page-aligned address of what to move; it becomes a hole.
        length: Whole pages, in bytes.
        mode: UFFDIO_MOVE_MODE_DONTWAKE, _ALLOW_SRC_HOLES, or'ed.

    Returns:
        Bytes done if above zero, else minus the errno.
    """
    argument = bytearray(_FIVE)
    _pack_five(argument, 0, destination, source, length, mode, 0)
    try:
        _ioctl(fd, abi.UFFDIO_MOVE, argument)
    except OSError as error:
        return signed_result(
            error.errno or errno.EIO, abi.UFFDIO_MOVE_STRUCT.unpack(argument)[4], length
        )
    return length


def _fill(fd: int, request: int, start: int, length: int, mode: int) -> int:
    argument = bytearray(_FOUR)
    _pack_four(argument, 0, start, length, mode, 0)
    try:
        _ioctl(fd, request, argument)
    except OSError as error:
        return signed_result(
            error.errno or errno.EIO, abi.UFFDIO_ZEROPAGE_STRUCT.unpack(argument)[3], length
        )
    return length


def zeropage(fd: int, start: int, length: int, mode: int = 0) -> int:
    """Fill missing pages with zeros.

    Kernel: UFFDIO_ZEROPAGE, since Linux 4.3; not on hugetlb memory, where zeros are copied.

    Returns:
        Bytes done if above zero, else minus the errno.
    """
    return _fill(fd, abi.UFFDIO_ZEROPAGE, start, length, mode)


def continue_(fd: int, start: int, length: int, mode: int = 0) -> int:
    """Map pages that the page cache already has: the answer to a minor fault.

    Kernel: UFFDIO_CONTINUE, since Linux 5.13 on hugetlb, 5.14 on shmem.

    Returns:
        Bytes done if above zero, else minus the errno.
    """
    return _fill(fd, abi.UFFDIO_CONTINUE, start, length, mode)


def poison(fd: int, start: int, length: int, mode: int = 0) -> int:
    """Mark missing pages as lost: who touches one gets SIGBUS, a system call EFAULT.

    Kernel: UFFDIO_POISON, since Linux 6.6.

    Returns:
        Bytes done if above zero, else minus the errno.
    """
    return _fill(fd, abi.UFFDIO_POISON, start, length, mode)


def writeprotect(fd: int, start: int, length: int, mode: int) -> int:
    """Protect pages from writing, or let writers go on.

    Kernel: UFFDIO_WRITEPROTECT, since Linux 5.7.  The range may span mappings; if one of
    them is not registered for it, those before it have been changed already.

    Args:
        fd: A userfaultfd.
        start: Page-aligned address in the target.
        length: Whole pages, in bytes.
        mode: UFFDIO_WRITEPROTECT_MODE_WP to protect, 0 to unprotect and wake,
            UFFDIO_WRITEPROTECT_MODE_DONTWAKE to unprotect without waking.

    Returns:
        ``length``, else minus the errno (there is no partial result to read).
    """
    argument = bytearray(_THREE)
    _pack_three(argument, 0, start, length, mode)
    try:
        _ioctl(fd, abi.UFFDIO_WRITEPROTECT, argument)
    except OSError as error:
        return -(error.errno or errno.EIO)
    return length


# --- page tables -----------------------------------------------------------------------


def pagemap_scan(fd: int, argument: bytearray) -> int:
    """Ask a pagemap for the pages of some categories.

    Kernel: PAGEMAP_SCAN, since Linux 6.7; ENOTTY before.

    Args:
        fd: ``/proc/PID/pagemap``.
        argument: A packed ``pm_scan_arg``; ``walk_end`` is written back.

    Returns:
        How many regions were filled.
    """
    found: int = _ioctl(fd, abi.PAGEMAP_SCAN, argument)
    return found
