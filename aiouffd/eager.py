"""Start a coroutine now, and make it a task only if it suspends.

Knows: coroutines, tasks and the loop's notion of the current task.
Must not know: faults.

A handler that answers without waiting should cost no task (2 to 3 us with its turn of the
loop).  From Python 3.12 on asyncio can start a task eagerly by itself.  On 3.11 the coroutine
is driven here up to its first suspension, and then handed to a task that goes on with it.

Until then there is no task on 3.11, yet ``asyncio.timeout``, ``TaskGroup`` and ``wait_for``
want one, and some remember which it was.  So the task object is made first, as the current
task, and initialised (which is what costs) only when it is needed.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import partial
from typing import Any, Final, TypeVar

T = TypeVar("T")

#: What ``start`` returns: the task if the coroutine suspended, else None and its result.
Started = tuple["asyncio.Task[T] | None", "T | None"]


async def _await(awaitable: Awaitable[T]) -> T:
    return await awaitable


# --- Python 3.11 -----------------------------------------------------------------------


class _LateTask(asyncio.Task[Any]):
    """A task that exists from the start, and is initialised once its coroutine suspends.

    Before that ``cancel``, ``cancelling`` and ``uncancel`` work as ever; what needs a loop or
    a result raises RuntimeError, and what would crash the interpreter is answered here.
    """

    __slots__ = ("early",)

    early: Coroutine[Any, Any, Any] | None  #: the coroutine, as long as there is no task

    def get_coro(self) -> Any:
        """Give the coroutine; None if it ended without ever making this a task."""
        if self._coro is None:  # type: ignore[attr-defined]
            return self.early
        return super().get_coro()

    def get_name(self) -> str:
        """Give the name; there may be none yet."""
        return super().get_name() or "starting"

    def __repr__(self) -> str:
        if self._coro is None:  # type: ignore[attr-defined]
            return f"<Task starting {self.early!r}>"
        return super().__repr__()


@types.coroutine
def _rest_of(
    coro: Coroutine[Any, Any, T], yielded: Any, receive: Callable[[T], None] | None
) -> Generator[Any, Any, T]:
    """Be the rest of a coroutine that was driven up to its first suspension.

    The first yield belongs to who makes this: what is thrown into a generator that has not
    begun never gets inside.
    """
    thrown: BaseException | None = None
    result: T
    try:
        try:
            yield
        except asyncio.CancelledError as error:
            # A task that is cancelled cancels what it waits for.
            if not (asyncio.isfuture(yielded) and yielded.cancel(*error.args)):
                thrown = error
        else:
            if getattr(yielded, "_asyncio_future_blocking", False) and yielded.done():
                yielded._asyncio_future_blocking = False
                yielded = None
            if yielded is None:  # a bare yield: to be called again, which is now
                result = yield from coro.__await__()
                if receive is not None:
                    receive(result)
                return result
        while True:
            if thrown is None:
                try:
                    yield yielded
                except GeneratorExit:
                    raise
                except BaseException as error:
                    thrown = error
                else:
                    yielded = None
                    result = yield from coro.__await__()
                    if receive is not None:
                        receive(result)
                    return result
            # Whatever is raised has this frame in its traceback: hold nothing that holds it.
            yielded = None
            try:
                yielded = coro.throw(thrown)
            except StopIteration as stop:
                result = stop.value
                return result
            finally:
                thrown = None
    except GeneratorExit:
        coro.close()
        raise


_new_task: Final[Callable[[type[_LateTask]], _LateTask]] = _LateTask.__new__
_enter: Final = asyncio.tasks._enter_task  # documented hooks
_leave: Final = asyncio.tasks._leave_task


def _start_by_hand(
    loop: asyncio.AbstractEventLoop,
    coro: Coroutine[Any, Any, T],
    receive: Callable[[asyncio.Task[T], T], None] | None,
    name: str | None,
) -> Started[T]:
    task = _new_task(_LateTask)
    task.early = coro
    context = contextvars.copy_context()
    outer = asyncio.current_task(loop)
    if outer is not None:
        _leave(loop, outer)
    _enter(loop, task)
    try:
        yielded = context.run(coro.send, None)
    except StopIteration as stop:
        if task._must_cancel:  # type: ignore[attr-defined]
            raise asyncio.CancelledError(*_message_of(task)) from None
        return None, stop.value
    finally:
        _leave(loop, task)
        if outer is not None:
            _enter(loop, outer)
        task.early = None
    cancels, message = task.cancelling(), _message_of(task)
    rest: Any = _rest_of(coro, yielded, None if receive is None else partial(receive, task))
    rest.send(None)
    make: Any = task.__init__  # type: ignore[misc]  # of this very class
    make(rest, loop=loop, name=name, context=context)
    for _ in range(cancels):
        task.cancel(*message)
    return task, None


def _message_of(task: asyncio.Task[Any]) -> tuple[Any, ...]:
    message: Any = task._cancel_message  # type: ignore[attr-defined]
    return () if message is None else (message,)


# --- Python 3.12 and newer -------------------------------------------------------------


async def _telling(
    coro: Coroutine[Any, Any, T],
    receive: Callable[[asyncio.Task[T], T], None],
    suspended: list[asyncio.Task[T]],
) -> T:
    result = await coro
    if suspended:
        receive(suspended.pop(), result)
    return result


def _start_eager_task(
    loop: asyncio.AbstractEventLoop,
    coro: Coroutine[Any, Any, T],
    receive: Callable[[asyncio.Task[T], T], None] | None,
    name: str | None,
) -> Started[T]:
    suspended: list[asyncio.Task[T]] = []
    if receive is not None:
        coro = _telling(coro, receive, suspended)
    # eager_start is unknown to 3.11's stubs
    task: asyncio.Task[T] = _Task(coro, loop=loop, name=name, eager_start=True)
    if not task.done():
        suspended.append(task)
        return task, None
    try:
        return None, task.result()
    finally:
        del task  # an error's traceback holds this frame, and the task holds the error


_Task: Final[Any] = asyncio.Task
_start: Final = _start_eager_task if sys.version_info >= (3, 12) else _start_by_hand


def start(
    loop: asyncio.AbstractEventLoop,
    awaitable: Awaitable[T],
    name: str | None = None,
    *,
    receive: Callable[[asyncio.Task[T], T], None] | None = None,
) -> Started[T]:
    """Run an awaitable up to its first suspension.

    Within another task that one is the current task again afterwards.

    Args:
        loop: The running loop.
        awaitable: Usually a coroutine, not yet started.
        receive: Told the task and its result in the task's last step: a done callback comes a
            turn of the loop later.  Not told of failures, nor always after one was caught at
            the first suspension; must not raise.
        name: Of the task, if one has to be made.

    Returns:
        (None, result) if it finished at once; else (task, None), and the caller owns the
        task.

    Raises:
        Whatever the coroutine raised before it suspended.
    """
    if type(awaitable) is types.CoroutineType or isinstance(awaitable, Coroutine):
        return _start(loop, awaitable, receive, name)
    return _start(loop, _await(awaitable), receive, name)
