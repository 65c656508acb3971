"""The nastiest races, some thousands of rounds of each: no byte is ever a wrong one.

Each is one mixture of ``soak_target.c`` that does little else than one thing, while pages are
missing, filled ahead and answered at once.  Zeros where image data belongs, image data where zeros
belong, and threads that sleep on are all found by the processes themselves and by their watchers.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Final

import pytest

from aiouffd import Action
from tests.soak import Life, Mixture, Totals, live

pytestmark = pytest.mark.root  # fork events take CAP_SYS_PTRACE

RACES: Final = {
    # REMOVE against COPY: the finishing madvise may undo a fill that has succeeded.
    "removal against fills": Mixture(operations="r4w1d8", pages=1024, trouble=0, life=2000),
    "removal of shared memory": Mixture(
        kind="shmem", operations="r4w1d8", pages=1024, trouble=0, life=2000
    ),
    # A fault at an mremap's new address is delivered before the move itself.
    "moves during faults": Mixture(operations="n4m6u2", pages=1024, trouble=0.1, life=1500),
    # Everything answers EAGAIN while a fork waits for its event to be read.
    "forks during faults": Mixture(operations="n2w1f2", threads=3, trouble=0.1, life=80),
    # A system call in a fault with a signal pending repeats its message without end.
    "signals in system calls": Mixture(
        operations="k6K2w1", pages=1024, trouble=0.2, life=1200, alarm_us=500
    ),
    "one place for handlers": Mixture(
        operations="n4d2m1", max_in_flight=1, trouble=0.5, life=300, threads=8, pages=128
    ),
}


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Pages that cannot be answered are part of it; thousands of log lines are not."""
    caplog.set_level(logging.CRITICAL + 1, logger="aiouffd")


@pytest.mark.limit(120)
@pytest.mark.parametrize("name", RACES)
async def test_race(name: str, seed: int) -> None:
    """Every byte is right and every thread goes on."""
    totals = await live(RACES[name], seed)
    assert totals.checked > 0


@pytest.mark.limit(120)
async def test_closing_during_faults(seed: int) -> None:
    """Closed in the middle of faults, moves, removals and forks: SIGBUS or the right byte."""
    rng = random.Random(seed)
    mixture = Mixture(operations="r8n2w3d3m3u1f1k1", pages=256, life=0, trouble=0.2)
    lost = 0
    for _ in range(15):
        totals = await live(mixture, rng.randrange(2**32), "close")
        lost += totals.sigbus
    assert lost > 0


@pytest.mark.limit(120)
async def test_dropping_a_region_during_faults(seed: int) -> None:
    """The same for one region of a pager that goes on."""
    rng = random.Random(seed)
    for _ in range(8):
        await _drop(Mixture(operations="r8n2w3d3", pages=256, life=0, fills=False), rng)


async def _drop(mixture: Mixture, rng: random.Random) -> Totals:
    life = Life(mixture, rng.randrange(2**32))
    async with life.serve() as (pager, region):
        await asyncio.sleep(life.rng.uniform(0.01, 0.1))  # let it be in the middle of things
        life.put("closing", 1)
        await region.drop(Action.POISON)
        assert not pager.regions
        life.put("stop", 1)
        await life.ends(pager)
        return life.totals()


@pytest.mark.limit(120)
@pytest.mark.parametrize("wp", [False, True])
async def test_huge_pages(wp: bool, seed: int, huge_pages: Callable[[int], None]) -> None:
    """Everything that huge pages can do, at random."""
    huge_pages(66)
    mixture = Mixture(
        kind="hugetlb",
        threads=1,
        pages=64,
        operations="r20w8d4m4k3K2",  # their mappings do not merge again after mprotect
        life=300,
        wp=wp,
    )
    assert (await live(mixture, seed)).checked > 0
