"""What a migration's figures say, and that none of them grows without end."""

from __future__ import annotations

import random

import pytest

from aiouffd.events import PageFault
from aiouffd.migration.figures import Round, Sample, SourceFigures, Stalls, Timeline, Times
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
