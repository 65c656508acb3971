"""What a thread is asleep in is read from outside, without stopping it."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import closing

import pytest

from aiouffd.testing.asleep import TIMED, Look, call_of, ends_by_itself, seconds_left
from tests.targets import wait_until


def started(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def look_at(thread: threading.Thread) -> closing[Look]:
    assert thread.native_id is not None
    return closing(Look(os.getpid(), thread.native_id))


def test_who_waits_for_a_lock() -> None:
    """It is in futex, and in none once it has ended."""
    lock = threading.Lock()
    with lock:
        thread = started(lambda: lock.acquire(timeout=20))
        with look_at(thread) as look:
            wait_until(lambda: call_of(look.read()) == "futex", "the lock")
            lock.release()
            thread.join()
            wait_until(lambda: look.read() == "", "its end")
            assert call_of(look.read()) == ""
            lock.release()
            lock.acquire()


def test_who_sleeps_for_a_time() -> None:
    """Its call is one of those that end by themselves."""
    thread = started(lambda: time.sleep(0.2))
    with look_at(thread) as look:
        wait_until(lambda: call_of(look.read()) in TIMED, "its sleep")
    thread.join()


NEWS = threading.Event()


def polled(fd: int, milliseconds: int | None) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.poll(milliseconds)


def epolled(fd: int, seconds: float | None) -> None:
    with select.epoll() as poll:
        poll.register(fd, select.EPOLLIN)
        poll.poll(seconds)


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize(
    ("calls", "wait"),
    [
        ({"futex"}, lambda _, limited: NEWS.wait(0.5 if limited else None)),
        ({"poll", "ppoll"}, lambda fd, limited: polled(fd, 500 if limited else None)),
        ({"select", "pselect6"}, lambda fd, lim: select.select([fd], [], [], 0.5 if lim else None)),
        ({"epoll_wait", "epoll_pwait"}, lambda fd, limited: epolled(fd, 0.5 if limited else None)),
    ],
)
def test_a_wait_with_a_time_limit_ends_by_itself(
    calls: set[str], wait: Callable[[int, bool], object], limited: bool
) -> None:
    """A limit is seen in the arguments of the call, and so is that there is none."""
    reader, writer = os.pipe()
    thread = threading.Thread(target=wait, args=(reader, limited), daemon=True)
    thread.start()
    with look_at(thread) as look:

        def is_asleep() -> bool:
            text = look.read()  # waiting for the GIL, it is in futex for five milliseconds
            return call_of(text) in calls and ends_by_itself(text) is limited

        wait_until(is_asleep, f"{calls}")
        left = seconds_left(look.read())
        if not limited:
            assert left is None
        elif left is not None:  # else it is over by now
            assert 0 <= left <= 0.5
    os.write(writer, b"!")
    NEWS.set()
    thread.join()
    NEWS.clear()
    os.close(reader)
    os.close(writer)


def test_who_runs() -> None:
    """A thread that computes is in no call."""
    stop: list[int] = []

    def compute() -> None:
        while not stop:
            pass

    thread = started(compute)
    with look_at(thread) as look:
        wait_until(lambda: look.read() == "running", "it to run")
    stop.append(1)
    thread.join()


@pytest.mark.parametrize(
    "text, call",
    [
        ("running", ""),
        ("-1 0x7ffd 0x55d0", ""),
        ("", ""),
        ("9999 0x1 0x2", "system call 9999"),
    ],
)
def test_lines(text: str, call: str) -> None:
    """A call that has no name here keeps its number; a page fault is no call."""
    assert call_of(text) == call
    assert not ends_by_itself(text)
    assert seconds_left(text) is None
