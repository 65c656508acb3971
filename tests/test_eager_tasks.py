"""What is started eagerly is a task like any other: which one, in what context, cancelled."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
import weakref
from typing import Any

import pytest

from aiouffd import eager
from tests.callbacks import in_callback, start, start_catching

# --- the current task ------------------------------------------------------------------


async def test_the_current_task_stays_the_same() -> None:
    """Before and after the first suspension it is one object, and the one that is returned."""
    seen: list[asyncio.Task[object] | None] = []

    async def looks() -> None:
        seen.append(asyncio.current_task())
        await asyncio.sleep(0)
        seen.append(asyncio.current_task())

    task, _ = await start(looks())
    assert task is not None
    await task
    assert seen == [task, task]


async def test_nobody_is_current_afterwards() -> None:
    """The callback that started it is in no task, as before."""
    loop = asyncio.get_running_loop()

    async def at_once() -> None:
        pass

    async def waits() -> None:
        await asyncio.sleep(0)

    async def fails() -> None:
        raise KeyError("x")

    def begin() -> list[object]:
        seen: list[object] = [asyncio.current_task()]
        assert eager.start(loop, at_once())[0] is None
        seen.append(asyncio.current_task())
        task, _ = eager.start(loop, waits())
        assert task is not None
        tasks.append(task)
        seen.append(asyncio.current_task())
        with pytest.raises(KeyError):
            eager.start(loop, fails())
        return [*seen, asyncio.current_task()]

    tasks: list[asyncio.Task[None]] = []
    assert await in_callback(begin) == [None] * 4
    await tasks[0]


@pytest.mark.parametrize("suspends", [True, False])
async def test_started_within_a_task(suspends: bool) -> None:
    """It has a task of its own, and the outer one is current again afterwards."""
    loop, outer = asyncio.get_running_loop(), asyncio.current_task()
    inner: list[asyncio.Task[Any] | None] = []

    async def looks() -> None:
        inner.append(asyncio.current_task())
        if suspends:
            await asyncio.sleep(0)

    task, _ = eager.start(loop, looks())
    assert asyncio.current_task() is outer
    assert inner[0] is not outer
    assert (task is not None) == suspends
    if task is not None:
        assert inner == [task]
        await task


async def test_what_a_task_says_before_it_has_begun() -> None:
    """Its coroutine, its name, a text for logs: none of them crashes the interpreter."""
    said: list[object] = []

    async def asks() -> None:
        task = asyncio.current_task()
        assert task is not None
        for _ in range(2):
            said.append(task.get_name())
            assert not task.done()
            assert not task.cancelled()
            assert task.cancelling() == 0
            assert "Task" in repr(task)
            assert task.get_coro() is not None
            await asyncio.sleep(0)

    task, _ = await start(asks())
    assert task is not None
    await task
    assert all(isinstance(name, str) and name for name in said)


async def test_what_a_task_says_that_never_was_one() -> None:
    """Who keeps it after an answer at once may ask it as well, and print it."""
    kept: list[asyncio.Task[Any]] = []

    async def keeps() -> None:
        task = asyncio.current_task()
        assert task is not None
        kept.append(task)

    assert await start(keeps()) == (None, None)
    assert "Task" in repr(kept[0])
    if sys.version_info < (3, 12):  # asyncio's own crashes in 3.12.0 to 3.12.3
        assert kept[0].get_coro() is None
    assert kept[0].get_name()
    kept[0].cancel()


async def test_a_task_has_the_name_it_was_given() -> None:
    """As said to ``start``."""

    loop = asyncio.get_running_loop()

    async def waits() -> None:
        await asyncio.sleep(0)

    def begin() -> asyncio.Task[None] | None:
        task, _ = eager.start(loop, waits(), "fill")
        assert task in asyncio.all_tasks(loop)
        return task

    task = await in_callback(begin)
    assert task is not None
    assert task.get_name() == "fill"
    await task


async def test_scopes_entered_before_the_suspension_are_left_behind_it() -> None:
    """Who remembers the task that entered (locks with owners, cancel scopes) finds it again."""
    owner = weakref.WeakKeyDictionary[asyncio.Task[object], str]()

    async def enters() -> str:
        task = asyncio.current_task()
        assert task is not None
        owner[task] = "mine"
        await asyncio.sleep(0)
        same = asyncio.current_task()
        assert same is not None
        return owner[same]

    task, _ = await start(enters())
    assert task is not None
    assert await task == "mine"


# --- contexts --------------------------------------------------------------------------

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="unset")


async def test_each_coroutine_has_a_context_of_its_own() -> None:
    """What one sets neither the next sees nor who started it."""
    loop = asyncio.get_running_loop()

    async def sets() -> str:
        before = VARIABLE.get()
        VARIABLE.set("set")
        return before

    def begin() -> list[str | None]:
        seen = [eager.start(loop, sets())[1] for _ in range(2)]
        return [*seen, VARIABLE.get()]

    assert await in_callback(begin) == ["unset"] * 3


async def test_a_context_outlives_the_suspension() -> None:
    """A token from before the suspension is good behind it; the caller's values are there."""
    loop = asyncio.get_running_loop()

    async def sets_and_resets() -> tuple[str, str, str]:
        outer = VARIABLE.get()
        token = VARIABLE.set("inner")
        await asyncio.sleep(0)
        inner = VARIABLE.get()
        VARIABLE.reset(token)
        return outer, inner, VARIABLE.get()

    def begin() -> eager.Started[tuple[str, str, str]]:
        VARIABLE.set("caller")
        return eager.start(loop, sets_and_resets())

    task, _ = await in_callback(begin)
    assert task is not None
    assert await task == ("caller", "inner", "caller")


# --- cancelling ------------------------------------------------------------------------


async def test_cancelling_before_the_first_turn_cancels_what_is_waited_for() -> None:
    """As when a task is cancelled later: the inner work does not go on unseen."""
    loop = asyncio.get_running_loop()
    inner = loop.create_future()

    async def waits() -> None:
        await inner

    def begin() -> asyncio.Task[None] | None:
        task, _ = eager.start(loop, waits())
        assert task is not None
        task.cancel("why")
        return task

    task = await in_callback(begin)
    assert task is not None
    with pytest.raises(asyncio.CancelledError, match="why"):
        await task
    assert inner.cancelled()


@pytest.mark.parametrize("bare", [True, False])
async def test_cancelling_before_the_first_turn_when_nothing_is_left_to_cancel(bare: bool) -> None:
    """After a bare yield, or when the future is done meanwhile, the coroutine itself hears."""
    loop = asyncio.get_running_loop()
    inner: asyncio.Future[None] = loop.create_future()
    seen: list[str] = []

    async def waits() -> str:
        try:
            await (asyncio.sleep(0) if bare else inner)
        except asyncio.CancelledError:
            seen.append("heard")
        return "swallowed"

    def begin() -> asyncio.Task[str] | None:
        task, _ = eager.start(loop, waits())
        assert task is not None
        inner.set_result(None)
        task.cancel()
        return task

    task = await in_callback(begin)
    assert task is not None
    assert await task == "swallowed"
    assert seen == ["heard"]


async def test_cancelling_oneself_before_the_suspension() -> None:
    """It takes effect where the coroutine suspends, counted as often as it was asked."""
    counts: list[int] = []

    async def cancels() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel("one")
        task.cancel("two")
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            counts.append(task.cancelling())

    task, _ = await start(cancels())
    assert task is not None
    with pytest.raises(asyncio.CancelledError):
        await task
    assert counts == [2]


async def test_cancelling_oneself_without_a_suspension() -> None:
    """A task that was cancelled has no result, even if it never waited."""

    async def cancels() -> int:
        task = asyncio.current_task()
        assert task is not None
        task.cancel("why")
        return 7

    with pytest.raises(asyncio.CancelledError):
        await start_catching(cancels())


async def test_uncancel_before_the_suspension() -> None:
    """A cancellation that was taken back is not counted afterwards."""

    async def changes_its_mind() -> int:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        assert task.uncancel() == 0
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            pass  # before 3.13 it is thrown all the same
        return task.cancelling()

    task, _ = await start(changes_its_mind())
    assert task is not None
    assert await task == 0


async def test_cancelling_later() -> None:
    """After its first turn it is a task like any other."""
    loop = asyncio.get_running_loop()
    ended: list[str] = []

    async def waits() -> None:
        try:
            await asyncio.sleep(0)
            await loop.create_future()
        finally:
            ended.append("finally")

    task, _ = await start(waits())
    assert task is not None
    for _ in range(3):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["finally"]


async def test_a_cancellation_turned_into_an_error() -> None:
    """Whatever the coroutine makes of it is what its task ends with."""
    loop = asyncio.get_running_loop()

    async def converts() -> None:
        try:
            await loop.create_future()
        except asyncio.CancelledError as error:
            raise KeyError("converted") from error

    def begin() -> asyncio.Task[None] | None:
        task, _ = eager.start(loop, converts())
        assert task is not None
        task.cancel()
        return task

    task = await in_callback(begin)
    assert task is not None
    with pytest.raises(KeyError, match="converted"):
        await task


@pytest.mark.parametrize("turns", [1, 2])
def test_what_is_dropped_is_closed(turns: int) -> None:
    """A loop that ends before a task goes on: its coroutine is closed, ``finally`` blocks run."""
    closed: list[str] = []
    loop = asyncio.new_event_loop()

    async def waits() -> None:
        try:
            await loop.create_future()
        finally:
            closed.append("closed")

    def begin() -> None:
        task: Any = eager.start(loop, waits())[0]
        task._log_destroy_pending = False

    loop.call_soon(begin)
    for _ in range(turns):
        loop.call_soon(loop.stop)
        loop.run_forever()
    loop.close()
    gc.collect()
    assert closed == ["closed"]
