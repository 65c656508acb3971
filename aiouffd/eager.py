"""Start a coroutine now, and make it a task only if it suspends.

Knows: coroutines, tasks and the loop's notion of the current task.
Must not know: faults.

A handler that answers without waiting should cost no task (2 to 3 us with its turn of the
loop).  From Python 3.12 on asyncio can start a task eagerly by itself.  On 3.11 the coroutine
is driven here up to its first suspension, and then handed to a task that goes on with it.

Until then there is no task on 3.11, yet ``asyncio.timeout``, ``TaskGroup`` and ``wait_for``
want one: so a stand-in is made the current task, which passes every request on to the task
that follows, once there is one.
"""

from __future__ import annotations

import asyncio
import sys
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Final, TypeVar

T = TypeVar("T")

#: What ``start`` returns: the task if the coroutine suspended, else None and its result.
Started = tuple["asyncio.Task[T] | None", "T | None"]


class _Current:
    """Stands in for the task of a coroutine that is being driven before it has one.

    Sharing: the loop's thread.
    """

    __slots__ = ("__weakref__", "_cancels", "_coro", "task")

    def __init__(self, coro: Coroutine[Any, Any, Any]) -> None:
        self.task: asyncio.Task[Any] | None = None
        self._coro = coro
        self._cancels: list[Any] = []

    def cancel(self, msg: object = None) -> bool:
        """Ask for cancellation: thrown in at the first suspension, or later by the task."""
        if self.task is not None:
            return self.task.cancel(msg)
        self._cancels.append(msg)
        return True

    def cancelling(self) -> int:
        """Count the requests for cancellation that stand."""
        return self.task.cancelling() if self.task is not None else len(self._cancels)

    def uncancel(self) -> int:
        """Take one request back."""
        if self.task is not None:
            return self.task.uncancel()
        if self._cancels:
            self._cancels.pop()
        return len(self._cancels)

    def become(self, task: asyncio.Task[Any]) -> None:
        """Pass on to the task what was asked of its stand-in, from here on directly."""
        self.task = task
        for msg in self._cancels:
            task.cancel(msg)
        self._cancels.clear()

    def get_coro(self) -> Coroutine[Any, Any, Any]:
        """Give the coroutine."""
        return self._coro

    def __getattr__(self, name: str) -> Any:
        if self.task is None:
            raise AttributeError(
                f"{name!r}: this handler has no task before its first suspension (Python 3.11)"
            )
        return getattr(self.task, name)


@types.coroutine
def _resume(coro: Coroutine[Any, Any, T], yielded: Any) -> Generator[Any, Any, T]:
    """Go on with a half-driven coroutine: yield what it yielded first, then follow it."""
    while True:
        step: Callable[[], Any]
        try:
            sent = yield yielded
        except GeneratorExit:
            coro.close()
            raise
        except BaseException as error:
            thrown = error

            def step(thrown: BaseException = thrown) -> Any:
                return coro.throw(thrown)
        else:

            def step(sent: Any = sent) -> Any:
                return coro.send(sent)

        try:
            yielded = step()
        except StopIteration as stop:
            result: T = stop.value
            return result


async def _continue(coro: Coroutine[Any, Any, T], yielded: Any) -> T:
    return await _resume(coro, yielded)


async def _await(awaitable: Awaitable[T]) -> T:
    return await awaitable


def _start_by_hand(
    loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, T], name: str | None
) -> Started[T]:
    current = _Current(coro)
    enter, leave = asyncio.tasks._enter_task, asyncio.tasks._leave_task  # documented hooks
    enter(loop, current)  # type: ignore[arg-type]
    try:
        yielded = coro.send(None)
    except StopIteration as stop:
        return None, stop.value
    finally:
        leave(loop, current)  # type: ignore[arg-type]
    task = loop.create_task(_continue(coro, yielded), name=name)
    current.become(task)
    return task, None


def _start_eager_task(
    loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, T], name: str | None
) -> Started[T]:
    make: Any = asyncio.Task  # eager_start is unknown to 3.11's stubs
    task: asyncio.Task[T] = make(coro, loop=loop, name=name, eager_start=True)
    if task.done():
        return None, task.result()
    return task, None


_start: Final = _start_eager_task if sys.version_info >= (3, 12) else _start_by_hand


def start(
    loop: asyncio.AbstractEventLoop, awaitable: Awaitable[T], name: str | None = None
) -> Started[T]:
    """Run an awaitable up to its first suspension.

    Call it from a callback of the running loop, not from within a task.

    Args:
        loop: The running loop.
        awaitable: Usually a coroutine, not yet started.
        name: Of the task, if one has to be made.

    Returns:
        (None, result) if it finished at once; else (task, None), and the caller owns the
        task.

    Raises:
        Whatever the coroutine raised before it suspended.
    """
    if type(awaitable) is types.CoroutineType or isinstance(awaitable, Coroutine):
        return _start(loop, awaitable, name)
    return _start(loop, _await(awaitable), name)
