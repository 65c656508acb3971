"""What a migration's figures say, and that none of them grows without end."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.events import PageFault
from aiouffd.migration.figures import (
    Round,
    Sample,
    SourceFigures,
    Stalls,
    Timeline,
    Times,
    told_by_destination,
    told_by_source,
)
from aiouffd.migration.wire import PREAMBLE, Decoder, Encoder, Kind


def test_quantiles_are_right_to_three_per_cent(seed: int) -> None:
    """Of any durations, from nanoseconds to hours."""
    rng = random.Random(seed)
    times = Times()
    values = sorted(int(10 ** rng.uniform(0, 13)) for _ in range(2000))
    for value in values:
        times.add(value)
    assert times.count == 2000
    assert times.longest == values[-1] * 1e-9
    for q in (0.0, 0.5, 0.99, 1.0):
        exact = values[int(q * 1999)] * 1e-9
        assert times.quantile(q) == pytest.approx(exact, rel=0.032)


def test_nothing_measured_is_zero() -> None:
    """Quantiles of no durations."""
    assert (Times().quantile(0.5), Times().longest) == (0.0, 0.0)


def test_a_wait_lies_in_the_steps_that_it_reaches_over() -> None:
    """And its fault in the one in which it ended."""
    timeline = Timeline()
    timeline.add(7, 0.04, 0.12)
    timeline.add(8, -1.0, 0.01)  # began before the program was said to run
    value = timeline.as_dict()
    assert value["step"] == 0.05
    assert value["faults"] == [1, 0, 1]
    assert value["stall"]["7"] == pytest.approx([0.01, 0.05, 0.02])
    assert value["stall"]["8"] == pytest.approx([0.01, 0.0, 0.0])


def test_a_timeline_widens_its_steps_and_loses_nothing() -> None:
    """However long it goes on, and however many threads there are, its size is bounded."""
    timeline = Timeline()
    for number in range(5000):
        timeline.add(number % 100, number * 0.1, number * 0.1 + 0.08)
    value = timeline.as_dict()
    assert len(value["faults"]) <= 200
    assert sum(value["faults"]) == 5000
    assert len(value["stall"]) == 17
    assert sum(map(sum, value["stall"].values())) == pytest.approx(400, rel=0.01)


def _stalled(threads: int) -> Stalls:
    stalls = Stalls()
    for thread in range(threads):
        fault = PageFault(4096, 0, 4096, 0, 100_000 + thread, 4096)
        stalls.begin(fault)
        stalls.end(fault, "copy", 1_234_567 + thread)
    return stalls


def test_stalls_are_summed_by_thread() -> None:
    """And quantiles are over all of them."""
    value = _stalled(3).as_dict()
    assert value["faults"] == 3
    assert value["stall_by_thread"]["100002"] == pytest.approx(0.001234569)
    assert value["stall"] == pytest.approx(sum(value["stall_by_thread"].values()))
    assert value["p50"] == pytest.approx(0.001234568, rel=0.032)
    assert "timeline" not in value


def test_a_threads_time_is_not_counted_twice() -> None:
    """Waits that overlap in the books are one wait; of unknown threads they are two."""
    stalls = Stalls()
    for thread in (7, 7, 0, 0):
        stalls.end(PageFault(4096, 0, 4096, 0, thread, 4096), "copy", 10**9)
    assert stalls.by_thread[7] == pytest.approx(1, abs=0.2)
    assert stalls.by_thread[0] == pytest.approx(2)
    assert stalls.times.count == 4


def test_what_is_told_to_the_other_side_fits_into_a_frame() -> None:
    """After hours, with thousands of threads and hundreds of rounds."""
    stalls = _stalled(5000)
    for thread in range(64):
        for step in range(200):
            stalls.timeline.add(1_000_000 + thread, step * 0.05, step * 0.05 + 0.0123456)
    figures = SourceFigures(memory_bytes=1 << 40)
    for number in range(5000):
        figures.rounds.append(Round(number, 1 / 3, 1 << 39, 1 << 39, 1e9 / 3))
        figures.sample(Sample(number / 3, "copying", 1 << 39, 1 << 39, 1 << 39, 1 << 39, 0.1, 0))
    assert len(figures.samples) <= 4096
    done = Encoder().json(Kind.DONE, stalls.as_dict(timeline=True))
    end = Encoder().json(Kind.END, {"figures": figures.as_dict(short=True)})
    for from_source, data in ((False, done), (True, end)):
        decoder = Decoder(from_source=from_source)
        frames = [*decoder.feed(PREAMBLE), *decoder.feed(data)]
        assert len(frames) == 1
    assert len(figures.as_dict()["rounds"]) == 5000


# --- what the other side says of itself ---------------------------------------------------------

names = st.sampled_from(
    ["step", "ran_after", "faults", "stall", "rounds", "seconds", "number", "1", "\x1b[2J"]
)


def test_what_each_side_tells_comes_as_it_was() -> None:
    """All of it, through JSON."""
    figures = SourceFigures(memory_bytes=4096, downtime=0.5)
    figures.rounds.append(Round(1, 0.5, 10, 20, 40.0))
    ended = {"figures": figures.as_dict(short=True)}
    progress = {"stage": "copying", "round": 2, "left_bytes": 4096, "dirty_rate": 1.5}
    for value in (ended, progress, {}):
        assert told_by_source(json.loads(json.dumps(value))) == value
    stalls = Stalls()
    stalls.note_running()
    value = stalls.as_dict(timeline=True) | {"stage": "done", "received_bytes": 5, "left_bytes": 0}
    value["stall_by_thread"] = {"17": 0.25}
    assert told_by_destination(json.loads(json.dumps(value))) == value


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
        max_leaves=12,
    )
)
def test_what_has_other_types_is_left_out(value: object) -> None:
    """Whoever shows it need not look again."""
    for told in (
        told_by_source({"figures": value, "dirty_rate": value, "stage": value}),
        told_by_destination({"timeline": value, "stall_by_thread": value, "stall": value}),
    ):
        assert told.get("stage", "").isprintable()
        assert abs(told.get("dirty_rate", 0) + told.get("stall", 0)) < 1 << 64
        for each in told.get("stall_by_thread", {}).values():
            assert round(each) <= 1 << 63
        for passed in told.get("figures", {}).get("rounds", []):
            assert set(passed) == {field.name for field in dataclasses.fields(Round)}
        timeline = told.get("timeline")
        if timeline is not None:
            assert timeline["step"] > 0
            assert len(json.dumps(told, allow_nan=False)) > 0
