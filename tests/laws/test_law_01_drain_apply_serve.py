"""Law 1: drain, apply, then serve."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal

from aiouffd import PageFault, Remapped, Removed, Resolution
from tests.serving import LAYOUT, MADV_DONTNEED, Gate, Record, from_image, serving, within
from tests.targets import MREMAP_FIXED, MREMAP_MAYMOVE, PAGE, until, wait_until


async def test_a_removal_behind_a_fault_is_applied_before_the_fault_is_served() -> None:
    """The kernel delivers the fault first; its handler is never asked, the page is zero."""
    record = Record()
    async with serving(features=LAYOUT, observers=[record]) as served:
        target = served.target
        removal = target.start_madvise(MADV_DONTNEED, page=3, thread=0)
        wait_until(lambda: target.state(0) == "D", "the removal waits for its event to be read")
        touch = target.start_read(3, thread=1)
        wait_until(lambda: target.is_blocked(1), "the read blocks")
        # Nothing has been read: this loop has not run since.
        assert served.uffd.info()[:2] == (1, 1)
        assert await touch == 0
        assert await removal == 0
        assert [entry[0] for entry in record.log] == ["event", "begin", "end"]
        assert record.outcomes == ["zero"]
        assert served.pager.counters.removed == 1


async def test_a_move_behind_a_fault_is_applied_before_the_fault_is_served() -> None:
    """A fault at the new address, read before the move, is served once and from its offset."""
    record = Record()
    async with serving(features=LAYOUT, observers=[record]) as served:
        target = served.target
        to = target.reserve(8 * PAGE)
        move = target.start_mremap(8, 8, flags=MREMAP_MAYMOVE | MREMAP_FIXED, to=to)
        wait_until(lambda: target.state(0) == "D", "the move waits for its event to be read")
        touch = target.start_peek(to + 2 * PAGE, thread=1)
        wait_until(lambda: target.is_blocked(1), "the read blocks")
        assert await touch == 11
        assert await move == to
        assert record.events[0] == Remapped(target.at(8), to, 8 * PAGE)
        assert record.offsets == [10 * PAGE]
        assert record.outcomes == ["copy"]


async def test_one_wake_up_reads_all_that_is_pending() -> None:
    """Faults and events of many threads are all taken in one turn of the loop."""
    gate = Gate()
    record = Record()
    async with serving(gate, features=LAYOUT, threads=33, observers=[record]) as served:
        target = served.target
        touches = [target.start_read(page, thread=page) for page in range(32)]
        removal = target.start_madvise(MADV_DONTNEED, page=40, thread=32)
        for page in range(32):
            wait_until(lambda: target.is_blocked(page), "the read blocks")  # noqa: B023
        wait_until(lambda: target.state(32) == "D", "the removal waits for its event to be read")
        assert served.uffd.info().pending == 32
        turns = 0
        while not gate.faults:
            await asyncio.sleep(0)
            turns += 1
            assert turns < 1000
        assert len(gate.faults) == 32
        assert isinstance(record.log[0][1], Removed)
        assert served.uffd.info().pending == 0
        gate.let_go()
        assert [await touch for touch in touches] == list(range(1, 33))
        assert await removal == 0


async def test_a_flood_of_messages_does_not_hold_the_loop() -> None:
    """A system call that faults with a signal pending repeats its message without end."""
    waits = asyncio.Event()
    release = asyncio.Event()

    async def slow(fault: PageFault) -> Resolution:
        waits.set()
        await release.wait()
        return await from_image(fault)

    async with serving(slow) as served:
        target = served.target
        memfd, here = target.make_memfd("sink", 0, PAGE)
        call = target.call("pwrite", memfd, target.at(5), 8, 0)
        await within(waits.wait())
        await until(lambda: target.is_blocked(0), "the write blocks")
        assert await target.send_signal(0, signal.SIGUSR1) == 0
        counters = served.pager.counters
        await until(lambda: counters.faults > 50, "duplicates arrive while the loop runs")
        assert counters.joined == counters.faults - 1
        release.set()
        assert await call == 8
        with mmap.mmap(here, PAGE) as sink:
            assert sink[:8] == (6).to_bytes(8, "little")
        os.close(here)
