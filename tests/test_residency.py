"""Residency: a target that has touched all of its pages is found to have them."""

from __future__ import annotations

import asyncio

import pytest

from aiouffd.filled_pages import FilledPages
from aiouffd.session_states import Milestone, State
from aiouffd.sources.buffer import BufferSource
from tests.serving import MADV_DONTNEED, image
from tests.session_serving import holds, model, served
from tests.targets import PAGE, until

PAGES = 64


@pytest.mark.parametrize("chunk", [0, 16 * PAGE])
async def test_the_last_page_makes_it_resident(chunk: int) -> None:
    """Not before; brought one by one or in chunks, and with one that was removed unseen."""
    source = BufferSource(image(0, PAGES * PAGE))
    async with served(source, pages=PAGES, chunk=chunk) as (target, session):
        assert await target.start_madvise(MADV_DONTNEED, 40) == 0
        assert await target.start_madvise(MADV_DONTNEED, 2, 2) == 0
        assert await target.start_sweep(0, PAGES - 16) == [
            0 if page in {2, 3, 40} else page + 1 for page in range(PAGES - 16)
        ]
        await asyncio.sleep(0.01)
        assert session.state is State.SERVING
        assert await holds(target, model(PAGES, [2, 3, 40]))
        await until(lambda: session.state is State.RESIDENT, "it is found out")
        assert session.milestones == [Milestone.FIRST_PAGE, Milestone.RESIDENT]
        resident_s = session.figures().resident_s
        assert resident_s is not None
        assert resident_s > 0


async def test_what_came_before_a_take_over_counts() -> None:
    """The server before had brought three quarters; the rest comes by demand, and that is all."""
    async with served(BufferSource(image(0, PAGES * PAGE)), pages=PAGES) as (target, session):
        (region,) = session.pager.regions
        bits = bytearray(FilledPages.bytes_for(region.length, PAGE))
        region.filled_before = FilledPages(bits, 0, 0, region.length, PAGE)
        region.filled_before.add_range(0, 48 * PAGE)
        session.pager.uffd.copy(target.base, image(0, 48 * PAGE))
        for page in range(48, PAGES):
            assert session.state is State.SERVING
            assert await target.start_read(page) == page + 1
        await until(lambda: session.state is State.RESIDENT, "it is found out")


async def test_a_page_brought_twice_is_no_two_pages() -> None:
    """What was removed after it had come counts neither for nor against the others."""
    async with served(BufferSource(image(0, PAGES * PAGE)), pages=PAGES) as (target, session):
        for _ in range(20):
            assert await target.start_read(1) in {2, 0}
            assert await target.start_madvise(MADV_DONTNEED, 1) == 0
        for page in (*range(2, PAGES), 0):
            assert session.state is State.SERVING
            assert await target.start_madvise(MADV_DONTNEED, 1) == 0
            assert await target.start_read(page) == page + 1
        await until(lambda: session.state is State.RESIDENT, "it is found out")
