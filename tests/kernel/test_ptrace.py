"""ptrace of single threads: stopping, stepping, letting go."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from aiouffd.kernel import abi, ptrace, tracing
from tests.kernel.test_elsewhere import elsewhere
from tests.targets import Target, TargetDied, wait_until
from tests.tracees import INTERRUPTED, STEPPED, child, fill, parked, stop, traced_target


@pytest.fixture
def target() -> Iterator[Target]:
    """A process with four pages of nothing, whose threads may be traced."""
    with traced_target() as target:
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
    ptrace.singlestep(tid)
    assert ptrace.wait(tid) == STEPPED
    _, after = tracing.in_system_call(target.pid, tid)
    assert 0 < after - before < 16  # an instruction of x86 has 15 bytes at most
    assert not touch.done
    ptrace.detach(tid)
    assert touch.result() == 7


def test_each_step_is_one_instruction(target: Target) -> None:
    """The program counter moves at each, and comes to no result before it may."""
    touch = target.start_read(1)
    tid = target.thread_ids[0]
    parked(target)
    stop(tid)
    fill(target, 1)
    places = [tracing.in_system_call(target.pid, tid)[1]]
    for _ in range(5):
        ptrace.singlestep(tid)
        assert ptrace.wait(tid) == STEPPED
        places.append(tracing.in_system_call(target.pid, tid)[1])
    assert all(one != other for one, other in itertools.pairwise(places))
    ptrace.detach(tid)
    assert touch.result() == 7


def test_a_step_onto_a_page_that_is_missing_waits_for_it(target: Target) -> None:
    """The step is under way until the page comes; then it ends."""
    touch = target.start_read(2)
    tid = target.thread_ids[0]
    parked(target)
    stop(tid)
    ptrace.singlestep(tid)
    parked(target)
    assert ptrace.wait(tid, block_ns=0) is None
    assert ptrace.wait(tid, block_ns=5_000_000) is None  # long enough for every way of waiting
    fill(target, 2)
    assert ptrace.wait(tid) == STEPPED
    ptrace.detach(tid)
    assert touch.result() == 7


def test_others_stay_parked(target: Target) -> None:
    """Only the thread that is stepped makes its access; the page is gone again for the other."""
    touches = [target.start_read(0, thread=number) for number in (0, 1)]
    tid = target.thread_ids[1]
    parked(target, 2)
    stop(tid)
    fill(target, 0, 7, abi.UFFDIO_COPY_MODE_DONTWAKE)
    ptrace.singlestep(tid)
    assert ptrace.wait(tid) == STEPPED
    target.start_madvise(4, 0, thread=2).result()  # MADV_DONTNEED
    ptrace.detach(tid)
    assert touches[1].result() == 7
    assert not touches[0].done
    fill(target, 0, 9)
    assert touches[0].result() == 9


def test_a_thread_that_stands_can_be_asked_to_stop_again(target: Target) -> None:
    """It does not get far: it stops once more when it is to go on."""
    touch = target.start_read(0)
    tid = target.thread_ids[0]
    parked(target)
    stop(tid)
    fill(target, 0)
    ptrace.interrupt(tid)
    ptrace.cont(tid)
    assert ptrace.wait(tid) == INTERRUPTED
    assert not touch.done
    ptrace.cont(tid)
    assert touch.result() == 7
    assert ptrace.wait(tid, block_ns=0) is None


def test_a_thread_that_died_is_reaped_by_its_tracer_first(target: Target) -> None:
    """Until it has been told of that end the process's parent is not told of the process's."""
    tid = target.thread_ids[0]
    ptrace.seize(tid)
    os.kill(target.pid, signal.SIGKILL)
    wait_until(lambda: "(zombie)" in _status(target.pid), "the end of the first thread")
    assert os.waitpid(target.pid, os.WNOHANG) == (0, 0)
    assert ptrace.wait(tid) == signal.SIGKILL


def test_a_thread_that_runs_on_stops_before_a_signal() -> None:
    """The signal is the tracer's to give on or to keep; given on it does what it does."""
    with child(signal.pause) as pid:
        ptrace.seize(pid)
        os.kill(pid, signal.SIGWINCH)
        status = ptrace.wait(pid)
        assert status is not None
        assert ptrace.stopped_by_signal(status) == signal.SIGWINCH
        ptrace.cont(pid)  # it is lost
        os.kill(pid, signal.SIGTERM)
        status = ptrace.wait(pid)
        assert status is not None
        assert ptrace.stopped_by_signal(status) == signal.SIGTERM
        ptrace.detach(pid, signal.SIGTERM)
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM


def test_a_thread_that_ends_tells_its_status() -> None:
    """Once; then there is nothing to wait for any more."""
    with child(signal.pause) as pid:
        stop(pid)
        ptrace.cont(pid)
        os.kill(pid, signal.SIGKILL)
        status = ptrace.wait(pid)
        assert status is not None
        assert os.WTERMSIG(status) == signal.SIGKILL
        with pytest.raises(ChildProcessError):
            ptrace.wait(pid)


def test_statuses_are_told_apart() -> None:
    """A stop by request, a step, a signal, a stopped process, an end."""
    table = {
        INTERRUPTED: (0, True),
        STEPPED: (signal.SIGTRAP, False),
        signal.SIGBUS << 8 | 0x7F: (signal.SIGBUS, False),
        128 << 16 | signal.SIGSTOP << 8 | 0x7F: (0, True),
        3 << 16 | signal.SIGTRAP << 8 | 0x7F: (0, False),  # PTRACE_EVENT_CLONE
        0: (0, False),
        7 << 8: (0, False),
        signal.SIGKILL: (0, False),
    }
    found = {
        status: (ptrace.stopped_by_signal(status), ptrace.is_event_stop(status)) for status in table
    }
    assert found == table


# --- refusals --------------------------------------------------------------------------


def test_a_thread_that_has_ended_is_no_such_process() -> None:
    """ESRCH, with the request and the thread in the error."""
    with child(lambda: None) as pid:
        os.waitpid(pid, 0)
        with pytest.raises(ProcessLookupError, match=f"PTRACE_SEIZE of thread {pid}") as refused:
            ptrace.seize(pid)
        assert refused.value.errno == errno.ESRCH


def test_a_thread_that_is_traced_already_is_not_permitted(target: Target) -> None:
    """EPERM, whoever traces it."""
    tid = target.thread_ids[0]
    ptrace.seize(tid)
    with pytest.raises(PermissionError):
        ptrace.seize(tid)


def test_a_thread_of_this_process_is_not_permitted() -> None:
    """A helper process has to do it."""
    with pytest.raises(PermissionError):
        ptrace.seize(threading.get_native_id())


def _registers(tid: int) -> None:
    ptrace.set_registers(tid, ptrace.get_registers(tid, 27))


def _mask(tid: int) -> None:
    ptrace.set_signal_mask(tid, 0)


@pytest.mark.parametrize(
    "request_",
    [ptrace.singlestep, ptrace.cont, ptrace.detach, ptrace.get_signal_mask, _mask, _registers],
)
def test_a_thread_that_runs_cannot_be_asked(
    target: Target, request_: Callable[[int], object]
) -> None:
    """It has to stop first: ESRCH."""
    tid = target.thread_ids[0]
    ptrace.seize(tid)
    with pytest.raises(ProcessLookupError, match="PTRACE_"):
        request_(tid)


def test_only_the_thread_that_seized_it_may_ask(target: Target) -> None:
    """Another thread of the tracer is told that there is no such thing."""
    tid = target.thread_ids[0]
    stop(tid)
    errors: list[OSError] = []

    def ask() -> None:
        try:
            ptrace.detach(tid)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert [error.errno for error in errors] == [errno.ESRCH]
    ptrace.detach(tid)


def test_a_tracer_that_ends_lets_go(target: Target) -> None:
    """Threads that it had stopped run on, unless it wanted otherwise."""
    tid = target.thread_ids[0]

    def trace() -> None:
        stop(tid)

    thread = threading.Thread(target=trace)
    thread.start()
    thread.join()
    fill(target, 0)
    assert target.start_read(0).result() == 7


def test_a_process_may_be_ended_with_its_tracer(target: Target) -> None:
    """PTRACE_O_EXITKILL."""

    def trace() -> None:
        ptrace.seize(target.thread_ids[0], ptrace.PTRACE_O_EXITKILL)

    thread = threading.Thread(target=trace)
    thread.start()
    thread.join()
    with pytest.raises(TargetDied):
        target.start_read(0).result()


# --- what a stopped thread has ---------------------------------------------------------


def test_a_signal_mask_is_read_and_written() -> None:
    """Signal n is bit n - 1; what is written holds."""

    def main() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGUSR1})
        signal.pause()

    with child(main) as pid:
        wait_until(
            lambda: f"SigBlk:\t{1 << signal.SIGUSR1 - 1:016x}" in _status(pid), "SIGUSR1 blocked"
        )
        stop(pid)
        assert ptrace.get_signal_mask(pid) == 1 << signal.SIGUSR1 - 1
        ptrace.set_signal_mask(pid, 1 << signal.SIGUSR2 - 1)
        assert f"SigBlk:\t{1 << signal.SIGUSR2 - 1:016x}" in _status(pid)


def _status(pid: int) -> str:
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return file.read()


def test_registers_are_read_and_written(target: Target) -> None:
    """Where a thread goes on is one of them."""
    touch = target.start_read(1)
    tid = target.thread_ids[0]
    parked(target)
    stop(tid)
    registers = ptrace.get_registers(tid, 27)
    _, pc = tracing.in_system_call(target.pid, tid)
    assert pc in registers
    ptrace.set_registers(tid, [0x1234 if value == pc else value for value in registers])
    assert tracing.in_system_call(target.pid, tid)[1] == 0x1234
    ptrace.set_registers(tid, registers)
    fill(target, 1)
    ptrace.detach(tid)
    assert touch.result() == 7


def test_memory_is_peeked_at(target: Target) -> None:
    """Eight bytes, and all ones where there are none."""
    fill(target, 1, 0x41)
    stop(target.thread_ids[0])
    assert ptrace.peek(target.thread_ids[0], target.at(1) + 5) == b"A" * 8
    assert ptrace.peek(target.thread_ids[0], 8) == b"\xff" * 8


# --- elsewhere -------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_there_is_none_elsewhere(system: str) -> None:
    """It can be imported; every use says why not."""
    program = """
from aiouffd.errors import NotSupported
from aiouffd.kernel import ptrace
for call in (ptrace.seize, ptrace.interrupt, ptrace.wait, ptrace.detach):
    try:
        call(1)
    except NotSupported as error:
        print(error.missing)
"""
    assert elsewhere(system, program).splitlines() == ["userfaultfd exists on Linux only"] * 4
