"""ptrace: stop one thread of another process, let it make one instruction, let it go.

Knows: the requests, the statuses that waitpid gives back, how to send one thread a signal.
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

from . import abi, calls

# linux/ptrace.h
_PTRACE_CONT: Final = 7
_PTRACE_SINGLESTEP: Final = 9
_PTRACE_DETACH: Final = 17
_PTRACE_SEIZE: Final = 0x4206
_PTRACE_INTERRUPT: Final = 0x4207
_NAMES: Final = {
    _PTRACE_CONT: "PTRACE_CONT",
    _PTRACE_SINGLESTEP: "PTRACE_SINGLESTEP",
    _PTRACE_DETACH: "PTRACE_DETACH",
    _PTRACE_SEIZE: "PTRACE_SEIZE",
    _PTRACE_INTERRUPT: "PTRACE_INTERRUPT",
}
_PTRACE_EVENT_STOP: Final = 128

#: Options of ``seize``: end the thread's process when we end; trace what it forks, clones, runs.
PTRACE_O_TRACEFORK: Final = 0x2
PTRACE_O_TRACEVFORK: Final = 0x4
PTRACE_O_TRACECLONE: Final = 0x8
PTRACE_O_TRACEEXEC: Final = 0x10
PTRACE_O_EXITKILL: Final = 0x100000

# linux/prctl.h
_PR_SET_PTRACER: Final = 0x59616D61  # "Yama"

# linux/wait.h; os has the first on Unix only
_WNOHANG: Final = 1
_WALL: Final = 0x40000000  # threads that are no children of ours, too

_SIGKILL: Final = 9
SIGTRAP: Final = 5

_SECOND: Final = 1_000_000_000
# A step takes about ten microseconds, a waitpid one: ask again and again at first, then let
# others run, then sleep, for who has not stopped by now waits for a CPU or for a disk.
_SPINS: Final = 32
_YIELDS: Final = 32
_NAP: Final = 0.000_1


# --- the requests ----------------------------------------------------------------------


@functools.cache
def _libc() -> ctypes.CDLL:
    # Not at import, which has to work on every system.
    calls.require_linux()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    libc.ptrace.restype = ctypes.c_long
    return libc


def _ptrace(request: int, tid: int, address: int, data: int) -> None:
    if _libc().ptrace(request, tid, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"{_NAMES[request]} of thread {tid}")


def seize(tid: int, options: int = 0) -> None:
    """Begin to trace a thread; it goes on as if nothing had happened.

    Kernel: PTRACE_SEIZE, since Linux 3.4.

    Args:
        tid: A thread's id (of a process's first thread: the process id).  No thread of ours.
        options: PTRACE_O_..., or'ed.

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
    calls end early, to be restarted when it goes on.  A stop that is under way is enough: several
    requests make one stop.

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


def wait(tid: int, *, block_ns: int = _SECOND) -> int | None:
    """Wait until a traced thread has stopped or ended.

    Each stop is told once.  If the thread is the first one of a child process of ours, its exit
    status is told once too, and nobody else gets it any more.

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


# --- who may ---------------------------------------------------------------------------

#: A program that waits for its end, in the interpreter that runs already.
_IDLE: Final = ("python", "-I", "-S", "-c", "import sys; sys.stdin.read()")


@functools.cache
def can_trace() -> str | None:
    """Trace a child process of ours for a moment, to see whether that is allowed here.

    About a millisecond the first time; the answer is kept.  Who is no child may still be out of
    reach: see ``allow_tracer``.

    Returns:
        None if it works; else a sentence or two: why not, and what helps.

    Raises:
        OSError: No child could be started.
    """
    if sys.platform != "linux":
        return "ptrace as it is used here exists on Linux only."
    # The child ends when the pipe does, so also with us; it is gone long before it reads.
    reading, writing = os.pipe()
    try:
        child = os.posix_spawn(
            "/proc/self/exe",
            _IDLE,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, reading, 0)],
        )
        try:
            seize(child)
            interrupt(child)
            wait(child)
        except OSError as error:
            return why_not(error, _text("/proc/sys/kernel/yama/ptrace_scope"), _status())
        finally:
            os.kill(child, _SIGKILL)
            os.waitpid(child, 0)
    finally:
        os.close(reading)
        os.close(writing)
    return None


def _text(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _status() -> dict[str, str]:
    lines = (line.partition(":") for line in _text("/proc/self/status").splitlines())
    return {key: value.strip() for key, _, value in lines}


def why_not(error: OSError, scope: str, status: dict[str, str]) -> str:
    """Say why a child process could not be traced, and what helps.

    Args:
        error: What the attempt ended in.
        scope: ``/proc/sys/kernel/yama/ptrace_scope``; empty where there is none.
        status: The fields of ``/proc/self/status``.
    """
    what = f"This process may not trace a child of its own ({error.filename}: {error.strerror})."
    tracer = status.get("TracerPid", "0")
    if tracer != "0":
        return (
            f"{what} Process {tracer}, a debugger or strace, traces this one and what it starts: "
            "run without it, or without following child processes."
        )
    if scope.strip() == "3":
        return (
            f"{what} /proc/sys/kernel/yama/ptrace_scope is 3, which forbids it to everybody until "
            "the next boot: set kernel.yama.ptrace_scope to 1 in /etc/sysctl.d and boot again."
        )
    if scope.strip() == "2":
        return (
            f"{what} /proc/sys/kernel/yama/ptrace_scope is 2, which takes CAP_SYS_PTRACE: "
            "run as root, or type: sudo sysctl kernel.yama.ptrace_scope=1"
        )
    if status.get("Seccomp", "0") != "0":
        return (
            f"{what} A seccomp filter is at work here, as in containers: start the container with "
            "--cap-add=SYS_PTRACE, or with a seccomp profile that allows ptrace."
        )
    return f"{what} A security module (SELinux, AppArmor) may forbid it: CAP_SYS_PTRACE may help."


def allow_tracer(pid: int) -> bool:
    """Let a process trace this one, though this one is no child of it.

    Where Yama's ptrace_scope is 1 (Debian, Ubuntu) a process is traced by its ancestors only,
    and by whom it names here.  The last one named counts.

    Kernel: prctl(PR_SET_PTRACER), since Linux 3.4.

    Args:
        pid: The process, of which any thread may then trace, and its children; 0 is nobody any
            more, -1 everybody.

    Returns:
        Whether that is noted.  False where there is no Yama, which is to say no such rule, and
        where there is no such process.
    """
    # -1 is converted to ULONG_MAX, which is the kernel's word for everybody.
    return bool(_libc().prctl(_PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0) == 0)


# --- one thread ------------------------------------------------------------------------


def tgkill(pid: int, tid: int, signal: int) -> None:
    """Send one thread a signal.

    Kernel: tgkill(2), since Linux 2.5.75.

    Args:
        pid: The thread's process.
        tid: The thread.
        signal: The signal; 0 only looks whether that would be possible.

    Raises:
        ProcessLookupError: There is no such thread in that process.
        PermissionError: We may not.
    """
    if _libc().syscall(ctypes.c_long(abi.NR_TGKILL), pid, tid, signal):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"tgkill of thread {tid}")


def in_system_call(pid: int, tid: int) -> tuple[int | None, int]:
    """Say where a thread stands that does not run: in which system call, at which instruction.

    A thread that waits for a page of a userfaultfd is in none if its own instruction touched the
    page, and in the call if the kernel did.

    Kernel: /proc/PID/task/TID/syscall, since Linux 2.6.27.

    Args:
        pid: The thread's process.
        tid: The thread; not this one.

    Returns:
        The system call's number or None, and the program counter: of the instruction that it will
        make next, in a system call the one after.  (None, 0) is a thread that runs, or that is
        about to end.

    Raises:
        PermissionError: We may not trace that process: ``can_trace``, ``allow_tracer``.
        FileNotFoundError: There is no such thread (or the kernel was built without this file).
        ProcessLookupError: The thread ended meanwhile.
    """
    calls.require_linux()
    with open(f"/proc/{pid}/task/{tid}/syscall", encoding="ascii") as file:
        fields = file.read().split()
    if len(fields) == 1:  # "running"
        return None, 0
    number = int(fields[0])
    return (None if number < 0 else number), int(fields[-1], 16)
