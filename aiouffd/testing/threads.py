"""Threads as tests name them, and what the kernel says that they are doing.

Knows: /proc/self/task.
Must not know: touches.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, TypeAlias

from .running import Running

#: What names a thread: its kernel id, or an object that knows it.
ThreadLike: TypeAlias = int | threading.Thread | Running[Any]

_WHAT: Final = (
    "thread= takes a thread id, a threading.Thread, a Running, or several of these, not {!r};"
    " a program has threads that nobody knows beforehand: its first one has the id program.pid,"
    " and a region that only this program is given is touched by nobody else"
)
_STATES: Final = {
    "R": "runs",
    "S": "sleeps",
    "D": "sleeps",
    "T": "is stopped",
    "t": "is traced",
    "Z": "has ended",
}


def number_of(thread: ThreadLike) -> int:
    """Give the kernel's number of a thread.

    Raises:
        ValueError: It has not been started.
        TypeError: It is no thread.
    """
    if isinstance(thread, Running):
        return thread.tid
    if isinstance(thread, threading.Thread):
        if thread.native_id is None:
            raise ValueError(f"{thread!r} has not been started: it has no thread id yet")
        return thread.native_id
    if isinstance(thread, int):
        return thread
    raise TypeError(_WHAT.format(thread))


def numbers_of(thread: ThreadLike | Iterable[ThreadLike] | None) -> frozenset[int]:
    """Give the numbers of a thread or of some; none for None.

    Raises:
        ValueError: An empty list, or a thread that has not been started.
        TypeError: Something else than threads.
    """
    if thread is None:
        return frozenset()
    if isinstance(thread, (int, threading.Thread, Running)):
        return frozenset({number_of(thread)})
    if not isinstance(thread, Iterable):
        raise TypeError(_WHAT.format(thread))
    numbers = frozenset(map(number_of, thread))
    if not numbers:
        raise ValueError("an empty list of threads: give at least one, or None for all")
    return numbers


def own_threads() -> list[int]:
    """Give the numbers of this process's threads."""
    return sorted(map(int, os.listdir("/proc/self/task")))


def doing(thread: int) -> str:
    """Say what a thread of this process does: its state and where in the kernel it sleeps."""
    try:
        stat = Path(f"/proc/self/task/{thread}/stat").read_text(encoding="ascii", errors="replace")
        sleeps = Path(f"/proc/self/task/{thread}/wchan").read_text(encoding="ascii")
    except OSError:
        return "has ended"
    state = stat.rpartition(")")[2].split()[0]
    where = f" in {sleeps}" if sleeps not in ("", "0") else ""
    return _STATES.get(state, f"is in state {state}") + where
