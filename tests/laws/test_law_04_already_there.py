"""Law 4: EEXIST is not an error and does not wake: wake it."""

from __future__ import annotations

import mmap

import pytest

from aiouffd import Continue, Copy, Mode, PageFault, Resolution, StuckPage, Userfaultfd, Zero
from tests.serving import Record, from_image, image, serving
from tests.targets import HUGE, MAP_HUGETLB, PAGE, Signal

_MAP_NORESERVE = 0x4000


@pytest.mark.parametrize("answer", [Copy, Zero])
async def test_a_page_that_is_already_there_wakes_its_thread(answer: type) -> None:
    """Somebody else filled the page without waking: the thread must not sleep on."""
    record = Record()
    uffds: list[Userfaultfd] = []

    async def too_late(fault: PageFault) -> Resolution:
        assert uffds[0].copy(fault.address, image(fault.offset), wake=False) == PAGE
        return Copy(bytes(PAGE)) if answer is Copy else Zero()

    async with serving(too_late, observers=[record]) as served:
        uffds.append(served.uffd)
        assert await served.target.start_read(3) == 4
        assert served.pager.counters.already == 1
        assert record.outcomes == ["already"]


async def test_a_mapped_page_wakes_its_thread_after_continue() -> None:
    """The same for CONTINUE, where the page cache's page is mapped already."""
    uffds: list[Userfaultfd] = []

    async def too_late(fault: PageFault) -> Resolution:
        assert uffds[0].continue_(fault.address, PAGE, wake=False) == PAGE
        return Continue()

    async with serving(too_late, "shmem", modes=Mode.MINOR) as served:
        uffds.append(served.uffd)
        with served.target.alias() as alias:
            alias[3 * PAGE] = 77
        assert await served.target.start_read(3) == 77
        assert served.pager.counters.already == 1


async def test_the_same_page_again_and_again_is_an_error(huge_pages: object) -> None:
    """With the pool of huge pages empty every fill says EEXIST: the fault ends in the policy."""
    huge_pages(1)  # type: ignore[operator]
    record = Record()
    async with serving(from_image, pages=2, observers=[record]) as served:
        target = served.target
        length = 64 * HUGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB | _MAP_NORESERVE
        base = await target.call("mmap", 0, length, 3, flags, -1, 0)
        served.pager.register(base, length, from_image, page_size=HUGE)
        for page in range(64):
            answer = await target.start_peek(base + page * HUGE)
            if isinstance(answer, Signal):
                break
            assert answer == page + 1
        else:
            pytest.fail("the pool of huge pages never ran out")
        assert isinstance(record.failures[0], StuckPage)
        assert served.pager.counters.failures == 1
