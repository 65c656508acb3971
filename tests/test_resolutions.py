"""Resolutions and failure policies are values."""

from __future__ import annotations

import copy
import typing

import pytest

from aiouffd import resolutions
from aiouffd.resolutions import Continue, Copy, Move, Poison, Resolution, Unprotect, Wake, Zero

EACH: list[Resolution] = [
    Copy(b"x"),
    Zero(),
    Continue(),
    Move(0x1000),
    Unprotect(),
    Poison(),
    Wake(),
]


def test_the_union_is_complete() -> None:
    """Every resolution of the module is in the union that ``match`` is checked against."""
    classes = {
        value
        for value in vars(resolutions).values()
        if isinstance(value, type) and hasattr(value, "__match_args__")
        if value.__module__ == resolutions.__name__
    }
    assert set(typing.get_args(Resolution)) == classes == {type(each) for each in EACH}


def fields_of(resolution: Resolution) -> tuple[str, ...]:
    """The names of a resolution's fields, in order."""
    return type(resolution).__match_args__


@pytest.mark.parametrize("resolution", EACH)
def test_by_default_it_is_the_faulting_page(resolution: Resolution) -> None:
    """Without address and length the page that faulted is meant, and no protection."""
    fields = set(fields_of(resolution))
    for name in fields & {"address", "length"}:
        assert getattr(resolution, name) is None
    for name in fields & {"protect", "allow_holes"}:
        assert getattr(resolution, name) is False


@pytest.mark.parametrize("resolution", EACH)
def test_they_are_values(resolution: Resolution) -> None:
    """Equal when their fields are; nobody changes one on its way."""
    assert resolution == copy.deepcopy(resolution)
    assert hash(resolution) == hash(copy.deepcopy(resolution))
    assert not hasattr(resolution, "__dict__")
    for name in fields_of(resolution):
        with pytest.raises(AttributeError):
            setattr(resolution, name, 1)


def test_positions_follow_the_kernel_structs() -> None:
    """What, then where: ``Copy(data, address)``, ``Zero(length, address)``."""
    assert Copy(b"x", 0x1000, True) == Copy(data=b"x", address=0x1000, protect=True)
    for kind in (Zero, Continue, Unprotect, Poison):
        assert kind(0x2000, 0x1000) == kind(length=0x2000, address=0x1000)
    assert Move(1, 2, 3, True) == Move(source=1, length=2, address=3, allow_holes=True)
