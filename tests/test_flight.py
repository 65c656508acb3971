"""A flight's small state, and the line on which a handler waits."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import threading
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from typing import Any

import pytest

from aiouffd import eager
from aiouffd.events import PageFault
from aiouffd.flight import Flight, Stage, _is_the_users, where_it_waits

FAULT = PageFault(0x7000, 0, 4096)

# --- Flight ----------------------------------------------------------------------------


def test_a_new_flight_is_asked_and_not_settled() -> None:
    """Nothing has failed, been warned about or been tried again."""
    flight = Flight(FAULT, None, 1.5, 7)
    assert (flight.fault, flight.region, flight.started, flight.started_ns) == (FAULT, None, 1.5, 7)
    assert flight.stage is Stage.ASKED
    assert not any((flight.final, flight.recovering, flight.warned, flight.tries))
    assert flight.task is None
    assert flight.resolution is None
    assert repr(flight) == "<Flight 0x7000 asked>"


async def test_cancelling_a_flight_lets_its_task_go() -> None:
    """Whoever owns the task awaits it; a second cancel finds nothing."""
    flight = Flight(FAULT, None, 0)
    flight.cancel()
    task = asyncio.get_running_loop().create_task(asyncio.sleep(10))
    flight.task = task
    flight.cancel()
    assert flight.task is None
    assert task.cancelling() == 1
    flight.cancel()
    assert task.cancelling() == 1
    await asyncio.wait([task])


# --- where it waits --------------------------------------------------------------------


async def sleeps() -> None:
    await asyncio.sleep(10)  # here: sleeps


async def asks_another() -> None:
    await sleeps()


async def waits_for_a_future() -> None:
    await asyncio.get_running_loop().create_future()  # here: waits_for_a_future


async def yields_bare() -> None:
    while True:
        await asyncio.sleep(0)  # here: yields_bare


async def uses_to_thread() -> None:
    event = threading.Event()
    try:
        await asyncio.to_thread(event.wait, 10)  # here: uses_to_thread
    finally:
        event.set()


async def has_a_limit() -> None:
    async with asyncio.timeout(10):
        await asyncio.sleep(20)  # here: has_a_limit


async def waits_for_a_group() -> None:
    async with asyncio.TaskGroup() as group:  # here: waits_for_a_group
        group.create_task(asyncio.sleep(10))


async def waits_for_a_lock() -> None:
    lock = asyncio.Lock()
    await lock.acquire()
    await lock.acquire()  # here: waits_for_a_lock


async def gathers() -> None:
    await asyncio.gather(asyncio.sleep(10), asyncio.sleep(20))  # here: gathers


async def numbers() -> AsyncIterator[int]:
    yield 1
    await asyncio.sleep(10)  # here: numbers


async def iterates() -> None:
    async for _ in numbers():
        pass


async def comprehends() -> list[int]:
    return [n async for n in numbers()]


async def asks_for_the_next() -> int | None:
    items = numbers()
    await anext(items)
    return await anext(items, None)


@contextlib.asynccontextmanager
async def opened() -> AsyncIterator[None]:
    await asyncio.sleep(10)  # here: opened
    yield


async def enters() -> None:
    async with opened():
        pass


class Custom:
    def __await__(self) -> Generator[Any, None, None]:
        return sleeps().__await__()


async def awaits_an_object() -> None:
    await Custom()


class Manual:
    def __await__(self) -> Generator[Any, None, None]:
        yield from asyncio.sleep(10).__await__()  # here: Manual.__await__


async def awaits_a_generator() -> None:
    await Manual()


@types.coroutine
def old_style() -> Generator[Any, None, None]:
    yield from asyncio.sleep(10).__await__()  # here: old_style


async def awaits_old_style() -> None:
    await old_style()


async def waits_behind_a_second_wait() -> None:
    await asyncio.sleep(0)
    await sleeps()


def line_of(function: str) -> int:
    """The number of the line that says ``here: <function>``."""
    with open(__file__, encoding="utf-8") as file:
        found = [n for n, line in enumerate(file, 1) if line.endswith(f"# here: {function}\n")]
    assert len(found) == 1
    return found[0]


WAITING: list[tuple[Callable[[], Awaitable[object]], str]] = [
    (sleeps, "sleeps"),
    (asks_another, "sleeps"),
    (waits_for_a_future, "waits_for_a_future"),
    (yields_bare, "yields_bare"),
    (uses_to_thread, "uses_to_thread"),
    (has_a_limit, "has_a_limit"),
    (waits_for_a_group, "waits_for_a_group"),
    (waits_for_a_lock, "waits_for_a_lock"),
    (gathers, "gathers"),
    (iterates, "numbers"),
    (comprehends, "numbers"),
    (asks_for_the_next, "numbers"),
    (enters, "opened"),
    (awaits_an_object, "sleeps"),
    (awaits_a_generator, "Manual.__await__"),
    (awaits_old_style, "old_style"),
    (waits_behind_a_second_wait, "sleeps"),
    (Custom, "sleeps"),
    (old_style, "old_style"),
]


async def settle(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def started_eagerly(awaitable: Awaitable[object]) -> asyncio.Task[Any]:
    loop = asyncio.get_running_loop()
    begun: asyncio.Future[asyncio.Task[Any] | None] = loop.create_future()
    loop.call_soon(lambda: begun.set_result(eager.start(loop, awaitable)[0]))
    task = await begun
    assert task is not None
    return task


@pytest.mark.parametrize("turns", [0, 3])
@pytest.mark.parametrize("make, function", WAITING)
async def test_it_names_the_users_innermost_line(
    make: Callable[[], Awaitable[object]], function: str, turns: int
) -> None:
    """Not asyncio's below it nor ours above it, before its task's first turn and later."""
    task = await started_eagerly(make())
    try:
        for _ in range(turns):
            await asyncio.sleep(0)
        if turns or make is not waits_behind_a_second_wait:
            expected = f"{__file__}:{line_of(function)} in {function}"
            assert where_it_waits(task) == expected
    finally:
        await settle(task)


async def test_tasks_that_were_not_started_eagerly() -> None:
    """As the failure policy makes them; before its first turn it waits nowhere."""
    coro: Coroutine[Any, Any, None] = asks_another()
    task = asyncio.get_running_loop().create_task(coro)
    assert re.fullmatch(r".*test_flight\.py:\d+ in asks_another", where_it_waits(task))
    await asyncio.sleep(0)
    assert where_it_waits(task) == f"{__file__}:{line_of('sleeps')} in sleeps"
    await settle(task)


async def test_deep_recursion() -> None:
    """The line is found at any depth that a program reaches."""

    async def goes_deeper(depth: int) -> None:
        if depth:
            await goes_deeper(depth - 1)
        await sleeps()

    task = await started_eagerly(goes_deeper(300))
    assert where_it_waits(task) == f"{__file__}:{line_of('sleeps')} in sleeps"
    await settle(task)


async def test_nobody_waits_in_what_has_ended() -> None:
    """A finished task has no line."""
    task = asyncio.get_running_loop().create_task(asyncio.sleep(0))
    await task
    assert where_it_waits(task) == "nowhere: it has ended"


async def test_awaitables_without_python_code() -> None:
    """What is compiled has no line to name."""

    class Compiled(Coroutine[Any, Any, None]):
        def send(self, value: None, /) -> Any:
            return future.__await__().send(value)

        def throw(self, *error: Any) -> Any:
            raise error[0]

        def close(self) -> None:
            raise NotImplementedError

        def __await__(self) -> Generator[Any, None, None]:
            raise NotImplementedError

    future = asyncio.get_running_loop().create_future()
    task = asyncio.get_running_loop().create_task(Compiled())
    await asyncio.sleep(0)
    assert where_it_waits(task) == "no line of Python"
    await settle(task)


def test_packages_are_the_users() -> None:
    """Python's own library is not, though packages lie within its folder."""
    assert not _is_the_users(asyncio.__file__)
    assert not _is_the_users(contextlib.__file__)
    assert not _is_the_users(str(eager.__file__))
    assert _is_the_users(os.path.join(os.path.dirname(os.__file__), "site-packages", "x", "y.py"))
    assert _is_the_users(__file__)
    assert _is_the_users("<stdin>")
