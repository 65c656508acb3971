"""What has been touched reaches the test process, and so does how much has not."""

from __future__ import annotations

from typing import Any

from aiouffd.testing.engine import Engine, Standing, wire
from aiouffd.testing.ledger import Ledger


def stands(engine: Engine, thread: int) -> Standing:
    """Have a thread stand."""
    return engine.arrive(
        process=1, thread=thread, region=1, offset=3, access="read", mapping=None, time_ns=10
    )


def made(engine: Engine, count: int) -> None:
    """Make touches, each of which ends."""
    for _ in range(count):
        engine.end(stands(engine, 2), "passed", 20)


def answered(engine: Engine, name: str, after: int) -> tuple[Any, ...]:
    """Answer as the helper does, two touches at a time."""
    if name == "touches":
        more = after + 2 < len(engine.written)
        return engine.written[after : after + 2], more, engine.dropped
    standing = [touch for touch in engine.all_standing() if touch.number > after]
    found = [(wire(touch, 15), touch.freeze, touch.held_by) for touch in standing]
    return found[:2], len(found) > 2


def test_a_touch_that_ends_meanwhile_is_had_once() -> None:
    """Touches come in pieces; one that ends while they are asked for has ended."""
    engine = Engine(kept=100)
    engine.add_region(1, 4096, 1)
    standing = [stands(engine, thread) for thread in range(5)]

    def ask(name: str, after: int) -> tuple[Any, ...]:
        answer = answered(engine, name, after)
        if name == "standing" and not answer[1]:
            engine.end(standing[3], "frozen", 20)
        return answer

    ledger = Ledger(ask)
    assert [touch.number for touch in ledger.fetch()] == [1, 2, 3, 5]
    assert [touch.number for touch in ledger.touches(())] == [4]
    assert [touch.number for touch, _, _ in ledger.standing()] == [1, 2, 3, 5]


def test_touches_without_room_are_counted() -> None:
    """Those beyond what the engine keeps are told as dropped, and every record made then has it."""
    engine = Engine(kept=3)
    engine.add_region(1, 4096, 1)
    ledger = Ledger(lambda name, after: answered(engine, name, after))
    made(engine, 3)
    assert ledger.fetch() == []
    assert ledger.record(ledger.touches(())).dropped == 0
    made(engine, 4)
    ledger.fetch()
    record = ledger.record(ledger.touches(()))
    assert (len(record), record.dropped) == (3, 4)
