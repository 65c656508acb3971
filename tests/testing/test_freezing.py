"""Freezes: letting go of who stands, and what is refused with a sentence."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from aiouffd.testing import AsyncFreeze, Freeze, Harness, HarnessError, freeze
from tests.targets import wait_until

CONTENTS = bytes(range(256)) * 32


def test_a_release_that_raises_has_released(library: ctypes.CDLL) -> None:
    """What became of another thread is raised by the release of one, which is let go first."""
    with Harness(timeout=20) as uffd:
        region = uffd.region(2, contents=CONTENTS)
        with region.page(0).freeze() as freeze:
            running = uffd.start(library.load, region.pointer(3))
            frozen = freeze.wait()
            uffd._hear(("trouble", "another thread was let go"))
            with pytest.raises(HarnessError, match="another thread"):
                frozen.release()
            assert frozen.released
            wait_until(lambda: running.done, "the access")
            assert running.result() == 3
            frozen.release()  # does nothing


def test_hundreds_of_freezes_leave_nothing_behind(library: ctypes.CDLL) -> None:
    """A harness that lives long does not grow with each rule that it has had."""
    with Harness(timeout=20) as uffd:
        region = uffd.region()
        for _ in range(300):
            with region.page(0).freeze():
                pass
        assert len(uffd._freezes) < 100
        with region.page(0).freeze() as freeze:
            running = uffd.start(library.load, region.pointer())
            freeze.wait()
        running.result()


def test_a_freeze_that_is_not_armed_has_nobody_to_wait_for(uffd: Harness) -> None:
    """Waiting at it is refused at once, before its block and behind it, in both faces."""
    region = uffd.region(1)
    prepared = region.page(0).freeze()
    with pytest.raises(RuntimeError, match=r"not armed: use 'with place\.freeze\(\) as freeze:'"):
        prepared.wait()
    with pytest.raises(RuntimeError, match="not armed: use 'async with"):
        by_hand(AsyncFreeze(prepared).wait())
    with prepared:
        pass
    with pytest.raises(RuntimeError, match="not armed"):
        prepared.wait()


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"access": "execute"}, ValueError, "access is 'any', 'read' or 'write', not 'execute'"),
        ({"mode": "root"}, ValueError, "mode is 'any', 'user' or 'kernel', not 'root'"),
        ({"nth": 0}, ValueError, "nth counts touches from 1, not 0"),
        ({"nth": 1.5}, TypeError, "nth is a whole number, not 1.5"),
    ],
)
def test_what_no_freeze_can_be_is_refused_where_it_is_written(
    uffd: Harness, wrong: dict[str, Any], error: type[Exception], text: str
) -> None:
    """A wrong argument raises where the freeze is made, not where it is armed."""
    with pytest.raises(error, match=text):
        uffd.region(1).page(0).freeze(**wrong)


def test_all_of_a_region_is_a_place(uffd: Harness, library: ctypes.CDLL) -> None:
    """``freeze(region)`` and ``region.freeze()`` stop who touches any of its pages."""
    region = uffd.region(2, contents=CONTENTS)
    makers: list[Callable[[], Freeze]] = [lambda: freeze(region), region.freeze]
    for make in makers:
        with make() as everywhere:
            running = uffd.start(library.load, region.pointer(4099))
            assert everywhere.wait().touch.offset == 4099
            everywhere.frozen[0].release()
            assert running.result() == 3
        region.rearm()


@pytest.mark.parametrize("wrong", ["packet", 0, None])
def test_what_is_no_place_is_refused(wrong: Any) -> None:
    """What a freeze cannot stop says what it could have been given."""
    with pytest.raises(TypeError, match=r"freeze a place: region\.page\(0\) or region\.all, not"):
        freeze(wrong)


def test_async_forms_elsewhere_say_whose_they_are(uffd: Harness) -> None:
    """Without asyncio's loop, as on trio, the async forms say what to use, and arm nothing."""
    prepared = uffd.region(1).page(0).freeze()
    running = uffd.start(int)
    for form in (prepared.__aenter__(), running.async_result()):
        with pytest.raises(RuntimeError, match=r"are asyncio's.* trio use .*to_thread\.run_sync"):
            by_hand(form)
    assert "not armed" in repr(prepared)


def by_hand(form: Coroutine[Any, Any, object]) -> None:
    """Begin a coroutine as a loop that is not asyncio's would."""
    try:
        form.send(None)
    finally:
        form.close()
