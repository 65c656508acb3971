"""What a running server is told from outside: to drain, then to stop.

Knows: SIGTERM and SIGINT.
Must not know: servers.
"""

from __future__ import annotations

import asyncio
import signal


class Orders:
    """SIGTERM and SIGINT, and what the control socket says: first to drain, then to stop."""

    def __init__(self) -> None:
        self.draining = asyncio.Event()
        self.stopping = asyncio.Event()

    def take(self) -> None:
        """Take the signals, for as long as the loop lives."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.signalled)

    def drain(self) -> None:
        """Begin to drain, if that was not begun."""
        self.draining.set()

    def signalled(self) -> None:
        """Drain, or stop if that was begun."""
        (self.stopping if self.draining.is_set() else self.draining).set()
