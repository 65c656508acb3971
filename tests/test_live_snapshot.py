"""Live snapshots: of one instant, though the process never stops; and what they cannot save."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from aiouffd import live_snapshot, protected_memory
from aiouffd.errors import NotSupported, SourceError, TargetGone
from aiouffd.image.sparse import SparseWriter
from aiouffd.kernel import calls
from aiouffd.live_snapshot import FEATURES, LiveSnapshot, Stretch, take_live_snapshot
from aiouffd.uffd import Feature, Userfaultfd
from tests.targets import KINDS, PAGE, SMALL_KINDS, Target, TargetLate, until
from tests.uffd_memory import own

MADV_DONTNEED, MADV_REMOVE = 4, 9
PUNCH_HOLE = 3


class Running:
    """A target whose snapshots can be taken."""

    def __init__(self, target: Target, uffd: Userfaultfd, path: Path) -> None:
        self.target, self.uffd, self.path = target, uffd, path

    @property
    def stretch(self) -> Stretch:
        return Stretch(self.target.base, self.target.length, 0, self.target.page_size)

    async def snapshot(self, *stretches: Stretch) -> LiveSnapshot:
        return await take_live_snapshot(
            self.uffd,
            stretches or [self.stretch],
            self.path,
            pid=self.target.pid,
            pidfd=self.target.pidfd,
        )

    def words(self) -> list[int]:
        """The first u64 of each page of the image."""
        return words(self.path.read_bytes(), self.target.page_size)

    def is_free(self) -> bool:
        """Whether nothing is protected any more."""
        flags = self.target.vm_flags(self.target.base)
        return "uw" not in flags and not any(
            self.target.is_wp(page) for page in range(self.target.pages)
        )


def words(data: bytes, step: int) -> list[int]:
    return [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), step)]


@asynccontextmanager
async def running(
    path: Path, kind: str = "anon", pages: int = 256, *, features: int = FEATURES, **options: Any
) -> AsyncIterator[Running]:
    features |= Feature.WP_HUGETLBFS_SHMEM
    with (
        Target(kind, pages=pages, features=features, register=0, **options) as target,
        Userfaultfd.adopt(target.take_uffd()) as uffd,
    ):
        yield Running(target, uffd, path / "image")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of memory."""
    if request.param.startswith("hugetlb"):
        request.getfixturevalue("huge_pages")(24)
    return str(request.param)


def violations(slots: list[int]) -> int:
    """Count the slots that do not hold the last number that was theirs at one instant.

    Numbers are written one after the other, whichever thread's turn it is: if the highest is
    there then all before it are, and none after it.
    """
    last, count = max(slots), len(slots)
    return sum(value != max(last - (last - slot) % count, 0) for slot, value in enumerate(slots))


def test_violations_are_found() -> None:
    """What the proof rests on: one write too many or too few is seen."""
    count = 8
    for last in range(2 * count, 4 * count):
        slots = [last - (last - slot) % count for slot in range(count)]
        assert violations(slots) == 0
        for slot in range(count):
            torn = slots.copy()
            torn[slot] -= count  # a write is missing; only the last may be
            assert bool(violations(torn)) == (slots[slot] != last)
            torn[slot] += 2 * count  # a write from later on; only the next may be
            assert bool(violations(torn)) == (torn[slot] != last + 1)


@pytest.mark.child
async def test_it_is_of_one_instant(tmp_path: Path, kind: str) -> None:
    """Four threads never stop; what they have written is cut off at one number, exactly."""
    pages = 2048 if kind in SMALL_KINDS else 16
    async with running(tmp_path, kind, pages) as it:
        target = it.target
        counting = [target.start_count(thread) for thread in range(4)]
        await until(lambda: words(target.memory(target.base, 8), 8)[0] > pages, "all is written")
        last = 0
        for _ in range(3):
            taken = await it.snapshot()
            slots = it.words()
            assert violations(slots) == 0
            assert max(slots) > last
            last = max(slots)
            assert not any(call.done for call in counting)
            assert it.is_free()
            assert taken.size == target.length == it.path.stat().st_size
            assert taken.written_bytes == (target.length if kind in SMALL_KINDS else pages << 16)
            assert 0 < taken.protect_seconds < taken.seconds
            assert taken.longest_wait_seconds < taken.seconds
            assert not taken.held
        target.stop()
        assert sum([await call for call in counting]) >= last


@pytest.mark.child
async def test_a_plain_copy_is_not(tmp_path: Path) -> None:
    """The same threads, read while they run: some of the numbers are from later than others."""
    async with running(tmp_path, pages=2048) as it:
        target = it.target
        for thread in range(4):
            target.start_count(thread)
        await until(lambda: words(target.memory(target.base, 8), 8)[0] > 2048, "all is written")
        tries = [words(target.memory(target.base, target.length), PAGE) for _ in range(20)]
        assert any(violations(slots) for slots in tries)
        await target.stop()


async def test_the_image_is_the_memory(tmp_path: Path, kind: str, seed: int) -> None:
    """Byte for byte; what was never touched is a hole, and is not touched by the snapshot."""
    rng = random.Random(seed)
    pages = 4096 if kind in SMALL_KINDS else 16
    async with running(tmp_path, kind, pages) as it:
        target, size = it.target, it.target.page_size
        expected = bytearray(target.length)
        for page in rng.sample(range(pages), pages // 8):
            word = rng.randrange(1, 2**64)
            at = page * size + 8 * rng.randrange(size // 8)
            await target.start_poke64(target.base + at, word)
            expected[at : at + 8] = word.to_bytes(8, "little")
        present = [target.is_present(page) for page in range(pages)]
        taken = await it.snapshot()
        assert it.path.read_bytes() == expected
        assert it.path.stat().st_blocks * 512 <= taken.written_bytes + (1 << 16)
        assert taken.written_bytes < target.length or kind.startswith("hugetlb")
        if kind in {"anon", "hugetlb-private"}:
            assert [target.is_present(page) for page in range(pages)] == present
        elif kind == "shmem":
            assert os.fstat(target.memfd).st_blocks * 512 == sum(present) * size


async def test_a_mark_may_be_a_page_where_there_is_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then everything is read."""
    swaps = tmp_path / "swaps"
    swaps.write_text("Filename Type Size Used Priority\n/dev/sda2 partition 1 1 -2\n")
    monkeypatch.setattr(protected_memory, "_SWAPS", swaps)
    async with running(tmp_path) as it:
        await it.target.start_number(it.target.base, 3 * PAGE, 80)
        await it.snapshot()
        assert it.path.read_bytes() == it.target.memory(it.target.base, it.target.length)
        assert sum(it.words()) == sum(range(1, 81))


async def test_a_kernel_without_pagemap_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is said before anybody waits."""

    def refuse(fd: int, argument: bytearray) -> int:
        raise OSError(errno.ENOTTY, "no such ioctl")

    async with running(tmp_path) as it:
        monkeypatch.setattr(calls, "pagemap_scan", refuse)
        with pytest.raises(NotSupported, match=r"PAGEMAP_SCAN.*Linux 6\.7"):
            await it.snapshot()
        assert "uw" not in it.target.vm_flags(it.target.base)


async def test_a_fork_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child is free to write, and the image is its parent's."""
    held = Held(monkeypatch)
    async with running(tmp_path, pages=1024, threads=1) as it:
        target = it.target
        await target.start_number(target.base, PAGE, 1024)
        snapshot = asyncio.create_task(it.snapshot())
        await held.reached.wait()
        child = await target.fork()
        assert await child.start_write(900, 77) == 77
        assert await target.start_write(901, 99) == 99
        held.go.set()
        await snapshot
        assert it.words() == list(range(1, 1025))
        assert it.is_free()


async def test_stretches_have_places(tmp_path: Path) -> None:
    """Several stretches, in any order, with a gap between them in the image."""
    async with running(tmp_path, pages=8) as it:
        target = it.target
        second = target.map(4 * PAGE)
        await target.start_fill(target.base, 8 * PAGE, 1)
        await target.start_fill(second, 4 * PAGE, 2)
        await it.snapshot(Stretch(target.base, 8 * PAGE, 8 * PAGE), Stretch(second, 4 * PAGE, PAGE))
        image = b"\0" * PAGE + b"\2" * 4 * PAGE + b"\0" * 3 * PAGE + b"\1" * 8 * PAGE
        assert it.path.read_bytes() == image


# --- the instant, step by step ---------------------------------------------------------


class Held:
    """Holds a snapshot up at its first write to the file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go = asyncio.Event(), asyncio.Event()
        put = SparseWriter.put

        async def hold(writer: SparseWriter, offset: int, data: Any) -> None:
            self.reached.set()
            await self.go.wait()
            await put(writer, offset, data)

        monkeypatch.setattr(SparseWriter, "put", hold)


async def test_what_is_written_after_the_instant_is_not_in_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writers go on in the middle of it, on pages that were there and on pages that were not."""
    pages = 1024 if kind in SMALL_KINDS else 16
    held = Held(monkeypatch)
    async with running(tmp_path, kind, pages) as it:
        target = it.target
        await target.start_number(target.base, target.page_size, pages // 2)
        snapshot = asyncio.create_task(it.snapshot())
        await held.reached.wait()
        for page in (pages // 2 - 1, pages - 1):  # saved last; never populated
            assert await target.start_write(page, 99) == 99
        held.go.set()
        taken = await snapshot
        assert it.words() == [page + 1 if page < pages // 2 else 0 for page in range(pages)]
        assert taken.demand_bytes > 0
        assert 0 < taken.longest_wait_seconds < taken.seconds
        assert (await target.start_sweep())[-1] == 99


async def test_what_is_removed_while_it_protects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has lost its protection: everything is protected once more, and that is the instant."""
    writeprotect, passes = Userfaultfd.writeprotect, 0
    async with running(tmp_path, pages=64) as it:
        target = it.target
        await target.start_number(target.base, PAGE, 64)

        def remove_behind(uffd: Userfaultfd, start: int, length: int) -> None:
            nonlocal passes
            writeprotect(uffd, start, length)
            passes += 1
            if passes == 1:
                removal = target.start_madvise(MADV_DONTNEED, 40, 2)
                while not removal.done:
                    uffd.read()
                assert target.start_write(41, 7).result() == 7

        monkeypatch.setattr(Userfaultfd, "writeprotect", remove_behind)
        await it.snapshot()
        assert it.words() == [{40: 0, 41: 7}.get(page, page + 1) for page in range(64)]
        assert passes == 2


@pytest.mark.parametrize("kind", ["anon", "shmem"])
async def test_what_is_removed_after_the_instant_is_in_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who gives memory back, and who writes meanwhile, waits until everything is saved."""
    held = Held(monkeypatch)
    async with running(tmp_path, kind, 1024) as it:
        target = it.target
        await target.start_number(target.base, PAGE, 1024)
        snapshot = asyncio.create_task(it.snapshot())
        await held.reached.wait()
        advice = MADV_REMOVE if kind == "shmem" else MADV_DONTNEED
        removal = target.start_madvise(advice, 512, 512)
        await target.in_event()
        await asyncio.sleep(0.01)  # the loop has seen it
        write = target.start_write(700, 99, thread=1)
        await target.blocked(1)
        held.go.set()
        taken = await snapshot
        assert taken.held
        assert it.words() == list(range(1, 1025))
        assert await removal == 0
        assert await write == 99
        assert it.is_free()
        assert sum(word or 0 for word in await target.start_sweep(512, 100)) == 0


@pytest.mark.parametrize("kind, told", [("anon", True), ("anon", False), ("shmem", True)])
async def test_an_event_that_slips_in(
    tmp_path: Path, kind: str, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it removes was not saved: no image; of private memory its protection shows it, too."""
    held = Held(monkeypatch)
    async with running(tmp_path, kind, 1024) as it:
        target = it.target
        await target.start_number(target.base, PAGE, 1024)
        snapshot = asyncio.create_task(it.snapshot())
        await held.reached.wait()
        with monkeypatch.context() as slipping:
            # As if each event came between the question for it and the reading of faults.
            slipping.setattr(Userfaultfd, "is_changing", lambda _: False)
            if not told:
                slipping.setattr(live_snapshot._Copying, "event", lambda _, __: None)
            advice = MADV_REMOVE if kind == "shmem" else MADV_DONTNEED
            assert await target.start_madvise(advice, 900, 2) == 0
        held.go.set()
        with pytest.raises(SourceError, match="removed before it was saved"):
            await snapshot
        assert list(tmp_path.iterdir()) == []
        assert it.is_free()


async def test_an_event_that_slips_in_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved already, or was never there, may be removed."""
    held = Held(monkeypatch)
    async with running(tmp_path, "shmem", 1024) as it:
        target = it.target
        await target.start_number(target.base, PAGE, 1000)
        snapshot = asyncio.create_task(it.snapshot())
        await held.reached.wait()
        with monkeypatch.context() as slipping:
            slipping.setattr(Userfaultfd, "is_changing", lambda _: False)
            assert await target.start_madvise(MADV_REMOVE, 0, 256) == 0
            assert await target.start_madvise(MADV_REMOVE, 1008, 16) == 0
        held.go.set()
        taken = await snapshot
        assert not taken.held
        assert it.words() == [*range(1, 1001), *[0] * 24]


async def test_memory_that_vanishes_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """munmap says nothing beforehand: then there is no snapshot, and no file."""
    held = Held(monkeypatch)
    async with running(tmp_path, pages=1024) as it:
        await it.target.start_number(it.target.base, PAGE, 1024)
        snapshot = asyncio.create_task(it.snapshot())
        await held.reached.wait()
        assert await it.target.start_munmap(1000, 8) == 0
        held.go.set()
        with pytest.raises(SourceError):
            await snapshot
        assert list(tmp_path.iterdir()) == []
        assert await it.target.start_write(5, 1) == 1


@pytest.mark.child
@pytest.mark.parametrize("seconds", [0, 0.001, 0.01])
async def test_it_is_never_of_two_instants(tmp_path: Path, seed: int, seconds: float) -> None:
    """Memory is given back all the time: the image is of one instant, or there is none."""
    async with running(tmp_path, pages=4096) as it:
        target = it.target
        counting = [target.start_count(thread) for thread in range(3)]
        await until(lambda: words(target.memory(target.base, 8), 8)[0] > 4096, "all is written")
        churn = target.start_churn(MADV_DONTNEED, seed, 3, pause_us=int(seconds * 1e6))
        taken = 0
        for _ in range(5):
            try:
                await it.snapshot()
            except SourceError:
                continue
            taken += 1
            # A page that was given back reads zero until its next turn; the others are exact.
            slots = it.words()
            last = max(slots)
            assert all(
                value in {0, last - (last - slot) % 4096} for slot, value in enumerate(slots)
            )
        assert taken
        await target.stop(3)
        await churn
        for call in counting:
            await call
        assert it.is_free()


# --- ends ------------------------------------------------------------------------------


async def test_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is left, all protection is off, and who had waited goes on."""
    held = Held(monkeypatch)
    async with running(tmp_path, pages=1024) as it:
        await it.target.start_number(it.target.base, PAGE, 1024)
        snapshot = asyncio.create_task(it.snapshot())
        await held.reached.wait()
        snapshot.cancel()
        with pytest.raises(asyncio.CancelledError):
            await snapshot
        assert list(tmp_path.iterdir()) == []
        assert it.is_free()
        assert await it.target.start_write(1000, 7) == 7
        held.go.set()
        await it.snapshot()  # and again


@pytest.mark.parametrize("end", ["exit", "exec"])
async def test_a_target_that_dies(
    tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle, or before it begins."""
    held = Held(monkeypatch)
    async with running(tmp_path, pages=1024) as it:
        await it.target.start_number(it.target.base, PAGE, 1024)
        snapshot = asyncio.create_task(it.snapshot())
        await held.reached.wait()
        if end == "exit":
            it.target.kill()
            it.target.reap()
        else:
            await it.target.start_exec()
        held.go.set()
        with pytest.raises(TargetGone):
            await snapshot
        with pytest.raises(TargetGone):
            await it.snapshot()
        assert list(tmp_path.iterdir()) == []


async def test_a_full_disk(tmp_path: Path) -> None:
    """The error is the system's, no file is left, and nobody waits."""
    async with running(tmp_path, pages=1024) as it:
        await it.target.start_number(it.target.base, PAGE, 1024)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 * PAGE, before[1]))
        try:
            with pytest.raises(OSError, match="large"):
                await it.snapshot(Stretch(it.target.base, it.target.length, 1 << 30))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert list(tmp_path.iterdir()) == []
        assert it.is_free()


@pytest.mark.child
async def test_writers_wait_for_a_slow_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved for them and not written yet is bounded: beyond it they wait."""
    monkeypatch.setattr(live_snapshot, "_HELD_BYTES", 1 << 20)
    held = Held(monkeypatch)
    async with running(tmp_path, pages=4096) as it:
        target = it.target
        await target.start_number(target.base, PAGE, 4096)
        snapshot = asyncio.create_task(it.snapshot())
        await held.reached.wait()
        write = target.start_number(target.base, PAGE, 4096, 10_000)
        await target.blocked()
        with pytest.raises(TargetLate):
            await write.within(0.5)
        held.go.set()
        await snapshot
        assert await write
        assert it.words() == list(range(1, 4097))


# --- what cannot be --------------------------------------------------------------------


async def test_features_that_are_needed(tmp_path: Path) -> None:
    """Each lack is named, and who has to ask for it."""
    async with running(tmp_path, features=FEATURES | Feature.WP_ASYNC) as it:
        with pytest.raises(NotSupported, match="WP_ASYNC"):
            await it.snapshot()
    async with running(tmp_path, features=Feature.EVENT_REMOVE) as it:
        with pytest.raises(NotSupported, match=r"WP_UNPOPULATED.*Linux 6\.7"):
            await it.snapshot()


async def test_bad_stretches(tmp_path: Path) -> None:
    """None, misaligned, overlapping in memory or in the image, or our own memory."""
    path = tmp_path / "image"
    async with running(tmp_path, pages=8) as it:
        base = it.target.base
        for stretches, words in (
            ([Stretch(base + 1, PAGE)], "whole pages"),
            ([Stretch(base, 0)], "whole pages"),
            ([Stretch(base, 2 * PAGE), Stretch(base + PAGE, PAGE, 8 * PAGE)], "overlap"),
            ([Stretch(base, PAGE), Stretch(base + PAGE, PAGE)], "overlap"),
        ):
            with pytest.raises(ValueError, match=words):
                await it.snapshot(*stretches)
        with pytest.raises(ValueError, match="nothing"):
            await take_live_snapshot(it.uffd, [], path, pid=it.target.pid)
    with own(FEATURES) as mine, pytest.raises(ValueError, match="our own memory"):
        await take_live_snapshot(mine.uffd, [Stretch(mine.base, PAGE)], path, pid=os.getpid())
