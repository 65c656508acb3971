"""Programs that a loop waits for."""

from __future__ import annotations

import asyncio
import subprocess

import pytest

from aiouffd.testing import Harness


async def test_the_end_of_a_program_is_awaited(uffd: Harness) -> None:
    """The loop goes on meanwhile; the status is the program's, a second time too."""
    program = uffd.program(["cat"], {"R": uffd.region()}, stdin=subprocess.PIPE)
    waiting = asyncio.create_task(program.async_wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    assert program.stdin is not None
    program.stdin.close()
    assert await waiting == 0
    assert await program.async_wait() == 0


async def test_a_wait_may_be_given_up(uffd: Harness) -> None:
    """By its time limit or by cancellation: the program runs on, and may be waited for again."""
    program = uffd.program(["cat"], {"R": uffd.region()}, stdin=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        await program.async_wait(0.01)
    waiting = asyncio.create_task(program.async_wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert program.poll() is None
    program.kill()
    assert await program.async_wait() == -9
    assert program.stdin is not None
    program.stdin.close()
