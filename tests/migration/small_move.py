"""Small migrations, thousands of them: every byte compared, at the end of each.

    with Place() as place:
        async with Field(place) as field:
            move = field.move(seed)
            await move.run()
            move.compare()

Knows: both sides of a migration, a program that is simulated at the source and is a real process
    with real page faults at the destination, and what its memory has to be in the end.
Must not know: what is done to the connections between them (``unreliable``).

Laws of this file:

* A page never has the same bytes twice, so an old one cannot be taken for a new one.
* What the program's threads read at the destination is checked as they read it; all of its memory
  is compared at the end.
* The program writes and removes pages after the switch: bytes that come late must not undo it.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import random
import struct
import zlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Self, cast

from aiouffd.dirty import DirtyRound, DirtyRun, DirtyTracker, merged
from aiouffd.errors import MigrationFailed
from aiouffd.failure import Action, FailurePolicy
from aiouffd.fds import OwnedFd
from aiouffd.migration.incoming import Incoming
from aiouffd.migration.listener import Listener
from aiouffd.migration.memory import Landing, SourceMemory
from aiouffd.migration.outgoing import Outgoing, Plan
from aiouffd.migration.wire import Extent
from aiouffd.pager import Pager
from aiouffd.uffd import Feature, Userfaultfd
from tests.migration.unreliable import Unreliable
from tests.targets import DEADLINE, PAGE, Call, Signal, Target

#: Pages of each region: some have many frames, some bring long ones.
LAYOUT: Final = (24, 3, 8, 1, 8)
_MADV_REMOVE: Final = 9
_FEATURES: Final = (
    Feature.THREAD_ID
    | Feature.MISSING_SHMEM
    | Feature.EVENT_REMOVE
    | Feature.EVENT_UNMAP
    | Feature.EVENT_REMAP
)
_WORD: Final = struct.Struct("<Q")


class Place:
    """Where programs arrive: one process, and memory that is mapped there anew for each.

    Attributes:
        target: The process.
        extents: The regions.
    """

    def __init__(self, layout: Sequence[int] = LAYOUT) -> None:
        """Start the process."""
        self.target = Target("shmem", 1, register=0, open_uffd=False)
        self.extents = [
            Extent(f"region {number}", pages * PAGE, PAGE) for number, pages in enumerate(layout)
        ]
        self._memfds = [
            self.target.make_memfd(extent.name.replace(" ", "-"), 0, extent.length)
            for extent in self.extents
        ]
        self.landings = [
            Landing(fd, extent.length)
            for (_, fd), extent in zip(self._memfds, self.extents, strict=True)
        ]
        self.starts: list[int] = []

    def begin(self) -> Userfaultfd:
        """Map the memory, all of it missing; give a userfaultfd of the process."""
        self.end()
        for landing in self.landings:
            landing.discard(0, len(landing.view))
        for (there, _), extent in zip(self._memfds, self.extents, strict=True):
            self.starts.append(self.target.map(extent.length, there))
        _, fd = self.target.open_uffd(int(_FEATURES), os.O_CLOEXEC | os.O_NONBLOCK)
        return Userfaultfd.adopt(fd)

    def end(self) -> None:
        """Unmap it."""
        for start, extent in zip(self.starts, self.extents, strict=False):
            self.target.call("munmap", start, extent.length).result()
        self.starts.clear()

    def contents(self) -> list[bytes]:
        """Give the memory of each region; nothing is missing any more."""
        return [bytes(each.view) for each in self.landings]

    def close(self) -> None:
        """End the process."""
        for landing in self.landings:
            landing.close()
        for _, fd in self._memfds:
            os.close(fd)
        self.target.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Written:
    """A tracker that knows what was written because it is told; byte-exact, and fast."""

    def __init__(self) -> None:
        self.pages: set[tuple[int, int]] = set()
        self._number = 0

    def begin(self) -> None:
        """Forget what was written before."""
        self.pages.clear()

    async def collect(self) -> DirtyRound:
        """Give what was written since the last look."""
        await asyncio.sleep(0)
        return self.collect_now()

    def collect_now(self) -> DirtyRound:
        """Give it at once."""
        self._number += 1
        found, self.pages = self.pages, set()
        runs = merged([DirtyRun(region, page * PAGE, PAGE) for region, page in sorted(found)])
        return DirtyRound(self._number, runs, 0.001)


class Source:
    """A program that runs at the source: simulated, but for its memory.

    Attributes:
        memory: What moves.
        tracker: Knows what it writes.
        told: What it was told, in order.
        left: Its memory as of the switch.
        runs: Whether it does.
    """

    def __init__(self, extents: Sequence[Extent], chance: random.Random) -> None:
        self.extents = list(extents)
        self.tracker = Written()
        self.told: list[str] = []
        self.left: list[bytes] = []
        self.runs = True
        self.state = chance.randbytes(chance.choice((0, 1, 100, 5000, 2_500_000)))
        self._chance = chance
        self._version = 0
        self._maps: list[mmap.mmap] = []
        self.memory: list[SourceMemory] = []
        for extent in extents:
            with OwnedFd(self._memfd(extent)) as fd:
                self._maps.append(mmap.mmap(fd.fileno(), extent.length))
                self.memory.append(SourceMemory(fd.fileno(), extent))
        for region, extent in enumerate(extents):
            for page in range(extent.length // PAGE):
                if chance.random() < 0.8:
                    self.write(region, page)

    def _memfd(self, extent: Extent) -> int:
        """Make the memory of a region."""
        fd = os.memfd_create(extent.name, os.MFD_CLOEXEC)
        os.ftruncate(fd, extent.length)
        return fd

    def write(self, region: int, page: int) -> None:
        """Write a page that never was before; zeros, now and then."""
        assert self.runs, "it writes where it should stand still"
        self._version += 1
        zeros = self._chance.random() < 0.15
        self._put(region, page, 0 if zeros else self._version << 16 | region << 8 | page)

    def _put(self, region: int, page: int, value: int) -> None:
        """Fill a page with a word."""
        data = _WORD.pack(value) * (PAGE // _WORD.size)
        self._maps[region][page * PAGE : (page + 1) * PAGE] = data
        self.tracker.pages.add((region, page))

    def write_some(self) -> None:
        """Write a page or two."""
        for _ in range(self._chance.choice((0, 0, 1, 2))):
            region = self._chance.randrange(len(self.extents))
            self.write(region, self._chance.randrange(self.extents[region].length // PAGE))

    async def stop(self) -> bytes:
        """Stand still."""
        await asyncio.sleep(0)
        self.told.append("stop")
        self.write_some()  # to the last moment
        self.runs = False
        self.left = self.contents()
        await asyncio.sleep(0)
        return self.state

    async def restart(self) -> None:
        """Run on."""
        self.told.append("restart")
        self.runs = True
        await asyncio.sleep(0)

    async def leave(self) -> None:
        """Never run again."""
        await asyncio.sleep(0)
        self.told.append("leave")

    def contents(self) -> list[bytes]:
        """Give the memory as it is."""
        return [bytes(each) for each in self._maps]

    def close(self) -> None:
        """Let go of it."""
        for memory in self.memory:
            memory.close()
        for each in self._maps:
            each.close()


class TrackedSource(Source):
    """A program that is a real process: what it writes is found by a DirtyTracker.

    Attributes:
        dirty: The tracker.
    """

    def __init__(self, target: Target, extents: Sequence[Extent], chance: random.Random) -> None:
        """Map the memory in a process, which may be used again after ``close``."""
        self._target = target
        self._starts: list[int] = []
        self._writes: list[Call[Any]] = []
        features = Feature.WP_ASYNC | Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM
        _, fd = target.open_uffd(int(features), os.O_CLOEXEC | os.O_NONBLOCK)
        self._uffd = Userfaultfd.adopt(fd)
        self.dirty = DirtyTracker(self._uffd, pid=target.pid, pidfd=target.pidfd)
        super().__init__(extents, chance)

    def _memfd(self, extent: Extent) -> int:
        there, fd = self._target.make_memfd("source", 0, extent.length)
        self._starts.append(self._target.map(extent.length, there))
        self.dirty.add(self._starts[-1], extent.length, file=fd)
        self._target.call("close", there).result()
        return fd

    def _put(self, region: int, page: int, value: int) -> None:
        address = self._starts[region] + page * PAGE
        if value:
            call = self._target.start_number(address, 8, 512, value << 16)
        else:
            call = self._target.start_fill(address, PAGE, 0)
        self._writes.append(call)  # beside whatever goes on here
        if len(self._writes) > 8:  # its socket does not take any number of orders
            self._writes.pop(0).result()

    async def stop(self) -> bytes:
        """Stand still, having written what was begun."""
        self.write_some()
        self.runs = False
        for call in self._writes:
            call.result()
        return await super().stop()

    def write_some(self) -> None:
        """Write a page or two, if it still runs."""
        if self.runs:
            super().write_some()

    def close(self) -> None:
        """Let go of it, and unmap it there."""
        super().close()
        for call in self._writes:
            call.result()
        self.dirty.close()
        self._uffd.close()
        for start, extent in zip(self._starts, self.extents, strict=True):
            self._target.call("munmap", start, extent.length).result()


class Field:
    """Two hosts and a bad network between them, for one migration after the other.

    Attributes:
        place: Where programs arrive.
        listener: Of the destination.
        proxy: What stands between.
    """

    def __init__(self, place: Place, *, deadline: float = DEADLINE, silence: float = 5.0) -> None:
        self.place = place
        self.deadline = deadline
        self.silence = silence
        self.listener = Listener(deadline=deadline, silence=silence)

    async def __aenter__(self) -> Self:
        await self.listener.start()
        self.proxy = Unreliable("127.0.0.1", self.listener.port)
        await self.proxy.listen()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.proxy.__aexit__(None, None, None)
        await self.listener.aclose()
        self.place.target._unwatch()  # the next field has another loop

    def move(self, seed: int, *, process: Target | None = None, **plan: Any) -> Move:
        """Prepare a migration.

        Args:
            seed: Of all that is random in it.
            process: Is the program at the source; by default it is simulated.
            plan: Its numbers.
        """
        return Move(self, seed, plan, process)


def a_plan(chance: random.Random) -> dict[str, Any]:
    """Give the numbers of some migration."""
    return {
        "rounds": chance.choice((0, 1, 2, 3)),
        "downtime": chance.choice((0.0, 0.0, 100.0)),
        "checksums": chance.random() < 0.5,
        "compress": chance.choice(("", "", "", "zstd")) if _has_zstd() else "",
    }


def _has_zstd() -> bool:
    from aiouffd.migration import packing

    return "zstd" in packing.available()


async def _nothing() -> None:
    """Do nothing."""


class Move:
    """One migration.

    Attributes:
        source: The program.
        outgoing: The source's side.
        incoming: The destination's, once it is there.
        wrong: What its threads read that they should not have.
        signals: How its threads ended, of those that did not end by themselves.
        behind: Bytes that followed after the switch.
        switched: It may run at the destination.
        may_start: And does, as soon as this is set, which it is.
        worked: Its threads have ended there.
        arrived: All of it is there.
        end_was_lost: The source's last word has not reached the destination.
    """

    def __init__(
        self, field: Field, seed: int, plan: dict[str, Any], process: Target | None
    ) -> None:
        self.seed = seed
        self.field = field
        self.chance = chance = random.Random(seed)
        self.source = (
            Source(field.place.extents, chance)
            if process is None
            else TrackedSource(process, field.place.extents, chance)
        )
        source = self.source
        tracker: object = source.dirty if isinstance(source, TrackedSource) else source.tracker
        self.incoming: Incoming | None = None
        self.wrong: list[str] = []
        numbers: dict[str, Any] = {"deadline": field.deadline, "silence": field.silence}
        numbers |= plan
        self.outgoing = Outgoing(
            self.source.memory,
            "127.0.0.1",
            field.proxy.port,
            tracker=cast("DirtyTracker", tracker),
            plan=Plan(**numbers),
        )
        self.failure = FailurePolicy(retries=0)
        #: What the destination's program writes and removes: (region, page): the page's bytes.
        self.after: dict[tuple[int, int], bytes] = {}
        self.rounds_of_work = 2
        self.says_first = chance.random() < 0.5  # that it runs, before it does anything
        self.behind = -1
        self.switched = asyncio.Event()
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.worked = asyncio.Event()
        self.signals: list[Signal] = []
        #: Called when its threads have ended, and its faults are still served.
        self.afterwards: Callable[[], Awaitable[None]] = _nothing
        self.arrived = asyncio.Event()
        self.end_was_lost = False

    # --- both sides ----------------------------------------------------------------------

    async def run(self) -> None:
        """Move, to the end or to a failure of either side."""
        arriving = asyncio.create_task(self.arrive())
        try:
            await self.leave()
        except BaseException:
            arriving.cancel()
            with contextlib.suppress(asyncio.CancelledError, MigrationFailed):
                await arriving
            raise
        # If the source's last word was lost the destination waits for it, up to its deadline.
        over = asyncio.create_task(self.arrived.wait())
        await asyncio.wait((over, arriving), return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        await asyncio.wait((arriving,), timeout=0.005 if self.arrived.is_set() else None)
        self.end_was_lost = arriving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await arriving

    async def leave(self) -> None:
        """Be the source."""
        writing = asyncio.create_task(self._write())
        try:
            await self.outgoing.run(self.source)
        finally:
            writing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writing

    async def _write(self) -> None:
        while self.source.runs:
            self.source.write_some()
            await asyncio.sleep(self.chance.choice((0, 0, 0.0005)))

    async def arrive(self) -> None:
        """Be the destination."""
        self.incoming = incoming = await self.field.listener.accept()
        place = self.field.place
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(incoming.aclose)
            pager = await self.attach(stack, incoming)
            await incoming.prepare(place.landings)
            state = await incoming.switched()
            assert state == self.source.state, "another state than the source's"
            self.behind = incoming.left_bytes
            self.switched.set()
            await self.may_start.wait()
            if self.says_first:
                incoming.note_running()
            working = asyncio.create_task(self._work())
            working.add_done_callback(lambda _: self.worked.set())
            try:
                for _ in range(self.chance.choice((0, 0, 5))):
                    await asyncio.sleep(0)
                if not self.says_first:
                    incoming.note_running()
                await incoming.wait_done()
            except asyncio.CancelledError:
                await pager.aclose(Action.POISON)  # whoever waits gets on
                raise
            finally:
                await self._end(working, pager)
            working.result()
            await pager.aclose(Action.ZERO)
            self.arrived.set()

    async def _end(self, working: asyncio.Task[None], pager: Pager) -> None:
        """Wait until the program's threads have ended."""
        try:
            await asyncio.wait((working,))
            await self.afterwards()
        except asyncio.CancelledError:
            await pager.aclose(Action.POISON)
            await asyncio.wait((working,))
            raise

    async def attach(self, stack: contextlib.AsyncExitStack, incoming: Incoming) -> Pager:
        """Serve the memory of the program that arrives."""
        place = self.field.place
        pager = Pager(
            place.begin(),
            failure=self.failure,
            deadline=None,
            target=place.target.pidfd,
            observers=(incoming.stalls,),
        )
        await stack.enter_async_context(pager)
        for number, (start, extent) in enumerate(zip(place.starts, place.extents, strict=True)):
            region = pager.register(start, extent.length, incoming.handler(number))
            incoming.attach(number, region)
        return pager

    # --- what the program does at the destination ------------------------------------------

    async def _work(self) -> None:
        """Read in two threads, write and remove in a third."""
        pages = [
            (region, page)
            for region, extent in enumerate(self.field.place.extents)
            for page in range(extent.length // PAGE)
        ]
        own = set(self.chance.sample(pages, 6))
        others = [each for each in pages if each not in own]
        await asyncio.gather(
            self._read(0, self.chance.sample(others, 4)),
            self._read(1, self.chance.sample(others, 4)),
            self._change(2, sorted(own)),
        )

    def address(self, region: int, page: int) -> int:
        """Say where a page is in the program."""
        return self.field.place.starts[region] + page * PAGE

    async def _read(self, thread: int, pages: list[tuple[int, int]]) -> None:
        target = self.field.place.target
        for region, page in pages:
            got = await target.start_crc32(self.address(region, page), PAGE, thread)
            wanted = self.source.left[region][page * PAGE : (page + 1) * PAGE]
            if got != zlib.crc32(wanted):
                self.wrong.append(
                    f"page {page} of region {region} was read as {got}; it left as"
                    f" {wanted[:16].hex()}..., {zlib.crc32(wanted)}"
                )
                if isinstance(got, Signal):
                    self.signals.append(got)
                    return

    async def _change(self, thread: int, pages: list[tuple[int, int]]) -> None:
        """Write words into pages, and remove some."""
        target = self.field.place.target
        for turn in range(self.rounds_of_work):
            for region, page in self.chance.sample(pages, len(pages)):
                was = self.after.get((region, page))
                if was is None:
                    was = self.source.left[region][page * PAGE : (page + 1) * PAGE]
                call: Call[Any]
                if self.chance.random() < 0.3:
                    value = 0
                    call = target.call(
                        "madvise", self.address(region, page), PAGE, _MADV_REMOVE, thread=thread
                    )
                    self.after[region, page] = bytes(PAGE)
                else:
                    value = 1 << 62 | turn << 32 | region << 16 | page
                    at = self.chance.randrange(512)
                    call = target.start_poke64(self.address(region, page) + 8 * at, value, thread)
                    changed = was[: 8 * at] + _WORD.pack(value) + was[8 * at + 8 :]
                    self.after[region, page] = changed
                answer = await call
                if answer != value:
                    self.wrong.append(f"page {page} of region {region}: {answer}")
                    if isinstance(answer, Signal):
                        self.signals.append(answer)
                    return

    # --- the end -------------------------------------------------------------------------

    def compare(self) -> None:
        """See that all of the memory is as it has to be."""
        assert not self.wrong, "\n".join(self.wrong)
        assert self.arrived.is_set(), "it has not arrived"
        for region, (got, wanted) in enumerate(
            zip(self.field.place.contents(), self.source.left, strict=True)
        ):
            for page in range(len(wanted) // PAGE):
                where = slice(page * PAGE, (page + 1) * PAGE)
                right = self.after.get((region, page), wanted[where])
                assert got[where] == right, (
                    f"page {page} of region {region} is {got[where][:16].hex()}...;"
                    f" it should be {right[:16].hex()}..."
                )

    def close(self) -> None:
        """Let go of the source's memory."""
        self.source.close()
