"""How a migration goes: a line that is rewritten on a terminal, or JSON objects, one a line.

Knows: terminals, the figures of a migration under way.
Must not know: how it is carried out.

Law of this file: nothing is said to people about what takes less than two seconds.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TextIO

from ..migration.stages import Stage
from .output import Lines
from .progress import amount

_FIRST_S: Final = 2.0
_EVERY_S: Final = 0.5
_WINDOW_S: Final = 2.0  # over which the speed is taken


class LiveLines(Lines):
    """Lines on a terminal, the last of which may be a line that is rewritten."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.is_terminal: Final = stream.isatty()
        self._width = 0

    def put(self, line: str, *, end: str = "\n") -> None:
        """Write one line above the rewritten one; never waits."""
        self.clear()
        super().put(line, end=end)

    def rewrite(self, line: str) -> None:
        """Put a line in the place of the last rewritten one."""
        line = line[: shutil.get_terminal_size().columns - 1]
        width, self._width = self._width, len(line)
        super().put("\r" + line.ljust(width), end="")

    def clear(self) -> None:
        """Take the rewritten line away."""
        width, self._width = self._width, 0
        if width:
            super().put("\r" + " " * width + "\r", end="")


class Tell:
    """Says what happens: to people, or as JSON to programs."""

    def __init__(
        self,
        out: Lines,
        diagnostics: LiveLines,
        *,
        as_json: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin now.

        Args:
            out: For what happens.
            diagnostics: For how it goes, on a terminal.
            as_json: Both are JSON, on ``out``.
            clock: Seconds that only go up.
        """
        self._out = out
        self._diagnostics = diagnostics
        self._as_json = as_json
        self._clock = clock
        self._next = math.inf
        self.begin()

    def begin(self) -> None:
        """Count the time anew: another migration begins."""
        self._next = self._clock() + (_EVERY_S if self._as_json else _FIRST_S)

    def __call__(self, event: str, text: str, **fields: Any) -> None:
        """Say that something has happened.

        Args:
            event: Its name, for programs.
            text: For people; "" says nothing.
            fields: For programs.
        """
        self._diagnostics.clear()
        if self._as_json:
            self._out.put(json.dumps({"time": round(time.time(), 3), "event": event} | fields))
        elif text:
            self._out.put(text)

    def progress(self, figures: Callable[[], dict[str, Any]]) -> None:
        """Say how it goes, if it is time to and somebody listens.

        Args:
            figures: Gives what ``line_of`` takes.
        """
        now = self._clock()
        if now < self._next or not (self._as_json or self._diagnostics.is_terminal):
            return
        self._next = now + _EVERY_S
        value = figures()
        if self._as_json:
            self("progress", "", **value)
        else:
            self._diagnostics.rewrite(line_of(value))


class Estimate:
    """When a migration will be over, from how fast it went of late."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def note(self, seconds: float, moved_bytes: int) -> None:
        """Take note of how far it was.

        Args:
            seconds: Since it began.
            moved_bytes: Memory that was sent or said to be zeros, each time.
        """
        if not moved_bytes:
            self._seen.clear()  # it has not begun
        self._seen.append((seconds, moved_bytes))
        while seconds - self._seen[0][0] > _WINDOW_S and len(self._seen) > 2:
            self._seen.popleft()

    @property
    def rate(self) -> float:
        """Memory moved per second of late; 0 if that is not known."""
        if len(self._seen) < 2:
            return 0.0
        (first, before), (last, now) = self._seen[0], self._seen[-1]
        return (now - before) / (last - first) if last > first else 0.0

    def left(
        self, left_bytes: int, *, dirty_rate: float, rounds: int, downtime: float
    ) -> float | None:
        """Give the seconds that it will take from now; None if that cannot be told.

        Each round sends what was written during the one before it.

        Args:
            left_bytes: Still to be sent, of the round under way.
            dirty_rate: In bytes per second.
            rounds: That may come after this one.
            downtime: In which what is left at the switch may be sent.
        """
        rate = self.rate
        if rate <= 0:
            return 0.0 if not left_bytes else None
        total = part = left_bytes / rate
        for _ in range(min(rounds, 1000)):
            if part <= downtime:
                break
            part *= dirty_rate / rate
            total += part
        return total


def line_of(figures: dict[str, Any]) -> str:
    """Write in one line how a migration goes.

    Args:
        figures: ``stage``, ``connected``, ``round``, ``dirty_rate``, ``sent_bytes``,
            ``zero_bytes``, ``left_bytes``, ``demand``, ``stall`` and ``estimated_end``.
    """
    stage = figures["stage"]
    what = stage
    if stage == Stage.COPYING.value and figures["round"]:
        what = f"round {figures['round']}"
    parts = [
        *(["NO LINE"] if not figures["connected"] else []),
        *([f"{amount(figures['dirty_rate'])}/s dirty"] if figures["dirty_rate"] else []),
        f"{amount(figures['sent_bytes'])} sent",
        f"{amount(figures['zero_bytes'])} zero",
        f"{amount(figures['left_bytes'])} left",
        f"{figures['demand']} on demand",
        f"stall {figures['stall']:.2f} s",
    ]
    end = figures["estimated_end"]
    if end is not None:
        seconds = math.ceil(end)
        parts.append(f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} to go")
    return f"{what}: {', '.join(parts)}"
