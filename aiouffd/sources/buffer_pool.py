"""Large buffers that are used again once nobody looks at them any more.

Fresh memory costs a page fault for every 4 KiB, about as much as filling it.

Knows: a bytearray refuses to be resized as long as somebody has a view of it.
Must not know: what is in the buffers.
"""

from __future__ import annotations

import threading


class BufferPool:
    """Some buffers of one size.

    Sharing: any thread.
    """

    def __init__(self, size: int, count: int) -> None:
        """Make none yet.

        Args:
            size: Of a buffer, in bytes.
            count: How many are kept at most; more are made when needed, and not kept.
        """
        self._size = size
        self._count = count
        self._lock = threading.Lock()
        self._buffers: list[bytearray] = []

    def take(self, length: int) -> memoryview:
        """Give memory that nobody else has, with anything in it.

        Args:
            length: In bytes; no more than a buffer has.

        Returns:
            A view; when it and all views made of it are gone, the memory is used again.
        """
        with self._lock:
            for buffer in self._buffers:
                if _is_free(buffer):
                    return memoryview(buffer)[:length]
            buffer = bytearray(self._size + 1)
            buffer.pop()  # so that a byte more never moves it
            if len(self._buffers) < self._count:
                self._buffers.append(buffer)
            return memoryview(buffer)[:length]


def _is_free(buffer: bytearray) -> bool:
    try:
        buffer.append(0)
    except BufferError:
        return False
    buffer.pop()
    return True
