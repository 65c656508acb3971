"""An exploration that would run nothing is refused: it would find nothing, and be believed."""

from __future__ import annotations

from typing import Any

import pytest

from aiouffd.testing import Harness


@pytest.mark.parametrize(
    ("bounds", "kind", "words"),
    [
        ({"orders": 0}, ValueError, "orders is 1 or more, not 0"),
        ({"orders": 2.0}, TypeError, "orders is a whole number"),
        ({"orders": None}, TypeError, "orders is a whole number"),
        ({"seconds": 0}, ValueError, "seconds is above zero"),
        ({"seconds": float("nan")}, ValueError, "seconds is above zero"),
        ({"seconds": None}, TypeError, "seconds is a number"),
        ({"preemptions": -1}, ValueError, "preemptions is 0 or more"),
        ({"preemptions": -1, "seed": 1}, ValueError, "preemptions is 0 or more"),
        ({"preemptions": "2"}, TypeError, "preemptions is a whole number"),
    ],
)
def test_bounds_within_which_nothing_is_run(
    uffd: Harness, bounds: dict[str, Any], kind: type[Exception], words: str
) -> None:
    """Each is refused with what it should be, before anybody runs."""
    ran: list[int] = []
    with pytest.raises(kind, match=words):
        uffd.explore({"a": lambda: ran.append(1)}, **bounds)
    assert not ran


def test_nobody_to_take_turns(uffd: Harness) -> None:
    """Without participants neither form has anything to run."""
    with pytest.raises(ValueError, match="name two participants or more"):
        uffd.explore({})
    with pytest.raises(ValueError, match="name two participants or more"):
        uffd.interleave({}, [])
