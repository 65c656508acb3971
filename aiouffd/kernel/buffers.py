"""Addresses of bytes in this process, for the ioctls that read them.

Knows: where a buffer's bytes lie, and for how long.
Must not know: where they go.

Laws of this file:

* An address is valid only while its buffer is held: PinnedBuffer holds it.
* Nothing is staged: a copy in between would cost more than asking for the address (0.1 us
  for bytes, 1 us for others), and a signal handler could overwrite it before the ioctl.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from typing_extensions import Buffer

ZEROS_BYTES: Final = 2 * 1024 * 1024
_BYTES_HEADER: Final = bytes.__basicsize__ - 1  # less the closing NUL


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


_zeros: list[tuple[mmap.mmap, int]] = []


def bytes_address(data: bytes) -> int:
    """Give the address of a bytes object's contents, for as long as the object is held.

    CPython keeps them inline, behind the object's header.
    """
    return id(data) + _BYTES_HEADER


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
