"""Programs of threads without threads: what strategies are tested on.

A program is a generator that yields what it does next: ``("read", place)`` and ``("write",
place)`` are touches; ``("lock", name)`` and ``("unlock", name)`` are not, and happen on the way.
A lock that is given back goes to whoever waits longest.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeAlias

from aiouffd.testing.ahead import Ahead
from aiouffd.testing.schedules import ENDED, MOVES, Course, Position, Where
from aiouffd.testing.strategies import Strategy
from aiouffd.testing.touches import Access, Touch

Program: TypeAlias = Generator[tuple[str, str], None, None]
Programs: TypeAlias = dict[str, Callable[[], Program]]

PLACES = "xyz"


def touch(access: str, place: str) -> Touch:
    """Make the touch of a place, which has its own byte in a region called memory."""
    offset = PLACES.index(place)
    return Touch(0, 0, 0, 0, "memory", 0, offset, Access(access), where=f"{access} {place}")


class World:
    """All programs together, each standing somewhere."""

    def __init__(self, programs: Programs) -> None:
        self.running = {name: make() for name, make in programs.items()}
        self.holder: dict[str, str] = {}
        self.waiting: dict[str, list[str]] = {}
        self.woken: list[str] = []

    def go(self, name: str) -> Position:
        """Let one make its touch and go on to the next; whom it wakes is in ``woken``."""
        for what, place in self.running[name]:
            if what in ("read", "write"):
                return Position(Where.TOUCH, touch(what, place))
            if what == "unlock":
                self._give_back(place)
            elif place in self.holder:
                self.waiting.setdefault(place, []).append(name)
                return Position(Where.BLOCKED, note=f"lock {place}")
            else:
                self.holder[place] = name
        return ENDED

    def _give_back(self, lock: str) -> None:
        del self.holder[lock]
        if self.waiting.get(lock):
            following = self.waiting[lock].pop(0)
            self.holder[lock] = following
            self.woken.append(following)


def run(programs: Programs, strategy: Strategy, *, moves: int = MOVES) -> Course:
    """Run the programs to their end, as the strategy chooses."""
    strategy.begin()
    course = Course(programs, strategy, moves=moves)
    proceed(course, World(programs))
    return course


def run_ahead(programs: Programs, strategy: Strategy, *, moves: int = MOVES) -> Course:
    """Run the programs by plans: the strategy hears of the moves only when a plan is over."""
    strategy.begin()
    course = Course(programs, strategy, moves=moves)
    world = World(programs)
    while True:
        plan = course.ahead()
        enabled = set(course.enabled)
        happened = []
        while (planned := plan.next(enabled)) is not None:
            came = [(planned, world.go(planned))]
            while world.woken:
                following = world.woken.pop(0)
                came.append((following, world.go(following)))
            for name, position in came:
                enabled.discard(name)
                if position.kind is Where.TOUCH:
                    enabled.add(name)
            happened.append((planned, came))
        for planned, came in happened:
            assert course.choose() == planned
            for name, position in came:
                course.came(name, position)
        if not happened:
            chosen = course.choose()
            if chosen is None:
                return course
            course.came(chosen, world.go(chosen))
            while world.woken:
                following = world.woken.pop(0)
                course.came(following, world.go(following))


def proceed(course: Course, world: World) -> None:
    """Let them go on until nobody can be chosen."""
    while (name := course.choose()) is not None:
        course.came(name, world.go(name))
        while world.woken:
            following = world.woken.pop(0)
            course.came(following, world.go(following))


class Stop(Exception):
    """The choices of a ``Listed`` are used up."""


class Listed:
    """One choice after another, from a list; it stops where the list ends."""

    def __init__(self, choices: Sequence[str]) -> None:
        self.choices = list(choices)
        self.preemptions = 0
        self.enabled: Sequence[str] = ()

    def begin(self) -> None:
        self.at = 0

    def choose(self, enabled: Sequence[str], course: Course) -> str:
        self.enabled = enabled
        if self.at == len(self.choices):
            raise Stop
        choice = self.choices[self.at]
        self.at += 1
        self.preemptions += course.current in enabled and choice != course.current
        return choice

    def ahead(self, course: Course) -> Ahead[str]:
        return Ahead(self.choices[self.at :], [], stay=False)

    def end(self, course: Course) -> bool:
        return False


def every_order(programs: Programs, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """Find every order there is by trying each choice, and how many preemptions each one has.

    An order that ends in a deadlock is one of them.
    """
    listed = Listed(prefix)
    try:
        run(programs, listed)
    except Stop:
        found: dict[tuple[str, ...], int] = {}
        for name in listed.enabled:
            found |= every_order(programs, (*prefix, name))
        return found
    except AssertionError:
        pass  # a deadlock
    return {prefix: listed.preemptions}
