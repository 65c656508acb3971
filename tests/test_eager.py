"""Coroutines that start at once and become a task only if they suspend."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from aiouffd import eager

T = TypeVar("T")


async def in_callback(call: Callable[[], T]) -> T:
    """Run something as the loop's callback, where no task is current."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            done.set_result(call())
        except Exception as error:
            done.set_exception(error)

    loop.call_soon(run)
    return await done


async def start(awaitable: Awaitable[T]) -> eager.Started[T]:
    """Start as a callback of the loop does."""
    loop = asyncio.get_running_loop()
    return await in_callback(lambda: eager.start(loop, awaitable))


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
