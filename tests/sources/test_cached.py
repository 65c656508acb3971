"""CachedSource: one read for all, views instead of copies, and a bound that holds."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.errors import SourceError
from aiouffd.fds import OwnedFd
from aiouffd.handover import HandedRegion, Handover
from aiouffd.service import Service
from aiouffd.session import Session
from aiouffd.sources import Source, identity_of
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.cached import CachedSource
from aiouffd.testing.sources import PAGE, SourceContract, as_bytes, image
from tests.sources.slow import SlowSource, turns
from tests.targets import Target, until

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK: Final = 4 * PAGE
DATA: Final = image(64 * PAGE + 123)


class TestOverMemory(SourceContract):
    """What is below has everything at hand."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Keep less than there is."""
        source = CachedSource(BufferSource(data), 6 * PAGE, block=PAGE)
        yield source
        await source.aclose()


class TestOverASlowSource(SourceContract):
    """What is below takes its time."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Keep less than there is."""
        source = CachedSource(SlowSource(data, wait=False), 2 * BLOCK, block=BLOCK)
        yield source
        await source.aclose()


async def test_a_block_is_read_once_and_then_lent() -> None:
    """Pages of one block are views of the same bytes; the second needs no wait."""
    inner = SlowSource(DATA, wait=False)
    cache = CachedSource(inner, 8 * BLOCK, block=BLOCK)
    assert as_bytes(await cache.read(PAGE, PAGE)) == DATA[PAGE : 2 * PAGE]
    first, second = cache.read_nowait(0, PAGE), cache.read_nowait(0, PAGE)
    assert isinstance(first, memoryview)
    assert isinstance(second, memoryview)
    assert first.readonly
    assert first.obj is second.obj
    assert inner.reads == [(0, BLOCK)]
    figures = cache.figures()
    assert (figures.hits, figures.misses, figures.reads) == (2, 1, 1)
    assert figures.read_bytes == figures.held_bytes == BLOCK


async def test_neighbours_are_fetched_in_one_read() -> None:
    """A long read takes one read for each stretch of blocks that are missing."""
    inner = SlowSource(DATA, wait=False)
    cache = CachedSource(inner, 64 * PAGE, block=BLOCK)
    await cache.read(5 * BLOCK, 1)
    assert as_bytes(await cache.read(100, 10 * BLOCK)) == DATA[100 : 100 + 10 * BLOCK]
    assert inner.reads[1:] == [(0, 5 * BLOCK), (6 * BLOCK, 5 * BLOCK)]
    end = len(DATA)
    assert as_bytes(await cache.read(end - 200, 200)) == DATA[-200:]
    assert inner.reads[-1] == (15 * BLOCK, end - 15 * BLOCK)


async def test_what_the_source_has_at_hand_needs_no_task() -> None:
    """A read that finds everything in memory below is done without suspending."""
    cache = CachedSource(BufferSource(DATA), 8 * BLOCK, block=BLOCK)
    reading = cache.read(0, PAGE)
    with pytest.raises(StopIteration) as done:
        reading.send(None)
    assert as_bytes(done.value.value) == DATA[:PAGE]
    assert cache.read_nowait(PAGE, PAGE) is not None


# --- one read for all ------------------------------------------------------------------


async def test_cancelling_one_leaves_the_others_their_read() -> None:
    """The read goes on until the last of those who wait has gone."""
    inner = SlowSource(DATA)
    cache = CachedSource(inner, 8 * BLOCK, block=BLOCK)
    reads = [asyncio.ensure_future(cache.read(page * PAGE, PAGE)) for page in (0, 0, 1, 2, 3)]
    await turns()
    reads[0].cancel()
    reads[3].cancel()
    await turns()
    assert inner.cancelled == 0
    inner.let_go()
    answers = await asyncio.gather(*reads, return_exceptions=True)
    assert [isinstance(answer, asyncio.CancelledError) for answer in answers] == [
        *(True, False, False, True, False)
    ]
    assert as_bytes(await reads[1]) == DATA[:PAGE]
    assert as_bytes(await reads[4]) == DATA[3 * PAGE : BLOCK]
    assert inner.reads == [(0, BLOCK)]
    assert cache.figures().joined == 4


async def test_cancelling_all_cancels_the_read() -> None:
    """Nobody waits any more: the read below ends, and who comes later begins a new one."""
    inner = SlowSource(DATA)
    cache = CachedSource(inner, 8 * BLOCK, block=BLOCK)
    reads = [asyncio.ensure_future(cache.read(0, PAGE)) for _ in range(5)]
    await turns()
    for read in reads:
        read.cancel()
    await asyncio.gather(*reads, return_exceptions=True)
    late = asyncio.ensure_future(cache.read(0, PAGE))
    await turns()
    assert inner.cancelled == 1
    inner.let_go()
    assert as_bytes(await late) == DATA[:PAGE]
    assert inner.reads == [(0, BLOCK)] * 2


async def test_a_failure_reaches_everybody_and_is_not_kept() -> None:
    """All who waited get the error; the next read tries again."""
    inner = SlowSource(DATA)
    inner.error = SourceError("the disk is gone")
    cache = CachedSource(inner, 8 * BLOCK, block=BLOCK)
    reads = [asyncio.ensure_future(cache.read(0, PAGE)) for _ in range(5)]
    await turns()
    inner.let_go()
    for answer in await asyncio.gather(*reads, return_exceptions=True):
        assert isinstance(answer, SourceError)
    inner.error = None
    assert as_bytes(await cache.read(0, PAGE)) == DATA[:PAGE]


async def test_a_source_that_cancels_itself_has_failed() -> None:
    """To who waits it is an error, not a cancellation of the waiter."""
    inner = SlowSource(DATA, wait=False)
    inner.error = asyncio.CancelledError()
    cache = CachedSource(inner, 8 * BLOCK, block=BLOCK)
    with pytest.raises(SourceError, match="cancelled"):
        await cache.read(0, PAGE)


async def test_one_failed_stretch_fails_the_read_and_leaves_no_other() -> None:
    """A read that wants two stretches waits for both, whatever becomes of one."""
    inner = SlowSource(DATA)
    cache = CachedSource(inner, 16 * BLOCK, block=BLOCK)
    middle = asyncio.ensure_future(cache.read(BLOCK, PAGE))
    await turns()
    whole = asyncio.ensure_future(cache.read(0, 3 * BLOCK))
    await turns()
    inner.error = SourceError("gone")
    inner.let_go()
    for answer in await asyncio.gather(middle, whole, return_exceptions=True):
        assert isinstance(answer, SourceError)
    assert inner.reads == [(BLOCK, BLOCK), (0, BLOCK), (2 * BLOCK, BLOCK)]
    await cache.aclose()


# --- the bound -------------------------------------------------------------------------


async def test_what_is_kept_stays_within_the_bound(seed: int) -> None:
    """However much is read, with views held or not, no more than ``max_bytes`` is kept."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    cache = CachedSource(SlowSource(DATA, wait=False), 5 * BLOCK, block=BLOCK)
    held: list[tuple[int, Buffer]] = []
    for _ in range(400):
        offset = rng.randrange(len(DATA) - PAGE)
        length = rng.choice((1, PAGE, 3 * BLOCK))
        length = min(length, len(DATA) - offset)
        held.append((offset, await cache.read(offset, length)))
        if rng.random() < 0.6:
            held.pop(rng.randrange(len(held)))
        assert cache.figures().held_bytes <= 5 * BLOCK
        assert cache.figures().held_bytes == sum(map(len, cache._blocks.values()))
    for offset, view in held:
        assert as_bytes(view) == DATA[offset : offset + len(memoryview(view))]


async def test_a_block_that_is_lent_is_not_dropped() -> None:
    """With every block in use a new one is given, but not kept; when one is back, it is."""
    inner = SlowSource(DATA, wait=False)
    cache = CachedSource(inner, 2 * BLOCK, block=BLOCK)
    for number in (0, 1):
        await cache.read(number * BLOCK, PAGE)
    lent = [cache.read_nowait(number * BLOCK, PAGE) for number in (0, 1)]
    assert as_bytes(await cache.read(2 * BLOCK, PAGE)) == DATA[2 * BLOCK :][:PAGE]
    assert cache.read_nowait(2 * BLOCK, PAGE) is None
    assert cache.read_nowait(0, PAGE) is not None
    lent.pop(0)
    gc.collect()
    await cache.read(2 * BLOCK, PAGE)
    assert cache.read_nowait(2 * BLOCK, PAGE) is not None
    assert cache.read_nowait(0, PAGE) is None
    assert as_bytes(lent[0] or b"") == DATA[BLOCK:][:PAGE]


async def test_the_least_recently_used_goes_first() -> None:
    """Reading a block again keeps it."""
    cache = CachedSource(SlowSource(DATA, wait=False), 3 * BLOCK, block=BLOCK)
    for number in (0, 1, 2, 0, 3):
        await cache.read(number * BLOCK, PAGE)
    kept = [number for number in range(5) if cache.read_nowait(number * BLOCK, 1) is not None]
    assert kept == [0, 2, 3]


async def test_a_small_piece_of_a_large_buffer_keeps_only_itself() -> None:
    """Closing lets everything go; what was lent stays as it is."""
    cache = CachedSource(BufferSource(DATA), 3 * BLOCK, block=BLOCK)
    await cache.read(0, PAGE)
    view = cache.read_nowait(0, PAGE)
    assert isinstance(view, memoryview)
    assert isinstance(view.obj, bytearray)
    assert len(view.obj) == BLOCK
    await cache.aclose()
    assert cache.figures().held_bytes == 0
    assert as_bytes(view) == DATA[:PAGE]


@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(1, 100)), max_size=30),
    st.sampled_from([1, 2, 8, 32]),
    st.integers(1, 9),
    st.booleans(),
)
def test_any_reads_give_the_bytes(
    reads: list[tuple[int, int]], block: int, blocks: int, slow: bool
) -> None:
    """Whatever is read in whatever order and at once, it is the source's bytes."""
    data = bytes(range(100))

    async def read_all() -> None:
        inner = SlowSource(data, wait=False) if slow else BufferSource(data)
        cache = CachedSource(inner, block * blocks, block=block)
        wanted = [(offset, min(length, 100 - offset)) for offset, length in reads]
        answers = await asyncio.gather(*(cache.read(*stretch) for stretch in wanted))
        for (offset, length), answer in zip(wanted, answers, strict=True):
            assert as_bytes(answer) == data[offset : offset + length]
        assert cache.figures().held_bytes <= block * blocks
        await cache.aclose()

    asyncio.run(read_all())


async def test_it_passes_on_what_it_stands_for() -> None:
    """Size, identity and extents are those of the source below, which it closes."""
    inner = SlowSource(DATA, extents=[(PAGE, PAGE)])
    cache = CachedSource(inner, BLOCK, block=BLOCK)
    assert cache.size == len(DATA)
    assert list(cache.extents()) == [(PAGE, PAGE)]
    assert identity_of(cache) == identity_of(inner) != ""
    await cache.aclose()
    assert inner.closed == 1


def test_nonsense_is_refused() -> None:
    """No room for a block, or a block that is no power of two."""
    with pytest.raises(ValueError, match="cannot keep a block"):
        CachedSource(BufferSource(DATA), PAGE, block=BLOCK)
    with pytest.raises(ValueError, match="power of two"):
        CachedSource(BufferSource(DATA), BLOCK, block=3 * PAGE)


# --- sessions --------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def sessions(source: Source, count: int) -> AsyncIterator[list[tuple[Target, Session]]]:
    """Serve so many targets from one source, each by a session of its own."""
    pages = source.size // PAGE
    async with contextlib.AsyncExitStack() as stack:
        served = []
        for _ in range(count):
            target = stack.enter_context(Target("anon", pages, threads=1))
            region = HandedRegion(target.base, target.length, 0, PAGE)
            handover = Handover(OwnedFd(target.take_uffd()), (region,))
            session = Session(handover, source, service=Service(deadline=None))
            served.append((target, await stack.enter_async_context(session)))
        yield served


async def test_25_sessions_share_one_read() -> None:
    """Scenario 36: one fetch and 25 installs; ends of sessions in between harm no other."""
    data = image(16 * PAGE)
    inner = SlowSource(data)
    cache = CachedSource(inner, 2 * BLOCK, block=BLOCK)
    async with sessions(cache, 25) as served:
        touches = [target.start_read(5) for target, _ in served]
        await until(
            lambda: sum(session.pager.in_flight for _, session in served) == 25,
            "all 25 wait for the page",
        )
        for target, session in served[:5]:  # the one that began the read is among them
            target.kill()
            await session.aclose()
        assert inner.cancelled == 0
        inner.let_go()
        for touch in touches[5:]:
            assert await touch == data[5 * PAGE]
        assert inner.reads == [(BLOCK, BLOCK)]
        for target, session in served[5:]:
            assert session.figures().copied_bytes == PAGE
            assert target.memory(target.at(5), PAGE) == data[5 * PAGE : 6 * PAGE]
        for page in range(16):  # all of the image goes through a cache of half its size
            for touch in [target.start_read(page) for target, _ in served[5:]]:
                assert await touch == data[page * PAGE]
            assert cache.figures().held_bytes <= 2 * BLOCK
        assert len(inner.reads) == len(set(inner.reads)) == 4  # each block once


async def test_a_fetch_ends_with_the_last_session_that_wanted_it() -> None:
    """Scenario 36: once all targets that wait are gone, nothing is fetched any more."""
    inner = SlowSource(image(16 * PAGE))
    cache = CachedSource(inner, 2 * BLOCK, block=BLOCK)
    async with sessions(cache, 3) as served:
        for target, _ in served:
            target.start_read(5)
        await until(lambda: sum(session.pager.in_flight for _, session in served) == 3, "they wait")
        for target, session in served:
            target.kill()
            await session.aclose()
        await turns()
        assert inner.cancelled == 1
        assert cache.figures().held_bytes == 0


async def test_whatever_happens_at_once_the_bytes_are_right(seed: int) -> None:
    """Reads, cancellations, failures and views held for long, in random order."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    inner = SlowSource(DATA, wait=False)
    cache = CachedSource(inner, 6 * PAGE, block=PAGE)
    held: list[Buffer] = []
    reads: dict[asyncio.Task[Buffer], tuple[int, int]] = {}
    failed = 0
    for _ in range(600):
        offset = rng.randrange(20 * PAGE)
        length = rng.randrange(1, 4 * PAGE)
        reads[asyncio.ensure_future(cache.read(offset, length))] = offset, length
        inner.error = SourceError("now and then") if rng.random() < 0.05 else None
        (inner.hold if rng.random() < 0.3 else inner.let_go)()
        if rng.random() < 0.3:
            rng.choice(list(reads)).cancel()
        if rng.random() < 0.5:
            await asyncio.sleep(0)
        for task in [task for task in reads if task.done()]:
            offset, length = reads.pop(task)
            if task.cancelled():
                continue
            if task.exception() is not None:
                assert isinstance(task.exception(), SourceError)
                failed += 1
                continue
            assert as_bytes(task.result()) == DATA[offset : offset + length]
            held = [*held[-3:], task.result()]
        assert cache.figures().held_bytes <= 6 * PAGE
    inner.let_go()
    await asyncio.gather(*reads, return_exceptions=True)
    await turns()
    assert not cache._flights
    assert not cache._tasks
    figures = cache.figures()
    assert failed
    assert 0 < figures.joined < figures.misses
    assert figures.held_bytes == sum(map(len, cache._blocks.values())) <= 6 * PAGE
    await cache.aclose()
