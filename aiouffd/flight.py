"""One fault on its way to its end, and where its handler waits.

Knows: what is known of a fault between its message and its end.
Must not know: how it is served.
"""

from __future__ import annotations

import asyncio
import enum
import os
import types
from typing import TYPE_CHECKING, Any, Final

from . import eager
from .events import PageFault
from .resolutions import Resolution

if TYPE_CHECKING:
    from .region import Region


_NOT_THE_USERS: Final = (os.path.dirname(asyncio.__file__) + os.sep, str(eager.__file__))


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
    found = "at its very start"
    coro: Any = task.get_coro()
    while coro is not None:
        frame = (
            getattr(coro, "cr_frame", None)
            or getattr(coro, "gi_frame", None)
            or getattr(coro, "ag_frame", None)
        )
        if isinstance(frame, types.FrameType):
            code = frame.f_code
            # The user's own line, not asyncio's below it nor eager's above it.
            if not code.co_filename.startswith(_NOT_THE_USERS):
                found = f"{code.co_filename}:{frame.f_lineno} in {code.co_qualname}"
            hidden = frame.f_locals.get("coro") if code.co_filename == eager.__file__ else None
            if hidden is not None:
                coro = hidden
                continue
        coro = (
            getattr(coro, "cr_await", None)
            or getattr(coro, "gi_yieldfrom", None)
            or getattr(coro, "ag_await", None)
        )
    return found
