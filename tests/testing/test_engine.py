"""The books of a harness, against a model that only remembers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aiouffd.testing.engine import Engine, Standing, wire
from aiouffd.testing.rules import Kind, Rule

PAGE = 100
PAGES = 3
REGION = 7


def books(*rules: Rule, kept: int = 1000) -> Engine:
    """An engine with one region and some rules."""
    engine = Engine(kept)
    engine.add_region(REGION, PAGE, PAGES)
    for each in rules:
        engine.arm(each)
    return engine


def a_rule(kind: Kind = Kind.FREEZE, **fields: Any) -> Rule:
    """A rule about the whole region, but for what is given."""
    return Rule(**{"number": 1, "kind": kind, "region": REGION, "start": 0, "end": 300, **fields})


def touch(engine: Engine, offset: int = 0, access: str = "read", **fields: Any) -> Standing:
    """A touch by thread 1 of process 1, but for what is given."""
    given = {"process": 1, "thread": 1, "mapping": "m", "time_ns": 5, **fields}
    return engine.arrive(region=REGION, offset=offset, access=access, **given)


def pass_by(engine: Engine, *touches: Standing) -> None:
    """Let touches through."""
    for each in touches:
        engine.end(each, "passed", 9)


def test_what_stops_a_touch() -> None:
    """A freeze by its number, a latency as 0; and nothing does once it was let go."""
    frozen = touch(books(a_rule(number=3)))
    delayed = touch(books(a_rule(Kind.SLOW, latency=("constant", 1.0))))
    assert (frozen.stopped_by, delayed.stopped_by) == (3, 0)
    for each in (frozen, delayed):  # as whoever lets it go does
        each.freeze, each.going = 0, True
        assert each.stopped_by == -1


# --- one rule, one touch after the other ------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "frozen"),
    [
        ({}, [True, True, True, True]),  # nobody is released
        ({"nth": 3}, [False, False, True, True]),
        ({"access": "write"}, [False, True, False, True]),
        ({"access": "write", "nth": 2}, [False, False, False, True]),
        ({"mode": "user"}, [True, True, True, True]),
        ({"mode": "kernel"}, [False] * 4),
        ({"threads": frozenset({1})}, [True] * 4),
        ({"threads": frozenset({2})}, [False] * 4),
        ({"start": 10, "end": 20}, [False] * 4),
        ({"region": 8}, [False] * 4),
    ],
)
def test_which_touches_stop(fields: dict[str, Any], frozen: list[bool]) -> None:
    """A read, a write, a read, a write: those stop that the rule fits, from the n-th on."""
    engine = books(a_rule(**fields))
    found = []
    for access in ("read", "write", "read", "write"):
        each = touch(engine, 5, access)
        found.append(each.freeze == 1)
        pass_by(engine, each)
    assert found == frozen


def test_after_the_first_release_nobody_stops() -> None:
    """A freeze that is not for ever stops who comes while somebody stands, and then nobody."""
    engine = books(a_rule())
    first, second = (touch(engine, thread=n) for n in (1, 2))
    assert (first.freeze, second.freeze) == (1, 1)
    engine.spend(1)
    assert touch(engine, thread=3).freeze == 0
    engine.spend(99)  # a rule that is gone is no error


def test_for_ever() -> None:
    """With ``every`` each touch stops, released or not."""
    engine = books(a_rule(every=True))
    for _ in range(5):
        each = touch(engine)
        assert each.freeze == 1
        assert engine.sees_more(each)
        engine.spend(1)
        pass_by(engine, each)


def test_the_first_of_two_freezes_stops() -> None:
    """A touch that two freezes fit is the first one's; both have counted it."""
    engine = books(a_rule(number=1), a_rule(number=2, nth=2))
    assert [touch(engine, thread=n).freeze for n in (1, 2)] == [1, 1]
    engine.spend(1)
    assert touch(engine, thread=3).freeze == 2


def test_all_rules_have_their_say() -> None:
    """One touch may be delayed twice, changed twice and stopped."""
    engine = books(
        a_rule(number=1),
        a_rule(Kind.SLOW, number=2, latency=("a",)),
        a_rule(Kind.SLOW, number=3, latency=("b",)),
        a_rule(Kind.CHANGE, number=4, start=4, end=6, values=(b"x", b"y")),
        a_rule(Kind.CHANGE, number=5, start=0, end=9, values=(b"z",)),
        a_rule(Kind.WATCH, number=6),
    )
    each = touch(engine, 5)
    assert each.delay == [("a",), ("b",)]
    assert each.values == [(4, b"x"), (0, b"z")]
    assert (each.freeze, each.failing) == (1, False)


def test_changed_values_are_given_once_each() -> None:
    """The first touch finds the first value, and after the last one nothing is written."""
    engine = books(a_rule(Kind.CHANGE, values=(b"x", b"y")))
    found = []
    for _ in range(4):
        each = touch(engine)
        found.append((each.values, engine.sees_more(each)))
        pass_by(engine, each)
    assert found == [([(0, b"x")], True), ([(0, b"y")], False), ([], False), ([], False)]


@pytest.mark.parametrize("every", [False, True])
def test_slow_pages(every: bool) -> None:
    """Each page is slow once, or always; until it was, its next touch has to show."""
    engine = books(a_rule(Kind.SLOW, latency=("a",), every=every, access="write"))
    reading = touch(engine, 5)
    assert reading.delay == []
    assert not engine.sees_more(reading)  # filled for a read, the write shows by itself
    pass_by(engine, reading)
    for _ in range(2):
        for page in range(PAGES):
            each = touch(engine, page * PAGE, "write")
            assert each.page == page
            assert bool(each.delay) is (every or each.number <= 1 + PAGES)
            assert engine.sees_more(each) is every
            pass_by(engine, each)


def test_another_byte_of_a_slow_place() -> None:
    """A touch beside a slow place leaves the page so that the place's own first touch shows."""
    engine = books(a_rule(Kind.SLOW, latency=("a",), start=40, end=44))
    assert engine.sees_more(touch(engine, 5))
    assert not engine.sees_more(touch(engine, 105, thread=2))  # another page


@pytest.mark.parametrize("every", [False, True])
def test_failing(every: bool) -> None:
    """The n-th touch fails, once or for ever."""
    engine = books(a_rule(Kind.FAIL, nth=2, every=every))
    found = []
    for _ in range(4):
        each = touch(engine)
        found.append((each.failing, each.once, engine.sees_more(each)))
        pass_by(engine, each)
    assert found == [
        (False, False, True),
        (True, not every, False),
        (every, False, False),
        (every, False, False),
    ]


def test_idle_threads() -> None:
    """What is only about threads that make no touches for a while need not be seen meanwhile."""
    engine = books(
        a_rule(number=1, threads=frozenset({1, 2})), a_rule(Kind.WATCH, number=2, start=200)
    )
    here, there = touch(engine, 5, thread=3), touch(engine, 205, thread=4)
    for idle, more in (({1}, True), ({1, 2}, False)):
        engine.set_idle(idle, idle=True)
        assert engine.sees_more(here) is more
        assert engine.sees_more(there)
        engine.set_idle(idle, idle=False)
    assert engine.sees_more(here)


# --- who stands --------------------------------------------------------------------------------


def test_who_else_stands_at_a_page() -> None:
    """Others are those at the same page of the same mapping, in the kernel."""
    engine = books()
    each = touch(engine, 5)
    beside = touch(engine, 6, thread=2)
    parked = touch(engine, 7, thread=3)
    parked.parked = parked.returning = True
    touch(engine, 105, thread=4)
    touch(engine, 5, thread=5, mapping="another")
    assert list(engine.others(each)) == [beside]
    assert engine.returning(each) == [parked]


def test_a_touch_within_another() -> None:
    """A signal handler's touch ends first; what is not innermost does not end."""
    engine = books(a_rule(every=True))
    outer = touch(engine, 5)
    inner = touch(engine, 105)
    assert inner.outer is outer
    assert engine.all_standing() == [inner, outer]
    assert not engine.is_innermost(outer)
    engine.end(outer, "passed", 9)
    assert engine.written == []
    pass_by(engine, inner, outer)
    assert [fields[0] for fields in engine.written] == [2, 1]
    assert engine.all_standing() == []
    engine.end(inner, "passed", 9)  # a second time is none
    assert len(engine.written) == 2


def test_disarming_says_who_stood_for_it() -> None:
    """In order of arrival, nested ones too."""
    engine = books(a_rule(number=1, end=100, every=True), a_rule(number=2, start=100, every=True))
    first, second = touch(engine, 5), touch(engine, 105, thread=2)
    third = touch(engine, 6, thread=3)
    assert engine.disarm(1) == [first, third]
    assert engine.disarm(1) == [first, third]  # they stand until they are let go
    assert engine.disarm(2) == [second]
    assert touch(engine, thread=4).freeze == 0


def test_a_forgotten_region() -> None:
    """Its rules go with it; who stands there is seen no more afterwards."""
    engine = books(a_rule(Kind.WATCH))
    engine.add_region(8, PAGE, 1)
    engine.arm(a_rule(Kind.WATCH, number=2, region=8))
    each = touch(engine)
    engine.forget_region(REGION)
    assert not engine.sees_more(each)
    assert list(engine.armed) == [2]


def test_what_is_written_down() -> None:
    """All fields, the outcome and the time that it took; beyond a limit only how many."""
    engine = books(kept=1)
    each = touch(engine, 105, "write", system_call=0, pc=9, where="x+1")
    engine.end(each, "failed", 25)
    pass_by(engine, touch(engine))
    written = (1, 5, 1, 1, REGION, 1, 105, "write", 0, 9, "x+1", "failed", 20)
    assert engine.written == [written]
    assert wire(each, 25) == written
    assert (engine.count, engine.dropped) == (2, 1)


# --- everything at once ------------------------------------------------------------------------


@dataclass
class Model:
    """All touches that there were since a rule was armed, and what came of them."""

    rule: Rule
    fitted: list[Standing] = field(default_factory=list)
    stopped: int = 0
    released: bool = False


class Books(RuleBasedStateMachine):
    """Rules armed and disarmed, touches of some threads, released in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine()
        self.models: dict[int, Model] = {}
        self.standing: dict[int, Standing] = {}
        self.ended: list[int] = []
        self.number = 0
        self.touches = 0

    @initialize()
    def begin(self) -> None:
        """Two regions."""
        self.engine.add_region(REGION, PAGE, PAGES)
        self.engine.add_region(REGION + 1, PAGE, PAGES)

    @rule(
        kind=st.sampled_from([Kind.FREEZE, Kind.WATCH, Kind.CHANGE, Kind.SLOW, Kind.FAIL]),
        region=st.sampled_from([REGION, REGION, REGION, REGION + 1]),
        start=st.sampled_from([0, 0, 50, 100, 200]),
        length=st.sampled_from([300, 100, 50, 1]),
        access=st.sampled_from(["any", "any", "read", "write"]),
        threads=st.sampled_from([frozenset(), frozenset({1}), frozenset({2, 3})]),
        nth=st.sampled_from([1, 1, 2]),
        every=st.booleans(),
        values=st.lists(st.binary(min_size=1, max_size=1), min_size=1, max_size=3),
    )
    def arm(
        self, kind: Kind, region: int, start: int, length: int, values: list[bytes], **fields: Any
    ) -> None:
        """Any rule."""
        self.number += 1
        one = Rule(
            number=self.number,
            kind=kind,
            region=region,
            start=start,
            end=start + length,
            latency=(self.number,),
            values=tuple(values),
            **fields,
        )
        self.models[self.number] = Model(one)
        self.engine.arm(one)

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def disarm(self, data: st.DataObject) -> None:
        """Who stood for it is said, in order."""
        number = data.draw(st.sampled_from(sorted(self.models)))
        del self.models[number]
        stood = [each.number for each in self.engine.disarm(number)]
        assert stood == sorted(e.number for e in self.standing.values() if e.freeze == number)

    @precondition(lambda self: len(self.standing) < 3)
    @rule(
        data=st.data(),
        region=st.sampled_from([REGION, REGION, REGION, REGION + 1]),
        offset=st.sampled_from([0, 50, 99, 100, 150, 250]),
        access=st.sampled_from(["read", "write"]),
    )
    def touch(self, data: st.DataObject, region: int, offset: int, access: str) -> None:
        """Each rule has its say exactly as its own touches since it was armed have it."""
        thread = data.draw(st.sampled_from(sorted({1, 2, 3} - set(self.standing))))
        self.touches += 1
        each = self.engine.arrive(
            process=1,
            thread=thread,
            region=region,
            offset=offset,
            access=access,
            mapping=region,
            time_ns=0,
        )
        frozen_by = 0
        delays, values, failing = [], [], False
        for number, model in self.models.items():
            one = model.rule
            fits = one.region == region and one.start <= offset < one.end
            if not fits or one.access not in ("any", access):
                continue
            if one.threads and thread not in one.threads:
                continue
            earlier = list(model.fitted)
            model.fitted.append(each)
            place = len(model.fitted)
            due = place >= one.nth
            if one.kind is Kind.FREEZE and due and not frozen_by:
                if one.every or not model.released:
                    frozen_by = number
            elif one.kind is Kind.SLOW and due:
                late = earlier[one.nth - 1 :]
                if one.every or all(e.page != each.page for e in late):
                    delays.append((number,))
            elif one.kind is Kind.FAIL and due:
                failing = failing or one.every or place == one.nth
            elif one.kind is Kind.CHANGE and place <= len(one.values):
                values.append((one.start, one.values[place - 1]))
        assert each.number == self.touches
        assert (each.freeze, each.failing) == (frozen_by, failing)
        assert (each.delay, each.values) == (delays, values)
        if frozen_by:
            self.models[frozen_by].stopped += 1
        self.standing[thread] = each

    @precondition(lambda self: self.standing)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        """Any of them goes; its page may stay exactly if nobody waits for what would not show."""
        thread = data.draw(st.sampled_from(sorted(self.standing)))
        each = self.standing.pop(thread)
        if each.freeze in self.models:
            self.models[each.freeze].released = True
            self.engine.spend(each.freeze)
        assert self.engine.sees_more(each) is any(
            self._waits(model, each) for model in self.models.values()
        )
        self.engine.end(each, "passed", 1)
        self.ended.append(each.number)

    @staticmethod
    def _waits(model: Model, each: Standing) -> bool:
        one, page = model.rule, each.page
        if one.region != each.region:
            return False
        if not (one.start < (page + 1) * PAGE and page * PAGE < one.end):
            return False
        if one.access == "write" and each.access == "read":
            return False
        late = model.fitted[one.nth - 1 :]
        match one.kind:
            case Kind.WATCH:
                return True
            case Kind.FREEZE:
                return one.every or not model.stopped
            case Kind.SLOW:
                return one.every or all(e.page != page for e in late)
            case Kind.FAIL:
                return not late
            case Kind.CHANGE:
                return len(model.fitted) < len(one.values)

    @invariant()
    def all_is_written_down(self) -> None:
        """Every touch stands or has ended, once."""
        assert [fields[0] for fields in self.engine.written] == self.ended
        assert {e.number for e in self.engine.all_standing()} == {
            e.number for e in self.standing.values()
        }
        assert self.engine.count == self.touches


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
