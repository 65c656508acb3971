"""Law 6: removed means zero, whoever wants to fill it."""

from __future__ import annotations

import asyncio

import pytest

from aiouffd import Copy, PageFault, Resolution
from tests.serving import LAYOUT, MADV_DONTNEED, MADV_REMOVE, Gate, from_image, image, serving
from tests.targets import PAGE, until


@pytest.mark.parametrize(("kind", "advice"), [("anon", MADV_DONTNEED), ("shmem", MADV_REMOVE)])
async def test_a_removed_page_is_not_filled_from_the_image(kind: str, advice: int) -> None:
    """Filled, written, removed; or never touched and removed: it reads zero."""
    asked: list[int] = []

    async def note(fault: PageFault) -> Resolution:
        asked.append(fault.offset)
        return await from_image(fault)

    async with serving(note, kind, features=LAYOUT) as served:
        target = served.target
        assert await target.start_write(3, 77) == 77
        assert await target.start_madvise(advice, page=3, pages=2) == 0
        assert await target.start_read(3) == 0
        assert await target.start_read(4) == 0
        assert asked == [3 * PAGE]
        assert await target.start_write(3, 78) == 78
        assert await target.start_madvise(advice, page=3) == 0
        assert await target.start_read(3) == 0
        assert await target.start_read(5) == 6


async def test_filling_ahead_does_not_bring_removed_pages_back() -> None:
    """Everything else of the image arrives."""
    async with serving(features=LAYOUT) as served:
        target = served.target
        assert await target.start_read(9) == 10
        assert await target.start_madvise(MADV_DONTNEED, page=8, pages=4) == 0
        assert await served.region.fill(0, image(0, target.length)) == 60 * PAGE
        words = await target.start_sweep()
        assert words == [0 if 8 <= page < 12 else page + 1 for page in range(64)]


async def test_a_long_answer_does_not_bring_removed_pages_back() -> None:
    """What a handler gives beyond its page stops short of removed pages."""

    async def all_of_it(fault: PageFault) -> Resolution:
        start = fault.address - fault.offset
        return Copy(image(0, 64 * PAGE), address=start)

    async with serving(all_of_it, features=LAYOUT) as served:
        target = served.target
        assert await target.start_madvise(MADV_DONTNEED, page=8, pages=4) == 0
        assert await target.start_read(10) == 0
        assert await target.start_read(20) == 21
        words = await target.start_sweep()
        assert words == [0 if 8 <= page < 12 else page + 1 for page in range(64)]


async def test_work_in_flight_for_a_removed_page_is_cancelled() -> None:
    """Its thread reads zero, and the handler's late answer is not wanted."""
    gate = Gate()
    async with serving(gate, features=LAYOUT) as served:
        target = served.target
        touch = target.start_read(3, thread=0)
        await until(lambda: gate.faults, "the handler is asked")
        removal = target.start_madvise(MADV_DONTNEED, page=3, thread=1)
        assert await touch == 0
        assert await removal == 0
        await until(lambda: gate.cancelled, "the handler is cancelled")
        gate.let_go()
        await asyncio.sleep(0)
        assert await target.start_read(3) == 0


async def test_a_removal_between_plan_and_fill_wins() -> None:
    """A fill that already holds its bytes asks once more right before the ioctl."""
    async with serving(features=LAYOUT) as served:
        target = served.target
        data = image(0, target.length)
        fill = served.region.fill(0, data)  # planned: a coroutine that has not begun
        assert await target.start_madvise(MADV_DONTNEED, page=30) == 0
        assert await fill == 63 * PAGE
        assert await target.start_read(30) == 0
        assert await target.start_read(31) == 32
