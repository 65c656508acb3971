"""What a harness raises.

Knows: names, and which of them mean that the test has failed.
Must not know: how it came to that.
"""

from __future__ import annotations

from ..errors import UffdError


class HarnessError(UffdError):
    """The harness could not do what the test asked for, or had to end a wait by itself.

    A thread that nobody released within the time limit is one of these; so is a helper process
    that has ended.
    """


class FreezeTimeout(UffdError, AssertionError):
    """Nobody touched what was to be frozen within the time; the text says who did what instead."""
