"""Failure policies: what they allow, and how long they wait."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.failure import Action, FailurePolicy


def test_the_default_ends_in_poison() -> None:
    """A SIGBUS is seen, a page of zeros is believed."""
    assert FailurePolicy().then is Action.POISON
    assert FailurePolicy().fallback is None


@pytest.mark.parametrize("retries, backoff, backoff_max", [(-1, 0, 0), (0, -0.1, 0), (0, 0, -0.1)])
def test_negative_settings_are_refused(retries: int, backoff: float, backoff_max: float) -> None:
    """There is nothing that less than no retry or no wait could mean; zero is none."""
    with pytest.raises(ValueError, match="not negative"):
        FailurePolicy(retries=retries, backoff=backoff, backoff_max=backoff_max)
    assert FailurePolicy(retries=0, backoff=0, backoff_max=0).delay(0) == 0


def test_each_wait_is_twice_the_last_up_to_the_longest() -> None:
    """Backoff grows, and stops growing."""
    policy = FailurePolicy(backoff=0.01, backoff_max=0.05)
    assert [policy.delay(attempt) for attempt in range(5)] == [0.01, 0.02, 0.04, 0.05, 0.05]


@given(st.integers(0, 10**6), st.floats(0, 1e6), st.floats(0, 1e6))
def test_no_wait_is_longer_than_the_longest(attempt: int, first: float, longest: float) -> None:
    """However often it was tried, and without an overflow."""
    delay = FailurePolicy(backoff=first, backoff_max=longest).delay(attempt)
    assert 0 <= delay <= longest


def test_a_policy_is_a_value() -> None:
    """One policy may serve many pagers: nobody changes it."""
    policy = FailurePolicy(retries=1)
    assert policy == FailurePolicy(retries=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.retries = 2  # type: ignore[misc]
