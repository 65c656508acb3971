"""Distributions of latency: what they draw, what they refuse, and their way over the wire."""

from __future__ import annotations

import marshal
import math
import random
import statistics
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.testing import latency
from aiouffd.testing.latency import Distribution

SECONDS = st.floats(0, 1e9)


@st.composite
def _tables(draw: st.DrawFn) -> Distribution:
    percents = sorted(draw(st.sets(st.floats(0, 100), min_size=1, max_size=6)))
    seconds = sorted(draw(SECONDS) for _ in percents)
    return latency.percentiles(zip(percents, seconds, strict=True))


DISTRIBUTIONS = st.one_of(
    SECONDS.map(latency.constant),
    st.tuples(SECONDS, SECONDS).map(lambda both: latency.uniform(min(both), max(both))),
    SECONDS.map(latency.exponential),
    st.builds(latency.normal, SECONDS, SECONDS),
    st.lists(SECONDS, min_size=1, max_size=6).map(lambda each: latency.choice(*each)),
    _tables(),
)


@given(DISTRIBUTIONS, st.integers())
def test_samples_are_seconds_and_seeded(distribution: Distribution, number: int) -> None:
    """Never negative, never infinite, and the same again from the same seed."""
    first, second = random.Random(number), random.Random(number)
    samples = [distribution.sample(first) for _ in range(20)]
    assert samples == [distribution.sample(second) for _ in range(20)]
    assert all(math.isfinite(each) and each >= 0 for each in samples)


@given(DISTRIBUTIONS)
def test_what_is_sent_arrives(distribution: Distribution) -> None:
    """A distribution survives marshal."""
    assert latency.from_wire(marshal.loads(marshal.dumps(distribution.to_wire()))) == distribution


def test_samples_follow_their_distribution(seed: int) -> None:
    """Means of many samples are what the parameters say, and bounds hold."""
    source = random.Random(seed)
    many = {
        distribution: [distribution.sample(source) for _ in range(20_000)]
        for distribution in (
            latency.constant(0.5),
            latency.uniform(0.25, 0.75),
            latency.exponential(0.5),
            latency.normal(0.5, 0.01),
            latency.choice(0.0, 1.0),
            latency.percentiles({0: 0.0, 100: 1.0}),
        )
    }
    for distribution, samples in many.items():
        # twelve standard errors of the widest: no seed of a lifetime comes near
        assert abs(statistics.fmean(samples) - 0.5) < 0.05, distribution
    assert {*many[latency.choice(0.0, 1.0)]} == {0.0, 1.0}
    assert all(0.25 <= each <= 0.75 for each in many[latency.uniform(0.25, 0.75)])


@pytest.mark.parametrize(
    ("percent", "seconds"), [(0, 1.0), (50, 1.0), (75, 2.0), (99, 2.96), (100, 3.0)]
)
def test_a_table_is_read_between_its_lines(percent: float, seconds: float) -> None:
    """Straight between two of its pairs, flat outside them."""
    assert latency.percentiles({50: 1, 100: 3}).at(percent) == pytest.approx(seconds)


def test_a_table_may_end_early() -> None:
    """Above the last percentile it stays with its seconds."""
    assert latency.percentiles([(50, 1), (99, 3)]).at(99.5) == 3.0


def test_a_number_is_a_constant() -> None:
    """Where a latency is asked for, seconds will do; a distribution is taken as it is."""
    assert latency.of(0.005) == latency.constant(0.005)
    assert latency.of(2) == latency.constant(2.0)
    assert latency.of(latency.exponential(1)) == latency.exponential(1)


@pytest.mark.parametrize("wrong", ["5ms", None, True, [0.1]])
def test_anything_else_is_no_latency(wrong: object) -> None:
    """The error shows what could stand there."""
    with pytest.raises(TypeError, match=r"a number of seconds or .*latency\.uniform\(0\.001"):
        latency.of(wrong)  # type: ignore[arg-type]  # which is the point


@pytest.mark.parametrize("wrong", [-0.001, math.nan, math.inf, 1e10])
def test_numbers_that_are_no_seconds_are_refused(wrong: float) -> None:
    """By each distribution, with what to give instead."""
    makes: list[Callable[[], Distribution]] = [
        lambda: latency.constant(wrong),
        lambda: latency.uniform(wrong, 1.0),
        lambda: latency.uniform(0.0, wrong),
        lambda: latency.exponential(wrong),
        lambda: latency.normal(1.0, wrong),
        lambda: latency.normal(wrong, 1.0),
        lambda: latency.choice(0.1, wrong),
        lambda: latency.percentiles({50: wrong}),
        lambda: latency.of(wrong),
    ]
    for make in makes:
        with pytest.raises(ValueError, match="give seconds from 0 to 1e"):
            make()


def test_text_is_no_number() -> None:
    """It is refused where it is given, not where it is drawn."""
    with pytest.raises(TypeError, match="mean of Exponential is '5': give a number of seconds"):
        latency.exponential("5")  # type: ignore[arg-type]  # which is the point


def test_what_makes_no_distribution_is_refused() -> None:
    """Each error says what to do."""
    with pytest.raises(ValueError, match="give the lower bound first"):
        latency.uniform(0.2, 0.1)
    with pytest.raises(ValueError, match="give it at least one"):
        latency.choice()
    with pytest.raises(ValueError, match=r"give it pairs such as \{50"):
        latency.percentiles({})
    with pytest.raises(ValueError, match=r"percentile 101\.0 is not between 0 and 100"):
        latency.percentiles({101: 1.0})
    for table in ([(99, 0.1), (50, 0.2)], [(50, 0.1), (50, 0.2)], [(50, 0.2), (99, 0.1)]):
        with pytest.raises(ValueError, match="list each once, in rising order"):
            latency.percentiles(table)


@pytest.mark.parametrize(
    "wire",
    [
        (),
        ("pareto", 1.0),
        (1.0, 2.0),
        ("constant",),
        ("constant", "1"),
        ("constant", 1.0, 2.0),
        ("uniform", 1.0),
        ("percentiles", 50.0),
    ],
)
def test_another_tuple_is_refused(wire: tuple[str | float, ...]) -> None:
    """The error shows it."""
    with pytest.raises(ValueError, match="is no distribution of latency"):
        latency.from_wire(wire)
