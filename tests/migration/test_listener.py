"""Who comes to a listener: good ones go through, whatever others do before and beside them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import resource
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from aiouffd.errors import ClosedError, MigrationFailed
from aiouffd.migration.channel import Channel
from aiouffd.migration.listener import Listener
from aiouffd.migration.outgoing import Plan
from aiouffd.migration.wire import Role
from aiouffd.peers import Limits
from tests.migration import frames
from tests.migration.ends import (
    STATE,
    Raw,
    goes_through,
    landed,
    source_of,
    take_in,
)
from tests.migration.frames import PAGE, frame, hello, of_json, preamble, runs
from tests.serving import within
from tests.targets import TIME_SCALE

CONTENTS = bytes(range(256)) * (PAGE // 256)


async def settles(condition: Callable[[], bool]) -> None:
    """Wait until the loop has come to something."""
    async with asyncio.timeout(10 * TIME_SCALE):
        while not condition():
            await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def listening(*, goes_on: bool = True, **settings: Any) -> AsyncIterator[Listener]:
    """Listen; in the end a good migration goes through, and nothing is left of any."""
    async with Listener(**settings) as listener:
        yield listener
        if goes_on:
            await goes_through(listener)
        await settles(lambda: not listener._known)
        assert not listener._waiting
    await settles(lambda: not listener.connections)
    gc.collect()
    left = [each for each in gc.get_objects() if isinstance(each, Channel)]
    assert not left, left


async def test_one_after_the_other_goes_through() -> None:
    """With everything that can be agreed on."""
    async with listening(goes_on=False) as listener:
        for compress in ("", "zstd", "lz4"):
            for checksums in (False, True):
                plan = Plan(rounds=0, compress=compress, checksums=checksums)
                await goes_through(listener, plan=plan)


async def test_several_at_once_go_through() -> None:
    """Each is accepted once, in the order in which they came."""
    async with listening(goes_on=False) as listener:
        await asyncio.gather(*(goes_through(listener) for _ in range(4)))


# --- greetings ----------------------------------------------------------------------------

GREETINGS: dict[str, tuple[bytes, str, str]] = {
    "another protocol": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "protocol", "does not speak"),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "protocol", "but TLS"),
    "version 2": (preamble(2, 2), "version", "versions 2 to 2 .* we speak 1 to 1"),
    "version 0": (preamble(0, 0), "version", "versions 0 to 0"),
    "a damaged preamble": (preamble()[:-1] + b"\0", "damaged", "preamble"),
    "a damaged head": (preamble() + b"\0" + hello()[1:], "damaged", "head was damaged"),
    "a damaged body": (preamble() + hello()[:-1] + b"!", "damaged", "body was damaged"),
    "a long hello": (preamble() + frame(1, length=(1 << 20) + 1), "protocol", "1048576 are"),
    "no JSON": (preamble() + frame(1, b"x" * (1 << 20)), "protocol", "no JSON"),
    "a list": (preamble() + frame(1, b"[]"), "protocol", "no JSON object"),
    "pages": (preamble() + frame(4, CONTENTS, span=PAGE), "protocol", "0 were agreed on"),
    "a ping": (preamble() + frame(17), "protocol", "began with a PING"),
    "an ACK": (preamble() + frame(12), "protocol", "for us to send"),
    "no role": (preamble() + hello("x"), "protocol", "role 'x'"),
    "a role that is no text": (preamble() + of_json(1, {"role": {}}), "protocol", "role"),
    "no epoch": (preamble() + hello(epoch=None), "protocol", "without an epoch"),
    "epoch 0": (preamble() + hello(epoch=0), "protocol", "without an epoch"),
    "epoch 2**63": (preamble() + hello(epoch=1 << 63), "protocol", "without an epoch"),
    "bulk first": (preamble() + hello("bulk"), "protocol", "with a connection for bulk"),
    "an unknown token": (preamble() + hello(token="x" * 32), "unknown", "not known here"),
    "a token of a mebibyte": (preamble() + hello(token="x" * 1_000_000), "unknown", "not known"),
    "a token that is a list": (preamble() + hello(token=[1]), "unknown", "not known"),
    "no regions": (preamble() + hello(regions=None), "protocol", "without a list"),
    "half a page": (
        preamble() + hello(regions=[{"name": "a", "length": 7, "page_size": PAGE}]),
        "protocol",
        "no whole pages",
    ),
    "too much memory": (
        preamble() + hello(regions=[{"name": "a", "length": 1 << 41, "page_size": PAGE}]),
        "protocol",
        "2199023255552 bytes of memory; 1099511627776 are allowed",
    ),
    "no features": (preamble() + hello(features=None), "protocol", "list of features"),
    "odd features": (preamble() + hello(features=[1]), "protocol", "list of features"),
    "many features": (preamble() + hello(features=["x"] * 65), "protocol", "list of features"),
    "a long feature": (preamble() + hello(features=["x" * 256]), "protocol", "list of features"),
}


async def test_who_greets_wrongly_is_told_so() -> None:
    """By a preamble and an ERROR that names it; the next one is served."""
    async with listening() as listener:
        for count, (name, (data, code, text)) in enumerate(GREETINGS.items(), 1):
            raw = await Raw.open(listener.port)
            raw.say(data)
            await raw.hear_preamble()
            error = await raw.hear_error()
            assert (error["code"], "stage" in error) == (code, False), name
            assert re.search(text, error["text"]), name
            await settles(lambda: not listener.connections)
            assert listener.refused == count, name


async def test_unknown_features_are_left_out() -> None:
    """What a destination does not know it does not agree to."""
    async with listening() as listener:

        async def destination() -> None:
            incoming = await listener.accept()
            assert incoming.offered == {"checksums", "precopy", "of tomorrow"}
            async with landed(incoming):
                with pytest.raises(MigrationFailed, match="cancelled"):
                    await incoming.switched()

        task = asyncio.create_task(destination())
        offered = ["of tomorrow", "checksums", "precopy"]
        demand, bulk, welcome = await source_of(listener.port, features=offered)
        assert welcome["features"] == ["checksums", "precopy"]
        assert welcome["most_state"] == 64 << 20
        demand.say(frame(frames.CANCEL))
        await within(task)
        assert await demand.is_ended()
        assert await bulk.is_ended()
        for raw in (demand, bulk):
            raw.close()


async def test_who_goes_on_before_it_is_welcomed_is_refused() -> None:
    """In the same breath, or later."""
    async with listening() as listener:
        raw = await Raw.greeted(listener.port, hello() + hello())
        assert await raw.is_ended()
        raw.close()
        for data in (
            frame(frames.SWITCH, number=1),
            frame(frames.STATE, b"x", span=1),
            of_json(frames.END, {}),
            of_json(frames.PROGRESS, {}),
            hello(),
            frame(frames.PAGES, CONTENTS, span=PAGE, number=1),
        ):
            raw = await Raw.greeted(listener.port)
            await raw.hear_preamble()
            raw.say(data)
            assert (await raw.hear_error())["stage"] == "offered"
            await settles(lambda: not listener._known)


@pytest.mark.parametrize("said", [b"", b"aiou", preamble(), preamble() + hello()[:50]])
async def test_who_says_nothing_is_dropped(said: bytes) -> None:
    """Within the limits' patience."""
    async with listening(limits=Limits(patience=0.05)) as listener:
        raw = await Raw.open(listener.port)
        raw.say(said)
        assert await raw.is_ended()
        raw.close()
        assert listener.refused == 1


async def test_silence_after_a_greeting_is_a_loss() -> None:
    """A migration that nobody has taken yet ends with its connection."""
    async with listening(silence=0.05) as listener:
        raw = await Raw.greeted(listener.port)
        assert await raw.is_ended()
        raw.close()
        await settles(lambda: not listener._known)


async def test_a_source_that_pings_is_not_silent() -> None:
    """However long it has to wait."""
    async with listening(silence=0.2) as listener:
        raw = await Raw.greeted(listener.port)
        await raw.hear_preamble()
        incoming = await within(listener.accept())
        for _ in range(10):
            assert (await raw.hear(but=())).kind == frames.PING
            raw.say(frame(frames.PING))
        assert incoming.stage.value == "offered"
        incoming.refuse("it was a test")
        error = await raw.hear_error()
        assert error == {
            "code": "refused",
            "text": "it was refused: it was a test",
            "stage": "offered",
        }


# --- many ---------------------------------------------------------------------------------


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """As many as this user may have."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 2000:
        pytest.skip(f"needs 2000 descriptors; this user may have {before[1]}: ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("many_descriptors")
async def test_a_thousand_connections_keep_nobody_out() -> None:
    """The oldest that have not said what they want go first; so do those that said it wrongly."""
    sayings = (b"", preamble() + hello()[:60], b"GET / HTTP/1.1\r\n\r\n")
    async with listening() as listener:
        crowd = []
        for number in range(1000):
            crowd.append(await Raw.open(listener.port))
            crowd[-1].say(sayings[number % 3])
        assert listener.connections <= 128
        await goes_through(listener)
        assert listener.refused > 800
        for raw in crowd:
            raw.close()


async def test_migrations_that_nobody_takes_are_counted() -> None:
    """Up to a number; one that has gone makes room again."""
    async with listening() as listener:
        raws = [await Raw.greeted(listener.port) for _ in range(16)]
        for raw in raws:
            await raw.hear_preamble()
        late = await Raw.greeted(listener.port)
        await late.hear_preamble()
        assert "16 migrations wait" in (await late.hear_error())["text"]
        for raw in raws:
            raw.close()
        await settles(lambda: not listener._waiting)


async def test_greetings_that_went_away_cost_nothing() -> None:
    """A hundred of them, with nobody there to take them."""
    async with listening() as listener:
        for _ in range(100):
            raw = await Raw.greeted(listener.port)
            await raw.hear_preamble()
            raw.close()
        await settles(lambda: not listener._known)


async def test_accepting_ends_with_the_listener() -> None:
    """Those who wait hear of it; one who was cancelled took nothing with it."""
    async with listening(goes_on=False) as listener:
        lost = asyncio.create_task(listener.accept())
        await asyncio.sleep(0)
        lost.cancel()
        await asyncio.wait((lost,))
        await goes_through(listener)
        waiting = [asyncio.create_task(listener.accept()) for _ in range(3)]
        await asyncio.sleep(0)
        await listener.aclose()
        for each in waiting:
            with pytest.raises(ClosedError):
                await within(each)
        with pytest.raises(ClosedError):
            await listener.accept()


async def test_a_listener_that_closes_ends_its_migrations() -> None:
    """Both sides hear of it."""
    async with listening(goes_on=False) as listener:
        task = asyncio.create_task(take_in(listener))
        demand, bulk, _ = await source_of(listener.port)
        await listener.aclose()
        with pytest.raises(MigrationFailed, match="closed"):
            await within(task)
        for raw in (demand, bulk):
            assert await raw.is_ended()
            raw.close()


# --- sources that break rules ---------------------------------------------------------------

#: What is said where: "d" on the connection for demand, "b" on that for bulk; what the answer is.
WRONG: dict[str, tuple[str, bytes, str]] = {
    "a second hello": ("d", hello(), "second HELLO"),
    "a second hello on bulk": ("b", hello(), "second HELLO"),
    "a welcome": ("d", of_json(2, {}), "for us to send"),
    "an ACK": ("b", frame(12, number=1), "for us to send"),
    "a DEMAND": ("d", frame(11, span=PAGE), "for us to send"),
    "RUNNING": ("d", frame(10), "for us to send"),
    "DONE": ("d", of_json(14, {}), "for us to send"),
    "pages on demand": ("d", frame(4, CONTENTS, span=PAGE, number=1), "not agreed on"),
    "a batch on demand": ("d", frame(5, runs((0, PAGE)) + CONTENTS, span=1, number=1), "not agre"),
    "zeros on demand": ("d", frame(6, span=PAGE, number=1), "not agreed on"),
    "missing on demand": ("d", frame(7, runs((0, PAGE)), span=1, number=1), "connection for dem"),
    "a state on demand": ("d", frame(8, b"x", span=1), "connection for demand"),
    "a switch on demand": ("d", frame(9, number=1), "connection for demand"),
    "progress on bulk": ("b", of_json(13, {}), "connection for bulk"),
    "a cancel on bulk": ("b", frame(16), "connection for bulk"),
    "an end on bulk": ("b", of_json(15, {}), "connection for bulk"),
    "an end": ("d", of_json(15, {}), "not over"),
    "number 0": ("b", frame(4, CONTENTS, span=PAGE), "frame 0 behind frame 0"),
    "numbers that go back": (
        "b",
        frame(6, span=PAGE, number=5) + frame(6, span=PAGE, number=4),
        "frame 4 behind frame 5",
    ),
    "a number twice": (
        "b",
        frame(4, CONTENTS, span=PAGE, number=5) + frame(4, CONTENTS, span=PAGE, number=5),
        "frame 5 behind frame 5",
    ),
    "behind the end": ("b", frame(4, CONTENTS, offset=64 << 20, span=PAGE, number=1), "behind"),
    "another region": ("b", frame(4, CONTENTS, region=2, span=PAGE, number=1), "region 2"),
    "no checksum": ("b", frame(4, CONTENTS, flags=0, span=PAGE, number=1), "its checksum"),
    "packed": ("b", frame(4, CONTENTS, flags=3, span=PAGE, number=1), "was not agreed on"),
    "kind 18": ("b", frame(18), "unknown kind"),
    "a long state": ("b", frame(8, b"x", span=101), "state of 101 bytes; 100 are"),
    "a state with a hole": ("b", frame(8, b"x", offset=1, span=2), "do not fit together"),
    "a state that is too long": ("b", frame(8, b"xxx", span=2), "do not fit together"),
    "a state that is longer": (
        "b",
        frame(8, b"x" * 60, span=100) + frame(8, b"x" * 60, offset=60, span=100),
        "do not fit",
    ),
    "half a state": ("b", frame(8, b"x", span=2) + frame(9, span=2, number=1), "it should have 2"),
    "no state": ("b", frame(9, span=2, number=1), "state of 0 bytes; it should have 2"),
    "more state than said": ("b", frame(8, b"xx", span=2) + frame(9, number=1), "should have 0"),
}


@contextlib.asynccontextmanager
async def failing(listener: Listener, text: str) -> AsyncIterator[None]:
    """Be a destination whose migration does not come to its switch."""

    async def destination() -> None:
        incoming = await listener.accept()
        async with landed(incoming):
            with pytest.raises(MigrationFailed, match=text) as caught:
                await incoming.switched()
            assert caught.value.outcome == "source"

    task = asyncio.create_task(destination())
    try:
        yield
        await within(task)
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def test_a_source_that_breaks_the_rules_is_told_which() -> None:
    """Its migration ends at once, on both connections; the next one goes through."""
    async with listening(most_state=100) as listener:
        for name, (where, data, text) in WRONG.items():
            async with failing(listener, "127[.]0[.]0[.]1.*" + text):
                demand, bulk, _ = await source_of(listener.port)
                told, other = (demand, bulk) if where == "d" else (bulk, demand)
                told.say(data)
                error = await told.hear_error()
                assert (error["code"], error["stage"]) == ("protocol", "copying"), name
                assert text in error["text"], name
                assert (await other.hear_error())["code"] == "failed", name
            await goes_through(listener)


async def test_damage_is_told_and_the_source_may_come_back() -> None:
    """Another line may be better: what landed is said, and the rest goes again."""
    async with listening() as listener:
        task = asyncio.create_task(take_in(listener))
        demand, bulk, welcome = await source_of(listener.port)
        assert welcome["landed"] == {"demand": 0, "bulk": 0}
        bulk.say(frame(frames.PAGES, CONTENTS, span=PAGE, number=7))
        assert (await bulk.hear()).number == 7
        damaged = frame(frames.PAGES, CONTENTS, offset=PAGE, span=PAGE, number=8)
        bulk.say(damaged[:-1] + b"!")
        error = await bulk.hear_error()
        assert (error["code"], error["stage"]) == ("damaged", "copying")
        assert await demand.is_ended()
        demand.close()
        demand, bulk, again = await source_of(listener.port, token=welcome["token"], epoch=2)
        assert again["landed"] == {"demand": 0, "bulk": 7}
        # The page that came damaged is still to come: it must not be there as it came.
        bulk.say(frame(frames.MISSING, runs((PAGE, PAGE)), span=1, number=9))
        bulk.say(frame(frames.STATE, STATE, span=len(STATE)))
        bulk.say(frame(frames.SWITCH, span=len(STATE), number=10))
        while (said := await demand.hear()).kind != frames.RUNNING:
            pass
        bulk.say(frame(frames.PAGES, CONTENTS[::-1], offset=PAGE, span=PAGE, number=11))
        while (said := await demand.hear()).kind != frames.DONE:
            pass
        assert said.json()["left_bytes"] == 0
        demand.say(of_json(frames.END, {}))
        (heap, stack), state = await within(task)
        assert heap == CONTENTS + CONTENTS[::-1] + bytes(len(heap) - 2 * PAGE)
        assert not any(stack)
        assert state == STATE
        for raw in (demand, bulk):
            assert await raw.is_ended()
            raw.close()


@pytest.mark.parametrize("there", [0, 32, 64])
async def test_a_body_that_broke_off_is_not_there_after_the_switch(there: int) -> None:
    """A part of it came, over pages that were there or not: the program reads none of it."""
    async with listening() as listener:
        incoming = asyncio.create_task(listener.accept())
        held = asyncio.Event()
        missing = asyncio.get_running_loop().create_future()

        async def destination() -> None:
            taken = await incoming
            async with landed(taken) as fds:
                await taken.switched()
                missing.set_result(os.fstat(fds[0]).st_blocks)
                taken.note_running()
                await held.wait()

        task = asyncio.create_task(destination())
        demand, bulk, welcome = await source_of(listener.port)
        body = CONTENTS * 64
        await settles(incoming.done)
        taken = incoming.result()
        if there:
            before = CONTENTS * there
            bulk.say(frame(frames.PAGES, before, span=len(before), number=1))
        bulk.say(frame(frames.PAGES, body, span=len(body), number=2)[:-1000])
        await bulk.writer.drain()
        decoder = taken._channels[Role.BULK].decoder
        await settles(lambda: decoder._body_filled == len(body) - 1000)
        assert taken._in_place == (there == 64)
        bulk.close()
        assert await demand.is_ended()
        demand.close()
        demand, bulk, _ = await source_of(listener.port, token=welcome["token"], epoch=2)
        bulk.say(frame(frames.MISSING, runs((0, len(body))), span=1, number=3))
        bulk.say(frame(frames.SWITCH, number=4))
        assert await within(missing) == 0
        held.set()
        await within(task)
        for raw in (demand, bulk):
            raw.close()


async def test_a_line_is_one_pair_of_connections() -> None:
    """What belongs to no pair is closed, which may be nobody's fault; a newer pair takes over."""
    async with listening() as listener, failing(listener, "cancelled"):
        demand, bulk, welcome = await source_of(listener.port)
        token = welcome["token"]
        for role, epoch in (("bulk", 1), ("bulk", 2), ("demand", 1)):
            raw = await Raw.greeted(listener.port, hello(role, token=token, epoch=epoch))
            assert await raw.is_ended()
            raw.close()
        bulk.say(frame(frames.ZERO, span=PAGE, number=1))  # the pair stands
        assert (await bulk.hear()).kind == frames.ACK
        newer = await Raw.greeted(listener.port, hello(token=token, epoch=3))
        await newer.hear_preamble()
        assert (await newer.hear()).json()["stage"] == "copying"
        for raw in (demand, bulk):
            assert await raw.is_ended()
            raw.close()
        newer.say(frame(frames.CANCEL))
        assert await newer.is_ended()
        newer.close()


async def test_no_line_for_a_while_is_the_end() -> None:
    """The deadline has passed: the program runs on at the source."""
    async with listening(deadline=0.05) as listener, failing(listener, "no line"):
        demand, bulk, _ = await source_of(listener.port)
        demand.close()
        assert await bulk.is_ended()
        bulk.close()


# --- who is let in --------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "example.invalid."])
def test_other_machines_are_let_in_only_if_that_was_asked_for(host: str) -> None:
    """By name; not without TLS and without a word."""
    if host.endswith("."):
        with pytest.raises(OSError, match=r"not known|resolution"):
            Listener(host)
        return
    with pytest.raises(ValueError, match="can be reached by other machines"):
        Listener(host)
    Listener(host, plain=True)


def test_loopback_is_open_to_this_machine_alone() -> None:
    """By either family, and by name."""
    for host in ("127.0.0.1", "127.9.9.9", "localhost", "::1"):
        Listener(host)


async def test_a_name_that_comes_to_mean_another_address_is_looked_at_again() -> None:
    """When it is listened at: names change."""
    listener = Listener("localhost")
    listener._host = "0.0.0.0"
    with pytest.raises(ValueError, match="can be reached by other machines"):
        await listener.start()
    await listener.aclose()


async def test_asked_for_by_name_others_may_come() -> None:
    """Plainly."""
    async with listening(host="0.0.0.0", plain=True):
        pass


async def test_frames_of_a_line_that_was_given_up_are_not_taken() -> None:
    """They may be older than what a later line brings, whatever number they have."""
    async with listening() as listener:
        incoming = asyncio.create_task(listener.accept())
        over = asyncio.Event()

        async def destination() -> None:
            async with landed(await incoming):
                await over.wait()

        task = asyncio.create_task(destination())
        old_demand, old_bulk, welcome = await source_of(listener.port)
        demand, bulk, _ = await source_of(listener.port, token=welcome["token"], epoch=2)
        with contextlib.suppress(OSError):  # it may be closed by now
            old_bulk.say(frame(frames.PAGES, CONTENTS, span=len(CONTENTS), number=5))
            await old_bulk.writer.drain()
        assert await old_bulk.is_ended()
        assert await old_demand.is_ended()
        assert not (await incoming)._landed[0]
        over.set()
        await within(task)
        for raw in (old_demand, old_bulk, demand, bulk):
            raw.close()
