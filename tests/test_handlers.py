"""Ready-made handlers: what they answer to which fault, without a kernel."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import pytest

from aiouffd.errors import SourceError
from aiouffd.events import MINOR, WP, WRITE, PageFault
from aiouffd.handlers import from_source, zeroes
from aiouffd.resolutions import Answer, Continue, Copy, Unprotect, Zero
from aiouffd.sources import Extents
from aiouffd.sources.buffer import BufferSource
from aiouffd.testing.sources import PAGE, image

if TYPE_CHECKING:
    from typing_extensions import Buffer

BASE: Final = 0x7F00_0000_0000
HUGE: Final = 2 << 20


def fault(offset: int, *, flags: int = 0, length: int = PAGE) -> PageFault:
    """Make a fault on memory that begins with its source at BASE."""
    return PageFault(BASE + offset, offset, length, flags)


def content(answer: Answer) -> bytes:
    """Give the bytes that an answer fills in."""
    assert answer is not None
    data = answer.data if isinstance(answer, Copy) else answer
    assert isinstance(data, bytes | bytearray | memoryview)
    return bytes(data)


class SlowSource(BufferSource):
    """Nothing is ever at hand; what is read is written down."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reads: list[tuple[int, int]] = []

    def read_nowait(self, offset: int, length: int) -> Buffer:
        return None  # type: ignore[return-value]

    async def read(self, offset: int, length: int) -> Buffer:
        self.reads.append((offset, length))
        await asyncio.sleep(0)
        return super().read_nowait(offset, length)


class HoledSource(BufferSource):
    """Only the third and fourth page hold data."""

    def extents(self) -> Iterator[tuple[int, int]]:
        yield 2 * PAGE, 2 * PAGE


@pytest.mark.parametrize("kind", [BufferSource, SlowSource])
async def test_a_page_comes_from_its_offset(kind: type[BufferSource]) -> None:
    """Each page is filled with the bytes at its offset, at hand or not."""
    data = image(8 * PAGE)
    fill = from_source(kind(data))
    for offset in range(0, 8 * PAGE, PAGE):
        answer = await fill(fault(offset, flags=WRITE))
        assert content(answer) == data[offset : offset + PAGE]


@pytest.mark.parametrize("kind", [BufferSource, SlowSource])
@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE + 1, HUGE - 1, HUGE + 5])
@pytest.mark.parametrize("length", [PAGE, HUGE])
async def test_the_last_partial_page_ends_in_zeros(
    kind: type[BufferSource], size: int, length: int
) -> None:
    """What lies behind the source's end, up to the end of the page, is zeros."""
    data = image(size)
    fill = from_source(kind(data))
    last = (size - 1) // length * length
    got = content(await fill(fault(last, length=length)))
    assert got == data[last:] + bytes(length - (size - last))


async def test_a_page_behind_the_end_is_an_error() -> None:
    """Nobody has said what it holds."""
    fill = from_source(BufferSource(image(PAGE)))
    with pytest.raises(SourceError, match="behind the end") as failed:
        await fill(fault(PAGE))
    assert failed.value.address == BASE + PAGE


async def test_holes_are_zeros_without_a_read() -> None:
    """A page in a hole is not read; one with any data is."""
    fill = from_source(HoledSource(bytes(8 * PAGE)))
    assert [isinstance(await fill(fault(page * PAGE)), Zero) for page in range(8)] == [
        True, True, False, False, True, True, True, True,
    ]  # fmt: skip
    fill = from_source(BufferSource(bytes(PAGE)), extents=Extents([]))
    assert await fill(fault(0)) == Zero()


async def test_a_chunk_in_a_hole_is_zeros_at_once() -> None:
    """A hole is answered by the chunk; beside data, a page of it by itself."""
    fill = from_source(HoledSource(image(16 * PAGE)), chunk=4 * PAGE)
    assert await fill(fault(9 * PAGE)) == Zero(4 * PAGE, BASE + 8 * PAGE)
    assert await fill(fault(0)) == Zero()
    answer = await fill(fault(2 * PAGE))
    assert isinstance(answer, Copy)
    assert len(content(answer)) == 4 * PAGE


async def test_writers_and_minor_faults_are_let_go_on() -> None:
    """A protected page is unprotected, a cached one mapped; only missing ones are filled."""
    fill = from_source(BufferSource(image(PAGE)))
    for handler in (fill, zeroes):
        assert await handler(fault(0, flags=WP | WRITE)) == Unprotect()
        assert await handler(fault(0, flags=MINOR)) == Continue()
    assert await zeroes(fault(0)) == Zero()


@pytest.mark.parametrize("kind", [BufferSource, SlowSource])
@pytest.mark.parametrize("size", [16 * PAGE, 15 * PAGE + 7, PAGE])
async def test_a_chunk_surrounds_its_page(kind: type[BufferSource], size: int) -> None:
    """One answer brings the aligned chunk around the page, within the source."""
    data = image(size)
    fill = from_source(kind(data), chunk=4 * PAGE)
    for offset in range(0, size, PAGE):
        answer = await fill(fault(offset))
        assert isinstance(answer, Copy)
        assert answer.address is not None
        start = answer.address - BASE
        got = content(answer)
        assert start <= offset < start + len(got)
        assert start % (4 * PAGE) == 0
        assert len(got) % PAGE == 0
        assert len(got) <= 4 * PAGE
        assert got == data[start : start + len(got)].ljust(len(got), b"\0")


async def test_a_chunk_stays_within_its_range() -> None:
    """What belongs to another range is left to it."""
    data = image(16 * PAGE)
    fill = from_source(BufferSource(data), chunk=8 * PAGE, within=(3 * PAGE, 5 * PAGE))
    answer = await fill(PageFault(BASE, 3 * PAGE, PAGE))
    assert isinstance(answer, Copy)
    assert answer.address == BASE
    assert content(answer) == data[3 * PAGE : 5 * PAGE]


async def test_a_chunk_smaller_than_a_page_is_a_page() -> None:
    """On huge pages a small chunk changes nothing."""
    data = image(2 * HUGE)
    fill = from_source(BufferSource(data), chunk=64 * 1024)
    assert content(await fill(fault(HUGE, length=HUGE))) == data[HUGE:]


async def test_odd_places_are_served_by_the_page() -> None:
    """Where chunks and pages do not line up, the page alone is brought."""
    data = image(3 * HUGE)
    fill = from_source(BufferSource(data), chunk=2 * HUGE)
    answer = await fill(PageFault(BASE, PAGE, HUGE))
    assert content(answer) == data[PAGE : PAGE + HUGE]


async def test_a_slow_source_is_read_once_per_answer() -> None:
    """A page costs one read, and so does a chunk."""
    source = SlowSource(image(8 * PAGE))
    await from_source(source)(fault(PAGE))
    await from_source(source, chunk=4 * PAGE)(fault(PAGE))
    assert source.reads == [(PAGE, PAGE), (0, 4 * PAGE)]


def test_an_odd_chunk_is_refused() -> None:
    """Chunks are powers of two."""
    with pytest.raises(ValueError, match="power of two"):
        from_source(BufferSource(b"x"), chunk=3 * PAGE)


# --- minor faults ----------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [0, PAGE])
async def test_a_page_that_is_there_is_mapped(chunk: int) -> None:
    """A minor fault needs no bytes."""
    fill = from_source(HoledSource(image(8 * PAGE)), chunk=chunk)
    assert await fill(fault(2 * PAGE, flags=MINOR)) == Continue()


@pytest.mark.parametrize(
    ("page", "expected"),
    [(2, (2, 2)), (3, (2, 2)), (0, None), (7, None)],
)
async def test_neighbours_are_mapped_as_far_as_there_is_no_hole(
    page: int, expected: tuple[int, int] | None
) -> None:
    """The kernel would refuse a hole; a page in one, that another clone has made, comes alone."""
    fill = from_source(HoledSource(image(8 * PAGE)), chunk=8 * PAGE)
    answer = await fill(fault(page * PAGE, flags=MINOR | WRITE))
    if expected is None:
        assert answer == Continue()
    else:
        first, pages = expected
        assert answer == Continue(pages * PAGE, BASE + first * PAGE)


async def test_neighbours_stay_within_chunk_and_range() -> None:
    """A chunk is aligned in the source, and cut where the range ends or the last page does."""
    size = 16 * PAGE - 5
    fill = from_source(BufferSource(image(size)), chunk=4 * PAGE)
    assert await fill(fault(5 * PAGE, flags=MINOR)) == Continue(4 * PAGE, BASE + 4 * PAGE)
    assert await fill(fault(15 * PAGE, flags=MINOR)) == Continue(4 * PAGE, BASE + 12 * PAGE)
    inner = (5 * PAGE, 7 * PAGE)
    fill = from_source(BufferSource(image(size)), chunk=4 * PAGE, within=inner)
    assert await fill(fault(6 * PAGE, flags=MINOR)) == Continue(2 * PAGE, BASE + 5 * PAGE)
    inner = (5 * PAGE + 8, 7 * PAGE + 8)  # pages that begin anywhere in the source
    fill = from_source(BufferSource(image(size)), chunk=4 * PAGE, within=inner)
    assert await fill(fault(6 * PAGE + 8, flags=MINOR)) == Continue()


async def test_a_large_chunk_is_mapped_in_pieces() -> None:
    """What is done at once, no task of its own, before the thread goes on."""
    fill = from_source(BufferSource(image(1 << 20)), chunk=1 << 20)
    answer = await fill(fault(100 * PAGE, flags=MINOR))
    assert answer == Continue(64 * PAGE, BASE + 64 * PAGE)
