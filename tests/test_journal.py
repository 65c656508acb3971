"""aiouffd.journal: what a dead server knew, whatever the instruction at which it died."""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiouffd import journal as journal_module
from aiouffd.address_space import AddressSpace
from aiouffd.events import MESSAGE_SIZE
from aiouffd.fds import OwnedFd
from aiouffd.journal import Journal, JournalError
from aiouffd.kernel import abi
from aiouffd.ranges import Range
from tests.targets import PAGE

Space = AddressSpace[int, Any]


@dataclass(frozen=True)
class Place:
    """A region as the journal sees it."""

    start: int
    length: int
    offset: int
    page_size: int = PAGE


REGIONS = (Place(16 * PAGE, 64 * PAGE, 0), Place(200 * PAGE, 32 * PAGE, 64 * PAGE))
SIZES = [one.page_size for one in REGIONS]


class Watched(mmap.mmap):
    """Memory that keeps a list of what was written to it, in order."""

    writes: list[tuple[int, bytes]]

    def __setitem__(self, at: Any, value: Any) -> None:
        super().__setitem__(at, value)
        if isinstance(at, slice):
            self.writes.append((at.start, bytes(value)))
        else:
            self.writes.append((at, bytes([value])))

    def madvise(self, *args: int) -> None:
        super().madvise(*args)
        assert args[0] == mmap.MADV_REMOVE
        self.writes.append((args[1], bytes(args[2])))


class WatchedJournal(Journal):
    _map = Watched

    def __init__(self, fd: OwnedFd) -> None:
        Watched.writes = []
        super().__init__(fd)


@contextmanager
def small_halves() -> Iterator[None]:
    """Make compaction a common thing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal_module, "_HALF_BYTES", 64 << 10)
        patch.setattr(journal_module, "_GROWTH", 4 * MESSAGE_SIZE)
        yield


def first_books() -> Space:
    space: Space = AddressSpace()
    for number, one in enumerate(REGIONS):
        space.register(Range(one.start, one.length), number, one.offset, one.page_size)
    return space


def books(space: Space) -> tuple[Any, ...]:
    """What there is to compare."""
    return list(space.placements), sorted(space.removed.chunks())


def event(kind: int, *words: int) -> bytes:
    layout = abi.UFFD_MSG_REMAP if kind == abi.UFFD_EVENT_REMAP else abi.UFFD_MSG_RANGE
    return layout.pack(kind, *words)


FAULT = abi.UFFD_MSG_PAGEFAULT.pack(abi.UFFD_EVENT_PAGEFAULT, 0, 17 * PAGE, 0)
FORK = abi.UFFD_MSG_FORK.pack(abi.UFFD_EVENT_FORK, 1_000_000)


def apply(space: Space, message: bytes) -> None:
    """Apply a message as the reader does."""
    match message[0]:
        case abi.UFFD_EVENT_REMOVE:
            space.remove(Range.between(*abi.UFFD_MSG_RANGE.unpack(message)[1:]))
        case abi.UFFD_EVENT_UNMAP:
            space.unmap(Range.between(*abi.UFFD_MSG_RANGE.unpack(message)[1:]))
        case abi.UFFD_EVENT_REMAP:
            space.remap(*abi.UFFD_MSG_REMAP.unpack(message)[1:])


class Server:
    """Does what the reader and the dispatcher do, and remembers when it knew what."""

    def __init__(self) -> None:
        self.space = first_books()
        self.journal = WatchedJournal.create(b"{}", REGIONS)
        self.journal.on_fork = lambda fork, fd: self.forked.append((fork, fd))
        self.forked: list[tuple[int, int]] = []
        self.journal.write_books(self.space, lambda number: number)
        self.writes = Watched.writes
        self.writes.clear()
        self.start = os.pread(self.journal.fileno(), os.fstat(self.journal.fileno()).st_size, 0)
        self.known: list[tuple[int, tuple[Any, ...]]] = [(0, books(self.space))]

    def _knows(self) -> None:
        self.known.append((len(self.writes), books(self.space)))

    def read(self, messages: list[bytes]) -> None:
        at, inbox = self.journal._tail, self.journal.inbox
        for n, message in enumerate(messages):  # the kernel does this: each as a whole
            inbox[n * MESSAGE_SIZE : (n + 1) * MESSAGE_SIZE] = message
            self.writes.append((at + n * MESSAGE_SIZE, message))
            apply(self.space, message)
            self._knows()
        self.journal.took(len(messages) * MESSAGE_SIZE)
        self.settle()

    def settle(self) -> None:
        self.journal.settled(self.space, lambda number: number)

    def grow(self, address: int) -> None:
        if self.space.growth(address) is not None:
            self.journal.grew(address)
            self.space.grow(address)
            self._knows()
            self.settle()

    def drop(self, where: Range) -> None:
        self.journal.dropped(where)
        self.space.drop(where)
        self._knows()
        self.settle()

    def close(self) -> None:
        self.journal.close_file()


def replayed(file: int) -> Space:
    journal = Journal.adopt(OwnedFd(os.dup(file)))
    try:
        result: Any = journal.replay(range(len(REGIONS)), SIZES)
        return result.space  # type: ignore[no-any-return]
    finally:
        journal.close_file()


def deaths(server: Server) -> Iterator[tuple[int, bool, int]]:
    """Give (writes done, whether all of the last, file) for a death at each byte written."""
    file = os.memfd_create("a copy")
    os.pwrite(file, server.start, 0)
    try:
        yield 0, True, file
        for done, (at, data) in enumerate(server.writes):
            step = 1 if len(data) <= MESSAGE_SIZE else max(len(data) // 3, 1)
            atomic = data[0] in range(0x12, 0x17) and len(data) == MESSAGE_SIZE
            for cut in [] if atomic else range(0, len(data), step):
                os.pwrite(file, data[cut : cut + step], at + cut)
                if cut + step < len(data):
                    yield done, False, file
            os.pwrite(file, data, at)
            yield done + 1, True, file
    finally:
        os.close(file)


_SPOTS = st.integers(0, 260).map(lambda page: page * PAGE)
_COUNTS = st.integers(1, 40).map(lambda pages: pages * PAGE)
_RANGES = st.builds(Range, _SPOTS, _COUNTS)
_MESSAGES = st.one_of(
    st.just(FAULT),
    st.builds(lambda r: event(abi.UFFD_EVENT_REMOVE, r.start, r.end), _RANGES),
    st.builds(lambda r: event(abi.UFFD_EVENT_UNMAP, r.start, r.end), _RANGES),
    st.builds(lambda r, to: event(abi.UFFD_EVENT_REMAP, r.start, to, r.length), _RANGES, _SPOTS),
)
_STEPS = st.lists(
    st.one_of(
        st.lists(_MESSAGES, min_size=1, max_size=6).map(lambda one: ("read", one)),
        _SPOTS.map(lambda address: ("grow", address)),
        _RANGES.map(lambda where: ("drop", where)),
    ),
    min_size=1,
    max_size=12,
)


@given(_STEPS)
@settings(max_examples=60)
def test_a_death_at_any_byte_forgets_and_invents_nothing(steps: list[tuple[str, Any]]) -> None:
    """Whatever was being written, the successor knows what the kernel had said, once each."""
    with small_halves():
        server = Server()
        try:
            for what, argument in steps:
                getattr(server, what)(argument)
            for done, whole, file in deaths(server):
                before = [state for count, state in server.known if count <= done]
                after = [state for count, state in server.known if count > done]
                # In the middle of a write the next state may hold already, never a later one.
                allowed = before[-1:] if whole else [before[-1], *after[:1]]
                assert books(replayed(file)) in allowed, (done, whole)
        finally:
            server.close()


def test_compaction_happens_in_these_tests() -> None:
    """The small halves of the tests are written anew many times."""
    with small_halves():
        server = Server()
        halves = []
        for page in range(40):
            where = Range((16 + page) * PAGE, PAGE)
            server.read([FAULT, event(abi.UFFD_EVENT_REMOVE, where.start, where.end), FAULT])
            halves.append(server.journal._half)
        assert sum(a != b for a, b in itertools.pairwise(halves)) > 5
        assert books(replayed(server.journal.fileno())) == books(server.space)
        server.close()


def test_faults_alone_take_no_room() -> None:
    """A message about a fault is read over by the next: the log is for what changes."""
    server = Server()
    tail = server.journal._tail
    for _ in range(100):
        server.read([FAULT] * 64)
    assert server.journal._tail == tail
    server.close()


def test_forks_that_nobody_adopted() -> None:
    """A child's descriptor goes out at once; until it is adopted its books are kept with it."""
    server = Server()
    removal = event(abi.UFFD_EVENT_REMOVE, 20 * PAGE, 21 * PAGE)
    server.read([FORK, removal, FORK])
    assert server.forked == [(1, 1_000_000), (2, 1_000_000)]
    server.journal.adopted(1)
    server.settle()
    journal = Journal.adopt(OwnedFd(os.dup(server.journal.fileno())))
    result: Any = journal.replay(range(2), SIZES)
    assert result.forks == 2
    assert list(result.lost) == [2]
    assert books(result.lost[2]) == books(server.space)
    # Once more, from written books: the count goes on.
    journal.write_books(result.space, lambda number: number)
    assert journal.replay(range(2), SIZES).forks == 2
    journal.close_file()
    server.close()


def test_bits_go_along() -> None:
    """Bits of filled pages are where the next one finds them, and a child begins with them."""
    with small_halves():
        server = Server()
        first, second = server.journal.filled(REGIONS)
        first.add(3 * PAGE)
        second.add_range(70 * PAGE, 5 * PAGE)
        again = Journal.adopt(OwnedFd(os.dup(server.journal.fileno())))
        assert again.manifest == b"{}"
        child = Journal.create(b"a child's, longer", REGIONS)
        child.bits = again.bits
        for journal in (again, child):
            one, two = journal.filled(REGIONS)
            assert (len(one), len(two)) == (1, 5)
            assert 74 * PAGE in two
            journal.close_file()
        server.close()


@pytest.mark.parametrize(
    ("at", "data", "why"),
    [
        (0, b"something", "no journal"),
        (8, b"\x63", "version 99"),
        (12, b"\x07", "damaged"),
        (13, b"\x01", "given up"),
        (16, b"\xff\xff\xff\xff", "damaged"),
    ],
)
def test_refuses_what_it_cannot_read(at: int, data: bytes, why: str) -> None:
    """Another version, a damaged file, one that was given up: refused with a reason."""
    journal = Journal.create(b"{}", REGIONS)
    file = os.dup(journal.fileno())
    os.pwrite(file, data, at)
    assert Journal.is_one(file) == bool(at)
    with pytest.raises(JournalError, match=why):
        Journal.adopt(OwnedFd(file))
    with pytest.raises(OSError):
        os.close(file)
    journal.close_file()


def test_a_record_of_the_future() -> None:
    """A record of ours that is unknown is no guess; a message of the kernel's is skipped."""
    server = Server()
    server.read([bytes([0x7F]) + bytes(31)])
    assert books(replayed(server.journal.fileno())) == books(server.space)
    server.journal._append(bytes([0xFE]) + bytes(31))
    with pytest.raises(JournalError, match="unknown kind"):
        replayed(server.journal.fileno())
    server.close()


def test_books_too_large_are_given_up() -> None:
    """What cannot be written is not half written: the journal says that it is of no use."""
    with small_halves():
        server = Server()
        for page in range(0, 2_000_000, 5000):
            server.space.removed.add(Range(page * PAGE, PAGE))
        with pytest.raises(JournalError, match="too large"):
            server.journal.write_books(server.space, lambda number: number)
        with pytest.raises(JournalError, match="given up"):
            replayed(server.journal.fileno())
        server.close()
