"""Region: filling ahead of demand, changing and dropping, on every kind of memory."""

from __future__ import annotations

import asyncio

import pytest

from aiouffd import (
    Action,
    ClosedError,
    Continue,
    Copy,
    Feature,
    Mode,
    PageFault,
    Resolution,
    ResolutionRefused,
    TargetGone,
    Unprotect,
)
from tests.serving import LAYOUT, Gate, from_image, image, serving, within
from tests.targets import HUGE, KINDS, MADV_PAGEOUT, PAGE, SMALL_KINDS, Signal, until

WP_FEATURES = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM


@pytest.fixture
def pages(request: pytest.FixtureRequest) -> int:
    """How many pages a test of a kind has; huge ones are reserved first."""
    kind = request.node.callspec.params["kind"]
    if not kind.startswith("hugetlb"):
        return 32
    request.getfixturevalue("huge_pages")(8)
    return 4


@pytest.mark.parametrize("kind", KINDS)
async def test_missing_pages_of_every_kind(kind: str, pages: int) -> None:
    """Each page is asked for once, and holds the image in each of its words."""
    asked: list[int] = []

    async def note(fault: PageFault) -> Resolution:
        asked.append(fault.offset // fault.length)
        assert fault.missing
        return await from_image(fault)

    async with serving(note, kind, pages) as served:
        target = served.target
        for page in reversed(range(pages)):
            assert await target.start_write(page, 7) == 7
        words = await target.start_words(target.base + 8, target.page_size, pages)
        assert words == [page + 1 for page in range(pages)]
        assert asked == list(reversed(range(pages)))


@pytest.mark.parametrize("kind", KINDS)
async def test_writes_to_protected_pages_of_every_kind(kind: str, pages: int) -> None:
    """A page comes protected, is read freely, and its first write is seen."""
    written: list[int] = []

    async def track(fault: PageFault) -> Resolution:
        if not fault.wp:
            return Copy(image(fault.offset, fault.length, fault.length), protect=True)
        assert fault.write
        written.append(fault.offset // fault.length)
        return Unprotect()

    modes = Mode.MISSING | Mode.WP
    async with serving(track, kind, pages, features=WP_FEATURES, modes=modes) as served:
        target = served.target
        assert await target.start_sweep() == [page + 1 for page in range(pages)]
        assert not written
        for page in (1, 3, 1):
            assert await target.start_write(page, 7) == 7
        assert written == [1, 3]
        served.uffd.writeprotect(target.base, target.length)
        assert await target.start_write(1, 8) == 8
        assert written == [1, 3, 1]


@pytest.mark.parametrize("kind", ["shmem", "shmem-private", "hugetlb"])
async def test_minor_faults(kind: str, pages: int) -> None:
    """Pages that the page cache has are mapped when they are touched; holes are missing."""
    seen: list[tuple[str, int]] = []

    async def both(fault: PageFault) -> Resolution:
        seen.append((fault.kind, fault.offset // fault.length))
        return Continue() if fault.minor else await from_image(fault)

    async with serving(both, kind, pages, modes=Mode.MISSING | Mode.MINOR) as served:
        target = served.target
        with target.alias() as alias:
            alias[target.page_size] = 77
        assert await target.start_read(1) == 77
        assert await target.start_read(2) == 3
        assert seen == [("minor", 1), ("missing", 2)]


# --- filling ahead ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_a_fill_brings_everything(kind: str, pages: int) -> None:
    """No fault afterwards."""
    gate = Gate()
    async with serving(gate, kind, pages) as served:
        target = served.target
        size = target.page_size
        assert await served.region.fill(0, image(0, target.length, size)) == target.length
        assert await target.start_sweep() == [page + 1 for page in range(pages)]
        assert not gate.faults
        assert served.pager.counters.filled_bytes == target.length


@pytest.mark.parametrize("present", [(0,), (2,), (7,), (3, 4), (0, 7), tuple(range(8))])
async def test_a_fill_steps_over_what_is_there(present: tuple[int, ...]) -> None:
    """Present pages keep their bytes, absent ones arrive, and nobody is left asleep."""
    gate = Gate()
    async with serving(gate, pages=8, threads=8) as served:
        target = served.target
        for page in present:
            served.uffd.copy(target.at(page), b"\xee" * PAGE)
        absent = [page for page in range(8) if page not in present]
        touches = [target.start_read(page, page) for page in absent]
        await until(lambda: len(gate.faults) == len(absent), "the absent pages are waited for")
        filled = await served.region.fill(0, image(0, 8 * PAGE))
        assert filled == len(absent) * PAGE
        assert [await touch for touch in touches] == [page + 1 for page in absent]
        for page in present:
            assert await target.start_read(page) == 0xEE
        gate.let_go()


async def test_a_fill_follows_memory_that_moved() -> None:
    """Offsets belong to memory, not to addresses."""
    async with serving(features=LAYOUT) as served:
        target = served.target
        to = target.reserve(16 * PAGE)
        assert await target.start_mremap(8, 16, flags=3, to=to) == to
        assert await served.region.fill(0, image(0, target.length)) == target.length
        words = await target.start_words(to, PAGE, 16)
        assert words == [9 + page for page in range(16)]
        assert await target.start_read(7) == 8
        assert len(served.region.ranges) == 3
        assert served.pager.counters.faults == 0


async def test_a_fill_can_leave_pages_protected() -> None:
    """protect=True arms what it installs."""
    written: list[int] = []

    async def track(fault: PageFault) -> Resolution:
        written.append(fault.offset)
        return Unprotect()

    modes = Mode.MISSING | Mode.WP
    async with serving(track, features=WP_FEATURES, modes=modes) as served:
        await served.region.fill(0, image(0, 64 * PAGE), protect=True)
        assert await served.target.start_write(9, 7) == 7
        assert written == [9 * PAGE]


async def test_a_fill_refuses_parts_of_pages() -> None:
    """ValueError, before anything is done."""
    async with serving() as served:
        with pytest.raises(ValueError, match="whole pages"):
            await served.region.fill(0, bytes(100))
        with pytest.raises(ValueError, match="whole pages"):
            await served.region.fill(100, bytes(PAGE))
        assert served.pager.counters.filled_bytes == 0


async def test_a_fill_ends_with_its_target_or_its_pager() -> None:
    """TargetGone, ClosedError: a fill under way does not go on for nobody."""
    async with serving(pages=8192) as served:
        data = image(0, served.target.length)
        fill = asyncio.create_task(served.region.fill(0, data))
        await until(lambda: served.pager.counters.filled_bytes, "the fill has begun")
        served.target.kill()
        with pytest.raises((TargetGone, ClosedError)):
            await within(fill)
    async with serving(pages=8192) as served:
        fill = asyncio.create_task(served.region.fill(0, data))
        await until(lambda: served.pager.counters.filled_bytes, "the fill has begun")
        await served.pager.aclose()
        with pytest.raises(ClosedError):
            await within(fill)
        # What was not filled is poisoned, and what was is there.
        words = await served.target.start_sweep()
        there = words.index(None)
        assert words[:there] == [page + 1 for page in range(there)]
        assert set(words[there:]) == {None}


# --- changing and dropping -------------------------------------------------------------


async def test_another_handler_serves_from_now_on() -> None:
    """By change() or by assignment; a fault in flight keeps its own."""

    async def other(fault: PageFault) -> Resolution:
        return Copy(b"\x09" * PAGE)

    gate = Gate()
    async with serving(gate) as served:
        target = served.target
        touch = target.start_read(1, 0)
        await until(lambda: gate.faults, "the first handler is asked")
        served.region.change(handler=other)
        assert await target.start_read(2, 1) == 9
        gate.let_go()
        assert await touch == 2
        served.region.handler = from_image
        assert await target.start_read(3) == 4


async def test_modes_can_be_added_and_dropped() -> None:
    """Write protection comes and goes, without a thread asleep or a page lost."""
    seen: list[str] = []

    async def any_kind(fault: PageFault) -> Resolution:
        seen.append(fault.kind)
        return Unprotect() if fault.wp else await from_image(fault)

    async with serving(any_kind, features=WP_FEATURES) as served:
        target, region = served.target, served.region
        assert await target.start_read(1) == 2
        region.change(modes=Mode.MISSING | Mode.WP)
        served.uffd.writeprotect(target.base, target.length)
        assert await target.start_write(1, 7) == 7
        served.uffd.writeprotect(target.base, target.length)
        region.change(modes=Mode.MISSING)
        assert await target.start_write(1, 8) == 8
        assert await target.start_read(2) == 3
        assert seen == ["missing", "wp", "missing"]
        with pytest.raises(ValueError, match="at least one mode"):
            region.change(modes=0)
        with pytest.raises(ResolutionRefused):
            region.change(modes=Mode.MISSING | Mode.MINOR)
        assert region.modes == Mode.MISSING


async def test_dropping_missing_gives_zeros() -> None:
    """What change(modes=WP) says it does."""
    modes = Mode.MISSING | Mode.WP
    async with serving(features=WP_FEATURES, modes=modes) as served:
        assert await served.target.start_read(1) == 2
        served.region.change(modes=Mode.WP)
        assert await served.target.start_read(2) == 0
        assert await served.target.start_read(1) == 2


@pytest.mark.parametrize("kind", SMALL_KINDS)
async def test_a_dropped_region_is_settled(kind: str, pages: int) -> None:
    """Missing pages are poisoned, or zero if asked; waiting threads go on; others live."""
    gate = Gate()
    async with serving(gate, kind, pages, leave_out=16) as served:
        target = served.target
        other = served.pager.register(target.base, 16 * PAGE, from_image)
        waiting = target.start_read(20, 0)
        await until(lambda: gate.faults, "the handler is asked")
        await within(served.region.drop())
        assert isinstance(await waiting, Signal)
        assert isinstance(await target.start_read(21), Signal)
        assert await target.start_read(2) == 3
        await within(other.drop(Action.ZERO))
        assert await target.start_read(3) == 0
        assert not served.pager.regions
        again = served.pager.register(target.base, 16 * PAGE, from_image)
        if kind != "shmem":  # there the zeros are in the file now
            assert await target.start_read(4) == 5
        assert again.ranges == [(again.ranges[0][0], 0)]


async def test_a_region_says_what_it_is() -> None:
    """For logs: name, range, modes."""
    async with serving() as served:
        region = served.pager.register(served.target.map(PAGE), PAGE, from_image, name="spare")
        assert "spare" in repr(region)
        assert "MISSING" in repr(region)


async def test_a_page_that_was_swapped_out_is_no_fault() -> None:
    """Page-out is the kernel's own business."""
    async with serving(features=LAYOUT) as served:
        target = served.target
        assert await target.start_write(3, 9) == 9
        assert await target.start_madvise(MADV_PAGEOUT, page=3) == 0
        assert await target.start_read(3) == 9
        assert served.pager.counters.faults == 1
        assert HUGE == 2 << 20
