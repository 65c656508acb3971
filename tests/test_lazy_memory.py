"""LazyMemory: what every kind of access gets, in child processes with a hard time limit."""

from __future__ import annotations

import pytest

from tests import lazy_access, lazy_hygiene, lazy_raising, lazy_refused
from tests.lazy_harness import check, loops

pytestmark = pytest.mark.limit(300)


@pytest.mark.parametrize("loop", loops())
@pytest.mark.parametrize("kind", lazy_access.CASES)
def test_access_is_served(kind: str, loop: str) -> None:
    """Every kind of access gets what plain memory would have given it, without a deadlock."""
    check("tests.lazy_access", loop, kind)


@pytest.mark.parametrize("loop", loops())
@pytest.mark.parametrize("kind", lazy_refused.CASES)
def test_system_calls_are_refused_at_once_and_served_after_ensure(kind: str, loop: str) -> None:
    """A system call on a missing page fails with EFAULT; after ``ensure`` it works."""
    check("tests.lazy_refused", loop, kind)


@pytest.mark.parametrize("loop", loops())
@pytest.mark.parametrize("kind", lazy_raising.CASES)
def test_failed_access_raises_where_it_was_made(kind: str, loop: str) -> None:
    """What cannot be brought is an exception in the frame that touched it; nothing is left."""
    check("tests.lazy_raising", loop, kind)


@pytest.mark.parametrize("loop", loops())
@pytest.mark.parametrize("kind", lazy_hygiene.CASES)
def test_lives_with_signals_locks_forks_and_other_users(kind: str, loop: str) -> None:
    """Nothing that a process does besides turns an access into a hang or into wrong bytes."""
    check("tests.lazy_hygiene", loop, kind)
