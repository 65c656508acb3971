"""Law 3: every fault ends."""

from __future__ import annotations

import asyncio

import pytest

from aiouffd import (
    Action,
    DeadlineExceeded,
    FailurePolicy,
    Feature,
    HandlerError,
    Mode,
    PageFault,
    Resolution,
    Zero,
)
from tests.serving import MADV_DONTNEED, Gate, Record, from_image, image, serving
from tests.targets import PAGE, Signal


async def never(fault: PageFault) -> Resolution:
    await asyncio.Event().wait()
    raise AssertionError


async def test_a_handler_that_never_answers_meets_the_deadline() -> None:
    """The fault ends in the failure policy: its thread sees SIGBUS, not silence."""
    record = Record()
    async with serving(never, deadline=0.1, observers=[record]) as served:
        touch = await served.target.start_read(3)
        assert isinstance(touch, Signal)
        assert isinstance(record.failures[0], DeadlineExceeded)
        assert record.outcomes == ["poison"]


async def test_a_queued_fault_meets_the_deadline_too() -> None:
    """A fault that never got its turn ends as well."""
    async with serving(never, deadline=0.1, max_in_flight=1) as served:
        touches = [served.target.start_read(thread, thread) for thread in range(4)]
        for touch in touches:
            assert isinstance(await touch, Signal)
        assert served.pager.counters.failures == 4


@pytest.mark.parametrize("answer", [object(), b"short", "text", 7])
async def test_an_answer_that_is_none_ends_in_the_policy(answer: object) -> None:
    """What is no resolution, or no whole page, is a failure like an exception."""
    record = Record()

    async def nonsense(fault: PageFault) -> object:
        return answer

    policy = FailurePolicy(retries=0)
    async with serving(nonsense, failure=policy, observers=[record]) as served:  # type: ignore[arg-type]
        assert isinstance(await served.target.start_read(3), Signal)
        assert isinstance(record.failures[0], HandlerError)


async def test_a_page_that_was_served_is_served_again() -> None:
    """The books may be stale: without remove events a page leaves silently and faults anew."""
    async with serving(features=0) as served:
        target = served.target
        assert await target.start_read(3) == 4
        assert await target.start_madvise(MADV_DONTNEED, page=3) == 0
        assert await target.start_read(3) == 4
        assert served.pager.counters.ended == 2


async def test_a_handler_that_only_wakes_is_asked_again() -> None:
    """Waking without a page is a retry: the kernel delivers the fault anew."""
    tries = 0

    async def third_time(fault: PageFault) -> bytes | None:
        nonlocal tries
        tries += 1
        return image(fault.offset) if tries == 3 else None

    async with serving(third_time) as served:
        assert await served.target.start_read(3) == 4
        assert tries == 3


async def test_a_cancelled_handler_is_a_failed_one() -> None:
    """Cancelling a handler's task from outside goes into the policy, as an error would."""
    gate = Gate()
    policy = FailurePolicy(retries=1, backoff=0, then=Action.POISON)
    async with serving(gate, failure=policy) as served:
        touch = served.target.start_read(3)
        await served.target.blocked()
        while not gate.faults:
            await asyncio.sleep(0)
        (task,) = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        task.cancel()
        while len(gate.faults) < 2:
            await asyncio.sleep(0)
        gate.let_go()
        assert await touch == 4


async def test_a_retry_whose_source_was_cancelled_still_asks_the_fallback() -> None:
    """CancelledError out of a shared future is an error of the handler, not the pager's own."""

    async def cancelled(fault: PageFault) -> Resolution:
        shared = asyncio.get_running_loop().create_future()
        shared.cancel()
        await shared
        raise AssertionError

    policy = FailurePolicy(retries=2, backoff=0, fallback=from_image)
    async with serving(cancelled, failure=policy) as served:
        assert await served.target.start_read(3) == 4
        counters = served.pager.counters
        assert (counters.retries, counters.fallbacks, counters.failures) == (2, 1, 0)


@pytest.mark.parametrize("kind", ["shmem", "shmem-private", "anon"])
async def test_a_missing_page_that_is_write_protected_ends_too(kind: str) -> None:
    """Protection leaves a mark where no page is, and POISON and ZEROPAGE stop at it."""

    async def failing(fault: PageFault) -> Resolution:
        if fault.offset == 5 * PAGE:
            return Zero()
        raise RuntimeError

    features = Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM | Feature.PAGEFAULT_FLAG_WP
    modes = Mode.MISSING | Mode.WP
    policy = FailurePolicy(retries=0)
    async with serving(failing, kind, features=features, modes=modes, failure=policy) as served:
        target = served.target
        served.uffd.writeprotect(target.base, target.length)
        assert isinstance(await target.start_read(3), Signal)
        assert await target.start_read(5) == 0
        assert target.is_wp(5) or kind == "shmem"  # there ZEROPAGE replaces the mark
        await served.pager.aclose()
        words = await target.start_sweep(4, 3)
        assert words == [None, 0, None]
