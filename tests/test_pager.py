"""Pager: what its callers see.  The laws that it keeps are in tests/laws."""

from __future__ import annotations

import asyncio
import logging
import mmap

import pytest

from aiouffd import (
    Action,
    ClosedError,
    Copy,
    Counters,
    FailurePolicy,
    FaultError,
    Feature,
    HandlerError,
    Histogram,
    Metrics,
    Mode,
    NoHandler,
    OwnedFd,
    PageFault,
    Pager,
    Poison,
    Resolution,
    ResolutionRefused,
    Unmapped,
    Unprotect,
    Userfaultfd,
    Zero,
)
from tests.serving import (
    LAYOUT,
    MADV_DONTNEED,
    Gate,
    Record,
    check_books,
    from_image,
    image,
    serving,
    within,
)
from tests.targets import MAP_FIXED, PAGE, Signal, Target, TargetDied, until

MAP_GROWSDOWN = 0x100

# --- life ------------------------------------------------------------------------------


async def test_a_pager_that_never_started_closes_its_descriptor() -> None:
    """What it owns is given back; nothing is said to the target."""
    with Target("anon", 4) as target:
        pager = Pager(Userfaultfd.adopt(target.take_uffd()), target=target.pidfd)
        await pager.aclose()
        assert pager.uffd.closed
        await within(pager.wait_closed())


async def test_a_second_reader_is_refused() -> None:
    """Two pagers would steal each other's faults."""
    async with serving() as served:
        second = Pager(served.uffd)
        with pytest.raises(RuntimeError, match="reader"):
            second.start()


async def test_settings_that_make_no_sense_are_refused() -> None:
    """Before anything is read."""
    with Userfaultfd.open() as uffd:
        with pytest.raises(ValueError, match="max_in_flight"):
            Pager(uffd, max_in_flight=0)
        with pytest.raises(ValueError, match="raise"):
            Pager(uffd, on_close=Action.RAISE)


async def test_closing_twice_waits_for_one_close() -> None:
    """All callers return when it is done; a cancelled one leaves it going."""
    async with serving(pages=4096) as served:
        pager = served.pager
        first = asyncio.create_task(pager.aclose())
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await within(pager.aclose())
        assert served.uffd.closed
        await within(pager.aclose())
        await within(pager.wait_closed())


async def test_a_closed_pager_takes_no_region() -> None:
    """ClosedError, whatever is asked of it."""
    async with serving() as served:
        await served.pager.aclose()
        with pytest.raises(ClosedError):
            served.pager.register(served.target.base, PAGE, from_image)
        with pytest.raises(ClosedError):
            await served.region.fill(0, image(0))
        assert "closing" in repr(served.pager)


@pytest.mark.parametrize("action", [Action.ZERO, Action.HANG, Action.KILL])
async def test_closing_does_what_is_asked(action: Action) -> None:
    """ZERO gives zeros, KILL ends the target, HANG leaves all to the descriptor's next owner."""
    gate = Gate()
    async with serving(gate) as served:
        touch = served.target.start_read(3)
        await until(lambda: gate.faults, "the handler is asked")
        await within(served.pager.aclose(action))
        assert gate.cancelled
        if action is Action.ZERO:
            assert await touch == 0
        elif action is Action.KILL:
            with pytest.raises(TargetDied):
                await touch
        else:
            assert not served.uffd.closed
            await served.target.blocked()
            with served.uffd:
                served.uffd.copy(served.target.at(3), image(3 * PAGE))
                assert await touch == 4


async def test_faults_that_come_during_the_close_get_its_action() -> None:
    """Not the pager's own setting, but what this close was asked for."""
    async with serving(pages=16384, on_close=Action.ZERO) as served:
        closing = asyncio.create_task(served.pager.aclose(Action.POISON))
        await until(lambda: served.pager.closing, "the close has begun")
        touches = [served.target.start_read(16380 + n, n) for n in range(4)]
        await within(closing)
        for touch in touches:
            assert isinstance(await touch, Signal)


async def test_a_pager_without_a_pidfd_poisons_instead_of_killing() -> None:
    """Action.KILL without anybody to kill is still no page of zeros."""
    async with serving(know_target=False) as served:
        await served.pager.aclose(Action.KILL)
        assert isinstance(await served.target.start_read(3), Signal)


# --- failure policies ------------------------------------------------------------------


async def failing(fault: PageFault) -> Resolution:
    raise LookupError(f"no page at {fault.offset:#x}")


async def test_retries_then_the_fallback() -> None:
    """A handler that raises is asked again, with backoff; then the fallback is."""
    record = Record()
    policy = FailurePolicy(retries=2, backoff=0.001, fallback=from_image)
    async with serving(failing, failure=policy, observers=[record]) as served:
        assert await served.target.start_read(3) == 4
        counters = served.pager.counters
        assert (counters.retries, counters.fallbacks, counters.failures) == (2, 1, 0)
        assert record.outcomes == ["copy"]
        assert not record.failures


@pytest.mark.parametrize("action", [Action.POISON, Action.ZERO, Action.KILL, Action.HANG])
async def test_the_last_action(action: Action, caplog: pytest.LogCaptureFixture) -> None:
    """What the policy says happens to the fault, and it is logged with its cause."""
    record = Record()
    policy = FailurePolicy(retries=0, then=action)
    async with serving(failing, failure=policy, observers=[record]) as served:
        touch = served.target.start_read(3)
        match action:
            case Action.POISON:
                assert isinstance(await touch, Signal)
            case Action.ZERO:
                assert await touch == 0
            case Action.KILL:
                with pytest.raises(TargetDied):
                    await touch
            case _:
                await until(lambda: record.failures, "the failure is told")
                await served.target.blocked()
                assert served.pager.in_flight == 1
                check_books(served.pager)
        (error,) = record.failures
        assert isinstance(error, HandlerError)
        assert isinstance(error.__cause__, LookupError)
        assert "no page at 0x3000" in caplog.text


async def test_an_error_that_is_raised_reaches_the_waiter() -> None:
    """RAISE poisons the page, ends wait_closed, and comes out of the block."""
    policy = FailurePolicy(retries=0, then=Action.RAISE)
    with pytest.raises(FaultError):
        async with serving(failing, failure=policy) as served:
            touch = served.target.start_read(3)
            with pytest.raises(FaultError):
                await within(served.pager.wait_closed())
            assert isinstance(await touch, Signal)
            await served.pager.__aexit__(None, None, None)


async def test_an_error_in_a_forked_child_reaches_the_waiter_too() -> None:
    """Nobody waits for the child's own pager."""
    policy = FailurePolicy(retries=0, then=Action.RAISE)
    features = Feature.EVENT_FORK
    with pytest.raises(FaultError):
        async with serving(failing, features=features, failure=policy) as served:
            child = await served.target.fork()
            touch = child.start_peek(served.target.at(3))
            with pytest.raises(FaultError):
                await within(served.pager.wait_closed())
            assert isinstance(await touch, Signal)
            await served.pager.__aexit__(None, None, None)


async def test_a_source_that_fails_for_good_ends_every_fault() -> None:
    """Four threads and a parked fault: each ends within the bound of the policy."""
    policy = FailurePolicy(retries=1, backoff=0.001)
    async with serving(failing, features=LAYOUT, failure=policy) as served:
        target = served.target
        removal = target.start_madvise(MADV_DONTNEED, page=40, thread=0)
        touches = [target.start_read(page, page) for page in (1, 2, 3)]
        for touch in touches:
            assert isinstance(await touch, Signal)
        assert await removal == 0
        assert served.pager.counters.failures == 3


async def test_a_failed_write_protection_lets_the_writer_go_and_tells() -> None:
    """A page that is there cannot be poisoned: whoever tracks writes learns that one was missed."""

    async def only_missing(fault: PageFault) -> Resolution:
        if fault.wp:
            raise LookupError
        return Copy(image(fault.offset), protect=True)

    policy = FailurePolicy(retries=0)
    features, modes = Feature.PAGEFAULT_FLAG_WP, Mode.MISSING | Mode.WP
    with pytest.raises(FaultError):
        async with serving(only_missing, features=features, modes=modes, failure=policy) as served:
            assert await served.target.start_write(3, 9) == 9
            with pytest.raises(FaultError):
                await within(served.pager.wait_closed())
            await served.pager.__aexit__(None, None, None)


async def test_a_fault_nobody_serves_ends() -> None:
    """The userfaultfd has the range, the pager does not: no silent hang."""
    record = Record()
    async with serving(leave_out=8, observers=[record]) as served:
        served.uffd.register(served.target.base, 8 * PAGE)
        assert isinstance(await served.target.start_read(2), Signal)
        assert isinstance(record.failures[0], NoHandler)
        assert await served.target.start_read(9) == 10


# --- the watchdog ----------------------------------------------------------------------


async def slow_source(release: asyncio.Event) -> None:
    await release.wait()  # the line that the watchdog must name


async def test_an_overdue_fault_is_reported_with_all_that_finds_the_culprit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Kind, address, offset, range, thread, age, and the line on which its coroutine waits."""
    release = asyncio.Event()

    async def waiting(fault: PageFault) -> Resolution:
        await slow_source(release)
        return await from_image(fault)

    async with serving(waiting, features=Feature.THREAD_ID, warn_after=0.05) as served:
        target = served.target
        touch = target.start_read(3)
        await until(lambda: served.pager.counters.overdue, "it is overdue")
        (entry,) = [entry for entry in caplog.records if entry.levelno == logging.WARNING]
        text = entry.getMessage()
        line = slow_source.__code__.co_firstlineno + 1
        for part in (
            f"{target.at(3):#x}",
            f"offset {3 * PAGE:#x}",
            f"thread {target.thread_ids[0]}",
            f"{target.base:#x}",
            f"test_pager.py:{line} in slow_source",
            "missing",
            "0.0",
        ):
            assert part in text, text
        release.set()
        assert await touch == 4
        assert served.pager.counters.overdue == 1


async def test_a_later_fault_is_reported_in_its_own_time(caplog: pytest.LogCaptureFixture) -> None:
    """A fault that begins after an older one was reported need not wait for that one's deadline."""
    gate = Gate()
    async with serving(gate, warn_after=0.05, deadline=60) as served:
        counters = served.pager.counters
        first = served.target.start_read(3, 0)
        await until(lambda: counters.overdue == 1, "the first is overdue")
        second = served.target.start_read(4, 1)
        await until(lambda: counters.overdue == 2, "the second is overdue", 5)
        gate.let_go()
        assert (await first, await second) == (4, 5)


# --- back-pressure ---------------------------------------------------------------------


async def test_no_more_than_so_many_handlers_wait_at_once() -> None:
    """Further faults wait in order; events are applied all the same."""
    gate = Gate()
    async with serving(gate, features=LAYOUT, max_in_flight=2, threads=6) as served:
        target, counters = served.target, served.pager.counters
        touches = []
        for page in range(5):
            touches.append(target.start_read(page, page))
            await until(lambda: counters.faults == page + 1, "it is read")  # noqa: B023
        assert [fault.offset for fault in gate.faults] == [0, PAGE]
        assert counters.queued == 3
        assert served.pager.in_flight == 5
        # A queued fault's page is removed: it reads zero at once, without its turn.
        removal = target.start_madvise(MADV_DONTNEED, page=4, thread=5)
        assert await touches[4] == 0
        assert await removal == 0
        gate.let_go()
        assert [await touch for touch in touches[:4]] == [1, 2, 3, 4]
        assert [fault.offset for fault in gate.faults] == [n * PAGE for n in range(4)]


# --- events and observers --------------------------------------------------------------


async def test_an_unmap_ends_what_is_in_flight() -> None:
    """The thread finds the hole by itself; the handler is cancelled."""
    gate = Gate()
    record = Record()
    async with serving(gate, features=LAYOUT, observers=[record]) as served:
        target = served.target
        touch = target.start_read(3, 0)
        await until(lambda: gate.faults, "the handler is asked")
        assert await target.start_munmap(2, 4, thread=1) == 0
        answer = await touch
        assert isinstance(answer, Signal)
        assert answer.number == 11
        assert record.outcomes == ["gone"]
        assert isinstance(record.events[0], Unmapped)
        await until(lambda: gate.cancelled, "the handler is cancelled")
        assert [where.length for where, _ in served.region.ranges] == [2 * PAGE, 58 * PAGE]


async def test_a_long_answer_stops_where_memory_was_moved() -> None:
    """What lies beside the page by now may have another place in the source."""

    async def wide(fault: PageFault) -> Resolution:
        return Copy(image(fault.offset, 8 * PAGE), address=fault.address)

    async with serving(wide, features=LAYOUT) as served:
        target = served.target
        # Pages 40 to 43 now lie behind page 3, in the place of 4 to 7.
        assert await target.start_mremap(40, 4, flags=3, to=target.at(4)) == target.at(4)
        assert await target.start_read(2) == 3
        words = await target.start_words(target.at(2), PAGE, 8)
        assert words == [3, 4, 41, 42, 43, 44, 9, 10]


async def test_memory_that_grows_reads_zero() -> None:
    """The kernel tells nothing of a growing mremap: only a fault there shows it."""
    async with serving(features=LAYOUT, grows=True) as served:
        target = served.target
        to = target.reserve(128 * PAGE)
        assert await target.start_mremap(0, 64, 80, flags=3, to=to) == to
        assert await target.start_peek(to + 3 * PAGE) == 4
        assert await target.start_peek(to + 70 * PAGE) == 0
        assert await target.start_peek(to + 79 * PAGE) == 0


_ROOM = 250  # pages for a stack to grow: less than its guard gap, so that nothing is put there


def _map_stack(target: Target, pages: int) -> int:
    """Map memory that grows downwards as a stack does, with some room; give its start."""
    hole = target.reserve((1 + _ROOM + pages) * PAGE) + PAGE  # what is kept below needs no gap
    assert target.call("munmap", hole, (_ROOM + pages) * PAGE).result() == 0
    start = hole + _ROOM * PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED | MAP_GROWSDOWN
    assert target.call("mmap", start, pages * PAGE, 3, flags, -1, 0).result() == start
    return start


async def test_a_stack_that_grows_reads_zero() -> None:
    """Its new pages lie below all that is known, and read zero at once, in children as well."""
    features = LAYOUT | Feature.EVENT_FORK
    async with serving(features=features, zero_elsewhere=True, leave_out=32) as served:
        target, pager = served.target, served.pager
        start = _map_stack(target, 4)
        pager.register(start, 4 * PAGE, from_image, offset=0, name="stack")
        assert await target.start_peek(start) == 1
        for page in range(1, 65):
            assert await target.start_peek(start - page * PAGE) == 0
        assert await target.start_poke(start - 100 * PAGE, 7) == 7
        assert await target.start_peek(start - 100 * PAGE) == 7
        assert pager.counters.failures == pager.counters.parked == 0
        child = await target.fork()
        assert await child.start_peek(start - 100 * PAGE) == 7
        assert await child.start_peek(start - 200 * PAGE) == 0
        assert await child.start_peek(start + PAGE) == 2


async def test_memory_that_grows_upwards_reads_zero_elsewhere() -> None:
    """A region need not be said to grow where all that is unknown reads zero."""
    async with serving(features=LAYOUT, zero_elsewhere=True) as served:
        target = served.target
        to = target.reserve(128 * PAGE)
        assert await target.start_mremap(0, 64, 80, flags=3, to=to) == to
        assert await target.start_peek(to + 79 * PAGE) == 0
        assert await target.start_peek(to + 3 * PAGE) == 4


async def test_a_move_that_is_not_known_yet_is_no_zero() -> None:
    """Whoever touches memory before the word of its move was read gets its bytes all the same."""
    async with serving(features=LAYOUT, zero_elsewhere=True, pages=400) as served:
        target, counters = served.target, served.pager.counters
        to = target.reserve(400 * PAGE)
        early = 0
        for page in range(400):
            there = to + page * PAGE
            moving = target.start_mremap(page, 1, flags=3, to=there)
            touched = await target.start_peek(there, thread=1)
            assert await moving == there
            assert isinstance(touched, Signal) or touched == (page + 1) % 256, page
            early += not isinstance(touched, Signal)
        print(f"{early} touches came after the move, {counters.parked} before its event was read")
        assert counters.failures == 0


async def test_metrics_hang_on_the_observer() -> None:
    """Counts by outcome and a histogram of latencies."""
    metrics = Metrics()
    async with serving(observers=[metrics]) as served:
        for page in range(8):
            assert await served.target.start_read(page) == page + 1
    assert isinstance(Histogram(), Histogram)
    assert served.pager.counters.as_dict()["faults"] == 8
    assert isinstance(served.pager.counters, Counters)


@pytest.mark.root
async def test_children_are_announced_before_they_are_served() -> None:
    """on_fork gets the child's pager; its regions are clones with the same handler."""
    announced: list[tuple[Pager, int]] = []

    def on_fork(child: Pager) -> None:
        announced.append((child, child.counters.faults))

    async with serving(features=Feature.EVENT_FORK, on_fork=on_fork) as served:
        child = await served.target.fork()
        await until(lambda: announced, "the child is announced")
        ((pager, faults),) = announced
        assert faults == 0
        assert await child.start_peek(served.target.at(3)) == 4
        (region,) = pager.regions
        assert region is not served.region
        assert region.handler is served.region.handler


@pytest.mark.root
async def test_handlers_of_a_dead_child_are_awaited_by_its_parent() -> None:
    """Its pager is gone before they are through with their cleanup."""
    ended: list[str] = []

    async def with_cleanup(fault: PageFault) -> Resolution:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("began")
            await asyncio.sleep(0.01)
            ended.append("ended")
        raise AssertionError

    async with serving(with_cleanup, features=Feature.EVENT_FORK) as served:
        child = await served.target.fork()
        await until(lambda: served.pager.children, "the child's pager")
        (pager,) = served.pager.children
        child.start_peek(served.target.at(3))
        await until(lambda: pager.in_flight, "the fault is read")
        child.kill()
        await until(lambda: ended, "the handler is cancelled")
        await served.pager.aclose()
        assert ended == ["began", "ended"]
        child.reap()


# --- every kind of memory in one pager -------------------------------------------------


async def test_page_sizes_mix(huge_pages: object) -> None:
    """Small and huge pages, each with its own modes, in one pager."""
    huge_pages(4)  # type: ignore[operator]
    seen: list[tuple[str, int]] = []

    async def any_kind(fault: PageFault) -> Resolution:
        seen.append((fault.kind, fault.length))
        if fault.wp:
            return Unprotect()
        return Copy(image(fault.offset, fault.length, fault.length), protect=fault.length > PAGE)

    features = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
    async with serving(any_kind, features=features) as served:
        target = served.target
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000
        huge = 2 << 20
        base = await target.call("mmap", 0, 2 * huge, 3, flags, -1, 0)
        region = served.pager.register(
            base, 2 * huge, any_kind, modes=Mode.MISSING | Mode.WP, page_size=huge
        )
        assert await target.start_peek(base + huge + 5 * PAGE) == 2
        assert await target.start_poke(base + huge + 9 * PAGE, 7) == 7
        assert await target.start_read(3) == 4
        assert seen == [("missing", huge), ("wp", huge), ("missing", PAGE)]
        await region.drop(Action.ZERO)
        assert len(served.pager.regions) == 1


@pytest.mark.parametrize("answer", [Zero(), Poison(), b"\1" * PAGE, bytearray(b"\1" * PAGE)])
async def test_what_a_handler_may_answer(answer: object) -> None:
    """Resolutions, and any buffer."""

    async def fixed(fault: PageFault) -> object:
        return answer

    async with serving(fixed) as served:  # type: ignore[arg-type]
        result = await served.target.start_read(3)
        if isinstance(answer, Poison):
            assert isinstance(result, Signal)
        else:
            assert result == (0 if isinstance(answer, Zero) else 1)


async def test_register_refuses_what_does_not_fit() -> None:
    """Misaligned, empty, overlapping, of a strange page size, or of the wrong memory."""
    async with serving() as served:
        pager, target = served.pager, served.target
        for start, length, size in [
            (target.base + 1, PAGE, PAGE),
            (target.base, 0, PAGE),
            (target.base, PAGE, 3000),
            (target.base, PAGE, 2 << 20),
            (target.at(1), PAGE, PAGE),
        ]:
            with pytest.raises(ValueError, match=r"page|overlaps|range"):
                pager.register(start, length, from_image, page_size=size)
        other = target.map(4 * PAGE)
        with pytest.raises(ResolutionRefused):
            pager.register(other, 4 * PAGE, from_image, modes=Mode.MINOR)
        pager.register(other, 4 * PAGE, from_image, offset=PAGE)
        assert await target.start_peek(other) == 2


async def test_a_range_that_the_peer_registered() -> None:
    """registered=True leaves UFFDIO_REGISTER to the owner of the memory."""
    with Target("anon", 8) as target:
        with OwnedFd(target.take_uffd()) as fd:
            uffd = Userfaultfd.adopt(fd.dup())
        async with Pager(uffd, target=target.pidfd) as pager:
            region = pager.register(target.base, target.length, from_image, registered=True)
            assert region.ioctls == 0
            assert await target.start_read(3) == 4


async def test_waiting_is_for_the_whole_family() -> None:
    """A child that outlives its parent is served to its own end."""
    async with serving(features=Feature.EVENT_FORK) as served:
        child = await served.target.fork()
        await until(lambda: served.pager.children, "the child's pager")
        waiting = asyncio.ensure_future(served.pager.wait_closed())
        served.target.kill()
        await until(lambda: served.pager.target_gone, "the parent's end")
        assert await child.start_read(7) == 8
        assert not waiting.done()
        child.kill()
        child.reap()
        await asyncio.wait_for(waiting, 10)


async def test_a_userfaultfd_that_its_owner_closed_before() -> None:
    """The pager ends without it."""
    async with serving() as served:
        assert await served.target.start_peek(served.target.at(3)) == 4
        served.pager.uffd.close()
        await within(served.pager.aclose(Action.ZERO))
        await within(served.pager.wait_closed())


# --- reading held ----------------------------------------------------------------------


async def test_held_reading_is_only_by_request() -> None:
    """A fault waits, and so does who gives memory back, however many answers end meanwhile."""
    gate = Gate()
    async with serving(gate, features=LAYOUT) as served:
        target, pager = served.target, served.pager
        first = target.start_read(1)
        await until(lambda: gate.faults, "the handler is asked")
        pager.hold_reading()
        second = target.start_read(2, thread=1)
        await target.blocked(1)
        removal = target.start_madvise(MADV_DONTNEED, 9, thread=2)
        await target.in_event(2)
        gate.let_go()  # its answer gets EAGAIN, and is tried again by a timer
        await until(lambda: pager.counters.parked, "the answer waits for the event")
        await asyncio.sleep(0.02)  # several tries
        assert (len(gate.faults), pager.counters.events) == (1, 0)
        assert not any(call.done for call in (first, second, removal))
        pager.read_events(1)
        assert (len(gate.faults), pager.counters.events) == (2, 1)
        assert (await first, await second, await removal) == (2, 3, 0)
        third = target.start_read(3)
        await target.blocked()
        await asyncio.sleep(0)
        assert len(gate.faults) == 2
        pager.resume_reading()
        assert await third == 4


async def test_closing_reads_though_it_is_held() -> None:
    """Or whoever gives memory back would sleep on."""
    async with serving(features=LAYOUT) as served:
        served.pager.hold_reading()
        removal = served.target.start_madvise(MADV_DONTNEED, 9)
        await served.target.in_event()
        await within(served.pager.aclose())  # nothing can be poisoned before it is read
        assert await removal == 0
        served.pager.hold_reading()  # does nothing any more
        served.pager.resume_reading()
