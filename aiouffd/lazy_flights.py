"""Pages on their way, and who waits for them.

Knows: the state of one page's coming, and how its waiters are let go.
Must not know: threads, loops, the memory.

Laws of this file:

* A waiter is released once.  It queues up first and looks at ``done`` afterwards; whoever ends
  a flight sets ``done`` first and releases afterwards: so none is overlooked, without a lock.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from .events import PageFault
from .resolutions import Answer


class Releasable(Protocol):
    """Something that waits for a flight."""

    def release(self) -> None:
        """Let it go on; called once."""


class Flight:
    """Pages being brought.

    Attributes:
        start: First address.
        fault: What the handler is asked; None until the owner has looked.
        posted: It was handed to the loop.
        promise: What a plain function returned for the loop to await.
        done: It is over; ``failure`` says how.
        failure: Makes the exception for each waiter; None after success.
    """

    __slots__ = ("done", "failure", "fault", "owner", "posted", "promise", "start", "waiters")

    def __init__(self, start: int, owner: int) -> None:
        self.start = start
        self.owner = owner
        self.fault: PageFault | None = None
        self.posted = False
        self.promise: Awaitable[Answer] | None = None
        self.done = False
        self.failure: Callable[[], BaseException] | None = None
        self.waiters: list[Releasable] = []


class Placeholder:
    """A page of zeros (or an unprotected page) that lets a failed access complete."""

    __slots__ = ("owner", "protect", "waiters")

    def __init__(self, owner: int, protect: bool) -> None:
        self.owner = owner
        self.protect = protect
        self.waiters: list[Releasable] = []


def release_all(waiters: list[Releasable]) -> None:
    """Let everybody go on who waits; whoever joins meanwhile looks at ``done`` himself."""
    while True:
        try:
            waiter = waiters.pop()
        except IndexError:
            return
        waiter.release()
