"""What a target frees reads zero, whoever would like to fill it; and what it keeps does not."""

from __future__ import annotations

import asyncio
import random

import pytest

from aiouffd import Action, Feature
from tests.serving import MADV_DONTNEED, MADV_REMOVE, image, serving
from tests.targets import HUGE, MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE, PAGE

REMOVE = Feature.EVENT_REMOVE


@pytest.mark.parametrize("kind", ["anon", "shmem", "shmem-private", "hugetlb", "hugetlb-private"])
async def test_stale_bytes_after_a_removal(kind: str, request: pytest.FixtureRequest) -> None:
    """Written, only read, and never touched: a freed page reads zero, on every kind of memory."""
    huge = kind.startswith("hugetlb")
    if huge:
        request.getfixturevalue("huge_pages")(6)
    advice = MADV_REMOVE if kind in {"shmem", "hugetlb"} else MADV_DONTNEED
    size = HUGE if huge else PAGE
    async with serving(features=REMOVE, kind=kind, pages=4) as served:
        target = served.target
        assert await target.start_write(0, 99) == 99
        assert await target.start_read(1) == 2
        assert await target.start_madvise(advice, 0, 3) == 0
        assert await target.start_sweep() == [0, 0, 0, 4]
        # rewritten it holds what was written, and freed again it is zero again
        assert await target.start_write(1, 77) == 77
        assert await target.start_read(1) == 77
        assert await target.start_madvise(advice, 1) == 0
        assert await served.region.fill(0, image(0, 4 * size, size)) == 0
        assert await target.start_sweep() == [0, 0, 0, 4]
        assert served.pager.counters.removed == 4


async def test_a_background_fill_of_everything_does_not_resurrect(seed: int) -> None:
    """While the whole image is filled in behind, pages are freed at random and stay zero."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    pages = 2048
    async with serving(features=REMOVE, pages=pages) as served:
        target = served.target
        whole = image(0, pages * PAGE)
        free: set[int] = set()

        async def behind() -> int:
            done, step = 0, 64 * PAGE
            for at in range(0, pages * PAGE, step):
                done += await served.region.fill(at, whole[at : at + step])
            return done

        filling = asyncio.create_task(behind())
        while not filling.done():
            page = rng.randrange(pages)
            free.add(page)
            if rng.random() < 0.5:
                assert await target.start_read(page) in {0, (page + 1) % 256}
            assert await target.start_madvise(MADV_DONTNEED, page) == 0
            if rng.random() < 0.5:
                assert await target.start_read(page, thread=1) == 0
        installed = await filling
        assert free
        words = await target.start_sweep()
        assert words == [0 if page in free else page + 1 for page in range(pages)]
        counters = served.pager.counters
        assert installed == counters.filled_bytes
        assert installed + counters.copied_bytes <= (pages + len(free)) * PAGE


async def test_removed_pages_are_zero_after_the_pager_is_gone() -> None:
    """Closing poisons what is missing of the image, and leaves what was freed to be zero."""
    async with serving(features=REMOVE, pages=8, on_close=Action.POISON) as served:
        target = served.target
        assert await target.start_read(0) == 1
        assert await target.start_madvise(MADV_DONTNEED, 2, 2) == 0
        await served.pager.aclose()
        assert await target.start_sweep() == [1, None, 0, 0, None, None, None, None]


async def test_a_child_keeps_what_its_parent_freed() -> None:
    """A page that was free at the fork reads zero in the child, and so do pages freed there."""
    features = REMOVE | Feature.EVENT_FORK
    async with serving(features=features, pages=8) as served:
        target = served.target
        assert await target.start_madvise(MADV_DONTNEED, 1) == 0
        child = await target.fork()
        assert await child.start_madvise(MADV_DONTNEED, 2) == 0
        assert await child.start_sweep() == [1, 0, 0, 4, 5, 6, 7, 8]
        assert await target.start_sweep() == [1, 0, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(("kind", "left_behind"), [("anon", 0), ("shmem", 12)])
async def test_memory_that_was_moved_away_but_not_unmapped(kind: str, left_behind: int) -> None:
    """Anonymous memory is empty where it was; shared memory shows the same pages in both places."""
    layout = Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP
    async with serving(features=layout, kind=kind) as served:
        target = served.target
        to = target.reserve(8 * PAGE)
        flags = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP
        assert await target.start_mremap(8, 8, flags=flags, to=to) == to
        assert await target.start_read(11) == left_behind
        assert await target.start_peek(to + 3 * PAGE) == 12
        assert await target.start_peek(to + 4 * PAGE) == 13
        if kind == "shmem":
            assert await target.call("madvise", to + 6 * PAGE, PAGE, MADV_REMOVE) == 0
            assert await target.start_read(14) == 0
