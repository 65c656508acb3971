"""Sums over many sessions: the same in steps as at once, and the loop turns meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from aiouffd.protocols import firecracker
from aiouffd.server import Server
from aiouffd.sources.buffer import BufferSource
from aiouffd.status import Status
from aiouffd.testing.sources import image
from aiouffd.totals import Totals
from tests.stand_in_vmm import PAGE, StandInVmm, eventually

SIZE: Final = 8 * PAGE
MANY: Final = 100


async def turns_during(work: asyncio.Task[Totals]) -> int:
    """Count the turns of the loop until something is done."""
    turns = 0
    while not work.done():
        await asyncio.sleep(0)
        turns += 1
    return turns


async def test_many_sessions_are_added_in_steps(tmp_path: Path) -> None:
    """Law 10: a scrape of hundreds of sessions lets the loop turn, and gives the same sums."""
    source = BufferSource(image(SIZE))
    async with (
        Server(tmp_path / "socket", firecracker.receive, source) as server,
        StandInVmm.start(server.path, SIZE) as guest,
    ):
        await guest.read(0, SIZE - PAGE)  # with all of it, it would be resident at some moment
        (session,) = server.sessions
        past = Totals()
        past.add(session)
        at_once = past.plus([session] * MANY)
        adding = asyncio.create_task(past.plus_in_steps([session] * MANY))
        assert await turns_during(adding) >= MANY // 16
        in_steps = adding.result()
        faults = (MANY + 1) * (SIZE // PAGE - 1)
        assert in_steps.counters.faults == at_once.counters.faults == faults
        assert in_steps.metrics.outcomes == at_once.metrics.outcomes
        assert in_steps.sessions == at_once.sessions
        assert past.sessions == {session.state.name.lower(): 1}, "it stays as it is"


async def test_a_session_that_ends_meanwhile_is_counted_once(tmp_path: Path) -> None:
    """It moves from the living to the past between two steps."""
    source = BufferSource(image(SIZE))
    async with Server(tmp_path / "socket", firecracker.receive, source) as server:
        async with StandInVmm.start(server.path, SIZE) as guest:
            await guest.read(0, SIZE)
            totals = asyncio.create_task(Status(server).totals())
            (session,) = server.sessions
            slow = asyncio.create_task(Totals().plus_in_steps([session] * 17))
            await asyncio.sleep(0)
            await session.aclose()
        await eventually(lambda: not server.sessions, "it has ended")
        for sums, times in (
            (await totals, 1),
            (await slow, 17),
            (await Status(server).totals(), 1),
        ):
            assert sums.counters.faults == times * SIZE // PAGE
            assert sum(sums.sessions.values()) == times
