"""Flow: what may be on its way follows what the source gives."""

from __future__ import annotations

import random

import pytest

from aiouffd.flow import DELAY, Flow

MS = 0.001


def simulate(flow: Flow, *, bandwidth: float, round_trip: float, reads: int) -> float:
    """Keep the window full over one line; give the longest that a new question waits for it."""
    choose = random.Random(1)
    now = free = 0.0
    on_way: list[tuple[float, int, float]] = []  # comes, bytes, asked for
    longest = 0.0
    for number in range(reads):
        length = max(flow.step, 65536)
        while on_way and sum(size for _, size, _ in on_way) >= flow.window:
            comes, size, asked = on_way.pop(0)
            now = max(now, comes)
            flow.note(size, asked, now)
        if number > reads // 2:
            longest = max(longest, free - now - round_trip)
        free = max(free, now + round_trip / 2) + length / bandwidth * choose.uniform(1, 1.1)
        on_way.append((free + round_trip / 2, length, now))
    return longest


def test_nothing_is_known_at_first() -> None:
    """One read may be on its way, and no more."""
    assert Flow().window == 0


@pytest.mark.parametrize("bandwidth", [1e6, 1e8, 1e10])
@pytest.mark.parametrize("round_trip", [0.00005, 0.001, 0.05])
def test_a_line_is_filled_and_no_more(bandwidth: float, round_trip: float) -> None:
    """The window comes to what the line holds, and what it gives in the time that may be waited."""
    flow = Flow()
    longest = simulate(flow, bandwidth=bandwidth, round_trip=round_trip, reads=2000)
    shortest = 65536 / bandwidth  # a read that is one step takes as long as that in any case
    assert longest < 2 * DELAY + shortest
    if bandwidth * DELAY > 2 * 65536:
        assert flow.window > 0.8 * bandwidth * round_trip


def test_reads_at_the_same_time_are_one_flow() -> None:
    """Four that take a second each beside one another give four times as much as one."""
    alone, beside = Flow(), Flow()
    for number in range(100):
        alone.note(1000, number, number + 1)
        for _ in range(4):
            beside.note(1000, number, number + 1)
    assert beside.window == pytest.approx(4 * alone.window, rel=0.3)


def test_old_answers_are_forgotten() -> None:
    """A line that has become slow is taken for a slow one after a few answers."""
    flow = Flow()
    for number in range(100):
        flow.note(1 << 20, number * MS, (number + 1) * MS)
    quick = flow.window
    for number in range(20):
        flow.note(1 << 20, 1 + number, 2 + number)
    assert flow.window < quick / 100


def test_an_answer_in_no_time_does_no_harm() -> None:
    """Clocks are coarse in places."""
    flow = Flow()
    flow.note(4096, 1.0, 1.0)
    assert flow.window > 0
