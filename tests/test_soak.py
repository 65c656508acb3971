"""Processes that do everything at random, served by handlers that do not behave, for a minute.

Several at a time read, write, madvise, mremap, mprotect, fork, make system calls and exit, in many
threads, pelted with signals; handlers wait, fail and are cancelled; memory is filled ahead and
protected; some pagers are closed, and some processes killed, in the middle of it.  Every byte is
compared by the processes themselves, nothing may hang, and nothing may be left.

AIOUFFD_SOAK_SECONDS says how long (60), over all loops together; AIOUFFD_SEED repeats a run.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

import pytest

from tests import conftest
from tests.soak import Mixture, live

pytestmark = pytest.mark.root  # fork events take CAP_SYS_PTRACE

SECONDS: Final = float(os.environ.get("AIOUFFD_SOAK_SECONDS", "60"))

_AT_A_TIME: Final = 3
_EVERYTHING: Final = "r20n2w8d4m4u1p3f1k3K2"

MIXTURES: Final = {
    "everything": Mixture(operations=_EVERYTHING),
    "signals": Mixture(operations=_EVERYTHING, alarm_us=3000),
    "slow source": Mixture(operations=_EVERYTHING, trouble=0.9, max_in_flight=2, life=500),
    "exits": Mixture(operations="r400w200d100m100f10x1", pages=256),
    "many threads": Mixture(operations=_EVERYTHING, threads=12, pages=64, life=600),
    "protected": Mixture(operations=_EVERYTHING, wp=True),
    "private file": Mixture(kind="shmem-private", operations=_EVERYTHING),
    "shared": Mixture(kind="shmem", operations=_EVERYTHING),
    "shared, protected": Mixture(kind="shmem", operations=_EVERYTHING, wp=True),
    "shared, minor": Mixture(kind="shmem", operations="r20n2w8d4m4p3k3K2", minor=True),
    "image only": Mixture(operations="r20n10m2f1", fills=False, pages=1024),
}


@pytest.mark.limit(SECONDS + 120)
async def test_everything_at_random(
    seed: int, caplog: pytest.LogCaptureFixture, record_property: Callable[[str, object], None]
) -> None:
    """Every byte is right, nobody hangs, the books balance, nothing is left."""
    caplog.set_level(logging.CRITICAL + 1, logger="aiouffd")  # failures are what this is about
    print(f"soak test with seed {seed}")
    rng = random.Random(seed)
    end = time.monotonic() + SECONDS / len(conftest.LOOPS)
    totals: Counter[str] = Counter()

    async def live_on(number: int) -> None:
        while time.monotonic() < end or not totals["lives"]:
            name = rng.choice(list(MIXTURES))
            how = rng.choices(("itself", "close", "kill"), (4, 2, 1))[0]
            mixture = MIXTURES[name]
            if how == "close" and mixture.kind != "anon" and "f" in mixture.operations:
                how = "itself"  # forks of shared memory lose its poison marks, by the kernel
            totals.update((await live(mixture, rng.randrange(2**32), how))._asdict())
            totals.update(("lives", name, how))

    async with asyncio.TaskGroup() as group:
        for number in range(_AT_A_TIME):
            group.create_task(live_on(number))
    record_property("soak", dict(totals))
    print(", ".join(f"{name} {count}" for name, count in totals.items()))
    assert totals["checked"] > 0
