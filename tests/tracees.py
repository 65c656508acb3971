"""Threads to trace, and what their stops look like.

Knows: how to start a child process that waits in a system call, how to see a thread parked.
Must not know: what is tested with them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aiouffd.kernel import abi, calls, tracing
from tests.targets import PAGE, Target, wait_until

#: The status of a thread that PTRACE_INTERRUPT has stopped.
INTERRUPTED = tracing.SIGTRAP << 8 | 0x7F | 128 << 16
#: The status after a step.
STEPPED = tracing.SIGTRAP << 8 | 0x7F

#: Numbers of system calls on this machine.
_NAMES = "read poll ppoll pwrite64 getpid getppid getcwd ptrace exit_group mmap"
_NUMBERS = {
    "x86_64": (0, 7, 271, 18, 39, 110, 79, 101, 231, 9),
    "aarch64": (63, -1, 73, 68, 172, 173, 17, 117, 94, 222),  # -1: there is none
}
NR = dict(zip(_NAMES.split(), _NUMBERS.get(abi.MACHINE, ()), strict=False))


def fill(target: Target, page: int, byte: int = 7, mode: int = 0) -> None:
    """Fill a page of the target's."""
    data = ctypes.create_string_buffer(bytes([byte]) * PAGE, PAGE)
    assert calls.copy(target.uffd, target.at(page), ctypes.addressof(data), PAGE, mode) == PAGE


def parked(target: Target, count: int = 1) -> None:
    """Wait until so many threads wait for pages."""
    wait_until(lambda: target.fdinfo().total == count, f"{count} threads in faults")


def stop(tid: int) -> None:
    """Seize a thread and stop it."""
    tracing.seize(tid)
    tracing.interrupt(tid)
    assert tracing.wait(tid) == INTERRUPTED


def in_call(pid: int, *numbers: int) -> None:
    """Wait until a process's first thread waits in one of these system calls."""
    wait_until(lambda: tracing.in_system_call(pid, pid)[0] in numbers, f"in call {numbers}")


@contextmanager
def child(main: Callable[[], object]) -> Iterator[int]:
    """Run something in a forked process, which is killed afterwards if it still is there."""
    pid = os.fork()
    if not pid:
        try:
            main()
        finally:
            os._exit(0)
    try:
        yield pid
    finally:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass  # the test has seen its end


def reap(target: Target) -> None:
    """Kill a target, and be told the end of each of its threads that is traced."""
    os.kill(target.pid, signal.SIGKILL)
    for tid in target.thread_ids:
        try:
            while (status := tracing.wait(tid)) is None or status & 0xFF == 0x7F:
                pass
        except ChildProcessError:
            pass  # not traced


@contextmanager
def traced_target(*, user_mode_only: bool = True) -> Iterator[Target]:
    """Four pages of nothing; user-mode faults need no privilege."""
    with Target("anon", pages=4, user_mode_only=user_mode_only) as target:
        try:
            yield target
        finally:
            reap(target)


def seccomp_filter(number: int, action: int) -> None:
    """Install a filter for one system call; the others are allowed."""
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (0x20, 0, 0, 0),  # load the system call's number
            (0x15, 0, 1, number),  # if it is not that one, pass over the next
            (0x06, 0, 0, action),
            (0x06, 0, 0, 0x7FFF_0000),  # SECCOMP_RET_ALLOW
        )
    )
    code = ctypes.create_string_buffer(program)
    filter_ = struct.pack("@HP", 4, ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, filter_, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
