"""What a test needs of this machine, and the sentence that says it is missing.

Knows: which capability each name stands for; whom to ask.
Must not know: pytest, the harness; what is missing is a sentence, or nothing is.

Laws of this file:

* What was tried here and now decides; nothing is guessed from versions or user ids.
* A sentence says what is missing and how to get it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ..kernel.capabilities import NAMES, canonical

if TYPE_CHECKING:
    from ..kernel.probe import Report


@functools.cache
def _report() -> Report:
    from ..kernel.probe import probe

    return probe()


def _capability(name: str) -> str | None:
    capability = _report()[name]
    if capability.available:
        return None
    return f"{capability.name} is missing here ({capability.how}).  {capability.remedy}"


def _trace() -> str | None:
    from ..kernel.tracing import can_trace

    why_not = can_trace()
    return why_not and f"no process can be traced here: {why_not}"


#: What has a name of its own here; every other need is a capability as ``aiouffd info`` lists it.
NEEDS: Final[dict[str, tuple[str, Callable[[], str | None]]]] = {
    "kernel-mode": (
        "accesses by system calls are stopped too, not only those by programs",
        lambda: _capability("kernel-faults"),
    ),
    "fork": ("children that are forked keep the region", lambda: _capability("event-fork")),
    "trace": ("threads can be made to go on by one instruction", _trace),
    "hugetlb": (
        "huge pages",
        lambda: _capability("missing-hugetlbfs") or _capability("hugetlb"),
    ),
}


def is_known(name: str) -> bool:
    """Say whether there is such a need."""
    return name in NEEDS or canonical(name) is not None


def known() -> str:
    """List what may be needed."""
    others = ", ".join(name for name in NAMES if name not in NEEDS)
    return f"{', '.join(NEEDS)}; and what `aiouffd info` lists: {others}"


def missing(name: str) -> str | None:
    """Find out whether something is missing.

    Takes a few milliseconds the first time.

    Args:
        name: One for which ``is_known`` says yes.

    Returns:
        None if it is there, else what is missing and what would help.

    Raises:
        NotSupported: This is not Linux.
    """
    if name in NEEDS:
        return NEEDS[name][1]()
    return _capability(name)
