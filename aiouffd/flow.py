"""Flow: how much may be asked for ahead without holding up who asks next.

Knows: when answers were asked for and came, and how long they are.
Must not know: whose answers, what for.

Bytes that are on their way stand before what is demanded next.  On a fast link a megabyte is
nothing, on a slow one it is half a second.  So it is not bytes that are bounded but the time that
they take: as many as come within ``DELAY``, and as many more as fill the link meanwhile (its
bandwidth times its shortest round trip), which costs nobody anything.  TCP Vegas finds its window
by the same thought (Brakmo, O'Malley and Peterson, SIGCOMM 1994).
"""

from __future__ import annotations

from typing import Final

DELAY: Final = 0.004  #: seconds that demand may wait behind what was asked for ahead of it
_FORGETS: Final = 0.875  # what is left of older answers with each new one


class Flow:
    """What one source gives, measured by the reads that it answers.

    Sharing: none.
    """

    __slots__ = ("_bytes", "_last", "_least", "_seconds")

    def __init__(self) -> None:
        self._bytes = self._seconds = 0.0
        self._last = 0.0
        self._least = float("inf")

    def note(self, length: int, began: float, ended: float) -> None:
        """Take note of an answer.

        Args:
            length: In bytes.
            began: When it was asked for, in seconds of any clock.
            ended: When it had come, by the same clock.
        """
        busy = max(ended - max(began, self._last), 0.0)  # beside the one before it, or behind it
        self._bytes = self._bytes * _FORGETS + length
        self._seconds = self._seconds * _FORGETS + busy
        self._least = min(self._least, ended - began)
        self._last = max(self._last, ended)

    @property
    def rate(self) -> float:
        """What comes by now, in bytes per second; 0 as long as nothing has come."""
        return self._bytes / max(self._seconds, 1e-9)

    @property
    def step(self) -> int:
        """Bytes that may be asked for at once, or stand there ready: what comes in a moment."""
        return int(self.rate * DELAY / 2)

    @property
    def window(self) -> int:
        """Bytes on their way from which on nothing more is asked for."""
        return int(self.rate * (DELAY + self._least)) if self._bytes else 0
