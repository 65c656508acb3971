"""EAGAIN: fills that are refused while a target changes its memory, and what they leave."""

from __future__ import annotations

import asyncio
import errno
import random
import time
from typing import Any

import pytest

from aiouffd import DeadlineExceeded, Feature, PageFault, Resolution, Zero
from aiouffd.kernel import calls
from tests.serving import MADV_DONTNEED, Gate, Record, from_image, image, serving, unread
from tests.targets import DEADLINE, PAGE, TIME_SCALE, Signal, until

REMOVE = Feature.EVENT_REMOVE


# --- 2 and 3: no progress, and nothing that would say when -----------------------------


async def test_demand_is_served_although_a_removal_waits_behind_it(seed: int) -> None:
    """Thousands of faults that are read before an older REMOVE end in their bytes."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    async with serving(features=REMOVE, pages=3000) as served:
        target, counters = served.target, served.pager.counters
        for page in range(1500):
            removing = target.start_madvise(MADV_DONTNEED, 1500 + rng.randrange(1500))
            touch = target.start_read(page, thread=1)
            assert await touch == (page + 1) % 256
            assert await removing == 0
        assert counters.parked > 0
        assert counters.failures == 0
        assert served.pager.in_flight == 0


async def test_a_parked_fault_needs_no_further_event() -> None:
    """With nothing else to read a refused fill is tried again by our own timer, and soon."""
    worst = 0.0
    async with serving(features=REMOVE, pages=600) as served:
        target = served.target
        for page in range(300):
            removing = target.start_madvise(MADV_DONTNEED, 300 + page)
            began = time.monotonic()
            assert await target.start_read(page, thread=1) == (page + 1) % 256
            worst = max(worst, time.monotonic() - began)
            assert await removing == 0
            assert served.uffd.info().total == 0
    assert worst < TIME_SCALE, f"{worst * 1000:.0f} ms for one fault"


# --- 4: a storm of retries -------------------------------------------------------------


async def test_many_parked_faults_cost_few_retries() -> None:
    """A second of EAGAIN with 60 parked faults: one timer, a bounded rate, no new task."""
    async with serving(leave_out=2, features=Feature.EVENT_UNMAP, threads=61) as served:
        target, pager = served.target, served.pager
        with unread(target) as read_on:
            removal = target.start_munmap(0, 3, thread=60)
            await target.in_event(60)
            touches = [target.start_read(3 + n, thread=n) for n in range(60)]
            await until(lambda: pager.counters.parked == 60, "all faults are parked")
            tasks = asyncio.all_tasks()
            used, began = time.thread_time(), time.monotonic()
            await asyncio.sleep(1)  # what is measured, not a way to wait for something
            used = time.thread_time() - used
            assert used < 0.2 * (time.monotonic() - began)
            assert asyncio.all_tasks() == tasks
            read_on()
            assert [await touch for touch in touches] == [4 + n for n in range(60)]
            assert await removal == 0


async def test_a_deadline_counts_time_and_ends_all_that_is_parked() -> None:
    """Faults that stay parked past the deadline fail closed, each with a named error."""
    record = Record()
    settings: dict[str, Any] = {"observers": [record], "deadline": 0.3}
    async with serving(leave_out=2, features=Feature.EVENT_UNMAP, threads=9, **settings) as served:
        target = served.target
        with unread(target) as read_on:
            removal = target.start_munmap(0, 3, thread=8)
            await target.in_event(8)
            touches = [target.start_read(3 + n, thread=n) for n in range(8)]
            await until(lambda: len(record.failures) == 8, "the deadline passes")
            assert {type(error) for error in record.failures} == {DeadlineExceeded}
            read_on()
            for touch in touches:
                assert isinstance(await touch, Signal)
            assert await removal == 0


@pytest.mark.alone  # it takes all CPUs, and what is left must do for the fills
async def test_a_target_that_changes_without_pause_starves_nobody(seed: int) -> None:
    """While one thread frees pages in a tight loop another's faults still end in their bytes."""
    print(f"seed {seed}")
    async with serving(features=REMOVE, pages=64, warn_after=None) as served:
        target = served.target
        target.pages = 32  # what is freed; the other half is what is read
        churn = target.start_churn(MADV_DONTNEED, seed, 3)
        worst = 0.0
        for page in range(32, 52):
            began = time.monotonic()
            assert await target.start_read(page).within(3 * DEADLINE) == page + 1
            worst = max(worst, time.monotonic() - began)
        await target.stop(2)
        assert await churn > 0
        assert served.pager.counters.failures == 0
    print(f"the longest took {worst * 1000:.1f} ms")


# --- 9: a copy undone ------------------------------------------------------------------


async def test_a_copy_undone_by_a_racing_removal_is_served_again(seed: int) -> None:
    """A page that is filled while it is being removed reads zero afterwards; nobody hangs."""
    print(f"seed {seed}")
    rng = random.Random(seed)

    async def sometimes_later(fault: PageFault) -> Resolution:
        for _ in range(rng.randrange(3)):
            await asyncio.sleep(0)
        return await from_image(fault)

    rounds = 1500
    async with serving(sometimes_later, features=REMOVE, pages=64) as served:
        target = served.target
        for _ in range(rounds):
            page = rng.randrange(64)
            removing = target.start_madvise(MADV_DONTNEED, page)
            raced = target.start_read(page, thread=1)
            await removing
            assert await raced in {0, page + 1}
            assert await target.start_read(page, thread=2) == 0, page
        assert served.pager.counters.removed > 0
        assert served.uffd.info().total == 0


# --- 14: zeros right after REMOVE ------------------------------------------------------


async def test_a_removed_page_is_zero_when_touched_not_before() -> None:
    """Right after a REMOVE is read the kernel refuses zeros; a later touch gets them."""
    refused = 0
    async with serving(features=REMOVE, pages=64) as served:
        target, fd = served.target, served.uffd.fileno()
        for round_ in range(1000):
            page = round_ % 64
            before = served.pager.counters.events
            removing = target.start_madvise(MADV_DONTNEED, page)
            await until(lambda: served.pager.counters.events > before, "the REMOVE is read")  # noqa: B023
            if not removing.done:  # what an eager zero would have met
                refused += calls.zeropage(fd, target.at(page), PAGE) == -errno.EAGAIN
            assert await removing == 0
            assert await target.start_read(page, thread=1) == 0
        assert served.pager.counters.failures == 0
    print(f"{refused} of 1000 eager zeros would have been refused")


# --- 13: prefetch against REMOVE -------------------------------------------------------


async def test_a_prefetch_that_meets_a_removal_leaves_the_page_out(seed: int) -> None:
    """Chunks in hand while a page of theirs is removed arrive without that page."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    pages, chunk, rounds = 64, 8, 25
    for round_ in range(rounds):
        async with serving(features=REMOVE, pages=pages) as served:
            target = served.target
            removed = rng.sample(range(pages), 6)
            demand = rng.choice([page for page in range(pages) if page not in removed])
            held = [(at * PAGE, image(at * PAGE, chunk * PAGE)) for at in range(0, pages, chunk)]
            removals = [target.start_madvise(MADV_DONTNEED, page) for page in removed]
            if round_ % 2:  # each REMOVE read before the plan is carried out
                for removal in removals:
                    assert await removal == 0
            touch = target.start_read(demand, thread=1)
            fills = asyncio.gather(*(served.region.fill(at, data) for at, data in held))
            assert await touch == demand + 1
            await fills
            for removal in removals:
                assert await removal == 0
            swept = await target.start_sweep()
            for page in range(pages):
                if page in removed:
                    assert swept[page] == 0, f"page {page} came back"
                else:
                    assert swept[page] == page + 1


async def test_a_refused_prefetch_goes_on_after_the_refusal() -> None:
    """While the layout is held up a fill waits, demand does too, and demand comes first."""
    order: list[str] = []
    async with serving(leave_out=2, features=Feature.EVENT_UNMAP) as served:
        target = served.target

        async def fill() -> int:
            done = await served.region.fill(8 * PAGE, image(8 * PAGE, 32 * PAGE))
            order.append("fill")
            return done

        with unread(target) as read_on:
            removal = target.start_munmap(0, 3)
            await target.in_event()
            filling = asyncio.create_task(fill())
            touch = target.start_read(50, thread=1)
            await until(lambda: served.pager.counters.parked == 1, "the fault is parked")
            assert not filling.done()
            read_on()
            assert await touch == 51
            order.append("demand")
            assert await asyncio.wait_for(filling, DEADLINE) == 32 * PAGE
            assert await removal == 0
        assert await target.start_sweep(8, 32) == list(range(9, 41))
        assert served.pager.counters.filled_bytes == 32 * PAGE


async def test_zero_answers_park_like_any_other() -> None:
    """A handler's Zero that meets EAGAIN is tried again as well."""

    async def zero(fault: PageFault) -> Resolution:
        return Zero()

    async with serving(zero, features=REMOVE, pages=400) as served:
        target = served.target
        for page in range(200):
            removing = target.start_madvise(MADV_DONTNEED, 200 + page)
            assert await target.start_read(page, thread=1) == 0
            assert await removing == 0


async def test_work_in_hand_for_a_removed_page_is_cancelled() -> None:
    """A handler that fetches a page which is removed meanwhile is cancelled; the page is zero."""
    gate = Gate()
    async with serving(gate, features=REMOVE) as served:
        target = served.target
        touch = target.start_read(5, thread=1)
        await until(lambda: gate.faults, "the handler is asked")
        assert await target.start_madvise(MADV_DONTNEED, 5) == 0
        assert await touch == 0
        await until(lambda: gate.cancelled == gate.faults, "the handler is cancelled")
