"""One connection: frames taken in order, silence heard, ends told once."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from aiouffd.errors import DamagedFrame, PeerError
from aiouffd.migration import channel as channels
from aiouffd.migration import wire
from aiouffd.migration.channel import Channel, ToldError
from aiouffd.migration.wire import Frame
from tests.migration import frames
from tests.migration.ends import Raw
from tests.migration.frames import EXTENTS, PAGE, frame, of_json, preamble
from tests.serving import within
from tests.targets import TIME_SCALE

CONTENTS = bytes(range(256)) * (PAGE // 256)


class Taken:
    """What a channel has told."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.lost: list[Channel] = []
        self.turns = 0
        self.rooms = 0
        self.changed = asyncio.Event()

    async def take(self, each: Frame) -> None:
        self.frames.append(each._replace(body=bytes(each.body)))
        self.changed.set()

    def on_lost(self, channel: Channel) -> None:
        self.lost.append(channel)
        self.changed.set()

    def on_turn(self, channel: Channel) -> None:
        self.turns += 1

    def on_room(self) -> None:
        self.rooms += 1
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10 * TIME_SCALE):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


@contextlib.asynccontextmanager
async def connected(
    *,
    silence: float = 60.0,
    take: Callable[[Frame], Coroutine[Any, Any, None]] | None = None,
    stage: str = "",
) -> AsyncIterator[tuple[Channel, Taken, Raw]]:
    """Give a channel at one end of a socket pair, and a peer at the other."""
    ours, theirs = socket.socketpair()
    taken = Taken()
    decoder = wire.Decoder(from_source=True)
    decoder.regions = EXTENTS
    channel = Channel(
        decoder,
        take=take if take is not None else taken.take,
        silence=silence,
        on_lost=taken.on_lost,
        on_turn=taken.on_turn,
        on_room=taken.on_room,
        stage=lambda: stage,
    )
    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: channel, sock=ours)
    raw = Raw(*await asyncio.open_connection(sock=theirs))
    try:
        yield channel, taken, raw
    finally:
        raw.close()
        channel.abort()
        await within(channel.wait_closed())
        assert len(taken.lost) == 1  # once, whatever has happened


async def test_frames_are_taken_in_order_and_turns_are_told() -> None:
    """Pings are not for who takes them; a turn is over when all that is here was taken."""
    async with connected() as (channel, taken, raw):
        raw.say(preamble() + frame(17) + frame(6, span=PAGE, number=1))
        raw.say(frame(4, CONTENTS, span=PAGE, number=2) + frame(17))
        await taken.until(lambda: len(taken.frames) == 2)
        assert [each.number for each in taken.frames] == [1, 2]
        assert taken.frames[1].body == CONTENTS
        assert taken.turns >= 1
        assert channel.lost is None


async def test_a_frame_that_has_to_wait_holds_up_the_next() -> None:
    """Nothing more is read meanwhile; then it goes on with what was there."""
    may = asyncio.Event()
    seen: list[int] = []

    async def take(each: Frame) -> None:
        seen.append(each.number)
        if each.number == 1:
            await may.wait()
            seen.append(-1)
        changed.set()

    changed = asyncio.Event()
    async with connected(take=take) as (channel, taken, raw):
        raw.say(preamble() + b"".join(frame(6, span=PAGE, number=n) for n in range(1, 1000)))
        raw.say(b"".join(frame(6, span=PAGE, number=n) for n in range(1000, 9000)))
        async with asyncio.timeout(10 * TIME_SCALE):
            while not seen:
                await asyncio.sleep(0)
            for _ in range(20):
                await asyncio.sleep(0)
            assert seen == [1]
            assert taken.turns == 0
            may.set()
            while seen[-1] != 8999:
                changed.clear()
                await changed.wait()
        assert seen == [1, -1, *range(2, 9000)]
        assert channel.lost is None


async def test_waiting_ends_with_the_channel() -> None:
    """The one who waits is cancelled; nothing behind it is taken."""
    ended: list[str] = []

    async def take(each: Frame) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async with connected(take=take) as (channel, taken, raw):
        raw.say(preamble() + frame(6, span=PAGE, number=1) + frame(6, span=PAGE, number=2))
        while channel._waiting is None:
            await asyncio.sleep(0)
        channel.abort()
        while not ended:
            await asyncio.sleep(0)
        for _ in range(3):
            await asyncio.sleep(0)
        assert ended == ["cancelled"]
        assert taken.turns == 0


async def test_the_last_word_is_said_while_a_frame_waits() -> None:
    """And the other side's end is noticed, though nothing was read meanwhile."""

    async def take(each: Frame) -> None:
        await asyncio.get_running_loop().create_future()

    async with connected(take=take) as (channel, _, raw):
        raw.say(preamble() + frame(6, span=PAGE, number=1))
        while channel._waiting is None:
            await asyncio.sleep(0)
        channel.tell("refused", PeerError("it was a test"))
        assert (await raw.hear()).json()["code"] == "refused"
        raw.say(frame(4, CONTENTS, span=PAGE, number=2) * 100)
        await raw.writer.drain()
        raw.writer.write_eof()
        assert await raw.is_ended()
        await within(channel.wait_closed())
        assert channel.is_closed


ENDS: dict[str, tuple[bytes, str, str, type[Exception]]] = {
    "a rule broken": (frame(6, span=100), "protocol", "no whole pages", PeerError),
    "damage": (b"\0" + frame(17)[1:], "damaged", "head was damaged", DamagedFrame),
    "what is for us": (frame(12), "protocol", "for us to send", PeerError),
}


@pytest.mark.parametrize("name", ENDS)
async def test_what_is_wrong_is_told_and_read_to_the_end(name: str) -> None:
    """The other side hears it though it goes on talking."""
    data, code, text, kind = ENDS[name]
    async with connected(stage="copying") as (channel, taken, raw):
        raw.say(preamble() + data)
        raw.say(frame(4, CONTENTS, span=PAGE, number=1) * 1000)
        error = (await raw.hear()).json()
        assert (error["code"], error["stage"]) == (code, "copying")
        assert text in error["text"]
        assert type(channel.lost) is kind
        assert channel.is_parting
        assert not taken.frames
        raw.close()
        await within(channel.wait_closed())
        assert channel.is_closed


async def test_what_a_taker_finds_wrong_is_told() -> None:
    """At once, or after it has waited; other errors are ours, and are told as such."""
    for error, waits, text in (
        (PeerError("did it wrongly"), False, "did it wrongly"),
        (PeerError("did it wrongly"), True, "did it wrongly"),
        (KeyError("x"), False, "an error on our side"),
        (KeyError("x"), True, "an error on our side"),
    ):

        async def take(each: Frame, error: Exception = error, waits: bool = waits) -> None:
            if waits:
                await asyncio.sleep(0)
            raise error

        async with connected(take=take) as (_, _, raw):
            raw.say(preamble() + frame(6, span=PAGE, number=1))
            said = (await raw.hear()).json()
            assert said["code"] == "protocol"
            assert text in said["text"]
            assert "stage" not in said


async def test_an_error_of_the_other_side_is_heard() -> None:
    """With its code and its stage; nothing is answered to it."""
    async with connected() as (channel, taken, raw):
        raw.say(preamble() + of_json(3, {"code": "failed", "text": "no", "stage": "copying"}))
        await taken.until(lambda: bool(taken.lost))
        assert isinstance(channel.lost, ToldError)
        assert (channel.lost.code, channel.lost.not_started) == ("failed", True)
        assert await raw.is_ended()


@pytest.mark.parametrize(
    "code, stage, never, final",
    [
        ("not started", "switching", True, True),
        ("failed", "offered", True, True),
        ("failed", "switching", False, True),
        ("protocol", "following", False, True),
        ("unknown", "", False, True),
        ("damaged", "following", False, False),
        ("of tomorrow", "of tomorrow", False, True),
    ],
)
def test_what_an_end_means(code: str, stage: str, never: bool, final: bool) -> None:
    """Whether the program has not run there, and whether another connection would help."""
    error = ToldError(code, "text", stage)
    assert error.not_started is never
    assert channels.is_final(error) is final


def test_what_is_lost_may_be_found_again() -> None:
    """A line that broke, or one that damages bytes; not a peer that breaks rules."""
    assert not channels.is_final(None)
    assert not channels.is_final(ConnectionResetError())
    assert not channels.is_final(DamagedFrame("x"))
    assert channels.is_final(PeerError("x"))


async def test_silence_is_a_loss() -> None:
    """After the time that was given for it."""
    async with connected(silence=0.05) as (channel, taken, _):
        await taken.until(lambda: bool(taken.lost))
        assert isinstance(channel.lost, ConnectionAbortedError)
        assert "nothing was heard for 0.05 s" in str(channel.lost)


async def test_each_side_says_something_often_enough() -> None:
    """Two channels with nothing to say keep each other alive."""
    ours, theirs = socket.socketpair()
    silence = 0.2 * TIME_SCALE
    lost: list[Channel] = []
    pair = []

    async def take(each: Frame) -> None:
        raise AssertionError(each)

    loop = asyncio.get_running_loop()
    for sock, from_source in ((ours, True), (theirs, False)):
        decoder = wire.Decoder(from_source=from_source)
        made = Channel(decoder, take=take, silence=silence, on_lost=lost.append)
        await loop.create_connection(lambda made=made: made, sock=sock)  # type: ignore[misc]
        made.send_preamble()
        pair.append(made)
    said = [each.sent_bytes for each in pair]
    end = loop.time() + 5 * silence
    while loop.time() < end:
        await asyncio.sleep(silence / 4)
    assert not lost
    assert all(each.sent_bytes - old >= 5 * 36 for each, old in zip(pair, said, strict=True))
    for each in pair:
        each.abort()
        await within(each.wait_closed())


async def test_a_side_that_never_listens_is_lost() -> None:
    """What is said to it is not kept for ever."""
    async with connected() as (channel, taken, raw):
        raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
        part = frame(frames.ZERO, span=PAGE, number=1)
        said = 0
        while channel.lost is None:
            channel.send([part, bytes(100_000)])
            said += len(part) + 100_000
            assert said < 64 << 20
        assert isinstance(channel.lost, ConnectionAbortedError)
        assert "takes nothing" in str(channel.lost)
        assert said > channels._MOST_UNTAKEN
        assert taken.lost == [channel]


async def test_room_is_told() -> None:
    """Once the kernel takes more again, what was kept has gone."""
    async with connected() as (channel, taken, raw):
        raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
        while not channel.full:
            channel.send([bytes(36), bytes(100_000)])
        raw.writer.transport.resume_reading()  # type: ignore[attr-defined]
        reading = asyncio.ensure_future(raw.is_ended())
        await taken.until(lambda: taken.rooms == 1)
        assert not channel.full
        channel.part()
        channel.close()
        assert await within(reading)


async def test_the_last_word_finds_its_way_though_more_comes_in() -> None:
    """Closing with bytes unread would make the kernel take it back."""
    async with connected() as (channel, _, raw):
        for _ in range(50):
            raw.say(frame(4, CONTENTS, span=PAGE, number=1))
        channel.send([frame(16)])
        channel.part()
        assert (await raw.hear()).kind == frames.CANCEL
        raw.close()


async def test_who_does_not_close_is_not_waited_for_for_ever() -> None:
    """After the last word the other side has as long as it may be silent."""
    async with connected(silence=0.05) as (channel, _, raw):
        channel.part()
        assert await raw.is_ended()
        await within(channel.wait_closed())


async def test_an_end_of_the_stream_is_a_loss() -> None:
    """Migrations end by frames."""
    async with connected() as (channel, taken, raw):
        raw.writer.write_eof()
        await taken.until(lambda: bool(taken.lost))
        assert "closed the connection" in str(channel.lost)
        channel.send([frame(17)])  # says nothing any more, and breaks nothing
        assert channel.sent_bytes == 0


async def test_one_that_was_never_connected_is_closed() -> None:
    """And given up before its connection is made it gives that up."""
    taken = Taken()
    channel = Channel(
        wire.Decoder(from_source=True), take=taken.take, silence=1.0, on_lost=taken.on_lost
    )
    await within(channel.wait_closed())
    assert channel.is_closed
    assert channel.socket is None
    channel.abort()
    heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            heard.set_result(await reader.read())
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        await asyncio.get_running_loop().create_connection(lambda: channel, "127.0.0.1", port)
        await within(channel.wait_closed())
        assert await within(heard) == b""
    assert taken.lost == [channel]
