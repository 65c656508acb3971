"""Lines for people and programs, written by a thread of their own.

Knows: a stream, and readers of it that are slow or gone.
Must not know: what the lines say.

Law of this file: output never holds up serving.  A reader that is slow loses lines, and is told
how many; one that goes away ends the output, not the server.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from types import TracebackType
from typing import Final, Self, TextIO


class Lines:
    """Writes lines to a stream, in a thread of its own.

    Sharing: any thread puts.
    """

    _LIMIT: Final = 10_000  # lines that wait for a slow reader
    _PATIENCE_S: Final = 5.0  # for the rest, at the end

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._lost = 0
        self._thread = threading.Thread(target=self._write, daemon=True, name="aiouffd output")

    def put(self, line: str, *, end: str = "\n") -> None:
        """Write one line soon; never waits.

        Args:
            line: Without its end.
            end: Written behind it.
        """
        if self._lines.qsize() < self._LIMIT:
            self._lines.put(line + end)
        else:
            self._lost += 1

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._stream.write(line)
                self._stream.flush()
            except (OSError, ValueError):
                break  # nobody reads any more

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lost:
            self._lines.put(f"{self._lost} lines were lost: nobody read them in time\n")
        self._lines.put(None)
        self._thread.join(self._PATIENCE_S)
        try:
            self._stream.flush()
        except OSError:  # what is left in the buffer must not fail at the interpreter's exit
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)


class LinesHandler(logging.Handler):
    """Hands log records to a Lines."""

    def __init__(self, lines: Lines) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.put(self.format(record))
