"""Distributions of latency: how long an access to slow memory takes.

Knows: how to draw a number of seconds from each distribution.
Must not know: who waits.

Laws of this file:

* A distribution is a value: the same ``random.Random`` gives the same seconds again.
* No sample is negative, none is infinite.
* On the wire it is a flat tuple: its kind, then its numbers.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeAlias

Wire: TypeAlias = tuple[str | float, ...]

_LONGEST: Final = 1e9  # thirty years; what is drawn around it is still a finite number


@dataclass(frozen=True, slots=True)
class Constant:
    """The same each time, in seconds."""

    seconds: float

    def __post_init__(self) -> None:
        _check(self, "seconds", self.seconds)

    def sample(self, source: random.Random) -> float:  # noqa: ARG002 - as the others take one
        return self.seconds

    def to_wire(self) -> Wire:
        return ("constant", self.seconds)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Anything between two bounds, in seconds, each as likely as the other."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check(self, "low", self.low)
        _check(self, "high", self.high)
        if self.low > self.high:
            raise ValueError(
                f"uniform latency from {self.low!r} to {self.high!r} seconds:"
                " give the lower bound first"
            )

    def sample(self, source: random.Random) -> float:
        return source.uniform(self.low, self.high)

    def to_wire(self) -> Wire:
        return ("uniform", self.low, self.high)


@dataclass(frozen=True, slots=True)
class Exponential:
    """Mostly short, seldom long, without a bound: as of independent events.  In seconds."""

    mean: float

    def __post_init__(self) -> None:
        _check(self, "mean", self.mean)

    def sample(self, source: random.Random) -> float:
        return source.expovariate(1.0) * self.mean

    def to_wire(self) -> Wire:
        return ("exponential", self.mean)


@dataclass(frozen=True, slots=True)
class Normal:
    """Around a mean, in seconds; what would be below zero is zero."""

    mean: float
    deviation: float

    def __post_init__(self) -> None:
        _check(self, "mean", self.mean)
        _check(self, "deviation", self.deviation)

    def sample(self, source: random.Random) -> float:
        return max(source.gauss(self.mean, self.deviation), 0.0)

    def to_wire(self) -> Wire:
        return ("normal", self.mean, self.deviation)


@dataclass(frozen=True, slots=True)
class Choice:
    """One of these, in seconds, each as likely as the other; repeat one to have it more often."""

    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ValueError("a choice of latencies is empty: give it at least one, in seconds")
        for each in self.seconds:
            _check(self, "seconds", each)

    def sample(self, source: random.Random) -> float:
        return source.choice(self.seconds)

    def to_wire(self) -> Wire:
        return ("choice", *self.seconds)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """As measured: pairs of a percentile and its seconds, both growing.

    Between two pairs a line is drawn; below the first and above the last it is flat.
    """

    table: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if not self.table:
            raise ValueError(
                "a table of percentiles is empty: give it pairs such as {50: 0.001, 99: 0.02}"
            )
        for percent, seconds in self.table:
            if not 0 <= percent <= 100:
                raise ValueError(f"percentile {percent!r} is not between 0 and 100")
            _check(self, f"percentile {percent:g}", seconds)
        for (lower, before), (upper, after) in pairwise(self.table):
            if lower >= upper or before > after:
                raise ValueError(
                    f"percentiles {lower:g} ({before!r} s) and {upper:g} ({after!r} s):"
                    " list each once, in rising order, and a higher one is not faster"
                )

    def sample(self, source: random.Random) -> float:
        return self.at(source.uniform(0.0, 100.0))

    def at(self, percent: float) -> float:
        """Give the seconds that so many percent of all samples do not exceed."""
        above = bisect_right(self.table, percent, key=_percent)
        if above == 0:
            return self.table[0][1]
        if above == len(self.table):
            return self.table[-1][1]
        (lower, low), (upper, high) = self.table[above - 1], self.table[above]
        # min: the last bit of a product may lie above what it is a share of
        return min(low + (high - low) * ((percent - lower) / (upper - lower)), high)

    def to_wire(self) -> Wire:
        return ("percentiles", *(number for pair in self.table for number in pair))


Distribution: TypeAlias = Constant | Uniform | Exponential | Normal | Choice | Percentiles
KINDS: Final = (Constant, Uniform, Exponential, Normal, Choice, Percentiles)


def constant(seconds: float) -> Constant:
    """Take the same time for each access.

    Raises:
        ValueError: It is negative or not finite; so for all functions here.
    """
    return Constant(seconds)


def uniform(low: float, high: float) -> Uniform:
    """Take anything from ``low`` to ``high`` seconds."""
    return Uniform(low, high)


def exponential(mean: float) -> Exponential:
    """Take ``mean`` seconds on the average, mostly less, seldom much more."""
    return Exponential(mean)


def normal(mean: float, deviation: float) -> Normal:
    """Take about ``mean`` seconds, with a standard deviation; never less than 0."""
    return Normal(mean, deviation)


def choice(*seconds: float) -> Choice:
    """Take one of these, each as likely as the other: ``choice(0, 0, 0, 0.1)``."""
    return Choice(seconds)


def percentiles(
    table: Mapping[int, float] | Mapping[float, float] | Iterable[tuple[float, float]],
) -> Percentiles:
    """Take what was measured: ``percentiles({50: 0.001, 99: 0.02, 100: 0.4})``.

    Args:
        table: Percentiles with their seconds, both growing.
    """
    pairs = table.items() if isinstance(table, Mapping) else table
    return Percentiles(tuple((float(percent), float(seconds)) for percent, seconds in pairs))


def of(latency: float | Distribution) -> Distribution:
    """Give a distribution for what a user may write: a number of seconds, or a distribution.

    Raises:
        TypeError: It is something else.
        ValueError: The number is negative or not finite.
    """
    if isinstance(latency, KINDS):
        return latency
    if type(latency) in {int, float}:  # not bool
        return Constant(float(latency))
    raise TypeError(
        "a latency is a number of seconds or a distribution such as"
        f" latency.uniform(0.001, 0.01), not {latency!r}"
    )


def from_wire(wire: Wire) -> Distribution:
    """Make a distribution of what its ``to_wire`` gave.

    Raises:
        ValueError: There is none of this kind, or its numbers are not what they should be.
    """
    if all(isinstance(each, (int, float)) for each in wire[1:]):
        match wire:
            case ("constant", float() | int() as seconds):
                return Constant(seconds)
            case ("uniform", float() | int() as low, float() | int() as high):
                return Uniform(low, high)
            case ("exponential", float() | int() as mean):
                return Exponential(mean)
            case ("normal", float() | int() as mean, float() | int() as deviation):
                return Normal(mean, deviation)
            case ("choice", *seconds):
                return Choice(tuple(map(float, seconds)))
            case ("percentiles", *numbers) if len(numbers) % 2 == 0:
                pairs = map(float, numbers)
                return percentiles(zip(pairs, pairs, strict=True))
    raise ValueError(f"{wire!r} is no distribution of latency: its kind, then its numbers")


def _check(distribution: object, name: str, seconds: float) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(
            f"{name} of {type(distribution).__name__} is {seconds!r}: give a number of seconds"
        )
    if not 0 <= seconds <= _LONGEST:
        raise ValueError(
            f"{name} of {type(distribution).__name__} is {seconds!r}:"
            f" give seconds from 0 to {_LONGEST:g} (0.005 is five milliseconds)"
        )


def _percent(pair: tuple[float, float]) -> float:
    return pair[0]
