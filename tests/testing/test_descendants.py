"""Processes that carry a key are killed, and no others."""

from __future__ import annotations

import os
import signal
import subprocess

from aiouffd.testing import descendants


def test_who_has_the_key_is_killed() -> None:
    """A process and one that it has started end; one with another key, or none, goes on."""
    key = os.urandom(16).hex()
    command = ["sh", "-c", "sleep 1000 & wait"]
    with (
        subprocess.Popen(command, env={**os.environ, "KEY": key}, start_new_session=True) as one,
        subprocess.Popen(["sleep", "1000"], env={**os.environ, "KEY": key[::-1]}) as other,
    ):
        descendants.end([key.encode()])
        assert one.wait(20) == -signal.SIGKILL
        assert other.poll() is None
        other.kill()
    descendants.end([key.encode()])  # nobody is left
