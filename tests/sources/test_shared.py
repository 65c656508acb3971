"""SharedImage: filled, then sealed; holes stay holes, and nobody can change a byte."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import mmap
import os
import random
import threading
from collections.abc import AsyncIterator
from typing import Final

import pytest

from aiouffd.errors import SourceError
from aiouffd.fds import OwnedFd
from aiouffd.sources import Source, identity_of, shared
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.layered import Layer, LayeredSource
from aiouffd.sources.shared import SharedImage
from aiouffd.sources.zero import ZeroSource
from aiouffd.testing.sources import PAGE, SourceContract, as_bytes, image
from tests.sources.slow import SlowSource, turns

SEALS: Final = {
    "write": fcntl.F_SEAL_WRITE,
    "shrink": fcntl.F_SEAL_SHRINK,
    "grow": fcntl.F_SEAL_GROW,
    "seal": fcntl.F_SEAL_SEAL,
}


class TestSharedImage(SourceContract):
    """A sealed copy is a source like any other."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Copy and seal."""
        source = await SharedImage.fill(SlowSource(data, wait=False))
        yield source
        await source.aclose()


def sparse(size: int, *stretches: tuple[int, int]) -> tuple[LayeredSource, bytes]:
    """Make an image of holes with data in them, and the bytes that it has to read as."""
    data = image(size)
    expected = bytearray(size)
    for offset, length in stretches:
        expected[offset : offset + length] = data[offset : offset + length]
    return LayeredSource(ZeroSource(size), Layer(BufferSource(data), stretches)), bytes(expected)


async def test_holes_stay_holes() -> None:
    """Only what the source holds takes memory; the last page is whole."""
    size = 5 * (1 << 20) + 123
    source, expected = sparse(size, (3 * PAGE, PAGE), (1 << 20, (2 << 20) + PAGE), (size - 7, 7))
    copy = await SharedImage.fill(source)
    try:
        assert as_bytes(await copy.read(0, size)) == expected
        assert copy.size == size
        assert os.fstat(copy.fileno()).st_size == size + -size % PAGE
        assert identity_of(copy) == identity_of(source) != ""
        figures = copy.figures()
        assert figures.filled_bytes == figures.resident_bytes == (2 << 20) + 3 * PAGE
        assert figures.hole_bytes == 0
        starts = [offset for offset, _ in copy.extents()]
        assert starts == [3 * PAGE, 1 << 20, size & -PAGE]
    finally:
        await copy.aclose()


async def test_nobody_can_change_it() -> None:
    """Not through the descriptor, not through a new one, not through a mapping."""
    copy = await SharedImage.fill(BufferSource(image(4 * PAGE)))
    try:
        with OwnedFd(os.open(f"/proc/self/fd/{copy.fileno()}", os.O_RDWR)) as second:
            for number in (copy.fileno(), second.fileno()):
                for attempt in (
                    lambda number=number: os.pwrite(number, b"!", 0),
                    lambda number=number: os.ftruncate(number, PAGE),
                    lambda number=number: os.ftruncate(number, 8 * PAGE),
                    lambda number=number: os.posix_fallocate(number, 0, 8 * PAGE),
                    lambda number=number: mmap.mmap(number, PAGE, mmap.MAP_SHARED),
                    lambda number=number: fcntl.fcntl(number, fcntl.F_ADD_SEALS, 0),
                ):
                    with pytest.raises(PermissionError):
                        attempt()
        assert as_bytes(await copy.read(0, 4 * PAGE)) == image(4 * PAGE)
    finally:
        await copy.aclose()


@pytest.mark.parametrize("missing", SEALS)
def test_a_file_without_all_seals_is_refused(missing: str) -> None:
    """Each of the four is needed."""
    with OwnedFd(os.memfd_create("image", os.MFD_ALLOW_SEALING)) as file:
        os.pwrite(file.fileno(), b"x", 0)
        for name, seal in SEALS.items():
            if name != missing:
                fcntl.fcntl(file.fileno(), fcntl.F_ADD_SEALS, seal)
        with pytest.raises(SourceError, match="not sealed"):
            SharedImage(file)
        if missing != "seal":  # then it is too late
            return
        fcntl.fcntl(file.fileno(), fcntl.F_ADD_SEALS, SEALS[missing])
        assert SharedImage(file).size == 1


def test_what_is_no_memory_file_is_refused() -> None:
    """A plain file has no seals at all."""
    with (
        OwnedFd(os.open("/proc/self/exe", os.O_RDONLY)) as file,
        pytest.raises(SourceError, match="no memory file"),
    ):
        SharedImage(file)


async def test_huge_pages_are_refused(huge_pages: object) -> None:
    """A hugetlb file takes another kind of fault, and another page size."""
    assert callable(huge_pages)
    huge_pages(1)
    flags = os.MFD_ALLOW_SEALING | os.MFD_HUGETLB
    with OwnedFd(os.memfd_create("image", flags)) as file:
        os.ftruncate(file.fileno(), 2 << 20)
        for seal in SEALS.values():
            fcntl.fcntl(file.fileno(), fcntl.F_ADD_SEALS, seal)
        with pytest.raises(SourceError, match="huge pages"):
            SharedImage(file)


async def test_a_source_that_fails_leaves_nothing() -> None:
    """The error is raised, other reads are ended, the file is gone (the leak check looks)."""
    source = SlowSource(image(8 << 20), wait=False)
    source.error = SourceError("gone")
    with pytest.raises(SourceError, match="gone"):
        await SharedImage.fill(source)


async def test_a_cancelled_fill_leaves_nothing() -> None:
    """Pieces under way are cancelled."""
    source = SlowSource(image(8 << 20))
    filling = asyncio.ensure_future(SharedImage.fill(source))
    await turns()
    filling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await filling
    assert source.cancelled == len(source.reads) == 4


async def test_a_thread_that_writes_ends_before_the_file_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when the fill is cancelled again and again: the file's number is reused at once."""
    begun, gate = threading.Event(), threading.Event()
    written: list[int] = []

    def write(number: int, data: object, offset: int) -> None:
        begun.set()
        gate.wait(10)
        written.append(os.pwrite(number, b"x", offset))  # EBADF, or worse, if it was closed

    monkeypatch.setattr(shared, "_write", write)
    filling = asyncio.ensure_future(SharedImage.fill(BufferSource(image(PAGE))))
    await asyncio.to_thread(begun.wait, 10)
    for _ in range(3):
        filling.cancel()
        await turns()
        assert not filling.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await filling
    assert written == [1]


async def test_random_images_are_copied_right(seed: int) -> None:
    """Whatever the extents, the copy reads as the source."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(5):
        size = rng.randrange(1, 3 << 20)
        cuts = sorted(rng.sample(range(size), min(size, 2 * rng.randrange(1, 20))))
        pairs = [(a, b - a) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
        source, expected = sparse(size, *pairs)
        copy = await SharedImage.fill(source)
        assert as_bytes(await copy.read(0, size)) == expected
        await copy.aclose()
