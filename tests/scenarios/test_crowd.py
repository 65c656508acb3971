"""Several hundred targets in one server: each its own policy, figures and end."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Final

import pytest

from aiouffd.failure import Action
from aiouffd.handover import Handover, Peer
from aiouffd.protocols import firecracker
from aiouffd.reports import Ended, Refused, Report
from aiouffd.server import Server
from aiouffd.service import Service
from aiouffd.session import Session
from aiouffd.session_states import State
from aiouffd.sources.buffer import BufferSource
from tests.crowd import ALL_RIGHT, REFUSED, ZEROS, crowd, first_pages
from tests.serving import image
from tests.stand_in_vmm import PAGE, eventually

PAGES: Final = 8


@pytest.mark.limit(120)
async def test_three_hundred_sessions_are_served_each_in_its_own_way(tmp_path: Path) -> None:
    """Policies by peer, figures by session; closing some of them leaves the others untouched."""
    count = 300
    reports: list[Report] = []
    asked: list[int] = []

    def service(peer: Peer, handover: Handover) -> Service:
        assert handover.regions[0].length == PAGES * PAGE
        asked.append(peer.pid)
        return Service(on_close=Action.ZERO if len(asked) % 2 else Action.POISON)

    path = tmp_path / "socket"
    source = BufferSource(image(0, PAGES * PAGE))
    before = len(os.listdir("/proc/self/fd"))
    async with Server(
        path, firecracker.receive, source, service=service, report=reports.append
    ) as server:
        async with crowd(path, count, PAGES) as targets:
            await targets.ready()
            assert sorted(asked) == sorted(targets.pids)
            states = server.states()  # some have read all of their memory
            assert states[State.SERVING] + states[State.RESIDENT] == len(server.sessions) == count
            sessions: dict[int, Session] = {}
            for session in server.sessions:
                assert session.peer is not None
                sessions[session.peer.pid] = session
            for number, pid in enumerate(targets.pids):
                assert sessions[pid].figures().faults == first_pages(number, PAGES)
            fds = len(os.listdir("/proc/self/fd")) - before
            assert fds <= 5 * count + 8  # uffd, pidfd twice, connection; a source of its own

            closed = [number for number in range(count) if number % PAGES < PAGES // 2][:100]
            await asyncio.gather(*(sessions[targets.pids[number]].aclose() for number in closed))
            statuses = await targets.finish()
            for number, (pid, status) in enumerate(zip(targets.pids, statuses, strict=True)):
                action = sessions[pid].service.on_close
                if number not in closed:
                    assert status == ALL_RIGHT << 8, number
                elif action is Action.ZERO:
                    assert status == ZEROS << 8, number
                else:
                    assert os.WTERMSIG(status) == signal.SIGBUS, number
        await eventually(lambda: not server.sessions, "all sessions have ended")
    ended = [report.session for report in reports if isinstance(report, Ended)]
    assert len(ended) == count
    assert sum(session.state is State.FAILED for session in ended) == len(closed)
    served = sum(session.figures().copied_bytes for session in ended)
    missing = sum(PAGES - first_pages(number, PAGES) for number in closed)
    assert served == (count * PAGES - missing) * PAGE


@pytest.mark.parametrize("policy", [Action.ZERO, Action.POISON, Action.KILL])
async def test_peers_beyond_the_limit_are_settled(tmp_path: Path, policy: Action) -> None:
    """Who has handed over and is one too many gets the policy, and does not freeze."""
    reports: list[Report] = []
    path = tmp_path / "socket"
    source = BufferSource(image(0, PAGES * PAGE))
    async with Server(
        path,
        firecracker.receive,
        source,
        service=Service(on_close=policy),
        max_sessions=6,
        report=reports.append,
    ) as server:
        async with crowd(path, 10, PAGES) as targets:
            await eventually(lambda: server.refused == 4, "four are refused")
            if policy is Action.ZERO:  # the others have ended by a signal, and said nothing
                await targets.ready()
            assert len(server.sessions) == 6
            statuses: list[int] = []
            if policy is Action.ZERO:
                statuses = await targets.finish()
                assert sorted(statuses) == [ALL_RIGHT] * 6 + [REFUSED << 8] * 4
        await eventually(lambda: not server.sessions, "all sessions have ended")
        refusals = [report.reason for report in reports if isinstance(report, Refused)]
        assert refusals == ["there are 6 sessions already, as many as allowed"] * 4
        # A place that became free is given again.
        async with crowd(path, 6, PAGES) as targets:
            await targets.ready()
            assert await targets.finish() == [ALL_RIGHT] * 6
    assert server.refused == 4
