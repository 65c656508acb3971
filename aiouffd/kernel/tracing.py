"""Tracing threads of another process: whether it is allowed, and the door to all of it.

Knows: Yama, seccomp, what /proc says of a thread, how to send one thread a signal.
Must not know: pages, userfaultfds, why a thread is stopped.

Stopping and stepping are in ``ptrace``, a system call in another thread's place in ``injection``;
both are to be had here.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import Final

from . import abi, calls
from .injection import call_in, is_begun_again
from .ptrace import (
    PTRACE_O_EXITKILL,
    PTRACE_O_TRACECLONE,
    PTRACE_O_TRACEEXEC,
    PTRACE_O_TRACEFORK,
    PTRACE_O_TRACEVFORK,
    SIGTRAP,
    cont,
    detach,
    interrupt,
    is_event_stop,
    libc,
    seize,
    singlestep,
    stopped_by_signal,
    wait,
)

__all__ = (
    "PTRACE_O_EXITKILL",
    "PTRACE_O_TRACECLONE",
    "PTRACE_O_TRACEEXEC",
    "PTRACE_O_TRACEFORK",
    "PTRACE_O_TRACEVFORK",
    "SIGTRAP",
    "allow_tracer",
    "call_in",
    "can_trace",
    "cont",
    "detach",
    "in_system_call",
    "interrupt",
    "is_begun_again",
    "is_event_stop",
    "seize",
    "singlestep",
    "stopped_by_signal",
    "tgkill",
    "wait",
    "why_not",
)

_PR_SET_PTRACER: Final = 0x59616D61  # linux/prctl.h: "Yama"
_SIGKILL: Final = 9


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
    return bool(libc().prctl(_PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0) == 0)


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
    if libc().syscall(ctypes.c_long(abi.NR_TGKILL), pid, tid, signal):
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
    file = open_call_file(pid, tid)
    try:
        return read_call_file(file)
    finally:
        os.close(file)


def open_call_file(pid: int, tid: int) -> int:
    """Open what ``in_system_call`` reads, to ask again and again: opening takes twice as long.

    Returns:
        A descriptor, the caller's.

    Raises:
        FileNotFoundError: There is no such thread (or the kernel was built without this file).
    """
    return os.open(f"/proc/{pid}/task/{tid}/syscall", os.O_RDONLY | os.O_CLOEXEC)


def read_call_file(file: int) -> tuple[int | None, int]:
    """Say where a thread stands, as ``in_system_call``.

    Args:
        file: Of ``open_call_file``; it stays with its thread, whoever has the number later.

    Raises:
        PermissionError, ProcessLookupError: As ``in_system_call``.
    """
    fields = os.pread(file, 256, 0).split()
    if len(fields) == 1:  # "running"
        return None, 0
    number = int(fields[0])
    return (None if number < 0 else number), int(fields[-1], 16)
