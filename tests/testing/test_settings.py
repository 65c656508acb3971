"""What holds for a test: each setting, who is asked first, and what a mistake is told."""

from __future__ import annotations

import mmap
from collections.abc import Mapping

import pytest

from aiouffd.testing import latency
from aiouffd.testing.settings import (
    ARGUMENTS,
    BACKENDS,
    Settings,
    SettingsError,
    of_marker,
    settle,
)

PAGE = mmap.PAGESIZE


@pytest.mark.parametrize(
    "given, settled",
    [
        ({"timeout": 2}, 2.0),
        ({"timeout": 0.25}, 0.25),
        ({"timeout": "1.5"}, 1.5),
        ({"seed": 0}, 0),
        ({"seed": "7"}, 7),
        ({"seed": "0x2a"}, 42),
        *(({"backend": name}, name) for name in BACKENDS),
        ({"pages": 3}, 3),
        ({"memory": "anon"}, "anon"),
        ({"contents": b"abc"}, b"abc"),
        ({"contents": bytearray(b"abc")}, b"abc"),
        ({"needs": "fork"}, ("fork",)),
        ({"needs": ["fork", "trace"]}, ("fork", "trace")),
        pytest.param({"needs": iter(("fork", "trace"))}, ("fork", "trace"), id="iterator"),
        ({"latency": 0.5}, latency.constant(0.5)),
        ({"latency": latency.uniform(0, 1)}, latency.uniform(0, 1)),
        ({"fail_at": 0}, (0,)),
        ({"fail_at": (0, 2)}, (0, 2)),
        ({"fail_at": range(2)}, (0, 1)),
    ],
    ids=str,
)
def test_what_may_be_given(given: Mapping[str, object], settled: object) -> None:
    """Each argument is read into what the harness takes."""
    assert list(of_marker((), given).values()) == [settled]


@pytest.mark.parametrize(
    "given",
    [
        *({"timeout": value} for value in (0, -1, True, "soon", None, float("inf"), float("nan"))),
        *({"seed": value} for value in (-1, 1.5, True, "seven", "-3", None)),
        *({"backend": value} for value in ("thread", "", 1, None)),
        *({"pages": value} for value in (0, -1, 1.0, True, "4", None)),
        *({"memory": value} for value in ("ram", 1, None)),
        *({"contents": value} for value in ("text", 5, None)),
        *({"needs": value} for value in ((), 5, ["fork", 5], None)),
        *({"latency": value} for value in (-1, True, "slow", None, float("nan"))),
        *({"fail_at": value} for value in (-1, True, 0.5, "0", (), (0, -1), (True,), None)),
    ],
    ids=str,
)
def test_what_may_not(given: Mapping[str, object]) -> None:
    """A mistake names the argument, and shows what was given."""
    ((name, value),) = given.items()
    with pytest.raises(SettingsError, match=rf"^{name} ") as caught:
        of_marker((), given)
    shown = repr(value)
    assert shown in str(caught.value)


def test_an_unknown_argument_is_told_with_those_there_are() -> None:
    """The one that was meant comes first, where one is near."""
    with pytest.raises(
        SettingsError, match="there is no argument 'memroy': did you mean 'memory'"
    ) as near:
        of_marker((), {"memroy": "anon"})
    with pytest.raises(SettingsError, match="there is no argument 'xyz': there are timeout") as far:
        of_marker((), {"xyz": 1})
    for name in ARGUMENTS:
        assert name in str(near.value)
        assert name in str(far.value)


def test_arguments_without_names_are_refused() -> None:
    """``@pytest.mark.uffd(4)`` could mean anything."""
    with pytest.raises(SettingsError, match=r"by name only, such as pages=4; not 4, 'x'"):
        of_marker((4, "x"), {})


def test_the_nearest_wins() -> None:
    """What an earlier source has, a later one does not change; None says nothing."""
    settings = settle({"timeout": 1.0}, {"timeout": 2.0, "pages": 2}, {"pages": None, "seed": 5})
    assert settings == Settings(timeout=1.0, pages=2, seed=5)


def test_needs_add_up() -> None:
    """What a class needs, its tests need too; each once, in order."""
    settings = settle({"needs": ("fork", "trace")}, {"needs": ("trace", "hugetlb")}, {})
    assert settings.needs == ("fork", "trace", "hugetlb")


def test_nothing_said_is_the_defaults() -> None:
    """Ten seconds, the back end that fits, one page of shared memory."""
    settings = settle({}, {})
    assert settings == Settings()
    assert (settings.timeout, settings.backend, settings.memory) == (10.0, "auto", "shmem")
    assert settings.region_pages == 1


@pytest.mark.parametrize(
    "given, pages",
    [
        ({"contents": b""}, 1),
        ({"contents": bytes(PAGE)}, 1),
        ({"contents": bytes(PAGE + 1)}, 2),
        ({"contents": bytes(PAGE + 1), "pages": 4}, 4),
        ({"contents": bytes(PAGE + 1), "memory": "hugetlb"}, 1),
    ],
    ids=["empty", "one", "two", "as asked", "huge"],
)
def test_a_region_has_room_for_its_contents(given: Mapping[str, object], pages: int) -> None:
    """Without a number of pages there are as many as the contents take."""
    assert settle(of_marker((), given)).region_pages == pages


def test_a_page_that_is_to_fail_must_be_there() -> None:
    """The class may say which page fails, and the test how many there are: only both tell."""
    assert settle({"pages": 3}, {"fail_at": (0, 2)}).fail_at == (0, 2)
    with pytest.raises(SettingsError, match="fail_at names page 2, but the region has 1"):
        settle({"fail_at": (0, 2)})
