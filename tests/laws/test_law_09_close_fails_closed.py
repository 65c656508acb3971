"""Law 9: close fails closed."""

from __future__ import annotations

import asyncio

import pytest

from tests.serving import LAYOUT, MADV_DONTNEED, Gate, serving, within
from tests.targets import KINDS, Signal, until


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_missing_at_close_is_poisoned(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """Threads in flight and threads that come later see SIGBUS, never a page of zeros."""
    pages = 32
    if kind.startswith("hugetlb"):
        pages = 4
        request.getfixturevalue("huge_pages")(6)
    gate = Gate()
    async with serving(gate, kind, pages) as served:
        target = served.target
        waiting = [target.start_read(page, thread=page) for page in (0, 1)]
        await until(lambda: len(gate.faults) == 2, "two handlers are asked")
        await within(served.pager.aclose())
        assert len(gate.cancelled) == 2
        for touch in waiting:
            assert isinstance(await touch, Signal)
        assert await target.start_sweep() == [None] * pages


async def test_what_is_there_at_close_stays() -> None:
    """Only missing pages are poisoned; removed ones are missing too, and were zero."""
    async with serving(features=LAYOUT) as served:
        target = served.target
        assert await target.start_write(2, 77) == 77
        assert await target.start_read(3) == 4
        assert await target.start_madvise(MADV_DONTNEED, page=3) == 0
        assert await target.start_read(3) == 0
        await served.pager.aclose()
        words = await target.start_sweep(0, 5)
        assert words[0] is words[1] is words[4] is None
        assert words[2] is not None
        assert words[2] & 255 == 77
        assert words[3] == 0


async def test_a_block_that_raises_fails_closed_too() -> None:
    """An exception in the user's own code does not turn the target's memory into zeros."""
    targets = []
    with pytest.raises(ZeroDivisionError):
        async with serving() as served:
            targets.append(served.target)
            touch = served.target.start_read(3)
            raise ZeroDivisionError
    with pytest.raises(Exception, match="ended before"):
        await touch


async def test_memory_that_moves_during_the_close_is_poisoned_too() -> None:
    """A move that is read while missing pages are being poisoned takes none of them to zero."""
    async with serving(pages=512, features=LAYOUT) as served:
        target = served.target
        to = target.reserve(target.length)
        move = target.start_mremap(256, 256, flags=3, to=to, thread=0)
        closing = asyncio.create_task(served.pager.aclose())
        await within(closing)
        assert await move == to
        assert await target.start_words(to, 4096, 256) == [None] * 256
        assert await target.start_sweep(0, 256) == [None] * 256
