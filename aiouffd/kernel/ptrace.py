"""ptrace: stop one thread of another process, let it make one instruction, let it go.

Knows: the requests, the statuses that waitpid gives back.
Must not know: pages, userfaultfds, why a thread is stopped.

Laws of this file:

* Only ``seize`` begins to trace: it stops nobody and sends nobody a signal.  ``interrupt`` stops,
  ``wait`` says that it has; every other request is refused with ESRCH until then.
* All requests on a thread come from the *thread* that seized it (any other gets ESRCH), and so
  it has to live as long.  When it ends, what it traced is let go and runs on.
* A thread of the same process cannot be traced: this is for a helper process.
* An error is an OSError with the kernel's errno: ProcessLookupError (ESRCH) where the thread has
  ended, is not ours or does not stand still; PermissionError (EPERM) where somebody else traces
  it already or we may not.
* A step ends in a SIGTRAP of the kernel's making, which cannot be blocked: in a thread that
  blocks SIGTRAP a step unblocks it, and where it is ignored it gets its default again.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import time
from typing import Final

from . import calls

# linux/ptrace.h
_PTRACE_PEEKTEXT: Final = 1
_PTRACE_CONT: Final = 7
_PTRACE_SINGLESTEP: Final = 9
_PTRACE_DETACH: Final = 17
_PTRACE_GETREGSET: Final = 0x4204
_PTRACE_SETREGSET: Final = 0x4205
_PTRACE_SEIZE: Final = 0x4206
_PTRACE_INTERRUPT: Final = 0x4207
_PTRACE_GETSIGMASK: Final = 0x420A
_PTRACE_SETSIGMASK: Final = 0x420B
_NAMES: Final = {
    value: name.removeprefix("_") for name, value in globals().items() if "_PTRACE_" in name
}
_PTRACE_EVENT_STOP: Final = 128
_NT_PRSTATUS: Final = 1  # linux/elf.h

#: Options of ``seize``: end the thread's process when we end; trace what it forks, clones, runs.
PTRACE_O_TRACEFORK: Final = 0x2
PTRACE_O_TRACEVFORK: Final = 0x4
PTRACE_O_TRACECLONE: Final = 0x8
PTRACE_O_TRACEEXEC: Final = 0x10
PTRACE_O_EXITKILL: Final = 0x100000

# linux/wait.h; os has the first on Unix only
_WNOHANG: Final = 1
_WALL: Final = 0x40000000  # before Linux 4.7 it takes this for threads that are no children

#: A step's end; ``signal`` has it on Unix only.
SIGTRAP: Final = 5

SECOND: Final = 1_000_000_000
# A step takes about ten microseconds, a look one or two: ask again and again at first, but not
# for long, since it may be our CPU that the thread waits for; then let others run, then sleep.
_SPINS: Final = 8
_YIELDS: Final = 32
_NAP: Final = 0.000_1


# --- the requests ----------------------------------------------------------------------


@functools.cache
def libc() -> ctypes.CDLL:
    """Open the C library."""
    # Not at import, which has to work on every system.
    calls.require_linux()
    library = ctypes.CDLL(None, use_errno=True)
    library.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    library.ptrace.restype = ctypes.c_long
    return library


def _ptrace(request: int, tid: int, address: int, data: int) -> None:
    if libc().ptrace(request, tid, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"{_NAMES[request]} of thread {tid}")


def seize(tid: int, options: int = 0) -> None:
    """Begin to trace a thread; it goes on as if nothing had happened.

    Kernel: PTRACE_SEIZE, since Linux 3.4.

    Args:
        tid: A thread's id (of a process's first thread: the process id).  No thread of ours.
        options: ``PTRACE_O_TRACEFORK`` and its like, or'ed.

    Raises:
        PermissionError: It is traced already, is a thread of this process, or we may not:
            ``can_trace`` has the reasons.
        ProcessLookupError: There is no such thread.

    Sharing: this thread is its tracer from now on, no other.
    """
    _ptrace(_PTRACE_SEIZE, tid, 0, options)


def interrupt(tid: int) -> None:
    """Ask a seized thread to stop; ``wait`` says when it has.

    A thread that waits for a page of a userfaultfd stops before the access that it was about to
    make, if that is its own instruction.  In a system call it stops at the call's end, and some
    calls end early, to be restarted when it goes on.  One that stands already will stop again as
    soon as it is to go on.

    Kernel: PTRACE_INTERRUPT, since Linux 3.4.

    Raises:
        ProcessLookupError: The thread has ended, or this thread did not seize it.

    Sharing: only the thread that seized it.
    """
    _ptrace(_PTRACE_INTERRUPT, tid, 0, 0)


def singlestep(tid: int, signal: int = 0) -> None:
    """Let a stopped thread make one instruction and stop again, with SIGTRAP.

    A system call is one instruction.  So is an entry into a signal handler: with a ``signal`` the
    thread stops at the handler's first instruction.

    Kernel: PTRACE_SINGLESTEP.

    Args:
        tid: The stopped thread.
        signal: A signal to deliver; 0 is none, also where it stood before the delivery of one,
            which is lost then.

    Raises:
        ProcessLookupError: It is not stopped, has ended, or this thread did not seize it.

    Sharing: only the thread that seized it.
    """
    _ptrace(_PTRACE_SINGLESTEP, tid, 0, signal)


def cont(tid: int, signal: int = 0) -> None:
    """Let a stopped thread run; it stays traced, and stops before each signal's delivery.

    Kernel: PTRACE_CONT.

    Args:
        tid: The stopped thread.
        signal: As for ``singlestep``.

    Raises:
        ProcessLookupError: It is not stopped, has ended, or this thread did not seize it.

    Sharing: only the thread that seized it.
    """
    _ptrace(_PTRACE_CONT, tid, 0, signal)


def detach(tid: int, signal: int = 0) -> None:
    """Let a stopped thread run and trace it no longer.

    Kernel: PTRACE_DETACH.

    Args:
        tid: The stopped thread.
        signal: As for ``singlestep``.

    Raises:
        ProcessLookupError: It is not stopped, has ended, or this thread did not seize it.

    Sharing: only the thread that seized it.
    """
    _ptrace(_PTRACE_DETACH, tid, 0, signal)


# --- statuses --------------------------------------------------------------------------


def wait(tid: int, *, block_ns: int = SECOND) -> int | None:
    """Wait until a traced thread has stopped or ended.

    Each stop is told once, and so is the end: until then a traced thread that has died keeps its
    process from being reaped by its parent.  If the thread is the first one of a child process of
    our own, nobody else gets its exit status.

    Kernel: waitpid(2) with __WALL.

    Args:
        tid: A thread that this process traces.
        block_ns: How long to wait at most, in nanoseconds; 0 only looks.

    Returns:
        The status as of ``os.waitpid``, of a thread that ended too (``os.WIFSTOPPED`` tells
        them apart); None if it still runs.

    Raises:
        ChildProcessError: Nobody here traces it: it was let go, or its end was told already.

    Sharing: any thread of the tracing process, but one for a ``tid``.
    """
    calls.require_linux()
    end = time.monotonic_ns() + block_ns
    polls = 0
    while True:
        changed, status = os.waitpid(tid, _WNOHANG | _WALL)
        if changed:
            return status
        if time.monotonic_ns() >= end:
            return None
        polls += 1
        if polls > _SPINS + _YIELDS:
            time.sleep(_NAP)
        elif polls > _SPINS:
            os.sched_yield()


def stopped_by_signal(status: int) -> int:
    """Say before the delivery of which signal a thread stands.

    A step's end is a SIGTRAP too.  Give the signal on to ``cont`` or ``detach``, or it is lost.

    Args:
        status: From ``wait``.

    Returns:
        The signal; 0 if the thread stands for another reason, or has ended.
    """
    return status >> 8 if status & 0xFF == 0x7F and status < 0x10000 else 0


def is_event_stop(status: int) -> bool:
    """Say whether a thread stands because of ``interrupt``, or because its process is stopped.

    The second has the stopping signal in bits 8 to 15, the first SIGTRAP.

    Args:
        status: From ``wait``.
    """
    return status >> 16 == _PTRACE_EVENT_STOP and status & 0xFF == 0x7F


# --- what a stopped thread has ---------------------------------------------------------


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def get_registers(tid: int, words: int) -> list[int]:
    """Read the registers of a stopped thread.

    Kernel: PTRACE_GETREGSET of NT_PRSTATUS, since Linux 2.6.34.

    Args:
        tid: The stopped thread.
        words: How many there are, of 8 bytes each.

    Returns:
        As many, or those that there are.

    Sharing: only the thread that seized it.
    """
    values = (ctypes.c_uint64 * words)()
    part = _IoVec(ctypes.addressof(values), ctypes.sizeof(values))
    _ptrace(_PTRACE_GETREGSET, tid, _NT_PRSTATUS, ctypes.addressof(part))
    return values[: part.length // 8]


def set_registers(tid: int, registers: list[int]) -> None:
    """Write the registers of a stopped thread.

    Kernel: PTRACE_SETREGSET of NT_PRSTATUS, since Linux 2.6.34.

    Sharing: only the thread that seized it.
    """
    values = (ctypes.c_uint64 * len(registers))(*registers)
    part = _IoVec(ctypes.addressof(values), ctypes.sizeof(values))
    _ptrace(_PTRACE_SETREGSET, tid, _NT_PRSTATUS, ctypes.addressof(part))


def get_signal_mask(tid: int) -> int:
    """Read which signals a stopped thread blocks: signal n is bit n - 1.

    Kernel: PTRACE_GETSIGMASK, since Linux 3.11.

    Sharing: only the thread that seized it.
    """
    mask = ctypes.c_uint64()
    _ptrace(_PTRACE_GETSIGMASK, tid, 8, ctypes.addressof(mask))
    return mask.value


def set_signal_mask(tid: int, mask: int) -> None:
    """Say which signals a stopped thread blocks.

    Kernel: PTRACE_SETSIGMASK, since Linux 3.11.

    Sharing: only the thread that seized it.
    """
    value = ctypes.c_uint64(mask)
    _ptrace(_PTRACE_SETSIGMASK, tid, 8, ctypes.addressof(value))


def peek(tid: int, address: int) -> bytes:
    """Read 8 bytes of a stopped thread's memory; all ones where there is none.

    Kernel: PTRACE_PEEKTEXT.

    Sharing: only the thread that seized it.
    """
    # The C library's function returns the word itself, and -1 where the kernel refuses.
    word: int = libc().ptrace(_PTRACE_PEEKTEXT, tid, address, 0)
    return word.to_bytes(8, sys.byteorder, signed=True)
