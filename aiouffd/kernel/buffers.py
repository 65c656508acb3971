"""Addresses of bytes in this process, for the ioctls that read them.

Knows: where a buffer's bytes lie, and for how long.
Must not know: where they go.

Laws of this file:

* An address is valid only while its buffer is held: PinnedBuffer holds it.
* Small buffers are copied into an anonymous mapping whose address was taken once: slice
  assignment of 4 KiB costs 0.12 us, asking an object for its address 0.7 us and more.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from typing_extensions import Buffer

STAGING_BYTES: Final = 64 * 1024
ZEROS_BYTES: Final = 2 * 1024 * 1024


class _PyBuffer(ctypes.Structure):
    """``Py_buffer``: part of the stable ABI since Python 3.11."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


class PinnedBuffer:
    """A contiguous buffer held in place, with its address and length.

    Raises:
        TypeError: The object is no buffer.
        BufferError: It is not contiguous.
    """

    __slots__ = ("_view", "address", "length")

    def __init__(self, data: Buffer) -> None:
        self._view: Any = None
        view = _PyBuffer()
        ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(data), ctypes.byref(view), 0)
        self._view = view
        self.address: int = view.buf or 0
        self.length: int = view.len

    def release(self) -> None:
        """Let the buffer go; the address is worthless from here on."""
        view, self._view = self._view, None
        if view is not None:
            ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))

    def __enter__(self) -> PinnedBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


class _Staging(threading.local):
    """One thread's staging mapping."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, STAGING_BYTES)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


_staging: Final = _Staging()
_zeros: list[tuple[mmap.mmap, int]] = []


def staged(data: Buffer, length: int) -> int:
    """Copy a small buffer into this thread's staging mapping and give its address there.

    The bytes stay until this thread stages again.

    Args:
        data: At most STAGING_BYTES bytes.
        length: Its length, in bytes.
    """
    _staging.memory[:length] = data
    return _staging.address


def zeros_address(length: int) -> int:
    """Give the address of at least ``length`` zeros that nobody writes to.

    They are never touched here, so they cost address space, not memory.
    """
    if not _zeros or len(_zeros[-1][0]) < length:
        # Private: reading it maps the one zero page; a shared mapping would allocate each page.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1, max(length, ZEROS_BYTES), flags)
        _zeros.append((memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))))
    return _zeros[-1][1]
