"""Jobs of commands, and how they end."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from aiouffd.cli.jobs import run_job
from aiouffd.errors import UffdError


def test_a_job_gives_the_status() -> None:
    """Its errors come out as they are."""

    async def job() -> int:
        await asyncio.sleep(0)
        return 7

    async def broken() -> int:
        raise UffdError("broken")

    assert run_job(job()) == 7
    with pytest.raises(UffdError, match="broken"):
        run_job(broken())


def test_sigterm_lets_a_job_clean_up() -> None:
    """It is cancelled, as by Ctrl-C; the status is a shell's for that signal."""
    cleaned = []

    async def job() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)
        return 0

    assert run_job(job()) == 143
    assert cleaned == [True]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
