"""Coroutines that start at once and become a task only if they suspend."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref

import pytest

from aiouffd import eager
from tests.callbacks import in_callback, start


async def test_no_suspension_no_task() -> None:
    """What finishes at once gives its result and no task."""

    async def at_once() -> int:
        return 7

    assert await start(at_once()) == (None, 7)


async def test_error_before_suspension() -> None:
    """What fails at once raises out of start."""

    async def fails() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await start(fails())


async def test_bare_yield() -> None:
    """A bare yield costs one turn of the loop."""

    async def yields() -> int:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return 7

    task, _ = await start(yields())
    assert task is not None
    assert await task == 7


@pytest.mark.parametrize("early", [True, False])
async def test_future(early: bool) -> None:
    """A future that is done before the task's first turn counts like one done later."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[int] = loop.create_future()

    async def waits() -> int:
        return await future + await asyncio.sleep(0, 1)

    def begin() -> eager.Started[int]:
        started = eager.start(loop, waits())
        if early:
            future.set_result(6)
        return started

    task, _ = await in_callback(begin)
    assert task is not None
    if not early:
        await asyncio.sleep(0)
        future.set_result(6)
    assert await task == 7


async def test_failed_future() -> None:
    """A future's error is raised where the coroutine waits for it."""
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def waits() -> str:
        try:
            return str(await future)
        except ValueError:
            return "caught"

    task, _ = await start(waits())
    assert task is not None
    future.set_exception(ValueError())
    assert await task == "caught"


async def test_cancelled_before_first_turn() -> None:
    """A cancellation reaches the coroutine even before its task has had a turn."""
    loop = asyncio.get_running_loop()
    seen: list[str] = []

    async def waits() -> None:
        try:
            await loop.create_future()
        except asyncio.CancelledError:
            seen.append("cancelled")
            await asyncio.sleep(0)  # to suspend again is allowed
            seen.append("went on")
            raise

    def begin() -> eager.Started[None]:
        started = eager.start(loop, waits())
        assert started[0] is not None
        started[0].cancel()
        return started

    task, _ = await in_callback(begin)
    assert task is not None
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["cancelled", "went on"]


async def test_timeout_around_first_suspension() -> None:
    """A timeout entered before the first suspension ends the wait behind it."""
    loop = asyncio.get_running_loop()

    async def waits() -> str:
        try:
            async with asyncio.timeout(0.01):
                await loop.create_future()
        except TimeoutError:
            return "timed out"
        return "not"

    task, _ = await start(waits())
    assert task is not None
    assert await task == "timed out"


async def test_task_group_inside() -> None:
    """A task group may be entered before the first suspension."""

    async def waits() -> int:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(asyncio.sleep(0, n)) for n in (3, 4)]
        return sum(task.result() for task in tasks)

    task, _ = await start(waits())
    assert task is not None
    assert await task == 7


async def test_one_coroutine_never_cancels_the_next() -> None:
    """Who keeps the current task of a finished coroutine does not hold the next one's."""
    kept: list[object] = []

    async def keeps() -> None:
        kept.append(asyncio.current_task())

    async def looks() -> bool:
        return asyncio.current_task() in kept

    await start(keeps())
    assert await start(looks()) == (None, False)


async def test_nothing_is_kept() -> None:
    """A coroutine that finished at once is not kept alive."""

    class Page:
        pass

    async def uses(page: Page) -> None:
        assert isinstance(page, Page)

    page = Page()
    seen = weakref.ref(page)
    await start(uses(page))
    del page
    gc.collect()
    assert seen() is None


async def test_other_awaitables() -> None:
    """Whatever can be awaited can be started."""
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    future.set_result(7)
    assert await start(future) == (None, 7)


# --- nothing is left -------------------------------------------------------------------


class Page:
    """Something that can be seen to go away."""


async def test_an_error_at_once_makes_no_cycle() -> None:
    """When the error is dropped everything that it passed goes at once, without gc."""
    loop = asyncio.get_running_loop()
    seen: list[weakref.ref[Page]] = []

    async def fails() -> None:
        page = Page()
        seen.append(weakref.ref(page))
        raise KeyError("x")

    def begin() -> None:
        with contextlib.suppress(KeyError):
            eager.start(loop, fails())

    gc.collect()
    gc.disable()
    try:
        await in_callback(begin)
        assert seen[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("early", [True, False])
async def test_a_cancellation_makes_no_cycle(early: bool) -> None:
    """Neither before the first turn nor later."""
    loop = asyncio.get_running_loop()
    seen: list[weakref.ref[Page]] = []

    async def waits() -> None:
        page = Page()
        seen.append(weakref.ref(page))
        await asyncio.sleep(10)

    def begin() -> None:
        task, _ = eager.start(loop, waits())
        assert task is not None
        if early:
            task.cancel()
        else:
            loop.call_later(0.001, task.cancel)
        task.add_done_callback(lambda _: done.set_result(None))

    done: asyncio.Future[None] = loop.create_future()
    gc.collect()
    gc.disable()
    try:
        loop.call_soon(begin)
        await done
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert seen[0]() is None
    finally:
        gc.enable()


# --- results within the last step ------------------------------------------------------


@pytest.mark.parametrize("waits", ["bare", "done", "later", "twice"])
async def test_a_result_is_told_in_the_last_step(waits: str) -> None:
    """Once, with the task, before the task is done."""
    loop = asyncio.get_running_loop()
    told: list[tuple[object, int, bool]] = []

    async def answers() -> int:
        if waits == "bare":
            await asyncio.sleep(0)
            return 7
        future = loop.create_future()
        if waits == "later":
            loop.call_later(0.001, future.set_result, None)
        else:
            loop.call_soon(future.set_result, None)  # before the task's first turn
        await future
        if waits == "twice":
            await asyncio.sleep(0.001)
        return 7

    def begin() -> asyncio.Task[int] | None:
        return eager.start(
            loop, answers(), receive=lambda task, result: told.append((task, result, task.done()))
        )[0]

    task = await in_callback(begin)
    assert task is not None
    assert await task == 7
    assert told == [(task, 7, False)]


@pytest.mark.parametrize("how", ["at once", "raises", "is cancelled"])
async def test_what_is_not_told(how: str) -> None:
    """Answers at once are returned; failures and cancellations are for done callbacks."""
    loop = asyncio.get_running_loop()
    told: list[object] = []

    async def ends() -> int:
        if how != "at once":
            await asyncio.sleep(0)
        if how == "raises":
            raise KeyError("x")
        if how == "is cancelled":
            await loop.create_future()
        return 7

    task, result = await in_callback(
        lambda: eager.start(loop, ends(), receive=lambda *told_now: told.append(told_now))
    )
    if task is not None:
        if how == "is cancelled":
            loop.call_later(0.001, task.cancel)
        await asyncio.wait([task])
        assert task.cancelled() or isinstance(task.exception(), KeyError)
    assert told == []
    assert result == (7 if how == "at once" else None)
