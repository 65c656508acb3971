"""The figures of a session: what it has done so far.

Knows: their names and units.
Must not know: where they are counted.

Laws of this file:

* Figures are taken at one moment and change no more.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figures:
    """What a session has done so far.

    Attributes:
        seconds: Since it began.
        memory_bytes: Length of its regions together.
        faults: Page faults reported, duplicates included.
        copied_bytes: Installed because a thread waited for it, in bytes.
        filled_bytes: Installed ahead of demand, in bytes.
        zero_pages: Pages answered with zeros: holes and removed pages.
        removed_pages: Of these, pages that the target had freed before.
        failures: Faults that ended in the failure policy's last action.
        parked: Faults that had to wait because the address space was changing.
        events: Changes of the address space: removals, unmaps, moves, forks.
        p50_us: Median time from the message to the answer, in microseconds.
        p99_us: 99th percentile of the same.
        first_fault_s: Seconds from the beginning to the first fault; None before it.
        first_page_s: Seconds until the first page was served; None before it.
        resident_s: Seconds until every page was there; None before it.
    """

    seconds: float
    memory_bytes: int
    faults: int
    copied_bytes: int
    filled_bytes: int
    zero_pages: int
    removed_pages: int
    failures: int
    parked: int
    events: int
    p50_us: float
    p99_us: float
    first_fault_s: float | None
    first_page_s: float | None
    resident_s: float | None

    def as_dict(self) -> dict[str, int | float | None]:
        """Give all figures by name."""
        return dataclasses.asdict(self)
