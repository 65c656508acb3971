"""Freezes that tasks, threads and loops share: cancelled, timed out, armed anew."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import threading
from typing import Any

import pytest

from aiouffd.testing import FreezeTimeout, Harness, HarnessError, freeze
from tests.targets import wait_until

PAGE = os.sysconf("SC_PAGE_SIZE")


async def test_a_task_waits_while_the_loop_runs(uffd: Harness, library: ctypes.CDLL) -> None:
    """Another task runs on while one waits for a thread; the thread goes when it is released."""
    region = uffd.region(1, contents=b"abc")
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with freeze(region.page(0)) as face:
        turning = asyncio.create_task(turn())
        waiting = asyncio.create_task(face.wait())
        while turns < 10:
            await asyncio.sleep(0)
        assert not waiting.done()
        running = uffd.start(library.load, region.pointer(1))
        frozen = await waiting
        assert (frozen.thread, frozen.touch.offset) == (running.tid, 1)
        assert [each.thread for each in face.frozen] == [running.tid]
        await frozen.release()
        assert await running.async_result() == ord("b")
        turning.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await turning


async def test_nobody_comes(uffd: Harness) -> None:
    """A wait's own time limit raises what a thread's does, and says who did what instead."""
    region = uffd.region(1, name="packet")
    async with freeze(region.page(0)) as face:
        with pytest.raises(FreezeTimeout, match=r"packet\[0\] within 0 s"):
            await face.wait(timeout=0)


async def test_who_stands_already_is_had_at_once(uffd: Harness, library: ctypes.CDLL) -> None:
    """A wait of no time at all gives a thread that stands."""
    region = uffd.region(1)
    async with freeze(region.page(0)) as face:
        running = uffd.start(library.load, region.pointer())
        wait_until(lambda: face.frozen, "the thread")
        frozen = await face.wait(timeout=0)
        assert frozen.thread == running.tid
        await frozen.release()
        await running.async_result()


@pytest.mark.parametrize("how", ["cancel", "timeout"])
async def test_a_wait_that_is_broken_off_loses_nobody(
    uffd: Harness, library: ctypes.CDLL, how: str
) -> None:
    """Who comes after, or while, a wait is cancelled or timed out is had by the next one."""
    region = uffd.region(1)
    async with freeze(region.page(0), every=True) as face:
        for _ in range(20):
            if how == "cancel":
                waiting = asyncio.create_task(face.wait())
                await asyncio.sleep(0)
                running = uffd.start(library.load, region.pointer())
                wait_until(lambda: face.frozen, "the thread")
                waiting.cancel()  # it has come, and the task has not run since
                with contextlib.suppress(asyncio.CancelledError):
                    await (await waiting).release()
            else:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.001):
                        await face.wait()
                running = uffd.start(library.load, region.pointer())
            if not running.done:
                frozen = await face.wait(timeout=5)
                assert frozen.thread == running.tid
                await frozen.release()
            await running.async_result()
        assert not face.frozen


async def test_two_tasks_wait_at_two_places(uffd: Harness, library: ctypes.CDLL) -> None:
    """Each task hears of its own thread, whichever comes first."""
    region = uffd.region(2)
    for order in ((0, 1), (1, 0)):
        async with freeze(region.page(0)) as first, freeze(region.page(1)) as second:
            waiting = [asyncio.create_task(face.wait()) for face in (first, second)]
            await asyncio.sleep(0)
            running: dict[int, Any] = {}
            for page in order:
                running[page] = uffd.start(library.load, region.pointer(page * PAGE))
                frozen = await waiting[page]
                assert frozen.thread == running[page].tid
            for page in order:
                await waiting[page].result().release()
                await running[page].async_result()


async def test_two_tasks_wait_at_one_place(uffd: Harness, library: ctypes.CDLL) -> None:
    """Two waits at one place get a thread each."""
    region = uffd.region(1)
    async with freeze(region.page(0), every=True) as face:
        waiting = [asyncio.create_task(face.wait()) for _ in range(2)]
        await asyncio.sleep(0)
        running = [uffd.start(library.load, region.pointer()) for _ in range(2)]
        frozen = [await each for each in waiting]
        assert {each.thread for each in frozen} == {each.tid for each in running}
        for each in reversed(frozen):
            await each.release()
        for one in running:
            await one.async_result()


async def test_an_exception_in_the_block_releases_all(uffd: Harness, library: ctypes.CDLL) -> None:
    """Whatever ends the block, nobody stands after it."""
    region = uffd.region(1, contents=b"abc")
    running: Any = None
    with pytest.raises(KeyError):
        async with freeze(region.page(0)) as face:
            running = uffd.start(library.load, region.pointer(2))
            await face.wait()
            raise KeyError
    assert await running.async_result() == ord("c")


async def test_a_cancelled_block_releases_all(uffd: Harness, library: ctypes.CDLL) -> None:
    """A task that is cancelled within the block lets everybody go."""
    region = uffd.region(1, contents=b"abc")
    stands = asyncio.Event()

    async def stop() -> None:
        async with freeze(region.page(0)) as face:
            await face.wait()
            stands.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(stop())
    await asyncio.sleep(0)
    running = uffd.start(library.load, region.pointer(2))
    await stands.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await running.async_result() == ord("c")


async def test_a_thread_releases_what_a_task_has_frozen(
    uffd: Harness, library: ctypes.CDLL
) -> None:
    """A release may come from another thread than the loop's."""
    region = uffd.region(1)
    async with freeze(region.page(0)) as face:
        running = uffd.start(library.load, region.pointer())
        frozen = await face.wait()
        await asyncio.to_thread(frozen.sync.release)
        await running.async_result()
        assert frozen.released


async def test_a_result_that_does_not_come(uffd: Harness, library: ctypes.CDLL) -> None:
    """A wait for a result ends at its limit, the call runs on, and the next wait has it."""
    region = uffd.region(1, contents=b"a")
    async with freeze(region.page(0)) as face:
        running = uffd.start(library.load, region.pointer())
        with pytest.raises(TimeoutError, match="runs on"):
            await running.async_result(timeout=0.01)
        frozen = await face.wait()
        await frozen.release()
    assert await running.async_result() == ord("a")
    assert await running.async_result() == ord("a")

    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await uffd.start(fail).async_result()


def test_a_loop_that_is_closed_under_its_tasks_harms_nobody(library: ctypes.CDLL) -> None:
    """A task that was never finished keeps nobody from hearing what happens."""
    with Harness(timeout=20, backend="trampoline") as uffd:
        region = uffd.region(1, contents=b"a")
        loop = asyncio.new_event_loop()
        with region.page(0).freeze() as inner:
            waiting = asyncio_wait(loop, region)
            running = uffd.start(library.load, region.pointer())
            inner.wait().release()
            assert running.result() == ord("a")  # let go by the porter
        assert not waiting.done()
        waiting._log_destroy_pending = False  # type: ignore[attr-defined]
        del waiting


def asyncio_wait(loop: asyncio.AbstractEventLoop, region: Any) -> asyncio.Task[Any]:
    """Begin to wait on a loop, and close that."""

    async def wait() -> None:
        async with freeze(region.at(PAGE - 1)) as face:
            await face.wait()

    task = loop.create_task(wait())
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    return task


def test_all_waits_hear_that_the_helper_has_ended(uffd: Harness) -> None:
    """Threads that wait at several places all hear of it at once."""
    region = uffd.region(2)
    heard: list[str] = []
    freezes = [region.page(n).freeze() for n in (0, 1, 1)]

    def wait(number: int) -> None:
        try:
            freezes[number].wait()
        except HarnessError as error:
            heard.append(str(error))

    with contextlib.suppress(HarnessError), contextlib.ExitStack() as stack:
        for each in freezes:
            stack.enter_context(each)
        threads = [threading.Thread(target=wait, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        os.kill(uffd.service_pid, signal.SIGKILL)
        for thread in threads:
            thread.join(10)
        assert len(heard) == 3
        assert all("has ended" in text for text in heard)


def test_threads_share_a_freeze(uffd: Harness, library: ctypes.CDLL) -> None:
    """Several threads wait at one freeze and release: each of those who come is had once."""
    region = uffd.region(3)
    had: list[int] = []
    with region.all.freeze(every=True) as shared:

        def serve() -> None:
            for _ in range(50):
                frozen = shared.wait()
                had.append(frozen.touch.number)
                frozen.release()

        serving = [uffd.start(serve) for _ in range(3)]
        # Each at its own page: one that is let through for one thread is there for all that run.
        running = [uffd.start(library.load_again, region.pointer(n * PAGE), 50) for n in range(3)]
        for each in (*serving, *running):
            each.result()
    assert len(set(had)) == len(had) == 150


def test_a_freeze_armed_anew_does_not_know_who_stood_before(
    uffd: Harness, library: ctypes.CDLL
) -> None:
    """However late the word of a stop comes, the next arming does not take it for its own."""
    region = uffd.region(1)
    again = region.page(0).freeze()
    for _ in range(200):
        before = uffd.touch_count()
        with again:
            running = uffd.start(library.load, region.pointer())
            wait_until(lambda before=before: uffd.touch_count() > before, "a touch")  # type: ignore[misc]
        known = uffd.touch_count()
        with again:
            uffd.settle()
            assert all(each.touch.number > known for each in again._came)
        running.result()
