"""Schedules: in which order two or more threads make their touches, and one run in such an order.

Knows: participants by their names, what each stands before, which of them were let go in turn.
Must not know: threads, memory, any system call; how the next one is chosen (``strategies``).

Laws of this file:

* Between two choices exactly one participant goes on.  All others stand before a touch (or before
  their start), are blocked on something that only another one can give, or have ended.
* A *move* of a participant makes the touch that it stands before, and everything after it up to
  its next touch, its end, or where it blocks.  The move of one that has not been started goes to
  its first touch and makes none: what it takes on the way there (a lock) counts as well.
* An order says how many touches each one makes, not how many moves; the start is never counted.
* The same program in the same order goes the same way, or somebody is told: nothing is skipped.

Steps of an order, each a pair of a participant's name and how far it goes:

* a number: so many touches (0: it is started, and stands before its first);
* ``END``: until it has ended, or has to wait for another;
* ``Before(...)``: until it stands before a touch like this.

After the last step the rest run to their end, each as long as it can, in the order of their names
in the program.  An order that ends with ``END`` for everyone says the same aloud.

A participant that *spins* (reads only what it has read already, from the same instructions, while
nobody else moves) waits for another as well, with its eyes open.  It can be chosen; but leaving it
is no preemption.  CHESS asks programs to yield there; C code that polls memory does not.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from ..errors import UffdError
from .ahead import SPINS, Ahead
from .touches import Access, Touch

if TYPE_CHECKING:
    from .strategies import Strategy

END: Final = "end"  #: as far as it can: the participant has ended, or waits for another
MOVES: Final = 10_000  #: moves in one run from which on it is taken to have no end


class CannotFollow(UffdError):
    """The participants did not let this order happen.

    Attributes:
        step: Which step of the order, counted from 0.
        possible: Who could have gone on there.
    """

    def __init__(self, message: str, step: int, possible: Sequence[str]) -> None:
        super().__init__(message)
        self.step = step
        self.possible = tuple(possible)


class NotDeterministic(UffdError):
    """The same order went another way than before, so that orders cannot be gone through."""


class Deadlock(AssertionError):
    """Nobody can go on, and not everybody has ended.

    Attributes:
        blocked: What each of them waits for, as far as it can be seen.
    """

    def __init__(self, blocked: Mapping[str, str]) -> None:
        self.blocked = dict(blocked)
        waits = " and ".join(
            f"{name} is blocked{note and f' ({note})'}" for name, note in blocked.items()
        )
        super().__init__(f"deadlock: {waits}, and nobody else is left to go on")


class Endless(AssertionError):
    """A run has no end that could be seen: somebody waits in a loop for what nobody does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """A place to stand before: a touch of these bytes, in this way.

    Attributes:
        region: The region's name; None for any.
        offset: Where the bytes begin in it.
        length: In bytes; None for all from there on.
        access: "read", "write" or "any".
    """

    region: str | None = None
    offset: int = 0
    length: int | None = None
    access: str = "any"

    def matches(self, touch: Touch) -> bool:
        """Tell whether this is such a touch."""
        return (
            self.region in (None, touch.region)
            and self.offset <= touch.offset
            and (self.length is None or touch.offset < self.offset + self.length)
            and self.access in ("any", touch.access)
        )

    def __str__(self) -> str:
        what = "any touch" if self.access == "any" else f"a {self.access}"
        last = "" if self.length is None else f"..{self.offset + self.length:#x}"
        return f"{what} of {self.region or 'any region'}+{self.offset:#x}{last}"


Step: TypeAlias = tuple[str, int | Literal["end"] | Before]
Order: TypeAlias = Sequence[Step]
_Place: TypeAlias = tuple[str, int, str, int | None]


class Where(enum.Enum):
    """Where a participant is, of all the places that matter."""

    UNSTARTED = "not started"
    TOUCH = "before a touch"
    BLOCKED = "blocked"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Position:
    """Where a participant is.

    Attributes:
        kind: Before its start or a touch; blocked; ended.
        touch: The touch that it stands before.
        note: What it is blocked on, or how it ended, for readers.
    """

    kind: Where
    touch: Touch | None = None
    note: str = ""

    def __str__(self) -> str:
        if self.touch is not None:
            return f"stands before its {described(self.touch)}"
        words = "is blocked" if self.kind is Where.BLOCKED else f"has {self.kind.value}"
        if self.kind is Where.UNSTARTED:
            words = "is not started"
        return f"{words} ({self.note})" if self.note else words


UNSTARTED: Final = Position(Where.UNSTARTED)
ENDED: Final = Position(Where.ENDED)


def _place(touch: Touch) -> _Place | None:
    """Name what is read and from where; nothing for a write."""
    if touch.access is not Access.READ:
        return None
    return (touch.region, touch.offset, touch.where, touch.pc)


def described(touch: Touch) -> str:
    """Say a touch without what differs from run to run: no time, no thread id."""
    where = f" at {touch.where}" if touch.where else ""
    return f"{touch.access.value} of {touch.region}+{touch.offset:#x}{where}"


@dataclass(slots=True)
class Move:
    """What one choice let happen.

    Attributes:
        name: Who was let go on.
        before: Where it stood; its touch is the one that this move made.
        spinning: Whether it was taken to wait in a loop.
        after: Where it came to; None while it is on its way.
    """

    name: str
    before: Position
    spinning: bool = False
    after: Position | None = None


class Course:
    """One run of all participants, from the start of each to the end of all.

    The caller lets go on whom ``choose`` names, and says by ``came`` where everybody came to: the
    one that it let go, and those that were blocked and are not any more.

    Args:
        names: The participants.
        strategy: Who chooses.
        moves: So many are let happen before the run is called endless.

    Sharing: one thread.
    """

    def __init__(self, names: Iterable[str], strategy: Strategy, *, moves: int = MOVES) -> None:
        self.positions: dict[str, Position] = dict.fromkeys(names, UNSTARTED)
        self.current: str | None = None
        self.moves: list[Move] = []
        self._strategy = strategy
        self._longest = moves
        self._seen: set[_Place] = set()  # read by the current one since the turn is its own
        self._again = 0  # reads of those, one after another

    @property
    def enabled(self) -> tuple[str, ...]:
        """Who can go on."""
        can = (Where.UNSTARTED, Where.TOUCH)
        return tuple(name for name, position in self.positions.items() if position.kind in can)

    @property
    def spinning(self) -> str | None:
        """Who waits in a loop: the last that was let go, or nobody."""
        if self.current is None or self._again < SPINS:
            return None
        touch = self.positions[self.current].touch
        return self.current if touch is not None and _place(touch) in self._seen else None

    @property
    def free(self) -> tuple[str, ...]:
        """Who can go on without a preemption: the current one, or all if it cannot or spins."""
        enabled = self.enabled
        if self.current in enabled and self.spinning is None:
            return (self.current,)
        return tuple(name for name in enabled if name != self.spinning) or enabled

    def choose(self) -> str | None:
        """Name who goes on next; None once all have ended.

        Raises:
            Deadlock: Nobody can.
            Endless: There were as many moves as there may be.
            CannotFollow, NotDeterministic: From the strategy.
        """
        if not self.enabled:
            blocked = {
                name: position.note
                for name, position in self.positions.items()
                if position.kind is Where.BLOCKED
            }
            if blocked:
                raise Deadlock(blocked)
            return None
        if len(self.moves) >= self._longest:
            last = self.moves[-1]
            raise Endless(
                f"no end after {self._longest} moves; {last.name} went last and {last.after}"
                + (", which it has read again and again" if self.spinning else "")
            )
        name = self._strategy.choose(self.enabled, self)
        position = self.positions[name]
        self.moves.append(Move(name, position, self.spinning == name))
        self._note_reads(name, position.touch)
        self.current = name
        return name

    def _note_reads(self, name: str, touch: Touch | None) -> None:
        place = None if touch is None else _place(touch)
        if name != self.current:
            self._seen.clear()
        self._again = self._again + 1 if place in self._seen else 0
        if place is not None:
            self._seen.add(place)

    def ahead(self) -> Ahead[str]:
        """Give what the next choices will be, as far as that is certain; it may be nothing."""
        plan = self._strategy.ahead(self)
        plan.most = min(plan.most, self._longest - len(self.moves))
        plan.current = self.current
        plan.streak = self._again
        return plan

    def came(self, name: str, position: Position) -> None:
        """Say where a participant came to: the one let go, or one that is not blocked any more."""
        self.positions[name] = position
        if self.moves and name == self.current and self.moves[-1].after is None:
            self.moves[-1].after = position

    def __str__(self) -> str:
        return "; ".join(f"{name} {position}" for name, position in self.positions.items())


def runs_of(moves: Iterable[Move]) -> list[tuple[Step, Move]]:
    """Put what happened into steps that let it happen again, each with its last move.

    ``END`` stands for a number where the participant went on to its end and waited for nobody.
    """
    runs: list[tuple[Step, Move]] = []
    last: Move | None = None
    touches = 0
    straight = True  # END would not have stopped before
    for move in moves:
        if last is not None and move.name == last.name:
            runs.pop()
            straight = straight and not move.spinning and not _is(last, Where.BLOCKED)
        else:
            touches = 0
            straight = not move.spinning
        touches += move.before.kind is Where.TOUCH
        runs.append(((move.name, END if straight and _is(move, Where.ENDED) else touches), move))
        last = move
    return runs


def _is(move: Move, kind: Where) -> bool:
    return move.after is not None and move.after.kind is kind


def order_of(moves: Iterable[Move]) -> list[Step]:
    """Put what happened into an order that lets it happen again."""
    return [step for step, _ in runs_of(moves)]


def checked(order: Iterable[object], names: Iterable[str]) -> list[Step]:
    """Return the order if it is one for these participants.

    Raises:
        ValueError: It is not; the text says at which step and why.
    """
    known = list(names)
    begun: set[str] = set()
    steps: list[Step] = []
    for number, step in enumerate(order, 1):
        wrong = f"step {number} of the order, {step!r},"
        if not isinstance(step, tuple) or len(step) != 2:
            raise ValueError(f"{wrong} is no pair of a participant's name and how far it goes")
        name, until = step
        if name not in known:
            raise ValueError(f"{wrong} names nobody: there are {', '.join(map(repr, known))}")
        if isinstance(until, bool) or not (until == END or isinstance(until, int | Before)):
            raise ValueError(f"{wrong} does not say how far: a number of touches, END, or a Before")
        if isinstance(until, int) and until < (name in begun):
            raise ValueError(
                f"{wrong} lets nothing happen: {name} is started already"
                if until == 0
                else f"{wrong} asks for fewer touches than none"
            )
        begun.add(name)
        steps.append((name, until))
    return steps
