"""What asyncio offers works in what is started eagerly, before its first suspension too."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from typing import Any

import pytest

from aiouffd import eager
from tests.callbacks import in_callback, start

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="unset")


async def test_to_thread() -> None:
    """Work in a thread is awaited as usual, with the context."""

    async def asks_a_thread() -> tuple[str, bool]:
        VARIABLE.set("in the thread too")
        main = threading.get_ident()
        value, ident = await asyncio.to_thread(lambda: (VARIABLE.get(), threading.get_ident()))
        return value, ident == main

    task, _ = await start(asks_a_thread())
    assert task is not None
    assert await task == ("in the thread too", False)


async def test_locks_are_handed_over_in_order() -> None:
    """The first holds it at once, the others wait as tasks."""
    loop = asyncio.get_running_loop()
    lock = asyncio.Lock()
    order: list[int] = []

    async def locks(number: int) -> None:
        async with lock:
            order.append(number)
            await asyncio.sleep(0)

    def begin() -> list[asyncio.Task[None] | None]:
        tasks = [eager.start(loop, locks(number))[0] for number in range(3)]
        assert order == [0]
        return tasks

    tasks = await in_callback(begin)
    await asyncio.gather(*(task for task in tasks if task is not None))
    assert order == [0, 1, 2]


async def test_wait_for() -> None:
    """A wait with a limit, before and after the first suspension."""
    loop = asyncio.get_running_loop()

    async def waits() -> list[str]:
        results = []
        for _ in range(2):
            try:
                await asyncio.wait_for(loop.create_future(), 0.005)
            except TimeoutError:
                results.append("timed out")
            results.append(await asyncio.wait_for(asyncio.sleep(0, "in time"), 10))
        return results

    task, _ = await start(waits())
    assert task is not None
    assert await task == ["timed out", "in time"] * 2


async def test_a_timeout_after_the_first_suspension() -> None:
    """Entered by the task itself."""

    async def waits() -> str:
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(0.005):
                await asyncio.get_running_loop().create_future()
        except TimeoutError:
            return "timed out"
        return "not"

    task, _ = await start(waits())
    assert task is not None
    assert await task == "timed out"


async def test_a_timeout_of_nothing() -> None:
    """One that is over before it begins ends the first wait in it."""

    async def waits() -> str:
        try:
            async with asyncio.timeout(0):
                await asyncio.sleep(10)
        except TimeoutError:
            return "timed out"
        return "not"

    task, _ = await start(waits())
    assert task is not None
    assert await task == "timed out"
    assert task.cancelling() == 0


async def test_a_failing_child_ends_the_group() -> None:
    """A task group entered before the first suspension cancels the rest of its body."""
    seen: list[str] = []

    async def fails() -> None:
        raise KeyError("child")

    async def waits() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(fails())
                try:
                    await asyncio.get_running_loop().create_future()
                finally:
                    seen.append("body ended")
        except* KeyError:
            seen.append("caught")

    task, _ = await start(waits())
    assert task is not None
    await task
    assert seen == ["body ended", "caught"]


async def test_awaiting_a_task_that_fails() -> None:
    """Another task's error is raised where it is awaited, by its own object."""
    error = KeyError("x")

    async def fails() -> None:
        raise error

    async def waits() -> object:
        try:
            await asyncio.get_running_loop().create_task(fails())
        except KeyError as caught:
            return caught
        return None

    task, _ = await start(waits())
    assert task is not None
    assert await task is error


async def test_async_generators() -> None:
    """Their steps are steps of the coroutine."""

    async def numbers() -> AsyncIterator[int]:
        for n in range(3):
            yield n
            await asyncio.sleep(0)

    async def adds() -> int:
        return sum([n async for n in numbers()])

    task, _ = await start(adds())
    assert task is not None
    assert await task == 3


async def test_yields_that_mean_nothing() -> None:
    """What no loop understands is the coroutine's own error, also at its first step."""

    class Odd:
        def __await__(self) -> Iterator[int]:
            yield 42

    async def waits() -> str:
        try:
            await Odd()  # type: ignore[misc]
        except RuntimeError as error:
            return str(error)
        return "nothing"

    task, _ = await start(waits())
    assert task is not None
    assert "42" in await task


async def test_what_is_not_awaitable() -> None:
    """A handler that is no coroutine function fails like one that raises."""
    with pytest.raises(TypeError):
        await start(b"bytes")  # type: ignore[arg-type]


@types.coroutine
def old_style() -> Generator[Any, Any, int]:
    yield from asyncio.sleep(0).__await__()
    return 7


class Awaitable_:  # noqa: N801 - the name is taken
    def __await__(self) -> Generator[Any, Any, int]:
        yield from asyncio.sleep(0).__await__()
        return 7


@pytest.mark.parametrize("make", [old_style, Awaitable_])
async def test_awaitables_that_are_no_coroutines(make: Callable[[], Awaitable[int]]) -> None:
    """Generator-based coroutines, and objects with ``__await__``."""
    task, _ = await start(make())
    assert task is not None
    assert await task == 7
