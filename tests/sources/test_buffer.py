"""BufferSource: the contract, over several kinds of buffers."""

from __future__ import annotations

import array
import contextlib
from collections.abc import AsyncIterator

import pytest

from aiouffd.sources import Source, identity_of
from aiouffd.sources.buffer import BufferSource
from aiouffd.testing.sources import SourceContract, as_bytes


class TestBufferSource(SourceContract):
    """Bytes as they are."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Hold the bytes."""
        yield BufferSource(data)


def test_it_is_a_source() -> None:
    """The class has all that the protocol asks for."""
    assert isinstance(BufferSource(b""), Source)


def test_any_contiguous_buffer_will_do() -> None:
    """Items of any format count as the bytes they are, and nothing is copied."""
    numbers = array.array("Q", range(4))
    source = BufferSource(numbers)
    assert source.size == 32
    view = source.read_nowait(8, 8)
    assert as_bytes(view) == numbers.tobytes()[8:16]
    assert memoryview(view).readonly


def test_a_buffer_with_gaps_is_refused() -> None:
    """A view that skips bytes cannot be served as it is."""
    with pytest.raises((TypeError, ValueError)):
        BufferSource(memoryview(b"abcdef")[::2])


def test_the_identity_is_that_of_the_bytes() -> None:
    """Equal bytes are the same image; what is long has no identity that is cheap to ask for."""
    assert identity_of(BufferSource(b"abc")) == identity_of(BufferSource(bytearray(b"abc")))
    assert identity_of(BufferSource(b"abc")) != identity_of(BufferSource(b"abd"))
    assert identity_of(BufferSource(bytes((16 << 20) + 1))) == ""
