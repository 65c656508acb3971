"""The helper process of a harness: reads every fault, decides, and does it.

Knows: what the test process orders, and how the parts of the helper work together.
Must not know: pytest, asyncio, what the memory is for.

It is a process of its own so that no GIL can stop it: whatever the test process is stuck in,
touches are read here, time limits pass here, and threads are let go.

A fault goes this way: ``watching`` reads it, ``Service._arrive`` makes a touch of it,
``engine`` decides; then it is delayed, or ``holding`` has its thread stand; and in the end
``performing`` lets it through.

Laws of this file:

* An order is answered at once; nothing here waits for the test process.
* What goes wrong is told to the test process, whose test then fails; it is never only logged.
* When the test process has gone, memory that others still have is poisoned before the last
  descriptor goes, so that they see an error and no zeros.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterable
from functools import partial
from typing import Any, Final

from ..errors import ClosedError, RangeGone, ResolutionRefused, TargetGone, UffdError
from ..events import WP, WRITE, RawFault
from ..fds import OwnedFd
from ..uffd import Mode, Userfaultfd
from . import latency
from .announcements import Announcement, Announcements
from .channel import Channel, Message, fitting
from .engine import Engine, Standing, wire
from .holding import Holder
from .pages import Mapping, Memory
from .participants import Participants
from .performing import Performer, drop
from .rules import Kind, Rule
from .turning import Teller, Turning
from .watching import Source, Watch, has_ended
from .where import Calls, Places

_INNER_NS: Final = 1_000_000  # until a touch is looked at again that another one is within
_TOUCHES: Final = 500  # in one message


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

        Raises:
            OSError: It has ended.
        """
        self._pidfd = os.pidfd_open(process)
        self._commands = commands
        self._events = events
        self._process = process
        self._turning = Turning()
        self._tell = Teller(events, self._turning)
        self._engine = Engine()
        self._calls = Calls()
        self._places = Places()
        self._random = random.Random()  # noqa: S311 - latencies are no secrets
        self._watch = Watch(self._turning, self._on_gone)
        self._announcements = Announcements(
            self._turning, loaded=self._watch.sweep, mapped=self._on_mapped
        )
        self._memories: dict[int, Memory] = {}
        self._performer = Performer(
            process,
            self._engine,
            self._turning,
            self._tell,
            pump=self._watch.pump,
            take_in=self._take_in,
            unread=self._watch.unread,
        )
        self._holder: Holder | None = None  # from ``do_begin`` on
        self._stays = False

    # --- beginning and end -------------------------------------------------------------

    def run(self) -> bool:
        """Serve until the harness closes, or its process ends.

        Returns:
            Whether another harness may be served: nothing is left of this one.
        """
        wakeup, waker = socket.socketpair()
        for sock in (wakeup, waker, self._events.sock):
            sock.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        self._turning.watch(self._commands.fileno(), self._on_command)
        self._turning.watch(self._pidfd, self._turning.stop)
        self._turning.watch(wakeup.fileno(), lambda: self._on_child(wakeup))
        try:
            self._turning.run(self._turn)
        finally:
            signal.set_wakeup_fd(-1)
            self._leave()
            os.close(self._pidfd)
            wakeup.close()
            waker.close()
            self._turning.close()
        # A thread that is still being stepped over is let go by our end, and by nothing else.
        return self._stays and not len(self._performer.stepper) and self._tell.last("closed")

    def _turn(self) -> None:
        self._take_in()
        self._performer.perform()

    def _take_in(self) -> None:
        self._watch.take_in(self._arrive)

    def _read_and_take_in(self) -> None:
        self._watch.pump()
        self._take_in()

    def _on_child(self, wakeup: socket.socket) -> None:
        """A thread has stopped for the stepper."""
        with contextlib.suppress(BlockingIOError):
            wakeup.recv(4096)
        self._performer.poll()

    def _leave(self) -> None:
        """End: nobody is left standing, and nobody reads zeros that were something else."""
        for touch in self._engine.all_standing():
            self._performer.let_go(touch)
        self._performer.perform()
        for number, memory in list(self._memories.items()):
            try:
                self.do_close_region(number)
            except (UffdError, OSError):  # the test process has ended
                _poison_absent(memory, memory.mappings)
                memory.close()
        self._watch.close()
        self._announcements.close()
        self._performer.close()
        self._calls.close()
        if self._holder is not None:
            if self._holder.participants is not None:
                self._holder.participants.close()
            self._holder.close()

    # --- talking -----------------------------------------------------------------------

    def _on_command(self) -> None:
        received = self._commands.receive()
        if received is None:
            self._turning.stop()
            return
        (number, name, *arguments), fds = received
        answer: Message
        try:
            value = getattr(self, f"do_{name}")(*arguments, *map(OwnedFd, fds))
            answer = (number, "ok", value)
        except Exception as error:  # whatever it is: the other regions are served on
            text = str(error)
            if not isinstance(error, (UffdError, OSError, ValueError)):
                text = f"{name} failed in the helper process: {error!r}"
            answer = (number, "error", type(error).__name__, text)
        self._performer.perform()
        with contextlib.suppress(BrokenPipeError):
            try:
                self._commands.send(answer)
            except ValueError as error:  # too long
                self._commands.send((number, "error", type(error).__name__, str(error)))

    def _on_event(self) -> None:
        try:
            received = self._events.receive()
        except BlockingIOError:
            return
        if received is None:
            self._turning.stop()
            return
        assert self._holder is not None
        match received[0]:
            case ("pong", number):
                self._holder.pong(number)
            case ("dumped", number):
                self._holder.dumped(number)
            case ("parked", thread):
                self._holder.parked(thread)
            case ("interrupted", thread):
                if (touch := self._engine.standing.get((self._process, thread))) is not None:
                    self._performer.let_go(touch)

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
        self._random.seed(seed)
        self._watch.add(Userfaultfd.adopt(uffd), self._process)
        self._holder = Holder(
            self._process,
            self._engine,
            self._turning,
            self._tell,
            trampoline=trampoline,
            door=door,
            timeout_ns=int(timeout * 1e9),
            dump_fd=dump.detach(),
            dump_signal=dump_signal,
            let_go=self._performer.let_go,
            send_back=self._performer.send_back,
            disarm=self.do_disarm,
        )
        self._turning.watch(self._events.fileno(), self._on_event)
        return self._performer.cannot_step

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
            memfd.fileno() if memfd is not None else None,
            self._watch.pump,
            partial(self._tell, "trouble"),
        )
        if memfd is not None:
            memfd.detach()  # it is the memory's now
        source = self._watch.sources[0]
        modes = Mode.MISSING | Mode.WP | (Mode.MINOR if memory.shared else 0)
        try:
            source.uffd.register(address, page_size * pages, modes)
        except BaseException:
            memory.close()
            raise
        self._engine.add_region(number, page_size, pages)
        self._memories[number] = memory
        source.mappings.append(memory.add(self._process, source.uffd, address))

    def do_listen(self, listener: OwnedFd) -> None:
        """Hear what programs announce."""
        self._announcements.listen(listener)

    def do_program(self, number: int, key: bytes) -> None:
        """Know a program that is about to start."""
        self._announcements.expect(number, key)

    def do_known(
        self, number: int
    ) -> tuple[list[int], list[tuple[int, int]], list[tuple[int, int, int, str]]]:
        """Say what a program has announced: see ``announcements.Known``."""
        known = self._announcements.known(number)
        return known.loaded, known.mapped, known.refused

    def do_close_region(self, number: int) -> bool:
        """Watch a region no more; who stands there goes on, and who still uses it may.

        Other processes' pages that were never there are poisoned.

        Returns:
            Whether a thread of the test process stood there, and so will use it in a moment.
        """
        memory = self._memories.pop(number)
        stood = self._standing_in(number)
        for touch in stood:
            self._performer.let_go(touch)
        self._engine.forget_region(number)
        self._performer.go_on()
        self._performer.perform()
        own, others = memory.mappings[0], memory.mappings[1:]
        for page in range(memory.pages):
            memory.fill(own, page, protect=False, wake=True)
        _poison_absent(memory, others)
        for mapping in memory.mappings:  # waking whoever comes at this very moment
            with contextlib.suppress(ResolutionRefused):
                mapping.uffd.unregister(mapping.address, mapping.end - mapping.address)
        for touch in self._standing_in(number):  # on their way out of the trampoline
            self._performer.end(touch)
        self._watch.forget(memory)
        memory.close()
        return any(
            touch.process == self._process and not has_ended(touch.process, touch.thread)
            for touch in stood
        )

    def do_arm(self, rule: tuple[Any, ...]) -> None:
        """Have a rule."""
        self._engine.arm(Rule.from_wire(rule))

    def do_disarm(self, number: int) -> tuple[int, int, int] | None:
        """Drop a rule, and let go whoever stands because of it.

        Returns:
            Region, first page and number of those that have to be taken away now: they fail, or
            did a moment ago.
        """
        armed = self._engine.armed.get(number)
        for touch in self._engine.disarm(number):
            self._performer.let_go(touch, "frozen")
        if armed is None or armed.rule.kind is not Kind.FAIL or not armed.fired:
            return None
        rule, size = armed.rule, self._memories[armed.rule.region].page_size
        first = rule.start // size
        return rule.region, first, (rule.end - 1) // size - first + 1

    def do_release(self, number: int) -> bool:
        """Let a standing thread go on; say whether it stood."""
        for touch in self._engine.all_standing():
            if touch.number == number and touch.freeze:
                self._engine.spend(touch.freeze)
                self._performer.let_go(touch, "frozen")
                return True
        return False

    def do_leave(self, number: int, first: int, count: int, asker: int) -> list[int]:
        """Take pages away, their bytes kept.

        Private pages can only be dropped by their process itself.  Best by the thread that asks,
        which waits for the answer: it is made to, and needs no GIL for it, which somebody may
        hold who stands at such a page.

        Returns:
            The private pages that the caller has to discard itself, for it cannot be traced;
            ``do_left`` follows.
        """
        memory = self._memories[number]
        for mapping in memory.mappings:
            for page in sorted(mapping.poisoned & set(range(first, first + count))):
                with contextlib.suppress(RangeGone, TargetGone, ClosedError):
                    memory.fill(mapping, page, protect=True, wake=False)
        mapping = memory.mappings[0]
        contents = mapping.contents
        going = [
            page
            for page in range(first, first + count)
            if page in contents.present and not contents.is_visited(page)  # which goes by itself
        ]
        for page in going:
            for each in memory.mappings if memory.shared else [mapping]:
                self._performer.see_off(each, page)
        if memory.shared:
            for page in going:
                memory.take_away(mapping, page, _never)
            return []

        def take_away() -> None:
            for page in going:
                memory.take_away(mapping, page, lambda *at: drop(asker, *at))

        if not going or (
            self._performer.cannot_step is None
            and self._performer.stepper.beside(self._process, asker, take_away)
        ):
            return []
        for page in going:
            mapping.contents.store[page] = memory.begin_leaving(mapping, page)
            mapping.contents.leaving.add(page)
        return going

    def do_left(self, number: int, pages: list[int]) -> None:
        """Note that private pages were discarded."""
        memory = self._memories[number]
        mapping = memory.mappings[0]
        for page in pages:
            mapping.contents.leaving.discard(page)
            memory.left(mapping, page, mapping.contents.store[page])
        self._performer.go_on()

    def do_stay(self, number: int, pages: list[int]) -> None:
        """Note that private pages were not discarded after all: they are as they were."""
        contents = self._memories[number].mappings[0].contents
        for page in pages:
            contents.leaving.discard(page)
            contents.store.pop(page, None)
        self._performer.go_on()

    def do_peek(self, number: int, offset: int, length: int) -> bytes:
        """Read without a touch."""
        memory = self._memories[number]
        memory.check(offset, length)
        return memory.read(memory.mappings[0], offset, length)

    def do_poke(self, number: int, offset: int, data: bytes) -> None:
        """Write without a touch."""
        memory = self._memories[number]
        memory.check(offset, len(data))
        memory.write(memory.mappings[0], offset, data)

    def do_touches(self, after: int) -> tuple[list[tuple[Any, ...]], bool, int]:
        """Give touches that were written down after the first ``after``.

        Returns:
            Them, whether there are more to ask for, and how many there was no room for.
        """
        written = self._engine.written[after : after + _TOUCHES]
        written = written[: fitting(written)]
        more = after + len(written) < len(self._engine.written)
        return written, more, self._engine.dropped

    def do_standing(self, after: int) -> tuple[list[tuple[tuple[Any, ...], int, str]], bool]:
        """Give touches that have not ended, by number: those after the number ``after``.

        Returns:
            The touch, the freeze's number and what holds it, for each; and whether there are
            more to ask for.
        """
        now = time.monotonic_ns()
        standing = sorted(self._engine.all_standing(), key=lambda touch: touch.number)
        found = [(wire(t, now), t.stopped_by, t.held_by) for t in standing if t.number > after]
        first = found[: fitting(found)]
        return first, len(first) < len(found)

    def do_count(self) -> int:
        """Give how many touches there were, kept or not."""
        return self._engine.count

    def do_settle(self, number: int) -> None:
        """Tell a number, behind all that was told before."""
        self._tell("settled", number)

    def do_participants(self, beside: list[int], asking: OwnedFd) -> None:
        """Have threads of the test process go on one at a time, as it plans.

        Args:
            beside: Other threads that need the GIL meanwhile.
            asking: A channel for its plans; all is over when its other side closes.
        """
        channel = Channel(socket.socket(fileno=asking.detach()))
        holder = self._holder
        assert holder is not None
        if holder.participants is not None:
            channel.close()
            raise ValueError("interleave() and explore() run one call at a time")
        holder.participants = participants = Participants(
            channel,
            self._process,
            beside,
            engine=self._engine,
            turning=self._turning,
            performer=self._performer,
            holder=holder,
            take_in=self._read_and_take_in,
        )
        self._turning.watch(channel.fileno(), lambda: self._on_plan(holder, participants))

    def do_participant(self, thread: int, starter: OwnedFd) -> None:
        """Take a thread among them; a byte written to the descriptor starts its call."""
        assert self._holder is not None
        assert self._holder.participants is not None
        self._holder.participants.add(thread, starter.detach())

    def _on_plan(self, holder: Holder, participants: Participants) -> None:
        if not participants.on_message():
            holder.participants = None
            self._turning.forget(participants.channel.fileno())
            participants.close()

    def do_close(self, stay: bool) -> None:
        """End after this answer; ``stay`` for the next harness, if that can be."""
        self._stays = stay
        self._turning.stop()

    def _standing_in(self, region: int) -> list[Standing]:
        return [touch for touch in self._engine.all_standing() if touch.region == region]

    # --- other processes ---------------------------------------------------------------

    def _on_mapped(self, process: int, message: Announcement, uffd: OwnedFd) -> None:
        """Watch a region in another program, which has handed over its own userfaultfd."""
        memory = self._memories.get(message.region)
        if memory is None:  # its region was closed: ordinary memory by now
            uffd.close()
            return
        self._watch.sweep()
        first = message.offset // memory.page_size
        source = self._watch.add(Userfaultfd.adopt(uffd), process, of_program=True)
        length = min(message.length, max(memory.pages - first, 0) * memory.page_size)
        source.mappings.append(
            memory.add(process, source.uffd, message.address, length=length, first=first)
        )
        self._watch.await_exit(process)

    def _on_gone(self, source: Source) -> None:
        """End where the threads of a process stood that has ended."""
        self._calls.forget(source.process)

        def is_gone(uffd: Userfaultfd) -> bool:
            return uffd is source.uffd or uffd.closed

        # Where a signal handler stood is ended first, and then what it has interrupted.
        standing = self._engine.standing
        while gone := [touch for touch in standing.values() if is_gone(touch.mapping.uffd)]:
            for touch in gone:
                self._performer.end(touch)

    # --- touches -----------------------------------------------------------------------

    def _arrive(self, source: Source, fault: RawFault) -> None:
        mapping = source.find(fault.address)
        if mapping is None:
            return  # closed or unmapped meanwhile, upon which its threads were woken
        thread = source.thread(fault.thread_id, fault.address)
        if thread is None:
            self._pass_stranger(mapping, fault)
            return
        if source is not self._watch.sources[0]:
            self._watch.await_exit(source.process)
        memory = mapping.memory
        offset = mapping.offset_of(fault.address)
        access = "write" if fault.flags & (WRITE | WP) else "read"
        page = offset // memory.page_size
        system_call, pc = self._calls.find(source.process, thread)
        # In a step it runs, as /proc has it; and a call that was begun again has another number.
        stepped = self._performer.stepper.call_of(thread)
        system_call = system_call if stepped is None else stepped
        standing = self._engine.standing.get((source.process, thread))
        if standing is not None:
            was_there = standing.comings != standing.mapping.comings[standing.page]
            if (standing.region, standing.page) == (memory.number, page):
                is_next = system_call is None and pc and standing.pc and pc != standing.pc
                if not (is_next and was_there):
                    self._repeat(standing)
                    return
                self._performer.end(standing)  # by a signal it has passed in such a moment
            elif (standing.returning and was_there) or (
                not standing.parked and standing.page in standing.mapping.contents.present
            ):
                self._performer.end(standing)  # its page came for somebody else: it went on
        if self._performer.is_echo(mapping, page, access, thread, is_running=not pc):
            return
        touch = self._engine.arrive(
            process=source.process,
            thread=thread,
            region=memory.number,
            offset=offset,
            access=access,
            mapping=mapping,
            time_ns=time.monotonic_ns(),
            system_call=system_call,
            pc=pc,
            where=self._places.name(source.process, pc),
        )
        touch.comings = mapping.comings[page]
        if touch.delay:
            seconds = sum(latency.from_wire(d).sample(self._random) for d in touch.delay)
            touch.held_by = "page"
            self._turning.after(int(seconds * 1e9), lambda: self._go_on(touch))
        else:
            self._go_on(touch)

    def _pass_stranger(self, mapping: Mapping, fault: RawFault) -> None:
        """Let through who is no thread of the process whose memory it is, or is gone.

        It is never traced or signalled: a debugger, or somebody with the same number.
        """
        memory = mapping.memory
        page = mapping.offset_of(fault.address) // memory.page_size
        is_here = os.path.exists(f"/proc/{fault.thread_id}")  # else a thread that was killed
        with contextlib.suppress(RangeGone, TargetGone, ClosedError):
            memory.fill(mapping, page, protect=not fault.flags & (WRITE | WP), wake=True)
            if is_here or not mapping.process:
                self._tell(
                    "trouble",
                    f"page {page} was touched by thread {fault.thread_id}, which is none of process"
                    f" {mapping.process or 'unknown'}: a debugger, or process_vm_readv; it was let"
                    " through, so the next touch of this page may not be seen",
                )

    def _repeat(self, touch: Standing) -> None:
        """A thread faults again where it stands: back from the trampoline, or after a signal."""
        assert self._holder is not None
        if touch.returning:
            self._performer.came_back(touch)
        else:
            self._holder.came_back(touch)

    def _go_on(self, touch: Standing) -> None:
        """After its latency: stop it, or let it through."""
        if not self._engine.is_innermost(touch):
            if touch in self._engine.all_standing():  # a signal handler's touch comes first
                self._turning.after(_INNER_NS, lambda: self._go_on(touch))
            return  # else its process has ended meanwhile
        assert self._holder is not None
        if touch.freeze:
            self._holder.hold(touch)
        else:
            self._performer.let_go(touch)


def _poison_absent(memory: Memory, mappings: Iterable[Mapping]) -> None:
    """Poison what is absent, where somebody may still touch it."""
    for mapping in mappings:
        with contextlib.suppress(UffdError):  # its process has ended
            for page in mapping.pages:
                if page not in mapping.contents.present:
                    with contextlib.suppress(RangeGone):
                        memory.poison(mapping, page, wake=True)


def _never(address: int, length: int) -> None:
    raise AssertionError(f"shared memory at {address:#x} is not discarded page by page ({length})")


def _serve(commands: Channel, events: Channel, process: int) -> bool:
    """Serve one harness; say whether another one may come."""
    try:
        service = Service(commands, events, process)
    except (FileNotFoundError, ProcessLookupError):  # the test process has ended since the last
        return False
    return service.run()


def main() -> None:
    """Serve harnesses: the arguments are both sockets' numbers and the test process's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the test's; we end with it
    *numbers, process = map(int, sys.argv[1:4])
    commands, events = (Channel(socket.socket(fileno=number)) for number in numbers)
    gc.freeze()  # what was imported stays
    while _serve(commands, events, process):
        gc.collect()
    os._exit(0)  # all is closed; an interpreter that tidies up takes as long as one that starts
