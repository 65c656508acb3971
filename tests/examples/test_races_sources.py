"""The C sources of examples/races: what they do while nobody races."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest

from compiled import library

pytestmark = pytest.mark.once

PAYLOAD, LONGEST = 64, 255
RUNS = 20_000


def packet(kind: int, length: int) -> bytes:
    return bytes([kind, length]) + bytes(range(LONGEST))


@pytest.mark.parametrize("name", ["parse", "parse_repaired"])
def test_a_packet_is_parsed(name: str) -> None:
    """A good packet is copied, byte for byte, and one of a bad kind or length is refused."""
    parse = getattr(library("parser.c"), name)
    message = ctypes.create_string_buffer(2 + LONGEST)
    assert parse(packet(4, 16), message) == 1
    assert parse(packet(3, PAYLOAD + 1), message) == 2
    assert message.raw == bytes(2 + LONGEST)
    assert parse(packet(3, PAYLOAD), message) == 0
    assert message.raw == packet(3, PAYLOAD)[: 2 + PAYLOAD].ljust(2 + LONGEST, b"\0")


@pytest.mark.parametrize("name", ["parse", "parse_repaired"])
def test_luck_hardly_ever_sees_the_double_fetch(name: str, seed: int) -> None:
    """Two threads at random moments show the bug in less than one of a thousand runs."""
    c = library("parser.c", "luck.c")
    overflows = c.luck(getattr(c, name), RUNS, seed & 0x7FFFFFFF)
    assert 0 <= overflows < RUNS / 1000
    assert overflows == 0 or name == "parse"


@pytest.mark.parametrize("source", ["ring.c", "ring_repaired.c"])
def test_one_thread_gets_back_what_it_has_pushed(source: str) -> None:
    """What one thread pushes it pops in that order, over many rounds, full and empty between."""
    c = library(source)
    ring, value = ctypes.create_string_buffer(64), ctypes.c_uint32()
    for first in range(0, 40, 4):
        for number in range(first, first + 4):
            assert c.ring_push(ring, number) == 1
        assert c.ring_push(ring, 99) == 0
        for number in range(first, first + 4):
            assert c.ring_pop(ring, ctypes.byref(value)) == 1
            assert value.value == number
        assert c.ring_pop(ring, ctypes.byref(value)) == 0


@pytest.mark.parametrize("name", ["sandbox_open", "sandbox_open_repaired"])
def test_the_sandbox_opens_what_is_below_its_folder(name: str, tmp_path: Path) -> None:
    """A file below the folder is opened; beside it, above it or too long a name is not."""
    sandbox_open = getattr(library("sandbox.c"), name)
    folder = tmp_path / "guest"
    folder.mkdir()
    (folder / "notes").write_text("notes")
    (tmp_path / "guest-secret").write_text("secret")
    fd = sandbox_open(bytes(folder), bytes(folder / "notes"))
    with open(fd) as file:
        assert file.read() == "notes"
    for path in (tmp_path / "guest-secret", folder / ".." / "guest-secret", Path("/etc/passwd")):
        assert sandbox_open(bytes(folder), bytes(path)) == -1
        assert ctypes.get_errno() == errno.EACCES
    assert sandbox_open(bytes(folder), os.fsencode(folder) + b"/" + b"x" * 300) == -1
    assert ctypes.get_errno() == errno.ENAMETOOLONG
