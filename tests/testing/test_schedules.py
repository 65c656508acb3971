"""Schedules: a run is one choice after another, and an order says which."""

from __future__ import annotations

import pytest

from aiouffd.testing.ahead import SPINS
from aiouffd.testing.schedules import (
    END,
    ENDED,
    UNSTARTED,
    Before,
    Course,
    Deadlock,
    Endless,
    Position,
    Where,
    checked,
    order_of,
)
from tests.testing.simulated import Listed, Program, Programs, Stop, World, proceed, run, touch

READS_X = Position(Where.TOUCH, touch("read", "x"))


def add_one() -> Program:
    yield "read", "x"
    yield "write", "x"


def polite() -> Program:
    yield "lock", "m"
    yield from add_one()
    yield "unlock", "m"


def poll() -> Program:
    while True:
        yield "read", "x"


def until(programs: Programs, choices: str) -> Course:
    """Run as far as the letters say."""
    listed = Listed(choices)
    listed.begin()
    course = Course(programs, listed)
    with pytest.raises(Stop):
        proceed(course, World(programs))
    return course


def test_a_move_goes_up_to_the_next_touch() -> None:
    """The first move makes no touch, each other one makes one."""
    course = run({"a": add_one}, Listed("aaa"))
    assert [str(move.before) for move in course.moves] == [
        "is not started",
        "stands before its read of memory+0x0 at read x",
        "stands before its write of memory+0x0 at write x",
    ]
    assert [move.after for move in course.moves] == [*(m.before for m in course.moves[1:]), ENDED]


def test_who_is_blocked_cannot_be_chosen() -> None:
    """One that waits for a lock is enabled again only once another gives the lock back."""
    course = until({"a": polite, "b": polite}, "ab")
    assert course.enabled == ("a",)
    assert str(course) == (
        "a stands before its read of memory+0x0 at read x; b is blocked (lock m)"
    )
    assert until({"a": polite, "b": polite}, "abaa").enabled == ("b",)


def test_all_blocked_is_a_deadlock() -> None:
    """It says who waits for what."""

    def one() -> Program:
        yield "lock", "m"
        yield "read", "x"
        yield "lock", "n"

    def two() -> Program:
        yield "lock", "n"
        yield "read", "x"
        yield "lock", "m"

    with pytest.raises(Deadlock) as raised:
        run({"a": one, "b": two}, Listed("abab"))
    assert raised.value.blocked == {"a": "lock n", "b": "lock m"}
    assert str(raised.value) == (
        "deadlock: a is blocked (lock n) and b is blocked (lock m),"
        " and nobody else is left to go on"
    )


def test_a_deadlock_of_unknown_reason() -> None:
    """What cannot be seen is not said."""
    assert str(Deadlock({"a": ""})).startswith("deadlock: a is blocked, and nobody")


def test_leaving_the_current_one_is_a_preemption() -> None:
    """As long as it can go on only its own turn is free; before, between and after, all are."""
    programs: Programs = {"a": add_one, "b": add_one}
    assert until(programs, "").free == ("a", "b")
    assert until(programs, "b").free == ("b",)
    assert until(programs, "bbb").free == ("a",)


def test_leaving_a_spinner_is_none() -> None:
    """One that reads the same again and again gives its turn away."""
    programs: Programs = {"a": poll, "b": add_one}
    before, spinning = "a" * (SPINS + 1), "a" * (SPINS + 2)
    assert until(programs, before).spinning is None
    course = until(programs, spinning)
    assert course.spinning == "a"
    assert course.free == ("b",)
    assert until(programs, spinning + "b").spinning is None
    assert until({"a": poll}, spinning).free == ("a",)


def test_who_writes_or_reads_on_does_not_spin() -> None:
    """Neither a loop that writes, nor one that reads another place each time, nor its end."""

    def writes() -> Program:
        for _ in range(40):
            yield from add_one()

    def reads_on() -> Program:
        for _ in range(20):
            for place in "xyz":
                yield "read", place

    def reads_then_writes() -> Program:
        for _ in range(SPINS + 1):
            yield "read", "x"
        yield "write", "x"

    assert until({"a": writes}, "a" * 60).spinning is None
    assert until({"a": reads_on}, "a" * 4).spinning is None
    assert until({"a": reads_on}, "a" * 40).spinning == "a"
    assert until({"a": reads_then_writes}, "a" * (SPINS + 1)).spinning is None
    assert until({"a": reads_then_writes}, "a" * (SPINS + 2)).spinning is None


def test_a_loop_without_end_is_given_up() -> None:
    """After so many moves the run is over, and the text says who read what."""
    with pytest.raises(Endless, match=r"after 30 moves; a went last and stands .*again and again"):
        run({"a": poll}, Listed("a" * 31), moves=30)

    def writes() -> Program:
        while True:
            yield "write", "x"

    with pytest.raises(Endless, match=r"write of memory\+0x0 at write x$"):
        run({"a": writes}, Listed("a" * 31), moves=30)


@pytest.mark.parametrize(
    "choices, order",
    [
        ("aaabbb", [("a", END), ("b", END)]),
        ("aabbba", [("a", 1), ("b", END), ("a", END)]),
        ("abaabb", [("a", 0), ("b", 0), ("a", END), ("b", END)]),
        ("baabab", [("b", 0), ("a", 1), ("b", 1), ("a", END), ("b", END)]),
        ("aab", [("a", 1), ("b", 0)]),
        ("", []),
    ],
)
def test_choices_as_an_order(choices: str, order: object) -> None:
    """Moves of the same participant are one step, which counts its touches or says END."""
    course = (run if len(choices) == 6 else lambda p, _: until(p, choices))(
        {"a": add_one, "b": add_one}, Listed(choices)
    )
    assert order_of(course.moves) == order


def test_end_stands_only_for_a_straight_way() -> None:
    """Where the participant was blocked or spun on its way to the end, its touches are counted."""

    def short() -> Program:
        for _ in range(SPINS + 4):
            yield "read", "x"

    course = run({"a": short}, Listed("a" * (SPINS + 5)))
    assert order_of(course.moves) == [("a", SPINS + 4)]

    course = Course("a", Listed("aa"))
    course._strategy.begin()
    for position in (Position(Where.BLOCKED), UNSTARTED, ENDED):  # blocked, and goes on by itself
        if position is not UNSTARTED:
            course.choose()
        course.came("a", position)
    assert order_of(course.moves) == [("a", 0)]


def test_a_move_on_its_way_has_no_end() -> None:
    """What has not come anywhere yet is counted as far as it is known."""
    course = Course("a", Listed("a"))
    course._strategy.begin()
    course.choose()
    assert course.moves[0].after is None
    assert order_of(course.moves) == [("a", 0)]


@pytest.mark.parametrize(
    "before, matches",
    [
        (Before(), True),
        (Before(region="memory"), True),
        (Before(region="other"), False),
        (Before(offset=1), False),
        (Before(length=1), True),
        (Before(length=0), False),
        (Before(access="read"), True),
        (Before(access="write"), False),
    ],
)
def test_before(before: Before, matches: bool) -> None:
    """A touch is like the place if region, byte and access are."""
    assert before.matches(touch("read", "x")) is matches


def test_before_reads_well() -> None:
    """It says bytes and access."""
    assert str(Before()) == "any touch of any region+0x0"
    assert str(Before(region="r", offset=16, length=8, access="read")) == "a read of r+0x10..0x18"


def test_positions_read_well() -> None:
    """Each says where its participant is."""
    assert str(UNSTARTED) == "is not started"
    assert str(ENDED) == "has ended"
    assert str(Position(Where.BLOCKED)) == "is blocked"
    bare = Position(Where.TOUCH, touch("write", "y"))
    assert str(bare) == "stands before its write of memory+0x1 at write y"


def test_a_good_order() -> None:
    """Names, counts, END and places come back as they were."""
    order = [("a", 0), ("b", END), ("a", 2), ("a", Before(offset=1))]
    assert checked(order, "ab") == order


@pytest.mark.parametrize(
    "step, wrong",
    [
        ("a", "is no pair"),
        (("a", 1, 2), "is no pair"),
        (("c", 1), "names nobody: there are 'a', 'b'"),
        (("a", "END"), "does not say how far"),
        (("a", 1.5), "does not say how far"),
        (("a", True), "does not say how far"),
        (("a", -1), "asks for fewer touches than none"),
        (("b", 0), "lets nothing happen: b is started already"),
    ],
)
def test_a_bad_order(step: object, wrong: str) -> None:
    """The text says which step it is and what is wrong with it."""
    with pytest.raises(ValueError, match=f"^step 2 of the order, .*{wrong}"):
        checked([("b", 1), step], "ab")
