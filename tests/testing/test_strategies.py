"""Strategies: all orders within a bound, once each; random ones again; and a given one."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.testing.ahead import SPINS
from aiouffd.testing.schedules import (
    END,
    Before,
    CannotFollow,
    Course,
    Deadlock,
    Endless,
    NotDeterministic,
    Where,
    order_of,
)
from aiouffd.testing.strategies import Fixed, Seeded, Strategy, Systematic
from tests.testing.simulated import Program, Programs, World, every_order, proceed, run, run_ahead

pytestmark = pytest.mark.once

ACTIONS = st.tuples(st.sampled_from(["read", "write"]), st.sampled_from("xy"))


def program(actions: list[tuple[str, str]]) -> Callable[[], Program]:
    def go() -> Program:
        yield from actions

    return go


def guarded(actions: list[tuple[str, str]], lock: str = "m") -> list[tuple[str, str]]:
    return [("lock", lock), *actions, ("unlock", lock)]


def choices(course: Course) -> tuple[str, ...]:
    return tuple(move.name for move in course.moves)


def visited(programs: Programs, strategy: Strategy) -> list[tuple[str, ...]]:
    """Go through all runs of a strategy; one that ends in a deadlock is one of them."""
    seen = []
    more = True
    while more:
        strategy.begin()
        course = Course(programs, strategy)
        try:
            _go(programs, course)
        except Deadlock:
            pass
        seen.append(choices(course))
        more = strategy.end(course)
    return seen


def _go(programs: Programs, course: Course) -> None:
    proceed(course, World(programs))


@st.composite
def some_programs(draw: st.DrawFn) -> Programs:
    """Two or three programs, of up to five touches together; under no lock, one or both."""
    programs: Programs = {}
    left = 5
    for name in "abc"[: draw(st.integers(2, 3))]:
        actions = draw(st.lists(ACTIONS, max_size=min(left, 3)))
        left -= len(actions)
        for lock in draw(st.permutations("mn"))[: draw(st.integers(0, 2))]:
            at = draw(st.integers(0, len(actions)))
            actions = actions[:at] + guarded(actions[at:], lock)
        programs[name] = program(actions)
    return programs


@given(some_programs(), st.integers(0, 3))
def test_every_order_within_the_bound_once(programs: Programs, bound: int) -> None:
    """What is visited is what trying each choice finds, with no more preemptions; none twice."""
    strategy = Systematic(bound)
    orders = every_order(programs)
    seen = visited(programs, strategy)
    assert len(seen) == len(set(seen))
    assert set(seen) == {order for order, preemptions in orders.items() if preemptions <= bound}
    assert strategy.cut == (len(seen) < len(orders))


@given(some_programs())
def test_fewer_preemptions_come_first(programs: Programs) -> None:
    """Without a bound every order there is comes, by the number of its preemptions."""
    orders = every_order(programs)
    seen = visited(programs, Systematic(None))
    assert sorted(seen) == sorted(orders)
    counts = [orders[each] for each in seen]
    assert counts == sorted(counts)


@given(some_programs(), st.integers(0, 2**32), st.integers(0, 3))
def test_an_order_makes_the_same_run(programs: Programs, seed: int, preemptions: int) -> None:
    """What happened, put into an order and followed, happens again: deadlocks as well."""
    strategy = Seeded(programs, seed, preemptions)
    for _ in range(5):
        ends = []
        course, end = _run(programs, strategy)
        ends.append(end)
        assert strategy.end(course)
        again, end = _run(programs, Fixed(order_of(course.moves), programs))
        assert choices(again) == choices(course)
        assert [*ends, end] == [end, end]


def _run(programs: Programs, strategy: Strategy) -> tuple[Course, str]:
    strategy.begin()
    course = Course(programs, strategy)
    try:
        _go(programs, course)
    except Deadlock as deadlock:
        return course, str(deadlock)
    return course, ""


@st.composite
def with_loops(draw: st.DrawFn) -> Programs:
    """Programs in which somebody may read the same for long."""
    programs = draw(some_programs())
    for name in draw(st.sets(st.sampled_from(sorted(programs)), min_size=1)):
        loop = [("read", "z")] * draw(st.integers(SPINS - 1, SPINS + 4))
        after = draw(st.lists(ACTIONS, max_size=2))
        programs[name] = program([*loop, *after])
    return programs


@given(some_programs() | with_loops(), st.integers(0, 2**32), st.integers(0, 2), st.data())
def test_plans_are_what_will_be_chosen(
    programs: Programs, seed: int, bound: int, data: st.DataObject
) -> None:
    """A run by plans is the run that the strategy chooses move by move, of every strategy."""
    names = list(programs)
    until = st.just(END) | st.integers(1, 3) | st.just(Before(access="write"))
    order = data.draw(st.lists(st.tuples(st.sampled_from(names), until), max_size=4))
    for make in (
        lambda: Systematic(bound),
        lambda: Seeded(names, seed, bound),
        lambda: Fixed(order, names),
    ):
        by_moves, by_plans = make(), make()
        for _ in range(10):
            one, other = (
                _outcome(lambda: run(programs, by_moves)),  # noqa: B023  # called at once
                _outcome(lambda: run_ahead(programs, by_plans)),  # noqa: B023
            )
            assert one == other
            if isinstance(one, str) or not all((one, other)):
                break


def _outcome(go: Callable[[], Course]) -> object:
    try:
        return choices(go())
    except (Deadlock, CannotFollow) as error:
        return str(error)


def counter(memory: dict[str, int], guard: bool) -> Callable[[], Program]:
    def add_one() -> Program:
        if guard:
            yield "lock", "m"
        yield "read", "x"
        value = memory["x"]
        yield "write", "x"
        memory["x"] = value + 1
        if guard:
            yield "unlock", "m"

    return add_one


def lost(strategy: Strategy, *, guard: bool, runs: int = 100) -> Course | None:
    """Look for an order in which two additions of one give one."""
    memory = {"x": 0}
    add_one = counter(memory, guard)
    for _ in range(runs):
        memory["x"] = 0
        course = run({"a": add_one, "b": add_one}, strategy)
        if memory["x"] != 2:
            return course
        if not strategy.end(course):
            break
    return None


def test_a_lost_update_is_found() -> None:
    """One preemption is enough for it, and none is not."""
    assert lost(Systematic(0), guard=False) is None
    course = lost(Systematic(1), guard=False)
    assert course is not None
    order = order_of(course.moves)
    assert order == [("a", 1), ("b", END), ("a", END)]
    assert lost(Fixed(order, "ab"), guard=False) is not None
    assert lost(Systematic(None), guard=True) is None


def test_a_lost_update_is_found_at_random(seed: int) -> None:
    """Random orders find it within a hundred, under a lock never."""
    assert lost(Seeded("ab", seed), guard=False) is not None
    assert lost(Seeded("ab", seed), guard=True) is None


def test_the_same_seed_gives_the_same_orders(seed: int) -> None:
    """And another seed others."""
    programs = dict.fromkeys("abc", program([("read", "x"), ("write", "y")] * 3))

    def orders(number: int) -> list[tuple[str, ...]]:
        strategy = Seeded(programs, number)
        found = []
        for _ in range(20):
            course = run(programs, strategy)
            found.append(choices(course))
            assert strategy.end(course)
        return found

    assert orders(seed) == orders(seed)
    assert orders(seed) != orders(seed + 1)


def test_seeded_orders_take_so_many_turns_away(seed: int) -> None:
    """At most as many preemptions as were asked for, and once the length is known sometimes all."""
    programs = dict.fromkeys("ab", program([("read", "x"), ("write", "y")] * 3))
    orders = every_order(programs)
    strategy = Seeded(programs, seed, 2)
    counts = set()
    for _ in range(200):
        course = run(programs, strategy)
        counts.add(orders[choices(course)])
        assert strategy.end(course)
    assert counts == {0, 1, 2}


def deadlocking() -> Programs:
    def both(first: str, second: str) -> Callable[[], Program]:
        return program(
            [
                ("lock", first),
                ("read", "x"),
                ("lock", second),
                ("unlock", second),
                ("unlock", first),
            ]
        )

    return {"a": both("m", "n"), "b": both("n", "m")}


def test_a_deadlock_is_found() -> None:
    """Two locks taken crosswise, between a start and the first touch: one preemption shows it."""
    strategy = Systematic(1)
    with pytest.raises(Deadlock) as raised:
        while True:
            course = run(deadlocking(), strategy)
            assert strategy.end(course)
    assert raised.value.blocked == {"a": "lock n", "b": "lock m"}


def waiting(flag: list[int]) -> Programs:
    def poll() -> Program:
        yield "read", "x"
        while not flag:
            yield "read", "x"

    def write() -> Program:
        yield "write", "x"
        flag.append(1)

    return {"poll": poll, "write": write}


def test_a_spinner_does_not_hold_the_others_up(seed: int) -> None:
    """One that polls gets its answer without a preemption, in each kind of order."""
    orders = [("poll", END), ("write", END)]
    for strategy in (
        Systematic(0),
        Seeded(["poll", "write"], seed, 0),
        Fixed(orders, ["poll", "write"]),
    ):
        course = run(waiting([]), strategy)
        assert all(each.kind is Where.ENDED for each in course.positions.values())
        strategy.end(course)


def test_two_that_wait_for_nobody() -> None:
    """If only spinners are left the run is endless."""
    polls = {name: waiting([])["poll"] for name in "ab"}
    for strategy in (Systematic(0), Fixed([("a", END)], polls)):
        with pytest.raises(Endless):
            run(polls, strategy, moves=200)


def test_spinning_on_is_an_order_as_well() -> None:
    """Whoever reads the same so often and then ends may do so without a turn of another."""
    programs: Programs = {
        "a": program([("read", "x")] * (SPINS + 2)),
        "b": program([("write", "x")]),
    }
    straight = ("a",) * (SPINS + 3)
    one, none = (visited(programs, Systematic(bound)) for bound in (1, 0))
    assert any(order[: SPINS + 3] == straight for order in one)
    assert not any(order[: SPINS + 3] == straight for order in none)


def test_others_than_before_are_an_error() -> None:
    """A program that goes another way in the same order is not explored in silence."""
    runs = iter(range(100))

    def unsteady() -> Program:
        if next(runs) == 3:
            yield "lock", "m"
            yield "lock", "m"
        yield "read", "x"

    strategy = Systematic(2)
    with pytest.raises(
        NotDeterministic,
        match=r"\(b 0\) a and b could go on in an earlier run, and now a: a is not started; b is b",
    ):
        visited({"a": program([("read", "x")]), "b": unsteady}, strategy)


@pytest.mark.parametrize("other", [("read", "y"), ("write", "x")])
def test_another_touch_than_before_is_an_error(other: tuple[str, str]) -> None:
    """Those who can go on may be the same: each has to stand before the same access."""
    runs = iter(range(100))

    def unsteady() -> Program:
        yield ("read", "x") if next(runs) < 2 else other

    what = f"its {other[0]} of memory\\+{'xyz'.index(other[1]):#x}"
    with pytest.raises(
        NotDeterministic,
        match=rf"b stood before its read of memory\+0x0 in an earlier run, and now before {what}",
    ):
        visited({"a": program([("read", "x")] * 2), "b": unsteady}, Systematic(2))


def test_an_end_too_early_is_an_error() -> None:
    """A run that is over before it came to where it should branch off is told as well."""
    strategy = Systematic(None)
    strategy.begin()
    course = Course("ab", strategy)
    for _ in range(2):
        assert strategy.choose(("a", "b"), course) == "a"
    assert strategy.end(course)
    strategy.begin()
    assert strategy.choose(("a", "b"), course) == "a"
    with pytest.raises(NotDeterministic, match="and now nobody"):
        strategy.end(course)


THREE = program([("read", "x"), ("write", "x"), ("read", "y")])


@pytest.mark.parametrize(
    "order, went",
    [
        ([], "aaaabbbb"),
        ([("b", 1)], "bbbbaaaa"),
        ([("b", END)], "bbbbaaaa"),
        ([("a", 0), ("b", 0), ("a", 3)], "abaaabbb"),
        ([("a", 1), ("b", 2), ("a", END), ("b", END)], "aabbbaab"),
        ([("a", 1), ("a", 1), ("b", END), ("a", END)], "aaabbbba"),
        ([("a", Before(access="write")), ("b", END)], "aabbbbaa"),
        ([("a", Before(offset=1)), ("a", Before(offset=1)), ("b", END)], "aaabbbba"),
    ],
)
def test_an_order_is_followed(order: object, went: str) -> None:
    """Each step goes as far as it says; after the last, the rest run to their ends."""
    assert isinstance(order, list)
    programs: Programs = {"a": THREE, "b": THREE}
    strategy = Fixed(order, programs)
    for _ in range(2):
        course = run(programs, strategy)
        assert "".join(choices(course)) == went
        assert not strategy.end(course)


@pytest.mark.parametrize(
    "order, step, possible, text",
    [
        (
            [("a", 4), ("b", END)],
            0,
            ("b",),
            "go on to 4 touches, of which 3 happened, but a has ended. Possible: b. Let a go on to",
        ),
        (
            [("b", END), ("a", END), ("a", 2)],
            2,
            (),
            "step 3 of the order lets a go on to its next 2 touches, but a has ended. Possible: no",
        ),
        (
            [("a", Before(access="write", offset=1)), ("b", END)],
            0,
            ("b",),
            "lets a go on to a write of any region+0x1, but a has ended",
        ),
    ],
)
def test_an_order_that_cannot_be_followed(
    order: object, step: int, possible: tuple[str, ...], text: str
) -> None:
    """The error says which step, why not, and what could have been."""
    assert isinstance(order, list)
    programs: Programs = {"a": THREE, "b": THREE}
    strategy = Fixed(order, programs)
    with pytest.raises(CannotFollow) as raised:
        strategy.end(run(programs, strategy))
    assert (raised.value.step, raised.value.possible) == (step, possible)
    assert text in str(raised.value)


def test_an_order_that_a_lock_forbids() -> None:
    """A count that is not reached because of a lock is an error; END is content with it."""
    actions = guarded([("read", "x"), ("write", "x")])
    programs: Programs = {"a": program(actions), "b": program(actions)}
    with pytest.raises(CannotFollow, match=r"b is blocked \(lock m\)\. Possible: a\. The program"):
        run(programs, Fixed([("a", 1), ("b", 2), ("a", END)], programs))
    course = run(programs, Fixed([("a", 1), ("b", END), ("a", END)], programs))
    assert "".join(choices(course)) == "aababb"


def test_a_bad_order_is_refused_at_once() -> None:
    """Before anything runs."""
    with pytest.raises(ValueError, match="names nobody"):
        Fixed([("c", 1)], "ab")


def test_nothing_is_drawn_from_elsewhere() -> None:
    """The random numbers of the test process stay as they are."""
    random.seed(1)
    expected = random.random()
    random.seed(1)
    Seeded("ab", 5).begin()
    assert random.random() == expected
