"""What a started function raises is heard of, whoever asks for it or not."""

from __future__ import annotations

import pytest

from aiouffd.testing import FreezeTimeout, Harness, HarnessError, Running


def broken() -> None:
    raise TypeError("the worker is broken")


def ended(running: Running[None]) -> Running[None]:
    """Wait for its end without asking how it ended."""
    running.thread.join()
    return running


def test_an_error_that_nobody_asked_for_is_raised_at_the_end() -> None:
    """By close, with the stack of the function that raised."""
    with pytest.raises(HarnessError) as caught, Harness() as uffd:
        ended(uffd.start(broken))
        ended(uffd.start(print, end=""))  # which makes the harness forget nothing
    text = str(caught.value)
    assert "broken (tid " in text
    assert "nobody has asked for its result()" in text
    assert "in broken" in text
    assert "TypeError: the worker is broken" in text


def test_an_error_that_was_asked_for_is_not_raised_again() -> None:
    """Who has had it from result has seen it."""
    with Harness() as uffd, pytest.raises(TypeError):
        uffd.start(broken).result()


async def test_nor_is_one_that_was_awaited() -> None:
    """The same of async_result."""
    with Harness() as uffd, pytest.raises(TypeError):
        await uffd.start(broken).async_result()


def test_an_error_is_a_note_where_the_test_fails_anyway() -> None:
    """What the test raised comes first."""
    with pytest.raises(ZeroDivisionError) as caught, Harness() as uffd:
        ended(uffd.start(broken))
        raise ZeroDivisionError
    assert "the worker is broken" in caught.value.__notes__[0]


def test_who_waits_for_a_thread_that_has_raised_is_told() -> None:
    """FreezeTimeout names it with its error, which is then no longer lost."""
    with Harness() as uffd:
        region = uffd.region()
        running = ended(uffd.start(broken))
        with region.page(0).freeze() as freeze, pytest.raises(FreezeTimeout) as caught:
            freeze.wait(0.01)
    line = f"broken (tid {running.tid}) has ended: TypeError: the worker is broken"
    assert line in str(caught.value)
