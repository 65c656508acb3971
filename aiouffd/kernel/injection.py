"""A system call in another thread's place.

Knows: how to have a stopped thread make one, and stand where it stood.
Must not know: what the calls are for.

Laws of this file:

* The thread makes the call with an instruction that its process has anyway, in its vDSO or in its
  C library: its memory stays as it is.
* It gets its registers and its signal mask back whatever the call's outcome, unless it has ended
  or cannot be stopped.  If the tracer is killed in the middle, nobody gives them back.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from typing import Final

from ..errors import NotSupported
from . import abi, ptrace
from .ptrace import SECOND, SIGTRAP
from .registers import Machine, machine_named

_SIGSTOP: Final = 19
_SIGSYS: Final = 31
#: Signals that come during a call wait, but for a step's own and a seccomp filter's: the kernel
#: would reset their handlers if it found them blocked.
_MASKED: Final = ~(1 << SIGTRAP - 1 | 1 << _SIGSYS - 1) & (1 << 64) - 1

#: include/linux/errno.h: what a call leaves that a signal without a handler has broken off
#: (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK); no program sees them.
_BEGUN_AGAIN: Final = frozenset({-512, -513, -514, -516})

_CHUNK: Final = 1 << 20

#: Where instructions were found that make system calls, the latest first.  The vDSO has them, and
#: lies at one address for all processes that were forked from one another.
_gates: list[int] = []
_GATES: Final = 8


def _executable(tid: int) -> list[tuple[int, int]]:
    """List what of a thread's memory can be read and run, its vDSO first."""
    found = []
    with open(f"/proc/{tid}/maps", "rb") as file:
        for line in file:
            where, rights, _, _, _, *name = line.split(None, 5)
            if rights[0:1] == b"r" and rights[2:3] == b"x":
                start, _, end = where.partition(b"-")
                found.append((name[:1] != [b"[vdso]\n"], int(start, 16), int(end, 16)))
    return [(start, end) for _, start, end in sorted(found)]


def _search(tid: int, machine: Machine) -> int:
    memory = os.open(f"/proc/{tid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start, end in _executable(tid):
            for at in range(start, end, _CHUNK):
                found = machine.gate_in(os.pread(memory, min(_CHUNK, end - at), at))
                if found >= 0:
                    return at + found
    finally:
        os.close(memory)
    raise NotSupported(
        f"the process of thread {tid} has no instruction that makes a system call",
        "It was started without a vDSO and without a C library.",
    )


def _gate(tid: int, machine: Machine) -> int:
    """Find an instruction in a stopped thread's process that makes a system call."""
    for gate in _gates:
        if ptrace.peek(tid, gate).startswith(machine.gate):
            return gate
    gate = _search(tid, machine)
    _gates.insert(0, gate)
    del _gates[_GATES:]
    return gate


def is_begun_again(tid: int) -> bool:
    """Say whether a stopped thread's system call was broken off and begins again when it goes on.

    It stands at the end of the call, by ``interrupt`` or before the delivery of a signal; a step
    then ends when the call does.  False where registers of this machine are not known here.

    Kernel: PTRACE_GETREGSET, since Linux 2.6.34.

    Args:
        tid: The stopped thread.

    Raises:
        ProcessLookupError: It is not stopped, has ended, or this thread did not seize it.

    Sharing: only the thread that seized it.
    """
    try:
        machine = machine_named(abi.MACHINE)
    except NotSupported:
        return False
    registers = ptrace.get_registers(tid, machine.words)
    if len(registers) < machine.words:  # 32-bit code
        return False
    return ctypes.c_int64(registers[machine.result]).value in _BEGUN_AGAIN


def call_in(tid: int, number: int, *arguments: int, block_ns: int = SECOND) -> int:
    """Have a stopped thread make a system call, as if it stood in its program.

    Afterwards it stands where it stood, with the registers and the signal mask that it had: it
    goes on with what it was about to do, an interrupted system call that is to be restarted
    included (on aarch64 a sleep begins again from its start).  Signals for it wait meanwhile; a
    SIGTRAP that somebody sends just then is lost.

    Calls that do not come back to where they were made (execve, exit, clone, rt_sigreturn) are
    not for this.  One that waits for us never ends: madvise and munmap wait until their event is
    read where the userfaultfd has events of removal, and whatever touches a missing page does.

    Kernel: PTRACE_GETREGSET, since Linux 2.6.34, PTRACE_SETSIGMASK, since 3.11; x86-64 and
    aarch64 (which no test has run on so far).

    Args:
        tid: A thread of a 64-bit program, stopped by ``interrupt`` or after a step.
        number: The system call's number on this machine.
        arguments: Up to six numbers; addresses are the thread's.
        block_ns: How long the call may take, in nanoseconds, before it is interrupted.

    Returns:
        What the kernel answers: below zero it is minus an errno.

    Raises:
        NotSupported: The registers of this machine or program are not known here.
        ProcessLookupError: The thread is not stopped, has ended, or this thread did not seize it.
        PermissionError: A seccomp filter of the program's own caught the call.
        TimeoutError: The call took too long.  If it could be interrupted the thread stands where
            it stood; else it is in the call still, and will not find back.

    Sharing: only the thread that seized it.
    """
    machine = machine_named(abi.MACHINE if sys.platform == "linux" else "")
    before = ptrace.get_registers(tid, machine.words)
    if len(before) < machine.words:
        raise NotSupported(
            f"thread {tid} runs 32-bit code, in which aiouffd makes no system calls",
            "Use a 64-bit program.",
        )
    mask = ptrace.get_signal_mask(tid)
    gate = _gate(tid, machine)
    changed = machine.calling(before, number, arguments, gate)
    ptrace.set_signal_mask(tid, _MASKED)
    ptrace.set_registers(tid, changed)
    after, refusal = _made(tid, gate, machine, block_ns)
    ptrace.set_registers(tid, before)
    ptrace.set_signal_mask(tid, mask)
    if refusal is not None:
        raise refusal
    return ctypes.c_int64(after[machine.result]).value


def _made(tid: int, gate: int, machine: Machine, block_ns: int) -> tuple[list[int], OSError | None]:
    """Let a thread step through a gate; return its registers then, and what was wrong."""
    refusal: OSError | None = None
    what = f"system call in thread {tid}"
    signal = 0
    while True:
        ptrace.singlestep(tid, signal)
        status = ptrace.wait(tid, block_ns=block_ns)
        if status is None:
            refusal = TimeoutError(errno.ETIMEDOUT, "Took too long", what)
            ptrace.interrupt(tid)
            status = ptrace.wait(tid)
            if status is None:
                raise refusal
        if status & 0xFF != 0x7F:
            raise ProcessLookupError(errno.ESRCH, "Ended meanwhile", what)
        after = ptrace.get_registers(tid, machine.words)
        signal = ptrace.stopped_by_signal(status)
        if signal == SIGTRAP and after[machine.pc] != gate:
            return after, refusal
        if signal == _SIGSYS:  # the step's SIGTRAP is still to come
            refusal = PermissionError(errno.EPERM, "Caught by a seccomp filter", what)
        elif signal not in {0, SIGTRAP, _SIGSTOP}:
            return after, OSError(errno.EFAULT, f"Ended in signal {signal}", what)
        # A stop of the whole process counts its threads: it needs this one too, which then stands
        # for another reason, and can be stepped all the same.
        signal = signal if signal == _SIGSTOP else 0
