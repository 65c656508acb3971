"""Readiness: turns are shared out, and nothing outlives its descriptor."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import weakref
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from aiouffd import readiness
from aiouffd.readiness import (
    add_reader,
    between_pieces,
    pause_reader,
    remove_reader,
    resume_reader,
)
from tests.serving import within
from tests.targets import until


@pytest.fixture
def counters() -> Iterator[list[int]]:
    """Three eventfds, which are readable while their count is above zero."""
    made = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(3)]
    yield made
    for fd in made:
        os.close(fd)


def taking(fd: int, log: list[tuple[int, int]]) -> Callable[[int], int]:
    """Make a turn that takes what there is, once, and notes how often it might have."""

    def turn(rounds: int) -> int:
        try:
            os.eventfd_read(fd)
        except BlockingIOError:
            return 0
        log.append((fd, rounds))
        return 1

    return turn


async def test_who_is_ready_has_a_turn(counters: list[int]) -> None:
    """Each that was added, none that was removed."""
    loop = asyncio.get_running_loop()
    log: list[tuple[int, int]] = []
    for fd in counters:
        add_reader(loop, fd, taking(fd, log))
    first, second, third = counters
    os.eventfd_write(first, 1)
    os.eventfd_write(third, 1)
    await until(lambda: len(log) == 2, "both have their turns")
    assert {fd for fd, _ in log} == {first, third}
    remove_reader(loop, first)
    remove_reader(loop, first)  # a second time does nothing
    os.eventfd_write(first, 1)
    os.eventfd_write(second, 1)
    await until(lambda: len(log) == 3, "the other has its turn")
    for _ in range(10):
        await asyncio.sleep(0)
    assert log[2:] == [(second, 1)]
    for fd in (second, third):
        remove_reader(loop, fd)


async def test_nobody_is_served_twice_before_all_were_once(counters: list[int]) -> None:
    """However much each of them has, they take turns; and the loop has its turn in between."""
    loop = asyncio.get_running_loop()
    served: list[int] = []
    turns_of_loop: list[int] = []

    def never_done(fd: int) -> Callable[[int], int]:
        def turn(rounds: int) -> int:
            served.append(fd)
            return rounds

        return turn

    for fd in counters:
        os.eventfd_write(fd, 1)
        add_reader(loop, fd, never_done(fd))
    while len(turns_of_loop) < 3:
        await asyncio.sleep(0)
        turns_of_loop.append(len(served))
    for fd in counters:
        remove_reader(loop, fd)
    assert len(served) >= 64
    for at in range(0, len(served) - 2, 3):
        assert set(served[at : at + 3]) == set(counters)
    assert max(b - a for a, b in zip([0, *turns_of_loop], turns_of_loop, strict=False)) <= 2 * 66


async def test_who_is_alone_may_read_on(counters: list[int]) -> None:
    """From its second turn on, up to what is left of the wake-up."""
    loop = asyncio.get_running_loop()
    fd = counters[0]
    given: list[int] = []

    def busy(rounds: int) -> int:
        given.append(rounds)
        if len(given) == 3:
            os.eventfd_read(fd)
        return 1

    add_reader(loop, fd, busy)
    os.eventfd_write(fd, 1)
    await until(lambda: len(given) == 3, "three turns")
    remove_reader(loop, fd)
    assert given[0] == 1
    assert given[1] > 32


async def test_a_turn_may_remove_others_and_itself(counters: list[int]) -> None:
    """Who was ready with it has no turn any more."""
    loop = asyncio.get_running_loop()
    called: list[int] = []

    def remove_all(fd: int) -> Callable[[int], int]:
        def turn(_rounds: int) -> int:
            called.append(fd)
            for one in counters:
                remove_reader(loop, one)
            return 1

        return turn

    for fd in counters:
        os.eventfd_write(fd, 1)
        add_reader(loop, fd, remove_all(fd))
    await until(lambda: called, "one has its turn")
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(called) == 1


async def test_the_last_one_takes_the_epoll_with_it(counters: list[int]) -> None:
    """No descriptor of ours is left, and the next one begins anew."""
    loop = asyncio.get_running_loop()
    before = os.listdir("/proc/self/fd")
    log: list[tuple[int, int]] = []
    for _ in range(3):
        for fd in counters:
            add_reader(loop, fd, taking(fd, log))
        assert len(os.listdir("/proc/self/fd")) == len(before) + 1
        os.eventfd_write(counters[1], 1)
        await until(lambda: log, "it has its turn")
        log.clear()
        for fd in counters:
            remove_reader(loop, fd)
        assert os.listdir("/proc/self/fd") == before


async def test_a_turn_sees_the_context_that_it_was_added_in(counters: list[int]) -> None:
    """As a callback of the loop's own would, and changes stay its own."""
    loop = asyncio.get_running_loop()
    who = contextvars.ContextVar("who", default="nobody")
    seen: dict[int, str] = {}

    def look(fd: int) -> Callable[[int], int]:
        def turn(_rounds: int) -> int:
            os.eventfd_read(fd)
            seen[fd] = who.get()
            who.set("a turn")
            return 1

        return turn

    def add(fd: int, name: str) -> None:
        who.set(name)
        add_reader(loop, fd, look(fd))

    for fd, name in zip(counters, ("one", "two", "three"), strict=True):
        contextvars.copy_context().run(add, fd, name)
    for fd in counters:
        os.eventfd_write(fd, 1)
    await until(lambda: len(seen) == 3, "all have their turns")
    for fd in counters:
        remove_reader(loop, fd)
    assert list(map(seen.get, counters)) == ["one", "two", "three"]
    assert who.get() == "nobody"


async def test_between_two_pieces_who_is_ready_goes_first(counters: list[int]) -> None:
    """A task that only yields would go on before it; and a loop without readers just turns."""
    loop = asyncio.get_running_loop()
    await within(between_pieces())
    log: list[tuple[int, int]] = []
    fd = counters[0]
    add_reader(loop, fd, taking(fd, log))
    for piece in range(1, 20):
        os.eventfd_write(fd, 1)
        await between_pieces()
        assert len(log) == piece
    remove_reader(loop, fd)


async def test_who_is_paused_has_no_turn_and_needs_no_descriptor_to_go_on(
    counters: list[int],
) -> None:
    """The only one, too: its epoll stays."""
    loop = asyncio.get_running_loop()
    log: list[tuple[int, int]] = []
    fd = counters[0]
    add_reader(loop, fd, taking(fd, log))
    pause_reader(loop, fd)
    os.eventfd_write(fd, 1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not log
    resume_reader(loop, fd)
    await until(lambda: log, "its turn")
    assert len(os.listdir("/proc/self/fd")) == before
    remove_reader(loop, fd)
    pause_reader(loop, fd)  # nothing, by now
    resume_reader(loop, fd)


async def test_a_descriptor_that_its_owner_closed_holds_up_nobody(counters: list[int]) -> None:
    """Not even if a duplicate keeps it in the epoll: others have their turns, the loop its own."""
    loop = asyncio.get_running_loop()
    log: list[tuple[int, int]] = []
    one, two, _ = counters
    closed = os.dup(one)
    add_reader(loop, closed, taking(closed, log))
    add_reader(loop, two, taking(two, log))
    os.close(closed)
    remove_reader(loop, closed)
    os.eventfd_write(one, 1)
    os.eventfd_write(two, 1)
    await until(lambda: log, "the other's turn")
    assert log == [(two, 1)]
    remove_reader(loop, two)


async def test_a_wake_up_ends_when_its_time_is_over(
    counters: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other work of the loop has its turn, however long each round takes; here a second."""
    loop = asyncio.get_running_loop()
    first = counters[0]
    turns = loops = 0
    seconds = count()
    monkeypatch.setattr(readiness, "perf_counter", lambda: float(next(seconds)))

    def never_through(_rounds: int) -> int:
        nonlocal turns
        turns += 1
        return 1

    os.eventfd_write(first, 1)
    add_reader(loop, first, never_through)
    while turns < 20:
        loops += 1
        await asyncio.sleep(0)
    remove_reader(loop, first)
    assert loops >= turns - 1


def test_a_loop_takes_along_whom_nobody_removed() -> None:
    """As a reader of its own: what was forgotten is collected, and can warn of it."""

    class Forgotten:
        def turn(self, _rounds: int) -> int:
            return 1

    async def forget(fd: int) -> weakref.ref[Forgotten]:
        forgotten = Forgotten()
        add_reader(asyncio.get_running_loop(), fd, forgotten.turn)
        await asyncio.sleep(0)
        return weakref.ref(forgotten)

    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    before = len(os.listdir("/proc/self/fd"))
    found = asyncio.run(forget(fd))
    gc.collect()
    assert found() is None
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(fd)
