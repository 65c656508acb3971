"""Graduation: a target gets all of its memory and lives on, and no byte of it is wrong."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Iterator
from typing import Any, Final

import pytest

from aiouffd import Action, FailurePolicy, graduation
from aiouffd.errors import ClosedError, NotSupported, SourceError, StuckPage, TargetGone
from aiouffd.graduation import keep_trying, pages_with_data
from aiouffd.session_states import Milestone, State
from aiouffd.sources import Extents
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.layered import Layer, LayeredSource
from aiouffd.sources.zero import ZeroSource
from tests.serving import MADV_DONTNEED, check_books, image, unread, within
from tests.session_serving import Moody, holds, is_registered, model, served
from tests.targets import HUGE, PAGE, Target, until


@pytest.mark.parametrize("kind", ["anon", "shmem", "shmem-private", "hugetlb", "hugetlb-private"])
async def test_a_target_lives_on_without_us(kind: str, request: pytest.FixtureRequest) -> None:
    """Every kind of memory; touched, removed and never touched; nothing stays registered."""
    huge = kind.startswith("hugetlb")
    if huge:
        request.getfixturevalue("huge_pages")(6)
    pages, size = (4, HUGE) if huge else (64, PAGE)
    source = BufferSource(image(0, pages * size, size))
    async with served(source, kind=kind, pages=pages) as (target, session):
        assert await target.start_read(1) == 2
        assert await target.start_madvise(MADV_DONTNEED, 2) == 0
        assert await target.start_read(2) == 0
        await session.complete()
        assert session.state is State.DETACHED
        assert session.outcome == "detached"
        assert session.milestones == [
            Milestone.FIRST_PAGE,
            Milestone.RESIDENT,
            Milestone.DETACHED,
        ]
        assert session.handover.fd.closed
        assert not is_registered(target, target.base)
        assert await holds(target, model(pages, [2], size))
        await session.complete()  # nothing more to do
        figures = session.figures()
        assert figures.resident_s is not None
        assert figures.copied_bytes + figures.filled_bytes == (pages - 1) * size
        check_books(session.pager)


async def test_huge_pages_that_are_missing_are_found(request: pytest.FixtureRequest) -> None:
    """EEXIST says that a huge page is there, and also that there is none left to give."""
    request.getfixturevalue("huge_pages")(6)
    source = BufferSource(image(0, 4 * HUGE, HUGE))
    async with served(source, kind="hugetlb", pages=4) as (target, session):
        (region,) = session.pager.regions
        check = session._graduation._check_huge
        assert await target.start_read(0) == 1
        with pytest.raises(StuckPage, match="pool of huge pages") as found:
            check(session.pager, region)
        assert found.value.address == target.at(1)
        assert await target.start_madvise(MADV_DONTNEED, 1) == 0
        assert await target.start_read(2) == 3
        assert await target.start_read(3) == 4
        check(session.pager, region)  # what was removed is no business of the source
        child = await target.fork()
        with pytest.raises(NotSupported):
            await session.complete()
        child.kill()
        await until(lambda: not session.pager.children, "its end is seen")
        await session.complete()
        assert await target.start_sweep() == [1, 0, 3, 4]


async def test_what_graduates_is_what_the_source_says() -> None:
    """Holes and the rest behind the last partial page read zero, before and after."""
    pages = 64
    data = bytearray(model(pages, [*range(8, 40)]))
    size = pages * PAGE - 1000

    class Sparse(BufferSource):
        def extents(self) -> Any:
            yield 0, 8 * PAGE
            yield 40 * PAGE + 100, size - 40 * PAGE - 100

    data[size:] = bytes(1000)
    source = Sparse(bytes(data[:size]))
    async with served(source, pages=pages) as (target, session):
        assert await target.start_read(20) == 0
        await session.complete()
        assert await holds(target, bytes(data))
        assert session.figures().filled_bytes == 32 * PAGE


#: Whether we alone have the userfaultfd: its close is then what gives memory back.
ALONE: Final = pytest.mark.parametrize("alone", [False, True], ids=["shared", "alone"])


@ALONE
async def test_children_graduate_with_their_parent(alone: bool) -> None:
    """Forked before, half served; and none of them waits for anybody afterwards."""
    pages = 64
    source = BufferSource(image(0, pages * PAGE))
    async with served(source, pages=pages, alone=alone) as (target, session):
        assert await target.start_madvise(MADV_DONTNEED, 1) == 0
        child = await target.fork()
        grandchild = await child.fork()
        assert await child.start_madvise(MADV_DONTNEED, 2) == 0
        await session.complete()
        for one, zero in ((target, [1]), (child, [1, 2]), (grandchild, [1])):
            assert not is_registered(one, one.base)
            assert await holds(one, model(pages, zero))
        assert await target.start_madvise(MADV_DONTNEED, 5) == 0  # no event: nobody would read it
        assert await target.start_read(5) == 0
        assert session.counters().filled_bytes >= 3 * (pages - 2) * PAGE


@ALONE
async def test_orphans_graduate_too(alone: bool) -> None:
    """The target has exited; the child that it forked lives, and needs nobody afterwards."""
    pages = 64
    source = BufferSource(image(0, pages * PAGE))
    async with served(source, pages=pages, alone=alone) as (target, session):
        child = await target.fork()
        grandchild = await child.fork()
        target.kill()
        await until(lambda: session.pager.target_gone, "its end is seen")
        child.kill()
        await until(lambda: len(session._serving_pagers()) == 1, "its end is seen as well")
        await session.complete()
        assert session.state is State.DETACHED
        assert not is_registered(grandchild, grandchild.base)
        assert await holds(grandchild, model(pages))


@ALONE
async def test_memory_that_grew_and_moved_is_given_back(alone: bool) -> None:
    """A tail that mremap grew reads zero, and is not left registered where nobody looks."""
    pages = 64
    source = BufferSource(image(0, pages * PAGE))
    async with served(source, pages=pages, alone=alone) as (target, session):
        to = target.reserve(64 * PAGE)
        moved = await target.start_mremap(32, 32, 48, flags=3, to=to)
        assert moved == to
        assert await target.start_peek(to + 40 * PAGE) == 0  # of the tail, touched
        await session.complete()
        for address in (target.base, to, to + 32 * PAGE, to + 47 * PAGE):
            assert not is_registered(target, address), hex(address)
        assert await target.start_peek(to + 47 * PAGE) == 0
        assert await target.start_words(to, PAGE, 34) == [*range(33, 65), 0, 0]


async def test_holes_read_zero_at_once_though_they_are_registered_still() -> None:
    """Between the point of no return and the close: let go, a fault would only come again."""
    data = BufferSource(image(0, 64 * PAGE))
    source = LayeredSource(ZeroSource(64 * PAGE), Layer(data, [(0, 60 * PAGE)]))
    async with served(source, pages=64, alone=True) as (target, session):
        await session.fill()
        session._graduation.detach()
        for page in range(60, 64):
            before = session.counters().faults
            assert await target.start_read(page) == 0
            assert session.counters().faults == before + 1
        await session._graduation.settle()
        await session.aclose(Action.ZERO)
        assert await target.start_words(target.base, PAGE, 64) == [*range(1, 61), *[0] * 4]


async def test_memory_is_moved_as_a_whole_while_it_is_given_back() -> None:
    """A mapping that we know in two parts is never cut between them, when we are alone.

    One thread moves it to and fro all the while: across a cut mremap fails with EFAULT.
    """
    pages = 64
    for _ in range(10):
        source = BufferSource(image(0, pages * PAGE))
        async with served(source, pages=pages, alone=True) as (target, session):
            first, second = (target.reserve(pages * PAGE) for _ in range(2))
            half = pages // 2
            assert await target.start_mremap(half, half, flags=3, to=first + half * PAGE)
            assert await target.start_mremap(0, half, flags=3, to=first) == first
            completing = asyncio.ensure_future(session.complete())
            places = [first, second]
            while session.state is not State.DETACHED or places[0] != first:
                length = pages * PAGE
                moved = await target.call("mremap", places[0], length, length, 3, places[1])
                assert moved == places[1]
                places.reverse()
            await completing
            assert await target.start_words(first, PAGE, pages) == [*range(1, pages + 1)]


@pytest.mark.parametrize("how", ["munmap", "madvise", "mremap"])
async def test_a_thread_that_is_changing_memory_is_not_left_waiting(how: str) -> None:
    """Its event comes behind the unregistration, and somebody must read it still.

    The kernel tells two userfaultfds one after the other of an munmap across both; the first
    is read only when the memory of the second has been unregistered.
    """
    pages = 64
    source = BufferSource(image(0, pages * PAGE))
    async with served(source, pages=pages, leave_out=2) as (target, session):
        await session.fill()
        with unread(target) as read_on:
            to = target.reserve(16 * PAGE)
            change = target.start_munmap(0, 8, thread=1)
            await until(session.pager.uffd.is_changing, "the munmap waits for the other")
            others = {
                "munmap": lambda: target.start_munmap(20, 4, thread=2),
                "madvise": lambda: target.start_madvise(MADV_DONTNEED, 20, 4, thread=2),
                "mremap": lambda: target.start_mremap(20, 4, flags=3, to=to, thread=2),
            }
            other = others[how]()
            completing = asyncio.ensure_future(session.complete())
            await until(lambda: session.state is State.DETACHED, "it is detached")
            assert not completing.done()
            assert not is_registered(target, target.at(40))
            if how == "munmap":  # too late
                completing.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await completing
            # nor does anybody poison what is not ours any more
            closing = asyncio.ensure_future(session.aclose(Action.POISON))
            await asyncio.sleep(0)
            read_on()
            assert await change == 0
            assert await other == (to if how == "mremap" else 0)
            await within(session.complete())
            await within(closing)
            if how != "munmap":
                await within(completing)
            assert session.outcome == "detached"
        assert not is_registered(target, to)
        assert await target.start_words(target.at(24), PAGE, 40) == list(range(25, 65))


async def test_a_failing_source_leaves_everything_served() -> None:
    """The error is told to all who wait; the next try succeeds."""
    pages = 64
    source = Moody(image(0, pages * PAGE), random.Random(1), failing=1.0)
    failure = FailurePolicy(retries=0)
    async with served(source, pages=pages, failure=failure) as (target, session):
        calls = [asyncio.ensure_future(session.complete()) for _ in range(3)]
        done = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(one) for one in done] == [SourceError] * 3
        assert session.state is State.SERVING
        assert is_registered(target, target.base)
        source.failing = 0.0
        assert await target.start_read(3) == 4
        await asyncio.gather(*(session.complete() for _ in range(3)))
        assert session.milestones.count(Milestone.DETACHED) == 1
        assert await holds(target, model(pages))


async def test_what_fails_for_a_while_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever was short or cut; a mistake is said once, and a target that is gone is no error."""
    monkeypatch.setattr(graduation, "_RETRY_FIRST", 0.001)
    shortage = OSError(errno.EMFILE, "Too many open files")
    todo: list[BaseException | None] = []

    async def complete() -> None:
        if error := todo.pop(0):
            raise error

    for last in (None, TargetGone("filling", errno.ESRCH, 0, 0), ClosedError("closed")):
        todo[:] = [shortage, SourceError("late"), ConnectionResetError("reset"), last]
        await within(keep_trying(complete, "it"))
        assert not todo
    assert [one.levelname for one in caplog.records] == ["WARNING"] * 9
    assert "it cannot be completed yet" in caplog.text
    assert "Too many open files" in caplog.text
    caplog.clear()
    todo[:] = [shortage, ValueError("wrong"), None]
    await within(keep_trying(complete, "it"))
    assert len(todo) == 1
    assert [one.levelname for one in caplog.records] == ["WARNING", "ERROR"]
    assert "it cannot be completed, and is served on" in caplog.text


async def test_filling_is_not_letting_go() -> None:
    """After fill() the session is resident, and serves what the target removes."""
    pages = 64
    async with served(BufferSource(image(0, pages * PAGE)), pages=pages) as (target, session):
        await session.fill()
        assert session.state is State.RESIDENT
        assert is_registered(target, target.base)
        assert await target.start_madvise(MADV_DONTNEED, 7) == 0
        assert await holds(target, model(pages, [7]))
        await session.fill()
        assert session.milestones.count(Milestone.RESIDENT) == 1


async def test_a_closed_session_completes_nothing() -> None:
    """Who waits for the completion of a session that is closed is told."""
    pages = 64
    source = Moody(image(0, pages * PAGE), random.Random(2))
    source.open.clear()
    async with served(source, pages=pages, on_close=Action.POISON) as (target, session):
        completing = asyncio.ensure_future(session.complete())
        await until(lambda: source.reads, "it has begun")
        await session.aclose()
        with pytest.raises(ClosedError):
            await completing
        assert session.state is State.FAILED
        with pytest.raises(ClosedError):
            await session.complete()
        assert await target.start_sweep(0, 4) == [None] * 4


async def test_a_target_that_dies_meanwhile_is_gone() -> None:
    """It is told once to each who waits, and afterwards as well."""
    pages = 64
    source = Moody(image(0, pages * PAGE), random.Random(3))
    source.open.clear()
    async with served(source, pages=pages) as (target, session):
        calls = [asyncio.ensure_future(session.complete()) for _ in range(2)]
        await until(lambda: source.reads, "it has begun")
        target.kill()
        await until(lambda: session.pager.target_gone, "its end is seen")
        source.open.set()
        done = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(one) for one in done] == [TargetGone] * 2
        await within(session.wait_closed())
        await session.aclose()
        assert session.state is State.TARGET_GONE
        with pytest.raises(TargetGone):
            await session.complete()


_MASK: Final = (1 << 64) - 1


def churned(seed: int, count: int, pages: int) -> set[int]:
    """Which pages target.c's churn has removed: its random numbers, made here."""
    removed: set[int] = set()
    state = seed
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        removed.add((mixed ^ (mixed >> 31)) % pages)
    return removed


@pytest.mark.limit(120)
@pytest.mark.parametrize("group", range(4))
async def test_cancelled_anywhere_it_is_served_or_detached(seed: int, group: int) -> None:
    """Scenario 31: whenever the caller is cancelled, while threads touch, remove and fork."""
    outcomes = dict.fromkeys(State, 0)
    for number in range(30):
        rng = random.Random(seed * 1000 + group * 100 + number)
        print(f"seed {seed}, group {group}, number {number}")
        outcomes[await graduate_once(rng)] += 1
    assert outcomes[State.DETACHED]
    assert outcomes[State.SERVING] + outcomes[State.RESIDENT]


async def graduate_once(rng: random.Random) -> State:
    """Complete one target in the middle of everything; verify every byte against the model."""
    pages = 256
    failing = rng.choice([0.0, 0.0, 0.02])
    source = Moody(image(0, pages * PAGE), rng, failing, at_hand=0.5)
    failure = FailurePolicy(retries=20, backoff=0.0001)
    async with served(source, pages=pages, failure=failure) as (target, session):
        churn_seed = rng.randrange(2**63)
        target.pages = pages // 2  # what is removed; the rest is written
        churn = target.start_churn(MADV_DONTNEED, churn_seed, 4, pause_us=rng.choice([20, 50, 200]))
        target.pages = pages
        storms = [target.start_storm(rng.randrange(2**63), 1 << 30, thread) for thread in (0, 1)]
        children: list[Target] = []
        completing = asyncio.ensure_future(session.complete())
        expected = bytearray(image(0, pages * PAGE))
        for _ in range(rng.randrange(1, 20)):
            match rng.randrange(4):
                case 0:
                    page, value = rng.randrange(pages // 2, pages), rng.randrange(256)
                    at = page * PAGE + 8
                    expected[at] = value
                    assert await target.start_poke(target.base + at, value, 2) == value
                case 1 if len(children) < 2 and rng.random() < 0.3:
                    children.append(await target.fork(3))
                case _:
                    for _ in range(rng.randrange(20)):
                        await asyncio.sleep(0)
        if rng.random() < 0.7:
            completing.cancel()
        done = await asyncio.gather(completing, return_exceptions=True)
        assert done[0] is None or isinstance(done[0], asyncio.CancelledError | SourceError), done
        state = session.state
        assert state is State.DETACHED or done[0] is not None
        await target.stop(3)
        for storm in storms:
            found = await storm
            assert (found.wrong, found.stopped) == (0, 0)
        removed = churned(churn_seed, await churn, pages // 2)
        for page in removed:
            expected[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
        if session._detaching is not None:
            await session.complete()
            assert not is_registered(target, target.base)
            assert not any(is_registered(child, child.base) for child in children)
        else:
            assert is_registered(target, target.base)
        assert await holds(target, bytes(expected))
        for child in children:
            words = await child.start_sweep(thread=5)
            for page, word in enumerate(words):
                assert word == page + 1 or (word == 0 and page in removed), (page, word)
        for pager in (session.pager, *session.pager.children):
            check_books(pager)
        counters = session.counters()
        if state is not State.DETACHED:
            assert session.in_flight == 0
        assert counters.faults == counters.joined + counters.ended
        assert counters.ended == sum(session.metrics.outcomes.values())
        assert counters.events == sum(session.metrics.events.values())
        return state


async def test_a_region_is_compared_with_its_own_extents_only() -> None:
    """A process has hundreds of mappings and ten thousands of extents: not each with each."""

    class Bisected(Extents):
        __slots__ = ()

        def __iter__(self) -> Iterator[tuple[int, int]]:
            raise AssertionError("all of them are gone through")

    data = Bisected([(0, 100), (PAGE * 3, PAGE), (PAGE * 5 + 1, 1), (PAGE * 9, PAGE)])
    async with served(BufferSource(model(16)), pages=8) as (_, session):
        (region,) = session.pager.regions
        assert list(pages_with_data(region, data)) == [
            (0, PAGE),
            (PAGE * 3, PAGE * 4),
            (PAGE * 5, PAGE * 6),
        ]
