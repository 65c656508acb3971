"""Who stands, and who waits for whom, in words.

Knows: how threads of this process look that wait for a thread, a result, a freeze or a program.
Must not know: the helper process; what is told here is known in this one.

Laws of this file:

* Nobody is waited for, and no lock of a thread that may stand is taken: it answers in any state.
* A thread is called as its test calls it, and by the kernel's number.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Container, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Final

from .freezing import Freeze
from .running import Running

if TYPE_CHECKING:
    from .harness import Harness
    from .touches import Touch

#: Files in whose functions a thread waits, or was started; who called them says more.
_WAITING: Final = (
    threading.__file__,
    subprocess.__file__,
    os.path.join(os.path.dirname(__file__), ""),
)


#: Threads that still ran when their harness was closed: nothing can end them.
left_over: Final[weakref.WeakSet[threading.Thread]] = weakref.WeakSet()


def lines(harness: Harness) -> list[str]:
    """Say who stands and who waits, a line each; nothing of the thread that asks.

    Raises:
        HarnessError: The helper process does not answer.

    Sharing: any thread.
    """
    names = harness.ledger.thread_names()
    standing = harness.standing()
    now = time.monotonic_ns()
    told = [
        f"{_who(names.get(touch.thread, ''), touch.thread)} {stands(touch, what, held_by, now)}"
        for touch, what, held_by in standing
    ]
    return [*told, *_waiting({touch.thread for touch, _, _ in standing})]


def stands(touch: Touch, what: str, held_by: str, now_ns: int) -> str:
    """Say where a thread stands, why, and since when."""
    seconds = max(now_ns - touch.time_ns, 0) / 1e9
    call = "" if touch.system_call is None else f", in system call {touch.system_call}"
    where = f", at {touch.where}" if touch.where else ""
    held = {"trampoline": "the trampoline, without the GIL"}.get(held_by, "the kernel")
    return (
        f"stands before its {touch.access.value} of {touch.region}[{touch.page}]"
        f"+{touch.offset_in_page:#x}{call}{where}: stopped by {what} {seconds:.3f} s ago,"
        f" held by {held}"
    )


def _waiting(standing: Container[int]) -> Iterator[str]:
    """Tell of this process's other threads, those that stand left out."""
    frames = sys._current_frames()
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        if (
            thread.native_id in standing
            or thread is threading.current_thread()
            or thread.name == "aiouffd porter"
            or frame is None
        ):
            continue
        left = " (left over from an earlier test)" if thread in left_over else ""
        yield f"{_who(thread.name, thread.native_id)}{left} {_does(frame)}"


def _does(frame: FrameType) -> str:
    """Say whom a thread waits for, or else where it is."""
    whom = ""
    at: FrameType | None = frame
    while at is not None and at.f_code.co_filename.startswith(_WAITING):
        whom = _awaited(at) or whom
        at = at.f_back
    if at is None:
        return f"waits for {whom}" if whom else "runs code that is not Python's"
    place = f"{at.f_code.co_filename}:{at.f_lineno} in {at.f_code.co_name}"
    return f"waits for {whom}, at {place}" if whom else f"is at {place}"


def _awaited(frame: FrameType) -> str:
    """Say whom a call in which a thread is waits for; nothing if it is another call."""
    owner = frame.f_locals.get("self")
    if frame.f_code is threading.Thread.join.__code__ and isinstance(owner, threading.Thread):
        return f"the end of {_who(owner.name, owner.native_id)}"
    if frame.f_code is Running.result.__code__ and isinstance(owner, Running):
        return f"the result of {_who(owner.name, owner.tid)}"
    if frame.f_code is Freeze.wait.__code__ and isinstance(owner, Freeze):
        return f"a {owner.what}"
    if frame.f_code.co_name in _PROGRAM and isinstance(owner, subprocess.Popen):
        return f"the end of {getattr(owner, 'name', 'a program')} (pid {owner.pid})"
    return ""


_PROGRAM: Final = ("wait", "communicate")  # of Popen, or of what is made of it


def _who(name: str, tid: int | None) -> str:
    return f"{name} (tid {tid})" if name else f"tid {tid}"
