"""A system call in another thread's place, and that thread none the worse for it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import select
import signal
import struct
from collections.abc import Callable, Iterator

import pytest

from aiouffd.errors import NotSupported
from aiouffd.kernel import abi, injection, ptrace, tracing
from aiouffd.kernel.injection import call_in
from aiouffd.kernel.registers import MACHINES
from tests.kernel.test_elsewhere import elsewhere
from tests.targets import PAGE, Target, wait_until
from tests.tracees import (
    INTERRUPTED,
    NR,
    STEPPED,
    child,
    fill,
    in_call,
    parked,
    seccomp_filter,
    stop,
    traced_target,
)

pytestmark = pytest.mark.skipif(
    abi.MACHINE not in MACHINES, reason=f"needs one of {', '.join(MACHINES)}"
)


@pytest.fixture
def target() -> Iterator[Target]:
    """A process with four pages of nothing, whose threads may be traced."""
    with traced_target() as target:
        yield target


@pytest.fixture
def standing(target: Target) -> int:
    """The thread of it that was about to read page 1, and stands."""
    target.start_read(1)
    parked(target)
    stop(target.thread_ids[0])
    return target.thread_ids[0]


# --- the call --------------------------------------------------------------------------


def test_the_call_is_made_by_the_other_thread(target: Target, standing: int) -> None:
    """Its result is that of the other process, and registers and mask are as before."""
    registers = ptrace.get_registers(standing, 64)
    mask = ptrace.get_signal_mask(standing)
    assert call_in(standing, NR["getpid"]) == target.pid
    assert ptrace.get_registers(standing, 64) == registers
    assert ptrace.get_signal_mask(standing) == mask


def test_its_arguments_arrive(target: Target, standing: int) -> None:
    """A page is thrown away between a step onto it and the next one."""
    fill(target, 1)
    ptrace.singlestep(standing)
    assert ptrace.wait(standing) == STEPPED
    assert target.is_present(1)
    assert call_in(standing, abi.NR_MADVISE, target.at(1), PAGE, mmap.MADV_DONTNEED) == 0
    assert not target.is_present(1)


def test_all_six_arguments_arrive(target: Target, standing: int) -> None:
    """A file is mapped, at a place in it."""
    there, here = target.make_memfd("six", 0, 3 * PAGE, thread=1)
    os.close(here)
    read = mmap.PROT_READ
    address = call_in(standing, NR["mmap"], 0, PAGE, read, mmap.MAP_SHARED, there, 2 * PAGE)
    with open(f"/proc/{target.pid}/maps", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(f"{address:x}-{address + PAGE:x} "))
    assert line.split()[1:3] == ["r--s", f"{2 * PAGE:08x}"]
    assert "memfd:six" in line


def test_a_refusal_is_minus_an_errno(target: Target, standing: int) -> None:
    """As the kernel gives it."""
    answer = call_in(standing, abi.NR_MADVISE, target.at(1) + 1, PAGE, mmap.MADV_DONTNEED)
    assert answer == -errno.EINVAL
    assert call_in(standing, NR["read"], -1, 0, 0) == -errno.EBADF


def test_the_access_that_was_about_to_be_made_is_made(target: Target) -> None:
    """After any number of calls, with the right result."""
    touch = target.start_read(1)
    parked(target)
    tid = target.thread_ids[0]
    stop(tid)
    for _ in range(3):
        assert call_in(tid, NR["getpid"]) == target.pid
    ptrace.detach(tid)
    fill(target, 1)
    assert touch.result() == 7


# --- system calls of its own -----------------------------------------------------------


def _piped(call: Callable[[int], int]) -> tuple[Callable[[], None], int, int]:
    """Make a program that waits on a pipe, and exits with what its call answered."""
    reading, writing = os.pipe()

    def main() -> None:
        os.close(writing)
        os._exit(call(reading) & 0xFF)

    return main, reading, writing


def _read(fd: int) -> int:
    # Not os.read, which would hide that it was interrupted.
    return int(ctypes.CDLL(None).read(fd, ctypes.create_string_buffer(8), 8))


def _poll(fd: int) -> int:
    return int(ctypes.CDLL(None).poll(struct.pack("=ihh", fd, select.POLLIN, 0), 1, 60_000))


@pytest.mark.parametrize(
    "call, names, answer", [(_read, ("read",), 3), (_poll, ("poll", "ppoll"), 1)]
)
def test_a_system_call_that_was_interrupted_is_restarted(
    call: Callable[[int], int], names: tuple[str, ...], answer: int
) -> None:
    """A read begins again; a poll goes on with what is left of its time-out."""
    main, reading, writing = _piped(call)
    numbers = [NR[name] for name in names]
    with child(main) as pid:
        in_call(pid, *numbers)
        stop(pid)
        assert tracing.is_begun_again(pid)
        registers = ptrace.get_registers(pid, 64)
        assert call_in(pid, NR["getpid"]) == pid
        assert ptrace.get_registers(pid, 64) == registers
        ptrace.detach(pid)
        wait_until(lambda: tracing.in_system_call(pid, pid)[0] is not None, "waiting again")
        os.write(writing, b"abc")
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == answer
    os.close(reading)
    os.close(writing)


def test_what_does_not_begin_again(standing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread in its own code; and what is not known: another machine, 32-bit code."""
    assert not tracing.is_begun_again(standing)
    with monkeypatch.context() as other:
        other.setattr(ptrace, "get_registers", lambda *_: [0])
        assert not tracing.is_begun_again(standing)
    monkeypatch.setattr(abi, "MACHINE", "riscv64")
    assert not tracing.is_begun_again(standing)


# --- signals meanwhile -----------------------------------------------------------------


def test_signals_wait_until_it_is_done() -> None:
    """They are delivered when the thread goes on, and not to a tracer in the middle."""
    with child(signal.pause) as pid:
        stop(pid)
        os.kill(pid, signal.SIGTERM)
        assert call_in(pid, NR["getpid"]) == pid
        ptrace.cont(pid)
        status = ptrace.wait(pid)
        assert status is not None
        assert ptrace.stopped_by_signal(status) == signal.SIGTERM


def test_a_stop_of_the_whole_process_is_not_lost(target: Target, standing: int) -> None:
    """The call is made all the same; the thread then stands like the others, until SIGCONT."""
    tracing.tgkill(target.pid, standing, signal.SIGSTOP)
    assert call_in(standing, NR["getpid"]) == target.pid
    ptrace.detach(standing)
    wait_until(
        lambda: {_state(target.pid, tid) for tid in target.thread_ids} == {"T"}, "all stopped"
    )
    os.kill(target.pid, signal.SIGCONT)
    fill(target, 1)
    fill(target, 0, 9)
    assert target.start_read(0, thread=1).result() == 9


def _state(pid: int, tid: int) -> str:
    with open(f"/proc/{pid}/task/{tid}/stat", encoding="ascii") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_a_sigtrap_that_is_sent_meanwhile_is_not_the_steps(standing: int, target: Target) -> None:
    """The call's own end is waited for."""
    tracing.tgkill(target.pid, standing, signal.SIGTRAP)
    assert call_in(standing, NR["getpid"]) == target.pid


def test_a_call_that_a_seccomp_filter_catches_is_an_error() -> None:
    """The program's own handler is not bothered, and the thread goes on."""
    reading, writing = os.pipe()

    def main() -> None:
        seccomp_filter(NR["getppid"], 0x0003_0000)  # SECCOMP_RET_TRAP
        os.write(writing, b"!")
        signal.pause()

    with child(main) as pid:
        assert os.read(reading, 1) == b"!"
        stop(pid)
        registers = ptrace.get_registers(pid, 64)
        with pytest.raises(PermissionError, match="seccomp"):
            call_in(pid, NR["getppid"])
        assert ptrace.get_registers(pid, 64) == registers
        assert call_in(pid, NR["getpid"]) == pid
    os.close(reading)
    os.close(writing)


# --- calls that do not come back -------------------------------------------------------


def test_a_call_that_takes_too_long_is_interrupted() -> None:
    """The thread stands where it stood, and its own call goes on."""
    main, reading, writing = _piped(_read)
    with child(main) as pid:
        in_call(pid, NR["read"])
        stop(pid)
        registers = ptrace.get_registers(pid, 64)
        with pytest.raises(TimeoutError, match=f"thread {pid}"):
            call_in(pid, NR["read"], reading, 0, 8, block_ns=1_000_000)
        assert ptrace.get_registers(pid, 64) == registers
        ptrace.detach(pid)
        os.write(writing, b"abc")
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 3
    os.close(reading)
    os.close(writing)


@pytest.mark.root
def test_a_call_that_cannot_be_interrupted_is_said_to_go_on() -> None:
    """One that waits in the kernel for a page that is ours to bring."""
    with traced_target(user_mode_only=False) as target:
        target.start_read(1)
        parked(target)
        tid = target.thread_ids[0]
        stop(tid)
        with pytest.raises(TimeoutError):
            call_in(tid, NR["getcwd"], target.at(2), PAGE, block_ns=1_000_000)
        assert ptrace.wait(tid, block_ns=0) is None
        fill(target, 2)
        assert ptrace.wait(tid) == INTERRUPTED


def test_a_thread_that_ends_in_the_call_is_gone(target: Target, standing: int) -> None:
    """ESRCH, and nothing is put back."""
    with pytest.raises(ProcessLookupError, match=f"thread {standing}"):
        call_in(standing, NR["exit_group"], 0)


# --- where it cannot be done -----------------------------------------------------------


def test_a_thread_that_runs_is_left_alone(target: Target) -> None:
    """ESRCH."""
    ptrace.seize(target.thread_ids[0])
    with pytest.raises(ProcessLookupError):
        call_in(target.thread_ids[0], NR["getpid"])


def test_too_many_arguments_change_nothing(target: Target, standing: int) -> None:
    """They are refused before the thread is touched."""
    registers = ptrace.get_registers(standing, 64)
    with pytest.raises(ValueError, match="7 arguments"):
        call_in(standing, NR["getpid"], *range(7))
    assert ptrace.get_registers(standing, 64) == registers


@pytest.mark.skipif(abi.MACHINE != "x86_64", reason="32-bit code of x86")
def test_a_thread_that_runs_32_bit_code_is_refused(standing: int) -> None:
    """Its registers are others."""
    registers = ptrace.get_registers(standing, 27)
    registers[17] = 0x23  # cs: __USER32_CS
    ptrace.set_registers(standing, registers)
    with pytest.raises(NotSupported, match="32-bit"):
        call_in(standing, NR["getpid"])


def test_an_instruction_is_looked_for_once(standing: int, target: Target) -> None:
    """What was found is looked at first; others are looked for where it is no such instruction."""
    injection._gates[:] = [target.at(3), 8]  # one that is missing, one that nobody has
    assert call_in(standing, NR["getpid"]) == target.pid
    gate = injection._gates[0]
    assert call_in(standing, NR["getpid"]) == target.pid
    assert injection._gates == [gate, target.at(3), 8]


def test_an_instruction_that_may_not_run_is_an_error(standing: int, target: Target) -> None:
    """The bytes alone do not make it one; the thread is as it was."""
    machine = MACHINES[abi.MACHINE]
    target.start_poke64(target.at(2), int.from_bytes(machine.gate, "little"), thread=1)
    parked(target, 1)
    fill(target, 2)
    wait_until(lambda: ptrace.peek(standing, target.at(2))[:2] == machine.gate[:2], "the bytes")
    registers = ptrace.get_registers(standing, 64)
    injection._gates.insert(0, target.at(2))
    try:
        with pytest.raises(OSError, match=f"signal {int(signal.SIGSEGV)}") as refused:
            call_in(standing, NR["getpid"])
    finally:
        del injection._gates[0]
    assert refused.value.errno == errno.EFAULT
    assert ptrace.get_registers(standing, 64) == registers


def test_a_process_without_such_an_instruction_is_refused(standing: int, seed: int) -> None:
    """All that it can run is searched."""
    machine = MACHINES[abi.MACHINE]
    gate = random.Random(seed).randbytes(16)
    with pytest.raises(NotSupported, match=f"thread {standing}"):
        injection._gate(standing, machine._replace(gate=gate))


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_there_is_none_elsewhere(system: str) -> None:
    """And the registers would be others."""
    program = """
from aiouffd.errors import NotSupported
from aiouffd.kernel.injection import call_in
try:
    call_in(1, 39)
except NotSupported as error:
    print(error.missing)
"""
    assert "this system" in elsewhere(system, program)
