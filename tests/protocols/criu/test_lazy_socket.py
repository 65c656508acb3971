"""What comes on lazy-pages.socket: whole, byte by byte, hostile."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.errors import PeerError
from aiouffd.fds import OwnedFd
from aiouffd.protocols.criu.lazy_socket import Finished, Handed, Message, Parser, Zombie

FINISHED = b"FTSR"


def pid(number: int) -> bytes:
    """Write a pid as CRIU does."""
    return struct.pack("<i", number)


@pytest.fixture
def fd() -> Iterator[OwnedFd]:
    """Open a descriptor to send; it may be taken."""
    with OwnedFd(os.memfd_create("sent")) as made:
        yield made


def feed_all(parser: Parser, data: bytes, step: int = 4) -> list[Message]:
    """Feed bytes that carry no descriptor, as many at once as are wanted and allowed."""
    messages = []
    while data:
        count = min(parser.wanted, step)
        assert count
        message = parser.feed(data[:count])
        messages += [message] if message is not None else []
        data = data[count:]
    return messages


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_restore_in_pieces(fd: OwnedFd, step: int) -> None:
    """Zombies and living tasks in any order, however the bytes are cut."""
    parser = Parser()
    assert feed_all(parser, pid(-7) + pid(12), step) == [Zombie(7)]
    assert parser.wanted == 1
    assert parser.feed(b"\0", [fd]) == Handed(12, fd)
    assert feed_all(parser, pid(-9) + FINISHED, step) == [Zombie(9), Finished()]
    assert parser.wanted == 0
    parser.end()
    assert not fd.closed


def test_no_more_is_wanted_than_the_next_record() -> None:
    """What lies behind a record may belong to a descriptor: it is not to be read along."""
    parser = Parser()
    wanted = []
    for byte in pid(12):
        wanted.append(parser.wanted)
        parser.feed(bytes([byte]))
    assert wanted == [4, 3, 2, 1]
    assert parser.wanted == 1
    with pytest.raises(ValueError, match="2 bytes were read, 1 are wanted"):
        parser.feed(b"\0\0")


@pytest.mark.parametrize("value", [0, 1, 255])
def test_the_byte_that_carries_a_descriptor_means_nothing(fd: OwnedFd, value: int) -> None:
    """CRIU sends a zero; what counts is what comes with it."""
    parser = Parser()
    feed_all(parser, pid(1))
    assert parser.feed(bytes([value]), [fd]) == Handed(1, fd)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (0, "sent 0, which is no process id"),
        (4194305, "no process id"),
        (-4194305, "no process id"),
        (0x20544547, "no process id"),  # b"GET "
        (-(1 << 31), "no process id"),
    ],
)
def test_what_no_process_is_called(number: int, reason: str) -> None:
    """A number that no pid can be is named."""
    with pytest.raises(PeerError, match=reason):
        Parser().feed(pid(number))


@pytest.mark.parametrize(("first", "second"), [(5, 5), (5, -5), (-5, 5), (-5, -5)])
def test_a_task_comes_once(fd: OwnedFd, first: int, second: int) -> None:
    """Whose memory would it be the second time?"""
    parser = Parser()
    parser.feed(pid(first))
    if first > 0:
        parser.feed(b"\0", [fd])
    with pytest.raises(PeerError, match="task 5 was handed over twice"):
        parser.feed(pid(second))


def test_a_task_without_a_descriptor() -> None:
    """Its byte came alone."""
    parser = Parser()
    feed_all(parser, pid(5))
    with pytest.raises(PeerError, match="task 5 handed no descriptors over"):
        parser.feed(b"\0")


def test_two_descriptors_are_closed(fd: OwnedFd) -> None:
    """Nobody can say which is the memory's; neither leaks."""
    parser = Parser()
    feed_all(parser, pid(5))
    other = fd.dup()
    with pytest.raises(PeerError, match="task 5 handed 2 descriptors over"):
        parser.feed(b"\0", [fd, other])
    assert fd.closed
    assert other.closed


@pytest.mark.parametrize("before", [b"", b"\5", b"\5\0\0"])
def test_a_descriptor_with_a_pid_is_closed(fd: OwnedFd, before: bytes) -> None:
    """It belongs to nobody yet."""
    parser = Parser()
    if before:
        parser.feed(before)
    with pytest.raises(PeerError, match="a descriptor came with a pid"):
        parser.feed(pid(5)[len(before) :], [fd])
    assert fd.closed


@pytest.mark.parametrize("data", [b"", b"\0\0\0\0\0"])
def test_misuse_is_no_fault_of_the_peer(fd: OwnedFd, data: bytes) -> None:
    """Whoever feeds what was not wanted is told so, and leaks nothing either."""
    with pytest.raises(ValueError, match="4 are wanted"):
        Parser().feed(data, [fd])
    assert fd.closed


def test_nothing_follows_the_last_word() -> None:
    """It is not even read."""
    parser = Parser()
    assert feed_all(parser, FINISHED) == [Finished()]
    with pytest.raises(ValueError, match="0 are wanted"):
        parser.feed(b"\0")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "before it handed any task over; the log of"),
        (pid(-5), "its connection ended after 1 task;"),
        (pid(-5) + pid(-6)[:2], "in the middle of a pid"),
        (FINISHED[:3], "in the middle of a pid"),
        (pid(5), "while it handed task 5 over"),
    ],
)
def test_an_end_before_the_end(data: bytes, reason: str) -> None:
    """It says how far the restore has come."""
    parser = Parser()
    feed_all(parser, data)
    with pytest.raises(PeerError, match=reason):
        parser.end()


@given(pieces=st.lists(st.tuples(st.binary(min_size=1, max_size=5), st.integers(0, 3))))
def test_no_bytes_and_descriptors_do_any_harm(pieces: Iterable[tuple[bytes, int]]) -> None:
    """Whatever comes ends in messages or a named refusal, and leaks nothing."""
    parser = Parser()
    sent: list[OwnedFd] = []
    kept: list[OwnedFd] = []
    try:
        for data, count in pieces:
            if not parser.wanted:
                break
            fds = [OwnedFd(os.memfd_create("sent")) for _ in range(count)]
            sent += fds
            message = parser.feed(data[: parser.wanted], fds)
            kept += [message.fd] if isinstance(message, Handed) else []
        parser.end()
    except PeerError:
        pass
    assert [one for one in sent if not one.closed] == kept
    for one in kept:
        one.close()
