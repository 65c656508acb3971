"""Ranges of lazy memory that must stay for now.

Knows: who has pinned what.
Must not know: how pages are evicted.

Laws of this file:

* Pinning and evicting exclude each other, from any thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Final, Self

from .ranges import align_down, align_up


class Pins:
    """Ranges by who has pinned them; several may overlap.

    Sharing: any thread.
    """

    def __init__(self) -> None:
        self._pins: dict[object, tuple[int, int]] = {}
        # Reentrant: a garbage collection may run any destructor, and that may evict.
        self._lock: Final = threading.RLock()

    def add(self, who: object, start: int, end: int) -> None:
        """Pin a range, replacing what ``who`` has pinned before."""
        with self._lock:
            self._pins[who] = start, end

    def remove(self, who: object) -> None:
        """Let go of what ``who`` has pinned, if anything."""
        with self._lock:
            self._pins.pop(who, None)

    def __len__(self) -> int:
        return len(self._pins)

    @contextlib.contextmanager
    def held(self) -> Iterator[Self]:
        """Keep others from pinning while pages are evicted."""
        with self._lock:
            yield self

    def unpinned(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Give the runs of a range that nobody has pinned, in whole pages."""
        for some in sorted(self._pins.values()):
            first, last = align_down(some[0]), align_up(some[1])
            if last <= start or end <= first:
                continue
            if start < first:
                yield start, first
            start = max(start, last)
        if start < end:
            yield start, end
