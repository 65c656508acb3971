"""Participants that wait with a time limit are in no deadlock."""

from __future__ import annotations

import ctypes
import os
import select
import threading
from collections.abc import Callable, Iterator

import pytest

from aiouffd.testing import END, Harness, RaceFound

LIMIT = 0.5  # longer than who is blocked is given to go on by itself


@pytest.fixture
def reader() -> Iterator[int]:
    """The end of a pipe from which nothing ever comes."""
    ends = os.pipe()
    yield ends[0]
    for end in ends:
        os.close(end)


def polled(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.poll(LIMIT * 1000)


@pytest.mark.parametrize(
    "wait",
    [
        lambda _: threading.Event().wait(LIMIT),
        lambda fd: select.select([fd], [], [], LIMIT),
        polled,
    ],
)
def test_a_wait_with_a_time_limit_is_no_deadlock(
    uffd: Harness, library: ctypes.CDLL, reader: int, wait: Callable[[int], object]
) -> None:
    """Explored and in a given order, who waits alone goes on when its limit is over."""
    region = uffd.region(contents=b"\x07")

    def waits() -> int:
        library.load(region.pointer())
        wait(reader)
        value: int = library.load(region.pointer())
        return value

    found = uffd.explore({"a": waits, "b": lambda: library.load(region.pointer())}, orders=2)
    assert found.orders == 2
    made = uffd.interleave({"a": waits}, [("a", END)])
    assert made.results == {"a": 7}


def test_who_waits_with_a_limit_hears_of_the_other(uffd: Harness, library: ctypes.CDLL) -> None:
    """While it waits it is the other's turn: no order only ever finds the limit over."""
    region = uffd.region()
    flag = threading.Event()
    heard: list[bool] = []

    def waits() -> None:
        library.load(region.pointer())
        heard.append(flag.wait(20))

    def tells() -> None:
        library.load(region.pointer())
        flag.set()

    uffd.explore({"a": waits, "b": tells}, reset=flag.clear)
    assert len(heard) > 1
    assert all(heard)


@pytest.mark.leaky("threads that wait for each other for ever")
def test_who_waits_for_ever_is_in_one(uffd: Harness, library: ctypes.CDLL) -> None:
    """Though the other one's wait has a limit: once that is over, nobody goes on any more."""
    region = uffd.region()

    def waits() -> None:
        library.load(region.pointer())
        threading.Event().wait()

    with pytest.raises(RaceFound, match="Deadlock"):
        uffd.explore({"a": waits, "b": lambda: threading.Event().wait(LIMIT)}, orders=1)
