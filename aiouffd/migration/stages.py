"""The stages of a migration, on either side, and what a failure means in each.

Knows: names.
Must not know: how one gets from one to the next.
"""

from __future__ import annotations

import enum


class Stage(enum.Enum):
    """How far a migration has come."""

    OFFERED = "offered"  #: nothing was copied yet
    COPYING = "copying"  #: the program runs at the source, its memory is copied
    SWITCHING = "switching"  #: it runs nowhere
    FOLLOWING = "following"  #: it runs at the destination, the rest of its memory follows
    DONE = "done"  #: all is there
    CANCELLED = "cancelled"  #: it runs on at the source
    FAILED = "failed"  #: see the error

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to come."""
        return self in {Stage.DONE, Stage.CANCELLED, Stage.FAILED}
