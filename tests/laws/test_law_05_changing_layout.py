"""Law 5: EAGAIN is not an error: park, read on, retry by a timer of our own."""

from __future__ import annotations

import asyncio
import time

from aiouffd import DeadlineExceeded, Feature, PageFault, Resolution
from tests.serving import LAYOUT, MADV_DONTNEED, Record, from_image, serving, unread
from tests.targets import Signal, until, wait_until


async def test_a_fault_waits_while_the_layout_changes() -> None:
    """EAGAIN holds on with nothing left to read: the fault is parked, then served."""
    async with serving(leave_out=2, features=Feature.EVENT_UNMAP) as served:
        target, pager = served.target, served.pager
        with unread(target) as read_on:
            removal = target.start_munmap(0, 3, thread=0)
            await target.in_event(0)
            touches = [target.start_read(page, thread=page - 9) for page in (10, 11, 12)]
            for thread in (1, 2, 3):
                await target.blocked(thread)
            await until(lambda: pager.counters.parked == 3, "the faults are parked")
            assert pager.counters.events == 0
            assert pager.in_flight == 3
            fill = asyncio.create_task(served.region.fill(20 * 4096, bytes(4096)))
            await asyncio.sleep(0)
            assert not fill.done()
            read_on()
            assert [await touch for touch in touches] == [11, 12, 13]
            assert await removal == 0
            assert await fill == 4096
        assert pager.counters.failures == 0


async def test_a_removal_that_was_read_a_moment_ago() -> None:
    """The fault is read together with the removal after which the kernel says EAGAIN a while."""
    async with serving(features=LAYOUT) as served:
        target = served.target
        removal = target.start_madvise(MADV_DONTNEED, page=3, thread=0)
        wait_until(lambda: target.state(0) == "D", "the removal waits for its event to be read")
        touch = target.start_read(5, thread=1)
        wait_until(lambda: target.is_blocked(1), "the read blocks")
        assert await touch == 6
        assert await removal == 0
        assert served.pager.in_flight == 0


async def test_parked_faults_share_one_slow_timer() -> None:
    """Half a second of EAGAIN with 32 parked faults costs next to no processor time."""
    async with serving(leave_out=2, features=Feature.EVENT_UNMAP, threads=33) as served:
        target, pager = served.target, served.pager
        with unread(target) as read_on:
            removal = target.start_munmap(0, 3, thread=32)
            await target.in_event(32)
            touches = [target.start_read(8 + n, thread=n) for n in range(32)]
            await until(lambda: pager.counters.parked == 32, "all faults are parked")
            used = time.process_time()
            await asyncio.sleep(0.5)  # what is measured, not a way to wait for something
            used = time.process_time() - used
            assert used < 0.25, f"{used:.3f} s of processor time in 0.5 s of waiting"
            read_on()
            assert [await touch for touch in touches] == [9 + n for n in range(32)]
            assert await removal == 0


async def test_a_layout_that_never_settles_meets_the_deadline() -> None:
    """The deadline counts elapsed time, whatever the number of tries."""
    record = Record()
    async with serving(
        leave_out=2, features=Feature.EVENT_UNMAP, deadline=0.2, observers=[record]
    ) as served:
        target = served.target
        with unread(target) as read_on:
            removal = target.start_munmap(0, 3, thread=0)
            await target.in_event(0)
            touch = target.start_read(10, thread=1)
            await until(lambda: record.failures, "the deadline passes")
            assert isinstance(record.failures[0], DeadlineExceeded)
            read_on()  # poison needs a settled layout too
            assert isinstance(await touch, Signal)
            assert await removal == 0


async def test_a_part_that_was_done_is_not_done_again() -> None:
    """A long answer whose end the kernel refuses for now has still served its page."""
    asked: list[int] = []

    async def both(fault: PageFault) -> Resolution:
        asked.append(fault.offset)
        return await from_image(fault)

    async with serving(both, features=LAYOUT) as served:
        target = served.target
        for page in range(8):
            removal = target.start_madvise(MADV_DONTNEED, page=40, thread=0)
            touch = target.start_read(page, thread=1)
            assert await touch == page + 1
            assert await removal == 0
        assert asked == [page * 4096 for page in range(8)]
