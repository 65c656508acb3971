"""Dirty tracking: what is written is told once and never lost, on each kind of memory."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.dirty import DirtyRound, DirtyRun, DirtyTracker, merged
from aiouffd.errors import ClosedError, NotSupported, RangeGone, TargetGone
from aiouffd.kernel import calls
from aiouffd.ranges import Range
from aiouffd.removals import Removals
from aiouffd.uffd import Feature, Mode, Userfaultfd
from tests.targets import HUGE, KINDS, MADV_PAGEOUT, PAGE, SMALL_KINDS, Target, until
from tests.uffd_memory import own

MADV_DONTNEED, MADV_FREE, MADV_REMOVE, MADV_HUGEPAGE = 4, 8, 9, 14
PUNCH_HOLE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
PAGES = 16


class Tracked:
    """A target with one mapping, all of it populated with ones, and a tracker that has begun."""

    def __init__(self, target: Target, tracker: DirtyTracker, uffd: Userfaultfd) -> None:
        self.target, self.tracker, self.uffd = target, tracker, uffd
        self.base, self.size = target.base, target.page_size

    def write(self, *pages: int, value: int = 2) -> None:
        for page in pages:
            assert self.target.start_write(page, value).result() == value

    def pages(self, found: DirtyRound) -> list[int]:
        """The pages of a round, in order."""
        return [
            page
            for run in found.runs
            for page in range(run.offset // self.size, (run.offset + run.length) // self.size)
        ]

    def collect(self) -> list[int]:
        return self.pages(self.tracker.collect_now())


@contextmanager
def tracking(
    kind: str = "anon", pages: int = PAGES, *, fill: bool = True, begin: bool = True, **options: Any
) -> Iterator[Tracked]:
    with Target(kind, pages=pages, features=Feature.WP_ASYNC, register=0, **options) as target:
        if fill:
            target.start_fill(target.base, target.length, 1).result()
        with (
            Userfaultfd.adopt(target.take_uffd()) as uffd,
            DirtyTracker(uffd, pid=target.pid, pidfd=target.pidfd) as tracker,
        ):
            assert tracker.add(target.base, target.length, page_size=target.page_size) == 0
            if begin:
                tracker.begin()
            yield Tracked(target, tracker, uffd)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of memory."""
    if request.param.startswith("hugetlb"):
        request.getfixturevalue("huge_pages")(2 * PAGES)
    return str(request.param)


# --- what is written -------------------------------------------------------------------


@pytest.mark.parametrize("fill", [True, False], ids=["populated", "empty"])
async def test_what_is_written_is_told_once(kind: str, fill: bool) -> None:
    """Each write is in the next round, and in no other; reading is no write."""
    with tracking(kind, fill=fill) as tracked:
        tracker = tracked.tracker
        assert tracked.collect() == []
        tracked.write(1, 2, 5, 15)
        assert tracked.target.start_read(8).result() in {0, 1}
        found = await tracker.collect()
        size = tracked.size
        assert found.runs == [
            DirtyRun(0, size, 2 * size),
            DirtyRun(0, 5 * size, size),
            DirtyRun(0, 15 * size, size),
        ]
        assert (found.number, found.bytes) == (2, 4 * size)
        assert found.seconds > 0
        assert found.rate == found.bytes / found.seconds
        tracked.write(2)
        assert tracked.pages(await tracker.collect()) == [2]
        assert (await tracker.collect()).runs == []


@pytest.mark.child
async def test_random_writes_are_what_the_rounds_say(kind: str, seed: int) -> None:
    """Thousands of writes between dozens of rounds: each round is the set of pages written."""
    pages = 2048 if kind in SMALL_KINDS else PAGES
    with tracking(kind, pages) as tracked:
        await write_at_random(tracked, pages, random.Random(seed))


@pytest.mark.child
async def test_random_writes_to_transparent_huge_pages(seed: int) -> None:
    """They are split by the first write: what is told is the small page that was written."""
    pages = 2048
    with tracking(pages=pages, fill=False, begin=False, align=HUGE) as tracked:
        target = tracked.target
        assert target.start_madvise(MADV_HUGEPAGE, 0, pages).result() == 0
        target.start_fill(target.base, target.length, 1).result()
        tracked.tracker.begin()
        await write_at_random(tracked, pages, random.Random(seed))


async def write_at_random(tracked: Tracked, pages: int, chance: random.Random) -> None:
    """Write here and there in four threads, and compare thirty rounds with a model."""
    target, tracker = tracked.target, tracked.tracker
    for number in range(1, 31):
        model: set[int] = set()
        for _ in range(chance.randrange(12)):
            first, step = chance.randrange(pages), chance.randrange(1, 4)
            count = min(chance.randrange(1, 40), -(-(pages - first) // step))
            thread = chance.randrange(4)
            await target.start_number(
                target.at(first), step * target.page_size, count, number, thread=thread
            )
            model.update(range(first, first + count * step, step))
        found = await tracker.collect() if chance.random() < 0.5 else tracker.collect_now()
        assert tracked.pages(found) == sorted(model)
        assert found.number == number


@pytest.mark.child
async def test_no_update_is_lost_to_a_race(kind: str, seed: int) -> None:
    """Threads write while rounds are collected: a copy brought up to date by them is exact."""
    chance = random.Random(seed)
    pages = 512 if kind in SMALL_KINDS else PAGES
    with tracking(kind, pages) as tracked:
        target, tracker = tracked.target, tracked.tracker
        copy = bytearray(target.memory(target.base, target.length))

        def bring(found: DirtyRound) -> None:
            for run in found.runs:
                copy[run.offset : run.offset + run.length] = target.memory(
                    target.base + run.offset, run.length
                )

        step = target.page_size
        for number in range(1, 61):
            under_way = [
                target.start_number(
                    target.at(thread), 4 * step, pages // 4, chance.randrange(1 << 32), thread
                )
                for thread in range(4)
            ]
            while not all(call.done for call in under_way):
                bring(tracker.collect_now() if number % 2 else await tracker.collect())
        bring(tracker.collect_now())
        assert copy == target.memory(target.base, target.length)
        assert tracker.collect_now().runs == []


async def test_regions_are_told_apart() -> None:
    """Any number of regions, also added after the begin; removed ones are not looked at."""
    with tracking(pages=4) as tracked:
        target, tracker = tracked.target, tracked.tracker
        second = target.map(2 * PAGE)
        target.start_fill(second, 2 * PAGE, 1).result()
        assert tracker.add(second, 2 * PAGE) == 1
        tracked.write(3)
        target.start_poke(second, 9).result()
        assert (await tracker.collect()).runs == [
            DirtyRun(0, 3 * PAGE, PAGE),
            DirtyRun(1, 0, PAGE),
        ]
        target.start_poke(second + PAGE, 9).result()
        tracker.remove(0)
        tracked.write(0)
        assert tracker.collect_now().runs == [DirtyRun(1, PAGE, PAGE)]
        with pytest.raises(KeyError):
            tracker.remove(0)
        assert tracker.add(target.base, PAGE) == 2


async def test_pieces_join_without_a_seam() -> None:
    """A run that crosses from one bounded scan into the next is one."""
    pages = (192 << 20) // PAGE
    with tracking(pages=pages, fill=False) as tracked:
        middle = (64 << 20) // PAGE
        tracked.write(middle - 1, middle, middle + 1)
        found = await tracked.tracker.collect()
        assert found.runs == [DirtyRun(0, (middle - 1) * PAGE, 3 * PAGE)]


@pytest.mark.child
async def test_more_runs_than_one_scan_gives() -> None:
    """The kernel's vector is full again and again; nothing is left out."""
    pages = 20_000
    with tracking(pages=pages, fill=False) as tracked:
        await tracked.target.start_number(tracked.base, 2 * PAGE, pages // 2)
        assert tracked.pages(await tracked.tracker.collect()) == list(range(0, pages, 2))


# --- what is removed -------------------------------------------------------------------


@pytest.mark.parametrize("reached", [False, True], ids=["written before", "clean"])
async def test_what_is_removed_is_told(kind: str, reached: bool) -> None:
    """Memory given back reads zero: a change, whether or not the page tables say so."""
    with tracking(kind) as tracked:
        target, size = tracked.target, tracked.size
        if not reached:
            tracked.write(3, 9)
            assert tracked.collect() == [3, 9]
        advice = MADV_REMOVE if kind in {"shmem", "hugetlb"} else MADV_DONTNEED
        assert target.start_madvise(advice, 3, 2).result() == 0
        assert tracked.pages(await tracked.tracker.collect()) == [3, 4]
        assert target.start_read(3).result() == 0
        assert tracked.collect() == []
        if kind in {"shmem", "hugetlb"}:
            done = target.call("fallocate", target.memfd_there, PUNCH_HOLE, 9 * size, size)
            assert done.result() == 0
        else:
            assert target.start_madvise(advice, 9).result() == 0
        assert tracked.collect() == [9]
        assert tracked.collect() == []
        tracked.write(9)  # populated anew, and removed anew
        assert target.start_madvise(advice, 9).result() == 0
        assert tracked.collect() == [9]
        assert tracked.collect() == []


async def test_a_whole_page_table_is_removed() -> None:
    """Where nothing is left the kernel takes the page table away; that is told as well."""
    pages = 2 * HUGE // PAGE
    with tracking(pages=pages, align=HUGE) as tracked:
        half = pages // 2
        assert tracked.target.start_madvise(MADV_DONTNEED, half, half).result() == 0
        assert (await tracked.tracker.collect()).runs == [DirtyRun(0, HUGE, HUGE)]


async def test_shared_memory_that_is_only_unmapped_is_clean() -> None:
    """What its file still has did not change: asked again each round, until it is punched."""
    with tracking("shmem") as tracked:
        target = tracked.target
        assert target.start_madvise(MADV_DONTNEED, 2, 6).result() == 0
        assert tracked.collect() == []
        assert tracked.pages(await tracked.tracker.collect()) == []
        done = target.call("fallocate", target.memfd_there, PUNCH_HOLE, 4 * PAGE, 2 * PAGE)
        assert done.result() == 0
        assert tracked.collect() == [4, 5]
        assert tracked.collect() == []
        assert target.start_read(2).result() == 1


@pytest.mark.child
async def test_freed_lazily() -> None:
    """MADV_FREE changes nothing until a page goes, and then it is told."""
    pages = 256  # the kernel keeps some of those that one processor has freed, in batches
    with tracking(pages=pages) as tracked:
        target = tracked.target
        assert target.start_madvise(MADV_FREE, 0, pages).result() == 0
        assert tracked.collect() == []
        assert target.start_madvise(MADV_PAGEOUT, 0, pages).result() == 0
        found = tracked.pages(await tracked.tracker.collect())
        assert found
        assert found == [page for page, word in enumerate(await target.start_sweep()) if not word]


async def test_a_huge_page_that_comes_and_goes_within_a_round(
    huge_pages: Callable[[int], None],
) -> None:
    """Its bytes may be in the file still, where no page table says so."""
    huge_pages(PAGES)
    with tracking("hugetlb", fill=False) as tracked:
        tracked.write(3)
        assert tracked.target.start_madvise(MADV_DONTNEED, 3).result() == 0
        assert tracked.collect() == [3]
        assert tracked.target.start_read(3).result() == 2
        assert tracked.collect() == []


async def test_a_removal_that_is_read_again_stays_unseen() -> None:
    """The stated limit on memory with a file: no trace of it is left in the page tables."""
    with tracking("shmem") as tracked:
        assert tracked.target.start_madvise(MADV_REMOVE, 3).result() == 0
        assert tracked.target.start_read(3).result() == 0
        assert tracked.collect() == []
    with tracking("anon") as tracked:  # private anonymous memory has no such limit
        assert tracked.target.start_madvise(MADV_DONTNEED, 3).result() == 0
        assert tracked.target.start_read(3).result() == 0
        assert tracked.collect() == [3]


async def test_holes_may_be_left_out() -> None:
    """Then the file of shared memory is not needed, and what it lost is not told."""
    with tracking("shmem", begin=False) as tracked:
        tracked.tracker.remove(0)
        tracked.tracker.add(tracked.base, PAGES * PAGE, holes=False)
        tracked.tracker.begin()
        assert tracked.target.start_madvise(MADV_REMOVE, 3).result() == 0
        tracked.write(5)
        assert tracked.pages(await tracked.tracker.collect()) == [5]


async def test_a_process_with_many_mappings() -> None:
    """Their list is read in a thread; what is tracked is found among them."""
    with tracking() as tracked:
        target = tracked.target
        for page in range(1200):
            target.call("mmap", 0, PAGE, page % 2 * 2 + 1, 0x22, -1, 0).result()
        for _ in range(3):
            tracked.write(3)
            assert tracked.pages(await tracked.tracker.collect()) == [3]
        assert target.start_munmap(4).result() == 0
        with pytest.raises(RangeGone):
            await tracked.tracker.collect()


async def test_a_tracker_that_is_dropped_warns() -> None:
    """It holds descriptors, and protection that nobody collects."""
    with tracking() as tracked:
        tracker = DirtyTracker(tracked.uffd, pid=tracked.target.pid)
        with pytest.warns(ResourceWarning, match="never closed"):
            del tracker


# --- no round is lost ------------------------------------------------------------------


async def test_what_a_cancelled_round_found_is_in_the_next() -> None:
    """Each page that a cancelled walk has cleared is told all the same, once."""
    pages = (192 << 20) // PAGE
    with tracking(pages=pages, fill=False) as tracked:
        last = pages - 1
        tracked.write(0, 1, last)
        walk = asyncio.create_task(tracked.tracker.collect())
        await asyncio.sleep(0)  # it has scanned its first piece
        walk.cancel()
        with pytest.raises(asyncio.CancelledError):
            await walk
        tracked.write(1, 2)
        found = await tracked.tracker.collect()
        assert found.runs == [DirtyRun(0, 0, 3 * PAGE), DirtyRun(0, last * PAGE, PAGE)]
        assert found.number == 1


async def test_one_collects_at_a_time() -> None:
    """A second collector, who would share the pages with the first, is refused."""
    with tracking(pages=(128 << 20) // PAGE, fill=False) as tracked:
        walk = asyncio.create_task(tracked.tracker.collect())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="collecting already"):
            tracked.tracker.collect_now()
        with pytest.raises(RuntimeError, match="between two rounds"):
            tracked.tracker.remove(0)
        await walk


async def test_the_loop_turns_while_a_large_region_is_walked() -> None:
    """Other tasks have a turn for each 64 MiB."""
    length = 8 << 30
    with tracking(pages=length // PAGE, fill=False) as tracked:
        tracked.write(0, length // PAGE - 1)
        turns = 0
        walk = asyncio.create_task(tracked.tracker.collect())
        while not walk.done():
            await asyncio.sleep(0)
            turns += 1
        assert (await walk).bytes == 2 * PAGE
        assert turns >= 128


async def test_rounds_come_until_the_tracker_is_closed() -> None:
    """Numbers count up, and closing ends the iteration at once, whatever the interval."""
    with tracking() as tracked:
        seen: list[list[int]] = []
        numbers = []
        async for found in tracked.tracker.rounds(0.001):
            numbers.append(found.number)
            seen.append(tracked.pages(found))
            if len(seen) == 3:
                break
            tracked.write(len(seen))
        assert (numbers, seen) == ([1, 2, 3], [[], [1], [2]])

        async def wait() -> list[DirtyRound]:
            return [found async for found in tracked.tracker.rounds(3600.0)]

        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0)
        tracked.tracker.close()
        async with asyncio.timeout(10):
            assert await waiting == []
        with pytest.raises(ValueError, match="negative"):
            await anext(tracked.tracker.rounds(-1))


async def test_closing_in_the_middle_of_a_round() -> None:
    """The collector is told; descriptors are closed when it has let go of them."""
    with tracking(pages=(128 << 20) // PAGE, fill=False) as tracked:
        walk = asyncio.create_task(tracked.tracker.collect())
        await asyncio.sleep(0)
        tracked.tracker.close()
        with pytest.raises(ClosedError):
            await walk


async def test_closing_while_a_thread_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its descriptors stay open until it has ended: their numbers could be another's by then."""
    entered, go = threading.Event(), threading.Event()
    look = Removals.look

    def slow_look(removals: Removals) -> list[Range]:
        entered.set()
        assert go.wait(30)
        return look(removals)

    with tracking("shmem") as tracked:
        monkeypatch.setattr(Removals, "look", slow_look)
        walk = asyncio.create_task(tracked.tracker.collect())
        await until(entered.is_set, "it looks for holes")
        tracked.tracker.close()
        go.set()
        with pytest.raises(ClosedError):
            await walk


# --- the life of the memory ------------------------------------------------------------


async def test_closing_takes_the_protection_off(kind: str) -> None:
    """The memory is nobody's any more, and its pages have no marks."""
    with tracking(kind) as tracked:
        target = tracked.target
        assert "uw" in target.vm_flags(target.base)
        assert target.is_wp(1)
        tracked.tracker.close()
        tracked.tracker.close()
        assert "uw" not in target.vm_flags(target.base)
        assert not target.is_wp(1)
        for use in (tracked.tracker.begin, tracked.tracker.collect_now):
            with pytest.raises(ClosedError):
                use()
        with pytest.raises(ClosedError):
            tracked.tracker.add(target.base, PAGE)
        assert "closed" in repr(tracked.tracker)


async def test_a_forked_child_is_not_tracked_and_its_parent_still_is() -> None:
    """What the child writes is its own; the parent's copies after the fork are told."""
    with tracking(threads=1) as tracked:
        tracked.write(1)
        child = tracked.target.fork_now()
        assert child.start_write(7, 3).result() == 3
        tracked.write(9)
        assert tracked.collect() == [1, 9]
        assert "uw" not in child.vm_flags(child.base)


async def test_memory_that_moves_is_an_error() -> None:
    """mremap ends the tracking: said in each round until the region is removed."""
    with tracking() as tracked:
        target, tracker = tracked.target, tracked.tracker
        other = target.map(PAGE)
        tracker.add(other, PAGE)
        target.start_poke(other, 1).result()
        tracked.write(1)
        assert target.start_mremap(4, 4, flags=3, to=target.reserve(4 * PAGE)).result() > 0
        for _ in range(2):
            with pytest.raises(RangeGone) as caught:
                await tracker.collect()
            assert (caught.value.start, caught.value.length) == (tracked.base, PAGES * PAGE)
        with pytest.raises(RangeGone):
            tracker.collect_now()
        tracker.remove(0)
        assert tracker.collect_now().runs == [DirtyRun(1, 0, PAGE)]


async def test_memory_that_grows_in_place() -> None:
    """The new tail is not part of the region, and may be added as another."""
    with tracking(pages=2 * PAGES) as tracked:
        target, tracker = tracked.target, tracked.tracker
        tracker.remove(0)
        assert target.start_munmap(PAGES, PAGES).result() == 0
        tracker.add(target.base, PAGES * PAGE)
        assert target.start_mremap(0, PAGES, PAGES + 4, flags=0).result() == target.base
        tracked.write(1, PAGES, PAGES + 1)
        assert (await tracker.collect()).runs == [DirtyRun(1, PAGE, PAGE)]
        tracker.add(target.at(PAGES), 4 * PAGE)
        tracked.write(PAGES + 1)
        assert (await tracker.collect()).runs == [DirtyRun(2, PAGE, PAGE)]


@pytest.mark.parametrize("page", [0, 4, PAGES - 2])
async def test_memory_that_is_mapped_anew_is_an_error(page: int) -> None:
    """munmap, and then something else in the same place."""
    with tracking() as tracked:
        target = tracked.target
        assert target.start_munmap(page, 2).result() == 0
        with pytest.raises(RangeGone):
            tracked.tracker.collect_now()
        where = target.at(page)
        assert target.call("mmap", where, 2 * PAGE, 3, 0x32, -1, 0).result() == where
        with pytest.raises(RangeGone):
            tracked.tracker.collect_now()


async def test_splitting_a_mapping_changes_nothing() -> None:
    """mprotect makes several mappings of one; all of them are tracked on."""
    with tracking() as tracked:
        target = tracked.target
        assert target.call("mprotect", target.at(4), PAGE, 1).result() == 0
        tracked.write(3, 5)
        assert tracked.collect() == [3, 5]


@pytest.mark.parametrize("end", ["exit", "exec"])
async def test_a_target_that_is_gone(end: str) -> None:
    """Every call says so, and closing is quiet."""
    with tracking() as tracked:
        target, tracker = tracked.target, tracked.tracker
        tracked.write(1)
        if end == "exit":
            target.kill()
            target.reap()
        else:
            await target.start_exec()
        with pytest.raises(TargetGone):
            await tracker.collect()
        with pytest.raises(TargetGone):
            tracker.collect_now()
        with pytest.raises(TargetGone):
            tracker.add(target.base + target.length, PAGE)


def test_a_target_that_never_was() -> None:
    """A pid without a process, and one whose pidfd is another's."""
    with own(Feature.WP_ASYNC, Mode.WP) as mine:
        with Target(open_uffd=False) as target:
            pid = target.pid
            with pytest.raises(TargetGone):
                DirtyTracker(mine.uffd, pid="self", pidfd=target.pidfd)
        with pytest.raises(TargetGone):
            DirtyTracker(mine.uffd, pid=pid)


# --- what cannot be --------------------------------------------------------------------


def test_ones_own_memory() -> None:
    """``self`` is tracked like any other."""
    with own(Feature.WP_ASYNC, Mode.WP) as mine, DirtyTracker(mine.uffd) as tracker:
        tracker.add(mine.base, 8 * PAGE)
        tracker.begin()
        mine.memory[2 * PAGE] = 1
        assert tracker.collect_now().runs == [DirtyRun(0, 2 * PAGE, PAGE)]


def test_a_userfaultfd_without_the_feature() -> None:
    """Says what is missing, since when there is it, and who has to ask for it."""
    with own() as mine, pytest.raises(NotSupported, match=r"WP_ASYNC.*Linux 6\.7"):
        DirtyTracker(mine.uffd)


def test_a_kernel_without_pagemap_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOTTY is said at once, not in the first round."""

    def refuse(fd: int, argument: bytearray) -> int:
        raise OSError(errno.ENOTTY, "no such ioctl")

    with own(Feature.WP_ASYNC, Mode.WP) as mine:
        monkeypatch.setattr(calls, "pagemap_scan", refuse)
        with pytest.raises(NotSupported, match="PAGEMAP_SCAN"):
            DirtyTracker(mine.uffd)


def test_bad_ranges() -> None:
    """Misaligned, empty, overlapping; and another process's memory at the same address."""
    with tracking(begin=False) as tracked:
        tracker, base = tracked.tracker, tracked.base
        for start, length in ((base + 1, PAGE), (base, 0), (base, PAGE + 1)):
            with pytest.raises(ValueError, match="whole pages"):
                tracker.add(start, length)
        with pytest.raises(ValueError, match="page size"):
            tracker.add(base, PAGE, page_size=3 * PAGE)
        with pytest.raises(ValueError, match="overlaps region 0"):
            tracker.add(base + 3 * PAGE, 32 * PAGE)
        with pytest.raises(RuntimeError, match="begin"):
            tracker.collect_now()
        tracker.begin()
        with pytest.raises(RuntimeError, match="begun before"):
            tracker.begin()


def test_the_userfaultfd_of_another_process() -> None:
    """A fork has other memory at the same addresses: refused, for it would never be dirty."""
    with tracking(begin=False) as tracked:
        child = tracked.target.fork_now()
        with DirtyTracker(tracked.uffd, pid=child.pid) as tracker:
            tracked.tracker.remove(0)
            with pytest.raises(ValueError, match="another's"):
                tracker.add(tracked.base, PAGE)
        assert "uw" not in tracked.target.vm_flags(tracked.base)


@pytest.mark.root
def test_a_stranger_may_not_look() -> None:
    """Another user's process is refused, with the remedy."""
    program = (
        "import os, sys\n"
        "from aiouffd.dirty import DirtyTracker\n"
        "from aiouffd.errors import NotSupported\n"
        "from aiouffd.uffd import Feature, Userfaultfd\n"
        "uffd = Userfaultfd.open(Feature.WP_ASYNC)\n"
        "os.setuid(65534)\n"
        "try:\n"
        "    DirtyTracker(uffd, pid=int(sys.argv[1]))\n"
        "except NotSupported as error:\n"
        "    print(error)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", program, str(os.getpid())],
        check=True,
        timeout=30,
        stdout=subprocess.PIPE,
    ).stdout
    assert b"CAP_SYS_PTRACE" in output


@pytest.mark.root
def test_the_file_of_shared_memory_is_found_or_asked_for() -> None:
    """Without privilege: among the process's descriptors, or given; else says what to do."""
    program = (
        "import ctypes, mmap, os\n"
        "from aiouffd.dirty import DirtyTracker\n"
        "from aiouffd.errors import NotSupported\n"
        "from aiouffd.uffd import Feature, Userfaultfd\n"
        "os.setuid(65534)\n"
        "ctypes.CDLL(None).prctl(4, 1)\n"  # PR_SET_DUMPABLE
        "fd = os.memfd_create('shared')\n"
        "os.ftruncate(fd, 1 << 16)\n"
        "memory = mmap.mmap(fd, 1 << 16)\n"  # has a descriptor of its own
        "start = ctypes.addressof(ctypes.c_char.from_buffer(memory))\n"
        "uffd = Userfaultfd.open(Feature.WP_ASYNC, user_mode_only=True)\n"
        "with DirtyTracker(uffd) as tracker:\n"
        "    tracker.add(start, 1 << 16)\n"
        "for name in os.listdir('/proc/self/fd'):\n"
        "    path = f'/proc/self/fd/{name}'\n"
        "    if int(name) != fd and 'memfd:shared' in os.path.realpath(path):\n"
        "        os.close(int(name))\n"
        "with DirtyTracker(uffd) as tracker:\n"
        "    tracker.add(start, 1 << 16, file=fd)\n"
        "os.close(fd)\n"
        "with DirtyTracker(uffd) as tracker:\n"
        "    try:\n"
        "        tracker.add(start, 1 << 16)\n"
        "    except NotSupported as error:\n"
        "        print(error)\n"
        "    tracker.add(start, 1 << 16, holes=False)\n"
        "    tracker.begin()\n"
        "    memory[1 << 12] = 1\n"
        "    print(tracker.collect_now().runs)\n"
        "os._exit(0)\n"
    )
    output = subprocess.run(
        [sys.executable, "-u", "-c", program],
        check=True,
        timeout=30,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    first, second = output.splitlines()
    assert "file=" in first
    assert second == "[DirtyRun(region=0, offset=4096, length=4096)]"


# --- runs ------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(1, 6))))
def test_merged_runs_are_the_same_pages(runs: list[tuple[int, int, int]]) -> None:
    """In order, none touching the next, and the same pages as before."""
    joined = merged([DirtyRun(*run) for run in runs])

    def pages(runs: list[tuple[int, int, int]]) -> set[tuple[int, int]]:
        return {(region, at) for region, start, n in runs for at in range(start, start + n)}

    assert pages(list(joined)) == pages(runs)
    assert all(
        (one.region, one.offset + one.length) < (two.region, two.offset)
        for one, two in itertools.pairwise(joined)
    )
