"""Law 2: once per page."""

from __future__ import annotations

from aiouffd import PageFault, Resolution
from tests.serving import Gate, from_image, serving
from tests.targets import until, wait_until


async def test_later_faults_on_a_page_join_the_one_in_flight() -> None:
    """Four threads on one page cost one handler, and all four go on when it answers."""
    gate = Gate()
    async with serving(gate) as served:
        target, counters = served.target, served.pager.counters
        touches = [target.start_read(7, thread=thread) for thread in range(4)]
        await until(lambda: counters.faults == 4, "four messages are read")
        assert len(gate.faults) == served.pager.in_flight == 1
        assert counters.joined == 3
        gate.let_go()
        assert [await touch for touch in touches] == [8] * 4
        assert len(gate.faults) == 1


async def test_duplicates_in_one_batch_ask_once() -> None:
    """A handler that answers at once is not asked again for messages read before its answer."""
    asked: list[PageFault] = []

    async def count(fault: PageFault) -> Resolution:
        asked.append(fault)
        return await from_image(fault)

    async with serving(count) as served:
        target = served.target
        touches = [target.start_read(7, thread=thread) for thread in range(4)]
        for thread in range(4):
            wait_until(lambda: target.is_blocked(thread), "it blocks")  # noqa: B023
        assert [await touch for touch in touches] == [8] * 4
        assert len(asked) == 1
        assert served.pager.counters.joined == 3


async def test_huge_pages_are_one_page_each(huge_pages: object) -> None:
    """Faults in different places of one huge page join."""
    huge_pages(4)  # type: ignore[operator]
    gate = Gate()
    async with serving(gate, "hugetlb", 2) as served:
        target, counters = served.target, served.pager.counters
        places = [target.at(1) + step * 4096 for step in (0, 1, 100, 511)]
        touches = [target.start_peek(place, thread) for thread, place in enumerate(places)]
        await until(lambda: counters.faults == 4, "four messages are read")
        assert len(gate.faults) == 1
        gate.let_go()
        assert [await touch for touch in touches] == [2] * 4
