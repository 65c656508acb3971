"""What programs announce, spoken to the socket as the library in them does."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from aiouffd import OwnedFd
from aiouffd.testing.announcements import (
    LOADED,
    MAPPED,
    REFUSED,
    Announcement,
    Announcements,
)
from aiouffd.testing.turning import Turning

KEY = bytes(range(16))


class Told:
    """A listener in a loop that a test turns, and what was mapped."""

    def __init__(self) -> None:
        self.mapped: list[tuple[int, Announcement, OwnedFd]] = []
        self.loaded: list[int] = []
        self.turning = Turning()
        self.announcements = Announcements(
            self.turning,
            loaded=lambda: self.loaded.append(len(self.mapped)),
            mapped=lambda *each: self.mapped.append(each),
        )
        self.name = f"\0aiouffd-test-{os.urandom(8).hex()}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(self.name)
        listener.listen()
        self.announcements.listen(OwnedFd(listener.detach()))
        self.announcements.expect(1, KEY)

    def turn_until(self, done: Callable[[], object]) -> None:
        """Turn the loop until something is so; the test's own limit ends a wait for nothing."""
        if not done():
            self.turning._running = True
            self.turning.run(lambda: self.turning.stop() if done() else None)

    def connect(self) -> socket.socket:
        """Connect as a program does."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(self.name)
        return sock

    def say(self, data: bytes, fds: tuple[int, ...] = ()) -> int | None:
        """Send something; give the errno that comes back, None if nothing does."""
        with self.connect() as sock:
            socket.send_fds(sock, [data], fds)
            sock.setblocking(False)
            answers: list[bytes] = []

            def answered() -> bool:
                try:
                    answers.append(sock.recv(100))
                except BlockingIOError:
                    return False
                return True

            self.turn_until(answered)
            return int.from_bytes(answers[0], "little") if answers[0] else None


@pytest.fixture
def told() -> Iterator[Told]:
    """A listener."""
    made = Told()
    yield made
    made.announcements.close()
    made.turning.close()
    for _, _, fd in made.mapped:
        fd.close()


def message(what: int, **fields: int | str | bytes) -> bytes:
    return Announcement(**{"key": KEY, "what": what, **fields}).to_bytes()  # type: ignore[arg-type]


def test_a_message_is_read_as_it_was_written() -> None:
    """Every field survives; the reason ends at its first zero."""
    said = Announcement(KEY, REFUSED, 7, 1 << 47, 1 << 33, 4096, errno.EPERM, "no such right")
    assert Announcement.parse(said.to_bytes()) == said
    assert len(said.to_bytes()) == 112


@pytest.mark.parametrize("data", [b"", b"x", bytes(111), bytes(113), bytes(112)])
def test_what_is_no_message_is_refused(told: Told, data: bytes) -> None:
    """A message of another length or kind is answered with EPROTO."""
    with pytest.raises(ValueError, match=r"bytes|kind"):
        Announcement.parse(data)
    if data:
        assert told.say(data) == errno.EPROTO


def test_what_is_announced_is_known(told: Told) -> None:
    """Loaded, mapped and refused are known of the program whose key it was."""
    null = os.open("/dev/null", os.O_RDONLY)
    assert told.say(message(LOADED)) == 0
    assert told.say(message(MAPPED, region=3, address=4096, length=8192), (null,)) == 0
    assert told.say(message(REFUSED, region=4, error=errno.EPERM, reason="rights")) == 0
    os.close(null)
    me = os.getpid()
    known = told.announcements.known(1)
    assert (known.loaded, known.mapped) == ([me], [(me, 3)])
    assert told.loaded == [0]
    assert known.refused == [(me, 4, errno.EPERM, "rights")]
    process, announcement, fd = told.mapped[0]
    assert (process, announcement.address, announcement.length) == (me, 4096, 8192)
    assert os.readlink(f"/proc/self/fd/{fd.fileno()}") == "/dev/null"


def test_who_has_no_key_is_not_heard(told: Told) -> None:
    """Another key is answered with EACCES, and its descriptor is closed."""
    null = os.open("/dev/null", os.O_RDONLY)
    before = len(os.listdir("/proc/self/fd"))
    assert told.say(message(MAPPED, key=bytes(16)), (null,)) == errno.EACCES
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(null)
    assert told.announcements.known(1).mapped == []


def test_a_mapping_comes_with_its_userfaultfd(told: Told) -> None:
    """A mapping without a descriptor is answered with EPROTO."""
    assert told.say(message(MAPPED)) == errno.EPROTO
    assert told.mapped == []


def test_silent_peers_cost_few_descriptors(told: Told) -> None:
    """Of many that connect and say nothing the oldest are dropped, and others are still heard."""
    silent = [told.connect() for _ in range(100)]
    told.turn_until(lambda: len(told.announcements._waiting) == 64)
    assert told.say(message(LOADED)) == 0
    assert len(told.announcements._waiting) <= 64
    assert silent[0].recv(1) == b""
    for sock in silent:
        sock.close()


def test_who_has_gone_again_is_forgotten(told: Told) -> None:
    """A peer that closes without a word leaves nothing behind."""
    told.connect().close()
    assert told.say(message(LOADED)) == 0
    told.turn_until(lambda: not told.announcements._waiting)
