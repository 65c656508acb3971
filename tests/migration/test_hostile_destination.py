"""Destinations that lie: the program runs on, or stands still with all of its memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from aiouffd.errors import MigrationFailed
from aiouffd.migration import wire
from aiouffd.migration.outgoing import Outgoing, Plan
from aiouffd.migration.wire import Extent, Role
from tests.migration import frames
from tests.migration.ends import Raw, Said, Standing, contents, memory_of
from tests.migration.frames import PAGE, frame, of_json, preamble
from tests.serving import within

EXTENT = Extent("heap", 64 * PAGE, PAGE)
PLAN = Plan(rounds=0, deadline=0.1, silence=60.0, checksums=True)


@dataclass
class Held(Standing):
    """A program whose stopping takes until the test allows it."""

    is_asked: asyncio.Event = field(default_factory=asyncio.Event)
    may_stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def stop(self) -> bytes:
        """Stand still, in the end."""
        self.is_asked.set()
        await self.may_stop.wait()
        return await super().stop()


class Destination:
    """Takes connections; a test says what happens on them."""

    def __init__(self) -> None:
        self.port = 0
        self._raws: list[Raw] = []
        self._new: asyncio.Queue[Raw] = asyncio.Queue()

    @classmethod
    @contextlib.asynccontextmanager
    async def listening(cls) -> AsyncIterator[Destination]:
        made = cls()

        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            raw = Raw(reader, writer)
            made._raws.append(raw)
            made._new.put_nowait(raw)

        server = await asyncio.start_server(take, "127.0.0.1", 0)
        made.port = server.sockets[0].getsockname()[1]
        try:
            yield made
        finally:
            server.close()
            for raw in made._raws:
                raw.close()
            await server.wait_closed()

    async def next(self) -> Raw:
        """Wait for a connection; nothing was said on it."""
        return await within(self._new.get())

    async def greeted(self) -> tuple[Raw, dict[str, Any]]:
        """Wait for a connection and its hello; answer with a preamble."""
        raw = await self.next()
        await raw.hear_preamble()
        said = await raw.hear()
        assert said.kind == frames.HELLO
        raw.say(preamble())
        hello: dict[str, Any] = said.json()
        return raw, hello

    async def line(self, **welcome: Any) -> tuple[Raw, Raw]:
        """Wait for both connections; welcome them."""
        raws = []
        for role in ("demand", "bulk"):
            raw, hello = await self.greeted()
            assert hello["role"] == role
            raw.say(self.welcome(**welcome))
            raws.append(raw)
        return raws[0], raws[1]

    @staticmethod
    def welcome(**changes: Any) -> bytes:
        value = {
            "token": "t" * 32,
            "features": ["checksums"],
            "stage": "copying",
            "landed": {"demand": 0, "bulk": 0},
            "most_state": 1000,
        }
        return of_json(frames.WELCOME, value | changes)


@contextlib.contextmanager
def sending(port: int, plan: Plan = PLAN) -> Iterator[Outgoing]:
    """Prepare a source of EXTENT."""
    with memory_of([EXTENT], contents([EXTENT])) as memory:
        yield Outgoing(memory, "127.0.0.1", port, plan=plan)


async def fails(
    outgoing: Outgoing, program: Standing, script: Awaitable[Any], text: str
) -> MigrationFailed:
    """Run it beside a destination; give how it fails."""
    task = asyncio.ensure_future(script)
    try:
        with pytest.raises(MigrationFailed, match=text) as caught:
            await within(outgoing.run(program))
        await within(task)
    finally:
        task.cancel()
        await asyncio.wait((task,))
    return caught.value


# --- before there is a line -------------------------------------------------------------------

NO_ANSWER: dict[str, tuple[bytes, str]] = {
    "another protocol": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak this protocol"),
    "TLS": (b"\x15\x03\x01\x00\x02\x02\x16", "but TLS, which this side was not told to speak"),
    "version 2": (preamble(2, 2), "versions 2 to 2 of the protocol; we speak 1 to 1"),
    "a damaged preamble": (preamble()[:-1] + b"\xff", "damaged on the way"),
    "pages": (preamble() + frame(4, b"x", span=PAGE), "PAGES, which is for us to send"),
    "a hello": (preamble() + of_json(1, {}), "HELLO, which is for us"),
    "RUNNING": (preamble() + frame(10), "RUNNING before it has welcomed us"),
    "a demand": (preamble() + frame(11, span=PAGE), "0 were agreed on"),
    "an ACK": (preamble() + frame(12), "ACK before it has welcomed us"),
    "an error": (
        preamble() + of_json(3, {"code": "refused", "text": "no\nroom"}),
        r"ended the migration \(refused\): no\?room",
    ),
    "an odd error": (preamble() + of_json(3, {"code": {}, "text": 7}), r"\(failed\): no reason"),
    "an error that is a list": (preamble() + of_json(3, []), "no JSON object"),
    "a welcome that is none": (preamble() + of_json(2, "welcome"), "no JSON object"),
    "features not offered": (
        preamble() + Destination.welcome(features=["checksums", "zstd"]),
        "agrees to what was not offered",
    ),
    "pre-copy not offered": (preamble() + Destination.welcome(features=["precopy"]), "not offered"),
    "no features": (preamble() + Destination.welcome(features=None), "without a list of features"),
    "odd features": (preamble() + Destination.welcome(features=[{}]), "without a list of features"),
    "many features": (preamble() + Destination.welcome(features=["x"] * 65), "list of features"),
    "no token": (preamble() + Destination.welcome(token=""), "without a token"),
    "a long token": (preamble() + Destination.welcome(token="t" * 65), "without a token"),
    "a token that is a number": (preamble() + Destination.welcome(token=5), "without a token"),
    "a token of megabytes": (
        preamble() + frame(2, length=5 << 20),
        "WELCOME of 5242880 bytes; 65536 are the most",
    ),
    "no state": (preamble() + Destination.welcome(most_state=None), "how long a state may be"),
    "less than no state": (preamble() + Destination.welcome(most_state=-1), "how long a state"),
}


@pytest.mark.parametrize("name", NO_ANSWER)
async def test_a_destination_that_answers_wrongly_gets_nothing(name: str) -> None:
    """The program has not even been asked to stop."""
    data, text = NO_ANSWER[name]
    async with Destination.listening() as destination:

        async def script() -> None:
            raw = await destination.next()
            raw.say(data)
            raw.writer.write_eof()

        program = Standing()
        with sending(destination.port) as outgoing:
            error = await fails(outgoing, program, script(), text)
        assert (error.stage, error.outcome, program.told) == ("offered", "source", [])


#: What the welcome says when both connections are there.
LIES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing landed": ({"landed": None}, "which of our frames have landed"),
    "half of it": ({"landed": {"demand": 0}}, "which of our frames"),
    "less than nothing": ({"landed": {"demand": 0, "bulk": -1}}, "which of our frames"),
    "what was never sent": ({"landed": {"demand": 0, "bulk": 1}}, "which of our frames"),
    "more than there is": ({"landed": {"demand": 1 << 70, "bulk": 0}}, "which of our frames"),
    "text": ({"landed": {"demand": "0", "bulk": 0}}, "which of our frames"),
    "it runs there": ({"stage": "following"}, "where we have not let it"),
    "all is there": ({"stage": "done"}, "where we have not let it"),
}


@pytest.mark.parametrize("name", LIES)
async def test_a_welcome_that_lies_is_found_out(name: str) -> None:
    """Nothing has landed yet, and nothing runs there."""
    welcome, text = LIES[name]
    async with Destination.listening() as destination:
        program = Standing()
        with sending(destination.port) as outgoing:
            error = await fails(outgoing, program, destination.line(**welcome), text)
        assert (error.outcome, program.told) == ("source", [])


async def test_what_breaks_a_line_as_it_comes_up_is_said() -> None:
    """A frame that is wrong right behind the second welcome."""
    async with Destination.listening() as destination:

        async def script() -> None:
            demand, _ = await destination.greeted()
            demand.say(destination.welcome())
            bulk, _ = await destination.greeted()
            bulk.say(destination.welcome() + frame(9))
            assert "for us to send" in (await bulk.hear_error())["text"]

        program = Standing()
        with sending(destination.port) as outgoing:
            error = await fails(outgoing, program, script(), "SWITCH, which is for us to send")
        assert (error.outcome, program.told) == ("source", [])


async def test_a_destination_without_an_answer_is_given_up() -> None:
    """One that closes, and one that says nothing at all."""
    async with Destination.listening() as destination:

        async def closing() -> None:
            (await destination.next()).close()

        with sending(destination.port) as outgoing:
            await fails(outgoing, Standing(), closing(), "runs on here")
        plan = Plan(rounds=0, deadline=0.05, silence=0.05)
        with sending(destination.port, plan) as outgoing:
            error = await fails(outgoing, Standing(), destination.next(), "runs on here")
        assert error.outcome == "source"


async def test_nobody_who_listens_is_said_at_once() -> None:
    """It is not tried again."""
    async with Destination.listening() as destination:
        port = destination.port
    text = f"127.0.0.1:{port} cannot be reached: Connection refused"
    with sending(port, Plan(rounds=0)) as outgoing, pytest.raises(MigrationFailed, match=text):
        await within(outgoing.run(Standing()))


# --- before the switch ------------------------------------------------------------------------

#: On which connection what is said before the source has told anything to run there.
EARLY: dict[str, tuple[str, bytes, str]] = {
    "a demand": ("d", frame(11, span=PAGE), "before the switch"),
    "RUNNING": ("d", frame(10), "where we have not let it"),
    "DONE": ("d", of_json(14, {}), "where we have not let it run"),
    "a second welcome": ("d", Destination.welcome(), "second WELCOME"),
    "a second welcome on bulk": ("b", Destination.welcome(), "sent a WELCOME on the connection"),
    "landed what was never sent": ("b", frame(12, number=1), "which was not sent"),
    "landed 2**64 - 1": ("d", frame(12, number=(1 << 64) - 1), "which was not sent"),
    "a demand on bulk": ("b", frame(11, span=PAGE), "DEMAND on the connection for bulk"),
    "behind the end": ("d", frame(11, offset=64 * PAGE, span=PAGE), "behind its end"),
    "another region": ("d", frame(11, region=1, span=PAGE), "1 were agreed on"),
    "half a page": ("d", frame(11, span=PAGE // 2), "no whole pages"),
    "a gibibyte": ("d", frame(11, span=1 << 30), "1048576 may be"),
    "zeros": ("b", frame(6, span=PAGE, number=1), "for us to send"),
    "a cancel": ("d", frame(16), "for us to send"),
    "no checksum": ("d", frame(13, b"{}", flags=0), "without its checksum"),
    "progress that is none": ("d", of_json(13, 7), "no JSON object"),
}


@pytest.mark.parametrize("name", EARLY)
async def test_what_comes_too_early_ends_it_before_the_program_leaves(name: str) -> None:
    """It was stopped meanwhile, and goes on."""
    where, data, text = EARLY[name]
    async with Destination.listening() as destination:
        program = Held()
        with sending(destination.port) as outgoing:

            async def script() -> None:
                demand, bulk = await destination.line()
                told = demand if where == "d" else bulk
                await within(program.is_asked.wait())
                told.say(data)
                assert text in (await told.hear_error())["text"]
                while outgoing._error is None:
                    await asyncio.sleep(0)
                program.may_stop.set()

            error = await fails(outgoing, program, script(), text)
        assert (error.outcome, program.told) == ("source", ["stop", "restart"])


async def test_a_state_that_is_too_long_is_found_before_the_program_leaves() -> None:
    """The welcome says how long it may be."""
    async with Destination.listening() as destination:
        program = Standing(state=bytes(1001))
        with sending(destination.port) as outgoing:

            async def script() -> None:
                demand, bulk = await destination.line()
                while (await demand.hear()).kind != frames.CANCEL:
                    pass
                demand.close()
                bulk.close()

            error = await fails(outgoing, program, script(), "state has 1001 bytes.* at most 1000")
        assert (error.outcome, program.told) == ("source", ["stop", "restart"])


# --- after the switch -------------------------------------------------------------------------


async def switched(destination: Destination) -> tuple[Raw, Raw]:
    """Take a line up to the switch."""
    demand, bulk = await destination.line()
    while (await bulk.hear()).kind != frames.SWITCH:
        pass
    return demand, bulk


async def run_to(
    after: Callable[[Raw, Raw], Awaitable[Any]], text: str
) -> tuple[MigrationFailed, Standing, Outgoing]:
    """Let a program leave; do something then, and give how it fails."""
    program = Standing()
    async with Destination.listening() as destination:

        async def script() -> None:
            demand, bulk = await switched(destination)
            try:
                await after(demand, bulk)
            finally:
                demand.close()
                bulk.close()

        with sending(destination.port) as outgoing:
            return await fails(outgoing, program, script(), text), program, outgoing


@pytest.mark.parametrize(
    "data, text",
    [
        (frame(11, offset=64 * PAGE, span=PAGE), "behind its end"),
        (frame(11, offset=(1 << 64) - PAGE, span=PAGE), "behind its end"),
        (frame(11, region=1, span=PAGE), "1 were agreed on"),
        (frame(12, number=1 << 40), "which was not sent"),
        (frame(10) + Destination.welcome(), "second WELCOME"),
        (frame(10) + frame(8, b"x"), "for us to send"),
    ],
)
async def test_who_breaks_the_rules_after_the_switch_leaves_the_program_where_it_is(
    data: bytes, text: str
) -> None:
    """It may run there: here it stands still, with all of its memory."""

    async def after(demand: Raw, bulk: Raw) -> None:
        demand.say(data)
        assert text in (await demand.hear_error())["text"]

    error, program, _ = await run_to(after, text)
    assert (error.outcome, program.told) == ("unknown", ["stop", "leave"])


@pytest.mark.parametrize(
    "value, outcome, told",
    [
        ({"code": "not started", "stage": "switching"}, "source", ["stop", "leave", "restart"]),
        ({"code": "protocol", "stage": "copying"}, "source", ["stop", "leave", "restart"]),
        ({"code": "failed", "stage": "switching"}, "lost", ["stop", "leave"]),
        ({"code": "failed", "stage": "following"}, "lost", ["stop", "leave"]),
        ({"code": "failed"}, "lost", ["stop", "leave"]),
        ({"code": "protocol", "stage": "following"}, "unknown", ["stop", "leave"]),
        ({"code": "unknown"}, "unknown", ["stop", "leave"]),
        ({"code": "unknown", "stage": {}}, "unknown", ["stop", "leave"]),
    ],
)
async def test_what_an_error_means_depends_on_how_far_it_had_come(
    value: dict[str, Any], outcome: str, told: list[str]
) -> None:
    """Only where nothing has run there the program goes on here."""

    async def after(demand: Raw, bulk: Raw) -> None:
        demand.say(of_json(frames.ERROR, value | {"text": "it was a test"}))

    error, program, _ = await run_to(after, "it was a test")
    assert (error.outcome, program.told) == (outcome, told)


async def test_a_storm_of_demands_is_bounded() -> None:
    """So many wait, and no more goes out than is said to land."""

    async def after(demand: Raw, bulk: Raw) -> None:
        demand.say(frame(10))
        memory = contents([EXTENT])[0]
        zeros = next(at for at in range(0, len(memory), PAGE) if not any(memory[at : at + PAGE]))
        one = frame(11, offset=zeros, span=PAGE, number=255)
        for _ in range(2 * wire.MAX_DEMANDS + 100):
            demand.say(one)
        served = 0
        while (said := await demand.hear()).kind != frames.ERROR:
            served += said.kind in (frames.PAGES, frames.ZERO, frames.BATCH)
        assert "demands waiting, and asks for more" in said.json()["text"]
        assert served == wire.MAX_DEMANDS

    error, _, outgoing = await run_to(after, "asks for more")
    assert error.outcome == "unknown"
    assert len(outgoing._in_doubt[Role.DEMAND]) <= wire.MAX_DEMANDS


async def test_demands_are_served_by_priority_once_there_is_room() -> None:
    """What has landed makes room for more."""

    async def after(demand: Raw, bulk: Raw) -> None:
        demand.say(frame(10))
        many = wire.MAX_DEMANDS
        for _ in range(many):
            demand.say(frame(11, span=PAGE, number=7))
        served: list[Said] = [await next_served(demand) for _ in range(many)]
        for at in range(1, 11):  # these have to wait
            demand.say(frame(11, offset=at * PAGE, span=PAGE, number=at))
        demand.say(frame(12, number=served[-1].number))
        order = [(await next_served(demand)).offset // PAGE for _ in range(10)]
        assert sorted(order) == list(range(1, 11))
        demand.say(of_json(frames.ERROR, {"code": "failed", "text": "it was enough"}))

    await run_to(after, "it was enough")


async def next_served(raw: Raw) -> Said:
    while (said := await raw.hear()).kind not in (frames.PAGES, frames.ZERO):
        pass
    return said


async def test_a_demand_of_a_mebibyte_is_no_more_than_that() -> None:
    """The largest costs its own bytes."""

    async def after(demand: Raw, bulk: Raw) -> None:
        demand.say(frame(10) + frame(11, span=EXTENT.length))
        taken = 0
        while taken < EXTENT.length:
            said = await demand.hear()
            if said.kind == frames.ZERO:
                taken += said.span
            elif said.kind == frames.PAGES:
                taken += len(said.body)
            elif said.kind == frames.BATCH:
                taken += len(said.body) - 12 * said.span
        demand.say(of_json(frames.ERROR, {"code": "failed", "text": "it was enough"}))

    await run_to(after, "it was enough")


async def test_a_lie_on_the_way_back_is_tried_again_and_given_up() -> None:
    """Something else may listen there for a moment; after the deadline it is enough."""
    program = Standing()
    async with Destination.listening() as destination:

        async def script() -> None:
            demand, bulk = await switched(destination)
            demand.close()
            bulk.close()
            with contextlib.suppress(TimeoutError):
                while True:
                    await destination.line(landed={"demand": 1 << 40, "bulk": 0}, stage="switching")

        with sending(destination.port) as outgoing:
            task = asyncio.ensure_future(script())
            try:
                with pytest.raises(MigrationFailed, match="which of our frames") as caught:
                    await within(outgoing.run(program))
            finally:
                task.cancel()
                await asyncio.wait((task,))
    assert (caught.value.outcome, program.told) == ("unknown", ["stop", "leave"])
