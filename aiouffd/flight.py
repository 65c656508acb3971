"""One fault on its way to its end, and where its handler waits.

Knows: what is known of a fault between its message and its end.
Must not know: how it is served.
"""

from __future__ import annotations

import asyncio
import enum
import gc
import os
from typing import TYPE_CHECKING, Any, Final

from . import eager
from .events import PageFault
from .resolutions import Resolution

if TYPE_CHECKING:
    from .region import Region


_DEEPEST: Final = 1000  # frames that are looked at

_STDLIB: Final = os.path.join(os.path.dirname(os.__file__), "")
_PACKAGES: Final = tuple(os.path.join(_STDLIB, f"{kind}-packages") for kind in ("site", "dist"))


class Stage(enum.Enum):
    """Where a fault is on its way."""

    QUEUED = "queued"  #: waits for a free place among max_in_flight
    ASKED = "asked"  #: its handler (or a retry, or the fallback) is at work
    PARKED = "parked"  #: the kernel said EAGAIN: waits for a retry
    LOST = "lost"  #: its address lies in no known range: an event may yet explain it
    HANGING = "hanging"  #: the failure policy leaves it alone
    ENDED = "ended"


class Flight:
    """One fault, in flight: later faults on the same page join it.

    Attributes:
        fault: As its first message reported it.
        region: Who serves; None if its address lies in no known range.
        stage: Where it is.
        started: The loop's time at which its message was read, in seconds.
        started_ns: The same by ``time.perf_counter_ns``; 0 if nobody observes.
        task: The handler at work, if it suspended.
        resolution: What is to be performed, once that is known.
        final: The failure policy has spoken: another failure leaves only killing.
        recovering: Its retries have begun.
        tries: How often the kernel said ENOMEM.
        warned: The watchdog has reported it.
    """

    __slots__ = (
        "fault",
        "final",
        "recovering",
        "region",
        "resolution",
        "stage",
        "started",
        "started_ns",
        "task",
        "tries",
        "warned",
    )

    def __init__(
        self, fault: PageFault, region: Region | None, started: float, started_ns: int = 0
    ) -> None:
        self.fault = fault
        self.region = region
        self.stage = Stage.ASKED
        self.started = started
        self.started_ns = started_ns
        self.task: asyncio.Task[Any] | None = None
        self.resolution: Resolution | None = None
        self.final = False
        self.recovering = False
        self.tries = 0
        self.warned = False

    def cancel(self) -> None:
        """Cancel the handler at work, if any; its owner still awaits it."""
        task, self.task = self.task, None
        if task is not None:
            task.cancel()

    def __repr__(self) -> str:
        return f"<Flight {self.fault.address:#x} {self.stage.value}>"


def where_it_waits(task: asyncio.Task[Any]) -> str:
    """Name the line on which a task's innermost coroutine waits.

    Returns:
        ``file:line in function``, or a word on why there is no such line.
    """
    if task.done():
        return "nowhere: it has ended"
    found = "no line of Python"
    waiting: Any = task.get_coro()
    for _ in range(_DEEPEST):
        if waiting is None:
            break
        frame = _one_of(waiting, "cr_frame", "gi_frame", "ag_frame")
        if frame is None:
            waiting = _hidden_in(waiting)
            continue
        code = frame.f_code
        if _is_the_users(code.co_filename):
            found = f"{code.co_filename}:{frame.f_lineno} in {code.co_qualname}"
        if code.co_filename == eager.__file__ and "coro" in frame.f_locals:
            waiting = frame.f_locals["coro"]
        else:
            waiting = _one_of(waiting, "cr_await", "gi_yieldfrom", "ag_await")
    return found


def _one_of(thing: Any, *names: str) -> Any:
    for name in names:
        value = getattr(thing, name, None)
        if value is not None:
            return value
    return None


def _hidden_in(thing: Any) -> Any:
    """Give what stands behind an object between two frames: a step of an async generator, ...

    Such objects of the interpreter name nothing, but the garbage collector knows what they hold.
    """
    if type(thing).__module__ != "builtins":
        return None
    held = gc.get_referents(thing)
    for each in held:
        if _one_of(each, "cr_frame", "gi_frame", "ag_frame") is not None:
            return each
    return next((each for each in held if hasattr(each, "__await__")), None)


def _is_the_users(path: str) -> bool:
    """Say whether a file is neither Python's own nor the one that starts handlers."""
    if path == eager.__file__:
        return False
    return not path.startswith(_STDLIB) or path.startswith(_PACKAGES)
