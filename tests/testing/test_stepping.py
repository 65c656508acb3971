"""Threads that are killed while they are stepped over."""

from __future__ import annotations

import os
import signal

import pytest

from aiouffd.kernel import tracing
from aiouffd.testing.stepping import Stepper
from tests.targets import wait_until
from tests.tracees import child


def test_the_end_of_a_killed_thread_is_heard() -> None:
    """Who is killed before it is let go of is waited for: its parent could not until then."""
    if tracing.can_trace() is not None:
        pytest.skip("ptrace is not permitted here")

    def work() -> None:
        while True:
            pass

    with child(work) as pid:
        stepper = Stepper(lambda _: None)
        done: list[str] = []

        def kill() -> None:
            done.append("after")
            os.kill(pid, signal.SIGKILL)

        stepper.over(pid, pid, system_call=None, pc=0, let=lambda: None, after=kill)
        wait_until(lambda: stepper.poll() == [] and not len(stepper), "its end")
        assert done == ["after"]
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
