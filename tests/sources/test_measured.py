"""MeasuredSource: the contract, and that what it counts is what was read."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from aiouffd.errors import SourceError
from aiouffd.sources import ReadsInto, ReadsIntoNowait, Source, knows_holes
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.file import FileSource
from aiouffd.sources.measured import MeasuredSource, Reads
from aiouffd.testing.sources import SourceContract, as_bytes


class TestMeasuredSource(SourceContract):
    """A measured source is a source like the one inside."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Measure the bytes."""
        yield MeasuredSource(BufferSource(data), "buffer")


class Slow:
    """A source that has nothing at hand, waits when told to, and fails behind the first page."""

    size = 16384
    identity = "slow-1"

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.closed = False

    def extents(self) -> Iterator[tuple[int, int]]:
        yield 0, self.size

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        if offset >= 8192:
            raise SourceError("broken at once")
        return None

    async def read(self, offset: int, length: int) -> bytes:
        await self.gate.wait()
        if offset:
            raise SourceError("broken")
        return b"s" * length

    async def aclose(self) -> None:
        self.closed = True


async def test_what_is_at_hand_is_counted_and_not_timed() -> None:
    """Reads and bytes; the histogram is for those that wait."""
    source = MeasuredSource(BufferSource(bytes(8192)), "buffer")
    assert source.read_nowait(0, 4096) == bytes(4096)
    assert source.read_nowait(4096, 100) == bytes(100)
    figures = source.figures
    assert (figures.name, figures.at_hand, figures.bytes, figures.reads) == ("buffer", 2, 4196, 0)
    assert figures.latency.count == 0
    assert source.identity == BufferSource(bytes(8192)).identity


async def test_what_waits_is_timed_and_every_end_is_counted() -> None:
    """Success, failure and cancellation each have their count, and the counts add up."""
    slow = Slow()
    source = MeasuredSource(slow, "slow")
    assert isinstance(source, Source)
    assert source.identity == "slow-1"
    assert source.read_nowait(0, 4096) is None
    with pytest.raises(SourceError, match="at once"):
        source.read_nowait(8192, 1)
    reads = [asyncio.ensure_future(source.read(offset, 10)) for offset in (0, 1, 0)]
    await asyncio.sleep(0)
    assert source.figures.reads == 3
    reads[2].cancel()
    slow.gate.set()
    good, bad, cancelled = await asyncio.gather(*reads, return_exceptions=True)
    assert isinstance(good, bytes)
    assert as_bytes(good) == b"s" * 10
    assert isinstance(bad, SourceError)
    assert isinstance(cancelled, asyncio.CancelledError)
    figures = source.figures
    assert (figures.latency.count, figures.errors, figures.cancelled) == (1, 1, 1)
    assert figures.reads == figures.latency.count + figures.errors + figures.cancelled
    assert (figures.bytes, figures.at_hand, figures.errors_at_hand) == (10, 0, 1)
    await source.aclose()
    assert slow.closed


async def test_several_sources_share_an_account() -> None:
    """A server's sessions have sources of their own, and their bytes are added up."""
    account = Reads("image")
    for _ in range(3):
        source = MeasuredSource(BufferSource(bytes(4096)), "image", account)
        source.read_nowait(0, 4096)
    assert (account.at_hand, account.bytes) == (3, 3 * 4096)


async def test_long_reads_into_buffers_stay_possible(tmp_path: Path) -> None:
    """A server with figures hydrates as one without: what the source can do is not hidden."""
    path = tmp_path / "image"
    path.write_bytes(b"x" * 8192)
    measured = MeasuredSource(FileSource(path), "image")
    assert isinstance(measured, ReadsInto)
    buffer = bytearray(4096)
    await measured.readinto(4096, memoryview(buffer))
    assert buffer == b"x" * 4096
    assert measured.figures.waited_bytes == 4096
    assert measured.figures.reads == measured.figures.latency.count == 1
    assert isinstance(measured, ReadsIntoNowait)
    buffer = bytearray(4096)
    assert measured.readinto_nowait(0, memoryview(buffer))
    assert buffer == b"x" * 4096
    assert (measured.figures.at_hand, measured.figures.at_hand_bytes) == (1, 4096)
    with pytest.raises(SourceError):
        measured.readinto_nowait(8192, memoryview(buffer))
    assert measured.figures.errors_at_hand == 1
    await measured.aclose()
    without = MeasuredSource(BufferSource(b""), "buffer")
    assert not isinstance(without, ReadsInto | ReadsIntoNowait)


def test_unknown_holes_stay_unknown() -> None:
    """Or a layer would hide with zeros what lies below it."""
    source = BufferSource(b"")
    assert knows_holes(MeasuredSource(source, "buffer"))
    source.holes_known = False  # type: ignore[attr-defined]
    assert not knows_holes(MeasuredSource(source, "buffer"))
