"""The server, with real peers: processes that hand their memory over and touch it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from aiouffd.errors import PeerError, SourceError
from aiouffd.failure import Action, FailurePolicy
from aiouffd.fd_store import FdStore
from aiouffd.fds import OwnedFd
from aiouffd.handover import Handover
from aiouffd.protocols import firecracker
from aiouffd.reports import Ended, FirstPage, Refused, Report, Resident, Started
from aiouffd.server import LISTENER, Server
from aiouffd.service import Service
from aiouffd.session_states import State
from aiouffd.sources import Source
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.file import FileSource
from aiouffd.testing.sources import image
from aiouffd.unix_socket import Connection, Listener
from tests.stand_in_vmm import HUGE, PAGE, ROOT, StandInVmm, eventually
from tests.test_protection import Manager

SIZE: Final = 64 * PAGE


class Serving:
    """A server over an image file, and what it reported."""

    def __init__(self, path: Path, image_path: Path) -> None:
        self.path = path
        self.image_path = image_path
        self.reports: list[Report] = []
        self.server: Server

    def refusals(self) -> list[str]:
        """Give the reasons of the refusals."""
        return [report.reason for report in self.reports if isinstance(report, Refused)]

    def ended(self) -> list[Ended]:
        """Give the sessions that have ended."""
        return [report for report in self.reports if isinstance(report, Ended)]

    def pids(self) -> list[int]:
        """Give the processes that have been served so far."""
        started = [report.session.peer for report in self.reports if isinstance(report, Started)]
        return [peer.pid for peer in started if peer is not None]

    @contextlib.asynccontextmanager
    async def run(self, **options: Any) -> AsyncIterator[Server]:
        """Run the server."""
        source = options.pop("source", lambda: FileSource(self.image_path))
        server = Server(
            self.path, firecracker.receive, source, report=self.reports.append, **options
        )
        async with server:
            self.server = server
            yield server


@pytest.fixture
def serving(tmp_path: Path) -> Serving:
    """Prepare a server over an image of 64 pages, each different."""
    file = tmp_path / "image"
    file.write_bytes(image(SIZE))
    return Serving(tmp_path / "socket", file)


@contextlib.asynccontextmanager
async def vmm(serving: Serving, size: int = SIZE, **options: Any) -> AsyncIterator[StandInVmm]:
    """Run a VMM that hands over to the server; unless told not to wait, it is served then."""
    async with StandInVmm.start(serving.path, size, **options) as guest:
        if options.get("wait", True):
            pid = guest.process.pid
            await eventually(lambda: pid in serving.pids(), "the VMM is served")
        yield guest


# --- serving ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quirks",
    [
        {"dialect": "1.1"},
        {"dialect": "1.7"},
        {"dialect": "1.12"},
        {"dialect": "stratovirt"},
        {"regions": 4},
        {"late_fd": True, "pieces": 7},
        {"memfd": True},
        {"blocking": True},
        {"events": False},
    ],
    ids=str,
)
async def test_a_vmm_reads_the_image(serving: Serving, quirks: dict[str, Any]) -> None:
    """Whatever release or relative hands over, all of its memory reads as the image."""
    async with serving.run(), vmm(serving, **quirks) as guest:
        digest = await guest.ask("digest", 7)
        assert digest == hashlib.sha256(image(SIZE)).hexdigest()
        await guest.ask("write", 0, "aabb")
        assert await guest.read(0, 3) == b"\xaa\xbb" + image(SIZE)[2:3]


@pytest.mark.parametrize("chunk", [0, 16 * PAGE])
async def test_holes_and_the_last_partial_page_read_as_zeros(serving: Serving, chunk: int) -> None:
    """A sparse image that ends within a page: data where it is, zeros elsewhere."""
    expected = bytearray(SIZE)
    with open(serving.image_path, "wb") as file:
        for page in (3, 40, 63):
            data = image(PAGE if page != 63 else 1000, seed=page)
            os.pwrite(file.fileno(), data, page * PAGE)
            expected[page * PAGE : page * PAGE + len(data)] = data
    async with serving.run(service=Service(chunk=chunk)), vmm(serving) as guest:
        assert await guest.read(0, SIZE) == expected
        figures = next(iter(serving.server.sessions)).figures()
        assert figures.zero_pages > 0 or chunk


async def test_a_chunk_saves_faults(serving: Serving) -> None:
    """With a chunk of sixteen pages, reading all takes a sixteenth of the faults."""
    async with serving.run(service=Service(chunk=16 * PAGE)), vmm(serving) as guest:
        assert await guest.read(0, SIZE) == image(SIZE)
    figures = serving.ended()[0].session.figures()
    assert figures.faults == SIZE // PAGE // 16
    assert figures.copied_bytes + figures.filled_bytes == SIZE


async def test_many_vmms_are_served_at_once(serving: Serving) -> None:
    """Each has its own memory; what one writes no other sees."""
    async with serving.run() as server, contextlib.AsyncExitStack() as stack:
        guests = [await stack.enter_async_context(vmm(serving)) for _ in range(4)]
        assert len(server.sessions) == 4
        await asyncio.gather(
            *(guest.ask("write", PAGE, bytes([n] * 8).hex()) for n, guest in enumerate(guests))
        )
        memories = await asyncio.gather(*(guest.read(0, SIZE) for guest in guests))
        for n, memory in enumerate(memories):
            expected = bytearray(image(SIZE))
            expected[PAGE : PAGE + 8] = bytes([n] * 8)
            assert memory == expected
    assert server.served == 4
    assert server.failed == 0


async def test_one_source_can_serve_all(serving: Serving) -> None:
    """A source that is given as it is stays its maker's, open after every session."""
    source = BufferSource(image(SIZE))
    async with serving.run(source=source):
        for _ in range(2):
            async with vmm(serving) as guest:
                assert await guest.read(0, SIZE) == image(SIZE)
    assert source.read_nowait(0, 1) is not None


@pytest.mark.root
async def test_serving_begins_before_the_hand_over_ends(serving: Serving) -> None:
    """Scenario 25: memory touched before and during the load is served, in kernel mode too."""
    async with (
        serving.run(),
        vmm(serving, touch_first=True, load=True, dialect="stratovirt") as guest,
    ):
        assert await guest.read(0, SIZE) == image(SIZE)
        await eventually(lambda: len(serving.reports) >= 2, "the session is reported")
        assert [type(report) for report in serving.reports[:2]] == [Started, FirstPage]


async def test_a_vmm_that_fails_after_the_hand_over_leaves_nothing(serving: Serving) -> None:
    """Scenario 25: it exits while it loads; its session is retired (the leak check looks)."""
    async with serving.run() as server:
        async with vmm(serving, load=True, wait=False) as guest:
            await eventually(lambda: server.sessions, "the session begins")
            guest.kill()
            await eventually(serving.ended, "the session ends")
        assert serving.ended()[0].session.outcome == "target exited"


async def test_each_session_is_reported_with_its_figures(serving: Serving) -> None:
    """One report at the start, at the first page and at the end, each a line for people."""
    async with serving.run():
        async with vmm(serving) as guest:
            await guest.read(0, SIZE)
            pid = guest.process.pid
        await eventually(serving.ended, "the session ends")
    # That all of it was read is found out a little later, perhaps after its end.
    started, first, ended = (one for one in serving.reports if not isinstance(one, Resident))
    assert isinstance(first, FirstPage)
    assert first.session.figures().first_page_s == first.seconds > 0
    who = f"pid {pid} (uid {os.geteuid()})"
    assert str(first) == f"session of {who}: first page served after {first.seconds:.3f} s"
    assert isinstance(started, Started)
    assert str(started) == (
        f"session of pid {pid} (uid {os.geteuid()}) started: 1 regions, 0.2 MiB,"
        " pages of 4096 bytes, firecracker 1.12"
    )
    assert isinstance(ended, Ended)
    assert str(ended).startswith(f"session of pid {pid} (uid {os.geteuid()}) ended after ")
    figures = ended.session.figures()
    assert figures.faults == SIZE // PAGE
    assert figures.copied_bytes == figures.memory_bytes == SIZE
    assert figures.failures == 0
    assert figures.first_fault_s is not None
    assert 0 < figures.first_fault_s <= first.seconds <= figures.seconds
    assert ended.session.state is State.TARGET_GONE
    assert figures.as_dict()["faults"] == SIZE // PAGE


async def test_peers_that_have_not_handed_over_are_seen(serving: Serving) -> None:
    """Who connected, since when; counted beside the sessions, by state."""
    async with serving.run() as server, vmm(serving) as guest:
        before = time.monotonic()
        with socket.socket(socket.AF_UNIX) as late:
            late.connect(os.fspath(serving.path))
            await eventually(lambda: server.handshakes, "the peer is seen")
            (handshake,) = server.handshakes
            assert handshake.peer == f"pid {os.getpid()} (uid {os.geteuid()})"
            assert before <= handshake.since <= time.monotonic()
            counts = {State.HANDSHAKING: 1, State.SERVING: 1, State.RESIDENT: 0}
            assert server.states() == counts
        await eventually(lambda: not server.handshakes, "it is refused")
        assert server.states()[State.HANDSHAKING] == 0
        assert await guest.read(0) == image(SIZE)[:1]


# --- the end of a target ---------------------------------------------------------------


@pytest.mark.parametrize("how", ["kill", "exit", "exec"])
async def test_the_end_of_a_target_ends_its_session(serving: Serving, how: str) -> None:
    """Scenario 10: however it ends, its session is closed soon, and no other one."""
    async with serving.run() as server, vmm(serving) as other:
        async with vmm(serving) as guest:
            await guest.read(0)
            if how == "kill":
                guest.kill()
            else:
                guest.tell(how)
            await eventually(lambda: len(serving.ended()) == 1, "the session ends", 5)
        assert serving.ended()[0].session.name.startswith(f"pid {guest.process.pid} ")
        assert len(server.sessions) == 1
        assert await other.read(5 * PAGE) == image(SIZE)[5 * PAGE : 5 * PAGE + 1]


CLIENTS: Final = """
# A process that forks a thousand targets; each is served one page, then dies.
import os, signal, sys
from tests.stand_in_vmm import Guest, Options, _hand_over
from aiouffd.uffd import Userfaultfd

options = Options(socket=sys.argv[1], size=4096)
for number in range(int(sys.argv[2])):
    pid = os.fork()
    if not pid:
        guest = Guest(options)
        uffd = Userfaultfd.open(allow_user_mode_only=True)
        uffd.register(guest.starts[0], guest.length)
        server = _hand_over(options, guest, uffd.fileno())
        if guest.read(0, 4096) != bytes.fromhex(sys.argv[3]) * 512:
            os._exit(1)
        os.kill(os.getpid(), signal.SIGKILL) if number % 2 else os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL), status
"""


@pytest.mark.limit(120)
async def test_a_thousand_targets_leave_nothing(serving: Serving) -> None:
    """Scenario 10: after a thousand ends, by exit and by signal, descriptors are as before."""
    source = BufferSource(b"8 bytes!" * 512)
    async with serving.run(source=source) as server:
        before = len(os.listdir("/proc/self/fd"))
        clients = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CLIENTS, serving.path, "1000", b"8 bytes!".hex(), cwd=ROOT
        )
        assert await clients.wait() == 0
        await eventually(lambda: not server.sessions, "all sessions have ended")
        assert (server.served, server.failed, server.refused) == (1000, 0, 0)
        await eventually(
            lambda: len(os.listdir("/proc/self/fd")) <= before, "no descriptor is left"
        )


@pytest.mark.root
async def test_forked_children_are_served_to_their_end(serving: Serving, tmp_path: Path) -> None:
    """The session outlives its peer as long as a child that it forked lives."""
    digest = tmp_path / "digest"
    async with serving.run():
        async with vmm(serving, forks=True) as guest:
            await guest.ask("write", 0, "aa" * 8)
            await guest.ask("fork", os.fspath(digest))
            await guest.ask("write", 8, "bb" * 8)  # after the fork: the child's memory is its own
            guest.kill()
            await guest.status()
        await eventually(digest.exists, "the orphan has read all of its memory")
        await eventually(serving.ended, "the session ends with the orphan")
    expected = b"\xaa" * 8 + image(SIZE)[8:]
    assert digest.read_text() == hashlib.sha256(expected).hexdigest()
    assert serving.ended()[0].session.outcome == "target exited"


@pytest.mark.root
async def test_too_many_children_are_settled(
    serving: Serving, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those within the limit are served, and so is the target; others get no page of zeros."""
    files = [tmp_path / f"digest {number}" for number in range(5)]
    async with serving.run(service=Service(max_children=2)) as server:
        async with vmm(serving, forks=True) as guest:
            (session,) = server.sessions
            for file in files:
                await guest.ask("fork", os.fspath(file))
            await eventually(lambda: len(session.pager.children) == 2, "the rest is refused")
            assert await guest.read(0, PAGE) == image(SIZE)[:PAGE]
            guest.kill()
            await guest.status()
        await eventually(serving.ended, "the session ends with the orphans")
        assert [file.exists() for file in files] == [True, True, False, False, False]
    assert caplog.text.count("more than 2 forked children are not served") == 1
    expected = hashlib.sha256(image(SIZE)).hexdigest()
    assert [file.read_text() for file in files[:2]] == [expected] * 2


# --- removed memory --------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [0, 16 * PAGE])
async def test_removed_pages_read_zero(serving: Serving, chunk: int) -> None:
    """Scenario 12: pages given back by a balloon never come back from the image.

    Pages that were written, only read, or never touched before; beside others that are there
    or still missing, and with chunks that reach over them.
    """
    expected = bytearray(image(SIZE))
    async with serving.run(service=Service(chunk=chunk)), vmm(serving) as guest:
        await guest.ask("write", 2 * PAGE, "ff" * 16)
        await guest.read(3 * PAGE)
        await guest.ask("remove", 2 * PAGE, 4 * PAGE)  # written, read, and two untouched
        await guest.ask("remove", 20 * PAGE, PAGE)
        expected[2 * PAGE : 6 * PAGE] = bytes(4 * PAGE)
        expected[20 * PAGE : 21 * PAGE] = bytes(PAGE)
        assert await guest.read(20 * PAGE, 8) == bytes(8)
        assert await guest.read(0, SIZE) == expected
        await guest.ask("write", 4 * PAGE, "0102")
        expected[4 * PAGE : 4 * PAGE + 2] = b"\1\2"
        assert await guest.read(0, SIZE) == expected
        await guest.ask("remove", 0, SIZE)
        assert await guest.read(0, SIZE) == bytes(SIZE)
    await eventually(serving.ended, "the session ends")
    figures = serving.ended()[0].session.figures()
    assert figures.events == 3
    assert figures.removed_pages >= SIZE // PAGE


async def test_removing_and_touching_at_once_never_mixes(serving: Serving, seed: int) -> None:
    """Removals race with reads of the same pages: each page is the image's or zero."""
    choose = random.Random(seed)
    data = image(SIZE)
    async with serving.run(), vmm(serving) as guest:
        for _ in range(20):
            first = choose.randrange(56)
            jobs = [guest.ask("remove", first * PAGE, 8 * PAGE)]
            pages = [choose.randrange(64) for _ in range(6)]
            jobs += [guest.read(page * PAGE, PAGE) for page in pages]
            _, *got = await asyncio.gather(*jobs)
            for page, memory in zip(pages, got, strict=True):
                assert memory in (data[page * PAGE : page * PAGE + PAGE], bytes(PAGE))


@pytest.mark.root
@pytest.mark.parametrize("dialect", ["1.7", "1.12"])
async def test_huge_pages_are_served_and_removed(
    serving: Serving, huge_pages: Callable[[int], None], dialect: str
) -> None:
    """Scenario 12 on hugetlb: pages of 2 MiB, the last one partial; zeros come by a copy."""
    huge_pages(4)
    size = 4 * HUGE
    data = image(3 * HUGE + 5000)
    serving.image_path.write_bytes(data)
    expected = bytearray(data.ljust(size, b"\0"))
    async with serving.run(), vmm(serving, size=size, huge=True, dialect=dialect) as guest:
        assert await guest.read(HUGE, PAGE) == data[HUGE : HUGE + PAGE]
        await guest.ask("remove", HUGE, 2 * HUGE)  # one that is there, one that never was
        expected[HUGE : 3 * HUGE] = bytes(2 * HUGE)
        assert await guest.ask("digest") == hashlib.sha256(expected).hexdigest()
    await eventually(serving.ended, "the session ends")
    figures = serving.ended()[0].session.figures()
    assert figures.faults == 5
    assert figures.removed_pages == 2


# --- the image changes -----------------------------------------------------------------


async def test_a_truncated_image_fails_its_session(serving: Serving) -> None:
    """Scenario 22a: on both sides of the cut the guest gets an error, never other bytes."""
    async with serving.run(), vmm(serving) as guest:
        assert await guest.read(0, PAGE) == image(SIZE)[:PAGE]
        os.truncate(serving.image_path, SIZE // 2)
        for page in (1, 40):
            with pytest.raises(OSError) as failed:
                await guest.ask("read_in_kernel_mode", page * PAGE)
            assert failed.value.errno == errno.EFAULT
        assert await guest.read(0, PAGE) == image(SIZE)[:PAGE]  # what is there stays
        guest.tell("read", 50 * PAGE)
        assert await guest.status() == -signal.SIGBUS
        await eventually(serving.ended, "the session ends")
    session = serving.ended()[0].session
    assert isinstance(session.error, SourceError)
    assert "its size went from 262144 to 131072" in session.outcome
    assert serving.server.failed == 1


async def test_a_replaced_image_is_for_new_sessions(serving: Serving) -> None:
    """Scenario 22b, 23: who began with a file keeps it, under whatever name or none."""
    new = serving.image_path.with_name("new")
    new.write_bytes(image(SIZE, seed=1))
    async with serving.run(), vmm(serving) as old_guest:
        assert await old_guest.read(0, PAGE) == image(SIZE)[:PAGE]
        new.rename(serving.image_path)
        async with vmm(serving) as new_guest:
            assert await new_guest.read(0, SIZE) == image(SIZE, seed=1)
            assert await old_guest.read(0, SIZE) == image(SIZE)
        serving.image_path.unlink()
        async with vmm(serving, wait=False):
            await eventually(serving.refusals, "the peer is refused")
    assert "No such file" in serving.refusals()[0]


async def test_an_image_written_in_place_fails_its_sessions(serving: Serving) -> None:
    """Scenario 23: a write through another name of the file fails both, by the policy."""
    link = serving.image_path.with_name("link")
    os.link(serving.image_path, link)
    async with serving.run(), vmm(serving) as one, vmm(serving) as two:
        await one.read(0)
        with link.open("r+b") as file:
            file.write(b"changed")
        for guest in (one, two):
            with pytest.raises(OSError) as failed:
                await guest.ask("read_in_kernel_mode", 9 * PAGE)
            assert failed.value.errno == errno.EFAULT


async def test_a_small_image_is_refused(serving: Serving) -> None:
    """Memory behind the image's end has no bytes: the peer is refused, by name."""
    async with serving.run(), vmm(serving, size=SIZE + PAGE, wait=False) as guest:
        await eventually(serving.refusals, "the peer is refused")
        with pytest.raises(OSError) as failed:  # and its memory is no page of zeros
            await guest.ask("read_in_kernel_mode", 0)
        assert failed.value.errno == errno.EFAULT
    assert "region 0 " in serving.refusals()[0]
    assert "but the image at 0x40000" in serving.refusals()[0]


async def test_an_image_that_has_gone_is_no_page_of_zeros(serving: Serving) -> None:
    """The peer has handed over, and gets an error for what nobody can bring."""
    async with serving.run():
        serving.image_path.unlink()
        async with vmm(serving, wait=False) as guest:
            await eventually(serving.refusals, "the peer is refused")
            with pytest.raises(OSError) as failed:
                await guest.ask("read_in_kernel_mode", 0)
            assert failed.value.errno == errno.EFAULT


async def test_a_source_of_unusable_extents_is_closed(serving: Serving) -> None:
    """The peer is refused by name, and the source that was opened for it let go of."""
    closed: list[Source] = []

    class Unordered(BufferSource):
        def extents(self) -> Iterator[tuple[int, int]]:
            yield PAGE, PAGE
            yield 0, PAGE

        async def aclose(self) -> None:
            closed.append(self)
            await super().aclose()

    kinds: Iterator[type[BufferSource]] = iter((BufferSource, Unordered))  # first: a trial
    async with serving.run(source=lambda: next(kinds)(image(SIZE))), vmm(serving, wait=False):
        await eventually(serving.refusals, "the peer is refused")
    assert "extents are unusable" in serving.refusals()[0]
    assert len(closed) == 1


async def test_a_server_without_an_image_does_not_start(serving: Serving) -> None:
    """Better now than with the first peer."""
    serving.image_path.unlink()
    with pytest.raises(FileNotFoundError):
        async with serving.run():
            pass
    assert not serving.path.exists()


# --- the source fails ------------------------------------------------------------------


class BrokenSource(BufferSource):
    """Fails for good once told to; reads then wait until they are told to fail."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.broken = False

    def read_nowait(self, offset: int, length: int) -> Any:
        if self.broken:
            raise SourceError("the store is gone")
        return super().read_nowait(offset, length)


@pytest.mark.root
@pytest.mark.parametrize("action", list(Action))
async def test_a_source_that_fails_later_ends_in_the_policy(
    serving: Serving, action: Action
) -> None:
    """Scenario 30: four threads fault when the source fails; each gets what the policy says."""
    source = BrokenSource(image(SIZE))
    service = Service(
        failure=FailurePolicy(retries=1, then=action),
        on_close=Action.POISON if action is Action.RAISE else action,
    )
    async with serving.run(source=source, service=service), vmm(serving) as guest:
        assert await guest.read(0, PAGE) == image(SIZE)[:PAGE]
        source.broken = True
        touches = [
            asyncio.ensure_future(guest.ask("read_in_kernel_mode", page * PAGE))
            for page in range(1, 5)
        ]
        session = next(iter(serving.server.sessions))
        await eventually(lambda: session.figures().failures >= 1, "the first fault fails", 5)
        if action is Action.KILL:
            assert await guest.status() == -signal.SIGKILL
        elif action is Action.HANG:
            await eventually(lambda: session.figures().failures >= 4, "all four fail", 5)
            assert not any(touch.done() for touch in touches)
            guest.kill()
        else:
            done = await asyncio.gather(*touches, return_exceptions=True)
            if action is Action.ZERO:
                assert done == [bytes(PAGE).hex()] * 4
            else:
                assert [getattr(error, "errno", 0) for error in done] == [errno.EFAULT] * 4
            if action is not Action.RAISE:
                guest.kill()
        await eventually(serving.ended, "the session ends", 5)
        await asyncio.gather(*touches, return_exceptions=True)
    assert "the store is gone" in serving.ended()[0].session.outcome
    assert serving.server.failed == 1


# --- hostile peers ---------------------------------------------------------------------


def silent(sock: socket.socket) -> None:
    """Connect and say nothing."""


def hang_up(sock: socket.socket) -> None:
    """Connect and leave."""
    sock.close()


def half(sock: socket.socket) -> None:
    """Leave in the middle of a message, with a descriptor sent."""
    with OwnedFd(os.memfd_create("half")) as fd:
        socket.send_fds(sock, [b'[{"base_host'], [fd.fileno()])
    sock.close()


def no_descriptor(sock: socket.socket) -> None:
    """Send a message without a descriptor."""
    sock.send(MESSAGE)
    sock.close()


def pipes(sock: socket.socket) -> None:
    """Send a pipe where a userfaultfd belongs."""
    reader, writer = os.pipe()
    with OwnedFd(reader), OwnedFd(writer):
        socket.send_fds(sock, [MESSAGE], [reader, writer])


def garbage(sock: socket.socket) -> None:
    """Send what is no message."""
    with contextlib.suppress(OSError):
        sock.send(b"GET / HTTP/1.1\r\n\r\n" * 100)


def many_descriptors(sock: socket.socket) -> None:
    """Send more descriptors than are taken."""
    with OwnedFd(os.memfd_create("many")) as fd:
        socket.send_fds(sock, [MESSAGE], [fd.fileno()] * 100)


MESSAGE: Final = b'[{"base_host_virt_addr": 1048576, "size": 4096, "offset": 0}]'
HOSTILE: Final[dict[Callable[[socket.socket], None], str]] = {
    silent: "no complete hand-over within 0.2 s",
    hang_up: "without sending anything",
    half: "in the middle of the hand-over",
    no_descriptor: "without sending a descriptor",
    pipes: "sent no userfaultfd but: pipe:",
    garbage: "begins with b'G'",
    many_descriptors: "more than 16 descriptors",
}


@pytest.mark.parametrize("attack", HOSTILE, ids=[attack.__name__ for attack in HOSTILE])
async def test_a_hostile_peer_is_refused_by_name(
    serving: Serving, attack: Callable[[socket.socket], None]
) -> None:
    """Scenario 26: each is refused for its reason, and others are served meanwhile."""
    async with serving.run(handshake_timeout=0.2):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(os.fspath(serving.path))
            attack(sock)
            await eventually(serving.refusals, "the peer is refused")
        assert HOSTILE[attack] in serving.refusals()[0]
        refused = serving.reports[0]
        assert isinstance(refused, Refused)
        assert refused.peer == f"pid {os.getpid()} (uid {os.geteuid()})"


@pytest.mark.limit(120)
async def test_a_thousand_hostile_peers_cost_nothing(serving: Serving, seed: int) -> None:
    """Scenario 26: descriptors stay as they were, and a guest is served all along."""
    choose = random.Random(seed)
    attacks = [attack for attack in HOSTILE if attack is not silent]
    async with serving.run(handshake_timeout=1.0) as server, vmm(serving) as guest:
        before = len(os.listdir("/proc/self/fd"))
        quiet = [socket.socket(socket.AF_UNIX) for _ in range(5)]
        for sock in quiet:
            sock.connect(os.fspath(serving.path))
        for turn in range(1000):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(os.fspath(serving.path))
                choose.choice(attacks)(sock)
                await asyncio.sleep(0)
            if turn % 50 == 0:
                page = turn // 50
                data = await asyncio.wait_for(guest.read(page * PAGE, PAGE), 10)
                assert data == image(SIZE)[page * PAGE : page * PAGE + PAGE]
        await eventually(lambda: server.refused == 1005, "all are refused")
        for sock in quiet:
            sock.close()
        await eventually(
            lambda: len(os.listdir("/proc/self/fd")) <= before, "no descriptor is left"
        )


async def test_the_slowest_of_too_many_goes(serving: Serving) -> None:
    """Scenario 26: silent peers cannot fill the server up; a real one still gets in."""
    async with (
        serving.run(handshake_timeout=30, max_handshakes=8),
        contextlib.AsyncExitStack() as stack,
    ):
        for _ in range(20):
            connection = await Connection.open(serving.path)
            stack.callback(connection.close)
        async with vmm(serving) as guest:
            assert await guest.read(0, PAGE) == image(SIZE)[:PAGE]
        await eventually(lambda: len(serving.refusals()) >= 12, "the others were refused")
    assert serving.refusals().count("too many peers are connecting; it was the slowest") >= 12
    assert set(serving.refusals()[13:]) == {"the server is closing"}


async def test_a_slow_image_holds_up_nobody_and_leaks_nothing(serving: Serving) -> None:
    """A server that closes while an image is being opened lets go of it once it is open."""
    opened: list[FileSource] = []
    slow, go_on = threading.Event(), threading.Event()

    def open_slowly() -> FileSource:
        if opened:  # the first is the server's own trial
            slow.set()
            go_on.wait(30)
        opened.append(FileSource(serving.image_path))
        return opened[-1]

    async with serving.run(source=open_slowly) as server, vmm(serving, wait=False):
        await eventually(slow.is_set, "the image is being opened")
        closing = asyncio.ensure_future(server.aclose())
        await asyncio.sleep(0)
        go_on.set()
        await closing
    assert serving.refusals() == ["the server is closing"]
    assert len(opened) == 2


@pytest.mark.root
async def test_only_allowed_users_are_served(serving: Serving) -> None:
    """Scenario 26: the uid that the kernel names decides, whatever the socket's rights."""
    async with serving.run(uids=[12345]), vmm(serving, wait=False):
        await eventually(serving.refusals, "the peer is refused")
    assert serving.refusals() == ["uid 0 may not connect; allowed: 12345"]


async def test_a_shortage_of_descriptors_delays_and_kills_nobody(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    """While descriptors are short new peers wait in the queue; the living are served.

    The loop does not spin on the listener meanwhile.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with serving.run() as server, vmm(serving) as guest:
        with contextlib.ExitStack() as stack:
            waiting = socket.socket(socket.AF_UNIX)
            stack.enter_context(waiting)
            taken: list[OwnedFd] = []
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
            try:
                with contextlib.suppress(OSError):
                    while True:
                        taken.append(OwnedFd(os.dup(0)))
                waiting.connect(os.fspath(serving.path))
                assert await guest.read(7 * PAGE) == image(SIZE)[7 * PAGE : 7 * PAGE + 1]
                assert server.refused == 0
                caplog.clear()
                await eventually(lambda: "new peers wait" in "".join(caplog.messages), "a try")
                await asyncio.sleep(0.25)
                assert len(caplog.messages) < 10
            finally:
                for fd in taken:
                    fd.close()
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            waiting.shutdown(socket.SHUT_RDWR)
            await eventually(serving.refusals, "the peer that waited is taken up")


# --- draining and closing --------------------------------------------------------------


async def test_draining_serves_the_living_to_their_end(serving: Serving) -> None:
    """Scenario 32: three live on, a fourth is refused, a newer server takes the name."""
    async with serving.run() as server, contextlib.AsyncExitStack() as stack:
        guests = [await stack.enter_async_context(vmm(serving)) for _ in range(3)]
        draining = asyncio.ensure_future(server.drain())
        await eventually(lambda: not serving.path.exists(), "the name is given up")
        with pytest.raises(FileNotFoundError):
            await Connection.open(serving.path)
        newer = Serving(serving.path, serving.image_path)
        async with newer.run():
            async with vmm(newer) as fourth:
                memories = await asyncio.gather(*(g.read(0, SIZE) for g in (*guests, fourth)))
                assert memories == [image(SIZE)] * 4
            assert not draining.done()
            for guest in guests:
                guest.kill()
            await asyncio.wait_for(draining, 10)
            await server.aclose()
            assert serving.path.is_socket()  # the newer server's
            assert server.served == 3
        await server.wait_closed()


async def test_draining_waits_for_a_hand_over_under_way(serving: Serving) -> None:
    """A peer that connected before the drain is served; a silent one is refused in time."""
    async with serving.run(handshake_timeout=1.0) as server:
        with await Connection.open(serving.path):
            await eventually(lambda: len(server._handshakes) == 1, "it is taken up")
            async with vmm(serving) as guest:
                draining = asyncio.ensure_future(server.drain())
                assert await guest.read(0, SIZE) == image(SIZE)
            await asyncio.wait_for(draining, 10)
    assert serving.refusals() == ["no complete hand-over within 1 s"]
    assert server.served == 1


async def test_draining_takes_up_who_waits_to_be_accepted(serving: Serving) -> None:
    """Its hand-over may be on the way already: closing the socket would lose it."""
    async with serving.run(handshake_timeout=1.0) as server:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(os.fspath(serving.path))
            await asyncio.wait_for(server.drain(), 10)
    assert serving.refusals() == ["no complete hand-over within 1 s"]


async def test_closing_settles_living_targets(serving: Serving) -> None:
    """A target whose server closes gets an error for what is missing, and keeps the rest."""
    async with serving.run() as server, vmm(serving) as guest:
        assert await guest.read(0, PAGE) == image(SIZE)[:PAGE]
        await server.aclose()
        assert serving.ended()[0].session.outcome == "closed by policy (poison)"
        assert await guest.read(0, PAGE) == image(SIZE)[:PAGE]
        with pytest.raises(OSError) as failed:
            await guest.ask("read_in_kernel_mode", PAGE)
        assert failed.value.errno == errno.EFAULT


async def test_closing_can_kill(serving: Serving) -> None:
    """By policy, or as asked: the target is ended before its memory could turn to zeros."""
    async with serving.run(service=Service(on_close=Action.KILL)) as server, vmm(serving) as guest:
        await server.aclose()
        assert await guest.status() == -signal.SIGKILL


async def test_a_leaving_block_closes_all(serving: Serving) -> None:
    """The end of ``async with`` closes sessions and handshakes; nothing is left."""
    async with contextlib.AsyncExitStack() as stack:
        async with serving.run():
            guest = await stack.enter_async_context(vmm(serving))
            stack.enter_context(await Connection.open(serving.path))
        with pytest.raises(OSError):
            await guest.ask("read_in_kernel_mode", PAGE)


@pytest.mark.limit(120)
async def test_reused_descriptor_numbers_never_mix_sessions(serving: Serving) -> None:
    """Scenario 28 through the server: sessions end and begin at once, each with its own bytes."""
    images = [image(4 * PAGE, seed=n) for n in range(4)]
    turn = 0

    def next_source() -> BufferSource:
        return BufferSource(images[turn % 4])

    async with serving.run(source=next_source):
        for turn in range(12):
            async with vmm(serving, size=4 * PAGE) as guest:
                assert await guest.read(0, 4 * PAGE) == images[turn % 4]


async def test_a_system_call_that_times_out_is_told(tmp_path: Path) -> None:
    """In its own words, also where hand-overs have no time limit."""
    reports: list[Report] = []

    async def receive(_connection: Connection) -> Handover:
        raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    source = BufferSource(bytes(PAGE))
    path = tmp_path / "s"
    async with Server(path, receive, source, handshake_timeout=None, report=reports.append):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(os.fspath(path))
            await eventually(lambda: reports, "it is refused")
    (refused,) = reports
    assert isinstance(refused, Refused)
    assert refused.reason == f"[Errno {errno.ETIMEDOUT}] Connection timed out"


async def test_who_had_connected_is_heard_by_a_server_that_does_not_listen(tmp_path: Path) -> None:
    """A stored listening socket is closed, in the store and in the file system."""
    heard: list[bytes] = []

    async def receive(connection: Connection) -> Handover:
        data, _ = await connection.receive()
        heard.append(data)
        raise PeerError("that is all")

    with contextlib.closing(Manager(tmp_path / "notify")) as manager:
        path = tmp_path / "s"
        listener = Listener.bind(path)
        device, inode = listener.identity or (0, 0)
        name = f"{LISTENER}{device:x}-{inode:x}"
        manager.store.put(name, [listener.fileno()])
        taken = [(name, OwnedFd(os.dup(listener.fileno())))]
        listener._identity = None  # its server dies, and leaves the name
        listener.close()
        before = len(os.listdir("/proc/self/fd"))
        with (
            socket.socket(socket.AF_UNIX) as peer,
            FdStore(str(tmp_path / "notify"), 10, taken) as store,
        ):
            peer.connect(str(path))
            peer.send(b"I was here")
            refused: list[Report] = []
            server = Server(
                path,
                receive,
                lambda: BufferSource(image(1)),
                listen=False,
                store=store,
                report=refused.append,
            )
            async with server:
                assert server.draining
                assert not path.exists()
                assert name not in manager.listen()
                await eventually(lambda: refused, "it is heard")
            assert heard == [b"I was here"]
        assert len(os.listdir("/proc/self/fd")) == before - 1
