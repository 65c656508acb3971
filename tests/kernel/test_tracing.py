"""ptrace of single threads: stopping, stepping, letting go, and who may."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from aiouffd.kernel import calls, tracing
from tests.targets import PAGE, Target, wait_until

#: The status of a thread that PTRACE_INTERRUPT has stopped.
INTERRUPTED = tracing.SIGTRAP << 8 | 0x7F | 128 << 16
#: The status after a step.
STEPPED = tracing.SIGTRAP << 8 | 0x7F


def fill(target: Target, page: int, byte: int = 7) -> None:
    """Fill a page of the target's."""
    data = ctypes.create_string_buffer(bytes([byte]) * PAGE, PAGE)
    assert calls.copy(target.uffd, target.at(page), ctypes.addressof(data), PAGE) == PAGE


def parked(target: Target, count: int = 1) -> None:
    """Wait until so many threads wait for pages."""
    wait_until(lambda: target.fdinfo().total == count, f"{count} threads in faults")


def stop(tid: int) -> None:
    """Seize a thread and stop it."""
    tracing.seize(tid)
    tracing.interrupt(tid)
    assert tracing.wait(tid) == INTERRUPTED


@contextmanager
def child(main: Callable[[], object]) -> Iterator[int]:
    """Run something in a forked process, which is killed afterwards."""
    pid = os.fork()
    if not pid:
        try:
            main()
        finally:
            os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.fixture
def target() -> Iterator[Target]:
    """Four pages of nothing; user-mode faults only, for which no privilege is needed."""
    with Target("anon", pages=4, user_mode_only=True) as target:
        yield target


# --- stopping and stepping -------------------------------------------------------------


def test_a_thread_that_waits_for_a_page_is_stepped_over_its_access(target: Target) -> None:
    """It stands before the access, makes it with one step, and goes on once it is let go."""
    touch = target.start_read(1)
    tid = target.thread_ids[0]
    parked(target)
    number, before = tracing.in_system_call(target.pid, tid)
    assert number is None
    stop(tid)
    assert tracing.in_system_call(target.pid, tid) == (None, before)
    fill(target, 1)
    tracing.singlestep(tid)
    assert tracing.wait(tid) == STEPPED
    _, after = tracing.in_system_call(target.pid, tid)
    assert 0 < after - before < 16  # an instruction of x86 has 15 bytes at most
    assert not touch.done
    tracing.detach(tid)
    assert touch.result() == 7


def test_a_step_onto_a_page_that_is_missing_waits_for_it(target: Target) -> None:
    """The step is under way until the page comes; then it ends."""
    touch = target.start_read(2)
    tid = target.thread_ids[0]
    parked(target)
    stop(tid)
    tracing.singlestep(tid)
    parked(target)
    assert tracing.wait(tid, block_ns=0) is None
    fill(target, 2)
    assert tracing.wait(tid) == STEPPED
    tracing.detach(tid)
    assert touch.result() == 7


def test_others_stay_parked(target: Target) -> None:
    """Only the thread that is stepped makes its access; the page is gone again for the other."""
    touches = [target.start_read(0, thread=number) for number in (0, 1)]
    tid = target.thread_ids[1]
    parked(target, 2)
    stop(tid)
    data = ctypes.create_string_buffer(b"\x07" * PAGE, PAGE)
    dontwake = 1
    assert calls.copy(target.uffd, target.at(0), ctypes.addressof(data), PAGE, dontwake) == PAGE
    tracing.singlestep(tid)
    assert tracing.wait(tid) == STEPPED
    target.start_madvise(4, 0, thread=2).result()  # MADV_DONTNEED
    tracing.detach(tid)
    assert touches[1].result() == 7
    assert not touches[0].done
    fill(target, 0, 9)
    assert touches[0].result() == 9
