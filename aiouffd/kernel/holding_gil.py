"""The one fill that must not give up the GIL.

Knows: how to call ioctl(2) through ctypes.PyDLL, which keeps the GIL.
Must not know: why; see sigbus and lazy_faults.

``fcntl.ioctl`` releases the GIL around the call.  After planting a placeholder page that is
just when another Python thread would run and read its zeros.
"""

from __future__ import annotations

import ctypes
import errno
from typing import Any, Final

from . import abi

_bound: list[Any] = []


def _ioctl() -> Any:
    if not _bound:
        function = ctypes.PyDLL(None, use_errno=True).ioctl
        function.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
        function.restype = ctypes.c_int
        _bound.append(function)
    return _bound[0]


_SIZE: Final = abi.UFFDIO_COPY_STRUCT.size


def fill_holding_gil(fd: int, destination: int, source: int, length: int, mode: int) -> int:
    """Fill missing pages as ``calls.copy`` does, but hold the GIL throughout.

    Kernel: UFFDIO_COPY, since Linux 4.3.

    Args:
        fd: A userfaultfd.
        destination: Page-aligned address.
        source: Any address in this process whose pages are there.
        length: Whole pages, in bytes; few, since every other thread waits.
        mode: UFFDIO_COPY_MODE_DONTWAKE, _WP, or'ed.

    Returns:
        Bytes done if above zero, else minus the errno.
    """
    argument = ctypes.create_string_buffer(
        abi.UFFDIO_COPY_STRUCT.pack(destination, source, length, mode, 0), _SIZE
    )
    if _ioctl()(fd, abi.UFFDIO_COPY, ctypes.addressof(argument)) == 0:
        return length
    number = ctypes.get_errno()
    done: int = abi.UFFDIO_COPY_STRUCT.unpack(argument)[4]
    return done if number == errno.EAGAIN and 0 < done <= length else -number
