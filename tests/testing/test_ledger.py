"""What has been touched reaches the test process, and so does how much has not."""

from __future__ import annotations

from aiouffd.testing.engine import Engine
from aiouffd.testing.ledger import Ledger


def made(engine: Engine, count: int) -> None:
    """Make touches, each of which ends."""
    for _ in range(count):
        touch = engine.arrive(
            process=1, thread=2, region=1, offset=3, access="read", mapping=None, time_ns=10
        )
        engine.end(touch, "passed", 20)


def test_touches_without_room_are_counted() -> None:
    """Those beyond what the engine keeps are told as dropped, and every record made then has it."""
    engine = Engine(kept=3)
    engine.add_region(1, 4096, 1)
    ledger = Ledger(lambda _, after: (engine.written[after:], [], False, engine.dropped))
    made(engine, 3)
    assert ledger.fetch() == []
    assert ledger.record(ledger.touches(())).dropped == 0
    made(engine, 4)
    ledger.fetch()
    record = ledger.record(ledger.touches(()))
    assert (len(record), record.dropped) == (3, 4)
