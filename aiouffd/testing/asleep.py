"""In which system call a thread is asleep, by what /proc says of it.

Knows: one line of /proc, and the numbers of calls that threads sleep in.
Must not know: why anybody wants to know.
"""

from __future__ import annotations

import os
import struct
import time
from typing import Final

#: Calls that threads are found asleep in, by their numbers.
_CALLS: Final[dict[str, str]] = {
    "x86_64": """0 read 1 write 7 poll 23 select 34 pause 35 nanosleep 43 accept 44 sendto
        45 recvfrom 46 sendmsg 47 recvmsg 61 wait4 72 fcntl 73 flock 128 rt_sigtimedwait 202 futex
        230 clock_nanosleep 232 epoll_wait 247 waitid 270 pselect6 271 ppoll 281 epoll_pwait""",
    "aarch64": """22 epoll_pwait 25 fcntl 32 flock 63 read 64 write 72 pselect6 73 ppoll 95 waitid
        98 futex 101 nanosleep 115 clock_nanosleep 137 rt_sigtimedwait 202 accept 206 sendto
        207 recvfrom 211 sendmsg 212 recvmsg 260 wait4""",
}
_WORDS: Final = _CALLS.get(os.uname().machine, "").split() if hasattr(os, "uname") else []
_NAMES: Final = dict(zip(_WORDS[::2], _WORDS[1::2], strict=True))
#: Those that end by themselves, and that nobody else ends.
TIMED: Final = frozenset({"nanosleep", "clock_nanosleep"})
#: Which argument is a time limit: a pointer, or milliseconds.
_LIMIT_POINTERS: Final = {
    "futex": 3,
    "select": 4,
    "pselect6": 4,
    "ppoll": 2,
    "rt_sigtimedwait": 2,
}
#: Operations of futex(2) whose limit is a moment: LOCK_PI, WAIT_BITSET, WAIT_REQUEUE_PI, LOCK_PI2.
_UNTIL: Final = frozenset({6, 9, 11, 13})
_LOCK_PI: Final = 6
_REAL_TIME: Final = 256
_LIMIT_MILLISECONDS: Final = {"poll": 2, "epoll_wait": 3, "epoll_pwait": 3}


class Look:
    """A thread's line in /proc, kept open: reading it is all that a look takes."""

    __slots__ = ("_fd", "tid")

    def __init__(self, process: int, tid: int) -> None:
        """Open it.

        Kernel: /proc/PID/task/TID/syscall, since Linux 2.6.27.

        Raises:
            OSError: There is no such thread, or we may not trace it.
        """
        self.tid = tid
        self._fd = os.open(f"/proc/{process}/task/{tid}/syscall", os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> str:
        """Say ``running``, or give a line that begins with the number of a system call or -1."""
        try:
            return os.pread(self._fd, 256, 0).decode("ascii", "replace").strip()
        except OSError:  # it has ended
            return ""

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)


def call_of(text: str) -> str:
    """Name the system call in such a line; empty if it is in none."""
    number, _, _ = text.partition(" ")
    if not number.isdigit():
        return ""
    return _NAMES.get(number, f"system call {number}")


def ends_by_itself(text: str) -> bool:
    """Say whether the system call in such a line is over some time, whatever others do."""
    call = call_of(text)
    arguments = text.split()[1:]
    if len(arguments) < 6:
        return False
    if (at := _LIMIT_POINTERS.get(call)) is not None:
        return int(arguments[at], 16) != 0
    if (at := _LIMIT_MILLISECONDS.get(call)) is not None:
        return int(arguments[at], 16) & 0x8000_0000 == 0  # an int: a negative one is for ever
    return call in TIMED


def seconds_left(text: str) -> float | None:
    """Say how long the system call in such a line of a thread of this process lasts at most.

    Returns:
        Seconds from now; None if nothing but somebody else ends it, or it is over.

    Kernel: /proc/self/mem, which reads memory that may be gone without a signal.
    """
    if not ends_by_itself(text):
        return None
    call, arguments = call_of(text), text.split()[1:]
    if (at := _LIMIT_MILLISECONDS.get(call)) is not None:
        return int(arguments[at], 16) / 1e3
    if (at := _LIMIT_POINTERS.get(call)) is None:
        return None  # who sleeps is not found blocked
    try:
        memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            limit = os.pread(memory, 16, int(arguments[at], 16))
        finally:
            os.close(memory)
        whole, part = struct.unpack("qq", limit)
    except (OSError, OverflowError, struct.error):
        return None
    seconds: float = whole + part / (1e6 if call == "select" else 1e9)
    if call == "futex" and (operation := int(arguments[1], 16)) & 0x7F in _UNTIL:
        real = operation & _REAL_TIME or operation & 0x7F == _LOCK_PI
        seconds -= time.clock_gettime(time.CLOCK_REALTIME if real else time.CLOCK_MONOTONIC)
    return max(seconds, 0.0)
