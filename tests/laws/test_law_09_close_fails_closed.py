"""Law 9: close fails closed."""

from __future__ import annotations

import asyncio

import pytest

from aiouffd import Action, Feature, PageFault, Pager, Userfaultfd
from tests.serving import (
    LAYOUT,
    MADV_DONTNEED,
    Gate,
    Record,
    from_image,
    serving,
    unread,
    within,
)
from tests.targets import KINDS, PAGE, Signal, Target, TargetDied, until


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


async def test_what_the_target_does_meanwhile_is_heeded() -> None:
    """Moved while the close waits: poisoned at its new place.  Removed meanwhile: zero."""
    async with serving(leave_out=2, features=LAYOUT) as served:
        target, pager = served.target, served.pager
        to = target.reserve(16 * PAGE)
        with unread(target) as read_on:
            unmap = target.start_munmap(0, 3, thread=0)
            await target.in_event(0)
            closing = asyncio.create_task(pager.aclose())
            await until(lambda: pager.closing, "the close has begun")
            assert await target.start_mremap(32, 16, flags=3, to=to, thread=1) == to
            assert await target.start_madvise(MADV_DONTNEED, page=20, pages=2, thread=2) == 0
            assert await target.start_madvise(MADV_DONTNEED, page=60, thread=2) == 0
            assert not closing.done()
            read_on()
            assert await unmap == 0
            await within(closing)
        assert await target.start_words(to, PAGE, 16) == [None] * 16
        assert await target.start_sweep(18, 6) == [None, None, 0, 0, None, None]
        assert await target.start_sweep(59, 3) == [None, 0, None]


@pytest.mark.root
async def test_children_fail_closed_with_the_rest() -> None:
    """Each forked child's missing pages are poisoned through its own userfaultfd."""
    async with serving(features=Feature.EVENT_FORK) as served:
        target = served.target
        assert await target.start_read(1) == 2
        child = await target.fork()
        await until(lambda: served.pager.children, "the child's pager")
        await within(served.pager.aclose())
        for process in (target, child):
            assert await process.start_words(target.base, PAGE, 3) == [None, 2, None]


class Broken(Record):
    """An observer with a bug."""

    def begin(self, fault: PageFault) -> None:
        raise ZeroDivisionError


async def test_a_pager_that_failed_can_still_kill() -> None:
    """The target's end is noticed though its faults are no longer read."""
    with pytest.raises(TargetDied):
        async with serving(observers=[Broken()]) as served:
            touch = served.target.start_read(3)
            with pytest.raises(ZeroDivisionError):
                await within(served.pager.wait_closed())
            await within(served.pager.aclose(Action.KILL))
            await touch


async def test_a_pager_that_never_started_fails_closed_too() -> None:
    """Its ranges are registered by then, and their missing pages would read as zeros."""
    with Target("anon", 4, register=0) as target:
        pager = Pager(Userfaultfd.adopt(target.take_uffd()))
        pager.register(target.base, target.length, from_image)
        await within(pager.aclose())
        assert pager.uffd.closed
        assert await target.start_sweep() == [None] * 4


async def test_a_child_that_could_not_be_announced_fails_closed_too() -> None:
    """An error of on_fork ends the pager; the child's missing pages are poisoned all the same."""

    def on_fork(_: Pager) -> None:
        raise ZeroDivisionError

    async with serving(features=Feature.EVENT_FORK, on_fork=on_fork) as served:
        child = await served.target.fork()
        with pytest.raises(ZeroDivisionError):
            await within(served.pager.wait_closed())
        with pytest.raises(ZeroDivisionError):
            await within(served.pager.__aexit__(None, None, None))
        assert await child.start_words(served.target.base, PAGE, 3) == [None] * 3
        served.pager._dispatcher.error = None
