"""Addresses of bytes: read back through the address, held as long as they are used."""

from __future__ import annotations

import array
import ctypes
import mmap

import pytest

from aiouffd.kernel import abi, buffers, pagemap
from aiouffd.kernel.buffers import ZEROS_BYTES, PinnedBuffer
from tests.targets import PAGE


@pytest.mark.parametrize(
    "data",
    [b"bytes", bytearray(b"bytes"), memoryview(b"two bytes")[4:], array.array("B", b"bytes")],
    ids=lambda data: type(data).__name__,
)
def test_the_address_is_that_of_the_bytes(data: bytes) -> None:
    """Any contiguous buffer, read-only ones and slices too."""
    with PinnedBuffer(data) as pinned:
        assert pinned.length == 5
        assert ctypes.string_at(pinned.address, pinned.length) == b"bytes"


def test_a_pinned_buffer_cannot_move() -> None:
    """Resizing is refused until it is released; releasing twice is no mistake."""
    data = bytearray(b"held")
    pinned = PinnedBuffer(data)
    with pytest.raises(BufferError):
        data.append(0)
    pinned.release()
    pinned.release()
    data.append(0)
    PinnedBuffer(data)  # dropped: it lets go by itself
    data.append(0)


def test_an_empty_buffer_has_no_length() -> None:
    """Nothing to read is no error."""
    with PinnedBuffer(b"") as pinned:
        assert pinned.length == 0


def test_what_is_no_contiguous_buffer_is_refused() -> None:
    """Text and strided views have no one place."""
    with pytest.raises(TypeError):
        PinnedBuffer("text")  # type: ignore[arg-type]
    with pytest.raises(BufferError):
        PinnedBuffer(memoryview(b"strided")[::2])


def test_the_address_of_bytes_is_that_of_their_contents() -> None:
    """The short way gives what the buffer protocol gives."""
    for data in (b"", b"x", bytes(range(256)) * 64):
        with PinnedBuffer(data) as pinned:
            assert buffers.bytes_address(data) == pinned.address


def test_zeros_are_zero_and_cost_no_memory() -> None:
    """As many as asked for; reading them allocates nothing but the one zero page."""
    length = ZEROS_BYTES
    address = buffers.zeros_address(length)
    assert buffers.zeros_address(PAGE) == address
    assert ctypes.string_at(address, length) == bytes(length)
    larger = buffers.zeros_address(2 * length)
    assert ctypes.string_at(larger + 2 * length - PAGE, PAGE) == bytes(PAGE)
    with open("/proc/self/pagemap", "rb") as file:
        found = pagemap.scan(
            file.fileno(),
            address,
            address + length,
            required=abi.PAGE_IS_PRESENT,
            any_of=abi.PAGE_IS_PFNZERO,
            inverted=abi.PAGE_IS_PFNZERO,
        )
    assert found.regions == []
    assert mmap.PAGESIZE == PAGE
