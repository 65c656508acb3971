"""Migrations that are cancelled, at every turn of the loop: before the switch nothing has happened.

Laws of this file: whatever is done, it is done after a number of turns of the event loop, and all
numbers are tried, up to a migration's end (of long ones, some that the seed chooses).
"""

from __future__ import annotations

import asyncio
import logging
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from aiouffd.errors import MigrationFailed
from aiouffd.migration.moving import Leaving
from aiouffd.migration.outgoing import Cancelled
from aiouffd.migration.stages import Stage
from tests.migration.small_move import Field, Move, Place
from tests.stand_in_vmm import ROOT
from tests.targets import DEADLINE

#: About the network rather than the interpreter: some two thousand migrations.
pytestmark = pytest.mark.once

#: So many moments of a migration are tried.
MOMENTS: Final = 60


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """One process, where every program arrives."""
    with Place() as place:
        yield place


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Broken lines are no news here."""
    caplog.set_level(logging.ERROR, "aiouffd.migration")


class Both:
    """Source and destination of one migration, each in a task."""

    def __init__(self, move: Move) -> None:
        self.move = move
        self.leaving = asyncio.create_task(move.leave())
        self.arriving = asyncio.create_task(move.arrive())

    async def turns(self, count: int) -> bool:
        """Let the loop turn; say whether the source is still at it."""
        for _ in range(count):
            if self.leaving.done():
                return False
            await asyncio.sleep(0)
        return not self.leaving.done()

    async def end(self) -> None:
        """Let go of what is left."""
        for task in (self.leaving, self.arriving):
            task.cancel()
        await asyncio.wait((self.leaving, self.arriving))
        await self.move.field.proxy.forget()
        self.move.close()


#: Plans, and a rate for bulk under which there are many turns.
PLANS: Final[dict[str, dict[str, Any]]] = {
    "pre-copy": {"rounds": 2, "downtime": 0.0},
    "post-copy": {"rounds": 0},
}


async def at_every_moment(
    place: Place, seed: int, plan: dict[str, Any], do: Callable[[Both], Awaitable[str]]
) -> Counter[str]:
    """Do something after every number of turns that a migration takes, or some of them."""
    turns = 0
    async with Field(place) as field:
        both = Both(field.move(seed, **plan))
        while await both.turns(1):
            turns += 1
        await both.end()
    moments = random.Random(seed).sample(range(turns), min(turns, MOMENTS))
    outcomes: Counter[str] = Counter()
    for moment in moments:
        async with Field(place) as field:  # nobody is left there whom the next one could meet
            both = Both(field.move(seed, **plan))
            try:
                async with asyncio.timeout(1.2 * DEADLINE):
                    await both.turns(moment)
                    outcomes[await do(both)] += 1
            except BaseException as error:
                error.add_note(f"after {moment} of {turns} turns, with the seed {seed}")
                raise
            finally:
                await both.end()
    print(f"{len(moments)} of {turns} turns with the seed {seed}: {outcomes}")
    return outcomes


async def stayed(both: Both) -> str:
    """See that the program runs at the source, and nothing is left at the destination."""
    move = both.move
    assert move.outgoing.stage is Stage.CANCELLED
    assert move.source.runs
    assert not move.source.told or move.source.told[-1] == "restart"
    assert not move.switched.is_set(), "it was let run at the destination"
    if move.incoming is not None:
        with pytest.raises(MigrationFailed) as caught:
            await both.arriving
        assert caught.value.outcome == "source"
        assert not move.field.listener._known
    move.source.write(0, 0)  # and so it does
    return "stayed"


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
async def test_cancel(place: Place, seed: int, plan: dict[str, Any]) -> None:
    """``cancel`` either comes in time, and the program runs on, or says that it does not."""

    async def cancel(both: Both) -> str:
        move = both.move
        if move.outgoing.cancel():
            with pytest.raises(Cancelled) as caught:
                await both.leaving
            assert caught.value.outcome == "source"
            return await stayed(both)
        await both.leaving
        await move.arrived.wait()
        move.compare()
        return "moved"

    outcomes = await at_every_moment(place, seed, plan, cancel)
    assert outcomes["stayed"], outcomes
    assert outcomes["moved"], outcomes


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
async def test_task_cancelled(place: Place, seed: int, plan: dict[str, Any]) -> None:
    """A task that is cancelled before the switch has done nothing, after it it may go on."""

    async def cancel(both: Both) -> str:
        move = both.move
        both.leaving.cancel()
        await asyncio.wait((both.leaving,))
        if not both.leaving.cancelled():
            both.leaving.result()  # it was through
        elif move.outgoing.stage in {Stage.OFFERED, Stage.COPYING, Stage.CANCELLED}:
            if move.outgoing.stage is Stage.OFFERED:
                return "not begun"  # it has not got to its first line of code
            return await stayed(both)
        else:
            assert "restart" not in move.source.told
            assert not move.source.runs
            if move.outgoing.stage is not Stage.DONE:
                await move.outgoing.run(move.source)
        await move.arrived.wait()
        move.compare()
        return "moved"

    outcomes = await at_every_moment(place, seed, plan, cancel)
    assert outcomes["stayed"], outcomes
    assert outcomes["moved"], outcomes


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
async def test_destination_closed(place: Place, seed: int, plan: dict[str, Any]) -> None:
    """A destination that is given up says whether the program can go on at the source."""

    async def close(both: Both) -> str:
        move = both.move
        both.arriving.cancel()
        await asyncio.wait((both.arriving,))
        if move.incoming is None:
            return "not begun"
        await asyncio.wait((both.leaving,))
        error = both.leaving.exception()
        if error is None:
            return "moved"
        assert isinstance(error, MigrationFailed)
        assert move.outgoing.stage is Stage.FAILED
        if error.outcome == "source":
            assert move.source.runs
            return "stayed"
        assert error.outcome == "lost"
        assert move.source.contents() == move.source.left
        return "lost"

    outcomes = await at_every_moment(place, seed, plan, close)
    assert outcomes["stayed"], outcomes
    assert set(outcomes) <= {"stayed", "lost", "moved", "not begun"}


async def test_an_order_is_cancelled(tmp_path: Path) -> None:
    """The answer to an order that nobody waits for any more is not taken for the next one's."""
    path = str(tmp_path / "program")
    with subprocess.Popen(
        [sys.executable, "-m", "tests.cli.movable", path, "1"], cwd=ROOT, stdout=subprocess.PIPE
    ) as program:
        try:
            assert program.stdout is not None
            assert b"ready" in program.stdout.readline()
            async with await Leaving.open(path) as leaving:
                for turns in range(4):
                    stopping = asyncio.create_task(leaving.stop())
                    for _ in range(turns + 1):
                        await asyncio.sleep(0)
                    stopping.cancel()
                    await asyncio.wait((stopping,))
                    await leaving.restart()
                    assert int(await leaving.stop()) > 0
                    await leaving.restart()
        finally:
            program.kill()
