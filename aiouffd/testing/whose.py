"""Whose a thread is that the kernel has named by the number which it has for itself.

Knows: pid namespaces, and what /proc says of threads and of memory.
Must not know: userfaultfds, touches.

A fault's message has the thread's number as the thread itself would give it.  In a namespace of
its own (a container, ``unshare --pid``) that is another number than ours, which somebody else
has here: a thread that is to be stopped, stepped or signalled is looked for first.

Laws of this file:

* A number is never given for a thread of another process than was asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator


def is_elsewhere(process: int) -> bool:
    """Say whether a process lives in another pid namespace, where numbers are others."""
    return len(_status(f"/proc/{process}", "NSpid")) > 1


def thread_of(process: int, number: int, *, elsewhere: bool) -> int | None:
    """Give our number of a thread.

    Args:
        process: Whose it is.
        number: As it has it for itself.
        elsewhere: Whether the process lives in another namespace.

    Returns:
        The number here; None if the process has no such thread.
    """
    if not elsewhere:
        return number if os.path.exists(f"/proc/{process}/task/{number}") else None
    for thread in _numbers(f"/proc/{process}/task"):
        if _status(f"/proc/{process}/task/{thread}", "NSpid")[-1:] == [number]:
            return thread
    return None


def process_of(number: int, address: int) -> int | None:
    """Find the process of a thread, of which only its own number and some memory are known.

    Args:
        number: The thread's, as it has it for itself.
        address: Some that its process has mapped.
    """
    for process in _status(f"/proc/{number}", "Tgid"):
        if not is_elsewhere(process) and _has_mapped(process, address):
            return process
    for process in _numbers("/proc"):
        if (
            is_elsewhere(process)
            and thread_of(process, number, elsewhere=True) is not None
            and _has_mapped(process, address)
        ):
            return process
    return None


def _numbers(folder: str) -> Iterator[int]:
    try:
        yield from map(int, filter(str.isdigit, os.listdir(folder)))
    except OSError:  # it has ended
        return


def _status(folder: str, field: str) -> list[int]:
    """Give a field of a status file; nothing if there is none."""
    try:
        with open(f"{folder}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith(f"{field}:"):
                    return list(map(int, line.split()[1:]))
    except OSError:  # it has ended
        pass
    return []


def _has_mapped(process: int, address: int) -> bool:
    try:
        with open(f"/proc/{process}/maps", encoding="utf-8", errors="replace") as file:
            for line in file:
                start, _, end = line.partition(" ")[0].partition("-")
                if int(start, 16) <= address < int(end, 16):
                    return True
    except OSError:  # it has ended, or is not ours to look into
        pass
    return False
