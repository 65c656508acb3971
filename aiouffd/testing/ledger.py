"""What has been touched so far, with everybody's names.

Knows: touches as the helper writes them down; what regions, pages and threads are called.
Must not know: rules, or how a thread is held.

Laws of this file:

* A touch that was fetched stays: the helper may end, and what it had told before is known.
* A name outlives what it names: a closed region's, an ended thread's.  No two regions share one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from .places import Layout
from .record import Record
from .touches import Touch

if TYPE_CHECKING:
    from .region import Region


class Ledger:
    """The touches of one harness.

    Attributes:
        threads: Names by thread id; ``thread_names`` adds those that Python knows.
        dropped: Touches that the helper had no room for, as far as it was asked.

    Sharing: any thread.
    """

    def __init__(self, ask: Callable[..., Any]) -> None:
        """Begin with none.

        Args:
            ask: Asks the helper process.
        """
        self.threads: dict[int, str] = {}
        self.dropped = 0
        self._ask = ask
        self._regions: dict[int, Region] = {}  # by number, the closed ones too
        self._ended: list[Touch] = []  # as far as they were fetched
        self._fetching = threading.RLock()
        self._began_ns = time.monotonic_ns()

    def add_region(self, region: Region) -> None:
        """Know a region's name, and those of its pages."""
        self._regions[region.number] = region

    def has_region(self, name: str) -> bool:
        """Say whether a region has, or had, this name."""
        return any(region.name == name for region in list(self._regions.values()))

    # --- touches -----------------------------------------------------------------------

    def touch(self, fields: tuple[Any, ...]) -> Touch:
        """Make a touch of what the helper has told."""
        number, time_ns, process, thread, region, *rest = fields
        page, offset, access, call, pc, where, outcome, waited = rest
        known = self._regions.get(region)
        if process != os.getpid() and process in self.threads:  # a program: its threads are it
            self.threads.setdefault(thread, self.threads[process])
        return Touch.from_wire(
            (
                *(number, time_ns, process, thread, known.name if known else str(region)),
                *(page, offset, access, call, pc or None, where, outcome or "passed", waited),
            )
        )

    def fetch(self) -> list[Touch]:
        """Fetch touches that have ended since the last time; give those that have not.

        Raises:
            HarnessError: The helper has ended, and took the last ones along.
        """
        with self._fetching:
            standing = self.standing()  # first: who goes on meanwhile has ended then
            known = len(self._ended)
            more = True
            while more:
                ended, more, self.dropped = self._ask("touches", len(self._ended))
                self._ended += [self.touch(each) for each in ended]
            gone = {touch.number for touch in self._ended[known:]}
            return [touch for touch, _, _ in standing if touch.number not in gone]

    def standing(self) -> list[tuple[Touch, int, str]]:
        """Fetch touches that have not ended: each, its freeze's number, what holds it.

        Raises:
            HarnessError: The helper has ended.
        """
        found: list[tuple[Touch, int, str]] = []
        more = True
        while more:
            standing, more = self._ask("standing", found[-1][0].number if found else 0)
            found += [(self.touch(fields), rule, held_by) for fields, rule, held_by in standing]
        return found

    def touches(self, standing: Iterable[Touch]) -> list[Touch]:
        """Give what was fetched and what stands, in order of arrival."""
        with self._fetching:
            return sorted((*self._ended, *standing), key=lambda touch: touch.number)

    def record(self, touches: Iterable[Touch], *, every: bool = False) -> Record:
        """Make a record of some touches, with names."""
        return Record(
            touches,
            regions=[
                Layout(
                    region.name,
                    region.length // region.page_size,
                    region.page_size,
                    dict(region.page_names),
                )
                for region in self._regions.values()
            ],
            threads=self.thread_names(),
            began_ns=self._began_ns,
            every=every,
            dropped=self.dropped,
        )

    # --- names -------------------------------------------------------------------------

    def thread_names(self) -> dict[int, str]:
        """Give the names of threads by their number, those that have ended too."""
        for thread in threading.enumerate():
            if thread.native_id is not None:
                self.threads.setdefault(thread.native_id, thread.name)
        return dict(self.threads)

    def line(self, touch: Touch) -> str:
        """Say a touch in a line."""
        region = next((r for r in self._regions.values() if r.name == touch.region), None)
        return touch.describe(
            began_ns=self._began_ns,
            page_name=region.page_names.get(touch.page, "") if region else "",
            thread_name=self.thread_names().get(touch.thread, ""),
        )

    def name(self, thread: int) -> str:
        """Name a thread, with its number."""
        name = self.thread_names().get(thread, "")
        return f"{name} (tid {thread})" if name else f"tid {thread}"
