"""The helper's loop, on descriptors of this process."""

from __future__ import annotations

import fcntl
import os

from aiouffd.testing.turning import Turning

HIGH = 1100  # beyond what select(2) takes


def test_descriptors_beyond_those_of_select_are_watched() -> None:
    """A descriptor above 1,024 calls back, and what is due comes in its order beside it."""
    read, write = os.pipe()
    high = fcntl.fcntl(read, fcntl.F_DUPFD_CLOEXEC, HIGH)
    turning = Turning()
    said: list[object] = []

    def ring() -> None:
        os.write(write, b"x")

    def heard() -> None:
        said.append(os.read(high, 1))
        turning.stop()

    turning.watch(high, heard)
    turning.after(2_000_000, ring)
    turning.after(0, lambda: said.append("first"))
    turning.after(1_000_000, lambda: said.append("second"))
    turning.run(lambda: None)
    turning.forget(high)
    turning.close()
    assert high >= HIGH
    assert said == ["first", "second", b"x"]
    for each in (read, write, high):
        os.close(each)
