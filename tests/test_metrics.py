"""Counters, the histogram, and the observer that keeps both."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.events import PageFault, Remapped, Removed
from aiouffd.metrics import Counters, Histogram, Metrics, Observer
from aiouffd.ranges import Range

FAULT = PageFault(0x7000, 0, 4096)

durations = st.lists(st.integers(0, 10**12), min_size=1, max_size=50)


def filled(values: list[int]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    return histogram


def test_counters_start_at_zero() -> None:
    """Each by its name, in the order of their definition."""
    names = [field.name for field in dataclasses.fields(Counters)]
    assert Counters().as_dict() == dict.fromkeys(names, 0)
    assert Counters(faults=3, ended=2).as_dict()["faults"] == 3


@given(durations)
def test_a_bucket_holds_a_power_of_two(values: list[int]) -> None:
    """Each duration lies below its bucket's bound and not below half of it."""
    histogram = filled(values)
    expected: dict[int, int] = {}
    for value in values:
        bound = 1
        while bound <= value:
            bound *= 2
        expected[bound] = expected.get(bound, 0) + 1
    assert dict(histogram) == expected
    assert list(histogram) == sorted(histogram)
    assert (histogram.count, histogram.total_ns) == (len(values), sum(values))


@given(durations, st.floats(0, 1))
def test_a_quantile_is_bounded_from_above(values: list[int], q: float) -> None:
    """The true quantile lies below what is given, and not below half of it."""
    bound = filled(values).quantile(q)
    values.sort()
    true = next(value for n, value in enumerate(values, 1) if n >= q * len(values))
    assert bound // 2 <= true < bound


def test_no_quantile_of_nothing() -> None:
    """An empty histogram says zero."""
    assert Histogram().quantile(0.5) == 0
    assert list(Histogram()) == []


@pytest.mark.parametrize("value", [(1 << 62) - 1, 1 << 62, 1 << 63, (1 << 64) - 1])
def test_every_64_bit_duration_has_its_bucket(value: int) -> None:
    """There is no duration of a clock that cannot be counted."""
    histogram = filled([value])
    assert histogram.count == 1
    assert histogram.quantile(1) == 1 << value.bit_length()


def test_metrics_is_an_observer_that_counts() -> None:
    """Outcomes, events and failures by name, and how long the faults took."""
    metrics = Metrics()
    observer: Observer = metrics
    for outcome, elapsed_ns in (("copy", 900), ("copy", 1100), ("gone", 5)):
        observer.begin(FAULT)
        observer.end(FAULT, outcome, elapsed_ns)
    observer.event(Removed(Range(0, 4096)))
    observer.event(Remapped(0, 4096, 4096))
    observer.event(Remapped(0, 4096, 4096))
    observer.failure(FAULT, KeyError("x"))
    observer.failure(FAULT, KeyError("y"))
    assert metrics.outcomes == {"copy": 2, "gone": 1}
    assert metrics.events == {"Removed": 1, "Remapped": 2}
    assert metrics.failures == {"KeyError": 2}
    assert (metrics.latency.count, metrics.latency.total_ns) == (3, 2005)


@given(durations, durations)
def test_merged_histograms_are_the_histogram_of_both(one: list[int], two: list[int]) -> None:
    """Nothing is lost and nothing is counted twice."""
    both, other = filled(one), filled(two)
    both.merge(other)
    together = filled(one + two)
    assert list(both) == list(together)
    assert (both.count, both.total_ns) == (together.count, together.total_ns)
    assert list(other) == list(filled(two))


def test_counters_and_metrics_add_up() -> None:
    """What ended is added to what lives."""
    total = Counters(faults=3, joined=1)
    total.add(Counters(faults=2, copied_bytes=4096))
    assert (total.faults, total.joined, total.copied_bytes, total.ended) == (5, 1, 4096, 0)
    first, second = Metrics(), Metrics()
    first.end(FAULT, "copy", 5)
    for outcome in ("copy", "zero"):
        second.end(FAULT, outcome, 7)
    second.event(Removed(Range(0, 4096)))
    second.failure(FAULT, RuntimeError())
    first.merge(second)
    assert first.outcomes == {"copy": 2, "zero": 1}
    assert first.events == {"Removed": 1}
    assert first.failures == {"RuntimeError": 1}
    assert first.latency.count == 3
