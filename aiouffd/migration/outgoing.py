"""Outgoing: a program's memory sent away, while it runs, and after it has gone.

Knows: the stages at the source, what is sent when, who asks for what.
Must not know: how the program is stopped, where its memory comes from, how a line is made.

Laws of this file:

* Until the program has been told to leave, nothing has happened: whatever goes wrong, it runs on
  here.  From then on it never runs here again, whatever goes wrong.
* Demand never waits behind bulk: it has a connection of its own, and what bulk has on its way is
  bounded by the time that it takes (``flow``).
* A page is read after it was taken for dirty, never before: what is written meanwhile is found by
  the next round, and goes once more.
* Everything is kept until the other side has said that all is there.
* Pre-copy, post-copy and the hybrid of both are one way with other numbers (``Plan``).

Pre-copy in rounds is Clark and others' (NSDI 2005), post-copy with pushing around the last demand
Hines, Deshpande and Gopalan's (VEE 2009).
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import json
import logging
import math
import ssl
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from ..dirty import DirtyTracker
from ..errors import MigrationFailed, PeerError, SourceError, UffdError
from ..flow import Flow
from ..threads import in_thread
from . import packing, wire
from .backlog import Backlog, InDoubt, Taken
from .channel import Channel, ToldError
from .figures import Round, Sample, SourceFigures, told_by_destination
from .line import Line
from .memory import SourceMemory, split
from .stages import Stage
from .wire import Frame, Kind, Role

log: Final = logging.getLogger("aiouffd.migration")

PRECOPY: Final = "precopy"  #: the feature: memory may be sent before the switch

_FRAME_BYTES: Final = 1 << 20  # of memory, while the program runs here
_FRAME_SECONDS: Final = 0.005  # that one frame may take once it runs there, but for ...
_SHORT_FRAME_BYTES: Final = 64 << 10  # ... so many bytes
_LONG_FRAME_BYTES: Final = 256 << 10
_WORTH_A_LOOK: Final = 32 << 10  # bytes that are sent as they lie, if they can be
_WINDOW: Final = 4 << 20  # bytes of bulk on their way while nobody waits for anything
_LEAST_WINDOW: Final = 256 << 10  # and while somebody does, at least
_QUEUE: Final = 0.016  # seconds that they may take then, besides what the flow allows
_WAITS: Final = 0.5  # seconds since the last demand
_MOMENT: Final = 0.005  # seconds that one frame may take under a bandwidth
_CATCH_UP: Final = 0.02  # seconds' worth of it that may be sent at once after a pause
_SAMPLE: Final = 0.05  # seconds
_SERVED_AT_ONCE: Final = 2 << 20  # bytes of memory for demands, between two turns of the loop
_ADDED_AT_ONCE: Final = 4096  # dirty runs, likewise
_PROGRAM_FAILED: Final = frozenset(("failed", "refused"))  # codes of a destination without it


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The numbers that make a migration what it is.

    Attributes:
        rounds: Passes over the memory while the program runs, at most; 0 is pure post-copy.
        downtime: Switch as soon as the rest can be sent in so many seconds; it goes first then.
        behind: Bytes that may follow after the switch; None is any number, 0 is pure pre-copy.
            If more than that are left after the last round the migration fails, and the
            program runs on.
        bandwidth: Bytes per second for bulk; None is what the line gives.  Demand is not held
            up by it, but counts.
        deadline: Seconds without a line after which the migration fails.
        silence: Seconds after which a side that says nothing is lost.
        checksums: Every body gets a checksum, if the other side can; TLS makes it needless.
        compress: ``zstd`` or ``lz4``, if the other side can; "" is neither.
    """

    rounds: int = 5
    downtime: float = 0.03
    behind: int | None = None
    bandwidth: float | None = None
    deadline: float = 30.0
    silence: float = 5.0
    checksums: bool = False
    compress: str = ""

    def __post_init__(self) -> None:
        if self.rounds < 0 or self.downtime < 0 or (self.behind or 0) < 0:
            raise ValueError("rounds, downtime and behind are not negative")
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise ValueError("bandwidth is a number of bytes per second, or None")
        if self.silence <= 0 or self.deadline < 0:
            raise ValueError("silence is more than no time, deadline not less")
        if self.compress and self.compress not in wire.COMPRESSION:
            raise ValueError(f"compress is one of {', '.join(wire.COMPRESSION)}, or empty")


class Program(Protocol):
    """The program that moves, as the source sees it."""

    async def stop(self) -> bytes:
        """Let it stand still; give its state: all that is not in its memory's regions."""

    async def restart(self) -> None:
        """Let it go on here as if nothing had happened."""

    async def leave(self) -> None:
        """Tell it that from now on it may run elsewhere: it never goes on here."""


class Cancelled(MigrationFailed):
    """The migration was cancelled before the switch; the program runs on at the source."""


class Outgoing:
    """One migration, at the source.

    ::

        outgoing = Outgoing(memory, "10.0.0.7", 7440, tracker=tracker, ssl=context)
        await outgoing.run(program)

    Attributes:
        stage: How far it has come.
        figures: What it has cost so far.
        destination: What the other side has told of itself: its figures, once all is there.
        dirty_rate: As of the last round, in bytes per second.

    Sharing: the loop's thread.
    """

    def __init__(
        self,
        memory: Sequence[SourceMemory],
        host: str,
        port: int,
        *,
        tracker: DirtyTracker | None = None,
        plan: Plan | None = None,
        ssl: ssl.SSLContext | None = None,
        server_hostname: str = "",
        name: str = "",
        on_progress: Callable[[Outgoing], None] | None = None,
    ) -> None:
        """Prepare; nothing is sent before ``run``.

        Args:
            memory: The regions; they stay the caller's, and open until ``run`` has returned.
            host: The destination's address or name.
            port: Where it listens.
            tracker: Knows the same regions by the same numbers; needed for pre-copy.
            plan: The numbers.
            ssl: A client's context; None is plain TCP.
            server_hostname: The name that the destination's certificate must be for; "" is
                ``host``.
            name: Of the program, for people.
            on_progress: Called some twenty times a second.

        Raises:
            ValueError: There is no tracker, and the plan has rounds.
        """
        self.stage = Stage.OFFERED
        self.figures: Final = SourceFigures(memory_bytes=sum(each.extent.length for each in memory))
        self.destination: dict[str, Any] = {}
        self.dirty_rate = 0.0
        self._memory = memory
        self._extents = [each.extent for each in memory]
        self._plan = plan = plan if plan is not None else Plan()
        if plan.rounds and tracker is None and memory:
            raise ValueError("pre-copy takes a tracker: without one, plan for 0 rounds")
        self._tracker = tracker
        self._name = name
        self._on_progress = on_progress
        self._backlog = Backlog(self._extents)
        self._in_doubt = {role: InDoubt() for role in Role}
        self._numbers = itertools.count(1)
        self._last_number = 0
        self._flow = Flow()
        self._due = 0.0  # when bulk may be sent next, under a bandwidth
        self._asked = -math.inf  # when somebody last waited for a page
        self._demands: list[tuple[int, int, Frame]] = []  # a heap: the most urgent, then the first
        self._serving: asyncio.Handle | None = None  # of those who wait, in the next turn
        self._token = ""
        self._offered: frozenset[str] = frozenset()
        self._features: set[str] | None = None  # None: not agreed on yet
        self._most_state = 0  # bytes that the destination takes
        self._state = b""
        self._round = 0
        self._cancel = False
        self._leaves = False  # it is being told: too late to cancel
        self._copies_there = False  # the destination takes memory before the switch
        self._is_there = False  # the destination has said that all is there
        self._running_there = False
        self._stopped_at = 0.0
        self._began = 0.0
        self._error: BaseException | None = None
        self._changed = asyncio.Event()
        self._line = Line(
            host,
            port,
            ssl=ssl,
            server_hostname=server_hostname,
            silence=plan.silence,
            deadline=plan.deadline,
            hello=self._hello,
            prepare=self._prepare,
            take=self._take,
            on_up=self._on_up,
            on_change=self._on_change,
        )

    @property
    def left_bytes(self) -> int:
        """Memory that is still to be sent, in bytes."""
        return self._backlog.bytes

    @property
    def rounds(self) -> int:
        """Passes of pre-copy so far, with the one under way."""
        return self._round

    @property
    def is_connected(self) -> bool:
        """Whether there is a line to the destination."""
        return self._line.is_up

    # --- the stages ----------------------------------------------------------------------

    async def run(self, program: Program) -> None:
        """Move the program; return when all is at the destination.

        After a failure past the switch it may be called again: it goes on where it was.

        Args:
            program: Runs.

        Raises:
            Cancelled: ``cancel`` was called in time.
            MigrationFailed: See its ``outcome`` for what has become of the program.

        Cancellation: before the switch the program runs on here and the destination forgets all
            of it.  After it nothing is lost here: call ``run`` again to go on.
        """
        if self.stage.is_over:
            raise RuntimeError(f"this migration is {self.stage.value}")
        loop = asyncio.get_running_loop()
        self._began = self._began or loop.time()
        self._error = None
        keeper = loop.create_task(self._keep_line(), name="aiouffd migration line")
        sampler = loop.create_task(self._sample(), name="aiouffd migration samples")
        try:
            await self._until(lambda: self._line.is_up or self._is_there)
            if self.stage in {Stage.OFFERED, Stage.COPYING}:
                await self._copy()
                await self._settle()
                await self._switch(program)
            await self._follow()
        except BaseException as error:
            failure = await self._give_up(program, error)
            if failure is error:
                raise
            raise failure from error
        finally:
            keeper.cancel()
            sampler.cancel()
            await asyncio.wait((keeper, sampler))
            await self._line.wait_closed()
            self._take_sample()

    def cancel(self) -> bool:
        """Let the program run on here.

        Returns:
            Whether it was in time: once the program was told to leave it is not.
        """
        if self._leaves or self.stage not in {Stage.OFFERED, Stage.COPYING}:
            return False
        self._cancel = True
        self._changed.set()
        return True

    async def _copy(self) -> None:
        """Send the memory while the program runs, in rounds."""
        plan, loop = self._plan, asyncio.get_running_loop()
        self.stage = Stage.COPYING
        tracker = self._tracker
        assert self._features is not None  # noqa: S101 - there has been a line
        if not plan.rounds or tracker is None or PRECOPY not in self._features:
            self._backlog.add_all()
            self._check_behind()
            return
        await in_thread(tracker.begin)  # it takes its time
        self._backlog.add_all()
        while self._round < plan.rounds:
            self._round += 1
            began, sent = loop.time(), self._line.sent_bytes
            self._tell_progress()
            await self._push()
            dirty = await tracker.collect()
            for at in range(0, len(dirty.runs), _ADDED_AT_ONCE):
                self._backlog.add_runs(dirty.runs[at : at + _ADDED_AT_ONCE])
                await asyncio.sleep(0)
            seconds = loop.time() - began
            self.dirty_rate = dirty.rate
            self.figures.rounds.append(
                Round(self._round, seconds, self._line.sent_bytes - sent, dirty.bytes, dirty.rate)
            )
            if self._fits():
                return
        self._check_behind()

    def _check_behind(self) -> None:
        """Go on only if no more is left than may follow after the switch."""
        behind, left = self._plan.behind, self._backlog.bytes
        if not self._is_too_much():
            return
        if not self._round:
            text = (
                f"all of its {left} bytes would follow after the switch, of which {behind} may: it"
                " takes rounds before, and a destination that takes them"
            )
        else:
            text = (
                f"it does not converge: after {self._round} rounds {left} bytes are left, which"
                f" take more than {self._plan.downtime:g} s; the program writes"
                f" {self.dirty_rate:.0f} bytes/s.  Let more follow after the switch, or allow a"
                " longer downtime"
            )
        raise MigrationFailed(text, stage=self.stage.value, outcome="source")

    def _is_too_much(self) -> bool:
        """Say whether more is left than may follow after the switch."""
        behind = self._plan.behind
        return behind is not None and self._backlog.bytes > behind

    def _fits(self) -> bool:
        """Say whether what is left can be sent within the downtime that is allowed."""
        rate = self._flow.rate
        if self._plan.bandwidth is not None:
            rate = min(rate, self._plan.bandwidth) if rate else self._plan.bandwidth
        # Where nothing was measured yet, a page or two take no time that matters.
        most = rate * self._plan.downtime if rate else _SHORT_FRAME_BYTES
        return self._backlog.bytes <= most

    async def _switch(self, program: Program) -> None:
        """Stop the program here, and let it run there."""
        self._check()
        loop = asyncio.get_running_loop()
        while self._round and not self._fits():
            # Most of what will follow is known by now: the destination can forget what it has of
            # it while the program still runs.
            if await self._tell_missing():
                break
            await self._settle()
        began = loop.time()
        self._stopped_at = began
        self.figures.stopped_after = began - self._began
        self._state = await program.stop()
        if len(self._state) > self._most_state:
            raise MigrationFailed(
                f"its state has {len(self._state)} bytes, of which the destination takes at most"
                f" {self._most_state}",
                stage=self.stage.value,
                outcome="source",
            )
        if self._tracker is not None and self._round:
            self._backlog.add_runs(self._tracker.collect_now().runs)
        if self._round and (self._is_too_much() or self._fits()):
            await self._push()
        self._check()
        await self._until(lambda: self._line.is_up)
        self._leaves = True
        await program.leave()
        self.stage = Stage.SWITCHING

    async def _follow(self) -> None:
        """Make the destination run, and send what is left."""
        line = self._line
        while not self._running_there:
            await self._until(lambda: line.is_up or self._running_there)
            epoch = line.epoch
            if not self._running_there:  # the line may have come with that news
                if self._is_too_much() and self._copies_there:
                    await self._push()  # it was in doubt when the line before this one broke
                if self._is_line(epoch):
                    await self._send_switch(epoch)
            await self._until_other_line(epoch)
        self.stage = Stage.FOLLOWING
        self._tell_progress()
        while not self._is_there:
            await self._push()
            await self._until(lambda: bool(self._is_there or self._backlog.bytes))
        self.stage = Stage.DONE
        self.figures.seconds = asyncio.get_running_loop().time() - self._began
        self._note_line()
        figures = {"figures": self.figures.as_dict(short=True)}
        self._say_last(Kind.END, json.dumps(figures).encode())

    def _say_last(self, kind: Kind, body: bytes = b"") -> None:
        """Say the last word, if the destination listens, and hang up behind it."""
        line = self._line
        channel = line.channels.get(Role.DEMAND)
        if channel is None or not channel.decoder.version:
            return
        channel.send(channel.encoder.frame(kind, body))
        if not line.is_up and Role.BULK in line.channels:
            line.channels[Role.BULK].abort()  # it does not stand yet
        line.hang_up()

    async def _give_up(self, program: Program, error: BaseException) -> BaseException:
        """Say what an error means at this stage, having done what it asks for.

        Returns:
            What is to be raised.
        """
        self.figures.seconds = asyncio.get_running_loop().time() - self._began
        self._note_line()
        stage = self.stage
        # Anything else that it says is about the line: there the program may well run on.
        was_told = isinstance(error, ToldError) and error.code in _PROGRAM_FAILED
        expected = isinstance(error, UffdError | OSError)
        if stage in {Stage.OFFERED, Stage.COPYING} or (
            isinstance(error, ToldError) and error.not_started
        ):
            self._say_last(Kind.CANCEL)
            cancelled = isinstance(error, Cancelled | asyncio.CancelledError)
            self.stage = Stage.CANCELLED if cancelled else Stage.FAILED
            if self._stopped_at:
                try:
                    await asyncio.shield(program.restart())
                except (UffdError, OSError) as failed:
                    self.stage = Stage.FAILED
                    return MigrationFailed(
                        f"it could not be told to go on here: {failed}; before that: {error}",
                        stage=stage.value,
                        # Where it may have ended by itself; or stand still, for its operator.
                        outcome="unknown" if self._leaves else "source",
                    )
            if cancelled or not expected:
                return error
            return MigrationFailed(
                f"the program runs on here: {error}", stage=stage.value, outcome="source"
            )
        if not expected:
            return error
        if was_told:
            self.stage = Stage.FAILED
            text = "the program has failed at the destination; its memory as of the switch is here"
        elif stage is Stage.SWITCHING:
            text = (
                "the switch was under way, and whether the program runs at the destination is not"
                " known; here it stands still, with all of its memory"
            )
        else:
            text = (
                "the program runs at the destination without all of its memory; what is missing is"
                " still here"
            )
        return MigrationFailed(
            f"{text}: {error}", stage=stage.value, outcome="lost" if was_told else "unknown"
        )

    # --- waiting -------------------------------------------------------------------------

    async def _keep_line(self) -> None:
        try:
            await self._line.keep()
        except Exception as error:
            self._error = self._error or error
            self._changed.set()

    def _check(self) -> None:
        """Stop here if there is no going on."""
        if self._cancel and self.stage in {Stage.OFFERED, Stage.COPYING}:
            raise Cancelled("it was cancelled", stage=self.stage.value, outcome="source")
        if self._error is not None and not self._is_there:
            raise self._error

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._check()
            self._changed.clear()
            await self._changed.wait()
        self._check()

    async def _until_other_line(self, epoch: int) -> None:
        """Wait until the program runs there, or the line has broken."""
        line = self._line
        await self._until(lambda: self._running_there or not line.is_up or line.epoch != epoch)

    async def _pause(self, seconds: float) -> None:
        """Wait until something changes, or for so long."""
        timer = asyncio.get_running_loop().call_later(seconds, self._changed.set)
        self._changed.clear()
        try:
            await self._changed.wait()
        finally:
            timer.cancel()

    # --- sending -------------------------------------------------------------------------

    async def _push(self) -> None:
        """Send the backlog, as fast as line and plan allow; demand goes on beside it."""
        loop, line, backlog = asyncio.get_running_loop(), self._line, self._backlog
        while backlog.bytes and not self._is_there:
            self._check()
            if not self._may_send():
                await self._until_it_may()
                continue
            early = self._due - loop.time()
            if early > 0:
                await self._pause(early)
                continue
            taken = backlog.take(self._step(), wire.MAX_RUNS)
            assert taken is not None  # noqa: S101 - there are bytes
            try:
                self._send_runs(Role.BULK, line.channels[Role.BULK], taken)
            except SourceError:
                self._put_back(taken)
                raise
            await asyncio.sleep(0)

    def _may_send(self) -> bool:
        line = self._line
        if not line.is_up:
            return False
        window = _WINDOW
        if asyncio.get_running_loop().time() - self._asked < _WAITS:
            # Less, and all would take so much longer that more had to be waited for.
            window = self._flow.window + int(self._flow.rate * _QUEUE)
            window = min(max(window, _LEAST_WINDOW), _WINDOW)
        return not line.channels[Role.BULK].full and self._in_doubt[Role.BULK].bytes < window

    async def _until_it_may(self) -> None:
        self._changed.clear()
        if not self._may_send():
            await self._changed.wait()

    def _step(self) -> int:
        """Give the bytes of memory for the next frame."""
        step = _FRAME_BYTES
        if self.stage is not Stage.COPYING:  # somebody may wait for what comes behind it
            step = int(self._flow.rate * _FRAME_SECONDS)
            step = min(max(step, _SHORT_FRAME_BYTES), _LONG_FRAME_BYTES)
        if self._plan.bandwidth is not None:
            step = min(step, int(self._plan.bandwidth * _MOMENT))
        return max(step, *(each.page_size for each in self._extents))

    def _send_runs(self, role: Role, channel: Channel, taken: Taken) -> None:
        """Send runs of one region: zeros by their places, the others with their bytes."""
        memory = self._memory[taken.region]
        page_size = memory.extent.page_size
        runs: list[tuple[int, int]] = []
        pieces: list[bytes] = []
        zeros: list[tuple[int, int]] = []
        if len(taken.runs) == 1 and channel.encoder.takes_what_changes:
            offset, length = taken.runs[0]
            view = memory.as_it_lies(offset, length) if length >= _WORTH_A_LOOK else None
            if view is not None:
                self._send(role, channel, Kind.PAGES, taken, view)
                self.figures.page_bytes += length
                return
        for offset, length in taken.runs:
            data = memory.read(offset, length)
            found, others = split(data, offset, page_size)
            if not found:
                runs.append((offset, length))
                pieces.append(data)
                continue
            zeros += found
            if others:
                view, at = memoryview(data), offset
                for start, size in (*found, (offset + length, 0)):
                    if at < start:
                        runs.append((at, start - at))
                        pieces.append(view[at - offset : start - offset].tobytes())
                    at = start + size
        for offset, length in zeros:
            self._send(role, channel, Kind.ZERO, Taken(taken.region, [(offset, length)]), b"")
            self.figures.zero_bytes += length
        if len(runs) == 1:
            self._send(role, channel, Kind.PAGES, Taken(taken.region, runs), pieces[0])
        elif runs:
            body = b"".join((wire.table(runs), *pieces))
            self._send(role, channel, Kind.BATCH, Taken(taken.region, runs), body, len(runs))
        self.figures.page_bytes += sum(map(len, pieces))

    def _send(
        self,
        role: Role,
        channel: Channel,
        kind: Kind,
        taken: Taken,
        body: wire.Part,
        span: int | None = None,
    ) -> None:
        """Send one frame, which is in doubt from here on.

        Args:
            role: Of the channel.
            channel: Where to.
            kind: What it is.
            taken: What has to be sent again if it does not land.
            body: Of the frame.
            span: Of the frame; by default that of its one run.
        """
        now = asyncio.get_running_loop().time()
        number = self._last_number = next(self._numbers)
        offset, length = taken.runs[0] if span is None else (0, span)
        before = channel.sent_bytes
        channel.send(
            channel.encoder.frame(
                kind, body, region=taken.region, number=number, offset=offset, span=length
            )
        )
        size = channel.sent_bytes - before
        self._in_doubt[role].add(number, taken, size, now)
        if self._plan.bandwidth is not None:
            self._due = max(self._due, now - _CATCH_UP) + size / self._plan.bandwidth

    async def _settle(self) -> None:
        """Wait for a line on which nothing is in doubt.

        One that has died meanwhile is noticed, and made anew, while the program runs.
        """
        await self._until(lambda: self._line.is_up and not any(self._in_doubt.values()))

    async def _tell_missing(self) -> bool:
        """Say what is missing so far, and wait until the destination has forgotten it.

        Returns:
            Whether it has: the line may have broken.
        """
        line = self._line
        await self._until(lambda: line.is_up)
        epoch = line.epoch
        if await self._send_missing(epoch):
            await self._until(lambda: not self._in_doubt[Role.BULK] or not self._is_line(epoch))
        return self._is_line(epoch)

    async def _send_missing(self, epoch: int) -> bool:
        """Say what will follow after the switch; say whether it is still that line."""
        channel = self._line.channels[Role.BULK]
        for region, runs in _tables(self._backlog.runs()):
            taken = Taken(region, [])  # nothing to be sent again
            self._send(Role.BULK, channel, Kind.MISSING, taken, wire.table(runs), len(runs))
            if not await self._room(channel, epoch):
                return False
        return self._is_line(epoch)

    async def _send_switch(self, epoch: int) -> None:
        """Say what is missing, and the state, and that the program may run."""
        channel = self._line.channels[Role.BULK]
        if not await self._send_missing(epoch):
            return
        state = self._state
        for at in range(0, len(state), wire.MAX_DATA):
            part = state[at : at + wire.MAX_DATA]
            channel.send(channel.encoder.frame(Kind.STATE, part, offset=at, span=len(state)))
            if not await self._room(channel, epoch):
                return
        self._send(Role.BULK, channel, Kind.SWITCH, Taken(0, []), b"", len(state))

    def _is_line(self, epoch: int) -> bool:
        return self._line.is_up and self._line.epoch == epoch

    async def _room(self, channel: Channel, epoch: int) -> bool:
        """Wait for the kernel to take more; say whether it is still that line."""
        await self._until(lambda: not channel.full or not self._is_line(epoch))
        return self._is_line(epoch)

    def _serve_demands(self) -> None:
        """Send what is waited for, the most urgent first, as far as the kernel takes it."""
        line = self._line
        in_doubt = self._in_doubt[Role.DEMAND]
        if self._serving is not None:
            self._serving.cancel()
            self._serving = None
        served = 0
        while self._demands and line.is_up and not line.channels[Role.DEMAND].full:
            if len(in_doubt) >= wire.MAX_DEMANDS:
                return  # until it says what has landed
            if served >= _SERVED_AT_ONCE:
                self._serving = asyncio.get_running_loop().call_soon(self._serve_demands)
                return
            _, _, frame = heapq.heappop(self._demands)
            region, offset, length = frame.region, frame.offset, frame.span
            served += length
            self._asked = asyncio.get_running_loop().time()
            self.figures.demand += 1
            self.figures.demand_bytes += length
            self._backlog.discard(region, offset, length)
            taken = Taken(region, [(offset, length)])
            try:
                self._send_runs(Role.DEMAND, line.channels[Role.DEMAND], taken)
            except SourceError as error:
                self._put_back(taken)
                self._error = self._error or error
                self._changed.set()
                return
            self._backlog.near(region, offset + length)

    def _put_back(self, taken: Taken) -> None:
        """Take note that what was taken out of the backlog could not be sent."""
        self._backlog.add_runs((taken.region, *run) for run in taken.runs)

    # --- what comes ----------------------------------------------------------------------

    def _hello(self, role: Role, epoch: int) -> dict[str, Any]:
        if role is Role.DEMAND:
            # They are asked again, on this very connection, maybe before the other one stands.
            self._demands.clear()
        hello: dict[str, Any] = {"role": role.value, "token": self._token, "epoch": epoch}
        if not self._token:
            plan = self._plan
            offered = [wire.CHECKSUMS] * plan.checksums + [PRECOPY] * bool(plan.rounds)
            if plan.compress:
                if plan.compress not in packing.available():
                    packing.codec(plan.compress)  # says what is missing
                offered.append(plan.compress)
            self._offered = frozenset(offered)
            hello |= {
                "name": self._name,
                "regions": [each._asdict() for each in self._extents],
                "features": offered,
            }
        return hello

    def _prepare(self, channel: Channel, welcome: dict[str, Any]) -> None:
        """Do on a connection what was agreed on."""
        if self._features is None:
            features, token = welcome.get("features"), welcome.get("token")
            if not wire.are_features(features):
                raise PeerError("welcomed us without a list of features")
            if not isinstance(token, str) or not 0 < len(token) <= wire.MAX_TOKEN:
                raise PeerError("welcomed us without a token to come back by")
            if not set(features) <= self._offered:
                raise PeerError(f"agrees to what was not offered: {str(features)[:80]}")
            most_state = welcome.get("most_state")
            if not isinstance(most_state, int) or most_state < 0:
                raise PeerError("welcomed us without saying how long a state may be")
            self._features, self._token, self._most_state = set(features), token, most_state
        channel.decoder.regions = self._extents
        if wire.CHECKSUMS in self._features:
            channel.encoder.checked = channel.decoder.checked = True
        if self._plan.compress in self._features:
            channel.encoder.compress_by(self._plan.compress, packing.codec(self._plan.compress)[0])

    def _on_change(self) -> None:
        """The line has come, is gone, or takes more again."""
        self._serve_demands()
        self._changed.set()

    def _on_up(self, welcome: dict[str, Any]) -> None:
        """Take up where the last line broke: what did not land goes again."""
        landed = welcome.get("landed")
        for role, in_doubt in self._in_doubt.items():
            number = landed.get(role.value) if isinstance(landed, dict) else None
            if not isinstance(number, int) or not 0 <= number <= self._last_number:
                raise PeerError("welcomed us without saying which of our frames have landed")
            for _ in in_doubt.landed(number):
                pass
            for taken in in_doubt.give_back():
                for offset, length in taken.runs:
                    self.figures.again_bytes += self._backlog.add(taken.region, offset, length)
        self._flow = Flow()
        self._copies_there = bool(self._round) and welcome.get("stage") == Stage.COPYING.value
        if welcome.get("stage") in [Stage.FOLLOWING.value, Stage.DONE.value]:  # it may be anything
            if self.stage is not Stage.SWITCHING and not self._running_there:
                raise PeerError("says that the program runs there, where we have not let it")
            self._note_running()
        if welcome.get("stage") == Stage.DONE.value:
            self._is_there = True

    async def _take(self, role: Role, frame: Frame) -> None:
        kind = frame.kind
        if kind is Kind.ACK:
            if frame.number > self._last_number:
                raise PeerError(f"says that frame {frame.number} landed, which was not sent")
            now = asyncio.get_running_loop().time()
            for size, when in self._in_doubt[role].landed(frame.number):
                if role is Role.BULK:
                    self._flow.note(size, when, now)
            if self._demands:
                self._serve_demands()
            self._changed.set()
        elif role is Role.BULK:
            raise PeerError(f"sent a {kind.name} on the connection for bulk")
        elif kind is Kind.DEMAND:
            if self.stage not in {Stage.SWITCHING, Stage.FOLLOWING, Stage.DONE}:
                raise PeerError("asks for memory before the switch")
            if len(self._demands) >= wire.MAX_DEMANDS:
                raise PeerError(f"has {wire.MAX_DEMANDS} demands waiting, and asks for more")
            heapq.heappush(self._demands, (-frame.number, next(self._numbers), frame))
            if self._serving is None:  # else they have their turn with the others
                self._serve_demands()
        elif kind is Kind.RUNNING:
            if self.stage not in {Stage.SWITCHING, Stage.FOLLOWING}:
                raise PeerError("says that the program runs there, where we have not let it")
            self._note_running()
        elif kind is Kind.DONE:
            # RUNNING may have been lost; DONE follows a welcome before its line is complete.
            if self.stage not in {Stage.SWITCHING, Stage.FOLLOWING}:
                raise PeerError("says that all is there, where we have not let it run")
            self._note_running()
            self.destination = told_by_destination(frame.json())
            self._is_there = True
            self._changed.set()
        elif kind is Kind.PROGRESS:
            self.destination = told_by_destination(frame.json())
        else:
            raise PeerError(f"sent a second {kind.name}")

    def _note_running(self) -> None:
        if not self._running_there:
            self._running_there = True
            loop = asyncio.get_running_loop()
            self.figures.downtime = loop.time() - self._stopped_at
        self._changed.set()

    # --- figures -------------------------------------------------------------------------

    def _note_line(self) -> None:
        self.figures.sent_bytes = self._line.sent_bytes
        self.figures.connections = self._line.made
        self.figures.disconnected = self._line.away

    def _tell_progress(self) -> None:
        """Tell the other side, for people."""
        if self._line.is_up:
            self._line.channels[Role.DEMAND].send_json(
                Kind.PROGRESS,
                {
                    "stage": self.stage.value,
                    "round": self._round,
                    "left_bytes": self._backlog.bytes,
                    "dirty_rate": self.dirty_rate,
                },
            )

    def _take_sample(self) -> None:
        self._note_line()
        self.figures.sample(
            Sample(
                asyncio.get_running_loop().time() - self._began,
                self.stage.value,
                self.figures.sent_bytes,
                self.figures.page_bytes,
                self.figures.zero_bytes,
                self._backlog.bytes,
                self.dirty_rate,
                self.figures.demand,
            )
        )
        if self._on_progress is not None:
            self._on_progress(self)

    async def _sample(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                self._take_sample()
                await asyncio.sleep(_SAMPLE)


def _tables(
    runs: Iterable[tuple[int, int, int]],
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Cut (region, offset, length) runs into tables, each of one region, that fit into a frame."""
    for region, group in itertools.groupby(runs, lambda run: run[0]):
        pieces = (
            (at, min(wire.MAX_SPAN, offset + length - at))
            for _, offset, length in group
            for at in range(offset, offset + length, wire.MAX_SPAN)
        )
        while table := list(itertools.islice(pieces, wire.MAX_RUNS)):
            yield region, table
