"""Ahead: what will be chosen, for whoever makes the moves and cannot ask about each.

Knows: names (or numbers) of participants, who of them went last.
Must not know: strategies, threads, why it is this order.

The choices are made in one process and the moves in another; a question for every move would
cost more than the move.  Most choices are known before: the beginning of an order that is
repeated, and after it whoever can go on.

Law of this file: what is not certain is not in it.  Where somebody might turn out to spin the
plan ends, and the strategy is asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final, Generic, TypeVar

Who = TypeVar("Who", str, int)

#: Reads of what was read before, one after another, that make a spinner.
SPINS: Final = 16
#: Moves in one plan: each is told only when the plan is over.
MOST: Final = 256


@dataclass(slots=True)
class Ahead(Generic[Who]):
    """A plan.

    Attributes:
        first: Who goes on in turn, whatever happens.
        ranks: After that: the first of these that can.
        stay: After that, and before ranks: whoever went last, if it can.
        most: Moves in all.
        current: Who went last before the plan.
        streak: An upper bound of its reads of what it had read before.
    """

    first: list[Who]
    ranks: list[Who] = field(default_factory=list)
    stay: bool = True
    most: int = MOST
    current: Who | None = None
    streak: int = 0

    def next(self, enabled: Collection[Who]) -> Who | None:
        """Name who goes on, and count on that; None if the plan is over.

        Args:
            enabled: Who can go on.
        """
        who: Who | None
        certain = bool(self.first)
        if certain:
            who = self.first.pop(0)
        elif self.stay and self.current in enabled:
            who = self.current
        else:
            who = next((each for each in self.ranks if each in enabled), None)
        if who is None or who not in enabled or self.most <= 0:
            return None
        self.streak = self.streak + 1 if who == self.current else 0
        if self.streak > SPINS and not certain:
            return None
        self.most -= 1
        self.current = who
        return who

    def renamed(self, name: Callable[[Who], Any]) -> Ahead[Any]:
        """Give the plan for participants of other names."""

        def named(each: Iterable[Who]) -> list[Any]:
            return [name(who) for who in each]

        current = None if self.current is None else name(self.current)
        return replace(self, first=named(self.first), ranks=named(self.ranks), current=current)

    def to_wire(self) -> tuple[Any, ...]:
        """Give it as a tuple that the constructor takes."""
        return (self.first, self.ranks, self.stay, self.most, self.current, self.streak)
