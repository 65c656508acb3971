"""Law 7: a dead target says nothing; a pidfd and a probe tell."""

from __future__ import annotations

import asyncio
import time

import pytest

from aiouffd import Action, ClosedError, FailurePolicy, PageFault, TargetGone
from tests.serving import Gate, Record, check_books, from_image, image, serving, within
from tests.targets import PAGE, TIME_SCALE, until


async def test_an_exit_is_seen_at_once_through_the_pidfd() -> None:
    """Handlers in flight are cancelled, and whoever waits for the end goes on."""
    gate = Gate()
    record = Record()
    async with serving(gate, observers=[record]) as served:
        served.target.start_read(3)
        await until(lambda: gate.faults, "the handler is asked")
        began = time.monotonic()
        served.target.kill()
        await within(served.pager.wait_closed())
        # The probe below asks once a second: sooner than that, it was the pidfd.
        assert time.monotonic() - began < 0.5 * TIME_SCALE
        assert served.pager.target_gone
        await until(lambda: gate.cancelled, "the handler is cancelled")
        assert record.outcomes == ["gone"]
        with pytest.raises(TargetGone):
            await served.region.fill(0, image(0))
        with pytest.raises((TargetGone, ClosedError)):
            served.pager.register(served.target.base, PAGE, from_image)


async def test_an_exit_without_a_pidfd_is_seen_by_the_probe() -> None:
    """Nobody faults, nothing is pending, no pidfd is known: still it is noticed."""
    async with serving(know_target=False) as served:
        assert await served.target.start_read(3) == 4
        served.target.kill()
        await within(served.pager.wait_closed(), 4 * TIME_SCALE)
        assert served.pager.target_gone


async def test_an_exec_retires_the_session_although_the_pidfd_is_quiet() -> None:
    """The process lives on with other memory."""
    async with serving() as served:
        assert await served.target.start_read(3) == 4
        await served.target.start_exec()
        await within(served.pager.wait_closed(), 4 * TIME_SCALE)
        assert served.pager.target_gone


async def test_an_answer_to_a_dead_target_ends_the_session() -> None:
    """ESRCH is no failure of the handler: no retry, no policy."""
    gate = Gate()

    async def raising(fault: PageFault) -> bytes:
        raise AssertionError("the policy was asked")

    policy = FailurePolicy(fallback=raising)
    async with serving(gate, know_target=False, failure=policy) as served:
        served.target.start_read(3)
        await until(lambda: gate.faults, "the handler is asked")
        served.target.kill()
        served.target.reap()
        gate.let_go()
        await within(served.pager.wait_closed(), 0.9 * TIME_SCALE)
        assert served.pager.counters.failures == 0


async def test_a_fault_of_a_dead_target_ends_once() -> None:
    """Killing finds nobody to kill; what ends all faults then has ended this one too."""
    gate = Gate()
    record = Record()
    async with serving(gate, observers=[record]) as served:
        served.target.start_read(3)
        await until(lambda: gate.faults, "the handler is asked")
        (flight,) = served.pager.space.in_flight.values()
        served.target.kill()
        served.target.reap()
        served.pager._dispatcher.recovery.last_action(flight, Action.KILL)
        check_books(served.pager)
        assert record.outcomes == ["gone"]


async def test_many_short_lives_leave_nothing() -> None:
    """The descriptors of forty targets that died in the middle of things are closed."""
    for _ in range(10):
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(_one_life())


async def _one_life() -> None:
    gate = Gate()
    async with serving(gate, pages=4, threads=1) as served:
        served.target.start_read(1)
        await until(lambda: gate.faults, "the handler is asked")
        served.target.kill()
        await within(served.pager.wait_closed())
