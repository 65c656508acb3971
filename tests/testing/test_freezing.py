"""Letting go of who stands, also when the harness has something else to say."""

from __future__ import annotations

import ctypes

import pytest

from aiouffd.testing import Harness, HarnessError
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
