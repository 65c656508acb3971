"""Clones of one sealed image: right bytes, own writes, one copy in memory."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import mmap
import os
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Final

import pytest

from aiouffd.failure import Action
from aiouffd.session_states import State
from aiouffd.sharing import figures, mapped
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.layered import Layer, LayeredSource
from aiouffd.sources.shared import SharedImage
from aiouffd.sources.zero import ZeroSource
from aiouffd.testing.sources import PAGE, image
from tests.clones import Clone, cloned
from tests.serving import MADV_DONTNEED
from tests.targets import until

PAGES: Final = 256
SIZE: Final = PAGES * PAGE
CHUNK: Final = 16 * PAGE
#: The pages of a sparse image that hold data; all others are holes.
HELD: Final = (2, 3, 4, 40, 255)

_PUNCH: Final = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE


@contextlib.asynccontextmanager
async def shared(*, sparse: bool = False) -> AsyncIterator[tuple[SharedImage, bytes]]:
    """Make a sealed image, and the bytes that it has to read as."""
    data = bytearray(image(SIZE))
    source: BufferSource | LayeredSource = BufferSource(data)
    if sparse:
        extents = [(page * PAGE, PAGE) for page in HELD]
        source = LayeredSource(ZeroSource(SIZE), Layer(source, extents))
    copy = await SharedImage.fill(source)
    if sparse:
        for page in range(PAGES):
            if page not in HELD:
                data[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
    try:
        yield copy, bytes(data)
    finally:
        await copy.aclose()


async def read_all(clone: Clone) -> int:
    """Let a clone read all of its memory by itself, and give the CRC of it."""
    crc = await clone.start_crc32(clone.base, clone.length)
    assert isinstance(crc, int)
    return crc


async def test_clones_read_the_image_write_for_themselves_and_share_the_rest() -> None:
    """Several real processes: every byte right, writes private, one copy in physical memory."""
    async with shared() as (copy, data), contextlib.AsyncExitStack() as stack:
        clones = [await stack.enter_async_context(cloned(copy, chunk=CHUNK)) for _ in range(4)]
        crcs = await asyncio.gather(*(read_all(clone) for clone, _ in clones))
        assert crcs == [zlib.crc32(data)] * 4
        for number, (clone, session) in enumerate(clones):
            assert session.figures().faults == SIZE // CHUNK
            assert session.figures().copied_bytes == session.figures().filled_bytes == 0
            for page in range(number, 10 * (number + 1), number + 1):
                assert await clone.start_write(page, number + 1) == number + 1
        for number, (clone, session) in enumerate(clones):
            expected = bytearray(data)
            for page in range(number, 10 * (number + 1), number + 1):
                expected[page * PAGE] = number + 1
            assert clone.memory(clone.base, SIZE) == expected
            assert await read_all(clone) == zlib.crc32(expected)
            assert session.outcome == "serving"
        assert copy.read_nowait(0, SIZE) == data

        # The kernel's own accounting: what a clone has not written it shares with the others.
        for clone, _ in clones:
            smaps = clone.smaps()
            assert smaps["Rss"] == SIZE
            assert smaps["Anonymous"] == 10 * PAGE
            assert smaps["Pss"] <= SIZE // 4 + 50 * PAGE  # all four map all but what any wrote
            assert smaps["Shared_Clean"] + smaps["Shared_Dirty"] >= SIZE - 20 * PAGE
        found = await figures(copy, [session for _, session in clones])
        assert found.clones == 4
        assert found.image_bytes == SIZE
        assert found.private_bytes == 4 * 10 * PAGE
        assert found.mapped_bytes == 4 * (SIZE - 10 * PAGE)
        assert found.saved_bytes == 3 * SIZE - 40 * PAGE


async def test_what_is_not_touched_is_not_counted() -> None:
    """Figures say what is mapped now, page by page; a clone that is gone counts no more."""
    async with (
        shared() as (copy, data),
        cloned(copy) as (one, first),
        cloned(copy) as (two, second),
    ):
        for page in (0, 7, 200):
            assert await one.start_read(page) == data[page * PAGE]
        assert await two.start_read(7) == data[7 * PAGE]
        assert mapped(one.pid, [(one.base, one.base + SIZE)]) == (3 * PAGE, 0)
        found = await figures(copy, [first, second])
        assert (found.clones, found.mapped_bytes, found.private_bytes) == (2, 4 * PAGE, 0)
        assert found.saved_bytes == 4 * PAGE - SIZE
        one.kill()
        await until(lambda: first.pager.target_gone, "its end is noticed")
        found = await figures(copy, [first, second])
        assert (found.clones, found.mapped_bytes) == (1, PAGE)


@pytest.mark.parametrize("chunk", [0, CHUNK])
async def test_holes_read_zero_and_are_accounted_for(chunk: int) -> None:
    """Scenario 16: a hole raises nothing, reads zero, and the copy grows by that page, once."""
    async with shared(sparse=True) as (copy, data), cloned(copy, chunk=chunk) as (one, first):
        assert copy.figures().filled_bytes == len(HELD) * PAGE
        assert await one.start_read(3) == data[3 * PAGE]
        assert first.figures().faults == 1
        assert await one.start_read(7) == 0
        assert first.figures().faults == 1
        assert copy.figures().hole_bytes == PAGE
        async with cloned(copy, chunk=chunk) as (two, second):
            assert await two.start_read(7) == 0  # a page by now: a minor fault, and no neighbours
            assert second.figures().faults == 1
            assert copy.figures().hole_bytes == PAGE
            assert await read_all(two) == zlib.crc32(data)
            assert await read_all(one) == zlib.crc32(data)
            assert copy.figures().hole_bytes == (PAGES - len(HELD)) * PAGE
            for session in (first, second):
                assert session.error is None
                assert session.figures().failures == 0
            found = await figures(copy, [first, second])
            assert found.hole_bytes == (PAGES - len(HELD)) * PAGE


async def test_one_clone_cannot_harm_another() -> None:
    """Scenario 17: whatever a clone tries on the file it was given, others read the image."""
    async with shared() as (copy, data), cloned(copy) as (evil, _), cloned(copy) as (good, _):
        assert await good.start_read(1) == data[PAGE]
        file, refused = evil.file, -errno.EPERM
        attempts: list[tuple[str, tuple[int, ...]]] = [
            ("mmap", (0, SIZE, _READ_WRITE, mmap.MAP_SHARED, file, 0)),
            ("ftruncate", (file, PAGE)),
            ("ftruncate", (file, 2 * SIZE)),
            ("fallocate", (file, _PUNCH, 0, SIZE)),
            ("fallocate", (file, 0, 0, 2 * SIZE)),
        ]
        for call, arguments in attempts:
            assert await evil.call(call, *arguments) == refused, call
        assert await evil.start_write(0, 0xEE) == 0xEE  # its own page now
        assert await evil.call("pwrite", file, evil.base, 1, PAGE) == refused
        for page in range(PAGES):
            await evil.start_write(page, 0xEE)
        assert await evil.start_madvise(MADV_DONTNEED, 0, 16) == 0
        assert await evil.start_read(3) == data[3 * PAGE]  # as with any private mapping of a file
        assert await read_all(good) == zlib.crc32(data)
        assert copy.read_nowait(0, SIZE) == data


@pytest.mark.parametrize("action", [None, Action.ZERO])
async def test_without_us_the_memory_reads_on(action: Action | None) -> None:
    """The end of a session poisons nothing and makes no zeros: the pages are the image's own."""
    async with shared() as (copy, data), cloned(copy) as (clone, session):
        assert await clone.start_read(1) == data[PAGE]
        await session.aclose(action)
        assert session.outcome == "let go, to read on from the shared image"
        assert await read_all(clone) == zlib.crc32(data)


async def test_a_complete_clone_shares_on() -> None:
    """Letting a clone go brings nothing and copies nothing: all is there already."""
    async with shared() as (copy, data), cloned(copy) as (one, session), cloned(copy) as (two, _):
        await session.complete()
        assert session.state is State.DETACHED
        assert await read_all(one) == await read_all(two) == zlib.crc32(data)
        assert session.figures().filled_bytes == session.figures().faults == 0
        assert mapped(one.pid, [(one.base, one.base + SIZE)]) == (SIZE, 0)
        assert one.smaps()["Pss"] <= SIZE // 2 + PAGE


# --- 15: huge folios -------------------------------------------------------------------

_SHMEM_ENABLED: Final = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"


@pytest.fixture
def huge_folios() -> Iterator[None]:
    """Let memory files be made of huge folios; set back afterwards, one test at a time."""
    if not os.access(_SHMEM_ENABLED, os.W_OK):
        pytest.skip(f"needs to write {_SHMEM_ENABLED}: sudo make test")
    with open(_SHMEM_ENABLED, encoding="ascii") as setting:
        fcntl.flock(setting, fcntl.LOCK_EX)
        before = setting.read().partition("[")[2].partition("]")[0]
        try:
            _set(_SHMEM_ENABLED, "always")
            yield
        finally:
            _set(_SHMEM_ENABLED, before)


def _set(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


async def test_huge_folios_cost_memory_and_nothing_else(huge_folios: None) -> None:
    """Scenario 15: neighbours that a folio makes present are the image's bytes, or its zeros."""
    size = 4 << 20
    data = bytearray(size)
    extents = []
    for page in (0, 3, 511, 700):
        data[page * PAGE : (page + 1) * PAGE] = image(PAGE, seed=page)
        extents.append((page * PAGE, PAGE))
    copy = await SharedImage.fill(
        LayeredSource(ZeroSource(size), Layer(BufferSource(bytes(data)), extents))
    )
    try:
        taken = copy.figures().filled_bytes
        if taken == len(extents) * PAGE:
            pytest.skip("the kernel had no huge folio to give (memory is scattered)")
        async with cloned(copy) as (one, first), cloned(copy, chunk=CHUNK) as (two, _):
            assert await one.start_read(1) == 0
            assert first.figures().faults == 1  # present: it is asked for, and mapped
            assert await read_all(one) == await read_all(two) == zlib.crc32(bytes(data))
            assert await one.start_write(3, 99) == 99
            assert await two.start_read(3) == data[3 * PAGE]
            assert copy.figures().filled_bytes == taken
    finally:
        await copy.aclose()
