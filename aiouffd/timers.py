"""Named one-shot timers on a loop: setting one that runs already does nothing.

Knows: the loop's clock.
Must not know: what the timers are for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Timers:
    """The timers of one pager.

    Sharing: the loop's thread.
    """

    __slots__ = ("_handles", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handles: dict[str, asyncio.TimerHandle] = {}

    def set(self, name: str, delay: float, call: Callable[[], None]) -> None:
        """Call once after ``delay`` seconds, unless the timer of that name runs already."""
        if name not in self._handles:

            def fire() -> None:
                del self._handles[name]
                call()

            self._handles[name] = self._loop.call_later(delay, fire)

    def cancel_all(self) -> None:
        """Stop them all."""
        for handle in self._handles.values():
            handle.cancel()
        self._handles.clear()
