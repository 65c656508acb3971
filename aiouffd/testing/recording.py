"""A recording: what is touched between two moments, as a record.

Knows: when it began and ended, and what has to be armed for it.
Must not know: how a record is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast, overload

from .record import Record
from .rules import Kind
from .touches import Touch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .arming import Armed
    from .harness import Harness
    from .region import Region


class Recording(Record):
    """The record of what is touched from ``with`` to its end.

    Within the block it grows: whatever is asked of it, it first fetches what has been touched
    until then.

    Sharing: one thread.
    """

    def __init__(self, harness: Harness, regions: Sequence[Region], *, every: bool) -> None:
        """Prepare; use ``Harness.record``."""
        self._harness = harness
        self._recorded = tuple(regions)
        self._after = -1
        self._dropped_before = 0
        self._running = False
        self._armed: list[Armed] = []
        super().__init__(every=every)

    def __enter__(self) -> Self:
        if self._after >= 0:
            raise RuntimeError("a recording is used once: ask the harness for another")
        regions = self._recorded or tuple(self._harness.regions)
        self._recorded = regions
        self._harness.touches()  # which tells how many were dropped before
        self._dropped_before = self._harness.ledger.dropped
        self._after = self._harness.touch_count()
        for region in regions:
            if self.every:
                self._armed.append(self._harness.arm(Kind.WATCH, region.all, every=True))
            else:
                region.rearm()
        self._running = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for armed in self._armed:
            armed.disarm()
        if not self._harness.closed:
            self._fetch()
        self._running = False

    def _fetch(self) -> None:
        if not self._running:
            return
        names = {region.name for region in self._recorded}
        touches = self._harness.touches()
        known = self._harness.ledger.record(())
        self.dropped = known.dropped - self._dropped_before
        for layout in known.regions:
            if layout.name in names:
                self.add_region(layout)
        for touch in touches:
            if touch.number > self._after and touch.region in names:
                self.add(touch)
        for thread, name in known.thread_names.items():
            self.name_thread(thread, name)

    def _with(self, touches: Iterable[Touch], openers: Iterable[Touch]) -> Self:
        picked: Any = Record(  # which no longer grows
            touches,
            regions=self.regions,
            threads=self.thread_names,
            began_ns=self.began_ns,
            every=self.every,
            openers=openers,
            dropped=self.dropped,
        )
        return cast("Self", picked)

    def __len__(self) -> int:
        self._fetch()
        return super().__len__()

    @overload
    def __getitem__(self, at: int) -> Touch: ...

    @overload
    def __getitem__(self, at: slice) -> Self: ...

    def __getitem__(self, at: int | slice) -> Touch | Self:
        self._fetch()
        return super().__getitem__(at)

    def __iter__(self) -> Iterator[Touch]:
        self._fetch()
        return super().__iter__()
