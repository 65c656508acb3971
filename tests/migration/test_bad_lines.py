"""Lines that fall silent, stay away, are slow, or bring one thing long before another."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from aiouffd.errors import MigrationFailed
from aiouffd.failure import Action, FailurePolicy
from aiouffd.migration.stages import Stage
from aiouffd.migration.wire import Kind, Role
from tests.migration.small_move import Field, Move, Place, a_plan
from tests.migration.unreliable import Connection, Passed, Way
from tests.targets import DEADLINE, PAGE, TIME_SCALE, Signal, TargetDied, until

#: About the network rather than the interpreter: some two thousand migrations.
pytestmark = pytest.mark.once

SILENCE = 0.15 * TIME_SCALE
SHORT = 0.1 * TIME_SCALE  # a deadline that is to pass

#: One moment of a migration: a frame of a kind that passes on a connection, up or down.
Moment = tuple[frozenset[Kind], Role, str]
MOMENTS: dict[str, Moment] = {
    "copying": (frozenset((Kind.PAGES, Kind.BATCH, Kind.ZERO)), Role.BULK, "up"),
    "at the state": (frozenset((Kind.STATE,)), Role.BULK, "up"),
    "at the switch": (frozenset((Kind.SWITCH,)), Role.BULK, "up"),
    "as it runs": (frozenset((Kind.RUNNING,)), Role.DEMAND, "down"),
    "as it asks": (frozenset((Kind.DEMAND,)), Role.DEMAND, "down"),
    "as it is answered": (frozenset((Kind.PAGES,)), Role.DEMAND, "up"),
    "as all is there": (frozenset((Kind.DONE,)), Role.DEMAND, "down"),
}


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """One process, where every program arrives."""
    with Place() as place:
        yield place


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Broken lines are no news here."""
    caplog.set_level(logging.ERROR, "aiouffd.migration")
    caplog.set_level(logging.ERROR, "aiouffd.peers")


#: What is done to a frame that passes.
Do = Callable[[Connection, Way, Passed], Any]


class Rules:
    """What is to be done as frames pass, each once."""

    def __init__(self, field: Field) -> None:
        self._rules: list[
            tuple[Moment, Callable[[Connection, Way, Passed], Any], asyncio.Event]
        ] = []
        field.proxy.on_frame = self._look

    def at(self, moment: Moment, do: Do) -> asyncio.Event:
        """Do something before the frame of a moment has passed; tell when it was done."""
        done = asyncio.Event()
        self._rules.append((moment, do, done))
        return done

    def _look(self, connection: Connection, way: Way, frame: Passed) -> None:
        direction = "up" if way is connection.up else "down"
        for moment, do, done in self._rules:
            kinds, role, way_of = moment
            right = frame.kind in kinds and role is connection.role and way_of == direction
            if right and not done.is_set():
                done.set()
                do(connection, way, frame)


def hold_rest(connection: Connection, way: Way, frame: Passed) -> None:
    """Hold back what comes behind a frame."""
    del connection
    way.hold_at = frame.end


def hold_it(connection: Connection, way: Way, frame: Passed) -> None:
    """Hold back a frame and what comes behind it."""
    del connection
    way.hold_at = frame.begin


async def take_away(field: Field) -> None:
    """Break the line, and let none be made."""
    await field.proxy.refuse()
    await field.proxy.cut_all()


@contextlib.asynccontextmanager
async def moving(move: Move) -> AsyncIterator[asyncio.Task[None]]:
    """Move in the background."""
    task = asyncio.create_task(move.run())
    try:
        async with asyncio.timeout(2 * DEADLINE):
            yield task
    finally:
        task.cancel()
        await asyncio.wait((task,))
        await move.field.proxy.forget()
        move.close()


async def failed(task: asyncio.Task[None]) -> MigrationFailed:
    """Wait for a failure."""
    async with asyncio.timeout(2 * DEADLINE):
        with pytest.raises(MigrationFailed) as caught:
            await task
    return caught.value


# --- silence -----------------------------------------------------------------------------


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
async def test_black_hole(place: Place, seed: int, moment: Moment) -> None:
    """A line that swallows all is given up on both sides; once there is another all goes on."""
    async with Field(place, silence=SILENCE) as field:
        move = field.move(seed, rounds=int(moment[1] is Role.BULK))
        move.source.state = b"all that is not in its memory"
        rules = Rules(field)
        if moment in (MOMENTS["as it asks"], MOMENTS["as it is answered"]):
            rules.at(MOMENTS["at the switch"], hold_rest)  # so that threads have to ask
        hole = rules.at(moment, lambda *_: field.proxy.swallow_all())
        async with moving(move) as task:
            await hole.wait()
            stage, lines = move.outgoing.stage, len(field.proxy.connections)
            incoming = move.incoming
            assert incoming is not None
            await until(lambda: not incoming.is_connected, "the destination notices")
            await until(lambda: len(field.proxy.connections) > lines, "the source dials again")
            assert not task.done()
            if stage is Stage.COPYING:
                assert move.source.runs
            field.proxy.silent = False
            await task
        move.compare()


async def test_black_hole_on_one_connection(place: Place, seed: int) -> None:
    """A connection that falls silent alone takes the other one with it."""
    async with Field(place, silence=SILENCE) as field:
        for role in Role:
            move = field.move(seed, rounds=1, downtime=0.0)

            def swallow(*_: object, role: Role = role) -> None:
                for each in field.proxy.connections:
                    if each.role is role:
                        each.swallow()

            Rules(field).at(MOMENTS["at the switch"], swallow)
            async with moving(move) as task:
                await task
                assert len(field.proxy.connections) > 2
            move.compare()


async def test_a_loop_that_stood_still(place: Place, seed: int) -> None:
    """Who did not listen for a while does not take the other side for silent."""
    async with Field(place, silence=SILENCE) as field:
        move = field.move(seed, rounds=1)
        Rules(field).at(MOMENTS["at the switch"], lambda *_: time.sleep(3 * SILENCE))
        async with moving(move) as task:
            await task
        move.compare()
        assert move.outgoing.figures.connections == 1


async def test_threads_wait_for_the_line(place: Place, seed: int) -> None:
    """A thread that waits for a page goes on waiting while there is no line, and gets the page."""
    async with Field(place) as field:
        move = field.move(seed, rounds=0)
        no_pages(Rules(field))
        async with moving(move) as task:
            await move.switched.wait()
            incoming = move.incoming
            assert incoming is not None
            for thread in range(3):
                await place.target.blocked(thread)
            await take_away(field)
            await until(lambda: not incoming.is_connected, "the line is gone")
            for thread in range(3):
                assert place.target.is_blocked(thread)
            assert not task.done()
            field.proxy.on_frame = lambda *_: None
            await field.proxy.listen()
            await task
        move.compare()
        assert move.outgoing.figures.disconnected > 0


def no_pages(rules: Rules) -> None:
    """Let no memory through once the program runs: neither by itself nor when it is asked for."""
    rules.at(MOMENTS["at the switch"], hold_rest)
    rules.at(MOMENTS["as it asks"], hold_it)


async def test_what_is_waited_for_is_asked_again(place: Place, seed: int) -> None:
    """On a new line it does not wait for bulk to come by."""
    async with Field(place) as field:
        move = field.move(seed, rounds=0)
        rules = Rules(field)
        no_pages(rules)
        async with moving(move) as task:
            await move.switched.wait()
            for thread in range(3):
                await place.target.blocked(thread)
            await take_away(field)
            bulk: list[Way] = []

            def hold_bulk(connection: Connection, way: Way, frame: Passed) -> None:
                if frame.kind is Kind.HELLO and connection.role is Role.BULK:
                    way.hold_at = frame.end
                    bulk.append(way)

            field.proxy.on_frame = hold_bulk
            await field.proxy.listen()
            await move.worked.wait()
            assert len(bulk) == 1
            bulk[0].release()
            await task
        move.compare()


async def test_bytes_of_a_line_that_was_given_up(place: Place, seed: int) -> None:
    """They come when a later line has brought newer ones: nobody takes them."""
    chance = random.Random(seed)
    async with Field(place) as field:
        for _ in range(5):
            move = field.move(chance.randrange(2**32), rounds=2, downtime=100.0)
            rules = Rules(field)
            held = rules.at(MOMENTS["copying"], hold_it)
            later = asyncio.Event()
            async with moving(move) as task:
                await held.wait()
                old = [each for each in field.proxy.connections if each.role is Role.BULK]
                assert len(old) == 1
                for connection in field.proxy.connections:  # the destination hears of nothing
                    connection.leave_half_open()

                def see(
                    connection: Connection, way: Way, frame: Passed, later: asyncio.Event = later
                ) -> None:
                    del way
                    if connection.number >= 2 and frame.kind in {Kind.PAGES, Kind.BATCH}:
                        later.set()

                field.proxy.on_frame = see
                await later.wait()
                old[0].up.release()
                await task
            move.compare()


async def test_switched_twice(place: Place, seed: int) -> None:
    """A second SWITCH, and what goes before it, changes nothing where the first has arrived."""
    chance = random.Random(seed)
    async with Field(place) as field:
        for _ in range(5):
            move = field.move(chance.randrange(2**32), rounds=chance.choice((0, 1)), downtime=0.0)
            move.may_start.clear()
            rules = Rules(field)
            rules.at(MOMENTS["at the switch"], hold_rest)
            async with moving(move) as task:
                await move.switched.wait()
                bulk: list[Way] = []

                def hold(
                    connection: Connection, way: Way, frame: Passed, bulk: list[Way] = bulk
                ) -> None:
                    # What goes before SWITCH is held with it: MISSING, for one.
                    if frame.kind is Kind.HELLO and connection.role is Role.BULK:
                        way.hold_at = frame.end
                    elif frame.kind is Kind.SWITCH:
                        bulk.append(way)

                await field.proxy.cut_all()
                field.proxy.on_frame = hold
                while not bulk:  # SWITCH is sent again
                    await asyncio.sleep(0.001)
                move.may_start.set()
                await move.worked.wait()  # threads ask for what they need
                bulk[0].release()
                await task
            move.compare()


# --- the deadline ------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def both(move: Move) -> AsyncIterator[tuple[asyncio.Task[None], asyncio.Task[None]]]:
    """Let source and destination go on in the background, each to its own end."""
    tasks = asyncio.create_task(move.leave()), asyncio.create_task(move.arrive())
    try:
        async with asyncio.timeout(2 * DEADLINE):
            yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await move.field.proxy.forget()
        move.close()


async def test_deadline_before_the_switch(place: Place, seed: int) -> None:
    """Without a line for so long before the switch the program runs on, and is forgotten there."""
    async with Field(place, deadline=SHORT) as field:
        move = field.move(seed, rounds=1, downtime=0.0)
        copying = Rules(field).at(MOMENTS["copying"], hold_it)
        async with both(move) as (leaving, arriving):
            await copying.wait()
            await take_away(field)
            here, there = await failed(leaving), await failed(arriving)
            assert (here.outcome, here.stage) == ("source", "copying")
            assert move.outgoing.stage is Stage.FAILED
            assert "leave" not in move.source.told
            assert move.source.runs
            assert there.outcome == "source"
            assert not field.listener._known, "the destination has not forgotten it"


@pytest.mark.parametrize("lost", ["SWITCH", "RUNNING"])
async def test_deadline_in_the_midst_of_the_switch(place: Place, seed: int, lost: str) -> None:
    """The source cannot know whether it runs there: it stands still here, with all its memory."""
    async with Field(place, deadline=SHORT) as field:
        move = field.move(seed, rounds=0)
        rules = Rules(field)
        if lost == "SWITCH":
            held = rules.at(MOMENTS["at the switch"], hold_it)
        else:
            rules.at(MOMENTS["at the switch"], hold_rest)
            held = rules.at(MOMENTS["as it runs"], hold_it)
        async with both(move) as (leaving, arriving):
            await held.wait()
            await take_away(field)
            here, there = await failed(leaving), await failed(arriving)
            assert (here.outcome, here.stage) == ("unknown", "switching")
            assert move.source.told == ["stop", "leave"]
            assert move.source.contents() == move.source.left
            assert there.outcome == ("source" if lost == "SWITCH" else "lost")


async def test_deadline_after_the_switch(place: Place, seed: int) -> None:
    """Threads that wait get SIGBUS then, and so do later ones; the source keeps everything."""
    async with Field(place, deadline=SHORT) as field:
        move = field.move(seed, rounds=0)
        move.says_first = True
        later: dict[tuple[int, int], int | Signal] = {}

        async def touch() -> None:
            for region, extent in enumerate(place.extents):
                for page in range(extent.length // PAGE):
                    there = place.target.start_peek(move.address(region, page))
                    later[region, page] = await there

        move.afterwards = touch
        no_pages(Rules(field))
        async with both(move) as (leaving, arriving):
            await move.switched.wait()
            for thread in range(3):
                await place.target.blocked(thread)
            await until(lambda: move.outgoing.stage is Stage.FOLLOWING, "it follows")
            await take_away(field)
            here, there = await failed(leaving), await failed(arriving)
            assert (here.outcome, here.stage) == ("unknown", "following")
            assert there.outcome == "lost"
            assert [each.number for each in move.signals] == [signal.SIGBUS] * 3
            for where, found in later.items():
                # A page that it had removed before is zeros, with or without a line.
                assert where in move.after or isinstance(found, Signal), where
            assert len(later) > len(move.after)
            # Nothing is lost at the source, and it may ask again: then it hears how it ended.
            assert move.source.contents() == move.source.left
            assert move.outgoing.stage is Stage.FOLLOWING
            field.proxy.on_frame = lambda *_: None
            await field.proxy.listen()
            again = await failed(asyncio.create_task(move.outgoing.run(move.source)))
            assert again.outcome == "lost"
            assert "there was no line to" in str(again)
            assert "restart" not in move.source.told


async def test_deadline_kills(seed: int) -> None:
    """Where the policy is to kill, the program is killed instead."""
    with Place() as place:
        async with Field(place, deadline=SHORT) as field:
            move = field.move(seed, rounds=0)
            move.failure = FailurePolicy(retries=0, then=Action.KILL)
            no_pages(Rules(field))
            async with both(move) as (leaving, arriving):
                await move.switched.wait()
                await place.target.blocked(0)
                await take_away(field)
                assert (await failed(leaving)).outcome == "unknown"
                assert (await failed(arriving)).outcome == "lost"
                await until(lambda: place.target.start_peek(0).done, "the program is dead")
                with pytest.raises(TargetDied):
                    place.target.start_peek(0).result()
        place.starts.clear()


async def test_the_source_gives_up_first(place: Place, seed: int) -> None:
    """After its deadline the source may be told to go on, and does so where it was."""
    async with Field(place) as field:
        move = field.move(seed, rounds=0, deadline=SHORT)
        no_pages(Rules(field))
        async with both(move) as (leaving, arriving):
            await move.switched.wait()
            await place.target.blocked(0)
            await take_away(field)
            here = await failed(leaving)
            assert here.outcome == "unknown"
            assert place.target.is_blocked(0)
            field.proxy.on_frame = lambda *_: None
            await field.proxy.listen()
            await move.outgoing.run(move.source)
            await arriving
        move.compare()
        assert move.source.told == ["stop", "leave"]


@pytest.mark.parametrize("lost", ["SWITCH", "RUNNING"])
async def test_the_destination_gives_up_first(place: Place, seed: int, lost: str) -> None:
    """A source that comes back hears whether its program ever ran: if not, it goes on here."""
    async with Field(place, deadline=SHORT) as field:
        move = field.move(seed, rounds=0, deadline=DEADLINE)
        move.says_first = True
        rules = Rules(field)
        if lost == "SWITCH":
            held = rules.at(MOMENTS["at the switch"], hold_it)
        else:
            rules.at(MOMENTS["at the switch"], hold_rest)
            held = rules.at(MOMENTS["as it runs"], hold_it)
        async with both(move) as (leaving, arriving):
            await held.wait()
            await take_away(field)
            there = await failed(arriving)
            assert not leaving.done()
            await field.proxy.listen()
            here = await failed(leaving)
            assert here.outcome == there.outcome == ("source" if lost == "SWITCH" else "lost")
            assert move.source.runs is (lost == "SWITCH")


# --- slow, and in another order ----------------------------------------------------------


async def test_demand_ahead_of_bulk(place: Place, seed: int) -> None:
    """What comes by bulk long after it came by demand changes and brings back nothing."""
    chance = random.Random(seed)
    async with Field(place) as field:
        for _ in range(5):
            move = field.move(chance.randrange(2**32), rounds=chance.choice((0, 1)), downtime=0.0)
            move.rounds_of_work = 4
            bulk: list[Way] = []

            def hold(
                connection: Connection, way: Way, frame: Passed, bulk: list[Way] = bulk
            ) -> None:
                hold_rest(connection, way, frame)
                bulk.append(way)

            Rules(field).at(MOMENTS["at the switch"], hold)
            async with moving(move) as task:
                await move.worked.wait()
                assert len(bulk) == 1
                bulk[0].release()
                await task
            move.compare()


async def test_bulk_ahead_of_demand(place: Place, seed: int) -> None:
    """What is asked for comes by bulk first; the answer that comes after it does no harm."""
    chance = random.Random(seed)
    async with Field(place) as field:
        for _ in range(5):
            move = field.move(chance.randrange(2**32), rounds=0)
            move.says_first = True
            demand: list[Way] = []
            bulk: list[Way] = []

            def hold(
                connection: Connection,
                way: Way,
                frame: Passed,
                demand: list[Way] = demand,
                bulk: list[Way] = bulk,
            ) -> None:
                del connection
                way.hold_at = frame.begin
                demand.append(way)
                for each in bulk:
                    each.release()

            def first(
                connection: Connection, way: Way, frame: Passed, bulk: list[Way] = bulk
            ) -> None:
                hold_rest(connection, way, frame)
                bulk.append(way)

            rules = Rules(field)
            rules.at(MOMENTS["at the switch"], first)
            rules.at(MOMENTS["as it asks"], hold)
            async with moving(move) as task:
                await move.worked.wait()  # all that was asked for has come by bulk
                demand[0].release()
                await task
            move.compare()


async def test_slow_lines(place: Place, seed: int) -> None:
    """However slow each direction of each connection is, it comes out right."""
    chance = random.Random(seed)
    async with Field(place) as field:
        for _ in range(4):
            move = field.move(chance.randrange(2**32), **a_plan(chance))
            move.source.state = move.source.state[:5000]

            def slow(connection: Connection) -> None:
                for way in connection.ways:
                    way.rate = chance.choice((None, 20e3, 1e6, 4e6))
                if connection.up.rate == 20e3:
                    connection.up.rate = 500e3

            field.proxy.plan = slow
            async with moving(move) as task:
                await task
            move.compare()
