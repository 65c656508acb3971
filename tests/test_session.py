"""One session: what it refuses, how it ends, and that none ever answers for another."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from aiouffd.errors import PeerError
from aiouffd.events import Event, PageFault
from aiouffd.failure import Action
from aiouffd.fds import OwnedFd
from aiouffd.handlers import from_source
from aiouffd.handover import HandedRegion, Handover, Peer, pin_peer
from aiouffd.pager import Pager
from aiouffd.prefetch import Pace
from aiouffd.protocols import firecracker
from aiouffd.recording import Recorder
from aiouffd.service import Service
from aiouffd.session import Session
from aiouffd.session_states import Milestone, State
from aiouffd.sources.buffer import BufferSource
from aiouffd.testing.sources import image
from aiouffd.uffd import Userfaultfd
from aiouffd.unix_socket import Listener
from aiouffd.working_set import Header, WorkingSet
from tests.stand_in_vmm import PAGE, StandInVmm, eventually

if TYPE_CHECKING:
    from typing_extensions import Buffer

SIZE: Final = 16 * PAGE


@contextlib.asynccontextmanager
async def handed_over(
    path: Path, size: int = SIZE
) -> AsyncIterator[tuple[StandInVmm, Handover, Peer]]:
    """Run a VMM and receive what it hands over, without any server."""
    with Listener.bind(path) as listener:
        async with StandInVmm.start(path, size) as vmm:
            connection = listener.accept()
            assert connection is not None
            with pin_peer(connection.socket) as peer:
                with connection:  # its end is no end of the target: only the pidfd tells that
                    handover = await firecracker.receive(connection)
                try:
                    yield vmm, handover, peer
                finally:
                    handover.close()


def own_uffd(pages: int = 4) -> tuple[mmap.mmap, int, Userfaultfd]:
    """Register memory of this process; nobody touches it."""
    memory = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    uffd = Userfaultfd.open(allow_user_mode_only=True)
    uffd.register(start, pages * PAGE)
    return memory, start, uffd


async def test_a_session_serves_without_a_server(tmp_path: Path) -> None:
    """A hand-over and a source are all it takes; figures tell what was done."""
    async with handed_over(tmp_path / "socket") as (vmm, handover, peer):
        session = Session(handover, BufferSource(image(SIZE)), peer=peer)
        async with session:
            assert session.outcome == "serving"
            assert session.name == str(peer)
            assert await vmm.read(0, SIZE) == image(SIZE)
            vmm.kill()
            await asyncio.wait_for(session.wait_closed(), 10)
        assert session.outcome == "target exited"
        assert session.error is None
        first, second = session.figures(), session.figures()
        assert first == second  # the clock has stopped
        assert first.faults == 16
        assert first.copied_bytes == SIZE


async def test_states_follow_one_another(tmp_path: Path) -> None:
    """Handshaking, serving, gone; the first page is told once, when a thread has it."""
    reached: list[tuple[Milestone, State]] = []
    async with handed_over(tmp_path / "socket") as (vmm, handover, peer):
        session = Session(
            handover,
            BufferSource(image(SIZE)),
            peer=peer,
            on_milestone=lambda session, milestone: reached.append((milestone, session.state)),
        )
        states = [session.state]
        async with session:
            states.append(session.state)
            assert session.figures().first_page_s is None
            assert await vmm.read(0, 2 * PAGE) == image(SIZE)[: 2 * PAGE]
            assert reached == [(Milestone.FIRST_PAGE, State.SERVING)]
            vmm.kill()
            await asyncio.wait_for(session.wait_closed(), 10)
        states.append(session.state)
        await session.aclose()
        states.append(session.state)  # what has ended stays so
        gone = State.TARGET_GONE
        assert states == [State.HANDSHAKING, State.SERVING, gone, gone]
        assert session.milestones == [Milestone.FIRST_PAGE]


async def test_the_exit_is_noticed_without_a_peer_too(tmp_path: Path) -> None:
    """Nobody said who the target is: asking the kernel now and then finds out."""
    async with handed_over(tmp_path / "socket") as (vmm, handover, _):
        async with Session(handover, BufferSource(image(SIZE))) as session:
            assert session.name == "an unknown peer"
            assert await vmm.read(0) == image(SIZE)[:1]
            vmm.kill()
            await asyncio.wait_for(session.wait_closed(), 10)
        assert session.outcome == "target exited"


async def test_observers_see_every_fault(tmp_path: Path) -> None:
    """The one seam for figures, traces and tests."""
    seen: list[str] = []

    class Seen:
        def begin(self, fault: PageFault) -> None:
            seen.append(f"begin {fault.offset // PAGE}")

        def end(self, fault: PageFault, outcome: str, elapsed_ns: int) -> None:
            assert elapsed_ns > 0
            seen.append(f"end {fault.offset // PAGE} {outcome}")

        def event(self, event: Event) -> None:
            seen.append(type(event).__name__)

        def failure(self, fault: PageFault, error: Exception) -> None:
            raise AssertionError

    async with handed_over(tmp_path / "socket") as (vmm, handover, peer):
        source = BufferSource(image(SIZE))
        async with Session(handover, source, peer=peer, observers=[Seen()]):
            await vmm.read(3 * PAGE)
            await vmm.ask("remove", 3 * PAGE, PAGE)
            await vmm.read(3 * PAGE)
    assert seen == ["begin 3", "end 3 copy", "Removed", "begin 3", "end 3 zero"]


@pytest.mark.root
@pytest.mark.parametrize("action", [Action.POISON, Action.ZERO, Action.HANG])
async def test_closing_settles_what_is_missing(tmp_path: Path, action: Action) -> None:
    """As asked, else as the service says; what was served stays."""
    async with handed_over(tmp_path / "socket") as (vmm, handover, peer):
        async with Session(handover, BufferSource(image(SIZE)), peer=peer) as session:
            assert await vmm.read(0, PAGE) == image(SIZE)[:PAGE]
            await session.aclose(action)
            await session.aclose()
            assert session.outcome == f"closed by policy ({action.value})"
            assert session.state is State.FAILED
            missing = vmm.tell("read_in_kernel_mode", PAGE)
            if action is Action.HANG:  # the VMM's own copy of the descriptor keeps it waiting
                assert await vmm.read(0, PAGE) == image(SIZE)[:PAGE]
                assert not missing.done()
            elif action is Action.ZERO:
                assert (await missing)["result"] == bytes(PAGE).hex()
            else:
                assert (await missing)["errno"] == 14
        assert all(fd.closed for fd in (handover.fd, *handover.others))


async def test_what_cannot_be_served_is_refused_and_closed() -> None:
    """Regions outside of the source, or none that memory can have; something else than a uffd."""
    memory, start, uffd = own_uffd()
    with memory, uffd:
        for regions, reason in (
            ([HandedRegion(start, 4 * PAGE, PAGE, PAGE)], "ends at offset 0x5000, but the image"),
            ([HandedRegion(start, PAGE, 0, PAGE)] * 2, "overlaps"),
            ([HandedRegion(start + 8, PAGE, 0, PAGE)], "whole pages"),
        ):
            others = (OwnedFd(os.memfd_create("other")),)
            handover = Handover(uffd.dup(), tuple(regions), others)
            with pytest.raises(PeerError, match=reason):
                async with Session(handover, BufferSource(bytes(4 * PAGE))):
                    pass
            assert handover.fd.closed
            assert others[0].closed
        handover = Handover(OwnedFd(os.memfd_create("no uffd")), ())
        session = Session(handover, BufferSource(b""))
        with pytest.raises(PeerError, match="no userfaultfd"):
            await session.start()
        assert handover.fd.closed
        assert session.state is State.FAILED
        del start


async def test_a_close_whose_waiter_is_cancelled_goes_on() -> None:
    """The descriptor is closed when everything is poisoned, not when nobody waits any more."""
    memory, start, uffd = own_uffd(1024)
    with memory, uffd:
        region = HandedRegion(start, 1024 * PAGE, 0, PAGE)
        session = Session(Handover(uffd.dup(), (region,)), BufferSource(bytes(1024 * PAGE)))
        await session.start()
        waiter = asyncio.ensure_future(session.aclose())
        await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.wait([waiter])
        assert waiter.cancelled()
        assert not session.handover.fd.closed
        await session.aclose()
        assert session.handover.fd.closed
        assert session.outcome == "closed by policy (poison)"


@pytest.mark.limit(180)
async def test_reused_descriptor_numbers_never_cross(seed: int) -> None:
    """Scenario 28: 10,000 rounds of closing one session and opening another on its number.

    Each session's memory is its own child's; the bytes that arrive are its own source's.  A
    session answers only faults of the descriptor it was given, whoever had that number before.
    """
    choose = random.Random(seed)
    rounds = 10_000
    numbers: set[int] = set()
    memory, start, uffd = own_uffd(1)
    page = HandedRegion(start, PAGE, 0, PAGE)
    with memory, uffd:
        previous: Session | None = None
        for turn in range(rounds):
            data = turn.to_bytes(8, "little") * (PAGE // 8)
            session = Session(
                Handover(uffd.dup(), (page,)),
                BufferSource(data),
                service=Service(on_close=Action.HANG, warn_after=None),
            )
            if previous is not None:
                closing = previous.aclose()
                if choose.random() < 0.5:
                    await closing
                    await session.start()
                else:
                    await asyncio.gather(closing, session.start())
            else:
                await session.start()
            numbers.add(session.pager.uffd.fileno())
            if turn % 500 == 0:
                # A fault that only the living session may answer.
                await asyncio.to_thread(touch, start, data[:8])
                memory.madvise(mmap.MADV_DONTNEED)
            previous = session
        assert previous is not None
        await previous.aclose()
    assert len(numbers) < 8  # the numbers were reused indeed


_libc: Final = ctypes.CDLL(None)
_libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def touch(address: int, expected: bytes) -> None:
    """Read memory with the GIL released; the loop's thread serves it."""
    data = ctypes.create_string_buffer(len(expected))
    _libc.memcpy(data, address, len(expected))
    assert data.raw == expected


@pytest.mark.parametrize("pages", [8, 256], ids=["at once", "in pieces"])
async def test_a_long_answer_stays_in_its_region(pages: int) -> None:
    """What it covers of a neighbour with other bytes is left to the neighbour's handler."""
    half = pages // 2 * PAGE
    data = image(pages * PAGE)
    memory, start, uffd = own_uffd(pages)
    with memory:
        pager = Pager(uffd, on_close=Action.ZERO)
        chunk = from_source(BufferSource(data), chunk=pages * PAGE)
        async with pager:
            pager.register(start, half, chunk, offset=0, registered=True)
            pager.register(start + half, half, chunk, offset=0, registered=True)
            await asyncio.to_thread(touch, start, data[:8])
            while pager.counters.filled_bytes < half - PAGE:
                await asyncio.sleep(0)
            for page in range(pages // 2):
                expected = data[page * PAGE : page * PAGE + 8]
                await asyncio.to_thread(touch, start + half + page * PAGE, expected)


async def test_sessions_that_end_and_begin_at_once_keep_their_bytes(seed: int) -> None:
    """Scenario 28 with two targets: while one closes with a fault in flight, the other opens."""
    choose = random.Random(seed)
    targets = [own_uffd(64) for _ in range(2)]
    with contextlib.ExitStack() as stack:
        for memory, _, uffd in targets:
            stack.enter_context(memory)
            stack.enter_context(uffd)
        for turn in range(150):
            which = turn % 2
            _, start, uffd = targets[which]
            data = bytes([turn + 1]) * (64 * PAGE)
            session = Session(
                Handover(uffd.dup(), (HandedRegion(start, 64 * PAGE, 0, PAGE),)),
                BufferSource(data),
                service=Service(on_close=Action.HANG, warn_after=None),
            )
            await session.start()
            pages = choose.sample(range(64), 3)
            touches = [
                asyncio.ensure_future(asyncio.to_thread(touch, start + number * PAGE, data[:8]))
                for number in pages
            ]
            await asyncio.gather(*touches)
            await session.aclose()
            targets[which][0].madvise(mmap.MADV_DONTNEED)


async def test_a_session_records_and_replays(tmp_path: Path) -> None:
    """What one target needed is there before another of the same image asks for it."""
    source = BufferSource(image(SIZE))
    recorder = Recorder(str(tmp_path / "set"))
    for service in (Service(recorder=recorder), Service(recorder=recorder, hydrate=Pace.OFF)):
        async with (
            handed_over(tmp_path / "socket") as (vmm, handover, peer),
            Session(handover, source, peer=peer, service=service, id="1") as session,
        ):
            await vmm.read(3 * PAGE)
            await vmm.read(9 * PAGE)
            assert session.prefetch.figures.reads == 0
    pages = WorkingSet.load(tmp_path / "set")
    assert list(pages.runs()) == [(3, 1), (9, 1)]
    async with (
        handed_over(tmp_path / "socket") as (vmm, handover, peer),
        Session(handover, source, peer=peer, service=Service(replay=pages)) as session,
    ):
        await eventually(
            lambda: session.prefetch.figures.replayed_bytes == 2 * PAGE, "it is replayed"
        )
        assert await vmm.read(3 * PAGE, PAGE) == image(SIZE)[3 * PAGE : 4 * PAGE]
        assert await vmm.read(9 * PAGE, PAGE) == image(SIZE)[9 * PAGE : 10 * PAGE]
        assert session.figures().faults == 0
        assert session.state is State.SERVING


async def test_hydration_makes_a_session_resident(tmp_path: Path) -> None:
    """Which is told, and costs the target no fault."""
    service = Service(hydrate=Pace.FULL)
    async with (
        handed_over(tmp_path / "socket") as (vmm, handover, peer),
        Session(handover, BufferSource(image(SIZE)), peer=peer, service=service) as session,
    ):
        await eventually(lambda: session.state is State.RESIDENT, "it is resident")
        assert await vmm.read(0, SIZE) == image(SIZE)
        assert session.figures().faults == 0
        assert session.figures().filled_bytes == SIZE


async def test_a_prefetch_that_fails_costs_nobody_a_page(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A set of another image, a source whose extents cannot be had twice: one line each."""

    class Moody(BufferSource):
        async def read(self, offset: int, length: int) -> bytes:
            raise RuntimeError("moody")

        def read_nowait(self, offset: int, length: int) -> Buffer:
            if length > PAGE:
                raise RuntimeError("moody")
            return super().read_nowait(offset, length)

    other = WorkingSet(Header(identity="another", image_size=SIZE))
    service = Service(replay=other, hydrate=Pace.FULL)
    async with (
        handed_over(tmp_path / "socket") as (vmm, handover, peer),
        Session(handover, Moody(image(SIZE)), peer=peer, service=service) as session,
    ):
        await eventually(lambda: session.prefetch.figures.refused, "hydration has met the mood")
        assert session.state is State.SERVING
        assert await vmm.read(0, SIZE) == image(SIZE)
    assert "the working set is not replayed: made for another generation" in caplog.text
    assert caplog.text.count("left to demand") == 1


async def test_closing_ends_a_prefetch_that_is_under_way(tmp_path: Path) -> None:
    """Its reads are cancelled; what it did not bring is settled by the policy."""

    class Slow(BufferSource):
        reading = 0

        async def read(self, offset: int, length: int) -> Buffer:
            self.reading += 1
            try:
                await asyncio.Event().wait()
            finally:
                self.reading -= 1
            return b""

        def read_nowait(self, offset: int, length: int) -> None:  # type: ignore[override]
            return None

    source = Slow(image(SIZE))
    async with (
        handed_over(tmp_path / "socket") as (vmm, handover, peer),
        Session(
            handover, source, peer=peer, service=Service(hydrate=Pace.FULL, on_close=Action.ZERO)
        ) as session,
    ):
        await eventually(lambda: source.reading, "it reads")
        await asyncio.wait_for(session.aclose(), 10)
        assert source.reading == 0
        assert await vmm.read(0) == bytes(1)
