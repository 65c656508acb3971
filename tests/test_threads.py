"""Calls in threads: cancelled or not, they end before their caller does."""

from __future__ import annotations

import asyncio
import threading

import pytest

from aiouffd.threads import in_thread


async def test_what_a_thread_gives_or_raises_comes_back() -> None:
    """As a plain call would."""
    assert await in_thread(int, "12", base=3) == 5
    with pytest.raises(ValueError, match="invalid literal"):
        await in_thread(int, "x")


async def test_a_cancelled_call_ends_first() -> None:
    """However often it is cancelled."""
    begun, gate = threading.Event(), threading.Event()
    ended: list[bool] = []

    def work() -> None:
        begun.set()
        ended.append(gate.wait(10))

    call = asyncio.ensure_future(in_thread(work))
    await asyncio.to_thread(begun.wait, 10)
    for _ in range(3):
        call.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not call.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert ended == [True]
