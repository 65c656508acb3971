"""Calling things as a callback of the loop does, where no task is current."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

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


async def start_catching(awaitable: Awaitable[T]) -> T | None:
    """Start, and let an error come out here as the very object that was raised."""
    loop = asyncio.get_running_loop()
    caught: list[BaseException] = []

    def begin() -> T | None:
        try:
            return eager.start(loop, awaitable)[1]
        except BaseException as error:
            caught.append(error)
            return None

    result = await in_callback(begin)
    if caught:
        raise caught[0]
    return result
