"""Signals on the faulting threads and on the serving one."""

from __future__ import annotations

import asyncio
import os
import signal

from aiouffd import PageFault, Resolution
from tests.serving import Gate, from_image, serving
from tests.targets import PAGE, until


async def test_signals_on_both_sides_lose_and_repeat_nothing() -> None:
    """Timers on the server, signals on every faulting thread: one handler at a time per page."""
    asked: list[int] = []
    at_work: set[int] = set()
    pages, threads = 4096, 4

    async def slowly(fault: PageFault) -> Resolution:
        assert fault.offset not in at_work
        at_work.add(fault.offset)
        asked.append(fault.offset)
        if len(asked) % 8 == 0:
            await asyncio.sleep(0.0005)
        at_work.remove(fault.offset)
        return await from_image(fault)

    caught = 0

    def count(number: int, frame: object) -> None:
        nonlocal caught
        caught += 1

    before = signal.signal(signal.SIGPROF, count), signal.signal(signal.SIGALRM, count)
    try:
        async with serving(slowly, pages=pages, threads=2 * threads) as served:
            target = served.target
            signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
            pelting = [
                target.tell(threads + n, "pelt", n, int(signal.SIGPROF), 2**40, 20, convert=int)
                for n in range(threads)
            ]
            part = pages // threads
            sweeps = [target.start_sweep(n * part, part, thread=n) for n in range(threads)]
            for n, sweep in enumerate(sweeps):
                assert await sweep == list(range(n * part + 1, (n + 1) * part + 1))
            await target.stop(1)
            for pelt in pelting:
                assert await pelt > 0
            # A thread that a signal sent back to its access may report a page that was filled
            # that very moment: such a fault is served again, like any other.
            counters = served.pager.counters
            assert set(asked) == {page * PAGE for page in range(pages)}
            assert len(asked) == counters.ended == pages + counters.already
            assert counters.already < pages / 4
            assert counters.failures == 0
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGPROF, before[0])
        signal.signal(signal.SIGALRM, before[1])
    assert caught > 0


async def test_a_kernel_fault_under_a_signal_is_one_fault() -> None:
    """A system call's fault that repeats its message without end makes one handler, one task."""
    gate = Gate()
    async with serving(gate) as served:
        target, counters = served.target, served.pager.counters
        file, fd = target.make_memfd("file", 0, PAGE)
        os.close(fd)
        reading = target.call("pread", file, target.at(3), 1, 0)
        await until(lambda: gate.faults, "the handler is asked")
        await target.send_signal(0, signal.SIGUSR1)
        await until(lambda: counters.joined > 500, "the kernel repeats itself")
        assert len(gate.faults) == 1
        assert served.pager.in_flight == 1
        other = target.start_read(5, thread=1)  # served behind the flood
        await until(lambda: len(gate.faults) == 2, "another page gets through")
        gate.let_go()
        assert await reading == 1
        assert await other == 6
        # The kernel may repeat itself once more just as the page is filled.
        assert {fault.offset for fault in gate.faults} == {3 * PAGE, 5 * PAGE}
