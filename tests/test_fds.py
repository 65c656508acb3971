"""OwnedFd: closed once, handed on once, never lost in silence."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import pickle
import warnings
from collections.abc import Callable

import pytest

from aiouffd.errors import ClosedError
from aiouffd.events import Forked
from aiouffd.fds import OwnedFd


def is_open(fd: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


def new() -> int:
    """Some open descriptor."""
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def test_close_closes_once() -> None:
    """A second close must not hit whoever has the number by then."""
    owned = OwnedFd(new())
    number = owned.fileno()
    owned.close()
    assert owned.closed
    assert not is_open(number)
    again = new()
    try:
        assert again == number  # the kernel gives the lowest free number
        owned.close()
        assert is_open(again)
    finally:
        os.close(again)


def test_with_closes() -> None:
    """Leaving the block closes, also by an exception."""
    with OwnedFd(new()) as owned:
        number = owned.fileno()
        assert is_open(number)
    assert not is_open(number)


def test_detach_hands_the_duty_on() -> None:
    """After it the number is open, and somebody else's."""
    owned = OwnedFd(new())
    number = owned.detach()
    try:
        assert owned.closed
        owned.close()
        assert is_open(number)
    finally:
        os.close(number)


def test_dup_has_its_own_life() -> None:
    """The second descriptor is of the same file, and stays when the first is closed."""
    with OwnedFd(new()) as first:
        second = first.dup()
        assert os.path.sameopenfile(first.fileno(), second.fileno())
        assert not os.get_inheritable(second.fileno())
    with second:
        assert is_open(second.fileno())


@pytest.mark.parametrize("use", [OwnedFd.fileno, OwnedFd.detach, OwnedFd.dup])
@pytest.mark.parametrize("end", [OwnedFd.close, lambda owned: os.close(owned.detach())])
def test_closed_refuses(use: Callable[[OwnedFd], object], end: Callable[[OwnedFd], object]) -> None:
    """What was closed or handed on has no number any more."""
    owned = OwnedFd(new())
    end(owned)
    with pytest.raises(ClosedError, match="closed or handed on"):
        use(owned)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_duty_is_not_copied(make: Callable[[object], object]) -> None:
    """A copy would close the same number again; an event that has one is no record of it."""
    with OwnedFd(new()) as owned, pytest.raises(TypeError, match="one owner"):
        make(owned)
    with OwnedFd(new()) as owned, pytest.raises(TypeError, match="one owner"):
        dataclasses.asdict(Forked(owned))


def test_repr_shows_the_state() -> None:
    """The number while it is open."""
    with OwnedFd(new()) as owned:
        assert repr(owned) == f"<OwnedFd {owned.fileno()}>"
    assert repr(owned) == "<OwnedFd closed>"


def test_a_lost_one_warns_and_is_closed() -> None:
    """Who forgets one hears of it, with its number."""
    number = new()
    owned = OwnedFd(number)
    with pytest.warns(ResourceWarning, match=f"OwnedFd {number}. was never closed"):
        del owned
    assert not is_open(number)


def test_a_lost_one_is_closed_where_warnings_are_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The warning may raise; the descriptor is closed all the same."""
    raised: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda args: raised.append(args.exc_type))
    number = new()
    owned = OwnedFd(number)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del owned
        gc.collect()
    assert raised == [ResourceWarning]
    assert not is_open(number)


def test_negative_numbers_are_refused() -> None:
    """A failed call's -1 is no descriptor, and nothing is warned about later."""
    with pytest.raises(ValueError, match="not negative: -1"):
        OwnedFd(-1)
