"""Prefetch: everything arrives, nothing removed comes back, and demand goes first."""

from __future__ import annotations

import asyncio
import mmap
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from aiouffd import (
    ClosedError,
    Feature,
    Mode,
    PageFault,
    Resolution,
    SourceError,
    TargetGone,
)
from aiouffd.errors import WorkingSetError
from aiouffd.filled_pages import FilledPages
from aiouffd.handlers import from_source
from aiouffd.performer import PIECE_BYTES
from aiouffd.prefetch import MOST_BYTES, READS, STEP_BYTES, Pace, Prefetch
from aiouffd.sources import Source
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.file import FileSource
from aiouffd.working_set import GRANULE, Header, WorkingSet
from tests.serving import LAYOUT, MADV_DONTNEED, Gate, from_image, image, serving, unread, within
from tests.targets import HUGE, KINDS, PAGE, until, wait_until


class Held:
    """A source of the image's pages that notes its reads and holds them until they are let go."""

    def __init__(
        self,
        pages: int,
        *,
        page_size: int = PAGE,
        held: bool = True,
        at_hand: bool = False,
        holes: tuple[range, ...] = (),
    ) -> None:
        self.size = pages * page_size
        self.identity = "held"
        self.page_size = page_size
        self.reads: list[tuple[int, int]] = []
        self.open = 0
        self.most_open = 0
        self.at_hand = at_hand
        self.failing: set[int] = set()
        self.before_return: Callable[[int], None] = lambda offset: None
        self._gate = asyncio.Event()
        if not held:
            self._gate.set()
        self._holes = holes

    def let_go(self) -> None:
        self._gate.set()

    def hold(self) -> None:
        self._gate.clear()

    async def read(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await self._gate.wait()
            await asyncio.sleep(0)
        finally:
            self.open -= 1
        if offset in self.failing:
            raise SourceError(f"no bytes at {offset}")
        data = self._bytes(offset, length)
        self.before_return(offset)
        return data

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        if not self.at_hand:
            return None
        self.reads.append((offset, length))
        return self._bytes(offset, length)

    def _bytes(self, offset: int, length: int) -> bytes:
        first = offset // self.page_size
        pages = -(-(offset + length) // self.page_size) - first
        data = image(first * self.page_size, pages * self.page_size, self.page_size)
        return data[offset % self.page_size :][:length]

    def extents(self) -> Iterator[tuple[int, int]]:
        start = 0
        for hole in self._holes:
            if hole.start * self.page_size > start:
                yield start, hole.start * self.page_size - start
            start = hole.stop * self.page_size
        if start < self.size:
            yield start, self.size - start

    async def aclose(self) -> None:
        pass

    @property
    def pages_read(self) -> list[tuple[int, int]]:
        return [(offset // PAGE, length // PAGE) for offset, length in self.reads]


def set_of(source: Source, *pages: int | range) -> WorkingSet:
    result = WorkingSet(Header(identity=getattr(source, "identity", ""), image_size=source.size))
    for page in pages:
        if isinstance(page, range):
            result.add(page.start, len(page))
        else:
            result.add(page)
    return result


async def ended(task: asyncio.Task[Any]) -> None:
    """Cancel a task and see it end."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await within(task)


# --- replay ----------------------------------------------------------------------------


@pytest.mark.parametrize("at_hand", [False, True])
async def test_replay_brings_the_set(at_hand: bool) -> None:
    """Before it is asked for: its pages fault no more, the others do."""
    source = Held(256, held=False, at_hand=at_hand)
    asked: list[int] = []

    async def note(fault: PageFault) -> Resolution:
        asked.append(fault.offset // PAGE)
        return await from_image(fault)

    async with serving(note, pages=256) as served:
        prefetch = Prefetch(served.pager, source)
        await within(prefetch.replay(set_of(source, 3, range(40, 60), 200)))
        assert await served.target.start_sweep() == [page + 1 for page in range(256)]
        assert asked == [page for page in range(256) if page not in (3, *range(40, 60), 200)]
        figures = prefetch.figures
        assert figures.replayed_bytes == 22 * PAGE
        assert (figures.hydrated_bytes, figures.already_bytes, figures.refused) == (0, 0, 0)
        assert figures.reads == len(source.reads) == 3
        assert not prefetch.resident


async def test_neighbours_come_in_one_read_by_offset() -> None:
    """Across small gaps too, which are read along but not filled."""
    source = Held(2048, held=False)
    async with serving(pages=2048) as served:
        prefetch = Prefetch(served.pager, source)
        # a gap of 4 pages, one of 10, one of 17; then a run longer than any read
        pages = set_of(source, 0, 5, 16, 34, range(1024, 1024 + 300))
        await within(prefetch.replay(pages))
        assert source.pages_read == [(0, 17), (34, 1), (1024, 128), (1152, 128), (1280, 44)]
        present = [page for page in range(64) if served.target.is_present(page)]
        assert present == [0, 5, 16, 34]


async def test_who_wants_all_installs_what_is_read_along() -> None:
    """Before a hydration at full pace; holes stay holes, and wide gaps are left for later."""
    holes = (range(40, 44),)
    source = Held(2048, held=False, holes=holes)
    async with serving(pages=2048) as served:
        prefetch = Prefetch(served.pager, source)
        pages = set_of(source, 0, 5, 16, 30, 38, 46, 1024)
        await within(prefetch.replay(pages, along=True))
        present = [page for page in range(2048) if served.target.is_present(page)]
        assert present == [*range(40), *range(44, 47), 1024]
        assert prefetch.figures.replayed_bytes == 44 * PAGE

        later = Prefetch(served.pager, source)
        await within(later.run(set_of(source, 1500, 1510), Pace.FULL))
        assert later.figures.replayed_bytes == 11 * PAGE
        assert later.resident
    slow = Held(64, held=False)
    async with serving() as served:
        prefetch = Prefetch(served.pager, slow)
        await within(prefetch.run(set_of(slow, 0, 5), Pace.OFF))
        assert prefetch.figures.replayed_bytes == 2 * PAGE


async def test_several_reads_are_in_flight() -> None:
    """As many as there may be, and each is installed as it comes."""
    source = Held(4096)
    async with serving(pages=4096) as served:
        pages = set_of(source, *range(0, 4096, 128))
        replay = asyncio.create_task(Prefetch(served.pager, source).replay(pages))
        await until(lambda: source.open == READS, "reads are in flight")
        source.let_go()
        await within(replay)
        assert source.most_open == READS
        assert source.pages_read == [(page, 1) for page in range(0, 4096, 128)]
        assert all(served.target.is_present(page) for page in range(0, 4096, 128))


async def test_demand_has_its_turn_between_two_reads() -> None:
    """Planning takes as long as filling does: the loop turns after each that is planned."""
    turn = 0
    began: list[int] = []

    class Noting(Held):
        async def read(self, offset: int, length: int) -> bytes:
            began.append(turn)
            return await super().read(offset, length)

    source = Noting(4096, held=False)
    async with serving(pages=4096) as served:
        pages = set_of(source, *range(0, 4096, 128))
        replay = asyncio.create_task(Prefetch(served.pager, source).replay(pages))
        while not replay.done():
            turn += 1
            await asyncio.sleep(0)
        assert len(began) == len(set(began)) == 32


async def test_scattered_pages_of_a_cached_file_take_no_thread(tmp_path: Path) -> None:
    """Each is at hand; a thread would read along what lies between them, and be waited for."""
    path = tmp_path / "image"
    path.write_bytes(image(0, 1024 * PAGE))
    source = FileSource(path)
    async with serving(pages=1024) as served:
        prefetch = Prefetch(served.pager, source)
        await within(prefetch.replay(set_of(source, *range(0, 1024, 4))))
        assert prefetch.figures.read_bytes == prefetch.figures.replayed_bytes == 256 * PAGE
        assert not [one for one in threading.enumerate() if one.name.startswith("aiouffd-file")]
        assert await served.target.start_sweep() == [page + 1 for page in range(1024)]
    await source.aclose()


async def test_while_a_fault_is_in_flight_one_read_is_on_its_way() -> None:
    """Demand first: what is under way ends, and no more than one begins at a time."""
    source = Held(4096)
    gate = Gate()
    async with serving(gate, pages=4096) as served:
        touch = served.target.start_read(77)
        await until(lambda: gate.faults, "the handler is asked")
        pages = set_of(source, *range(128, 4096, 128))
        replay = asyncio.create_task(Prefetch(served.pager, source).replay(pages))
        await until(lambda: source.open, "one read begins")
        source.let_go()
        await within(replay)
        assert source.most_open == 1
        gate.let_go()
        assert await touch == 78


async def test_a_demand_fault_is_served_while_reads_hang() -> None:
    """A cold source delays nobody who asks."""
    source = Held(4096)
    async with serving(pages=4096) as served:
        hydration = asyncio.create_task(Prefetch(served.pager, source).hydrate(Pace.FULL))
        await until(lambda: source.open, "hydration reads")
        for page in (5, 1000, 4000):
            assert await served.target.start_read(page) == (page + 1) & 0xFF
        await ended(hydration)
        assert source.open == 0


async def test_a_set_of_another_image_is_refused() -> None:
    """Nothing is read."""
    source = Held(64, held=False)
    async with serving() as served:
        prefetch = Prefetch(served.pager, source)
        pages = set_of(source, 1)
        source.identity = "another"
        with pytest.raises(WorkingSetError, match="another generation"):
            await prefetch.replay(pages)
        source.identity = ""
        with pytest.raises(WorkingSetError, match="does not say"):
            await prefetch.replay(pages)
        assert not source.reads
        await within(prefetch.replay(pages, any_image=True))
        assert source.pages_read == [(1, 1)]


async def test_bad_records_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """The good ones are replayed."""
    source = Held(64, held=False)
    pages = set_of(source, 1)
    pages.skipped, pages.problem = 7, "nonsense"
    async with serving() as served:
        await within(Prefetch(served.pager, source).replay(pages))
        assert served.target.is_present(1)
    assert "7 bad records, left out; the first: nonsense" in caplog.text


# --- removal ---------------------------------------------------------------------------


@pytest.mark.parametrize("read", [True, False], ids=["event read", "event unread"])
async def test_a_page_removed_between_read_and_fill_stays_removed(read: bool) -> None:
    """The chunk is checked right before the ioctl; everything else of it arrives."""
    source = Held(64)
    asked = Gate()
    async with serving(asked, features=LAYOUT) as served:
        target = served.target
        replay = asyncio.create_task(
            Prefetch(served.pager, source).replay(set_of(source, range(16, 48)))
        )
        await until(lambda: source.open, "the bytes are being read")
        if read:
            assert await target.start_madvise(MADV_DONTNEED, page=30, pages=2) == 0
            assert 30 * PAGE + target.base in served.pager.space.removed
        else:

            def remove(offset: int) -> None:
                # On the loop: nobody reads the event until the fill has met it.
                target.start_madvise(MADV_DONTNEED, page=30, pages=2)
                wait_until(lambda: target.state(0) == "D", "the removal waits to be read")
                source.before_return = lambda offset: None

            source.before_return = remove
        source.let_go()
        await within(replay)
        assert await target.start_read(30, 1) == 0
        assert await target.start_read(31, 1) == 0
        present = [page for page in range(64) if target.is_present(page)]
        assert present == list(range(16, 48))
        assert not asked.faults


async def test_what_was_removed_is_not_read_at_all() -> None:
    """Nor what was unmapped."""
    source = Held(64, held=False)
    async with serving(features=LAYOUT) as served:
        target = served.target
        assert await target.start_madvise(MADV_DONTNEED, page=0, pages=16) == 0
        assert await target.start_munmap(page=32, pages=32) == 0
        prefetch = Prefetch(served.pager, source)
        await within(prefetch.replay(set_of(source, 3, range(40, 50))))
        assert not source.reads
        await within(prefetch.fill_all())
        assert await target.start_words(target.base, PAGE, 32) == [
            0 if page < 16 else page + 1 for page in range(32)
        ]


async def test_a_layout_that_changes_is_waited_for() -> None:
    """EAGAIN is tried again: nothing is lost."""
    source = Held(64, held=False)
    async with serving(features=LAYOUT, leave_out=2) as served:
        target = served.target
        with unread(target) as read_on:
            unmapping = target.start_munmap(page=0, pages=4)
            await target.in_event()
            bringing = asyncio.create_task(Prefetch(served.pager, source).fill_all())
            await until(lambda: source.reads, "it reads")
            for _ in range(20):
                await asyncio.sleep(0)
            assert not bringing.done()
            read_on()
            assert await unmapping == 0
            await within(bringing)
        assert all(target.is_present(page) for page in range(4, 64))


# --- hydration -------------------------------------------------------------------------


@pytest.mark.parametrize("pace", [Pace.SLOW, Pace.FULL])
@pytest.mark.parametrize("at_hand", [False, True])
async def test_hydration_brings_the_extents(pace: Pace, at_hand: bool) -> None:
    """Everything that the source has; holes stay holes."""
    source = Held(96, held=False, at_hand=at_hand, holes=(range(10, 40), range(90, 96)))
    handler = from_source(cast("Source", source))
    async with serving(handler, pages=96) as served:
        prefetch = Prefetch(served.pager, cast("Source", source))
        assert not prefetch.resident
        await within(prefetch.hydrate(pace))
        there = [*range(10), *range(40, 90)]
        assert [page for page in range(96) if served.target.is_present(page)] == there
        assert prefetch.resident
        assert prefetch.figures.hydrated_bytes == len(there) * PAGE
        words = await served.target.start_sweep()
        assert words == [page + 1 if page in there else 0 for page in range(96)]
        assert served.pager.counters.faults == 36


async def test_hydration_off_does_nothing() -> None:
    """As the word says."""
    source = Held(64, held=False)
    async with serving() as served:
        prefetch = Prefetch(served.pager, source)
        await prefetch.hydrate(Pace.OFF)
        assert not source.reads
        assert not prefetch.resident


class Link(Held):
    """A source behind a slow line: what is asked for comes one after the other."""

    def __init__(self, pages: int, bytes_per_second: int) -> None:
        super().__init__(pages, held=False)
        self._line = asyncio.Lock()
        self._bytes_per_second = bytes_per_second

    async def read(self, offset: int, length: int) -> bytes:
        async with self._line:
            await asyncio.sleep(length / self._bytes_per_second)
        return await super().read(offset, length)


async def steps_around_a_fault(source: Held, quiet_reads: int) -> tuple[list[int], int]:
    """Hydrate with one fault; give the steps, and which was the last to begin before it."""
    pages = source.size // PAGE
    async with serving(pages=pages) as served:
        touched: list[Any] = []

        def touch(offset: int) -> None:
            if len(source.reads) >= quiet_reads and not touched:
                touched.append(served.target.start_read(pages - 1))
                wait_until(served.target.is_blocked, "the thread faults")
                touched.append(len(source.reads))

        source.before_return = touch
        await within(Prefetch(served.pager, source).hydrate(Pace.FULL))
        assert await touched[0] == pages & 0xFF
    assert sum(length for _, length in source.reads) == source.size
    return [length // STEP_BYTES for _, length in source.reads], touched[1]


async def test_steps_grow_while_it_is_quiet() -> None:
    """By 64 KiB each, up to a limit; after a fault a quick source goes on with long ones."""
    source = Held(20 * MOST_BYTES // PAGE, held=False)
    steps, fault = await steps_around_a_fault(source, 30)
    assert steps[:20] == list(range(1, 21))
    assert max(steps) <= MOST_BYTES // STEP_BYTES
    assert min(steps[fault + 1 : fault + READS]) > 8  # one was planned before it


async def test_on_a_slow_line_steps_begin_anew() -> None:
    """A fault would wait for what stands before it: after one, that is no more than it must be."""
    source = Link(120 * STEP_BYTES // PAGE, 16 << 20)
    steps, fault = await steps_around_a_fault(source, 5)
    assert steps[:5] == [1, 2, 3, 4, 5]
    assert 1 in steps[fault : fault + READS + 1]  # those that had begun, and the next


async def test_pieces_grow_with_the_steps() -> None:
    """To 2 MiB at most; what was read before a fault is installed in short ones after it."""
    pages = 20 * MOST_BYTES // PAGE
    source = Held(pages, held=False)
    async with serving(pages=pages) as served:
        (region,) = served.pager.regions
        pieces: list[tuple[int, int]] = []  # faults before it, bytes

        class Noting(FilledPages):
            def add_range(self, offset: int, length: int) -> None:
                pieces.append((served.pager.counters.faults, length))
                super().add_range(offset, length)

        bits = bytearray(FilledPages.bytes_for(region.length, PAGE))
        region.filled = Noting(bits, 0, 0, region.length, PAGE)
        touched: list[Any] = []

        def touch(offset: int) -> None:
            if not touched and any(length > 1 << 20 for _, length in pieces):
                touched.append(served.target.start_read(pages - 1))
                wait_until(served.target.is_blocked, "the thread faults")

        source.before_return = touch
        await within(Prefetch(served.pager, source).hydrate(Pace.FULL))
        assert await touched[0] == pages & 0xFF
        before = [length for faults, length in pieces if not faults]
        after = [length for faults, length in pieces if faults]
        assert max(before[:8]) <= PIECE_BYTES
        assert max(before) <= 2 << 20
        assert max(after[:8]) <= PIECE_BYTES


async def test_slow_hydration_waits_for_demand() -> None:
    """Not even one read begins while a fault is in flight."""
    source = Held(64, held=False)
    gate = Gate()
    async with serving(gate) as served:
        touch = served.target.start_read(7)
        await until(lambda: gate.faults, "the handler is asked")
        prefetch = Prefetch(served.pager, source)
        hydration = asyncio.create_task(prefetch.hydrate(Pace.SLOW))
        for _ in range(50):
            await asyncio.sleep(0)
        assert not source.reads
        gate.let_go()
        assert await touch == 8
        await within(hydration)
        assert prefetch.resident


async def test_nothing_is_read_twice() -> None:
    """What replay has brought, hydration leaves out."""
    source = Held(64, held=False)
    async with serving() as served:
        prefetch = Prefetch(served.pager, source)
        await within(prefetch.replay(set_of(source, range(20, 60))))
        source.reads.clear()
        await within(prefetch.hydrate(Pace.FULL))
        assert sum(length for _, length in source.reads) <= 64 * PAGE
        assert prefetch.figures.already_bytes == 0
        source.reads.clear()
        await within(prefetch.fill_all())
        assert not source.reads


@pytest.mark.parametrize("pace", [Pace.SLOW, Pace.FULL])
@pytest.mark.parametrize("at_hand", [False, True])
async def test_what_a_journal_knows_to_be_filled_is_not_read(pace: Pace, at_hand: bool) -> None:
    """Also when the target has given it back since; without word of that it is looked at."""
    pages = 4 * STEP_BYTES // PAGE
    for features in (LAYOUT, Feature(0)):
        source = Held(pages, held=False, at_hand=at_hand)
        async with serving(features=features, pages=pages) as served:
            (region,) = served.pager.regions
            bits = bytearray(FilledPages.bytes_for(region.length, PAGE))
            region.filled = FilledPages(bits, 0, 0, region.length, PAGE)
            await region.fill(0, image(0, 2 * STEP_BYTES))
            prefetch = Prefetch(served.pager, source)
            await within(prefetch.hydrate(pace))
            assert prefetch.resident
            first = min(offset for offset, _ in source.reads)  # where steps begin, pace decides
            assert (first >= STEP_BYTES) if features else (first == 0)
            assert prefetch.figures.already_bytes == 2 * STEP_BYTES - first
            assert await served.target.start_sweep() == [page + 1 for page in range(pages)]


async def test_a_stretch_that_cannot_be_read_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Said once; the rest arrives, and demand answers for what does not."""
    source = Held(4096, held=False)
    pages = set_of(source, *range(0, 4096, 128))
    source.failing = {128 * PAGE, 1280 * PAGE}
    async with serving(pages=4096) as served:
        prefetch = Prefetch(served.pager, source)
        await within(prefetch.replay(pages))
        present = [page for page in range(0, 4096, 128) if served.target.is_present(page)]
        assert present == [page for page in range(0, 4096, 128) if page not in (128, 1280)]
        assert prefetch.figures.refused == 2
        assert caplog.text.count("left to demand") == 1
        await within(prefetch.hydrate(Pace.FULL))
        source.failing = {0}
        assert prefetch.resident
        assert await served.target.start_read(128) == 129


async def test_fill_all_leaves_nothing_out() -> None:
    """It raises instead, and can be called again."""
    source = Held(64, held=False)
    source.failing = {0}
    async with serving() as served:
        prefetch = Prefetch(served.pager, source)
        with pytest.raises(SourceError, match="no bytes at 0"):
            await within(prefetch.fill_all())
        assert not prefetch.resident
        source.failing = set()
        await within(prefetch.fill_all())
        assert prefetch.resident
        assert all(served.target.is_present(page) for page in range(64))


async def test_a_source_that_breaks_its_word_is_named() -> None:
    """Less than was asked for, or an error of its own."""

    class Broken(Held):
        async def read(self, offset: int, length: int) -> bytes:
            raise RuntimeError("broken")

    class Short(Held):
        async def read(self, offset: int, length: int) -> bytes:
            return bytes(10)

    class ShortAtHand(Held):
        def read_nowait(self, offset: int, length: int) -> bytes | None:
            return bytes(length - PAGE)

    async with serving() as served:
        with pytest.raises(SourceError, match="broken"):
            await within(Prefetch(served.pager, Broken(64)).fill_all())
        with pytest.raises(SourceError, match="10 of"):
            await within(Prefetch(served.pager, Short(64)).fill_all())
        with pytest.raises(SourceError, match="61440 of 65536"):
            await within(Prefetch(served.pager, ShortAtHand(64, at_hand=True)).fill_all())
        assert not any(served.target.is_present(page) for page in range(64))


async def test_it_ends_with_the_target_the_pager_or_its_task() -> None:
    """Quietly in the background; fill_all says why."""
    source = Held(4096)
    async with serving(pages=4096) as served:
        prefetch = Prefetch(served.pager, source)
        hydration = asyncio.create_task(prefetch.hydrate(Pace.FULL))
        filling = asyncio.create_task(prefetch.fill_all())
        await until(lambda: source.open >= 2, "they read")
        served.target.kill()
        await until(lambda: served.pager.target_gone, "the target is gone")
        source.let_go()
        await within(hydration)
        with pytest.raises(TargetGone):
            await within(filling)
        assert not prefetch.resident
    source = Held(4096)
    async with serving(pages=4096) as served:
        replay = asyncio.create_task(
            Prefetch(served.pager, source).replay(set_of(source, range(4096)))
        )
        filling = asyncio.create_task(Prefetch(served.pager, source).fill_all())
        cancelled = asyncio.create_task(Prefetch(served.pager, source).fill_all())
        await until(lambda: source.open >= 3, "they read")
        await ended(cancelled)
        await served.pager.aclose()
        source.let_go()
        await within(replay)
        with pytest.raises(ClosedError):
            await within(filling)
        assert source.open == 0


async def test_a_journal_that_has_ended_is_not_asked() -> None:
    """A forked child exits while its memory is brought: its pager ends, and the journal with it."""
    pages = 16
    async with serving(features=LAYOUT, pages=pages) as served:
        (region,) = served.pager.regions
        prefetch = Prefetch(served.pager, Held(pages))
        with mmap.mmap(-1, FilledPages.bytes_for(region.length, PAGE)) as journal:
            region.filled = FilledPages(journal, 0, 0, region.length, PAGE)
            assert prefetch._is_wanted(region, 0, PAGE)
            await served.pager.aclose()
        with pytest.raises(ClosedError):
            prefetch._is_wanted(region, 0, PAGE)


# --- kinds of memory and layouts -------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_every_kind_of_memory(kind: str, request: pytest.FixtureRequest) -> None:
    """A huge page is brought whole, once, though one small page of it was recorded."""
    pages = 64
    if kind.startswith("hugetlb"):
        request.getfixturevalue("huge_pages")(8)
        pages = 4
    size = HUGE if kind.startswith("hugetlb") else PAGE
    source = Held(pages, page_size=size, held=False)
    gate = Gate()
    async with serving(gate, kind, pages) as served:
        prefetch = Prefetch(served.pager, source)
        granules = size // GRANULE
        await within(prefetch.replay(set_of(source, granules, granules + granules // 2)))
        assert prefetch.figures.replayed_bytes == size
        assert await served.target.start_read(1) == 2
        await within(prefetch.fill_all())
        assert await served.target.start_sweep() == [page + 1 for page in range(pages)]
        assert prefetch.figures.already_bytes == 0
        assert not gate.faults


async def test_the_last_page_of_an_image_ends_in_zeros() -> None:
    """An image need not be whole pages."""
    data = image(0, 8 * PAGE)[: 7 * PAGE + 100]
    async with serving(pages=8) as served:
        await within(Prefetch(served.pager, BufferSource(data)).fill_all())
        where = served.target.at(7)
        assert served.target.memory(where, PAGE) == data[7 * PAGE :] + bytes(PAGE - 100)


async def test_a_file_is_read_in_threads_when_steps_are_long(tmp_path: Path) -> None:
    """Every byte right, with buffers used again, and the file's odd end."""
    pages = 24 * 256
    data = image(0, pages * PAGE)[:-100]
    path = tmp_path / "image"
    path.write_bytes(data)
    source = FileSource(path)
    async with serving(pages=pages) as served:
        prefetch = Prefetch(served.pager, source)
        await within(prefetch.fill_all())
        assert prefetch.figures.reads < pages // 100
        assert served.target.memory(served.target.base, pages * PAGE) == data + bytes(100)
    await source.aclose()


async def test_memory_that_moved_is_brought_where_it_lies() -> None:
    """Moved before, and while its bytes are being read."""
    source = Held(64)
    async with serving(features=LAYOUT) as served:
        target = served.target
        first, second = target.reserve(16 * PAGE), target.reserve(16 * PAGE)
        assert await target.start_mremap(8, 16, flags=3, to=first) == first
        filling = asyncio.create_task(Prefetch(served.pager, source).fill_all())
        await until(lambda: source.open, "it reads")
        assert await target.start_mremap(32, 16, flags=3, to=second) == second
        source.let_go()
        await within(filling)
        assert await target.start_words(first, PAGE, 16) == [9 + n for n in range(16)]
        assert await target.start_words(second, PAGE, 16) == [33 + n for n in range(16)]
        assert served.pager.counters.faults == 0


async def test_only_missing_pages_are_its_business() -> None:
    """A region served for write protection has no missing pages."""
    source = Held(64, held=False)
    features = Feature.PAGEFAULT_FLAG_WP
    async with serving(features=features, modes=Mode.WP) as served:
        await within(Prefetch(served.pager, source).fill_all())
        assert not source.reads


async def test_several_regions_and_those_that_come_later() -> None:
    """Each gets its part of the image, and the same part twice if two ask for it."""
    source = Held(64)
    async with serving(leave_out=32) as served:
        target, pager = served.target, served.pager
        twin = target.map(32 * PAGE)
        pager.register(twin, 32 * PAGE, from_image, offset=32 * PAGE)
        filling = asyncio.create_task(Prefetch(pager, source).fill_all())
        await until(lambda: source.open, "it reads")
        pager.register(target.base, 32 * PAGE, from_image)
        source.let_go()
        await within(filling)
        assert await target.start_sweep() == [page + 1 for page in range(64)]
        assert await target.start_words(twin, PAGE, 32) == [33 + n for n in range(32)]
        assert pager.counters.faults == 0


async def test_forked_children_have_one_of_their_own() -> None:
    """The parent's Prefetch leaves them alone; one made for their pager fills them."""
    source = Held(64)
    async with serving(features=LAYOUT | Feature.EVENT_FORK) as served:
        filling = asyncio.create_task(Prefetch(served.pager, source).fill_all())
        await until(lambda: source.open, "it reads")
        async with await served.target.fork() as child:
            source.let_go()
            await within(filling)
            assert not any(child.is_present(page) for page in range(64))
            pager = served.pager.children[0]
            await within(Prefetch(pager, source).fill_all())
            assert await child.start_sweep() == [page + 1 for page in range(64)]
            assert await served.target.start_sweep() == [page + 1 for page in range(64)]
            assert pager.counters.faults == served.pager.counters.faults == 0


@pytest.mark.limit(120)
async def test_a_target_that_removes_and_moves_meanwhile() -> None:
    """Every page ends right: the image's, or zero where it was removed."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    for _ in range(4):
        source = Held(512, held=False)
        async with serving(pages=512, features=LAYOUT) as served:
            target = served.target
            place = {page: target.at(page) for page in range(512)}
            removed: set[int] = set()
            prefetch = Prefetch(served.pager, source)
            works = [
                asyncio.create_task(prefetch.replay(set_of(source, *range(0, 512, 3)))),
                asyncio.create_task(prefetch.hydrate(Pace.FULL)),
                asyncio.create_task(prefetch.fill_all()),
            ]
            for _ in range(24):
                first = chance.randrange(500)
                pages = range(first, first + chance.randrange(1, 12))
                if chance.random() < 0.5:
                    for page in pages:
                        if await target.call("madvise", place[page], PAGE, MADV_DONTNEED) == 0:
                            removed.add(page)
                elif chance.random() < 0.5:
                    to = target.reserve(PAGE)
                    moved = await target.call("mremap", place[first], PAGE, PAGE, 3, to)
                    assert moved == to
                    place[first] = to
                else:
                    assert await target.start_peek(place[first]) in (0, (first + 1) & 0xFF)
            for work in works:
                await within(work)
            before = served.pager.counters.faults
            for page, address in place.items():
                word = await target.start_words(address, PAGE, 1)
                assert word == [0 if page in removed else page + 1], page
            assert served.pager.counters.faults - before <= len(removed)


async def test_two_at_once_do_no_harm() -> None:
    """Replay, hydration and fill_all may run together."""
    source = Held(512, held=False, at_hand=True)
    async with serving(pages=512) as served:
        prefetch = Prefetch(served.pager, source)
        pages = set_of(source, *range(0, 512, 7))
        await within(
            asyncio.gather(prefetch.replay(pages), prefetch.hydrate(Pace.FULL), prefetch.fill_all())
        )
        assert await served.target.start_sweep() == [page + 1 for page in range(512)]
        assert served.pager.counters.faults == 0


async def test_a_source_keeps_its_buffer() -> None:
    """Bytes that a source lends are never written to, whatever they lie in."""
    memory = mmap.mmap(-1, 2 * MOST_BYTES)
    memory.write(image(0, len(memory)))

    class Lent(Held):
        def _bytes(self, offset: int, length: int) -> Any:
            return memoryview(memory)[offset : offset + length]

        async def readinto(self, offset: int, buffer: memoryview) -> None:
            buffer[:] = memoryview(memory)[offset : offset + len(buffer)]

    pages = len(memory) // PAGE
    for kind in (Lent, type("Plain", (Lent,), {"readinto": None})):
        source = kind(pages, held=False)
        async with serving(pages=pages) as served:
            await within(Prefetch(served.pager, source).fill_all())
            assert await served.target.start_sweep() == [page + 1 for page in range(pages)]
        assert memory[:] == image(0, len(memory))
    memory.close()


async def test_planning_lets_the_loop_turn() -> None:
    """A set of very many runs, none of which is to be brought, holds nobody up."""
    source = Held(1 << 16, held=False, holes=(range(1, 1 << 16),))
    pages = set_of(source, *range(0, 1 << 16, 2))
    async with serving(pages=1 << 16) as served:
        replay = asyncio.create_task(Prefetch(served.pager, source).replay(pages))
        turns = 0
        while not replay.done():
            turns += 1
            await asyncio.sleep(0)
        assert turns > 100
        assert served.pager.counters.filled_bytes == PAGE
