"""How it can stand with a session, and what it tells while it goes on.

Knows: which state may follow on which.
Must not know: what leads from one to the other.

Laws of this file:

* Nothing follows on a state in which a session has ended.
"""

from __future__ import annotations

import enum
from typing import Final


class State(enum.Enum):
    """How it stands with a session."""

    HANDSHAKING = "handshaking"  #: nothing is served yet
    SERVING = "serving"
    RESIDENT = "resident"  #: served still, but every page of the target is there
    DETACHED = "detached"  #: ended: the target has all of its memory and lives on without us
    TARGET_GONE = "target gone"  #: ended with the target and the children it had forked
    FAILED = "failed"  #: ended before the target: refused, closed by policy, or broken

    @property
    def ended(self) -> bool:
        """Whether nothing follows any more."""
        return not AFTER[self]


AFTER: Final = {
    State.HANDSHAKING: {State.SERVING, State.TARGET_GONE, State.FAILED},
    State.SERVING: {State.RESIDENT, State.DETACHED, State.TARGET_GONE, State.FAILED},
    State.RESIDENT: {State.DETACHED, State.TARGET_GONE, State.FAILED},
    State.DETACHED: set[State](),
    State.TARGET_GONE: set[State](),
    State.FAILED: set[State](),
}


HOW_IT_ENDED: Final = {State.DETACHED: "detached", State.TARGET_GONE: "target exited"}


class Milestone(enum.Enum):
    """What a session tells while it goes on, each once at most."""

    FIRST_PAGE = "first page"  #: a thread that waited has its page
    RESIDENT = "resident"  #: every page of the target is there
    DETACHED = "detached"  #: the target lives on without us
