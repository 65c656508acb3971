"""The helper process of a harness: reads every fault, decides, and does it.

Knows: userfaultfds, the engine's decisions, time limits, and what the test process orders.
Must not know: pytest, asyncio, what the memory is for.

It is a process of its own so that no GIL can stop it: whatever the test process is stuck in,
touches are read here, time limits pass here, and threads are let go.

Laws of this file:

* Messages are read and all of them taken in before any page is filled: who else stands at the
  page is known before somebody is woken there.
* Every touch ends: let through, failed as ordered, or let go at its time limit.
* An order is answered at once; nothing here waits for the test process.
* What goes wrong is told to the test process, whose test then fails; it is never only logged.
* When the test process has gone, memory that others still have is poisoned before the last
  descriptor goes, so that they see an error and no zeros.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import mmap
import os
import random
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ..errors import RangeGone, ResolutionRefused, TargetGone, UffdError
from ..events import WP, WRITE, Forked, RawFault
from ..fds import OwnedFd
from ..kernel import abi, pagemap, tracing
from ..uffd import Mode, Userfaultfd
from . import latency
from .channel import Channel, Message
from .engine import Engine, Standing, wire
from .pages import Mapping, Memory
from .rules import Rule
from .stepping import Stepper
from .where import Places

if TYPE_CHECKING:
    from collections.abc import Iterable

_PING_NS: Final = 15_000_000  # without an answer that long, the GIL is held
_RETURN_NS: Final = (
    1_000_000_000  # a thread that has left the trampoline and not come back has passed
)
_PARKS: Final = 3  # attempts to have one thread wait in the trampoline
_DUMP_NS: Final = 300_000_000  # for the stacks to be written down
_TOUCHES: Final = 500  # in one message
_MADV_DONTNEED: Final = 4


class Source:
    """One userfaultfd: that of a process's memory."""

    __slots__ = ("mappings", "process", "uffd")

    def __init__(self, uffd: Userfaultfd, process: int) -> None:
        self.uffd = uffd
        self.process = process
        self.mappings: list[Mapping] = []

    def find(self, address: int) -> Mapping | None:
        """Give the mapping in which an address lies."""
        for mapping in self.mappings:
            if mapping.address <= address < mapping.end:
                return mapping
        return None


class Service:
    """All that one harness has asked for.

    Sharing: one thread.
    """

    def __init__(self, commands: Channel, events: Channel, process: int) -> None:
        """Serve the harness at the other ends of two channels.

        Args:
            commands: Orders come here and are answered.
            events: What happens is told here.
            process: The test process.
        """
        self._commands = commands
        self._events = events
        self._process = process
        self._engine = Engine()
        self._stepper = Stepper()
        self._places = Places()
        self._random = random.Random()  # noqa: S311 - latencies are no secrets
        self._sources: list[Source] = []
        self._memories: dict[int, Memory] = {}
        self._inbox: deque[tuple[Source, RawFault]] = deque()
        self._ready: deque[Standing] = deque()
        self._deferred: list[Standing] = []  # their page is being discarded
        self._timers: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._backlog: deque[Message] = deque()
        self._selector = selectors.SelectSelector()  # whose time limits have microseconds
        self._running = True
        # how threads of the test process are held
        self._timeout_ns = 10_000_000_000
        self._door = 0  # the trampoline's signal
        self._trampoline = "auto"
        self._holds_gil: set[int] = set()
        self._pings = 0
        self._pongs = 0
        self._dump_fd = -1
        self._dump_signal = 0
        self._dumping = False
        self._pagemap = pagemap.open_pagemap(process)
        self._trace = tracing.can_trace()

    # --- the loop ----------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the harness closes, or its process ends."""
        wakeup, waker = socket.socketpair()
        for sock in (wakeup, waker):
            sock.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        pidfd = os.pidfd_open(self._process)
        self._events.sock.setblocking(False)
        self._watch(self._commands.fileno(), self._on_command)
        self._watch(self._events.fileno(), self._on_event)
        self._watch(pidfd, self._stop)
        self._watch(wakeup.fileno(), lambda: self._on_child(wakeup))
        try:
            while self._running:
                for key, _ in self._selector.select(self._pause()):
                    key.data()
                self._take_in()
                self._run_timers()
                self._perform_ready()
        finally:
            signal.set_wakeup_fd(-1)
            self._leave()
            os.close(pidfd)
            os.close(self._pagemap)
            wakeup.close()
            waker.close()
            self._selector.close()

    def _watch(self, fd: int, callback: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def _pause(self) -> float | None:
        if self._ready or self._inbox:
            return 0
        if not self._timers:
            return None
        return max(0.0, (self._timers[0][0] - time.monotonic_ns()) / 1e9)

    def _after(self, delay_ns: int, callback: Callable[[], None]) -> None:
        when = time.monotonic_ns() + delay_ns
        heapq.heappush(self._timers, (when, next(self._numbers), callback))

    def _run_timers(self) -> None:
        now = time.monotonic_ns()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()

    def _stop(self) -> None:
        self._running = False

    def _on_child(self, wakeup: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            wakeup.recv(4096)
        self._stepper.poll()

    def _leave(self) -> None:
        """End: nobody is left standing, and nobody reads zeros that were something else."""
        for touch in list(self._engine.standing.values()):
            self._let_go(touch, "passed")
        self._perform_ready()
        for memory in self._memories.values():
            self._settle(memory, memory.mappings)
            memory.close()
        for source in self._sources:
            source.uffd.close()

    def _settle(self, memory: Memory, mappings: Iterable[Mapping]) -> None:
        """Poison what is absent, where somebody may still touch it."""
        for mapping in mappings:
            with contextlib.suppress(UffdError):
                for page in range(mapping.first, mapping.first + mapping_pages(mapping)):
                    if page not in mapping.contents.present:
                        with contextlib.suppress(RangeGone):
                            memory.poison(mapping, page, wake=True)

    # --- talking -----------------------------------------------------------------------

    def _tell(self, *message: Any) -> None:
        """Tell the test process something, now or when it reads again."""
        self._backlog.append(message)
        self._flush()

    def _flush(self) -> None:
        while self._backlog:
            try:
                self._events.send(self._backlog[0])
            except BlockingIOError:
                self._after(1_000_000, self._flush)
                return
            except OSError:
                self._running = False
                return
            self._backlog.popleft()

    def _on_command(self) -> None:
        received = self._commands.receive()
        if received is None:
            self._running = False
            return
        (name, *arguments), fds = received
        try:
            answer: Message = ("ok", getattr(self, f"do_{name}")(*arguments, *map(OwnedFd, fds)))
        except (UffdError, OSError, ValueError) as error:
            answer = ("error", type(error).__name__, str(error))
        self._perform_ready()
        with contextlib.suppress(BrokenPipeError):
            self._commands.send(answer)

    def _on_event(self) -> None:
        try:
            received = self._events.receive()
        except BlockingIOError:
            return
        if received is None:
            self._running = False
            return
        match received[0]:
            case ("pong", number):
                self._pongs = max(self._pongs, number)
            case ("parked", thread):
                self._parked(thread)
            case ("interrupted", thread):
                if (touch := self._engine.standing.get((self._process, thread))) is not None:
                    self._let_go(touch, "passed")

    # --- orders ------------------------------------------------------------------------

    def do_begin(
        self,
        timeout: float,
        seed: int,
        trampoline: str,
        door: int,
        dump_signal: int,
        uffd: OwnedFd,
        dump: OwnedFd,
    ) -> str | None:
        """Take over the userfaultfd of the test process; say why threads cannot be stepped."""
        self._timeout_ns = int(timeout * 1e9)
        self._random.seed(seed)
        self._trampoline = trampoline
        self._door = door
        self._dump_signal = dump_signal
        self._dump_fd = dump.detach()
        self._add_source(Userfaultfd.adopt(uffd), self._process)
        return self._trace

    def do_timeout(self, timeout: float) -> None:
        """Change how long a thread may stand."""
        self._timeout_ns = int(timeout * 1e9)

    def do_region(
        self,
        number: int,
        page_size: int,
        pages: int,
        kind: str,
        address: int,
        memfd: OwnedFd | None = None,
    ) -> None:
        """Watch a region of the test process's memory."""
        memory = Memory(
            number,
            page_size,
            pages,
            kind,
            memfd.detach() if memfd is not None else None,
            self._pump,
        )
        source = self._sources[0]
        modes = Mode.MISSING | Mode.WP | (Mode.MINOR if memory.shared else 0)
        source.uffd.register(address, page_size * pages, modes)
        self._engine.add_region(number, page_size, pages)
        self._memories[number] = memory
        source.mappings.append(memory.add(self._process, source.uffd, address))

    def do_program_region(
        self, number: int, process: int, address: int, length: int, offset: int, uffd: OwnedFd
    ) -> None:
        """Watch a region in another program, which has handed over its own userfaultfd."""
        memory = self._memories[number]
        source = self._add_source(Userfaultfd.adopt(uffd), process)
        source.mappings.append(
            memory.add(
                process, source.uffd, address, length=length, first=offset // memory.page_size
            )
        )

    def do_close_region(self, number: int, keep: bool) -> None:
        """Watch a region no more; who stands there goes on.

        Args:
            number: Which.
            keep: Somebody goes on using it: fill what is absent.
        """
        for touch in list(self._engine.standing.values()):
            if touch.region == number:
                self._let_go(touch, "passed")
        self._engine.forget_region(number)
        self._perform_ready()
        memory = self._memories.pop(number)
        own, others = memory.mappings[0], memory.mappings[1:]
        if keep:
            for page in range(memory.pages):
                memory.fill(own, page, protect=False, wake=True)
        self._settle(memory, others)
        with contextlib.suppress(ResolutionRefused):
            own.uffd.unregister(own.address, memory.page_size * memory.pages)
        for source in self._sources:
            source.mappings = [m for m in source.mappings if m.memory is not memory]
        for source in [s for s in self._sources[1:] if not s.mappings]:
            self._drop_source(source)
        memory.close()

    def do_arm(self, rule: tuple[Any, ...]) -> None:
        """Have a rule."""
        self._engine.arm(Rule.from_wire(rule))

    def do_disarm(self, number: int) -> None:
        """Drop a rule, and let go whoever stands because of it."""
        for touch in self._engine.disarm(number):
            touch.freeze = 0
            self._let_go(touch, "frozen")

    def do_release(self, number: int) -> bool:
        """Let a standing thread go on; say whether it stood."""
        for touch in self._engine.standing.values():
            if touch.number == number and touch.freeze:
                self._engine.spend(touch.freeze)
                self._let_go(touch, "frozen")
                return True
        return False

    def do_leave(self, number: int, first: int, count: int) -> list[int]:
        """Take pages away, their bytes kept: the first half.

        Returns:
            The private pages that the caller now has to discard; ``do_left`` follows.
        """
        memory = self._memories[number]
        mapping = memory.mappings[0]
        going = [p for p in range(first, first + count) if p in mapping.contents.present]
        if memory.shared:
            for page in going:
                memory.take_away(mapping, page, _never)
            return []
        for page in going:
            mapping.contents.store[page] = memory.begin_leaving(mapping, page)
            mapping.contents.leaving.add(page)
        return going

    def do_left(self, number: int, pages: list[int]) -> None:
        """Note that private pages were discarded."""
        mapping = self._memories[number].mappings[0]
        for page in pages:
            mapping.contents.leaving.discard(page)
            mapping.memory.left(mapping, page, mapping.contents.store[page])
        self._ready.extend(self._deferred)
        self._deferred.clear()

    def do_peek(self, number: int, offset: int, length: int) -> bytes:
        """Read without a touch."""
        memory = self._memories[number]
        return memory.read(memory.mappings[0], offset, length)

    def do_poke(self, number: int, offset: int, data: bytes) -> None:
        """Write without a touch."""
        memory = self._memories[number]
        memory.write(memory.mappings[0], offset, data)

    def do_touches(self, after: int) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]], bool]:
        """Give touches that were written down after the first ``after``, and who stands.

        Returns:
            Both, and whether there are more to ask for.
        """
        now = time.monotonic_ns()
        written = self._engine.written[after : after + _TOUCHES]
        if after + len(written) < len(self._engine.written):
            return written, [], True
        return written, [wire(touch, now) for touch in self._engine.standing.values()], False

    def do_standing(self) -> list[tuple[tuple[Any, ...], int, str]]:
        """Give who stands: the touch, the freeze's number, what holds it."""
        now = time.monotonic_ns()
        return [
            (wire(t, now), t.freeze, t.held_by) for t in self._engine.standing.values() if t.held_by
        ]

    def do_count(self) -> int:
        """Give how many touches there were, kept or not."""
        return self._engine.count

    def do_settle(self, number: int) -> None:
        """Tell a number, behind all that was told before."""
        self._tell("settled", number)

    def do_close(self) -> None:
        """End after this answer."""
        self._running = False

    # --- messages in -------------------------------------------------------------------

    def _add_source(self, uffd: Userfaultfd, process: int) -> Source:
        source = Source(uffd, process)
        uffd.claim_reader()
        self._sources.append(source)
        self._watch(uffd.fileno(), lambda: self._read(source))
        return source

    def _drop_source(self, source: Source) -> None:
        self._selector.unregister(source.uffd.fileno())
        self._sources.remove(source)
        source.uffd.close()

    def _pump(self) -> None:
        for source in list(self._sources):
            self._read(source)

    def _read(self, source: Source) -> None:
        while messages := source.uffd.read():
            for message in messages:
                if isinstance(message, RawFault):
                    self._inbox.append((source, message))
                elif isinstance(message, Forked):
                    self._add_child(source, message.fd)

    def _add_child(self, parent: Source, fd: OwnedFd) -> None:
        """Watch a forked child's memory too; its process id is known once it touches some."""
        source = self._add_source(Userfaultfd.adopt(fd), 0)
        for mapping in parent.mappings:
            source.mappings.append(
                mapping.memory.add(
                    0,
                    source.uffd,
                    mapping.address,
                    like=mapping,
                    length=mapping.end - mapping.address,
                    first=mapping.first,
                )
            )

    def _take_in(self) -> None:
        while self._inbox:
            source, fault = self._inbox.popleft()
            self._arrive(source, fault)

    def _arrive(self, source: Source, fault: RawFault) -> None:
        mapping = source.find(fault.address)
        if mapping is None:
            return  # a region that was closed meanwhile; unregistering has woken its threads
        thread = fault.thread_id
        if not source.process:
            source.process = _process_of(thread)
            for each in source.mappings:
                each.process = source.process
        memory = mapping.memory
        offset = mapping.offset_of(fault.address)
        page = offset // memory.page_size
        touch = self._engine.repeated(source.process, thread, memory.number, page)
        if touch is not None:
            self._repeat(touch)
            return
        stale = self._engine.standing.get((source.process, thread))
        if stale is not None:  # it went on by itself: its page came for somebody else
            self._end(stale, stale.outcome or "passed")
        try:
            system_call, pc = tracing.in_system_call(source.process, thread)
        except OSError:
            system_call, pc = None, 0
        touch = self._engine.arrive(
            process=source.process,
            thread=thread,
            region=memory.number,
            offset=offset,
            access="write" if fault.flags & (WRITE | WP) else "read",
            mapping=mapping,
            time_ns=time.monotonic_ns(),
            system_call=system_call,
            pc=pc,
            where=self._places.name(source.process, pc),
        )
        if touch.delay:
            seconds = sum(latency.from_wire(d).sample(self._random) for d in touch.delay)
            touch.held_by = "page"
            self._after(int(seconds * 1e9), lambda: self._go_on(touch))
        else:
            self._go_on(touch)

    def _repeat(self, touch: Standing) -> None:
        """A thread faults again where it stands: back from the trampoline, or after a signal."""
        if touch.returning:
            touch.returning = touch.parked = False
            touch.held_by = ""
            self._ready.append(touch)
        elif touch.held_by == "trampoline":
            # It has no stack or recursion left for the handler.  No pure Python can help that.
            touch.held_by = "page"
            touch.parked = False
            touch.parks += 1
            if touch.parks < _PARKS:
                self._park(touch)

    def _go_on(self, touch: Standing) -> None:
        """After its latency: stop it, or let it through."""
        if touch.freeze:
            self._hold(touch)
        else:
            self._let_go(touch, "")

    # --- threads stand -----------------------------------------------------------------

    def _hold(self, touch: Standing) -> None:
        touch.held_by = "page"
        touch.outcome = "frozen"
        self._tell("frozen", touch.freeze, wire(touch, time.monotonic_ns()))
        self._after(self._timeout_ns, lambda: self._on_limit(touch))
        if (
            touch.process == self._process
            and touch.system_call is None
            and self._trampoline != "never"
            and self._door
        ):
            if self._trampoline == "always" or touch.thread in self._holds_gil:
                self._park(touch)
            else:
                self._pings += 1
                number = self._pings
                self._tell("ping", number)
                self._after(_PING_NS, lambda: self._on_silence(touch, number))

    def _stands(self, touch: Standing) -> bool:
        return self._engine.standing.get((touch.process, touch.thread)) is touch and bool(
            touch.held_by
        )

    def _on_silence(self, touch: Standing, number: int) -> None:
        if self._pongs < number and self._stands(touch) and touch.held_by == "page":
            self._holds_gil.add(touch.thread)
            self._park(touch)

    def _park(self, touch: Standing) -> None:
        """Have a thread that holds the GIL wait in the trampoline, where the GIL is free."""
        try:
            tracing.tgkill(self._process, touch.thread, self._door)
        except ProcessLookupError:
            return
        # Taken for parked from here on: its wait in the kernel is broken off.
        touch.held_by = "trampoline"

    def _parked(self, thread: int) -> None:
        touch = self._engine.standing.get((self._process, thread))
        if touch is None or not touch.held_by:
            self._tell("go", thread)
            return
        if touch.returning:  # let go meanwhile
            self._send_back(touch)
            return
        touch.held_by = "trampoline"
        touch.parked = True
        self._tell("held", touch.number, "trampoline")

    def _on_limit(self, touch: Standing) -> None:
        """Nobody has released a thread in time: show the stacks, and let it go."""
        if not self._stands(touch) or touch.overdue:
            return
        touch.overdue = True
        if not self._dumping:
            self._dumping = True
            self._dump_stacks()
            self._after(_DUMP_NS, self._on_dumped)

    def _dump_stacks(self) -> None:
        """Have the test process's interpreter write down its stacks, for which it needs no GIL."""
        if self._dump_fd < 0 or not self._dump_signal:
            return
        os.ftruncate(self._dump_fd, 0)
        os.lseek(self._dump_fd, 0, os.SEEK_SET)  # one open file with the test process
        # A thread in a system call that stands would take the signal after it only.
        standing = {t.thread for t in self._engine.standing.values() if t.system_call is not None}
        for thread in _threads_of(self._process):
            if thread not in standing:
                with contextlib.suppress(OSError):
                    tracing.tgkill(self._process, thread, self._dump_signal)
                    return

    def _on_dumped(self) -> None:
        self._dumping = False
        text = ""
        if self._dump_fd >= 0:
            text = os.pread(self._dump_fd, 64 * 1024, 0).decode(errors="replace")
        now = time.monotonic_ns()
        late = [t for t in self._engine.standing.values() if t.overdue]
        self._tell("overdue", [(wire(t, now), t.freeze, t.held_by) for t in late], text)
        rules = {touch.freeze for touch in late}
        for touch in late:
            self._let_go(touch, "overdue")
        for rule in rules:  # or the next touch would stand as long again
            self.do_disarm(rule)

    # --- threads go on -----------------------------------------------------------------

    def _let_go(self, touch: Standing, outcome: str) -> None:
        """Have a touch made, as soon as its thread stands before it."""
        if touch.returning or touch in self._ready:
            return
        touch.freeze = 0
        if not outcome:
            outcome = "passed"
            if touch.delay:
                outcome = "delayed"
            elif touch.values:
                outcome = "changed"
        touch.outcome = "failed" if touch.failing else outcome
        if touch.parked:
            self._send_back(touch)
        elif touch.held_by == "trampoline":
            # On its way there: a step now would be one of the handler's instructions.
            touch.returning = True
        else:
            touch.held_by = ""
            self._ready.append(touch)

    def _send_back(self, touch: Standing) -> None:
        """Have a thread leave the trampoline and make its access."""
        self._tell("go", touch.thread)
        if self._is_open(touch):
            self._end(touch, touch.outcome)
        else:  # it will fault again
            touch.returning = True
            self._after(_RETURN_NS, lambda: self._on_return(touch))

    def _is_open(self, touch: Standing) -> bool:
        """Say whether the access of a thread of the test process would not fault now."""
        address = touch.mapping.address_of(touch.page)
        entry = pagemap.entries(self._pagemap, address, mmap.PAGESIZE)[0]
        return bool(entry & abi.PM_PRESENT) and (
            touch.access == "read" or not entry & abi.PM_UFFD_WP
        )

    def _on_return(self, touch: Standing) -> None:
        """A thread has not faulted again: its page was there for the moment that it took."""
        if touch.returning and self._stands(touch):
            self._end(touch, touch.outcome)

    def _pass_returning(self, touch: Standing, *, woken: bool) -> None:
        """Note that a page which is there to stay is there for who comes from the trampoline too.

        Who had faulted before the page came has said so by now, unless it was woken.
        """
        if not woken:
            self._pump()
            self._take_in()
        for other in self._engine.returning(touch):
            if touch.access == "write" or other.access == "read":
                self._end(other, other.outcome)

    def _end(self, touch: Standing, outcome: str) -> None:
        touch.returning = False
        self._engine.end(touch, outcome, time.monotonic_ns())
        self._tell("ended", touch.number, outcome)

    def _perform_ready(self) -> None:
        while self._ready:
            self._take_in()
            touch = self._ready.popleft()
            try:
                self._perform(touch)
            except (RangeGone, TargetGone):
                self._end(touch, touch.outcome)  # unmapped, or its process has ended
            except (UffdError, OSError) as error:
                self._tell("trouble", f"page {touch.page}: {error}")
                self._end(touch, touch.outcome)
                with contextlib.suppress(UffdError):
                    touch.mapping.memory.poison(touch.mapping, touch.page, wake=True)

    def _perform(self, touch: Standing) -> None:
        """Make the page accessible for this touch, and see to it that the next one shows."""
        mapping: Mapping = touch.mapping
        memory, page = mapping.memory, touch.page
        if page in mapping.contents.leaving:
            self._deferred.append(touch)
            return
        for start, value in touch.values:
            memory.write(mapping, start, value)
        if touch.failing:
            self._fail(touch, mapping)
            return
        protect = touch.access == "read"
        after: Callable[[], None] | None = None
        if self._trace is None and self._engine.sees_more(touch):

            def after() -> None:
                memory.take_away(mapping, page, lambda *at: self._discard(touch.thread, *at))

        def let(wake: bool) -> None:
            memory.fill(mapping, page, protect=protect, wake=wake)

        woken = self._let(touch, let, after)
        self._end(touch, touch.outcome)
        if after is None:
            self._pass_returning(touch, woken=woken)

    def _let(
        self, touch: Standing, let: Callable[[bool], None], after: Callable[[], None] | None
    ) -> bool:
        """Let one thread make its access; say whether everybody there was woken for it."""
        alone = not any(True for _ in self._engine.others(touch))
        if self._trace is not None or (after is None and alone):
            let(True)
            return True
        try:
            self._stepper.over(
                touch.process,
                touch.thread,
                in_call=touch.system_call is not None,
                let=let,
                after=after,
            )
        except ProcessLookupError:
            let(True)
            return True
        except PermissionError as error:
            self._tell("trouble", f"thread {touch.thread} cannot be stepped over: {error}")
            let(True)
            return True
        return False

    def _fail(self, touch: Standing, mapping: Mapping) -> None:
        memory, page = mapping.memory, touch.page

        def discard(address: int, length: int) -> None:
            self._discard(touch.thread, address, length)

        def let(wake: bool) -> None:
            memory.take_away(mapping, page, discard)
            memory.poison(mapping, page, wake=wake)

        def heal() -> None:
            memory.fill(mapping, page, protect=True, wake=True)

        self._let(touch, let, heal if touch.once else None)
        self._end(touch, "failed")

    def _discard(self, thread: int, address: int, length: int) -> None:
        """Drop a private page of a thread that stands still, by a call made in its name."""
        arguments = (address, length, _MADV_DONTNEED)
        if (error := tracing.call_in(thread, abi.NR_MADVISE, *arguments)) < 0:
            raise OSError(-error, os.strerror(-error), "madvise")


def mapping_pages(mapping: Mapping) -> int:
    """Say how many pages are mapped."""
    return (mapping.end - mapping.address) // mapping.memory.page_size


def _never(address: int, length: int) -> None:
    raise AssertionError(f"shared memory at {address:#x} is not discarded page by page ({length})")


def _process_of(thread: int) -> int:
    """Give the process of a thread; the thread's own number where that cannot be told."""
    try:
        with open(f"/proc/{thread}/status", encoding="ascii", errors="replace") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Tgid:"))
    except OSError:
        return thread


def _threads_of(process: int) -> list[int]:
    try:
        return sorted(map(int, os.listdir(f"/proc/{process}/task")))
    except OSError:
        return []


def main() -> None:
    """Serve one harness: the arguments are both sockets' numbers and the test process's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the test's; we end with it
    commands, events, process = map(int, sys.argv[1:4])
    Service(
        Channel(socket.socket(fileno=commands)), Channel(socket.socket(fileno=events)), process
    ).run()
