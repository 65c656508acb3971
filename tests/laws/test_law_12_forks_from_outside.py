"""Law 12: forks are handled from outside."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource

import pytest

from aiouffd import Feature, Pager, Userfaultfd
from tests.serving import image, serving, unread, within
from tests.targets import PAGE, until

pytestmark = pytest.mark.root  # fork events take CAP_SYS_PTRACE


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
    async with serving(leave_out=2, features=Feature.EVENT_FORK | Feature.EVENT_UNMAP) as served:
        target, pager = served.target, served.pager
        assert await target.start_read(5) == 6
        with unread(target) as read_on:
            removal = target.start_munmap(0, 3, thread=0)
            await target.in_event(0)
            closing = asyncio.create_task(pager.aclose())
            fork = target.start_fork(1)
            await until(lambda: pager.children, "the child's pager")
            assert not closing.done()
            read_on()
            assert await removal == 0
            child = await fork
            await child.ready
            await within(closing)
        assert not pager.children
        for process in (child, target):
            assert await process.start_words(target.at(4), PAGE, 3) == [None, 6, None]


async def test_a_grandchild_outlives_its_parent() -> None:
    """A child ends before its own child does: the first pager closes that one."""
    async with serving(features=Feature.EVENT_FORK) as served:
        child = await served.target.fork()
        grandchild = await child.fork()
        await until(lambda: served.pager.children, "the child's pager")
        (middle,) = served.pager.children
        await until(lambda: middle.children, "the grandchild's pager")
        child.kill()
        child.reap()
        await until(lambda: middle.uffd.closed, "the child's pager ends by itself")
        assert await grandchild.start_peek(served.target.at(5)) == 6
        await served.pager.aclose()
        assert await grandchild.start_words(served.target.at(5), PAGE, 2) == [6, None]


async def test_a_fork_waits_for_a_descriptor_when_there_is_none() -> None:
    """Its event stays queued; nothing spins, and with a free descriptor the child is served."""
    async with serving(features=Feature.EVENT_FORK) as served:
        target = served.target
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(map(int, os.listdir("/proc/self/fd")))
        holes = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)]
        while holes[-1] < highest:
            holes.append(os.dup(holes[-1]))
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (holes[-1] + 1, hard))
            fork = target.start_fork(0)
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert not fork.done
            assert not served.pager.children
            os.close(holes.pop())  # exactly one: nothing else may be opened for it
            await until(lambda: served.pager.children, "the child's pager")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in holes:
                os.close(fd)
        child = await fork
        await child.ready
        assert await child.start_peek(target.at(5)) == 6


async def test_who_takes_the_last_descriptor_meanwhile_stops_no_reading() -> None:
    """To listen again takes none: the fork and the faults behind it are read in the end."""
    async with serving(features=Feature.EVENT_FORK) as served:
        target = served.target
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(map(int, os.listdir("/proc/self/fd")))
        holes = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)]
        while holes[-1] < highest:
            holes.append(os.dup(holes[-1]))
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (holes[-1] + 1, hard))
            fork = target.start_fork(0)
            pausing_since = asyncio.get_running_loop().time()
            while asyncio.get_running_loop().time() < pausing_since + 0.2:  # some pauses long
                with contextlib.suppress(OSError):
                    holes.append(os.dup(holes[0]))
                await asyncio.sleep(0.001)
            assert not fork.done
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in holes:
                os.close(fd)
        child = await fork
        await child.ready
        assert await child.start_peek(target.at(5)) == 6
        assert await target.start_peek(target.at(6)) == 7
