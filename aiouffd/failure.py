"""What happens to a fault that its handler could not answer: data, not code.

Knows: the choices.
Must not know: how they are carried out.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from .resolutions import Handler


class Action(enum.Enum):
    """The last answer to a fault, or to everything unresolved when a pager closes."""

    #: SIGBUS for who touches it (Linux 6.6): seen, and only there.  A write-protected page is
    #: present and cannot be poisoned: its writer goes on, and the pager fails with the error.
    POISON = "poison"
    KILL = "kill"  #: SIGKILL to the target, through its pidfd
    ZERO = "zero"  #: a page of zeros: silent data loss, for those who know it is not
    HANG = "hang"  #: nothing: the threads wait, until somebody else serves or kills them
    RAISE = "raise"  #: poison the page, then fail the whole pager with the error


@dataclass(frozen=True, slots=True, kw_only=True)
class FailurePolicy:
    """Retries with backoff, then a second handler, then one last action.

    The default ends in poison: a SIGBUS is seen, a zero page is believed.

    Attributes:
        retries: How often a handler that raised is asked again.
        backoff: Seconds before the first retry; each further one waits twice as long.
        backoff_max: The longest wait between retries, in seconds.
        fallback: A second handler, asked once when the first has failed for good.
        then: What to do when nothing answered, or the deadline has passed.
    """

    retries: int = 2
    backoff: float = 0.01
    backoff_max: float = 1.0
    fallback: Handler | None = None
    then: Action = Action.POISON

    def __post_init__(self) -> None:
        if self.retries < 0 or self.backoff < 0 or self.backoff_max < 0:
            raise ValueError("retries, backoff and backoff_max are not negative")

    def delay(self, attempt: int) -> float:
        """Give the seconds to wait before retry number ``attempt``, counted from 0."""
        return min(self.backoff * 2.0 ** min(attempt, 60), self.backoff_max)
