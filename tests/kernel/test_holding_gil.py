"""The fill that keeps the GIL: the same answers as the one that does not."""

from __future__ import annotations

import errno
import mmap

import pytest

from aiouffd.kernel import holding_gil
from tests import targets
from tests.targets import PAGE, Target

pytestmark = pytest.mark.root


def fill(target: Target, page: int, pages: int = 1) -> int:
    length = pages * PAGE
    with mmap.mmap(-1, length) as memory:
        memory[:] = bytes([7]) * length
        address = targets.address_of(memory)
        return holding_gil.fill_holding_gil(target.uffd, target.at(page), address, length, 0)


def test_it_fills_says_what_was_done_and_why_not() -> None:
    """Bytes done, a part where a page is in the way, and minus the errno where nothing was."""
    with Target("anon", pages=4) as target:
        assert fill(target, 2) == PAGE
        assert fill(target, 2) == -errno.EEXIST
        assert fill(target, 0, 4) == 2 * PAGE
        assert target.start_read(1).result() == 7
        assert target.start_read(2).result() == 7
