"""The helper's loop: descriptors to watch, time limits, and telling without ever waiting.

Knows: epoll, a heap of moments, a queue of what could not be sent yet.
Must not know: what it is all about.

No asyncio: importing it takes longer than starting all the rest, and each test may start one.

Descriptors are watched by epoll, which has no limit of 1,024 but counts in milliseconds; so what
waits is select(2), on the epoll's own descriptor, to the microsecond.
"""

from __future__ import annotations

import heapq
import itertools
import select
import selectors
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from .channel import Channel, Message

_AGAIN_NS: Final = 1_000_000  # until a full socket is tried again


class Turning:
    """A loop of callbacks.

    Sharing: one thread.
    """

    def __init__(self) -> None:
        """Begin with nothing to do."""
        self._selector = selectors.EpollSelector()
        self._timers: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._running = True

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back whenever a descriptor is readable."""
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def forget(self, fd: int) -> None:
        """Call back no more for a descriptor; before it is closed."""
        self._selector.unregister(fd)

    def after(self, delay_ns: int, callback: Callable[[], None]) -> None:
        """Call back once, later."""
        when = time.monotonic_ns() + delay_ns
        heapq.heappush(self._timers, (when, next(self._numbers), callback))

    def stop(self) -> None:
        """End ``run`` after this turn."""
        self._running = False

    def run(self, turn: Callable[[], None]) -> None:
        """Wait and call back, and ``turn`` after each time, until ``stop``."""
        while self._running:
            if select.select((self._selector,), (), (), self._pause())[0]:
                for key, _ in self._selector.select(0):
                    key.data()
            now = time.monotonic_ns()
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()
            turn()

    def close(self) -> None:
        """Give up the selector."""
        self._selector.close()

    def _pause(self) -> float | None:
        if not self._timers:
            return None
        return max(0.0, (self._timers[0][0] - time.monotonic_ns()) / 1e9)


class Teller:
    """Tells the test process what happens, in order, and never waits for it.

    Sharing: one thread.
    """

    def __init__(self, channel: Channel, turning: Turning) -> None:
        """Tell it over a channel whose socket does not block."""
        self._channel = channel
        self._turning = turning
        self._backlog: deque[Message] = deque()

    def __call__(self, *message: Any) -> None:
        """Tell something, now or when the test process reads again."""
        self._backlog.append(message)
        if len(self._backlog) == 1:
            self._flush()

    def last(self, *message: Any) -> bool:
        """Tell what is left, and this, however long the test process takes; say whether it did."""
        self._channel.sock.setblocking(True)
        self._backlog.append(message)
        self._flush()
        return not self._backlog

    def _flush(self) -> None:
        while self._backlog:
            try:
                self._channel.send(self._backlog[0])
            except BlockingIOError:
                self._turning.after(_AGAIN_NS, self._flush)
                return
            except ValueError as error:  # too long; said at least
                self._backlog[0] = "trouble", str(error)
                continue
            except OSError:
                self._turning.stop()
                return
            self._backlog.popleft()
