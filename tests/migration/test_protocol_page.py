"""The page that describes the wire: right in every number, and enough to write a decoder from."""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from aiouffd.migration import channel, wire
from aiouffd.migration.listener import Listener
from aiouffd.migration.outgoing import Outgoing, Plan
from aiouffd.migration.stages import Stage
from aiouffd.migration.wire import Encoder, Extent, Kind
from tests.docs.pages import ROOT
from tests.migration.ends import STATE, Standing, contents, memory_of, take_in
from tests.migration.frames import PAGE
from tests.seekable import zstd
from tests.serving import within

PAGE_FILE = ROOT / "docs" / "reference" / "migration-protocol.md"


def tables(page: Path = PAGE_FILE) -> dict[str, list[list[str]]]:
    """Give the tables of a page, by the first words of their heads."""
    found: dict[str, list[list[str]]] = {}
    rows: list[list[str]] = []
    for line in [*page.read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            found.setdefault(rows[0][0], []).extend(rows[2:])
            rows = []
    return found


TABLES = tables()


# --- the page is right -----------------------------------------------------------------------


def test_heads_are_laid_out_as_the_page_says() -> None:
    """Field by field, from the first byte to the last."""
    sizes = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "8 bytes": 8}
    fields = [(name, int(offset), sizes[kind]) for name, offset, kind, _ in TABLES["Field"]]
    preamble, head = fields[:4], fields[4:]
    for part, size in ((preamble, wire.PREAMBLE_BYTES), (head, wire.HEAD_BYTES)):
        at = 0
        for _, offset, length in part:
            assert offset == at
            at += length
        assert at == size
    marks = {name: 0x11 + number for number, (name, _, _) in enumerate(head[2:7])}
    made = b"".join(
        Encoder().frame(
            Kind.DEMAND,
            region=marks["region"],
            number=marks["number"],
            offset=marks["offset"],
            span=marks["span"],
        )
    )
    for name, offset, length in head[2:7]:
        wanted = 0 if name == "length" else marks[name]
        assert int.from_bytes(made[offset : offset + length], "big") == wanted


def test_kinds_are_those_of_the_page() -> None:
    """Numbers, names, senders and limits."""
    rows = {int(row[0]): row[1:] for row in TABLES["Kind"]}
    assert {number: row[0] for number, row in rows.items()} == {k.value: k.name for k in Kind}
    for number, (_, sender, _, limit, _) in rows.items():
        kind = Kind(number)
        assert wire.LIMITS[kind] == int(limit), kind
        assert (kind in wire.FROM_SOURCE) is ("S" in sender.split(", ")), kind
        assert (kind in wire.FROM_DESTINATION) is ("D" in sender.split(", ")), kind


def test_limits_are_those_of_the_page() -> None:
    """Each by its own words."""
    limits = {what: int(most) for what, most in TABLES["What"]}
    assert list(limits.values()) == [
        wire.MAX_DATA,
        wire.MAX_DATA,
        wire.MAX_SPAN,
        wire.MAX_RUNS,
        wire.MAX_REGIONS,
        wire.MAX_NAME,
        wire.MAX_FEATURES,
        wire.MAX_NAME,
        wire.MAX_PAGE,
        wire.MAX_DEMANDS,
        wire.MAX_EPOCH,
        wire.MAX_TOKEN,
    ]


def test_flags_features_and_codes_are_those_of_the_page() -> None:
    """By their names."""
    flags = {name: int(flag) for flag, name, _ in TABLES["Flag"]}
    assert flags == {"checked": wire.FLAG_CHECKED} | wire.COMPRESSION
    features = {row[0].strip("`") for row in TABLES["Feature"]}
    assert features == {wire.CHECKSUMS, "precopy", *wire.COMPRESSION}
    codes = {row[0].strip("`") for row in TABLES["Code"]}
    assert {channel.NOT_STARTED, channel.UNKNOWN, channel.DAMAGED} < codes
    for word in re.findall(r"code: In a word: (.*?)\n", str(channel.ToldError.__doc__)):
        assert set(re.findall(r"``(.*?)``", word)) <= codes


def dumps() -> Iterator[bytes]:
    """Give the bytes of each hex dump."""
    text = PAGE_FILE.read_text(encoding="utf-8")
    for block in re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield b"".join(bytes.fromhex(line.split("  ")[0]) for line in block.splitlines())


def test_the_bytes_of_the_page_are_those_that_are_sent() -> None:
    """A preamble and two frames."""
    table = wire.table([(0, 4096), (0x5000, 8192)])
    demand = Encoder().frame(Kind.DEMAND, region=1, number=255, offset=0x3000, span=4096)
    missing = Encoder().frame(Kind.MISSING, table, number=9, span=2)
    assert list(dumps()) == [wire.PREAMBLE, b"".join(demand), b"".join(missing)]
    assert zlib.crc32(b"123456789") == 0xCBF43926


# --- a decoder, from the page alone -------------------------------------------------------------


class Read(NamedTuple):
    kind: int
    region: int
    number: int
    offset: int
    span: int
    body: bytes


def read_all(stream: bytes) -> Iterator[Read]:
    """Take one direction of a connection apart; knows nothing but the page."""

    def number(at: int, size: int) -> int:
        return int.from_bytes(stream[at : at + size], "big")

    assert stream[:8] == b"aiouffdM"
    assert number(8, 2) >= 1 >= number(10, 2)
    assert number(12, 4) == zlib.crc32(stream[:12])
    at = 16
    while at < len(stream):
        assert number(at + 32, 4) == zlib.crc32(stream[at : at + 32])
        kind, flags, length = number(at, 1), number(at + 1, 1), number(at + 4, 4)
        body = stream[at + 36 : at + 36 + length]
        assert len(body) == length
        if flags & 1:
            assert number(at + 28, 4) == zlib.crc32(body)
        else:
            assert not body or kind in (4, 5)
        span = number(at + 24, 4)
        if flags & 2:
            body = zstd.decompress(body)
        if flags & 4:
            most = span if kind == 4 else 1097728
            body = pytest.importorskip("lz4.block").decompress(body, uncompressed_size=most)
        yield Read(kind, number(at + 2, 2), number(at + 8, 8), number(at + 16, 8), span, body)
        at += 36 + length


def runs_of(frame: Read) -> Iterator[tuple[int, bytes]]:
    """Give what a frame about memory brings: where, and what."""
    if frame.kind == 4:
        yield frame.offset, frame.body
    elif frame.kind == 6:
        yield frame.offset, bytes(frame.span)
    elif frame.kind == 5:
        at = 12 * frame.span
        for run in range(frame.span):
            entry = frame.body[12 * run : 12 * run + 12]
            length = int.from_bytes(entry[8:], "big")
            yield int.from_bytes(entry[:8], "big"), frame.body[at : at + length]
            at += length
        assert at == len(frame.body)


class Recorded(NamedTuple):
    """Both directions of one connection."""

    sent: bytearray
    answered: bytearray


@asynccontextmanager
async def recording(port: int) -> AsyncIterator[tuple[int, list[Recorded]]]:
    """Stand between the two sides, and write down what they say."""
    connections: list[Recorded] = []
    tasks: set[asyncio.Task[None]] = set()

    async def pass_on(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: bytearray
    ) -> None:
        try:
            while data := await reader.read(1 << 16):
                record += data
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        record = Recorded(bytearray(), bytearray())
        connections.append(record)
        there, back = await asyncio.open_connection("127.0.0.1", port)
        tasks.update(
            (
                asyncio.create_task(pass_on(reader, back, record.sent)),
                asyncio.create_task(pass_on(there, writer, record.answered)),
            )
        )

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], connections
        if tasks:
            await within(asyncio.wait(tasks))
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("compress", ["", "zstd", "lz4"])
@pytest.mark.parametrize("checksums", [False, True])
async def test_a_recorded_migration_can_be_read_by_the_page(compress: str, checksums: bool) -> None:
    """All memory and the state are in it, and each side has said what the page says it says."""
    extents = [Extent("heap", 96 * PAGE, PAGE), Extent("st\u00e4ck", 16 * PAGE, PAGE)]
    data = contents(extents)
    plan = Plan(rounds=0, compress=compress, checksums=checksums)
    async with Listener() as listener, recording(listener.port) as (port, connections):
        with memory_of(extents, data) as memory:
            outgoing = Outgoing(memory, "127.0.0.1", port, plan=plan, name="recorded")
            receiving = asyncio.create_task(take_in(listener))
            await within(asyncio.gather(outgoing.run(Standing()), receiving))
    demand, bulk = connections
    sent = [list(read_all(bytes(each.sent))) for each in (demand, bulk)]
    answered = [list(read_all(bytes(each.answered))) for each in (demand, bulk)]
    members = {name: {row[0].strip("`") for row in TABLES[f"Member of {name}"]} for name in SAID}
    hello, hello_again = (json.loads(frames[0].body) for frames in sent)
    assert set(hello) == members["HELLO"]
    assert set(hello_again) < members["HELLO"]
    assert hello["regions"] == [each._asdict() for each in extents]
    welcome = json.loads(answered[0][0].body)
    assert set(welcome) == members["WELCOME"]
    assert welcome["features"] == sorted(["checksums"] * checksums + [compress] * bool(compress))
    assert hello_again["token"] == welcome["token"]
    # All memory, as the page says it comes together.
    made = [bytearray(each.length) for each in extents]
    missing = [set(range(0, each.length, PAGE)) for each in extents]
    for frames in reversed(sent):  # what comes twice is the same here: nothing is written any more
        numbers = [each.number for each in frames if each.kind in (4, 5, 6, 7, 9)]
        assert numbers == sorted(set(numbers))
        for each in frames:
            for offset, body in runs_of(each):
                made[each.region][offset : offset + len(body)] = body
                missing[each.region] -= set(range(offset, offset + len(body), PAGE))
    assert made == data
    assert not any(missing)
    kinds = [each.kind for each in sent[1]]
    told = kinds.index(9)
    assert set(kinds[1:told]) == {7, 8}
    assert b"".join(each.body for each in sent[1] if each.kind == 8) == STATE
    assert {each.kind for each in answered[0]} >= {2, 10, 14}
    assert {each.kind for each in answered[1]} <= {2, 12, 17}
    assert sent[0][-1].kind == 15


SAID = ("HELLO", "WELCOME", "ERROR")


def test_the_examples_of_json_have_the_members_of_their_tables() -> None:
    """And can be read."""
    text = PAGE_FILE.read_text(encoding="utf-8")
    examples: list[dict[str, Any]] = [
        json.loads(each)
        for each in re.findall(r"^```json\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]
    for value, name in zip(examples, SAID, strict=False):
        assert list(value) == [row[0].strip("`") for row in TABLES[f"Member of {name}"]]
    assert wire.extents_of(examples[0]["regions"], 1 << 30)
    assert {"offered", "copying", "switching", "following", "done"} == {
        each.value for each in Stage if each not in (Stage.CANCELLED, Stage.FAILED)
    }
