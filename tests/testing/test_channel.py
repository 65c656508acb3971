"""Messages between a test process and its helper."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

from aiouffd.testing.channel import LONGEST, PIECE, Channel, fitting, pair


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """Both ends."""
    ours, theirs = pair()
    with contextlib.closing(ours), contextlib.closing(Channel(theirs)) as other:
        yield ours, other


def test_a_message_arrives_as_it_was(ends: tuple[Channel, Channel]) -> None:
    """A tuple arrives whole, up to the longest one."""
    for message in (("a", 1, None, b"\0", [(1, "\udcff")]), ("b", bytes(LONGEST - 20))):
        ends[0].send(message)
        assert ends[1].receive() == (message, ())
    ends[0].close()
    assert ends[1].receive() is None


def test_a_message_that_is_too_long_is_refused(ends: tuple[Channel, Channel]) -> None:
    """Who sends is told how long it was and how it begins; the channel serves on."""
    with pytest.raises(ValueError, match=r"too long: \d+ fit; it begins with \('poke', 7"):
        ends[0].send(("poke", 7, bytes(LONGEST)))
    ends[0].send(("next",))
    assert ends[1].receive() == (("next",), ())


def test_a_message_that_was_cut_off_is_an_error(ends: tuple[Channel, Channel]) -> None:
    """Half a message is no message, and its descriptors do not stay open."""
    before = os.listdir("/proc/self/fd")
    socket.send_fds(ends[0].sock, [bytes(LONGEST + 1)], [0])
    with pytest.raises(OSError, match="cut off"):
        ends[1].receive()
    assert os.listdir("/proc/self/fd") == before


def test_what_fits_into_one_message() -> None:
    """As many items as a message takes; one that is longer goes alone."""
    items = [bytes(PIECE // 3)] * 5
    assert fitting(items) == 2
    assert fitting(items[:2]) == 2
    assert fitting([bytes(PIECE), *items]) == 1
    assert fitting([]) == 0
