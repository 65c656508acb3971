"""A process that is not to outlive the one that started it."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from aiouffd.kernel.parent import die_with_parent


def test_a_child_ends_with_its_parent() -> None:
    """Its parent is killed, and so is it; nobody has to tell it."""
    reading, writing = os.pipe()
    parent = os.fork()
    if not parent:
        os.close(reading)
        if not os.fork():
            die_with_parent(signal.SIGKILL)
            os.write(writing, b"!")
            signal.pause()
        signal.pause()
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"!"
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        assert os.read(reading, 1) == b""  # the child had the last copy of the other end
    finally:
        os.close(reading)


def test_a_signal_that_there_is_not_is_refused() -> None:
    """The kernel says so; no signal at all is none any more."""
    die_with_parent(0)
    with pytest.raises(OSError) as refused:
        die_with_parent(4242)
    assert refused.value.errno == errno.EINVAL
