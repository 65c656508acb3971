"""Targets that die, servers that die, and regions that are given up."""

from __future__ import annotations

import asyncio
import os
import random
import select
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from aiouffd import Action, Feature, Mode, PageFault, Pager, Resolution, Unprotect, Userfaultfd
from tests.serving import MADV_DONTNEED, Gate, from_image, image, serving
from tests.targets import DEADLINE, PAGE, TIME_SCALE, Signal, Target, until

WP = Feature.PAGEFAULT_FLAG_WP


# --- 10: dead targets ------------------------------------------------------------------


async def test_a_dead_target_ends_its_pager_at_once() -> None:
    """A killed target with faults in flight is noticed in a tenth of a second, hundred times."""
    before = len(os.listdir("/proc/self/fd"))
    for round_ in range(100):
        gate = Gate()
        with Target("anon", 4, threads=2) as target:
            uffd = Userfaultfd.adopt(target.take_uffd())
            async with Pager(uffd, target=target.pidfd) as pager:
                pager.register(target.base, target.length, gate, registered=True)
                if round_ % 2:
                    target.start_read(1)
                    await until(lambda: gate.faults, "the handler is asked")  # noqa: B023
                target.kill()
                began = time.monotonic()
                await asyncio.wait_for(pager.wait_closed(), DEADLINE)
                assert time.monotonic() - began < 0.1 * max(TIME_SCALE, 1) + 0.1
                assert pager.target_gone
                assert pager.in_flight == 0
    assert len(os.listdir("/proc/self/fd")) == before


async def test_exec_retires_a_pager_whose_pidfd_is_quiet() -> None:
    """After exec the process lives on, and its old memory is served no longer."""
    async with serving() as served:
        await served.target.start_exec()
        await asyncio.wait_for(served.pager.wait_closed(), DEADLINE)
        assert served.pager.target_gone
        assert not select.select([served.target.pidfd], [], [], 0)[0]


@pytest.mark.parametrize("pause_us", [0, 2000])
async def test_a_target_that_never_holds_still_cannot_hold_up_a_close(pause_us: int) -> None:
    """Memory that is moved to and fro without end is poisoned, or its process killed, in time."""
    features = Feature.EVENT_REMAP | Feature.EVENT_UNMAP
    settings: dict[str, Any] = {"features": features, "deadline": 1.0, "warn_after": None}
    async with serving(pages=20_000, **settings) as served:
        target = served.target
        await served.region.fill(100 * PAGE, bytes(19_900 * PAGE))
        room = target.reserve(8 * PAGE)
        target.tell(1, "shuttle", target.base, room, 8 * PAGE, pause_us, convert=int)
        await until(lambda: served.pager.counters.events > 10, "it moves")
        await asyncio.wait_for(served.pager.aclose(), 3 * DEADLINE)
        if not served.pager.target_gone:
            assert isinstance(await target.start_read(20), Signal)


# --- 29: the server crashes ------------------------------------------------------------

_CRASHING_SERVER = """
import os, sys
fd, want = int(sys.argv[1]), int(sys.argv[2])
os.set_blocking(fd, True)
got = 0
while got < want:
    got += len(os.read(fd, 32 * 64)) // 32
print("has them", flush=True)
sys.stdin.read()
"""


def crash_with(fd: int, faults: int) -> None:
    """Give a descriptor to another process, which reads faults and dies before it answers any."""
    server = subprocess.Popen(
        [sys.executable, "-I", "-c", _CRASHING_SERVER, str(fd), str(faults)],
        pass_fds=[fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    os.close(fd)
    with server:
        assert server.stdout is not None
        try:
            assert server.stdout.readline() == b"has them\n"
        finally:
            server.send_signal(signal.SIGKILL)


async def test_a_crash_of_the_only_holder_turns_pages_into_zeros() -> None:
    """The control: without a second descriptor every waiter goes on with a zero page."""
    async with Target("anon", 32, threads=20) as target:
        touches = [target.start_read(page, page) for page in range(20)]
        for thread in range(20):
            await target.blocked(thread)
        await asyncio.to_thread(crash_with, target.take_uffd(), 20)
        assert [await touch for touch in touches] == [0] * 20


async def test_faults_that_a_dead_server_had_read_come_again() -> None:
    """With a keeper's duplicate the next server wakes whole regions, and all get their bytes."""
    async with Target("anon", 32, threads=20) as target:
        touches = [target.start_read(page, page) for page in range(20)]
        for thread in range(20):
            await target.blocked(thread)
        await asyncio.to_thread(crash_with, os.dup(target.uffd), 20)
        uffd = Userfaultfd.adopt(os.dup(target.uffd))
        assert uffd.read() == []
        assert uffd.info()[:2] == (0, 20)
        async with Pager(uffd, target=target.pidfd) as pager:
            pager.register(target.base, target.length, from_image, registered=True)
            uffd.wake(target.base, target.length)
            assert [await touch for touch in touches] == list(range(1, 21))
            assert pager.counters.faults == 20


# --- 20: write protection taken down ---------------------------------------------------


async def test_write_protect_teardown_leaves_nobody_asleep() -> None:
    """Dropped, closed or unprotected: a writer that waits goes on, and so does the next."""
    for how in ("drop", "close", "unprotect"):
        gate = Gate()
        pages = 4096
        settings: dict[str, Any] = {"features": WP, "modes": Mode.WP, "pages": pages}
        async with serving(gate, **settings) as served:
            target, uffd = served.target, served.uffd
            await target.start_number(target.base, PAGE, pages)
            uffd.writeprotect(target.base, target.length)
            writing = target.start_write(7, 200)
            await until(lambda: gate.faults, "the write is reported")  # noqa: B023
            if how == "drop":
                await served.region.drop()
            elif how == "close":
                await served.pager.aclose()
            else:
                uffd.unprotect(target.base, target.length)
                gate.let_go()
            assert await writing == 200
            assert await target.start_write(8, 201) == 201
            assert not target.is_wp(9)
            assert await target.start_read(9) == 10


async def test_write_faults_are_as_many_as_dirty_pages(seed: int) -> None:
    """Each page that is written faults once, and unwritten ones never do."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    pages = 512
    dirty: list[int] = []

    async def track(fault: PageFault) -> Resolution:
        assert fault.wp
        dirty.append(fault.offset // PAGE)
        return Unprotect()

    settings: dict[str, Any] = {"features": WP, "modes": Mode.WP, "pages": pages}
    async with serving(track, **settings) as served:
        target = served.target
        await target.start_number(target.base, PAGE, pages)
        served.uffd.writeprotect(target.base, target.length)
        written = [rng.randrange(pages) for _ in range(400)]
        for page in written:
            assert await target.start_write(page, 5, rng.randrange(4)) == 5
        assert sorted(dirty) == sorted(set(written))


# --- 31: populate everything, then detach ----------------------------------------------


async def test_an_early_unregister_gives_zeros() -> None:
    """The control: what is unregistered before it is filled is zero for good."""
    async with serving(pages=8) as served:
        target = served.target
        assert await target.start_read(0) == 1
        served.uffd.unregister(target.base, target.length)
        assert await target.start_sweep() == [1, 0, 0, 0, 0, 0, 0, 0]


async def test_a_region_that_is_filled_and_then_dropped_is_whole(seed: int) -> None:
    """Filled first, dropped then, while threads read and one frees pages: never a wrong zero."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    pages = 1024
    for _ in range(5):
        async with serving(features=Feature.EVENT_REMOVE, pages=pages) as served:
            target, region = served.target, served.region
            storms = [target.start_storm(rng.randrange(2**63), 2**62, thread) for thread in (0, 1)]
            freed = rng.sample(range(pages), 20)
            filling = asyncio.create_task(region.fill(0, image(0, pages * PAGE)))
            for page in freed:
                assert await target.start_madvise(MADV_DONTNEED, page, thread=2) == 0
            await filling
            await region.drop()
            assert served.pager.regions == []
            words = await target.start_sweep(thread=3)
            await target.stop(1)
            for storm in storms:
                found = await storm
                assert found.wrong == found.stopped == 0
            await target.stop(0)
            # POISON is how a region ends: freed pages of it read zero, missing there are none.
            assert words == [0 if page in freed else page + 1 for page in range(pages)]


async def test_a_region_that_is_dropped_unfilled_fails_closed() -> None:
    """What was missing when the region was given up is a SIGBUS, not a zero."""
    async with serving(pages=4) as served:
        target = served.target
        assert await target.start_read(0) == 1
        await served.region.drop(Action.POISON)
        assert await target.start_read(0) == 1
        assert isinstance(await target.start_read(1), Signal)
