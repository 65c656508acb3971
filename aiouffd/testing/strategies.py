"""Strategies: who goes on next, in this run and over many.

Knows: a course (who can go on, who went before), orders, random numbers from a seed.
Must not know: threads, memory, any system call; what a run is good for.

Laws of this file:

* ``Systematic`` goes through every order within its bound exactly once, those with fewer
  preemptions first: most races need one or two (Musuvathi and Qadeer, *Iterative context bounding
  for systematic testing of multithreaded programs*, PLDI 2007).
* Where a prefix is repeated, the same participants must be able to go on, and each of them must
  stand before the same access of the same byte: else it says so.
* ``Seeded`` depends on nothing but its seed and the course.  It chooses by priorities that change
  at few random moments, which finds a race of depth d among k moves of n threads with probability
  of at least 1/(n k^(d-1)) in each run (Burckhardt, Kothari, Musuvathi and Nagarakatte, *A
  randomized scheduler with probabilistic guarantees of finding bugs*, ASPLOS 2010).
* No order is left out because another "does the same".  Touches of different bytes commute, but a
  move is all that its thread does up to the next one: locks, files, memory that nobody watches.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from .ahead import MOST, Ahead
from .schedules import (
    END,
    Before,
    CannotFollow,
    Course,
    NotDeterministic,
    Position,
    Step,
    Where,
    checked,
    order_of,
)


class Strategy(Protocol):
    """Who chooses, in one run after another."""

    def begin(self) -> None:
        """Make ready for a run."""

    def choose(self, enabled: Sequence[str], course: Course) -> str:
        """Name one of those that can go on."""
        ...

    def ahead(self, course: Course) -> Ahead[str]:
        """Tell what will be chosen as long as nothing unforeseen happens; changes nothing."""
        ...

    def end(self, course: Course) -> bool:
        """Take note that a run is over; tell whether there is another to make."""
        ...


#: The access, the region and the offset that somebody stands before; None before its start.
_Pending: TypeAlias = tuple[str, str, int] | None


@dataclass(slots=True)
class _Past:
    """What one run chose, from whom, and before what each of those stood."""

    choices: list[str] = field(default_factory=list)
    enabled: list[Sequence[str]] = field(default_factory=list)
    standing: list[tuple[_Pending, ...]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Branch:
    """A run to make: as another one up to a point, and there another choice."""

    past: _Past
    at: int
    choice: str


class Systematic:
    """Every order with at most so many preemptions, each once, fewest preemptions first.

    A preemption takes the turn from a participant that could go on and does not spin.

    Args:
        preemptions: At most so many in one order; None for every order there is.

    Attributes:
        preemptions: How many the orders have that are being gone through.
        cut: Whether orders beyond the bound are known to exist.
    """

    def __init__(self, preemptions: int | None = 2) -> None:
        self.preemptions = 0
        self.cut = False
        self._bound = preemptions
        self._now: list[_Branch] = []  # as many preemptions as in this run; the last one first
        self._next: list[_Branch] = []  # one more
        self._branch: _Branch | None = None
        self._run = _Past()

    def begin(self) -> None:
        """Take up the next branch."""
        self._branch = self._now.pop() if self._now else None
        self._run = _Past()

    def choose(self, enabled: Sequence[str], course: Course) -> str:
        """Follow the branch; beyond it go on without a preemption, and note what else there is.

        Raises:
            NotDeterministic: Others can go on than when the branch was noted, or before another
                access.
        """
        at = len(self._run.choices)
        standing = tuple(_pending(course.positions[name]) for name in enabled)
        branch = self._branch
        if branch is not None and at <= branch.at:
            recorded = branch.past.enabled[at]
            if recorded != enabled:
                raise _changed(recorded, enabled, course)
            if branch.past.standing[at] != standing:
                raise _moved(enabled, branch.past.standing[at], standing, course)
            choice = branch.choice if at == branch.at else branch.past.choices[at]
        else:
            free = course.free
            choice = free[0]
            self._note_others(at, [name for name in enabled if name != choice], free)
        self._run.choices.append(choice)
        self._run.enabled.append(enabled)
        self._run.standing.append(standing)
        return choice

    def ahead(self, course: Course) -> Ahead[str]:
        """Tell the rest of the branch, and that then everybody goes on as long as it can."""
        at, branch = len(self._run.choices), self._branch
        rest: list[str] = []
        if branch is not None and at <= branch.at:
            rest = [*branch.past.choices[at : branch.at], branch.choice]
        return Ahead(rest, list(course.positions))

    def _note_others(self, at: int, others: list[str], free: Sequence[str]) -> None:
        for other in reversed(others):
            branch = _Branch(self._run, at, other)
            if other in free:
                self._now.append(branch)
            elif self._bound is None or self.preemptions < self._bound:
                self._next.append(branch)
            else:
                self.cut = True

    def end(self, course: Course) -> bool:
        """Tell whether an order is left.

        Raises:
            NotDeterministic: All had ended before the branch came to its end.
        """
        at = len(self._run.choices)
        if self._branch is not None and at <= self._branch.at:
            raise _changed(self._branch.past.enabled[at], (), course)
        if not self._now and self._next:
            self._now, self._next = self._next[::-1], []
            self.preemptions += 1
        return bool(self._now)


def _pending(position: Position) -> _Pending:
    touch = position.touch
    return None if touch is None else (touch.access.value, touch.region, touch.offset)


def _before(pending: _Pending) -> str:
    return "its start" if pending is None else "its {} of {}+{:#x}".format(*pending)


def _changed(before: Sequence[str], now: Sequence[str], course: Course) -> NotDeterministic:
    return _otherwise(
        f"{_these(before)} could go on in an earlier run, and now {_these(now)}", course
    )


def _moved(
    names: Sequence[str],
    before: Sequence[_Pending],
    now: Sequence[_Pending],
    course: Course,
) -> NotDeterministic:
    name, was, is_ = next(
        each for each in zip(names, before, now, strict=True) if each[1] != each[2]
    )
    return _otherwise(
        f"{name} stood before {_before(was)} in an earlier run, and now before {_before(is_)}",
        course,
    )


def _otherwise(what: str, course: Course) -> NotDeterministic:
    went = ", ".join(f"{name} {until}" for name, until in order_of(course.moves)) or "nothing"
    return NotDeterministic(
        f"after the same beginning ({went}) {what}: {course}."
        " Something is not as it was: what reset() does not put back, what depends on time or on"
        " chance, or a lock whose waiters are woken in no fixed order"
    )


class Seeded:
    """Random orders that come again with the same seed.

    Each run gives the participants priorities, and lets the highest go on that can; at so many
    random moments the one whose turn it is falls to the lowest.

    Args:
        names: The participants.
        seed: Any number.
        preemptions: How many moments there are in a run.
    """

    def __init__(self, names: Iterable[str], seed: int, preemptions: int = 2) -> None:
        self._names = list(names)
        self._random = random.Random(seed)  # noqa: S311  # no secret
        self._preemptions = preemptions
        self._longest = len(self._names)  # moves of the longest run so far
        self._ranks: list[str] = []
        self._moments: set[int] = set()

    def begin(self) -> None:
        """Draw priorities and moments."""
        self._ranks = self._random.sample(self._names, len(self._names))
        moments = range(1, max(self._longest, self._preemptions + 1))
        self._moments = set(self._random.sample(moments, self._preemptions))

    def choose(self, enabled: Sequence[str], course: Course) -> str:
        """Name the highest; first lower the one whose turn it is if its moment has come."""
        self._ranks = self._ranks_now(course)
        return next(name for name in self._ranks if name in enabled)

    def _ranks_now(self, course: Course) -> list[str]:
        falls = course.current
        if falls is None or not (len(course.moves) in self._moments or course.spinning):
            return self._ranks
        return [*(name for name in self._ranks if name != falls), falls]

    def ahead(self, course: Course) -> Ahead[str]:
        """Tell the ranks, and that they hold until the next moment."""
        made = len(course.moves)
        most = min((each - made for each in self._moments if each > made), default=MOST)
        return Ahead([], self._ranks_now(course), stay=False, most=most)

    def end(self, course: Course) -> bool:
        """Tell that there is always another."""
        self._longest = max(self._longest, len(course.moves))
        return True


class Fixed:
    """One order, as it was given.

    Args:
        order: Steps, as ``schedules`` describes them.
        names: The participants.

    Raises:
        ValueError: The order is none.
    """

    def __init__(self, order: Iterable[object], names: Iterable[str]) -> None:
        self._order = checked(order, names)
        self._at = 0
        self._made = 0  # touches made in this step

    def begin(self) -> None:
        """Go back to the first step."""
        self._at = self._made = 0

    def choose(self, enabled: Sequence[str], course: Course) -> str:
        """Name whose step it is; after the last step whoever went last, or the first that can.

        Raises:
            CannotFollow: The step cannot be made.
        """
        step = self._next_step(course)
        if step is None:
            return course.free[0]
        name, _ = step
        position = course.positions[name]
        if name not in enabled:
            raise self._cannot(step, position, enabled, course)
        self._made += position.kind is Where.TOUCH
        return name

    def ahead(self, course: Course) -> Ahead[str]:
        """Tell the rest of the step."""
        step = self._next_step(course)
        if step is None:
            return Ahead([], list(course.positions))
        name, until = step
        if isinstance(until, int):
            unstarted = course.positions[name].kind is Where.UNSTARTED
            return Ahead([name] * (until - self._made + unstarted), [], stay=False)
        return Ahead([name], [], stay=until == END)

    def end(self, course: Course) -> bool:
        """Tell that this is the only order.

        Raises:
            CannotFollow: All have ended, and steps are left.
        """
        step = self._next_step(course)
        if step is not None:
            raise self._cannot(step, course.positions[step[0]], (), course)
        return False

    def _next_step(self, course: Course) -> Step | None:
        while self._at < len(self._order):
            step = self._order[self._at]
            if not self._is_done(step, course):
                return step
            self._at += 1
            self._made = 0
        return None

    def _is_done(self, step: Step, course: Course) -> bool:
        name, until = step
        position = course.positions[name]
        if isinstance(until, Before):
            return position.touch is not None and until.matches(position.touch)
        if isinstance(until, int):
            return self._made == until and position.kind is not Where.UNSTARTED
        return position.kind in (Where.ENDED, Where.BLOCKED) or course.spinning == name

    def _cannot(
        self, step: Step, position: Position, possible: Sequence[str], course: Course
    ) -> CannotFollow:
        name, until = step
        aim = f"its next {until} touches" if isinstance(until, int) else f"{until}"
        if isinstance(until, int) and self._made:
            aim = f"{until} touches, of which {self._made} happened"
        remedy = (
            "The program itself forbids this order now; expect CannotFollow if that is the point"
            if position.kind is Where.BLOCKED
            else f"Let {name} go on to END where its number of touches does not matter"
        )
        return CannotFollow(
            f"step {self._at + 1} of the order lets {name} go on to {aim}, but {name} {position}."
            f" Possible: {_these(possible)}. {remedy}. Positions: {course}",
            self._at,
            possible,
        )


def _these(names: Sequence[str]) -> str:
    return " and ".join(names) or "nobody"


__all__ = ["END", "Fixed", "Seeded", "Strategy", "Systematic"]
