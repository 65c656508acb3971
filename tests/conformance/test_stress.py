"""Lockers, a background copier and a handler over the same pages, as uffd-stress.c has them."""

from __future__ import annotations

import asyncio
import os
import random

from aiouffd import (
    Action,
    Copy,
    LayoutChanging,
    Mode,
    PageFault,
    Pager,
    Region,
    Resolution,
    Unprotect,
    Userfaultfd,
)
from tests.conformance.support import (
    ALL,
    MISSING,
    WP,
    WP_FEATURES,
    MakeMemory,
    release_advice,
    selftest,
)
from tests.targets import Target, until

BOUNCES = 8
ROUNDS = 4000  # of each locker and bounce
_RANDOM, _RACING, _SUSPENDING = 1, 2, 4  # bits of the bounce's number


class Mover:
    """Serve one half of the target's memory from the other, which nobody registered."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.source = target.base
        self.suspend = False
        self.missing = 0
        self.written_first = 0

    def page(self, offset: int) -> bytes:
        return self.target.memory(self.source + offset, self.target.page_size)

    async def __call__(self, fault: PageFault) -> Resolution:
        if self.suspend:
            await asyncio.sleep(0)
        if fault.wp:
            return Unprotect()
        self.missing += 1
        self.written_first += fault.write
        return Copy(self.page(fault.offset), protect=bool(self.missing % 2))


async def release(target: Target, start: int, length: int) -> None:
    """Make the pages missing again."""
    assert await target.call("madvise", start, length, release_advice(target)) == 0
    if target.kind == "shmem-private":
        # Writing to a private mapping has put zero pages into the file: to be holes again.
        punch = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        file, offset = target.memfd_there, start - target.base
        assert await target.call("fallocate", file, punch, offset, length) == 0


async def protect(uffd: Userfaultfd, start: int, length: int) -> None:
    """WRITEPROTECT, tried again while a fork or remap is being read."""
    while True:
        try:
            uffd.writeprotect(start, length)
        except LayoutChanging:
            await asyncio.sleep(0)
        else:
            return


async def copy_in_background(uffd: Userfaultfd, region: Region, mover: Mover, pages: range) -> None:
    """The first half of a slice, protect the slice, the second half."""
    size = mover.target.page_size
    for number, page in enumerate(pages):
        await region.fill(page * size, mover.page(page * size))
        if number == len(pages) // 2:
            await protect(uffd, region.start + pages.start * size, len(pages) * size)


@selftest(
    "uffd-stress.c",
    "uffd-stress",
    "mutexes and counters live in the pages: none is lost over many bounces between two areas; "
    "first accesses are reads; a second COPY is EEXIST",
)
@ALL
async def test_stress(kind: str, memory: MakeMemory, seed: int) -> None:
    """No counter is lost while threads, handler and background fills race for the same pages."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    workers = 2 * (os.cpu_count() or 1)
    half = 4 if kind.startswith("hugetlb") else 128
    settings = {"features": WP_FEATURES, "register": 0, "threads": workers + 1}
    with memory(kind, 2 * half, **settings) as (target, uffd):
        size, length = target.page_size, half * target.page_size
        mover, destination = Mover(target), target.at(half)
        await target.start_fill(mover.source, length, 0)
        await target.tell(-1, "shadow", 0, half, convert=int)
        total = 0
        async with Pager(uffd, target=target.pidfd, on_close=Action.ZERO) as pager:
            for bounce in range(BOUNCES):
                mover.suspend = bool(bounce & _SUSPENDING)
                await release(target, destination, length)
                region = pager.register(
                    destination, length, mover, modes=Mode(MISSING | WP), page_size=size
                )
                lockers = []
                for worker in range(workers):
                    start = rng.randrange(1, 2**63) if bounce & _RANDOM else 0
                    if bounce & _RACING:
                        start = bounce if bounce & _RANDOM else 0
                    words = ("locker", destination, size, half, start, ROUNDS)
                    lockers.append(target.tell(worker, *words, convert=list))
                before = mover.missing
                await until(lambda: mover.missing > before, "a fault")  # noqa: B023
                step = -(-half // workers)
                slices = [range(at, min(at + step, half)) for at in range(0, half, step)]
                await asyncio.gather(
                    *(copy_in_background(uffd, region, mover, pages) for pages in slices)
                )
                assert uffd.copy(destination, mover.page(0)) == 0  # EEXIST
                for locker in lockers:
                    assert await locker == [ROUNDS, 0]
                total += workers * ROUNDS
                uffd.unprotect(destination, length)
                await region.drop(Action.ZERO)
                counters = await target.start_words(destination + 64, size, half)
                assert sum(counter or 0 for counter in counters) == total
                mover.source, destination = destination, mover.source
            done = pager.counters
            assert done.faults == done.joined + done.ended
            assert mover.written_first == 0
