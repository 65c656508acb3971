"""Snapshots of half-restored targets: what they changed over the image they came from."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aiouffd import NotPaused, NotSupported
from aiouffd.errors import SourceError, TargetGone
from aiouffd.filled_pages import FilledPages
from aiouffd.session import Session
from aiouffd.session_states import State
from aiouffd.snapshot import take_snapshot
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.file import FileSource
from aiouffd.sources.layered import LayeredSource
from tests.serving import MADV_DONTNEED, image
from tests.session_serving import Moody, holds, is_registered, model, served
from tests.targets import HUGE, PAGE, Target, until

if TYPE_CHECKING:
    from typing_extensions import Buffer


def base(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "base"
    path.write_bytes(data)
    return path


async def use(target: Target, rng: random.Random, pages: int) -> bytes:
    """Touch a tenth of the memory, change a hundredth, give some back; what it holds then."""
    expected = bytearray(image(0, pages * PAGE))
    for page in rng.sample(range(pages), pages // 10):
        await target.start_peek(target.at(page) + 8 * rng.randrange(512))
    for page in rng.sample(range(pages), max(pages // 100, 4)):
        word = rng.randrange(2**64)
        at = page * PAGE + 8 * rng.randrange(512)
        await target.start_poke64(target.base + at, word)
        expected[at : at + 8] = word.to_bytes(8, "little")
    for first in rng.sample(range(pages - 8), 6):  # touched, changed or neither
        assert await target.start_madvise(MADV_DONTNEED, first, 8) == 0
        expected[first * PAGE : (first + 8) * PAGE] = bytes(8 * PAGE)
    at = rng.randrange(pages) * PAGE  # and one that was removed, or not, is written anew
    await target.start_poke64(target.base + at, 99)
    expected[at : at + 8] = (99).to_bytes(8, "little")
    return bytes(expected)


@pytest.mark.parametrize("number", range(3))
async def test_what_a_half_restored_target_changed(tmp_path: Path, seed: int, number: int) -> None:
    """Scenario 18: dirty pages as they were, removed ones zero, all others as in the image."""
    rng = random.Random(seed + number)
    pages = 1024
    file = base(tmp_path, image(0, pages * PAGE))
    source = FileSource(file)
    async with served(source, pages=pages) as (target, session):
        expected = await use(target, rng, pages)
        before = session.pager.counters.faults
        snapshot = await take_snapshot(session, tmp_path / "diff", stop=True)
        assert session.pager.counters.faults == before  # nothing absent was touched
        assert await holds(target, expected)  # it goes on
        await target.start_poke64(target.at(1), 12345)  # which is none of the snapshot's business
    await source.aclose()
    assert snapshot.size == pages * PAGE
    assert snapshot.zero_bytes > 0
    assert snapshot.compared_bytes < pages * PAGE // 5
    disk = os.stat(tmp_path / "diff").st_blocks * 512
    assert snapshot.written_bytes + snapshot.zero_bytes <= disk < pages * PAGE // 5
    layered = LayeredSource(FileSource(file), FileSource(tmp_path / "diff"))
    async with served(layered, pages=pages) as (target, _):
        assert await holds(target, expected)
    await layered.aclose()


async def test_a_whole_snapshot_needs_no_image(tmp_path: Path, seed: int) -> None:
    """Everything is brought first, while the target runs; then all of it is one file."""
    pages = 256
    source = Moody(image(0, pages * PAGE), random.Random(seed))
    async with served(source, pages=pages) as (target, session):
        expected = await use(target, random.Random(seed), pages)
        snapshot = await take_snapshot(session, tmp_path / "whole", whole=True, stop=True)
        assert session.state is State.RESIDENT
        assert snapshot.fill_seconds > 0
        assert (tmp_path / "whole").read_bytes() == expected


async def test_holes_and_the_last_partial_page(tmp_path: Path) -> None:
    """What was written behind the image's end counts; untouched holes are no difference."""
    pages = 64
    data = image(0, pages * PAGE)[: pages * PAGE - 1000]

    class Sparse(BufferSource):
        def extents(self) -> Iterator[tuple[int, int]]:
            yield 32 * PAGE, len(data) - 32 * PAGE

    holed = bytes(32 * PAGE) + data[32 * PAGE :]
    expected = bytearray(holed + bytes(1000))
    async with served(Sparse(holed), pages=pages) as (target, session):
        assert await target.start_read(3) == 0
        snapshot = await take_snapshot(session, tmp_path / "nothing")
        assert snapshot.written_bytes == snapshot.zero_bytes == 0
        expected[-8:] = (7).to_bytes(8, "little")
        await target.start_poke64(target.base + len(expected) - 8, 7)
        assert await target.start_madvise(MADV_DONTNEED, 4) == 0  # of a hole
        snapshot = await take_snapshot(session, tmp_path / "diff")
        assert snapshot.written_bytes == PAGE
    layered = LayeredSource(BufferSource(holed), FileSource(tmp_path / "diff"))
    async with served(layered, pages=pages) as (target, _):
        assert await holds(target, bytes(expected))
    await layered.aclose()


async def test_memory_that_moved_is_where_it_was_in_the_image(tmp_path: Path) -> None:
    """Offsets count, not addresses; memory that was grown has no place."""
    pages = 64
    async with served(BufferSource(image(0, pages * PAGE)), pages=pages) as (target, session):
        to = target.reserve(64 * PAGE)
        assert await target.start_mremap(32, 32, 40, flags=3, to=to) == to
        await target.start_poke64(to + 2 * PAGE, 1234)
        await target.start_poke64(to + 36 * PAGE, 5678)
        snapshot = await take_snapshot(session, tmp_path / "diff", stop=True)
        assert snapshot.written_bytes == PAGE
    expected = bytearray(image(0, pages * PAGE))
    expected[34 * PAGE : 34 * PAGE + 8] = (1234).to_bytes(8, "little")
    layered = LayeredSource(BufferSource(image(0, pages * PAGE)), FileSource(tmp_path / "diff"))
    async with served(layered, pages=pages) as (target, _):
        assert await holds(target, bytes(expected))
    await layered.aclose()


async def test_what_was_removed_while_another_server_had_it(tmp_path: Path) -> None:
    """After a take-over a page that was filled before, and is missing, was removed: zeros."""
    pages = 64
    async with served(BufferSource(image(0, pages * PAGE)), pages=pages) as (target, session):
        (region,) = session.pager.regions
        bits = bytearray(FilledPages.bytes_for(pages * PAGE, PAGE))
        before = FilledPages(bits, 0, 0, pages * PAGE, PAGE)
        before.add_range(10 * PAGE, 4 * PAGE)
        region.filled_before = before
        session.pager.uffd.copy(target.at(11), image(11 * PAGE))  # and this one was not
        snapshot = await take_snapshot(session, tmp_path / "diff", stop=True)
        assert (snapshot.zero_bytes, snapshot.written_bytes) == (3 * PAGE, 0)
        layer = FileSource(tmp_path / "diff")
        assert list(layer.extents()) == [(10 * PAGE, PAGE), (12 * PAGE, 2 * PAGE)]
        await layer.aclose()


async def test_huge_pages(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Compared in small pages all the same."""
    request.getfixturevalue("huge_pages")(4)
    source = BufferSource(image(0, 4 * HUGE, HUGE))
    async with served(source, kind="hugetlb", pages=4) as (target, session):
        await target.start_poke64(target.at(2) + 8, 1)
        snapshot = await take_snapshot(session, tmp_path / "diff")
        assert (snapshot.compared_bytes, snapshot.written_bytes) == (HUGE, PAGE)


async def test_who_runs_on_is_found_out(tmp_path: Path) -> None:
    """A target that faults or frees meanwhile was not paused, and leaves no file."""
    pages = 4096
    async with served(BufferSource(image(0, pages * PAGE)), pages=pages) as (target, session):
        await session.fill()
        churn = target.start_churn(MADV_DONTNEED, 1, 1, pause_us=100)
        await until(lambda: session.pager.counters.events, "it frees memory")
        with pytest.raises(NotPaused):
            await take_snapshot(session, tmp_path / "diff")
        assert os.listdir(tmp_path) == []
        await take_snapshot(session, tmp_path / "diff", stop=True)
        await target.stop(2)
        assert await churn > 0


async def test_one_that_was_stopped_before_stays_so(tmp_path: Path) -> None:
    """Its owner stopped it, and will let it go on."""
    async with served(BufferSource(image(0, 64 * PAGE))) as (target, session):
        assert await target.start_read(0) == 1
        target.kill(signal.SIGSTOP)
        await until(lambda: {target.state(n) for n in range(6)} == {"T"}, "it is stopped")
        await take_snapshot(session, tmp_path / "diff", stop=True)
        assert target.state(0) == "T"
        target.kill(signal.SIGCONT)
        assert await target.start_read(1) == 2


class Watched(Moody):
    """A source whose second reader waits until the first is through, and looks at the target."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data, random.Random(0))
        self.target: Target
        self.first: asyncio.Task[object] | None = None
        self.states: list[str] = []

    async def read(self, offset: int, length: int) -> Buffer:
        if self.first is not None and asyncio.current_task() is not self.first:
            await asyncio.wait([self.first])
            self.states.append(self.target.state(0))
        return await super().read(offset, length)


async def test_the_end_of_one_does_not_wake_the_target_of_another(tmp_path: Path) -> None:
    """Two at once: each has the target stopped until it is through itself."""
    source = Watched(image(0, 64 * PAGE))
    async with served(source) as (target, session):
        source.target = target
        await session.fill()
        source.first = asyncio.ensure_future(take_snapshot(session, tmp_path / "a", stop=True))
        await asyncio.gather(source.first, take_snapshot(session, tmp_path / "b", stop=True))
        assert source.states == ["T"]
        assert await target.start_read(1) == 2


async def test_what_cannot_be_taken_leaves_nothing(tmp_path: Path) -> None:
    """No peer, a poisoned page, a cancelled call, a target that is gone, a session that ended."""
    path = tmp_path / "diff"
    source = Moody(image(0, 64 * PAGE), random.Random(1))
    async with served(source) as (target, session):
        assert await target.start_read(0) == 1
        unknown = Session(session.handover, source)
        with pytest.raises(NotSupported, match="unknown"):
            await take_snapshot(unknown, path)
        source.open.clear()
        taking = asyncio.ensure_future(take_snapshot(session, path, stop=True))
        await until(lambda: source.reads == 2, "it compares")
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        source.open.set()
        assert await target.start_read(1) == 2  # it goes on
        session.pager.uffd.poison(target.at(5), PAGE)
        with pytest.raises(SourceError, match="is lost"):
            await take_snapshot(session, path, stop=True)
        target.kill()
        await until(lambda: session.pager.target_gone, "its end is seen")
        with pytest.raises(TargetGone):
            await take_snapshot(session, path, stop=True)
        await session.aclose()
        with pytest.raises(TargetGone):
            await take_snapshot(session, path, whole=True)
    assert os.listdir(tmp_path) == []


async def test_forks_of_a_half_restored_target_see_its_image() -> None:
    """Children and grandchildren are served from it as well: every page is compared."""
    pages = 256
    async with served(BufferSource(image(0, pages * PAGE)), pages=pages) as (target, session):
        for page in range(0, pages, 10):
            assert await target.start_read(page) == (page + 1) % 256
        assert await target.start_madvise(MADV_DONTNEED, 20, 4) == 0
        child = await target.fork()
        assert await child.start_madvise(MADV_DONTNEED, 100, 4) == 0
        grandchild = await child.fork()
        assert await target.start_madvise(MADV_DONTNEED, 200, 4) == 0
        of_parent, of_child = {*range(20, 24)}, {*range(100, 104)}
        assert await holds(grandchild, model(pages, of_parent | of_child))
        assert await holds(child, model(pages, of_parent | of_child))
        assert await holds(target, model(pages, of_parent | {*range(200, 204)}))
        assert is_registered(child, child.base)
        assert session.state in (State.SERVING, State.RESIDENT)  # the target has read it all
