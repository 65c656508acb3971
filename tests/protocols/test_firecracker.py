"""Firecracker's hand-over: every release and relative, in pieces of every size, and refusals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.errors import ClosedError, PeerError
from aiouffd.fds import OwnedFd
from aiouffd.handover import HandedRegion
from aiouffd.protocols import firecracker
from aiouffd.protocols.firecracker import Message, Parser
from aiouffd.uffd import Userfaultfd
from aiouffd.unix_socket import MAX_FDS, Connection

BASE: Final = 0x7F00_0000_0000
MIB: Final = 1 << 20


def some_fd() -> OwnedFd:
    """Open something that is no userfaultfd: the parser cannot tell."""
    return OwnedFd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


def region(**fields: object) -> dict[str, object]:
    """Make one region of two pages, with fields changed or added."""
    return {"base_host_virt_addr": BASE, "size": 8192, "offset": 0} | fields


def encode(*regions: object) -> bytes:
    """Write a hand-over as Firecracker does."""
    return json.dumps(regions).encode()


# --- how a message may arrive ----------------------------------------------------------

Feed = Callable[[Parser, bytes, list[OwnedFd]], Message | None]


def whole(parser: Parser, text: bytes, fds: list[OwnedFd]) -> Message | None:
    """Bytes and descriptors in one read, as sent."""
    return parser.feed(text, fds)


def byte_by_byte(parser: Parser, text: bytes, fds: list[OwnedFd]) -> Message | None:
    """One byte per read; the descriptors with the first, as the kernel gives them."""
    message = parser.feed(text[:1], fds)
    for at in range(1, len(text)):
        assert message is None
        message = parser.feed(text[at : at + 1])
    return message


def late_descriptor(parser: Parser, text: bytes, fds: list[OwnedFd]) -> Message | None:
    """The descriptors with a byte of their own, behind the text."""
    assert parser.feed(text) is None
    return parser.feed(b"\0", fds)


def early_descriptor(parser: Parser, text: bytes, fds: list[OwnedFd]) -> Message | None:
    """The descriptors with white space before the text."""
    assert parser.feed(b"\n", fds) is None
    return parser.feed(text)


def one_descriptor_per_read(parser: Parser, text: bytes, fds: list[OwnedFd]) -> Message | None:
    """The descriptors one by one; the last with the rest of the text."""
    for at, fd in enumerate(fds[:-1]):
        assert parser.feed(text[at : at + 1], [fd]) is None
    return parser.feed(text[len(fds) - 1 :], fds[-1:])


def trailing(parser: Parser, text: bytes, fds: list[OwnedFd]) -> Message | None:
    """More bytes behind the value, which mean nothing."""
    return parser.feed(text + b' [{"junk', fds)


WAYS: Final[Sequence[Feed]] = (
    whole,
    byte_by_byte,
    late_descriptor,
    early_descriptor,
    one_descriptor_per_read,
    trailing,
)

# --- what is understood ----------------------------------------------------------------

#: name, text, regions as (start, length, offset, page size), dialect
UNDERSTOOD: Final = {
    "1.1": (
        encode(region(size=3 * MIB, offset=4096)),
        [(BASE, 3 * MIB, 4096, 4096)],
        "firecracker 1.1",
    ),
    "1.7": (encode(region(page_size_kib=4096)), [(BASE, 8192, 0, 4096)], "firecracker 1.7"),
    "1.7 with huge pages: the field holds bytes": (
        encode(region(size=4 * MIB, page_size_kib=2 * MIB)),
        [(BASE, 4 * MIB, 0, 2 * MIB)],
        "firecracker 1.7",
    ),
    "1.12": (
        encode(region(page_size=4096, page_size_kib=4096)),
        [(BASE, 8192, 0, 4096)],
        "firecracker 1.12",
    ),
    "1.12 with huge pages": (
        encode(region(size=4 * MIB, page_size=2 * MIB, page_size_kib=2 * MIB)),
        [(BASE, 4 * MIB, 0, 2 * MIB)],
        "firecracker 1.12",
    ),
    "2.0, where page_size stands alone": (
        encode(region(page_size=4096)),
        [(BASE, 8192, 0, 4096)],
        "firecracker 1.12",
    ),
    "page_size goes before page_size_kib": (
        encode(region(page_size=4096, page_size_kib=4)),
        [(BASE, 8192, 0, 4096)],
        "firecracker 1.12",
    ),
    "stratovirt": (
        encode({"base_hva": BASE, "size": 4096, "offset": 0, "page_size_kib": 4096}),
        [(BASE, 4096, 0, 4096)],
        "stratovirt",
    ),
    "unknown keys": (
        encode(region(gpa_start=0, is_guest_memfd=False, note='a "[{" and \\ in a string')),
        [(BASE, 8192, 0, 4096)],
        "firecracker 1.1",
    ),
    "an object around the array": (
        json.dumps({"version": 3, "tags": [], "names": ["x"], "mappings": [region()]}).encode(),
        [(BASE, 8192, 0, 4096)],
        "firecracker 1.1",
    ),
    "two regions that touch, out of order": (
        encode(region(base_host_virt_addr=BASE + 8192, offset=8192), region()),
        [(BASE + 8192, 8192, 8192, 4096), (BASE, 8192, 0, 4096)],
        "firecracker 1.1",
    ),
    "white space everywhere": (
        b"\r\n\t " + json.dumps([region()], indent=4).encode(),
        [(BASE, 8192, 0, 4096)],
        "firecracker 1.1",
    ),
    "the last page of the address space": (
        encode(region(base_host_virt_addr=(1 << 64) - 4096, size=4096)),
        [((1 << 64) - 4096, 4096, 0, 4096)],
        "firecracker 1.1",
    ),
    "more than a socket buffer": (
        encode(*(region(base_host_virt_addr=BASE + n * 8192, pad="x" * 50) for n in range(700))),
        [(BASE + n * 8192, 8192, 0, 4096) for n in range(700)],
        "firecracker 1.1",
    ),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("feed", WAYS)
@pytest.mark.parametrize("name", UNDERSTOOD)
def test_every_dialect_is_understood_however_it_arrives(name: str, feed: Feed, count: int) -> None:
    """Regions, dialect and descriptors come out the same in whatever pieces they came."""
    text, regions, dialect = UNDERSTOOD[name]
    parser = Parser()
    fds = [some_fd() for _ in range(count)]
    message = feed(parser, text, fds)
    assert message is not None
    assert message.regions == tuple(HandedRegion(*one) for one in regions)
    assert message.dialect == dialect
    assert message.fds == tuple(fds)
    parser.close()  # what has become part of the message is not the parser's any more
    assert not any(fd.closed for fd in fds)
    for fd in fds:
        fd.close()


def test_bytes_behind_the_message_are_kept_apart() -> None:
    """They are neither parsed nor lost."""
    with some_fd() as fd:
        message = Parser().feed(encode(region()) + b"\n[", [fd])
        assert message is not None
        assert message.trailing == b"\n["


# --- what is refused -------------------------------------------------------------------

#: name, text, what the refusal says
REFUSED: Final = {
    "no JSON": (b"hello", "begins with b'h', not with a JSON array"),
    "binary": (b"\xaa\0\0\0", "begins with"),
    "broken JSON": (b"[{]}", "no JSON"),
    "a number instead of a region": (b"[1]", "region 0 is no JSON object"),
    "bad UTF-8": (b'["\xff"]', "no JSON"),
    "a number without end": (b"[" + b"9" * 10_000 + b"]", "no JSON"),
    "no regions": (b"[]", "0 regions"),
    "too many regions": (
        encode(*(region(base_host_virt_addr=BASE + n * 8192) for n in range(4097))),
        "4097 regions",
    ),
    "too deep": (b"[" * 17, "nests more than 16"),
    "an object without regions": (b"{}", "holds 0 arrays of regions"),
    "an object with two arrays": (
        json.dumps({"a": [region()], "b": [region()]}).encode(),
        "holds 2 arrays",
    ),
    "no address": (encode({"size": 4096, "offset": 0}), "region 0 has no base_host_virt_addr"),
    "no size": (encode({"base_hva": BASE, "offset": 0}), "region 0 has no size"),
    "no offset": (encode({"base_hva": BASE, "size": 4096}), "region 0 has no offset"),
    "text for a size": (encode(region(), region(size="4096")), "region 1: size is no integer"),
    "a fraction": (encode(region(size=4096.0)), "size is no integer"),
    "a truth": (encode(region(offset=True)), "offset is no integer"),
    "a negative offset": (encode(region(offset=-4096)), "offset is not in the range"),
    "an address of 65 bits": (encode(region(base_host_virt_addr=1 << 64)), "not in the range"),
    "an end beyond 64 bits": (
        encode(region(base_host_virt_addr=(1 << 64) - 4096)),
        "region 0 .* beyond what a machine can address",
    ),
    "an image beyond 63 bits": (encode(region(offset=(1 << 63) - 4096)), "beyond what a machine"),
    "an empty region": (encode(region(size=0)), "region 0 .* is empty"),
    "KiB where bytes belong": (encode(region(page_size_kib=4)), "page size of 4 bytes"),
    "a page of no size": (encode(region(page_size=0)), "page size of 0 bytes"),
    "an odd page": (encode(region(page_size=12288, size=12288)), "page size of 12288"),
    "a page of 2 GiB": (encode(region(page_size=1 << 31)), "which no memory has"),
    "a misaligned address": (
        encode(region(base_host_virt_addr=BASE + 8)),
        r"region 0 \(0x7f0000000008-0x7f0000002008\) is not aligned",
    ),
    "a misaligned size": (encode(region(size=5000)), "region 0 .* not aligned"),
    "4 KiB alignment of 2 MiB pages": (
        encode(region(base_host_virt_addr=BASE + 4096, size=2 * MIB, page_size=2 * MIB)),
        "not aligned to its pages of 2097152",
    ),
    "a misaligned offset": (encode(region(offset=100)), "begins at offset 100"),
    "the same region twice": (encode(region(), region()), "region 0 .* overlaps region 1"),
    "regions that overlap by a page": (
        encode(region(base_host_virt_addr=BASE + 4096), region()),
        "region 1 .* overlaps region 0",
    ),
    "two page sizes": (
        encode(
            region(page_size=4096),
            region(base_host_virt_addr=BASE + 2 * MIB, size=2 * MIB, page_size=2 * MIB),
        ),
        "region 1 has pages of 2097152 bytes, region 0 of 4096",
    ),
}


@pytest.mark.parametrize("feed", [whole, byte_by_byte])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_by_name(name: str, feed: Feed) -> None:
    """The refusal says which region and what is wrong, and no descriptor stays open."""
    text, reason = REFUSED[name]
    parser = Parser()
    fds = [some_fd(), some_fd()]
    with pytest.raises(PeerError, match=reason):
        feed(parser, text, fds)
    assert all(fd.closed for fd in fds)


def feed_blanks(parser: Parser) -> None:
    """Feed more than a megabyte that means nothing."""
    for _ in range(40):
        parser.feed(b" " * 65536)


def test_a_text_without_end_is_refused() -> None:
    """A peer cannot make us keep more than a megabyte."""
    parser = Parser()
    fd = some_fd()
    assert parser.feed(b"[", [fd]) is None
    with pytest.raises(PeerError, match="within 1048576 bytes"):
        feed_blanks(parser)
    assert fd.closed


@pytest.mark.parametrize(
    "start, reason", [(b"", "white space"), (encode(region()), "bytes without end")]
)
def test_blanks_without_end_are_refused(start: bytes, reason: str) -> None:
    """Neither before the message nor behind one without a descriptor are bytes kept for ever."""
    parser = Parser()
    parser.feed(start)
    with pytest.raises(PeerError, match=reason):
        feed_blanks(parser)


def test_too_many_descriptors_are_refused_and_closed() -> None:
    """Descriptors that come one by one are counted together."""
    parser = Parser()
    fds = [some_fd() for _ in range(MAX_FDS + 1)]
    assert parser.feed(b"[", fds[:10]) is None
    with pytest.raises(PeerError, match="17 descriptors"):
        parser.feed(b" ", fds[10:])
    assert all(fd.closed for fd in fds)


@pytest.mark.parametrize(
    "text, count, reason",
    [
        (b"", 0, "without sending anything"),
        (b" ", 0, "without sending anything"),
        (b"[{", 0, "in the middle of the hand-over, after 2 bytes and 0 descriptors"),
        (b"[{", 1, "after 2 bytes and 1 descriptors"),
        (b"\n", 1, "after 0 bytes and 1 descriptors"),
        (encode(region()), 0, "without sending a descriptor"),
    ],
)
def test_an_early_end_says_what_was_missing(text: bytes, count: int, reason: str) -> None:
    """The end of the stream before the message is a refusal, and closes what came."""
    parser = Parser()
    fds = [some_fd() for _ in range(count)]
    assert parser.feed(text, fds) is None
    with pytest.raises(PeerError, match=reason):
        parser.end()
    assert all(fd.closed for fd in fds)


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_random_bytes_are_refused_or_waited_for(pieces: list[bytes]) -> None:
    """Nothing but PeerError ever comes out, and the descriptor is never lost."""
    parser = Parser()
    fd = some_fd()
    fds = [fd]
    message = None
    with contextlib.suppress(PeerError):
        for piece in pieces:
            message = message or parser.feed(piece, fds)
            fds = []
    parser.close()
    assert message is None
    assert fd.closed or fds
    fd.close()


_JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["base_host_virt_addr", "base_hva", "size", "offset", "page_size", "x"]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=12,
)


@given(st.lists(_JSON, max_size=4) | st.dictionaries(st.text(max_size=3), _JSON, max_size=3))
def test_any_json_is_refused_or_a_message(value: object) -> None:
    """Whatever a JSON value holds, the parser sees its end and raises nothing but PeerError."""
    text = json.dumps(value).encode()
    with some_fd() as fd:
        try:
            message = Parser().feed(text, [fd])
        except PeerError:
            assert fd.closed
        else:
            assert message is not None
            assert message.trailing == b""


def test_changed_bytes_never_crash_it(seed: int) -> None:
    """A good message with random bytes changed is understood, refused or waited for."""
    choose = random.Random(seed)
    good = UNDERSTOOD["unknown keys"][0]
    for _ in range(2000):
        text = bytearray(good)
        for _ in range(choose.randint(1, 4)):
            text[choose.randrange(len(text))] = choose.choice(b'[]{}",:\\0x9\xff ')
        parser = Parser()
        with some_fd() as fd:
            with contextlib.suppress(PeerError):
                parser.feed(bytes(text), [fd])
            parser.close()


# --- over a socket, with the kernel's descriptors --------------------------------------


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Connection, Connection]]:
    """Connect a VMM's end and a server's."""
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with Connection(one) as vmm, Connection(two) as server:
        yield vmm, server


@pytest.fixture
def uffd() -> Iterator[Userfaultfd]:
    """Open a userfaultfd that nothing is registered with."""
    with Userfaultfd.open(allow_user_mode_only=True) as uffd:
        yield uffd


Pair = tuple[Connection, Connection]


async def test_a_hand_over_is_received(pair: Pair, uffd: Userfaultfd) -> None:
    """What the VMM sends in one message comes out as one hand-over."""
    vmm, server = pair
    await vmm.send(encode(region(page_size=4096)), [uffd.fileno()])
    handover = await firecracker.receive(server)
    assert handover.regions == (HandedRegion(BASE, 8192, 0, 4096),)
    assert handover.dialect == "firecracker 1.12"
    assert handover.acknowledge == b""
    assert handover.others == ()
    Userfaultfd.adopt(handover.fd).close()
    handover.close()


@pytest.mark.parametrize("turned", [False, True])
async def test_the_userfaultfd_is_found_among_several(
    pair: Pair, uffd: Userfaultfd, *, turned: bool
) -> None:
    """E2B sends a memfd as well; in whatever order, each is recognised."""
    vmm, server = pair
    with OwnedFd(os.memfd_create("guest")) as memfd:
        fds = [uffd.fileno(), memfd.fileno()]
        await vmm.send(encode(region()), fds[::-1] if turned else fds)
    handover = await firecracker.receive(server)
    assert "userfaultfd" in os.readlink(f"/proc/self/fd/{handover.fd.fileno()}")
    assert ["memfd" in os.readlink(f"/proc/self/fd/{fd.fileno()}") for fd in handover.others] == [
        True
    ]
    handover.close()


async def test_a_message_in_pieces_with_a_late_descriptor(pair: Pair, uffd: Userfaultfd) -> None:
    """Bytes that trickle in, and a descriptor behind them, make the same hand-over."""
    vmm, server = pair
    receiving = asyncio.ensure_future(firecracker.receive(server))
    for byte in encode(region()):
        await vmm.send(bytes([byte]))
        await asyncio.sleep(0)
    assert not receiving.done()
    await vmm.send(b"\n", [uffd.fileno()])
    (await receiving).close()


async def test_stratovirt_waits_for_one_byte(pair: Pair, uffd: Userfaultfd) -> None:
    """The hand-over says what the peer waits for."""
    vmm, server = pair
    text = encode({"base_hva": BASE, "size": 4096, "offset": 0, "page_size_kib": 4096})
    await vmm.send(text, [uffd.fileno()])
    handover = await firecracker.receive(server)
    assert handover.acknowledge == b"\x01"
    handover.close()


async def test_other_descriptors_are_no_userfaultfd(pair: Pair) -> None:
    """A pipe in its place is refused, by its name."""
    vmm, server = pair
    reader, writer = os.pipe()
    with OwnedFd(reader), OwnedFd(writer):
        await vmm.send(encode(region()), [reader, writer])
        with pytest.raises(PeerError, match=r"no userfaultfd but: pipe:\[.*, pipe:\["):
            await firecracker.receive(server)


async def test_two_userfaultfds_are_one_too_many(pair: Pair, uffd: Userfaultfd) -> None:
    """Which of the two would be meant is not guessed."""
    vmm, server = pair
    await vmm.send(encode(region()), [uffd.fileno(), uffd.fileno()])
    with pytest.raises(PeerError, match="2 userfaultfds"):
        await firecracker.receive(server)


async def test_a_peer_that_hangs_up_early_is_refused(pair: Pair, uffd: Userfaultfd) -> None:
    """The end of the stream in the middle closes the descriptor that came."""
    vmm, server = pair
    await vmm.send(b"[{", [uffd.fileno()])
    vmm.close()
    with pytest.raises(PeerError, match="in the middle"):
        await firecracker.receive(server)


async def test_a_time_limit_closes_what_came(pair: Pair, uffd: Userfaultfd) -> None:
    """A cancelled hand-over leaves no descriptor behind."""
    vmm, server = pair
    await vmm.send(b"[{", [uffd.fileno()])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await firecracker.receive(server)


async def test_closing_the_connection_ends_the_hand_over(pair: Pair) -> None:
    """Who waits for a peer's message learns that the connection is closed."""
    _, server = pair
    receiving = asyncio.ensure_future(firecracker.receive(server))
    await asyncio.sleep(0)
    server.close()
    with pytest.raises(ClosedError):
        await receiving
