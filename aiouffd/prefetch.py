"""Prefetch: bring pages before they are asked for, without getting into demand's way.

Knows: one pager's regions, a source, which stretches to bring and how many at once.
Must not know: who recorded a working set, sessions, how a page is installed (Region.fill does).

Laws of this file:

* Demand first.  While a fault is in flight no more is on its way than comes within a moment
  (``flow``), or one read; nothing holds the loop longer than one piece of a fill; one fill at a
  time, however many reads have arrived.
* Removal beats filling: Region.fill asks right before each ioctl.
* What is refused is left out and counted; everything else still arrives.  Only ``fill_all``
  promises that nothing is left out, and raises if it cannot keep that.
* Only extents are read: a hole reads as zeros when it is touched.  *Resident* means that every
  page that has a byte in an extent was brought, or removed by the target.
* Idle and done cost nothing: no timers.
* A forked child has a pager of its own, and is not prefetched unless a Prefetch is made for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import logging
import mmap
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from .errors import ClosedError, SourceError, TargetGone, UffdError, WorkingSetError
from .flow import Flow
from .kernel.buffers import PinnedBuffer
from .pager import Pager
from .performer import PIECE_BYTES
from .prefetch_plan import READ_ACROSS, Place, Plan, Stretch, stretches, together
from .ranges import Range, align_down
from .readiness import between_pieces
from .region import Region
from .sources import Extents, ReadsInto, ReadsIntoNowait, Source, identity_of
from .uffd import Mode
from .working_set import GRANULE, Header, WorkingSet

if TYPE_CHECKING:
    from typing_extensions import Buffer

log: Final = logging.getLogger("aiouffd.prefetch")

READS: Final = 8  #: at once, while no fault is in flight ...
BYTES: Final = 12 << 20  #: ... and in these together, unless one is longer
STEP_BYTES: Final = 64 << 10  #: the shortest step of hydration; each quiet one is so much longer
MOST_BYTES: Final = 4 << 20  #: the longest step of hydration
_QUIET_PIECE_BYTES: Final = 2 << 20  # the longest piece of a fill, after a long quiet
_REPLAY_BYTES: Final = 512 << 10  # the longest read of a replay
_READ_SECONDS: Final = 0.0003  # that a read costs us, however short it is
_AT_HAND_BYTES: Final = 512 << 10  # read at once on the loop: stays in the processor's cache
_QUIET_STEPS: Final = 32  # without a fault, and what is at hand is read in threads all the same
_TURN_BYTES: Final = 256 << 10  # of small parts, between two turns of the loop
_LOOKED_AT_TOGETHER: Final = 1024 * GRANULE  # for what was filled meanwhile
_CALL_BYTES: Final = 16 << 10  # that could be installed in the time that one more call takes
_SLOW_SHARE: Final = 0.2  # of the time that SLOW works
_SLOW_PAUSE: Final = 0.005  # seconds, at least, between its steps


#: Told how many bytes were installed.
_Count: TypeAlias = Callable[[int], None]


class Pace(enum.Enum):
    """How fast a target's memory is brought in the background."""

    OFF = "off"  #: only what is asked for
    SLOW = "slow"  #: one read at a time, a fifth of the time, not while a fault is in flight
    FULL = "full"  #: as fast as demand allows


@dataclass(slots=True)
class PrefetchFigures:
    """What a Prefetch has done so far."""

    replayed_bytes: int = 0  #: installed by replay
    hydrated_bytes: int = 0  #: installed by hydration and fill_all
    already_bytes: int = 0  #: brought in vain: there already, removed, or gone
    refused: int = 0  #: stretches that the kernel or the source refused
    reads: int = 0  #: of the source
    read_bytes: int = 0  #: in these
    demand_in_replay: int = 0  #: faults that came while the replay ran, duplicates included
    replay_seconds: float = 0.0  #: that the replay took
    hydration_seconds: float = 0.0  #: that hydration took

    def as_dict(self) -> dict[str, int | float]:
        """Give all figures by name."""
        return dataclasses.asdict(self)

    def add(self, other: PrefetchFigures) -> None:
        """Count what another one has done as well."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class _Bytes(NamedTuple):
    """What was read, and the buffer that it lies in, if that is ours to use again."""

    view: memoryview
    buffer: mmap.mmap | None


class Prefetch:
    """Brings one pager's memory from a source, by working set, in the background, or all of it.

    ::

        prefetch = Prefetch(pager, source)
        await prefetch.replay(WorkingSet.load("image.set"))
        await prefetch.hydrate(Pace.FULL)

    Attributes:
        figures: What was done so far.
        resident: Everything that the source has was brought, as of the last hydration.

    Sharing: the loop's thread; its methods may run at the same time.
    """

    def __init__(self, pager: Pager, source: Source, *, extents: Extents | None = None) -> None:
        """Prepare; nothing is read yet.

        Args:
            pager: Started; its regions lie in the source.
            source: Stays the caller's.
            extents: The source's extents, when they have been collected before.
        """
        self.figures: Final = PrefetchFigures()
        self.resident = False
        self._pager = pager
        self._source = source
        self._extents = extents
        self._into = source if isinstance(source, ReadsInto) else None
        self._into_nowait = source if isinstance(source, ReadsIntoNowait) else None
        self._brought: dict[Region, WorkingSet] = {}  # by granule of the region
        self._filling = asyncio.Lock()
        self._buffers: list[mmap.mmap] = []  # not in use; each is as long as the longest step
        self._hand: mmap.mmap | None = None  # for what is read on the loop
        self._flow = Flow()  # of what was waited for
        self._at_hand = False  # the source had what it was last asked for so
        self._unbroken = 0  # bytes, or as good as that, since the loop has turned
        self._step = 0  # bytes
        self._quiet = _QUIET_STEPS  # steps since the last fault
        self._faults = 0  # of the pager, by then

    async def run(
        self, pages: WorkingSet | None, pace: Pace, *, any_image: bool = False, name: str = ""
    ) -> None:
        """Replay, then hydrate, as a session does in the background: errors are only logged.

        Args:
            pages: What to replay, if anything.
            pace: See ``hydrate``.
            any_image: See ``replay``.
            name: Whose memory it is, for the log.

        Cancellation: what was installed so far is there.
        """
        if pages is not None:
            try:
                await self.replay(pages, any_image=any_image, along=pace is Pace.FULL)
            except WorkingSetError as error:
                log.warning("%s: the working set is not replayed: %s", name, error)
            except Exception:
                log.exception("%s: replay failed, demand goes on", name)
        try:
            await self.hydrate(pace)
        except Exception:
            log.exception("%s: hydration failed, demand goes on", name)

    # --- what there is to do -----------------------------------------------------------

    async def replay(
        self, pages: WorkingSet, *, any_image: bool = False, along: bool = False
    ) -> None:
        """Bring the pages of a working set, by offset, several reads at once.

        A page of a larger size than recorded is brought whole, once.  Ends quietly when the
        target does.

        Args:
            pages: Recorded on this image.
            any_image: Replay though it is unknown whether it is this image.
            along: Install what lies between neighbours as well, since it is read with them: for
                who wants the rest anyway, as soon as it can be had.

        Raises:
            WorkingSetError: It was made for another image; nothing is brought.

        Cancellation: what was installed so far is there.
        """
        pages.header.check_image(identity_of(self._source), self._source.size, any_image=any_image)
        if pages.skipped:
            log.warning(
                "a working set has %d bad records, left out; the first: %s",
                pages.skipped,
                pages.problem,
            )
        figures, counters = self.figures, self._pager.counters
        began, faults = time.monotonic(), counters.faults

        def plan() -> Plan:
            for region in self._regions():
                inside = pages.runs(region.offset // GRANULE)
                runs = ((first * GRANULE, count * GRANULE) for first, count in inside)
                if along:
                    yield from self._plan(region, together(runs, self._across), self._longest)
                else:
                    yield from self._plan(region, runs, lambda: _REPLAY_BYTES)

        def count(done: int) -> None:
            figures.replayed_bytes += done

        try:
            await self._bring(plan(), count, strict=False)
        except (TargetGone, ClosedError):
            pass
        finally:
            self._let_go_of_buffers()
            figures.replay_seconds += time.monotonic() - began
            figures.demand_in_replay += counters.faults - faults

    async def hydrate(self, pace: Pace) -> None:
        """Bring everything that the source has, in the background.

        Steps grow by 64 KiB as long as it is quiet, up to 4 MiB.  After each fault they begin
        anew, with what the source gives in a moment.  Ends quietly when the target does.

        Args:
            pace: How fast; OFF does nothing.

        Cancellation: what was installed so far is there.
        """
        if pace is not Pace.OFF:
            with contextlib.suppress(TargetGone, ClosedError):
                await self._hydrate(pace, strict=False)

    async def fill_all(self) -> None:
        """Bring everything that the source has, at full speed, and see that nothing is left out.

        When it returns every page with a byte in an extent is there, or was removed or
        unmapped by the target; also those that moved meanwhile.  Regions that are served for
        write protection or minor faults only are none of its business.

        Raises:
            SourceError: Bytes could not be had.
            ResolutionRefused: The kernel refused (LayoutChanging: for the pager's deadline).
            TargetGone: The target is gone.
            ClosedError: The pager or the source was closed.

        Cancellation: what was installed so far is there.
        """
        await self._hydrate(Pace.FULL, strict=True)

    async def _hydrate(self, pace: Pace, *, strict: bool) -> None:
        figures = self.figures
        began, refused = time.monotonic(), figures.refused
        done: set[Region] = set()

        def plan(regions: list[Region]) -> Plan:
            for region in regions:
                yield from self._plan(region, self._missing(region), lambda: self._step)

        def count(done: int) -> None:
            figures.hydrated_bytes += done

        try:
            while todo := [region for region in self._regions() if region not in done]:
                done.update(todo)  # and those that are registered meanwhile
                if pace is Pace.SLOW:
                    await self._bring_slowly(plan(todo), count)
                else:
                    await self._bring(plan(todo), count, strict=strict)
            self.resident = figures.refused == refused
        finally:
            self._let_go_of_buffers()
            figures.hydration_seconds += time.monotonic() - began

    # --- planning ----------------------------------------------------------------------

    def _regions(self) -> list[Region]:
        """List the regions with missing pages, in the order of their bytes."""
        regions = [one for one in self._pager.regions if one.modes & Mode.MISSING]
        return sorted(regions, key=lambda one: one.offset)

    def _data(self) -> Extents:
        if self._extents is None:
            self._extents = Extents(self._source.extents())
        return self._extents

    def _done(self, region: Region) -> WorkingSet:
        """Give the granules of a region that were brought."""
        if region not in self._brought:
            self._brought[region] = WorkingSet(Header(identity="", image_size=region.length))
        return self._brought[region]

    def _missing(self, region: Region) -> Iterator[tuple[int, int]]:
        """Give the (offset, length) of what was not brought yet, in order.

        What demand has filled by the time that it is asked for is left out, too.
        """
        brought, filled = self._done(region), region.filled_for_good
        for first, count in brought.gaps():
            start, length = region.offset + first * GRANULE, count * GRANULE
            if filled is None:
                yield start, length
                continue
            for piece in Range(start, length).pieces(_LOOKED_AT_TOGETHER):
                for gap in filled.gaps(piece):
                    yield gap.start, gap.length

    def _plan(
        self, region: Region, runs: Iterable[tuple[int, int]], limit: Callable[[], int]
    ) -> Plan:
        memory = Place(region.offset, region.length, region.page_size)
        return stretches(region, memory, runs, self._data(), self._source.size, limit)

    def _across(self) -> int:
        """Say which gap is read sooner than one more read is made, in bytes."""
        return max(READ_ACROSS, int(self._flow.rate * _READ_SECONDS))

    def _longest(self) -> int:
        """Say how long a read of a replay may be whose bytes are all wanted."""
        return max(self._step, _REPLAY_BYTES)

    def _set_step(self) -> None:
        """Make the next step longer, or short again after a fault."""
        faults = self._pager.counters.faults
        if faults == self._faults:
            self._quiet += 1
            length = self._step + STEP_BYTES
        else:
            self._faults, self._quiet = faults, 0
            # What has always been at hand so far costs demand no time.
            known = self._flow.window or not self._at_hand
            length = max(align_down(self._flow.step, STEP_BYTES), STEP_BYTES)
            length = length if known else MOST_BYTES
        self._step = min(length, MOST_BYTES)

    def _piece(self, page_size: int) -> int:
        """Say how much may be installed by one ioctl, which grows while it is quiet.

        Long ones are fewer, and what lies between two runs slowly: they empty the caches.
        """
        piece = PIECE_BYTES
        if self._pager.counters.faults == self._faults:
            piece = max(
                PIECE_BYTES, min(self._step // 2, self._quiet * STEP_BYTES, _QUIET_PIECE_BYTES)
            )
        return max(align_down(piece, page_size), page_size)

    # --- bringing ----------------------------------------------------------------------

    async def _bring(self, plan: Plan, count: _Count, *, strict: bool) -> None:
        """Read several stretches at once, few while a fault is in flight, and install them.

        The next read is under way while the last is installed.
        """
        reading: dict[asyncio.Task[_Bytes | None], Stretch] = {}
        ready: deque[tuple[Stretch, _Bytes]] = deque()
        stretch: Stretch | None = None
        planned = False
        held = 0  # bytes, in both
        try:
            while True:
                for task in [task for task in reading if task.done()]:
                    read, data = reading.pop(task), task.result()
                    if data is None:
                        held -= read.length
                    else:
                        ready.append((read, data))
                if stretch is None and not planned:
                    self._set_step()
                    stretch = await self._next_to_read(plan, count, strict=strict)
                    planned = stretch is None
                    continue
                if stretch is not None and self._may_read(stretch, reading, held):
                    coro = self._read_stretch(stretch, strict=strict)
                    reading[asyncio.create_task(coro, name="aiouffd prefetch")] = stretch
                    held += stretch.length
                    stretch = None
                    await between_pieces()  # planning the next one takes as long as a piece may
                elif ready:
                    read, data = ready.popleft()
                    await self._install_parts(read, data, count, strict=strict)
                    held -= read.length
                elif reading:
                    await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
                else:
                    return
        finally:
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)

    def _may_read(
        self, stretch: Stretch, reading: Mapping[asyncio.Task[Any], Stretch], held: int
    ) -> bool:
        """Say whether one more read may begin: one may always, if there is room for its bytes."""
        if held and held + stretch.length > BYTES:
            return False
        if not reading or not self._pager.in_flight:
            return len(reading) < READS
        on_way = sum(each.length for each in reading.values())
        return len(reading) < READS and on_way < self._flow.window

    async def _next_to_read(self, plan: Plan, count: _Count, *, strict: bool) -> Stretch | None:
        """Take the next stretch that has to be read; bring what comes before and is at hand.

        Returns:
            None if there is no more.
        """
        for stretch in plan:
            if stretch is None:
                await between_pieces()
                continue
            rest: Stretch | None = stretch
            if self._is_worth_a_look(stretch):
                rest = await self._bring_at_hand(stretch, count, strict=strict)
            if rest is not None:
                if self._is_wanted(rest.region, rest.offset, rest.length):
                    return rest
                await self._breathe(0)
            self._set_step()
        return None

    def _is_worth_a_look(self, stretch: Stretch) -> bool:
        """Say whether a stretch is first looked for at hand, without a thread.

        A thread that copies takes its processor time from who waits for the pages; when nobody
        does, long reads in threads and long fills beside them are quicker.
        """
        longest = max(size for _, size in stretch.parts)
        if longest <= max(_AT_HAND_BYTES, stretch.region.page_size):
            return True
        return self._at_hand and self._quiet < _QUIET_STEPS

    async def _bring_slowly(self, plan: Plan, count: _Count) -> None:
        """Bring one stretch after the other, with pauses, and only while no fault is in flight."""
        for stretch in plan:
            if stretch is None:
                await between_pieces()
                continue
            while self._pager.in_flight:  # noqa: ASYNC110 - an event would cost every fault
                await asyncio.sleep(_SLOW_PAUSE)
            began = time.monotonic()
            rest = await self._bring_at_hand(stretch, count, strict=False)
            if rest is not None and self._is_wanted(rest.region, rest.offset, rest.length):
                data = await self._read_stretch(rest, strict=False)
                if data is not None:
                    await self._install_parts(rest, data, count, strict=False)
            took = time.monotonic() - began
            await asyncio.sleep(max(took * (1 / _SLOW_SHARE - 1), _SLOW_PAUSE))
            self._set_step()

    async def _bring_at_hand(
        self, stretch: Stretch, count: _Count, *, strict: bool
    ) -> Stretch | None:
        """Bring what the source gives without waiting, piece by piece.

        Returns:
            What it does not have at hand; None if nothing is left.
        """
        region, end = stretch.region, stretch.offset + stretch.length
        piece = max(_AT_HAND_BYTES, region.page_size)
        for number, (start, length) in enumerate(stretch.parts):
            for where in Range(start, length).pieces(piece):
                if not self._is_wanted(region, where.start, where.length):
                    await self._breathe(0)
                    continue
                for run in self._not_filled(region, where):
                    async with self._filling:
                        try:
                            data = self._read_at_hand(run.start, run.length)
                        except Exception as error:
                            self._refuse(error, strict=strict)
                            continue
                        if data is None:
                            left = [(run.start, start + length - run.start)]
                            left += stretch.parts[number + 1 :]
                            return Stretch(region, run.start, end - run.start, left)
                        with PinnedBuffer(data) as pinned:
                            await self._install(
                                region, run.start, run.length, pinned.address, count, strict=strict
                            )
                    await self._breathe(run.length)
        return None

    def _not_filled(self, region: Region, where: Range) -> Iterable[Range]:
        """Leave out what demand has filled since it was planned to read a piece."""
        filled = region.filled_for_good
        if filled is None or filled.has_none(where.start, where.length):
            return (where,)
        return filled.gaps(where)

    async def _breathe(self, done: int) -> None:
        """Serve the faults that have come if so much was done since the last time."""
        self._unbroken += done + _CALL_BYTES
        if self._unbroken >= _TURN_BYTES:
            self._unbroken = 0
            await between_pieces()

    def _is_wanted(self, region: Region, offset: int, length: int) -> bool:
        """Say whether a stretch is mapped somewhere, and not all of it removed or filled.

        What was filled demand has brought, or the process before us.  By now it may have been
        removed.

        Raises:
            ClosedError: The pager was closed.
        """
        filled = region.filled_for_good
        if filled is not None:
            self._pager.uffd.fileno()  # raises if it was closed: the journal is then closed as well
            if filled.covers(offset, length):
                return False
        space = self._pager.space
        hint = region.start - region.offset
        places = space.addresses(region, offset, length, hint)
        if not space.removed:
            return bool(places)
        return any(True for place in places for _ in space.removed.gaps(place))

    def _read_at_hand(self, offset: int, length: int) -> Buffer | None:
        """Read what the source has at hand; it stays as it is until the next one is read."""
        inside = min(length, self._source.size - offset)
        data: Buffer | None
        if self._into_nowait is None:
            data = self._source.read_nowait(offset, inside)
            if data is not None:
                _check_length(data, offset, inside)
                data = data if inside == length else _padded(data, length)
        else:
            if self._hand is None or len(self._hand) < length:
                self._hand = mmap.mmap(-1, max(length, _AT_HAND_BYTES))
            view = memoryview(self._hand)[:length]
            view[inside:] = bytes(length - inside)
            data = view if self._into_nowait.readinto_nowait(offset, view[:inside]) else None
        self._at_hand = data is not None
        if data is not None:
            self.figures.reads += 1
            self.figures.read_bytes += inside
        return data

    async def _read_stretch(self, stretch: Stretch, *, strict: bool) -> _Bytes | None:
        """Read a stretch, however long that takes.

        Returns:
            None if it is left out.
        """
        buffer: mmap.mmap | None = None
        if stretch.length > _AT_HAND_BYTES and self._into is not None:
            buffer = self._take_buffer(stretch.length)
        began = time.monotonic()
        try:
            # A buffer whose read was cancelled or failed may still be written to: it is let go.
            view = await self._read(stretch.offset, stretch.length, buffer)
        except Exception as error:
            self._refuse(error, strict=strict)
            return None
        self._flow.note(stretch.length, began, time.monotonic())
        return _Bytes(view, buffer)

    async def _install_parts(
        self, stretch: Stretch, data: _Bytes, count: _Count, *, strict: bool
    ) -> None:
        """Install the parts of a stretch that has been read."""
        region = stretch.region
        with PinnedBuffer(data.view) as pinned:
            address = pinned.address - stretch.offset
            for offset, size in stretch.parts:
                at, end = offset, offset + size
                while at < end:
                    async with self._filling:
                        length = min(self._piece(region.page_size), end - at)
                        await self._install(region, at, length, address + at, count, strict=strict)
                    await self._breathe(length)
                    at += length
        if data.buffer is not None:
            self._buffers.append(data.buffer)

    async def _read(self, offset: int, length: int, buffer: mmap.mmap | None) -> memoryview:
        """Read so many bytes; behind the source's end are zeros."""
        inside = min(length, self._source.size - offset)
        self.figures.reads += 1
        self.figures.read_bytes += inside
        if buffer is None or self._into is None:
            data = await self._source.read(offset, inside)
            _check_length(data, offset, inside)
            return memoryview(data if inside == length else _padded(data, length)).cast("B")
        view = memoryview(buffer)[:length]
        await self._into.readinto(offset, view[:inside])
        view[inside:] = bytes(length - inside)
        return view

    def _let_go_of_buffers(self) -> None:
        """Keep none that are not in use; who brings something at the same time makes new ones."""
        self._buffers.clear()
        self._hand = None

    def _take_buffer(self, length: int) -> mmap.mmap:
        if self._buffers and len(self._buffers[-1]) >= length:
            return self._buffers.pop()
        return mmap.mmap(-1, max(length, MOST_BYTES))

    async def _install(
        self,
        region: Region,
        offset: int,
        length: int,
        address: int,
        count: _Count,
        *,
        strict: bool,
    ) -> None:
        """Install bytes that have been read, and note that they were."""
        try:
            installed = await region.fill_piece(offset, length, address)
        except (UffdError, ValueError) as error:
            self._refuse(error, strict=strict)
            return
        count(installed)
        self.figures.already_bytes += length - installed
        self._done(region).add((offset - region.offset) // GRANULE, length // GRANULE)

    def _refuse(self, error: Exception, *, strict: bool) -> None:
        """Leave a stretch out, unless nothing may be left out, or nothing can follow."""
        if isinstance(error, TargetGone | ClosedError):
            raise error
        if strict:
            if isinstance(error, UffdError):
                raise error
            raise SourceError(f"a source failed while everything was brought: {error}") from error
        self.figures.refused += 1
        if self.figures.refused == 1:
            log.warning("a stretch is left to demand, and others may be: %s", error)
        else:
            log.debug("a stretch is left to demand: %s", error)


def _padded(data: Buffer, length: int) -> bytes:
    view = memoryview(data).cast("B")
    return bytes(view) + bytes(length - len(view))


def _check_length(data: Buffer, offset: int, wanted: int) -> None:
    got = memoryview(data).nbytes
    if got != wanted:
        raise SourceError(f"a source gave {got} of {wanted} bytes at offset {offset}")
