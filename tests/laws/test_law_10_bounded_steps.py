"""Law 10: the loop is never held longer than one bounded ioctl, and demand goes first."""

from __future__ import annotations

import asyncio
import os
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from aiouffd import Copy, PageFault, Resolution, performer
from aiouffd.filled_pages import FilledPages
from tests.serving import Record, image, serving
from tests.targets import PAGE, Target, until, wait_until

_PAGES = 4096  # 16 MiB


async def test_a_large_fill_lets_the_loop_run_in_between() -> None:
    """At least one turn of the loop for every 2 MiB."""
    async with serving(pages=_PAGES) as served:
        data = image(0, served.target.length)
        fill = asyncio.create_task(served.region.fill(0, data))
        turns = 0
        while not fill.done():
            turns += 1
            await asyncio.sleep(0)
        assert await fill == len(data)
        assert turns >= len(data) >> 21


async def test_a_fault_is_served_before_a_fill_is_done() -> None:
    """Demand goes before what nobody waits for yet."""
    filled: list[int] = []

    async def note(fault: PageFault) -> Resolution:
        filled.append(served.pager.counters.filled_bytes)
        return Copy(image(fault.offset))

    async with serving(note, pages=_PAGES) as served:
        target = served.target
        data = image(0, target.length)
        fill = asyncio.create_task(served.region.fill(0, data))
        await until(lambda: served.pager.counters.filled_bytes, "the fill has begun")
        touch = target.start_read(_PAGES - 1)
        wait_until(lambda: target.is_blocked() or touch.done, "the read blocks")
        while not filled:
            await asyncio.sleep(0)
        assert filled[0] < len(data) - PAGE
        assert not fill.done()
        assert await fill == len(data) - PAGE
        assert await touch == _PAGES & 255


async def test_a_fault_waits_for_one_piece_of_a_fill() -> None:
    """It is served before the next piece, though the loop would let the fill go on first."""
    faults: list[int] = []  # that were served before each piece had ended

    async with serving(pages=_PAGES) as served:
        target, counters, region = served.target, served.pager.counters, served.region

        class Touching(FilledPages):
            def add_range(self, offset: int, length: int) -> None:
                super().add_range(offset, length)
                faults.append(counters.faults)
                if len(faults) == 3:
                    touches.append(target.start_read(_PAGES - 1))
                    wait_until(target.is_blocked, "a thread faults during the piece")

        touches: list[Any] = []
        bits = bytearray(FilledPages.bytes_for(region.length, PAGE))
        region.filled = Touching(bits, 0, 0, region.length, PAGE)
        await region.fill(0, image(0, target.length))
        assert faults[:4] == [0, 0, 0, 1]
        assert await touches[0] == _PAGES & 255


async def test_a_busy_target_does_not_hold_up_another() -> None:
    """Each is served once before one is served again, how soon ever it asks."""
    ended: list[str] = []

    class Ends(Record):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            self.target: Target | None = None

        def end(self, fault: PageFault, outcome: str, elapsed_ns: int) -> None:
            ended.append(self.name)
            target = self.target
            if target is not None and fault.offset + PAGE < target.length:  # it reads on
                wait_until(lambda: target.is_blocked() and pending(target), "it faults again")

    def pending(target: Target) -> bool:
        return served[target].uffd.info().pending > 0

    busy, other = Ends("busy"), Ends("other")
    async with (
        serving(pages=16, observers=[busy]) as one,
        serving(pages=16, observers=[other]) as two,
    ):
        served = {one.target: one, two.target: two}
        busy.target = one.target
        sweep, touch = one.target.start_sweep(), two.target.start_read(3)
        wait_until(one.target.is_blocked, "both fault")
        wait_until(two.target.is_blocked, "both fault")
        assert await touch == 4
        assert "other" in ended[:2]
        assert await sweep == [page + 1 for page in range(16)]


async def test_a_long_answer_serves_its_page_first() -> None:
    """The thread goes on before the rest of 16 MiB is there, and the loop runs meanwhile."""
    turns = 0
    at_end: list[tuple[int, int]] = []

    class Ends(Record):
        def end(self, fault: PageFault, outcome: str, elapsed_ns: int) -> None:
            at_end.append((served.pager.counters.filled_bytes, turns))

    async def everything(fault: PageFault) -> Resolution:
        return Copy(image(0, _PAGES * PAGE), address=fault.address - fault.offset)

    async with serving(everything, pages=_PAGES, observers=[Ends()]) as served:
        target, counters = served.target, served.pager.counters
        touch = target.start_read(_PAGES // 2)
        while counters.filled_bytes < target.length - PAGE:
            turns += 1
            await asyncio.sleep(0)
        ((filled, before),) = at_end
        assert filled == 0
        assert turns - before >= target.length >> 21
        assert await touch == (_PAGES // 2 + 1) & 255
        assert await target.start_sweep() == [page + 1 for page in range(_PAGES)]
        assert counters.faults == 1


async def test_closing_yields_between_pieces() -> None:
    """Poisoning a large range lets the loop run too."""
    async with serving(pages=16 * _PAGES) as served:
        close = asyncio.create_task(served.pager.aclose())
        turns = 0
        while not close.done():
            turns += 1
            await asyncio.sleep(0)
        await close
        assert turns >= 16 * _PAGES * PAGE >> 23


def test_the_pieces_are_bounded() -> None:
    """No ioctl of the pager is given more than 2 MiB."""
    assert 256 << 10 <= performer.PIECE_BYTES <= 2 << 20


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """Let this process and its children share one CPU, so that they take turns alike."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("one_cpu")
async def test_who_reads_on_in_order_does_not_overtake_a_long_answer() -> None:
    """The rest of an answer is at hand for the pages it holds: their bytes are read once."""
    chunk, asked = 1 << 20, 0

    async def neighbours(fault: PageFault) -> Resolution:
        nonlocal asked
        asked += 1
        first = fault.offset & -chunk
        return Copy(image(first, chunk), address=fault.address - fault.offset + first)

    async with serving(neighbours, pages=_PAGES) as served:
        target = served.target
        crc = await target.start_crc32(target.base, target.length)
        assert crc == zlib.crc32(image(0, target.length))
        # Sixteen; a message that was read late may ask again, but not for every page.
        assert asked <= 20
