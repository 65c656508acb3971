"""How a migration goes, for people: one line, rewritten; and when it will be over."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from aiouffd.cli.migrate_progress import Estimate, LiveLines, Tell, line_of
from aiouffd.cli.output import Lines

FIGURES: dict[str, Any] = {
    "stage": "copying",
    "connected": True,
    "round": 2,
    "dirty_rate": 20 << 20,
    "sent_bytes": 300 << 20,
    "zero_bytes": 1 << 20,
    "left_bytes": 40 << 20,
    "demand": 0,
    "stall": 0.0,
    "estimated_end": 3661.2,
}
LINE = (
    "round 2: 20.0 MiB/s dirty, 300.0 MiB sent, 1.0 MiB zero, 40.0 MiB left, 0 on demand,"
    " stall 0.00 s, 1:01:02 to go"
)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_says_all_of_it() -> None:
    """Round, dirty rate, sent, zero, demand, stall, end; and less where less is known."""
    assert line_of(FIGURES) == LINE
    line = line_of(FIGURES | {"stage": "following", "dirty_rate": 0, "estimated_end": None})
    assert line.startswith("following: 300.0 MiB sent")
    assert line.endswith("stall 0.00 s")
    assert line_of(FIGURES | {"connected": False}).startswith("round 2: NO LINE, 20.0 MiB/s dirty")


def test_a_terminal_has_one_line_that_is_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """After two seconds, twice a second at most; what happens is written above it."""
    monkeypatch.setenv("COLUMNS", "40")
    out, stream, now = io.StringIO(), _Terminal(), 0.0
    with Lines(out) as lines, LiveLines(stream) as diagnostics:
        tell = Tell(lines, diagnostics, as_json=False, clock=lambda: now)
        tell("sending", "sending it")
        for now in (1.9, 2.0, 2.4, 2.5):  # noqa: B007 - the clock reads it
            tell.progress(lambda: FIGURES)
        diagnostics.put("a warning")
        tell("moved", "moved it")
    assert out.getvalue() == "sending it\nmoved it\n"
    line = LINE[:39]
    gone = "\r" + " " * 39 + "\r"
    assert stream.getvalue() == f"\r{line}\r{line}{gone}a warning\n"


def test_without_a_terminal_nobody_is_told() -> None:
    """Neither is anything looked up for it."""
    out, stream, now = io.StringIO(), io.StringIO(), 0.0
    with Lines(out) as lines, LiveLines(stream) as diagnostics:
        tell = Tell(lines, diagnostics, as_json=False, clock=lambda: now)
        now = 100.0
        tell.progress(lambda: pytest.fail("it was looked up"))
    assert (out.getvalue(), stream.getvalue()) == ("", "")


def test_programs_are_told_every_half_second() -> None:
    """One object per line, from the first half second on."""
    out, now = io.StringIO(), 0.0
    with Lines(out) as lines, LiveLines(_Terminal()) as diagnostics:
        tell = Tell(lines, diagnostics, as_json=True, clock=lambda: now)
        for now in (0.4, 0.5, 0.9, 1.0):  # noqa: B007 - the clock reads it
            tell.progress(lambda: FIGURES)
        tell("moved", "for people", seconds=1)
    found = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [each["event"] for each in found] == ["progress", "progress", "moved"]
    assert found[0].items() >= FIGURES.items()
    assert found[2]["seconds"] == 1


def test_the_end_is_estimated_from_the_speed_of_late() -> None:
    """Each round sends what was written during the one before it."""
    estimate = Estimate()
    assert estimate.left(100, dirty_rate=0, rounds=0, downtime=0) is None
    assert estimate.left(0, dirty_rate=0, rounds=0, downtime=0) == 0
    for second, moved in ((0.0, 0), (5.0, 0), (6.0, 1000), (9.0, 1300), (10.0, 1400)):
        estimate.note(second, moved)
    assert estimate.rate == pytest.approx(100)  # what was slow, or fast, long ago does not count
    assert estimate.left(400, dirty_rate=0, rounds=3, downtime=0) == pytest.approx(4)
    assert estimate.left(400, dirty_rate=50, rounds=2, downtime=0) == pytest.approx(4 + 2 + 1)
    assert estimate.left(400, dirty_rate=50, rounds=9, downtime=2) == pytest.approx(4 + 2)
