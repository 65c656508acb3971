"""Incoming: a program's memory received, while it runs elsewhere, and while it runs here.

Knows: the stages at the destination, which pages are still to come, who waits for which.
Must not know: how connections are accepted, how the program is started, how faults are read.

Laws of this file:

* Before the switch bytes are laid down by a mapping that nobody faults on; from then on the pager
  alone installs them.  What was removed by the program meanwhile stays removed.
* A page that is to come is missing when the program begins, whatever was laid down for it before:
  what the source wrote since must not be read here as it was.
* What has landed is said only once it is where it belongs.  Frames of a line that was given up are
  never taken: they may be older than what a later one brings.
* A thread that waits goes on waiting while there is no line; after ``deadline`` seconds without
  one its fault, and every later one, fails by the pager's policy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..errors import MigrationFailed, PeerError, SourceError, UffdError
from ..events import PageFault
from ..kernel.buffers import PinnedBuffer
from ..ranges import PageSet, Range
from ..readiness import between_pieces
from ..region import Region
from ..resolutions import Answer, Handler, Zero
from . import packing, wire
from .channel import NOT_STARTED, Channel, EndedMigration, is_final
from .figures import Stalls, told_by_source
from .memory import Landing
from .stages import Stage
from .wire import Extent, Frame, Head, Kind, Role

if TYPE_CHECKING:
    from typing_extensions import Buffer

log: Final = logging.getLogger("aiouffd.migration")

PRECOPY: Final = "precopy"  #: the feature: memory may be sent before the switch
FAULT: Final = 255  #: the priority of a demand for which a thread waits

#: Frames of which the source wants to know that they have landed.
_NUMBERED: Final = frozenset((Kind.PAGES, Kind.BATCH, Kind.ZERO, Kind.MISSING, Kind.SWITCH))
#: What is in order with bulk, and what must not stand in line behind it.
_ON_BULK: Final = frozenset((Kind.MISSING, Kind.STATE, Kind.SWITCH))
_ON_DEMAND: Final = frozenset((Kind.PROGRESS, Kind.END, Kind.CANCEL))
_PLACED_BYTES: Final = 32 << 10  # received where it is installed from; shorter is copied once more
_MOST_ASKED: Final = wire.MAX_DEMANDS // 2  # demands that the source may not have served yet
_DISCARD_BYTES: Final = 4 << 20  # made missing at a time
_TELL: Final = 0.5  # seconds between two messages for people


class Incoming:
    """One migration, at the destination; made by ``listener.Listener``.

    ::

        incoming = await listener.accept()
        await incoming.prepare([Landing(fd, extent.length) for extent in incoming.extents])
        ...                                 # the program maps its memory, and hands a uffd over
        incoming.attach(0, pager.register(start, length, incoming.handler(0)))
        state = await incoming.switched()
        ...                                 # the program runs
        incoming.note_running()
        await incoming.wait_done()

    Attributes:
        extents: The regions that it brings.
        name: Of the program, for people.
        peer: Where it comes from.
        offered: Features that the source has.
        features: Those that were agreed on.
        stage: How far it has come.
        reached: The same, but as of the moment before it was over.
        stalls: An observer for the pager.
        source: What the source has told of its progress, and its figures at the end.
        received_bytes: Of memory, with their contents.
        may_run: The program may have run here, see ``note_starting``.
        before_end: Called if it fails, before the source hears of that: ends what may run here.
        zero_bytes: Of memory that was only said to be zeros.

    Sharing: the loop's thread.
    """

    def __init__(
        self,
        extents: Sequence[Extent],
        offered: Iterable[str],
        *,
        name: str,
        peer: str,
        deadline: float,
        most_state: int,
        on_end: Callable[[Incoming], None],
    ) -> None:
        self.extents: Final = list(extents)
        self.offered: Final = frozenset(offered)
        self.features: frozenset[str] = frozenset()
        self.name: Final = name
        self.peer: Final = peer
        self.stage = self.reached = Stage.OFFERED
        self.stalls: Final = Stalls()
        self.source: dict[str, Any] = {}
        self.received_bytes = 0
        self.zero_bytes = 0
        self.token: Final = secrets.token_hex(16)
        self.epoch = 0
        self._deadline = deadline
        self._most_state = most_state
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._channels: dict[Role, Channel] = {}
        self._landed_number = dict.fromkeys(Role, 0)
        self._acknowledged = dict.fromkeys(Role, 0)
        self._landings: list[Landing | None] = []
        self._regions: list[Region | None] = [None] * len(self.extents)
        self._landed = [PageSet() for _ in self.extents]  # before the switch
        self._missing = [PageSet() for _ in self.extents]  # from the switch on: still to come
        self._left_bytes = 0
        self._more = False  # memory comes another way
        self._state = bytearray()
        self._waiting: dict[tuple[int, int], asyncio.Future[Answer]] = {}  # region, offset
        self._wanted: dict[tuple[int, int, int], int] = {}  # region, offset, length: priority
        self._asked: set[tuple[int, int, int]] = set()  # of these, on this line
        self._in_place = False  # the frame that comes goes into its landing itself
        self._scratch: mmap.mmap | None = None
        self._scratch_view = memoryview(b"")
        self._error: MigrationFailed | None = None
        self.ended: EndedMigration | None = None  #: what a source hears that comes back
        self._has_ended = False  # the source has said its last word
        self.may_run = False  # the program, here
        self.before_end: Callable[[], None] | None = None
        self._changed: set[asyncio.Future[None]] = set()
        self._had_line = False
        self._no_line: asyncio.TimerHandle | None = None
        self._teller: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Incoming {self.name!r} from {self.peer}, {self.stage.value}>"

    @property
    def left_bytes(self) -> int:
        """Memory that is still to come, from the switch on, in bytes."""
        return self._left_bytes

    @property
    def is_connected(self) -> bool:
        """Whether there is a line to the source."""
        return len(self._channels) == len(Role)

    # --- for whoever runs the program ------------------------------------------------------

    async def prepare(
        self, landings: Sequence[Landing | None], *, features: Iterable[str] | None = None
    ) -> None:
        """Take the migration: the source begins to send.

        Args:
            landings: Where each region's bytes are laid down before the switch; they stay the
                caller's.  With a None among them there is no pre-copy.
            features: Those that may be agreed on; by default all that can be used here.

        Raises:
            ValueError: There are more or fewer than regions, or one is too short.
            MigrationFailed: The source is gone by now.
        """
        if [each.length for each in self.extents] != [
            extent.length if landing is None else len(landing.view)
            for extent, landing in zip(self.extents, landings, strict=False)
        ]:
            raise ValueError("each region takes a landing of its own length, or None")
        if self._error is not None:
            raise self._error
        if self.stage is not Stage.OFFERED:
            raise RuntimeError(f"this migration is {self.stage.value}")
        able = {wire.CHECKSUMS, PRECOPY, *packing.available()}
        wanted = able if features is None else able & set(features)
        if None in landings:
            wanted.discard(PRECOPY)
        self.features = self.offered & wanted
        self._landings = list(landings)
        self._set_stage(Stage.COPYING)
        self._welcome(Role.DEMAND)

    def refuse(self, reason: str) -> None:
        """Do not take the migration; the source is told why."""
        self._end(MigrationFailed(f"it was refused: {reason}", outcome="source"), code="refused")

    def handler(self, number: int) -> Handler:
        """Give the handler for the faults of a region.

        Args:
            number: Of the region, as in ``extents``.
        """

        async def serve(fault: PageFault) -> Answer:
            return await self._serve(number, fault)

        return serve

    def attach(self, number: int, region: Region) -> None:
        """Say where a region is in the program; at the latest before ``switched``.

        Args:
            number: Of the region, as in ``extents``.
            region: Registered with ``handler(number)``, at offset 0 of its source.

        Raises:
            ValueError: It is another length, or lies at another offset.
        """
        if region.length != self.extents[number].length or region.offset:
            raise ValueError(
                f"region {number} has {self.extents[number].length} bytes from offset 0;"
                f" {region!r} has {region.length} from offset {region.offset}"
            )
        self._regions[number] = region

    async def switched(self) -> bytes:
        """Wait until the program may run here; give its state.

        Raises:
            MigrationFailed: It runs on at the source.

        Cancellation: nothing happens; call again.
        """
        if None in self._regions:
            raise RuntimeError("attach all regions first: faults must find their way here")
        await self._until(lambda: self.stage not in {Stage.OFFERED, Stage.COPYING})
        return bytes(self._state)

    def note_starting(self) -> None:
        """Take note that from now on the program may run, before it is let.

        If it then does not say that it runs, nobody can know that it has not: the source does not
        let it go on there.
        """
        self.may_run = True

    def note_running(self, *, more: bool = False) -> None:
        """Tell the source that the program runs here now.

        Args:
            more: It is not all there with the last page of its regions: it has memory that comes
                another way, or does not live by itself yet.  ``note_all_here`` says when it does;
                until then the source keeps everything.
        """
        if self.stage is not Stage.SWITCHING:
            raise RuntimeError(f"this migration is {self.stage.value}")
        self._more = more
        self._set_stage(Stage.FOLLOWING)
        self.stalls.note_running()
        self._state.clear()
        self._send_json(Kind.RUNNING, {})
        self._tell()
        self._look_whether_done()

    def note_all_here(self) -> None:
        """Say that now it is all there; see ``note_running``."""
        self._more = False
        self._look_whether_done()

    def note_failed(self, reason: str) -> None:
        """Tell the source that the program does not run here, or not any more."""
        may_have_run = self.may_run or self.stage is Stage.FOLLOWING
        code = NOT_STARTED if self.stage is Stage.SWITCHING and not may_have_run else "failed"
        outcome = "lost" if may_have_run else "source"
        self._end(MigrationFailed(reason, stage=self.stage.value, outcome=outcome), code=code)

    async def wait_here(self) -> None:
        """Wait until nothing of its regions is still to come; see ``note_running``.

        Raises:
            MigrationFailed: As ``wait_done``.

        Cancellation: nothing happens; call again.
        """
        await self._until(
            lambda: self.stage in {Stage.FOLLOWING, Stage.DONE} and not self._left_bytes
        )

    async def wait_done(self) -> None:
        """Wait until all of the memory is here.

        Raises:
            MigrationFailed: It will not be: there was no line for ``deadline`` seconds, or an
                end of the source's.

        Cancellation: nothing happens; call again.
        """
        await self._until(lambda: self.stage is Stage.DONE)

    def ask_for(self, number: int, offset: int, length: int, *, priority: int = 0) -> None:
        """Ask for memory before anybody waits for it; what is here already is left out.

        Args:
            number: Of the region.
            offset: In bytes.
            length: In bytes; whole pages.
            priority: The higher the sooner; below FAULT.
        """
        if not 0 <= priority < FAULT:
            raise ValueError(f"a priority is a number from 0 to {FAULT - 1}")
        if self.stage is not Stage.FOLLOWING:
            raise RuntimeError(f"this migration is {self.stage.value}")
        for run in self._missing[number].runs(Range(offset, length)):
            for piece in run.pieces(wire.MAX_DATA):
                self._demand(number, piece.start, piece.length, priority)

    async def aclose(self) -> None:
        """Let go: of what is not here the source hears that it failed.

        The pager that serves the regions has to be closed by its own policy, before or after.

        Cancellation: the connections are given up at once.
        """
        try:
            if self.stage is Stage.DONE and not self._has_ended:
                # The source has to hear that all is here; it comes back if the line has broken.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._deadline):
                        await self._until(lambda: self._has_ended)
            elif not self.stage.is_over:
                self.note_failed("the destination was closed")
        finally:
            self._let_go()

    # --- faults --------------------------------------------------------------------------

    async def _serve(self, number: int, fault: PageFault) -> Answer:
        if self.stage in {Stage.OFFERED, Stage.COPYING}:
            await self._until(lambda: self.stage not in {Stage.OFFERED, Stage.COPYING})
            if self._error is not None:  # what is missing was not told
                raise SourceError(str(self._error), fault.address) from self._error
        if fault.offset not in self._missing[number]:
            return Zero()  # it was said to be zeros, or was removed; what is there stays
        if self._error is not None:
            raise SourceError(str(self._error), fault.address) from self._error
        began_ns = time.perf_counter_ns()
        key = number, fault.offset
        future = self._waiting.get(key)
        if future is None:
            future = self._waiting[key] = self._loop.create_future()
            self._demand(number, fault.offset, fault.length, FAULT)
        try:
            answer = await asyncio.shield(future)
        except MigrationFailed as error:
            raise SourceError(str(error), fault.address) from error
        self.stalls.network.add(time.perf_counter_ns() - began_ns)
        return answer

    def _demand(self, number: int, offset: int, length: int, priority: int) -> None:
        """Ask the source; again whenever there is a new line, until it has come."""
        wanted = number, offset, length
        self._wanted[wanted] = priority
        # Half of what the source takes is kept for threads that wait.
        most = wire.MAX_DEMANDS if priority == FAULT else _MOST_ASKED
        if len(self._asked) < most or wanted in self._asked:
            self._ask(wanted)

    def _ask_more(self) -> None:
        """Ask for what was held back, what is most wanted first."""
        for wanted in sorted(
            self._wanted.keys() - self._asked, key=lambda each: -self._wanted[each]
        )[: _MOST_ASKED - len(self._asked)]:
            self._ask(wanted)

    def _ask(self, wanted: tuple[int, int, int]) -> None:
        self._asked.add(wanted)
        number, offset, length = wanted
        priority = self._wanted[wanted]
        channel = self._channels.get(Role.DEMAND)
        if channel is not None:
            channel.send(
                channel.encoder.frame(
                    Kind.DEMAND, region=number, number=priority, offset=offset, span=length
                )
            )

    # --- what comes ----------------------------------------------------------------------

    def _place(self, role: Role, head: Head) -> memoryview | None:
        """Say where the bytes of a frame go as they come."""
        self._in_place = False
        if self.stage is Stage.COPYING:
            landing, landed = self._landing(role, head.region), self._landed[head.region]
            where = Range(head.offset, head.length)
            # Where all of its pages are, straight into them.  Should the line break in the midst
            # of it, they are known to be there.
            if next(landed.gaps(where), None) is None:
                self._in_place = True
                return landing.view[where.start : where.end]
        if head.length < _PLACED_BYTES or role is not Role.BULK:
            return None
        if self._scratch is None:
            self._scratch = mmap.mmap(-1, wire.MAX_DATA)
            self._scratch_view = memoryview(self._scratch)
        return self._scratch_view[: head.length]

    def _landing(self, role: Role, region: int) -> Landing:
        landing = self._landings[region] if self._landings else None
        if landing is None or PRECOPY not in self.features or role is not Role.BULK:
            raise PeerError("sent memory before the switch, which was not agreed on")
        return landing

    async def _take(self, role: Role, frame: Frame) -> None:
        kind = frame.kind
        if self.stage is Stage.OFFERED and kind is not Kind.CANCEL:
            raise PeerError("went on before it was welcomed")
        if kind in (_ON_BULK if role is Role.DEMAND else _ON_DEMAND):
            raise PeerError(f"sent a {kind.name} on the connection for {role.value}")
        if kind in _NUMBERED:
            if frame.number <= self._landed_number[role]:
                raise PeerError(
                    f"sent frame {frame.number} behind frame {self._landed_number[role]}"
                )
            if kind is Kind.SWITCH:
                self._switch(frame)
            elif kind is Kind.MISSING:
                await self._forget(frame)
            elif self.stage is Stage.COPYING:
                await self._lay_down(role, frame)
            else:
                await self._install(frame)
            self._landed_number[role] = frame.number
        elif kind is Kind.STATE:
            if self.stage is Stage.COPYING:
                self._take_state(frame)
        elif kind is Kind.PROGRESS:
            self.source = told_by_source(frame.json())
        elif kind is Kind.CANCEL:
            self._take_cancel()
        elif kind is Kind.END:
            self.source = told_by_source(frame.json())
            if self.stage is not Stage.DONE:
                raise PeerError("ended the migration, which is not over")
            self._has_ended = True
            channels, self._channels = self._channels, {}
            for channel in channels.values():
                channel.close()
            self._let_go()
        else:
            raise PeerError(f"sent a second {kind.name}")

    def _take_state(self, frame: Frame) -> None:
        body = memoryview(frame.body)
        if frame.span > self._most_state:
            raise PeerError(
                f"has a state of {frame.span} bytes; {self._most_state} are allowed here"
            )
        if frame.offset == 0:
            self._state.clear()
        if frame.offset != len(self._state) or frame.offset + len(body) > frame.span:
            raise PeerError("sent a state whose parts do not fit together")
        self._state += body

    async def _lay_down(self, role: Role, frame: Frame) -> None:
        """Put what came before the switch where it belongs."""
        number = frame.region
        landing, landed, missing = (
            self._landing(role, number),
            self._landed[number],
            self._missing[number],
        )
        where = Range(frame.offset, frame.span)
        if frame.kind is Kind.ZERO:
            missing.discard(where)
            self.zero_bytes += frame.span
            await _discard(landing, landed.runs(where))
            landed.discard(where)
            return
        body = memoryview(frame.body)
        runs = frame.runs() if frame.kind is Kind.BATCH else ((frame.offset, frame.span, 0),)
        for offset, length, at in runs:
            where = Range(offset, length)
            landed.add(where)
            if not (frame.placed and self._in_place):
                landing.write(offset, body[at : at + length])
            if missing:  # it was, and goes before the switch after all
                missing.discard(where)
            self.received_bytes += length

    async def _forget(self, frame: Frame) -> None:
        """Make missing what is still to come, whatever was laid down for it."""
        if self.stage is not Stage.COPYING:
            return  # the answer to the first switch was lost
        number = frame.region
        landing, landed = self._landings[number], self._landed[number]
        missing = self._missing[number]
        for offset, length, _ in frame.runs():
            where = Range(offset, length)
            missing.add(where)
            if landing is not None and landed.overlaps(where):
                await _discard(landing, landed.runs(where))
                landed.discard(where)

    def _switch(self, frame: Frame) -> None:
        """Let the program run: what is missing now will follow."""
        if self.stage is not Stage.COPYING:
            return  # as above
        if frame.span != len(self._state):
            raise PeerError(
                f"switched with a state of {len(self._state)} bytes; it should have {frame.span}"
            )
        self.stalls.note_switched()
        self._left_bytes = sum(len(missing) for missing in self._missing) * mmap.PAGESIZE
        self._set_stage(Stage.SWITCHING)

    async def _install(self, frame: Frame) -> None:
        """Let the pager put into place what came after the switch."""
        number = frame.region
        region, missing = self._regions[number], self._missing[number]
        if region is None or self.stage not in {Stage.SWITCHING, Stage.FOLLOWING, Stage.DONE}:
            raise PeerError(f"sent memory of a migration that is {self.stage.value}")
        if frame.kind is Kind.ZERO:
            self.zero_bytes += frame.span
            self._arrived(number, frame.offset, frame.span, Zero())
            return
        body: Buffer = frame.body
        if frame.kind is Kind.PAGES:
            runs: Iterable[tuple[int, int, int]] = ((frame.offset, frame.span, 0),)
        else:
            runs = frame.runs()
        try:
            with PinnedBuffer(body) as pinned:
                for offset, length, at in runs:
                    # What is not missing any more came by the other connection.
                    for run in list(missing.runs(Range(offset, length))):
                        address = pinned.address + at + run.start - offset
                        await region.fill_piece(run.start, run.length, address)
                    self._arrived(number, offset, length, None)
                    self.received_bytes += length
        except (UffdError, OSError) as error:
            self.note_failed(f"the program's memory cannot be filled: {error}")

    def _arrived(self, number: int, offset: int, length: int, answer: Answer) -> None:
        """Note that a run is there, and let those go on who wait for it."""
        missing, where = self._missing[number], Range(offset, length)
        gone = sum(run.length for run in missing.runs(where))
        if gone:
            missing.discard(where)
            self._left_bytes -= gone
        if self._wanted:
            self._answer(number, where, answer)
        if not self._left_bytes:
            self._wake()
            self._look_whether_done()

    def _answer(self, number: int, where: Range, answer: Answer) -> None:
        waiting = self._waiting
        page_size = self.extents[number].page_size
        if len(self._wanted) < where.length // page_size:
            offsets = [at for region, at in waiting if region == number and at in where]
        else:
            offsets = [at for at in where.pages(page_size) if (number, at) in waiting]
        for at in offsets:
            future = waiting.pop((number, at))
            if not future.done():
                future.set_result(answer)
        for wanted in [
            each
            for each in self._wanted
            if each[0] == number
            and each[1] < where.end
            and where.start < each[1] + each[2]
            and not self._missing[number].overlaps(Range(each[1], each[2]))
        ]:
            del self._wanted[wanted]
            self._asked.discard(wanted)
        if len(self._asked) < min(len(self._wanted), _MOST_ASKED // 2):
            self._ask_more()

    def _look_whether_done(self) -> None:
        if self.stage is Stage.FOLLOWING and not self._left_bytes and not self._more:
            self._set_stage(Stage.DONE)
            self._send_json(Kind.DONE, self._figures(timeline=True))

    def _figures(self, *, timeline: bool = False) -> dict[str, Any]:
        return self.stalls.as_dict(timeline=timeline) | {
            "stage": self.stage.value,
            "received_bytes": self.received_bytes,
            "left_bytes": self._left_bytes,
        }

    def _take_cancel(self) -> None:
        if self.stage not in {Stage.OFFERED, Stage.COPYING, Stage.SWITCHING}:
            raise PeerError("cancelled a migration whose program runs here")
        error = MigrationFailed(
            "the source has cancelled it", stage=self.stage.value, outcome="source"
        )
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.close()  # this was its last word
        self._end(error, stage=Stage.CANCELLED)

    # --- lines ---------------------------------------------------------------------------

    def welcome(self, role: Role, epoch: int, channel: Channel) -> None:
        """Take a connection that has greeted for this migration.

        Args:
            role: What it is for.
            epoch: The pair that it belongs to.
            channel: The connection; nothing was said on it yet.

        Raises:
            ConnectionAbortedError: It belongs to a pair that is gone, or half gone: the source
                makes another one.
        """
        if role is Role.DEMAND:
            if epoch <= self.epoch:
                raise ConnectionAbortedError(f"pair {epoch} comes after pair {self.epoch}")
            self._drop_line("another one has taken its place")
            self.epoch = epoch
        elif epoch != self.epoch or role in self._channels or Role.DEMAND not in self._channels:
            # Its first connection may have broken a moment ago, which the source need not know.
            raise ConnectionAbortedError(f"there is no pair {epoch} that lacks a connection")
        self._channels[role] = channel
        if self.stage is not Stage.OFFERED:
            self._welcome(role)

    def _welcome(self, role: Role) -> None:
        channel = self._channels.get(role)
        if channel is None:
            return
        decoder = channel.decoder
        decoder.regions = self.extents
        decoder.place = lambda head: self._place(role, head)
        decoder.checked = channel.encoder.checked = wire.CHECKSUMS in self.features
        for name in self.features & set(wire.COMPRESSION):
            decoder.decompress_by(name, packing.codec(name)[1])
        stage = self.stage
        value: dict[str, Any] = {
            "token": self.token,
            "features": sorted(self.features),
            "stage": stage.value,
            "landed": {each.value: number for each, number in self._landed_number.items()},
            "most_state": self._most_state,
        }
        channel.send_json(Kind.WELCOME, value)
        if role is Role.DEMAND:
            if stage is Stage.DONE:
                channel.send_json(Kind.DONE, self._figures(timeline=True))
            return
        # Only now is there a line: what is waited for is asked again.
        self._had_line = True
        if self._no_line is not None:
            self._no_line.cancel()
            self._no_line = None
        self._asked.clear()
        self._ask_more()

    def take(self, role: Role, frame: Frame) -> Any:
        """Take a frame of a connection; for its channel."""
        return self._take(role, frame)

    def acknowledge(self, channel: Channel) -> None:
        """Say what has landed on a connection; for its channel."""
        for role, each in self._channels.items():
            number = self._landed_number[role]
            if each is channel and number > self._acknowledged[role]:
                self._acknowledged[role] = number
                channel.send(channel.encoder.frame(Kind.ACK, number=number))

    def note_lost(self, channel: Channel) -> None:
        """Take note that a connection is gone; for the connection itself."""
        if channel not in self._channels.values():
            return
        error = channel.lost
        if self.stage in {Stage.OFFERED, Stage.COPYING} and is_final(error):
            self._end(
                MigrationFailed(f"{self.peer} {error}", stage=self.stage.value, outcome="source")
            )
        else:
            self._drop_line(str(error))

    def _drop_line(self, why: str) -> None:
        """Give up both connections, and begin to count the time without them."""
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            if not channel.is_parting:
                channel.abort()
        if self.stage in {Stage.OFFERED, Stage.COPYING}:
            self._missing = [PageSet() for _ in self.extents]  # said anew with the next switch
            self._state.clear()
        self._wake()
        if self._no_line is None and channels and not self.stage.is_over:
            if self.stage is Stage.OFFERED or not self._had_line:  # it does not try that again
                self._end(MigrationFailed(f"the source is gone: {why}", outcome="source"))
                return
            log.warning("the line to %s is gone: %s", self.peer, why)
            self._no_line = self._loop.call_later(self._deadline, self._give_up, why)

    def _give_up(self, why: str) -> None:
        outcome = "source" if self.stage is Stage.COPYING else "lost"
        self._end(
            MigrationFailed(
                f"there was no line to {self.peer} for {self._deadline:g} s: {why}",
                stage=self.stage.value,
                outcome=outcome,
            )
        )

    # --- the end -------------------------------------------------------------------------

    def _end(
        self, error: MigrationFailed, *, code: str = "failed", stage: Stage = Stage.FAILED
    ) -> None:
        """Fail: whoever waits hears of it."""
        if self.stage.is_over:
            return
        if self.before_end is not None:
            self.before_end()
        self._error = error
        self._set_stage(stage)
        self.ended = EndedMigration(code, str(error), self.reached.value)
        # Both are told: whichever the source hears of first, it has to hear why.
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.tell(code, error)
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # its fault may be gone by now
        self._wanted.clear()
        self._let_go()

    def _let_go(self) -> None:
        """Leave the listener, the line and the clock."""
        for timer in (self._no_line, self._teller):
            if timer is not None:
                timer.cancel()
        self._no_line = self._teller = None
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            if not channel.is_parting:
                channel.abort()
        self._wake()
        self._on_end(self)

    def _set_stage(self, stage: Stage) -> None:
        self.stage = stage
        if not stage.is_over:
            self.reached = stage
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, set()
        for future in changed:
            if not future.done():
                future.set_result(None)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while True:
            if self._error is not None:
                raise self._error
            if condition():
                return
            future: asyncio.Future[None] = self._loop.create_future()
            self._changed.add(future)
            await future

    def _send_json(self, kind: Kind, value: dict[str, Any]) -> None:
        channel = self._channels.get(Role.DEMAND)
        if channel is not None:
            channel.send_json(kind, value)

    def _tell(self) -> None:
        """Tell the source how it goes, for people."""
        if self.stage is Stage.FOLLOWING:
            self._send_json(Kind.PROGRESS, self._figures())
            self._teller = self._loop.call_later(_TELL, self._tell)


async def _discard(landing: Landing, runs: Iterable[Range]) -> None:
    """Make runs missing, in pieces between which others have their turn."""
    done = 0
    for run in list(runs):
        for piece in run.pieces(_DISCARD_BYTES):
            landing.discard(piece.start, piece.length)
            done += piece.length
            if done >= _DISCARD_BYTES:
                done = 0
                await between_pieces()
