"""Law 11: handlers start eagerly; one that suspends is a task that somebody owns."""

from __future__ import annotations

import asyncio

from aiouffd import Copy, PageFault, Resolution
from tests.serving import Record, from_image, image, serving
from tests.targets import until


async def test_a_handler_that_does_not_wait_costs_no_turn_of_the_loop() -> None:
    """It begins and ends within the callback that read its fault; no task is left or made."""
    order: list[str] = []

    class Ends(Record):
        def end(self, fault: PageFault, outcome: str, elapsed_ns: int) -> None:
            order.append("end")

    async def quick(fault: PageFault) -> Resolution:
        order.append("handler")
        asyncio.get_running_loop().call_soon(order.append, "next turn")
        return await from_image(fault)

    async with serving(quick, observers=[Ends()]) as served:
        assert await served.target.start_read(3) == 4
        await until(lambda: len(order) == 3, "the next turn")
        assert order == ["handler", "end", "next turn"]


async def test_a_handler_that_waits_is_a_whole_task() -> None:
    """current_task, timeouts, task groups and shields work, before and after the first wait."""
    tasks: list[asyncio.Task[object] | None] = []

    async def waits(fault: PageFault) -> Resolution:
        tasks.append(asyncio.current_task())
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            tasks.append(asyncio.current_task())
        async with asyncio.TaskGroup() as group:
            part = group.create_task(asyncio.sleep(0, image(fault.offset)))
        return Copy(await asyncio.wait_for(asyncio.shield(part), 1))

    async with serving(waits) as served:
        assert await served.target.start_read(3) == 4
        assert all(task is not None for task in tasks)


async def test_a_waiting_handler_is_awaited_at_the_end() -> None:
    """Closing cancels it and waits until its cleanup is through."""
    ended: list[str] = []

    async def with_cleanup(fault: PageFault) -> Resolution:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("began")
            await asyncio.sleep(0.01)
            ended.append("ended")
        raise AssertionError

    async with serving(with_cleanup) as served:
        touch = served.target.start_read(3)
        await served.target.blocked()
        await until(lambda: served.pager.in_flight, "the fault is read")
        await served.pager.aclose()
        assert ended == ["began", "ended"]
        await touch


async def test_a_cancelled_handler_may_clean_up_in_peace() -> None:
    """It is cancelled once: an await in its cleanup is not interrupted again."""
    requests: list[int] = []

    async def counts(fault: PageFault) -> Resolution:
        try:
            await asyncio.Event().wait()
        finally:
            task = asyncio.current_task()
            assert task is not None
            requests.append(task.cancelling())
        raise AssertionError

    async with serving(counts) as served:
        touch = served.target.start_read(3)
        await until(lambda: served.pager.in_flight, "the fault is read")
        await served.pager.aclose()
        assert requests == [1]
        await touch
