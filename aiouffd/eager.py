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
from sys import getrefcount
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

#: What ``start`` returns: the task if the coroutine suspended, else None and its result.
Started = tuple["asyncio.Task[T] | None", "T | None"]


class _Current:
    """Stands in for the task of a coroutine that is being driven before it has one.

    Sharing: the loop's thread.
    """

    __slots__ = ("__weakref__", "_cancels", "coro", "task")

    def __init__(self) -> None:
        self.task: asyncio.Task[Any] | None = None
        self.coro: Coroutine[Any, Any, Any] | None = None
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

    def get_coro(self) -> Coroutine[Any, Any, Any] | None:
        """Give the coroutine."""
        return self.coro

    def __getattr__(self, name: str) -> Any:
        if self.task is None:
            raise AttributeError(
                f"{name!r}: this handler has no task before its first suspension (Python 3.11)"
            )
        return getattr(self.task, name)


class _Rest(Generic[T]):
    """What is left of a coroutine that was driven up to its first suspension.

    A task sees the coroutine's own methods: what is thrown in reaches it even before this
    has yielded for the first time, and after that nothing stands between the two.
    """

    __slots__ = ("_yielded", "close", "coro", "send", "throw")

    def __init__(self, coro: Coroutine[Any, Any, T], yielded: Any) -> None:
        self.coro = coro
        self._yielded = yielded
        self.send: Callable[[Any], Any] = self._first
        self.throw: Callable[..., Any] = self._thrown
        self.close = coro.close

    def _first(self, value: Any) -> Any:
        """Yield what the coroutine yielded, unless its turn has come meanwhile."""
        yielded, self._yielded = self._yielded, None
        self.send, self.throw = self.coro.send, self.coro.throw
        if yielded is None:  # a bare yield: to be called again, which is now
            return self.coro.send(value)
        if getattr(yielded, "_asyncio_future_blocking", False) and yielded.done():
            yielded._asyncio_future_blocking = False
            return self.coro.send(value)
        return yielded

    def _thrown(self, *error: Any) -> Any:
        """Be cancelled before the first turn: the coroutine hears of it all the same."""
        self.send, self.throw = self.coro.send, self.coro.throw
        return self.coro.throw(*error)

    def __await__(self) -> Generator[Any, Any, T]:
        raise TypeError("this belongs to its task")

    @property
    def cr_frame(self) -> types.FrameType | None:
        """The coroutine's, for those who look where a task waits."""
        frame: types.FrameType | None = getattr(self.coro, "cr_frame", None)
        return frame

    @property
    def cr_await(self) -> Any:
        """The coroutine's."""
        return getattr(self.coro, "cr_await", None)

    @property
    def cr_code(self) -> Any:
        """The coroutine's."""
        return getattr(self.coro, "cr_code", None)

    @property
    def cr_running(self) -> bool:
        """The coroutine's."""
        return bool(getattr(self.coro, "cr_running", False))


Coroutine.register(_Rest)  # tasks ask for one


async def _await(awaitable: Awaitable[T]) -> T:
    return await awaitable


_enter: Final = asyncio.tasks._enter_task  # documented hooks
_leave: Final = asyncio.tasks._leave_task
_spares: Final[list[_Current]] = []  # stand-ins that nobody kept a reference to
_UNSHARED: Final = 2  # references to such a one while it is asked: a local and the argument


def _start_by_hand(
    loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, T], name: str | None
) -> Started[T]:
    try:
        current = _spares.pop()
    except IndexError:
        current = _Current()
    current.coro = coro
    _enter(loop, current)  # type: ignore[arg-type]
    try:
        yielded = coro.send(None)
    except StopIteration as stop:
        return None, stop.value
    else:
        rest: Any = _Rest(coro, yielded)
        task: asyncio.Task[T] = loop.create_task(rest, name=name)
        current.become(task)
        return task, None
    finally:
        _leave(loop, current)  # type: ignore[arg-type]
        current.coro = None
        if getrefcount(current) == _UNSHARED and not current.task and not current._cancels:
            _spares.append(current)


def _start_eager_task(
    loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, T], name: str | None
) -> Started[T]:
    # eager_start is unknown to 3.11's stubs
    task: asyncio.Task[T] = _Task(coro, loop=loop, name=name, eager_start=True)
    return (None, task.result()) if task.done() else (task, None)


_Task: Final[Any] = asyncio.Task
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
