"""Steps: no signal is lost, no call ends wrongly, nobody is left behind."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from aiouffd.kernel import tracing
from aiouffd.testing import Harness
from aiouffd.testing.stepping import Elsewhere, Stepper
from tests.targets import wait_until
from tests.tracees import child

PAGE = os.sysconf("SC_PAGE_SIZE")


def test_the_end_of_a_killed_thread_is_heard() -> None:
    """Who is killed before it is let go of is waited for: its parent could not until then."""
    if tracing.can_trace() is not None:
        pytest.skip("ptrace is not permitted here")

    def work() -> None:
        while True:
            pass

    with child(work) as pid:
        stepper = Stepper(lambda _: None)
        done: list[str] = []

        def kill() -> None:
            done.append("after")
            os.kill(pid, signal.SIGKILL)

        stepper.over(pid, pid, system_call=None, pc=0, let=lambda: None, after=kill)
        wait_until(lambda: stepper.poll() == [] and not len(stepper), "its end")
        assert done == ["after"]
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def test_signals_that_come_within_a_step_are_delivered_after_it() -> None:
    """Some signals that are sent to a stopped thread: each handler runs, once it is let go of."""
    if tracing.can_trace() is not None:
        pytest.skip("ptrace is not permitted here")
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGRTMIN + 3)
    shared = mmap.mmap(-1, PAGE)

    def note(number: int, _frame: object) -> None:
        shared[number] += 1

    def work() -> None:
        for number in numbers:
            signal.signal(number, note)
        shared[0] = 1
        while True:
            pass

    with child(work) as pid, shared:
        wait_until(lambda: shared[0], "its handlers")
        stepper = Stepper(lambda _: None)
        taken: list[list[int]] = []

        def send() -> None:
            for number in numbers:
                tracing.tgkill(pid, pid, number)

        stepper.over(
            *(pid, pid),
            system_call=None,
            pc=0,
            let=send,
            after=lambda: taken.append([shared[number] for number in numbers]),
        )
        wait_until(lambda: stepper.poll() == [] and not len(stepper), "the step")
        assert taken == [[0, 0, 0]]
        wait_until(lambda: all(shared[number] for number in numbers), "the handlers")
        assert [shared[number] for number in numbers] == [1, 1, 1]


def test_who_is_elsewhere_makes_no_step() -> None:
    """A thread that does not stand at the instruction is let go of, and nothing else is done."""
    if tracing.can_trace() is not None:
        pytest.skip("ptrace is not permitted here")

    def work() -> None:
        while True:
            pass

    with child(work) as pid:
        stepper = Stepper(lambda _: None)
        done: list[str] = []
        with pytest.raises(Elsewhere):
            stepper.over(
                *(pid, pid),
                system_call=None,
                pc=1,
                let=lambda: done.append("let"),
                after=lambda: done.append("after"),
            )
        assert done == []
        assert len(stepper) == 0
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        assert "TracerPid:\t0\n" in status


def test_signals_that_come_with_a_step_are_delivered(
    uffd: Harness, library: ctypes.CDLL, memory: str
) -> None:
    """Signals that were waiting for the thread are all taken, each as often as it was sent."""
    region = uffd.region(1, memory=memory)
    with uffd.record(region, every=True) as record:
        running = uffd.start(library.alarmed, region.pointer(), 200, 5)
        assert running.result() == 1000  # real-time signals queue; it is negative if some are lost
        assert [touch.access.value for touch in record] == ["read", "write"] * 200
    assert region.peek(0, 1) == bytes([200])


def test_a_storm_of_signals(uffd: Harness, library: ctypes.CDLL, memory: str) -> None:
    """A timer that interrupts a thread all the time, handled in C, changes no count."""
    region = uffd.region(1, memory=memory)
    with uffd.record(region, every=True) as record:
        running = uffd.start(library.in_a_storm, region.pointer(), 300)
        assert running.result() > 0
        assert [touch.access.value for touch in record] == ["read", "write"] * 300
    assert region.peek(0, 1) == bytes([300 % 256])


@pytest.mark.root
def test_a_signal_interrupts_a_call_that_is_stepped_over(
    uffd: Harness, library: ctypes.CDLL, pipes: Callable[[], tuple[int, int]], memory: str
) -> None:
    """A handler runs while a call sleeps within its step, and the call ends as it does for it."""
    region = uffd.region(1, memory=memory)
    reading, writing = pipes()
    with uffd.record(region, every=True) as record:
        running = uffd.start(library.interrupted, reading, region.pointer())
        wait_until(
            lambda: any(touch.system_call is not None for touch in record), "the system call"
        )
        wait_until(lambda: state(running.tid) == "S", "sleep")
        tracing.tgkill(os.getpid(), running.tid, signal.SIGRTMIN + 3)
        assert running.result() == -errno.EINTR
    os.write(writing, b"x")


@pytest.mark.root
def test_a_write_to_a_full_pipe_is_short(
    uffd: Harness, library: ctypes.CDLL, pipes: Callable[[], tuple[int, int]]
) -> None:
    """A call that had to sleep after a part was done says so: what a step costs, seen."""
    size = 1 << 18
    region = uffd.region(size // PAGE)
    reading, writing = pipes()
    with uffd.record(region, every=True):
        running = uffd.start(library.write_out, writing, region.pointer(), size)
        done = running.result()
    assert 0 < done < size
    left = done
    while left:
        left -= len(os.read(reading, left))


def test_many_threads_are_stepped_at_once(uffd: Harness, library: ctypes.CDLL) -> None:
    """Threads with a page each are stepped side by side; each of their accesses is seen."""
    region = uffd.region(8)
    with uffd.record(region, every=True) as record:
        running = [uffd.start(library.increment, region.pointer(n * PAGE), 200) for n in range(8)]
        for each in running:
            each.result()
        for number, each in enumerate(running):
            touches = [touch for touch in record if touch.thread == each.tid]
            assert [t.access.value for t in touches] == ["read", "write"] * 200
            assert {t.page for t in touches} == {number}
    assert [region.peek(n * PAGE, 1) for n in range(8)] == [b"\xc8"] * 8


def test_who_is_done_is_let_go_of(uffd: Harness, library: ctypes.CDLL) -> None:
    """After its step a thread is traced by nobody, and the helper has nobody to wait for."""
    region = uffd.region(1)
    ready, go_on = threading.Event(), threading.Event()

    def work() -> None:
        library.load(region.pointer())
        ready.set()
        go_on.wait(20)

    with region.page(0).freeze(nth=2):
        running = uffd.start(work)
        ready.wait(20)
        status = Path(f"/proc/self/task/{running.tid}/status").read_text(encoding="ascii")
        assert "TracerPid:\t0\n" in status
        go_on.set()
        running.result()
    children = Path(f"/proc/{uffd.service_pid}/task/{uffd.service_pid}/children")
    assert children.read_text(encoding="ascii") == ""


def state(thread: int) -> str:
    """What the kernel says of a thread of this process."""
    text = Path(f"/proc/self/task/{thread}/stat").read_text(encoding="ascii", errors="replace")
    return text.rpartition(")")[2].split()[0]
