"""Tell the service manager how a server is: ready, stopping, what it does, that it lives.

Knows: the words of sd_notify(3), the watchdog that was asked for.
Must not know: sockets and datagrams (``sd_notify``), what a server does.

Laws of this file:

* Without a service manager nothing is sent; without a watchdog asked for nobody is woken up.
* The watchdog is pinged by the loop itself, so that a loop that hangs is seen.
* A service manager that does not listen is logged once; the server serves on.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Final, Self

from .sd_notify import notify

log: Final = logging.getLogger("aiouffd.service_manager")


def watchdog_seconds(environment: Mapping[str, str] | None = None) -> float | None:
    """Give the time within which the service manager wants to hear from this process.

    Args:
        environment: Where WATCHDOG_USEC and WATCHDOG_PID are; by default ours.

    Returns:
        Seconds, or None if it does not ask for that.
    """
    environment = os.environ if environment is None else environment
    text, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not text.isdecimal() or not int(text) or pid not in {"", str(os.getpid())}:
        return None
    return int(text) / 1e6


class ServiceManager:
    """Says to the service manager how a server is.

    ::

        with ServiceManager() as manager:
            manager.ready("serving memory.img")

    Sharing: the thread of the running loop.
    """

    def __init__(self) -> None:
        self._path = os.environ.get("NOTIFY_SOCKET", "")
        period = watchdog_seconds()
        self._period = None if period is None or not self._path else period / 2
        self._timer: asyncio.TimerHandle | None = None
        self._status = ""
        self._deaf = False

    def __enter__(self) -> Self:
        """Begin to ping the watchdog, if there is one."""
        if self._period is not None:
            self._ping()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def ready(self, status: str) -> None:
        """Say that the server takes targets."""
        self._say("READY=1", status)

    def stopping(self, status: str) -> None:
        """Say that it takes no more and ends when the last is through."""
        self._say("STOPPING=1", status)

    def status(self, status: str) -> None:
        """Say in a line what it does; nothing is sent if that was said last."""
        if status != self._status:
            self._say("", status)

    def _say(self, state: str, status: str = "") -> None:
        lines = [state] if state else []
        if status:
            self._status = status
            lines.append("STATUS=" + status.replace("\n", " "))
        if not self._path:
            return
        try:
            notify("\n".join(lines), path=self._path)
        except OSError as error:
            if not self._deaf:
                log.warning("the service manager at %s does not listen: %s", self._path, error)
            self._deaf = True

    def _ping(self) -> None:
        assert self._period is not None  # noqa: S101 - or nobody calls this
        self._say("WATCHDOG=1")
        self._timer = asyncio.get_running_loop().call_later(self._period, self._ping)
