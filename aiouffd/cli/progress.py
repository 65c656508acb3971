"""How far something long has come: one line on stderr.

Knows: a terminal's line, time.
Must not know: what is being done.

Law of this file: nothing is said about what takes less than two seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Final, TextIO

_FIRST_S: Final = 2.0
_EVERY_S: Final = 0.5  # on a terminal, where a line replaces the one before
_EVERY_LINE_S: Final = 5.0  # elsewhere, where lines add up

_UNITS: Final = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def amount(count: float) -> str:
    """Write bytes for people: ``1.5 GiB``."""
    at = 0
    while count >= 1024 and at < len(_UNITS) - 1:
        count /= 1024
        at += 1
    return f"{count:.0f} {_UNITS[at]}" if at == 0 else f"{count:.1f} {_UNITS[at]}"


def counted(number: int, one: str, many: str) -> str:
    """Write how many there are: ``1 process``, ``2 processes``."""
    return f"{number} {one if number == 1 else many}"


class Progress:
    """Says how far something has come."""

    def __init__(
        self,
        doing: str,
        *,
        wanted: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin now.

        Args:
            doing: What is being done, such as ``packing``.
            wanted: Say it even where nobody watches a terminal.
            stream: Where to; by default stderr.
            clock: Seconds that only go up.
        """
        self._doing = doing
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._shown = self._terminal or wanted
        self._clock = clock
        self._began = clock()
        self._next = self._began + _FIRST_S
        self._width = 0

    def __call__(self, done: int, total: int) -> None:
        """Say that so many bytes of so many are done, if it is time to."""
        if not self._shown:
            return
        now = self._clock()
        if now < self._next:
            return
        self._next = now + (_EVERY_S if self._terminal else _EVERY_LINE_S)
        line = _line(self._doing, done, total, now - self._began)
        if self._terminal:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def end(self) -> None:
        """Take the line off the terminal."""
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0


def _line(doing: str, done: int, total: int, seconds: float) -> str:
    share = done / total if total else 1.0
    rate = done / seconds
    line = f"{doing}: {amount(done)} of {amount(total)}, {share:.0%}, {amount(rate)}/s"
    if done:
        left = round((total - done) / rate)
        line += f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
    return line
