"""Law 12: forks are handled from outside."""

from __future__ import annotations

import asyncio

import pytest

from aiouffd import Feature, Pager, Userfaultfd
from tests.serving import from_image, image, serving
from tests.targets import PAGE, until


async def test_serving_ones_own_memory_with_fork_events_is_refused() -> None:
    """A fork would wait, its process's allocator locked, for a reader in that very process."""
    with Userfaultfd.open(Feature.EVENT_FORK) as uffd:
        pager = Pager(uffd)
        with pytest.raises(ValueError, match="EVENT_FORK"):
            async with pager:
                pass
        await pager.aclose()


async def test_an_adopted_descriptor_of_ones_own_memory_is_refused_too() -> None:
    """It is the memory that counts, not how its descriptor came here."""
    with (
        Userfaultfd.open(Feature.EVENT_FORK) as opened,
        Userfaultfd.adopt(opened.dup()) as uffd,
        pytest.raises(ValueError, match="EVENT_FORK"),
    ):
        Pager(uffd).start()


async def test_ones_own_memory_without_fork_events_is_served() -> None:
    """Only fork events are out of place there."""
    with Userfaultfd.open(Feature.EVENT_REMOVE) as uffd:
        async with Pager(uffd):
            pass


async def test_a_forked_child_is_served_from_outside() -> None:
    """Parent and child read the image, each through its own pager."""
    async with serving(features=Feature.EVENT_FORK) as served:
        target = served.target
        assert await target.start_write(1, 77) == 77
        child = await target.fork()
        await until(lambda: served.pager.children, "the child's pager")
        assert await child.start_read(1) == 77
        assert await child.start_read(2) == 3
        assert await target.start_read(3) == 4
        assert await child.start_write(3, 5) == 5
        assert await target.start_read(3) == 4
        (pager,) = served.pager.children
        assert pager.counters.faults == 2
        assert [region.length for region in pager.regions] == [64 * PAGE]
        child.kill()
        child.reap()
        await until(lambda: not served.pager.children, "the child's pager ends by itself")


async def test_grandchildren_are_served_and_closed_with_the_rest() -> None:
    """A child forks in turn; closing the first pager closes them all, closed."""
    async with serving(features=Feature.EVENT_FORK) as served:
        target = served.target
        child = await target.fork()
        grandchild = await child.fork()
        await until(lambda: served.pager.children, "the child's pager")
        (pager,) = served.pager.children
        await until(lambda: pager.children, "the grandchild's pager")
        assert await grandchild.start_read(5) == 6
        assert await pager.regions[0].fill(6 * PAGE, image(6 * PAGE)) == PAGE
        assert await child.start_read(6) == 7
        await served.pager.aclose()
        for process in (target, child, grandchild):
            assert await process.start_sweep(8, 2) == [None, None]
        assert not served.pager.children


async def test_a_child_that_is_forked_during_the_close_is_not_forgotten() -> None:
    """Its event is still read; its missing pages are poisoned and its descriptor is closed."""
    async with serving(from_image, features=Feature.EVENT_FORK, pages=4096) as served:
        target = served.target
        assert await target.start_read(0) == 1
        fork = target.start_fork(0)
        await target.in_event(0)
        closing = asyncio.create_task(served.pager.aclose())
        child = await fork
        await child.ready
        await closing
        assert not served.pager.children
        assert await child.start_words(target.at(8), PAGE, 2) == [None, None]
        assert await target.start_sweep(8, 2) == [None, None]
