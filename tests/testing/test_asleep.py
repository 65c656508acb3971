"""What a thread is asleep in is read from outside, without stopping it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import closing

import pytest

from aiouffd.testing.asleep import TIMED, Look, call_of
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
