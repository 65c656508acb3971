"""Connections cut at every frame's end and at random bytes: nothing is lost, old or done twice.

AIOUFFD_MIGRATION_RUNS says how many migrations the long run makes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from aiouffd.errors import MigrationFailed
from tests.migration.small_move import Field, Move, Place, a_plan
from tests.migration.unreliable import Connection, Unreliable
from tests.targets import DEADLINE, Target

#: About the network rather than the interpreter: some two thousand migrations.
pytestmark = pytest.mark.once

RUNS: Final = int(os.environ.get("AIOUFFD_MIGRATION_RUNS", "500"))

#: Plans with other frames on other connections.
PLANS: Final[dict[str, dict[str, Any]]] = {
    "pre-copy, the rest follows": {"rounds": 2, "downtime": 0.0},
    "pre-copy, nothing follows": {"rounds": 2, "downtime": 100.0},
    "pre-copy, nothing may follow": {
        "rounds": 2,
        "downtime": 100.0,
        "behind": 0,
        "bandwidth": 1e9,
    },
    "post-copy": {"rounds": 0, "checksums": True},
}


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """One process, where every program arrives."""
    with Place() as place:
        yield place


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of broken lines are no news here."""
    caplog.set_level(logging.ERROR, "aiouffd.migration")
    caplog.set_level(logging.ERROR, "aiouffd.peers")


async def survive(move: Move) -> str:
    """Move over a bad network, and see that nothing has come to harm.

    Returns:
        ``moved``; or ``stayed`` where the network was bad before there ever was a line.
    """
    proxy = move.field.proxy
    try:
        async with asyncio.timeout(2 * DEADLINE):
            await move.run()
    except MigrationFailed as error:
        if move.outgoing.figures.connections or error.outcome != "source":
            raise
        assert len(proxy.connections) <= 2, "the first attempt was not the only one"
        assert move.source.runs
        assert "leave" not in move.source.told
        return "stayed"
    finally:
        await proxy.forget()
        move.close()
    move.compare()
    return "moved"


async def frames_of(field: Field, seed: int, plan: dict[str, Any]) -> list[list[int]]:
    """Count the frames of a migration: of each connection those up and those down."""
    move = field.move(seed, **plan)
    async with asyncio.timeout(DEADLINE):
        await move.run()
    counts = [[len(way.frames) for way in each.ways] for each in field.proxy.connections]
    move.compare()
    move.close()
    await field.proxy.forget()
    return counts


#: Where a line is cut: behind a frame, as soon as it has passed; before one, once it comes; in it.
HOW: Final = {"behind": None, "before": 0.0, "within": 0.5}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("how", HOW)
async def test_cut_at_every_frame(place: Place, seed: int, plan: dict[str, Any], how: str) -> None:
    """Wherever the first line is cut, at whichever frame of either side, it comes out right."""
    outcomes: Counter[str] = Counter()
    part = HOW[how]
    async with Field(place) as field:
        counts = await frames_of(field, seed, plan)
        assert len(counts) == 2
        for number, each in enumerate(counts):
            for direction, count in enumerate(each):
                for frame in range(count + 1):  # behind 0: behind the preamble

                    def cut(
                        connection: Connection, where: Any = (number, direction, frame)
                    ) -> None:
                        if connection.number != where[0]:
                            return
                        way = connection.ways[where[1]]
                        if part is None:
                            way.cut_behind = where[2]
                        else:
                            way.cut_in = where[2], part

                    field.proxy.plan = cut
                    move = field.move(seed, **plan)
                    try:
                        outcomes[await survive(move)] += 1
                        assert move.behind <= plan.get("behind", move.behind)
                    except BaseException as error:
                        way = ("up", "down")[direction]
                        error.add_note(f"connection {number} was cut {how} frame {frame} {way}")
                        raise
    print(f"{outcomes} with the seed {seed}")
    assert outcomes["moved"] > sum(map(sum, counts)) // 2


def a_bad_network(chance: random.Random, proxy: Unreliable) -> None:
    """Plan cuts at random bytes, and delays of one connection or direction against another."""
    loop = asyncio.get_running_loop()
    cuts = chance.choice((1, 2, 3, 5))
    early = chance.random() < 0.1  # before there ever was a line

    def later(*steps: Callable[[], None]) -> None:
        at = loop.time()
        for step in steps:
            at += chance.choice((0.0, 0.001, 0.01)) * chance.random()
            loop.call_at(at, step)

    def plan(connection: Connection) -> None:
        nonlocal cuts
        connection.cuts_by = chance.choice(("reset", "close"))
        for way in connection.ways:
            if chance.random() < 0.2:
                way.held = True
                later(way.release)
        if not cuts or chance.random() < 0.2:
            return
        cuts -= 1
        begin = 0 if early or connection.number >= 2 else 700  # a greeting is shorter
        way = chance.choice(connection.ways)
        if way is connection.up:
            connection.cut_after(
                way, begin + chance.randrange(chance.choice((1000, 4000, 100_000)))
            )
        elif chance.random() < 0.7 or begin:
            connection.cut_after(way, begin // 2 + chance.randrange(600))
        else:
            # The source loses it; the destination gets what was on its way, late.
            later(connection.up.hold, connection.leave_half_open, connection.up.release)

    proxy.plan = plan


async def many(place: Place, seed: int, runs: int, process: Target | None = None) -> None:
    """Move so many times over bad networks."""
    outcomes: Counter[str] = Counter()
    async with Field(place) as field:
        for number in range(runs):
            chance = random.Random(f"{seed}/{number}")
            a_bad_network(chance, field.proxy)
            move = field.move(chance.randrange(2**32), process=process, **a_plan(chance))
            try:
                outcomes[await survive(move)] += 1
            except BaseException as error:
                error.add_note(f"run {number} with the seed {seed}")
                raise
            outcomes["lines"] += move.outgoing.figures.connections
            outcomes["demands"] += move.outgoing.figures.demand
    print(f"{runs} runs with the seed {seed}: {outcomes}")
    assert outcomes["moved"] > runs // 2
    assert outcomes["lines"] > outcomes["moved"], "nothing was cut"


async def test_cut_at_random_bytes(place: Place, seed: int) -> None:
    """Wherever lines are cut, however often, it comes out right."""
    await many(place, seed, 50)


async def test_cut_while_a_process_writes(place: Place, seed: int) -> None:
    """The same with a real process at the source, whose writes are found by the kernel's means."""
    with Target("shmem", 1, register=0, open_uffd=False) as process:
        await many(place, seed, 25, process)
        process._unwatch()


@pytest.mark.once
@pytest.mark.limit(1800)
async def test_cut_at_random_bytes_often(
    place: Place, seed: int, request: pytest.FixtureRequest
) -> None:
    """The same many times."""
    await many(place, seed, RUNS // 2)  # on each of two loops
