"""Where bytes are while pages come and go, on a real userfaultfd of a child's memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import signal
import socket
import struct
from collections.abc import Iterator
from typing import Final

import pytest

from aiouffd.events import Forked, RawFault
from aiouffd.fds import OwnedFd
from aiouffd.kernel import tracing
from aiouffd.testing.mapping import map_memory
from aiouffd.testing.pages import Contents, Mapping, Memory
from aiouffd.testing.performing import drop
from aiouffd.testing.stepping import Stepper
from aiouffd.uffd import Feature, Mode, Userfaultfd
from tests.targets import wait_until

PAGE: Final = mmap.PAGESIZE
PAGES: Final = 4
CONTENTS = bytes(range(256)) * (PAGES * PAGE // 256)
KINDS: Final = ("shmem", "anon", "shmem-private")
_ORDER = struct.Struct("=cqq")


class Child:
    """A process that has the memory, touches it as told, and never by itself.

    Orders: ``r`` a byte, ``w`` a byte, ``c`` count a byte up so often, ``d`` discard a page,
    ``f`` fork a child that does one order, ``q`` end.
    """

    def __init__(self, kind: str, library: ctypes.CDLL) -> None:
        self.library = library
        self.buffer, self.memfd = map_memory(kind, PAGES * PAGE, "pages")
        anchor = ctypes.c_char.from_buffer(self.buffer)
        self.address = ctypes.addressof(anchor)
        del anchor
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control = ours
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            try:
                self._serve(theirs)
            finally:
                os._exit(0)
        theirs.close()
        ours.settimeout(20)
        _, fds, _, _ = socket.recv_fds(ours, 10, 1)
        self.uffd = Userfaultfd.adopt(OwnedFd(fds[0]))
        self.uffd.claim_reader()

    def _serve(self, control: socket.socket) -> None:
        features = Feature.THREAD_ID | Feature.EXACT_ADDRESS | Feature.WP_HUGETLBFS_SHMEM
        uffd = Userfaultfd.open(features | Feature.EVENT_FORK, user_mode_only=False)
        socket.send_fds(control, [b"uffd"], [uffd.fileno()])
        uffd.close()
        while True:
            order, offset, value = _ORDER.unpack(control.recv(_ORDER.size))
            self._do(order, offset, value, control)

    def _do(self, order: bytes, offset: int, value: int, control: socket.socket) -> None:
        byte = ctypes.c_ubyte.from_address(self.address + offset)
        answer = 0
        if order == b"r":
            answer = byte.value
        elif order == b"w":
            byte.value = value
        elif order == b"c":
            self.library.increment(byte_address(byte), value)
        elif order == b"d":
            answer = ctypes.CDLL(None).madvise(ctypes.c_void_p(byte_address(byte)), PAGE, 4)
        elif order == b"f":
            child = os.fork()
            if child == 0:
                signal.signal(signal.SIGBUS, signal.SIG_DFL)
                os._exit(byte.value)
            answer = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        else:
            os._exit(0)
        control.send(struct.pack("=q", answer))

    def start(self, order: str, offset: int = 0, value: int = 0) -> None:
        """Have it do something."""
        self.control.send(_ORDER.pack(order.encode(), offset, value))

    def answer(self) -> int:
        """What came of it."""
        found: int = struct.unpack("=q", self.control.recv(8))[0]
        return found

    def is_done(self) -> bool:
        """Whether there is an answer."""
        self.control.setblocking(False)
        try:
            return bool(self.control.recv(8, socket.MSG_PEEK))
        except BlockingIOError:
            return False
        finally:
            self.control.settimeout(20)

    def fault(self) -> RawFault:
        """The next thing that somebody stands at."""
        return next_fault(self.uffd)

    def close(self) -> None:
        """End it."""
        self.uffd.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.control.close()
        self.buffer.close()
        if self.memfd is not None:
            os.close(self.memfd)


def next_fault(uffd: Userfaultfd) -> RawFault:
    """Wait for a fault."""
    found: list[RawFault] = []

    def look() -> bool:
        found.extend(m for m in uffd.read() if isinstance(m, RawFault))
        return bool(found)

    wait_until(look, "a fault")
    return found[0]


def byte_address(byte: ctypes.c_ubyte) -> int:
    """Where a byte lies."""
    return ctypes.addressof(byte)


class Bench:
    """A child, its memory's books, and who drops its private pages."""

    def __init__(self, kind: str, library: ctypes.CDLL) -> None:
        self.child = Child(kind, library)
        self.forked: list[Forked] = []
        self.told: list[str] = []
        memfd = None if self.child.memfd is None else os.dup(self.child.memfd)
        self.memory = Memory(1, PAGE, PAGES, kind, memfd, self.pump, self.told.append)
        modes = Mode.MISSING | Mode.WP | (Mode.MINOR if self.memory.shared else 0)
        self.child.uffd.register(self.child.address, PAGES * PAGE, modes)
        self.mapping: Mapping = self.memory.add(self.child.pid, self.child.uffd, self.child.address)
        self.memory.write(self.mapping, 0, CONTENTS)
        self.stepper = Stepper(lambda _: None)

    def pump(self) -> None:
        """Hear of children."""
        self.forked += [m for m in self.child.uffd.read() if isinstance(m, Forked)]

    def hear(self) -> bool:
        """Whether there is a child."""
        self.pump()
        return bool(self.forked)

    def fill(self, page: int, *, protect: bool = False) -> None:
        """Let everybody go on who stands at a page."""
        self.memory.fill(self.mapping, page, protect=protect, wake=True)

    def take_away(self, page: int) -> None:
        """Take a page away, whatever the child does."""
        pid = self.child.pid

        def go() -> None:
            self.memory.take_away(self.mapping, page, lambda *at: drop(pid, *at))

        if self.memory.shared:
            go()
        else:
            assert self.stepper.beside(pid, pid, go)

    def read(self, offset: int, length: int = 1) -> bytes:
        """Look from outside."""
        return self.memory.read(self.mapping, offset, length)

    def close(self) -> None:
        """End all."""
        for each in self.forked:
            each.fd.close()
        self.child.close()
        self.memory.close()


@pytest.fixture(params=KINDS)
def bench(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Iterator[Bench]:
    """A bench for each kind of memory."""
    if tracing.can_trace() is not None:
        pytest.skip("ptrace is not permitted here")
    made = Bench(request.param, library)
    yield made
    made.close()


pytestmark = pytest.mark.root


def test_absent_bytes_are_in_the_store(bench: Bench) -> None:
    """All can be read and written from outside while no page is there."""
    assert bench.read(0, PAGES * PAGE) == CONTENTS
    bench.memory.write(bench.mapping, PAGE - 2, b"abcd")  # over an edge
    assert bench.read(PAGE - 3, 6) == CONTENTS[PAGE - 3 : PAGE - 2] + b"abcd" + CONTENTS[2:3]
    assert bench.mapping.contents.present == set()


def test_a_page_that_was_read_is_protected(bench: Bench) -> None:
    """Filled for a read, the next store is a touch too; filled for it, it is not."""
    child = bench.child
    child.start("r", 7)
    assert child.fault().address == child.address + 7
    assert not child.is_done()
    bench.fill(0, protect=True)
    assert child.answer() == CONTENTS[7]
    child.start("w", 7, 99)
    assert child.fault().address == child.address + 7
    assert bench.read(7) == CONTENTS[7:8]
    bench.fill(0)
    child.answer()
    child.start("c", 7, 10)
    child.answer()
    assert bench.read(7) == bytes([109])


def test_bytes_come_and_go(bench: Bench) -> None:
    """What is written while a page is there is found after it was away, in both directions."""
    child = bench.child
    for number in range(20):
        child.start("w", 5, number)
        child.fault()
        bench.fill(0)
        child.answer()
        bench.take_away(0)
        assert bench.read(5) == bytes([number])
        bench.memory.write(bench.mapping, 6, bytes([number]))
        child.start("r", 6)
        child.fault()
        bench.fill(0, protect=True)
        assert child.answer() == number
        bench.memory.write(bench.mapping, 5, bytes([number + 1]))  # while it is there
        child.start("r", 5)
        assert child.answer() == number + 1
        child.start("w", 5, 0)  # and it is protected still
        child.fault()
        bench.fill(0)
        child.answer()
        bench.take_away(0)
        bench.take_away(0)  # a page that is away stays so


def test_no_store_is_lost(bench: Bench, seed: int) -> None:
    """Pages are taken away over and over while a thread counts in them: it counts to the end."""
    print(f"seed {seed}")
    choose = random.Random(seed)
    child = bench.child
    rounds = 0
    for page in (1, 2):
        child.start("c", page * PAGE + 9, 40_000_000)
        before = bench.read(page * PAGE + 9)[0]
        while not child.is_done():
            for message in child.uffd.read():
                if isinstance(message, RawFault):
                    bench.fill(page, protect=choose.random() < 0.5)
            if choose.random() < 0.3:
                bench.take_away(page)
                rounds += 1
        child.answer()
        assert bench.read(page * PAGE + 9)[0] == (before + 40_000_000) % 256
    print(f"{rounds} rounds")
    assert rounds > 10


@pytest.mark.parametrize("bench", ["anon", "shmem-private"], indirect=True)
def test_a_page_that_was_given_back_is_zero(bench: Bench) -> None:
    """Private memory that the program itself has discarded reads as zeros, from both sides."""
    child = bench.child
    child.start("w", 5, 77)
    child.fault()
    bench.fill(0)
    child.answer()
    child.start("d", 0)
    assert child.answer() == 0
    assert bench.read(5) == b"\0"
    child.start("r", 5)
    child.fault()
    bench.fill(0, protect=True)
    assert child.answer() == 0
    child.start("d", 0)
    child.answer()
    bench.memory.write(bench.mapping, 5, b"x")
    child.start("r", 5)
    assert child.answer() == ord("x")
    child.start("r", 6)
    assert child.answer() == 0


def test_poison_and_its_end(bench: Bench) -> None:
    """A poisoned page keeps its bytes; filled, it has them, and its children have their own."""
    child = bench.child
    bench.memory.poison(bench.mapping, 0, wake=True)
    assert bench.mapping.poisoned == {0}
    assert bench.read(5) == CONTENTS[5:6]
    child.start("f", 5)
    wait_until(bench.hear, "the fork")
    assert child.answer() == -signal.SIGBUS
    bench.fill(0)
    assert bench.mapping.poisoned == set()
    child.start("r", 5)
    assert child.answer() == CONTENTS[5]


def test_a_child_has_what_its_parent_had(bench: Bench) -> None:
    """A forked child's private pages begin as its parent's are, and then go their own way."""
    child, memory = bench.child, bench.memory
    child.start("w", 5, 77)
    child.fault()
    bench.fill(0)
    child.answer()
    child.start("f", PAGE + 5)
    wait_until(bench.hear, "the fork")
    forked = Userfaultfd.adopt(bench.forked.pop().fd)
    forked.claim_reader()
    twin = memory.add(0, forked, child.address, like=bench.mapping)
    assert (twin.contents is bench.mapping.contents) is memory.shared
    assert twin.contents.present == {0}
    assert next_fault(forked).address == child.address + PAGE + 5
    memory.write(twin, PAGE + 5, b"\x42")
    memory.fill(twin, 1, protect=True, wake=True)
    assert child.answer() == 0x42
    assert (bench.read(PAGE + 5) == b"\x42") is memory.shared
    forked.close()


@pytest.mark.parametrize("bench", ["shmem"], indirect=True)
def test_shared_pages_leave_everywhere(bench: Bench) -> None:
    """Taking a page of shared memory away, a child that was forked just now is protected, too."""
    memory = bench.memory
    bench.child.start("w", 5, 1)
    bench.child.fault()
    bench.fill(0)
    bench.child.answer()
    late: list[Mapping] = []
    protected: list[Mapping] = []
    was = memory._protect

    def protect(mapping: Mapping, page: int) -> None:
        protected.append(mapping)
        if not late:  # as if a fork's message had been read in the midst of it
            late.append(memory.add(0, bench.child.uffd, bench.child.address, like=bench.mapping))
        was(mapping, page)

    memory._protect = protect  # type: ignore[method-assign]
    bench.take_away(0)
    assert protected == [bench.mapping, *late]
    assert bench.read(5) == b"\1"


@pytest.mark.parametrize("bench", ["anon", "shmem-private"], indirect=True)
def test_while_a_page_is_discarded_the_store_has_its_bytes(bench: Bench) -> None:
    """Between the two halves of leaving, what is written from outside is not lost."""
    bench.child.start("w", 5, 1)
    bench.child.fault()
    bench.fill(0)
    bench.child.answer()
    contents = bench.mapping.contents
    contents.store[0] = bench.memory.begin_leaving(bench.mapping, 0)
    contents.leaving.add(0)
    bench.memory.write(bench.mapping, 6, b"new")
    assert bench.read(5, 4) == b"\1new"
    twin = contents.copy()
    assert twin.store[0][5:9] == b"\1new"
    bench.child.start("d", 0)
    bench.child.answer()
    contents.leaving.discard(0)
    bench.memory.left(bench.mapping, 0, contents.store[0])
    bench.child.start("r", 7)
    bench.child.fault()
    bench.fill(0)
    assert bench.child.answer() == ord("e")


def test_visits() -> None:
    """A page may go once the last one has found it for whom it came, or is asleep elsewhere."""
    contents = Contents()
    first, second = contents.begin_visit(3), contents.begin_visit(3)
    assert contents.is_visited(3)
    assert not contents.is_visited(4)
    assert not contents.end_visit(3, first)
    assert contents.end_visit(3, second)
    assert contents.visits == {}
    contents.visits[3] = [0]  # long ago
    assert not contents.is_visited(3)
