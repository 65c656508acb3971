"""Rules that hold for a while.

Knows: how a rule is ended.
Must not know: what it does.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from .harness import Harness
    from .rules import Rule


class Armed:
    """A rule that holds until it is disarmed, or to the end of its ``with`` block.

    Attributes:
        rule: What it says.
    """

    def __init__(self, harness: Harness, rule: Rule) -> None:
        """Made by the harness."""
        self._harness = harness
        self.rule = rule
        self._armed = True

    def disarm(self) -> None:
        """End it; a second call does nothing."""
        if self._armed:
            self._armed = False
            self._harness.disarm(self.rule.number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.disarm()
