"""Coroutines that start at once and become a task only if they suspend."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import sys
import threading
import types
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from typing import Any, TypeVar

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


# --- what asyncio offers ---------------------------------------------------------------


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


# --- nothing is left -------------------------------------------------------------------


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

TELLS = sys.version_info < (3, 12)


@pytest.mark.parametrize("waits", ["bare", "future", "done", "twice"])
async def test_a_result_is_told_in_the_last_step(waits: str) -> None:
    """Where asyncio lets us: once, with the task, before the task is done."""
    loop = asyncio.get_running_loop()
    told: list[tuple[object, int, bool]] = []

    async def answers() -> int:
        if waits == "bare":
            await asyncio.sleep(0)
            return 7
        future = loop.create_future()
        loop.call_soon(future.set_result, None)
        await future
        if waits == "twice":
            await asyncio.sleep(0.001)
        return 7

    def begin() -> asyncio.Task[int] | None:
        if waits == "done":
            # The future's turn comes before the task's first one.
            loop.call_soon(lambda: None)
        return eager.start(
            loop, answers(), receive=lambda task, result: told.append((task, result, task.done()))
        )[0]

    task = await in_callback(begin)
    assert task is not None
    assert await task == 7
    assert told == ([(task, 7, False)] if TELLS else [])


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
