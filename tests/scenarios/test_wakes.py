"""Wakes: a page that is there while its waiter sleeps, and answers that change nothing."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from typing import Any

import pytest

from aiouffd import (
    Action,
    Answer,
    Continue,
    Copy,
    FailurePolicy,
    Feature,
    Mode,
    PageFault,
    Resolution,
    Unprotect,
    Userfaultfd,
    Zero,
)
from aiouffd.kernel import abi, calls
from tests.serving import MADV_DONTNEED, Gate, Record, Served, from_image, image, serving
from tests.targets import DEADLINE, HUGE, PAGE, Signal, until

MINOR = Feature.MINOR_SHMEM


# --- 1: a lost wake after EEXIST -------------------------------------------------------


@pytest.mark.parametrize("how", ["copy", "continue", "zero"])
async def test_lost_wake_after_a_page_was_already_there(how: str) -> None:
    """A page that another worker installs without a wake still lets its waiter go on."""
    uffd: Userfaultfd

    async def twice(fault: PageFault) -> Answer:
        if how == "copy":
            assert uffd.copy(fault.address, image(fault.offset), wake=False) == PAGE
            return Copy(b"\xff" * PAGE)
        if how == "continue":
            assert uffd.continue_(fault.address, PAGE, wake=False) == PAGE
            return Continue()
        assert uffd.zeropage(fault.address, PAGE, wake=False) == PAGE
        return Zero()

    settings: dict[str, Any] = {"modes": Mode.MINOR, "features": MINOR} if how == "continue" else {}
    async with serving(twice, "shmem" if settings else "anon", **settings) as served:
        uffd = served.uffd
        if how == "continue":
            with served.target.alias() as alias:
                for page in range(served.target.pages):
                    alias[page * PAGE : (page + 1) * PAGE] = image(page * PAGE)
        for page in range(8):
            expected = 0 if how == "zero" else page + 1
            assert await served.target.start_read(page) == expected
        assert served.pager.counters.already == 8


async def test_lost_wake_among_32_threads_and_two_fillers(seed: int) -> None:
    """Two fillers compete for the same minor faults of 32 threads: nobody sleeps at the end."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    pages = 64
    settings: dict[str, Any] = {
        "modes": Mode.MINOR,
        "features": MINOR,
        "threads": 33,
        "pages": pages,
    }

    async def map_it(fault: PageFault) -> Resolution:
        if rng.random() < 0.1:
            await asyncio.sleep(0)
        return Continue()

    async with serving(map_it, "shmem", **settings) as served:
        target, fd = served.target, served.uffd.fileno()
        with target.alias() as alias:
            for page in range(pages):
                alias[page * PAGE : page * PAGE + 8] = (page + 1).to_bytes(8, "little")
        over = threading.Event()

        def compete(number: int) -> None:
            mine = random.Random(number)
            while not over.wait(0.0002):  # or it holds the GIL too often
                page = target.at(mine.randrange(pages))
                calls.continue_(fd, page, PAGE, abi.UFFDIO_CONTINUE_MODE_DONTWAKE)

        rival = asyncio.get_running_loop().run_in_executor(None, compete, rng.randrange(2**32))
        churn = target.start_churn(MADV_DONTNEED, rng.randrange(2**63), 32)
        try:
            storms = [
                target.start_storm(rng.randrange(2**63), 2**62, thread) for thread in range(32)
            ]
            faults = served.pager.counters
            enough = time.monotonic() + 3
            await until(
                lambda: faults.faults > (100 if time.monotonic() > enough else 20_000),
                "many faults",
                3 * DEADLINE,
            )
            await target.stop(3)
            for storm in storms:
                found = await storm
                assert found.zero == found.wrong == found.stopped == 0
        finally:
            over.set()
            await rival
        assert await churn > 0
        assert served.uffd.info().total == 0
        print(served.pager.counters)


# --- 6: a hole in the middle -----------------------------------------------------------


def holes(pages: int) -> list[tuple[int, ...]]:
    """Every single present page, and every two in a row."""
    return [(page,) for page in range(pages)] + list(itertools.pairwise(range(pages)))


async def wait_on_absent(served: Served, present: tuple[int, ...]) -> dict[int, Any]:
    """One thread asleep on each page of four that is not there."""
    target = served.target
    for page in present:
        assert served.uffd.copy(target.at(page), b"\x77" * target.page_size)
    touches = {page: target.start_read(page, page) for page in range(4) if page not in present}
    await until(lambda: served.pager.in_flight == len(touches), "every fault is read")
    return touches


@pytest.mark.parametrize("present", holes(4), ids=str)
@pytest.mark.parametrize("kind", ["anon", "shmem", "hugetlb"])
async def test_hole_in_the_middle_of_a_long_answer(
    kind: str, present: tuple[int, ...], request: pytest.FixtureRequest
) -> None:
    """A long answer over present pages fills all absent ones, and wakes all who wait."""
    if kind == "hugetlb":
        request.getfixturevalue("huge_pages")(4)
    size = HUGE if kind == "hugetlb" else PAGE

    async def all_four(fault: PageFault) -> Resolution:
        start = fault.address - fault.offset
        return Copy(image(0, 4 * size, size), address=start)

    gate = Gate(all_four)
    async with serving(gate, kind, 4) as served:
        touches = await wait_on_absent(served, present)
        gate.let_go()
        assert {page: await touch for page, touch in touches.items()} == {
            page: page + 1 for page in touches
        }
        for page in present:
            assert await served.target.start_read(page) == 0x77


@pytest.mark.parametrize("present", holes(4), ids=str)
async def test_hole_in_the_middle_of_a_fill(present: tuple[int, ...]) -> None:
    """Filling ahead over present pages wakes those who wait for the absent ones."""
    gate = Gate()
    async with serving(gate, pages=4) as served:
        touches = await wait_on_absent(served, present)
        assert await served.region.fill(0, image(0, 4 * PAGE)) == len(touches) * PAGE
        assert {page: await touch for page, touch in touches.items()} == {
            page: page + 1 for page in touches
        }
        assert served.pager.in_flight == len(touches)  # their handlers know nothing of it yet
        gate.let_go()
        await until(lambda: not served.pager.in_flight, "the handlers have ended")
        assert served.pager.counters.already == len(touches)
        for page in present:
            assert await served.target.start_read(page) == 0x77


# --- 7: errors that pass, and errors that stay -----------------------------------------


async def test_retry_ends_in_bytes_or_in_the_policy() -> None:
    """A page that fails twice is served, one that always fails is poisoned, others never wait."""
    asked: dict[int, int] = {}

    async def moody(fault: PageFault) -> Resolution:
        page = fault.offset // PAGE
        asked[page] = asked.get(page, 0) + 1
        if page == 1 and asked[page] <= 2:
            raise ConnectionError("the store is away")
        if page == 2:
            raise ConnectionError("the store is gone")
        return await from_image(fault)

    record = Record()
    failure = FailurePolicy(retries=3, backoff=0.005)
    async with serving(moody, failure=failure, observers=[record]) as served:
        target = served.target
        touches = [target.start_read(page, page) for page in (1, 2, 3)]
        assert await touches[2] == 4
        assert await touches[0] == 2
        poisoned = await touches[1]
        assert isinstance(poisoned, Signal)
        assert poisoned.address == target.at(2)
        assert asked == {1: 3, 2: 4, 3: 1}
        assert [str(error.__cause__) for error in record.failures] == ["the store is gone"]
        # A success clears the count: the page is served again when it is needed again.
        assert await target.start_madvise(MADV_DONTNEED, 3) == 0
        assert await target.start_read(3) == 4


# --- 8: the books lie ------------------------------------------------------------------


async def test_present_in_our_books_is_served_again() -> None:
    """Without EVENT_REMOVE a page vanishes unseen: its next fault is served all the same."""
    async with serving(threads=2) as served:
        target = served.target
        for _ in range(200):
            assert await target.start_read(5) == 6
            assert await target.start_madvise(MADV_DONTNEED, 5, thread=1) == 0
        assert served.pager.counters.faults == 200


# --- 21: install, protect, wake --------------------------------------------------------


async def test_a_protected_install_that_came_second_still_protects() -> None:
    """A page that was installed unprotected meanwhile is armed before its waiter is woken."""
    written: list[int] = []
    uffd: Userfaultfd

    async def arm(fault: PageFault) -> Resolution:
        if fault.wp:
            written.append(fault.offset // PAGE)
            return Unprotect()
        if fault.offset // PAGE % 2:
            uffd.copy(fault.address, image(fault.offset), wake=False)
        return Copy(image(fault.offset), protect=True)

    features = Feature.PAGEFAULT_FLAG_WP
    async with serving(arm, features=features, modes=Mode.MISSING | Mode.WP) as served:
        uffd, target = served.uffd, served.target
        for page in range(8):
            assert await target.start_read(page) == page + 1
            assert target.is_wp(page), page
            assert await target.start_write(page, 9) == 9
            assert not target.is_wp(page)
        assert written == list(range(8))


async def test_poison_is_not_the_end_of_other_pages() -> None:
    """With Action.ZERO as the policy's end a failed page reads zero, and nothing else does."""

    async def fail_odd(fault: PageFault) -> Resolution:
        if fault.offset // PAGE % 2:
            raise ValueError("odd")
        return await from_image(fault)

    failure = FailurePolicy(retries=0, then=Action.ZERO)
    async with serving(fail_odd, pages=8, failure=failure) as served:
        assert await served.target.start_sweep() == [1, 0, 3, 0, 5, 0, 7, 0]
