"""Diagnostics of a command that serves: log records as lines of text or JSON objects.

Knows: log records, which session they are about.
Must not know: who logs.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Any, Final

from ..session import current_session
from .output import Lines, LinesHandler

LEVELS: Final = ("debug", "info", "warning", "error")


class JsonFormatter(logging.Formatter):
    """Writes a record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Give the line."""
        fields: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        session = current_session.get()
        if session is not None:
            fields["session"] = session.id
            if session.peer is not None:
                fields |= {"pid": session.peer.pid, "uid": session.peer.uid}
        error = _error_of(record)
        if error is not None:
            fields["error"] = type(error).__name__
        if record.exc_info and record.exc_info[1] is not None:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def _error_of(record: logging.LogRecord) -> BaseException | None:
    """Give the error that a record is about: the one it names, else the one it was made in."""
    arguments = record.args if isinstance(record.args, tuple) else ()
    named = next((one for one in arguments if isinstance(one, BaseException)), None)
    if named is None and record.exc_info:
        return record.exc_info[1]
    return named


@contextlib.contextmanager
def logging_to(lines: Lines, *, as_json: bool, level: str) -> Iterator[None]:
    """Write what aiouffd logs to some lines, as long as the block runs."""
    handler = LinesHandler(lines)
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter("aiouffd: %(message)s"))
    logger = logging.getLogger("aiouffd")
    before = logger.level
    logger.setLevel(level.upper())
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
