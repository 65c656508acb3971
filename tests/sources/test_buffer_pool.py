"""BufferPool: memory is used again, but never while somebody looks at it."""

from __future__ import annotations

from aiouffd.sources.buffer_pool import BufferPool


def _address(view: memoryview) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def test_what_is_let_go_is_used_again() -> None:
    """The same memory comes back, for any length up to its own."""
    pool = BufferPool(100_000, 2)
    first = pool.take(100_000)
    first[:5] = b"bytes"
    place = _address(first)
    del first
    again = pool.take(10)
    assert _address(again) == place
    assert len(again) == 10
    assert bytes(again[:5]) == b"bytes"


def test_what_is_looked_at_is_left_alone() -> None:
    """A slice of a read-only view of it is enough."""
    pool = BufferPool(100_000, 2)
    view = pool.take(100_000)
    part = view.toreadonly()[50:60]
    del view
    others = [pool.take(100_000) for _ in range(4)]
    for number, other in enumerate(others, start=1):
        other[:] = bytes([number]) * 100_000
    assert bytes(part) == bytes(10)
    assert [other[0] for other in others] == [1, 2, 3, 4]


def test_only_so_many_are_kept() -> None:
    """What is made beyond that is nobody's afterwards."""
    pool = BufferPool(1000, 2)
    views = [pool.take(1000) for _ in range(5)]
    del views
    assert len(pool._buffers) == 2
