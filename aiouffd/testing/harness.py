"""Harness: memory whose touches a test sees, stops, delays, changes and fails.

Knows: what to order from the helper process, and what it tells.
Must not know: pytest; how pages are filled.

Laws of this file:

* Whatever the helper had to end by itself is raised: at the next order, and when the harness
  closes.  A test that left a thread standing fails.
* What a started function has raised is raised, by ``result`` or else when the harness closes.
* Memory under which a thread of the harness still runs is never unmapped.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, ParamSpec, Self, TypeVar

from ..errors import ClosedError, NotSupported
from ..uffd import Feature, Userfaultfd
from . import rules, waiting
from .arming import Armed
from .channel import PIECE, Message
from .failures import HarnessError
from .freezing import Freeze, Frozen
from .helper import ANSWER_SECONDS, ENDED, Helper
from .ledger import Ledger
from .mapping import discard, keep_from_children, map_memory, page_size_of
from .programs import Program, Programs, Stream
from .record import Record
from .recording import Recording
from .region import Place, Region, size_of
from .rules import KINDS, Kind, Rule
from .running import Running
from .threads import ThreadLike, doing, numbers_of, own_threads
from .touches import Touch

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .interleaving import Exploration, Interleaving
    from .schedules import Order

T = TypeVar("T")
P = ParamSpec("P")

_BACK_ENDS: Final = {"auto": "auto", "process": "never", "trampoline": "always"}
_ACCOUNT: Final = 20  # touches in an error's text
_LATELY: Final = 64  # rules that are known a while longer than they hold

#: Memory of regions that were closed while threads still ran; never unmapped.
_kept: Final[list[mmap.mmap]] = []


class Harness:
    """Makes memory, and stops, delays, changes, fails and records what touches it.

    Attributes:
        timeout: Seconds that a thread may stand before it is let go and the test fails.
        seed: Of all latencies.
        backend: How threads of this process are held: ``auto``, ``process``, ``trampoline``.
        limits: What is not possible here, a sentence each.
        regions: Those that are open.
        ledger: What has been touched, and everybody's names.
        changed: Notified whenever the helper has told something.
        listeners: Called then, in the porter's thread.
        stood: Who stood and who waited, a line each, when an error last left a freeze or the
            time limit last passed.

    Sharing: any thread of the process that made it.
    """

    def __init__(
        self,
        *,
        timeout: float = 10.0,
        seed: int | None = None,
        backend: str = "auto",
        user_mode_only: bool = False,
    ) -> None:
        """Start the helper process.

        Kernel: userfaultfd(2), since Linux 4.3; write-protection of shared memory since 5.19.

        Args:
            timeout: Seconds that a thread may stand; past it all stacks are shown.
            seed: Of all latencies; a random one if None.
            backend: ``auto``: the kernel holds a thread, and one that has the GIL waits in the
                trampoline.  ``process``: the kernel holds all; a Python access that is stopped
                stops the interpreter.  ``trampoline``: all threads of this process wait there.
            user_mode_only: Do without system calls' touches, as it is without privilege.

        Raises:
            NotSupported: This kernel, user or container cannot; says what would help.
            HarnessError: The helper did not start.
            ValueError: There is no such back end, or a time limit is not above zero.
        """
        if backend not in _BACK_ENDS:
            raise ValueError(f"backend is one of {', '.join(_BACK_ENDS)}, not {backend!r}")
        if not timeout > 0:
            raise ValueError(f"timeout is seconds above zero, not {timeout!r}")
        self.timeout = timeout
        self.seed = random.SystemRandom().randrange(2**32) if seed is None else seed
        self.backend = backend
        self.limits: list[str] = []
        self.regions: list[Region] = []
        self.changed = threading.Condition()
        self.listeners: list[Callable[[], None]] = []
        self.stood: list[str] = []
        self._pid = os.getpid()
        self._numbers = 0
        self._moving = threading.RLock()  # pages go: nothing is written to them meanwhile
        self._freezes: dict[int, Freeze] = {}
        self._disarmed: list[int] = []  # rules of late, by which a last word may still be named
        self._frozen: dict[int, Frozen] = {}
        self._ordered: set[int] = set()  # rules of interleave() and explore()
        self._running: list[Running[Any]] = []
        self._stuck: list[threading.Thread] = []  # participants that are, or were, in a deadlock
        self._troubles: list[str] = []
        self._late: list[Any] = []  # who is overdue, as far as it was told
        self._settled = 0  # the number that the helper has told last
        self._noted = 0  # which error has left a freeze
        self._closed = True  # until it has begun: what raises here leaves nothing to close
        self._programs = Programs(self)
        self._user_mode_only = user_mode_only
        self._helper = self._start(user_mode_only)
        self.ledger = Ledger(self._helper.ask)
        self._closed = False

    # --- beginning and end -------------------------------------------------------------

    def _start(self, user_mode_only: bool) -> Helper:
        features, why_not = _features()
        with Userfaultfd.open(
            features, user_mode_only=user_mode_only, allow_user_mode_only=True
        ) as uffd:
            helper = Helper(
                uffd,
                _weakly(self),
                timeout=self.timeout,
                seed=self.seed,
                trampoline_use=_BACK_ENDS[self.backend],
            )
        self._may_fork = bool(features & Feature.EVENT_FORK)
        if user_mode_only or not _may_kernel_mode():
            self.limits.append(
                "System calls that touch a region fail with EFAULT instead of being seen:"
                " this user may catch user-mode touches only (run as root, or give this user"
                " rights on /dev/userfaultfd)."
            )
        if why_not:
            self.limits.append(why_not)
        if helper.cannot_step:
            self.limits.append(
                "Touches after the first of a page are not seen, so nth, every, thread, change,"
                f" once and places smaller than a page are refused: {helper.cannot_step}"
            )
        return helper

    def close(self) -> None:
        """End: everybody who stands goes on, and the memory is given back.

        A second call does nothing.

        Raises:
            HarnessError: Somebody was let go at the time limit, the helper had ended, or a started
                function has raised and nobody has asked for its result.
        """
        if self._closed:
            return
        if os.getpid() != self._pid:
            self._closed = True
            return
        self._troubles += self.lost()
        self._troubles += [text for text in self._programs.close() if text != ENDED]
        for region in list(self.regions):
            with contextlib.suppress(HarnessError):
                region.close()
        with contextlib.suppress(HarnessError, OSError):
            self.ledger.fetch()
        self._closed = True
        self._helper.end()
        started = (running.thread for running in self._running)
        waiting.left_over.update(each for each in (*self._stuck, *started) if each.is_alive())
        self._raise_troubles()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            # What the test raised is what its reader wants to see first.
            try:
                self.close()
            except HarnessError as trouble:
                error.add_note(str(trouble))

    def __del__(self) -> None:
        if getattr(self, "_closed", True) or os.getpid() != self._pid:
            return
        warnings.warn(f"{self!r} was not closed", ResourceWarning, source=self, stacklevel=2)
        if sys.is_finalizing():  # no thread can be waited for any more; all ends with us
            return
        with contextlib.suppress(Exception):
            self._programs.close()
        self._closed = True
        for region in self.regions:  # nobody knows who still has its address
            region.abandon(_kept)
        with contextlib.suppress(Exception):
            self._helper.end()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self.regions)} regions"
        return f"<Harness {state} backend={self.backend!r} seed={self.seed}>"

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    @property
    def service_pid(self) -> int:
        """The helper's process id."""
        return self._helper.pid

    # --- orders ------------------------------------------------------------------------

    def order(self, name: str, *arguments: Any, fds: tuple[int, ...] = ()) -> Any:
        """Have the helper do something; not for tests, which have methods for all of it.

        Raises:
            HarnessError: Somebody was let go at the time limit, or the helper has ended.
            ClosedError: The harness was closed.
        """
        self.check()
        return self._helper.ask(name, *arguments, fds=fds)

    def check(self) -> None:
        """Raise what the helper had to end by itself, once.

        Raises:
            HarnessError: Somebody was let go at the time limit, or the helper has ended.
            ClosedError: The harness was closed.
        """
        if self._closed:
            raise ClosedError("this harness was closed")
        self._raise_troubles()
        if self._helper.ended:  # each of several waits is to hear of it
            raise HarnessError(ENDED)

    def settle(self) -> None:
        """Wait until everything that the helper has told by now was heard.

        Raises:
            HarnessError: The helper has ended.
        """
        number = self._number()
        self._helper.ask("settle", number)
        with self.changed:
            self.changed.wait_for(
                lambda: self._settled >= number or self._helper.ended, ANSWER_SECONDS
            )

    def _raise_troubles(self) -> None:
        troubles, self._troubles = self._troubles, []
        if troubles:
            raise HarnessError("\n".join(troubles))

    # --- what the helper tells ---------------------------------------------------------

    def _hear(self, message: Message | None) -> None:
        if message == ("late",):
            with contextlib.suppress(Exception):  # the porter has to go on, whatever this finds
                self._note()
            return
        with self.changed:
            match message:
                case None:
                    if not self._closed:
                        self._troubles.append(ENDED)
                case ("frozen", rule, fields):
                    touch = self.ledger.touch(fields)
                    freeze = self._freezes.get(rule)
                    if freeze is not None and freeze._rule == rule:  # else of an earlier ``with``
                        frozen = Frozen(freeze, touch)
                        self._frozen[touch.number] = frozen
                        freeze._arrive(frozen)
                case ("held", number, by):
                    if (frozen_now := self._frozen.get(number)) is not None:
                        frozen_now._held_by = by
                case ("ended", number, _outcome):
                    if (gone := self._frozen.pop(number, None)) is not None:
                        gone._ended.set()
                case ("overdue", late, stacks, more):
                    self._late += late
                    if not more:
                        self._troubles.append(self._overdue(self._late, stacks))
                        self._late = []
                case ("trouble", text):
                    self._troubles.append(text)
                case ("settled", number):
                    self._settled = number
            self.changed.notify_all()
        for listener in list(self.listeners):
            listener()

    def _overdue(self, late: Sequence[Any], stacks: str) -> str:
        lines = [
            f"nobody released within {self.timeout:g} s, so the harness let go:",
            *(
                f"  {self.ledger.line(self.ledger.touch(fields))}, held by {held_by or 'page'},"
                f" stopped by {self._what(rule)}"
                for fields, rule, held_by in late
            ),
        ]
        if stacks:
            lines += ["stacks of the test process at that moment:", stacks.rstrip()]
        return "\n".join(lines)

    def _what(self, rule: int) -> str:
        if rule in self._ordered:
            return "an order of turns"
        if not rule:
            return "a latency"
        freeze = self._freezes.get(rule)
        return "a rule that has ended" if freeze is None else f"the freeze of {freeze.what}"

    # --- memory ------------------------------------------------------------------------

    def region(
        self,
        pages: int = 1,
        *,
        contents: Buffer = b"",
        memory: str = "shmem",
        name: str = "",
    ) -> Region:
        """Make memory to hand to the code under test.

        Args:
            pages: How many pages.
            contents: What it begins with; zeros after that.
            memory: ``shmem`` (a memfd, shared), ``anon``, ``shmem-private``, ``hugetlb``,
                ``hugetlb-private``.
            name: What reports and records call it; no other region of this harness has had it.

        Raises:
            ValueError: A number is not above zero, the contents are too long, there is no such
                kind of memory, or the name was used.
            TypeError: The number is no whole number, or the contents are no bytes.
            NotSupported: There are no free huge pages.
        """
        if type(pages) is not int:
            raise TypeError(
                f"a region has a whole number of pages, not {pages!r};"
                " its name goes by name='...', what it holds by contents=b'...'"
            )
        if memory not in KINDS:
            raise ValueError(f"memory is one of {', '.join(KINDS)}, not {memory!r}")
        if pages < 1:
            raise ValueError(f"a region has one page or more, not {pages}")
        page_size = page_size_of(memory)
        length = pages * page_size
        size = size_of(contents, "contents")
        if size > length:
            raise ValueError(f"contents of {size} bytes do not fit into {length}")
        self.check()
        number = self._number()
        name = self._region_name(name, number)
        mapping, memfd = map_memory(memory, length, name)
        region = Region(self, number, name, memory, mapping, page_size, memfd)
        try:
            if not self._may_fork:
                keep_from_children(region.address, length)
            self.order(
                *("region", number, page_size, pages, memory, region.address),
                fds=() if memfd is None else (memfd,),
            )
        except BaseException:
            if memfd is not None:
                os.close(memfd)
            mapping.close()
            raise
        self.ledger.add_region(region)
        self.regions.append(region)
        if size:
            region.poke(0, contents)
        return region

    def _region_name(self, name: str, number: int) -> str:
        if name:
            if self.ledger.has_region(name):
                raise ValueError(
                    f"a region of this harness is, or was, named {name!r}, and in records both"
                    " would be one: give each a name of its own, or none"
                )
            return name
        while self.ledger.has_region(name := f"region{number}"):  # somebody has chosen this one
            number += 1
        return name

    def forget(self, region: Region, mapping: mmap.mmap, memfd: int | None) -> None:
        """Give back the memory of a region; for ``Region.close``."""
        self.regions.remove(region)
        used = any(not running.done for running in self._running)
        used = used or any(stuck.is_alive() for stuck in self._stuck)
        try:
            with contextlib.suppress(ClosedError):
                used = self._helper.ask("close_region", region.number) or used
        finally:
            if memfd is not None:
                os.close(memfd)
            if used:
                _kept.append(mapping)  # unmapped under a running thread it would be the last of us
            else:
                with contextlib.suppress(BufferError):  # somebody still looks at it: it stays
                    mapping.close()

    def peek(self, region: Region, offset: int, length: int) -> bytes:
        """Read without a touch; see ``Region.peek``."""
        parts = []
        while length:
            piece = min(length, PIECE)
            parts.append(self.order("peek", region.number, offset, piece))
            offset += piece
            length -= piece
        return b"".join(parts)

    def poke(self, region: Region, offset: int, data: Buffer) -> None:
        """Write without a touch; see ``Region.poke``."""
        whole = memoryview(data).tobytes()  # its items may be wider than a byte, or lie apart
        with self._moving:
            for start in range(0, len(whole), PIECE):
                self.order("poke", region.number, offset + start, whole[start : start + PIECE])

    def rearm(self, region: Region, first: int, count: int) -> None:
        """Take pages away again, their bytes kept; see ``Region.rearm``."""
        self.check()
        self._take_away(region, first, count)

    def _take_away(self, region: Region, first: int, count: int) -> None:
        with self._moving:
            asker = threading.get_native_id()
            going: list[int] = self._helper.ask("leave", region.number, first, count, asker)
            gone: list[int] = []
            try:
                for page in going:
                    discard(region.address + page * region.page_size, region.page_size)
                    gone.append(page)
            except BaseException:
                self._helper.ask("stay", region.number, [p for p in going if p not in gone])
                raise
            finally:
                if gone:
                    self._helper.ask("left", region.number, gone)

    # --- rules -------------------------------------------------------------------------

    def _number(self) -> int:
        with self.changed:
            self._numbers += 1
            return self._numbers

    def arm(
        self,
        kind: Kind,
        place: Place,
        *,
        access: str = "any",
        mode: str = "any",
        thread: ThreadLike | Iterable[ThreadLike] | None = None,
        nth: int = 1,
        every: bool = False,
        latency: tuple[Any, ...] = (),
        values: tuple[bytes, ...] = (),
        freeze: Freeze | None = None,
    ) -> Armed:
        """Have a rule about a place; ``Place`` has a method for each kind.

        Raises:
            ClosedError: The region was closed.
            ValueError: The access, the mode, the number or a thread is not what it should be.
            TypeError: The number is no whole number, or what is given as a thread is none.
            NotSupported: It takes seeing touches after the first, which is not possible here.
        """
        rules.check(access, mode, nth)
        region = place.region
        region.check()
        rule = Rule(
            number=self._number(),
            kind=kind,
            region=region.number,
            start=place.start,
            end=place.end,
            access=access,
            mode=mode,
            threads=numbers_of(thread),
            nth=nth,
            every=every,
            latency=latency,
            values=values,
        )
        size = region.page_size
        whole = place.start % size == 0 and place.end % size == 0
        if self._helper.cannot_step and not (
            kind in (Kind.FREEZE, Kind.FAIL, Kind.SLOW)
            and (whole or kind is Kind.SLOW)
            and nth == 1
            and not rule.threads
            and access in ("any", "write")
            and mode == "any"
            and every is (kind is Kind.FAIL)
        ):
            raise NotSupported(
                f"this takes seeing touches after the first: {self._helper.cannot_step}",
                "Without that only the first touch of a whole page can be acted on.",
            )
        if freeze is not None:
            self._freezes[rule.number] = freeze
            freeze._rule = rule.number
        self.order("arm", rule.to_wire())
        first = place.start // size
        self.rearm(region, first, (place.end - 1) // size - first + 1)
        return Armed(self, rule)

    def disarm(self, number: int) -> None:
        """End a rule; for ``Armed.disarm``."""
        if self._closed:
            return
        whole = self._helper.ask("disarm", number)
        with self.changed:
            self._disarmed.append(number)
            while len(self._disarmed) > _LATELY:
                gone = self._disarmed.pop(0)
                self._freezes.pop(gone, None)
                self._ordered.discard(gone)
        if whole is not None:
            number, first, count = whole
            for region in list(self.regions):
                if region.number == number:
                    self._take_away(region, first, count)

    # --- threads -----------------------------------------------------------------------

    def start(
        self, function: Callable[P, T], /, *arguments: P.args, **keywords: P.kwargs
    ) -> Running[T]:
        """Run a function in a thread of its own.

        Args:
            function: A Python function, or one of a C library through ctypes or cffi, which
                give up the GIL while it runs.
            arguments: What it is called with.
            keywords: ... and by name.

        Returns:
            The call: ``result`` gives what it returns and raises what it raises.  An error that
            nobody has asked for by then is raised when the harness closes.
        """
        return self.start_named(
            getattr(function, "__name__", "thread"), function, *arguments, **keywords
        )

    def start_named(
        self, name: str, function: Callable[P, T], /, *arguments: P.args, **keywords: P.kwargs
    ) -> Running[T]:
        """Run a function in a thread of its own, under a name that reports use."""
        self.check()
        running = Running(name, lambda: function(*arguments, **keywords))
        self.ledger.threads[running.tid] = name
        kept = [each for each in self._running if not each.done or each.lost is not None]
        self._running = [*kept, running]
        return running

    def program(
        self,
        argv: Sequence[str | os.PathLike[str]],
        regions: Mapping[str, Region] | None = None,
        *,
        name: str = "",
        env: Mapping[str, str] | None = None,
        stdin: Stream = None,
        stdout: Stream = None,
        stderr: Stream = None,
        cwd: str | os.PathLike[str] | None = None,
        pass_fds: Sequence[int] = (),
        user: str | int | None = None,
    ) -> Program:
        """Start a program that is not Python, or is, and give it regions.

        It gets the number of each region's memfd in an environment variable, to map it with
        MAP_SHARED.  Its mappings are watched like the test's own: rules are about a region,
        whoever touches it.

        Args:
            argv: The program and its arguments.
            regions: By the names of the environment variables.
            name: What reports call it; the name of its file if empty.
            env: Its environment; this process's if None.  What the harness needs is added.
            stdin: This stream and the next two as ``subprocess.Popen`` takes them.
            stdout: ...
            stderr: ...
            cwd: The folder that it starts in.
            pass_fds: More descriptors that it inherits.
            user: The user that it runs as, if another.

        Raises:
            NotSupported: It cannot be watched (it is linked statically, or setuid), or there is
                no C compiler for the library that it has to load.
            ValueError: A region's memory cannot be given to another program.
        """
        self.check()
        program = self._programs.start(
            *(argv, regions or {}),
            number=self._number(),
            name=name,
            env=env,
            user_mode_only=self._user_mode_only,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            pass_fds=pass_fds,
            user=user,
        )
        self.ledger.threads[program.pid] = program.name
        return program

    # --- orders of threads -------------------------------------------------------------

    def interleave(
        self,
        participants: Mapping[str, Callable[[], object]],
        order: Order,
        *,
        reset: Callable[[], object] | None = None,
        check: Callable[..., object] | None = None,
    ) -> Interleaving:
        """Run threads in one order of their touches.

        Each participant runs in a thread of its own.  Whenever it is about to touch a region it
        stands, until it is its turn again; so exactly one of them runs at a time.  ::

            uffd.interleave(
                {"a": add_one, "b": add_one},
                order=[("a", 1), ("b", END), ("a", END)],  # b between the load and the store of a
                check=lambda: ...,
            )

        Args:
            participants: What each one calls, by names of your choice.
            order: Steps: who, and how far: a number of touches (0: to before its first), ``END``
                (until it has ended or waits for another), or ``Before(...)``.  After the last
                step the rest run to their ends, one after another.
            reset: Called before, in the calling thread.
            check: Called after; it raises if something is wrong.  It may take the results, a
                dict of what each participant returned.

        Raises:
            ValueError: The order is none; the text says at which step.
            CannotFollow: The participants did not let it happen.
            Deadlock, Endless: The run came to no end.  Threads that stand in a deadlock stay
                there: nothing can end a thread of this process.
            TypeError: The participants are no functions by name.
            NotSupported: Touches after the first cannot be seen here: see ``limits``.
            HarnessError: As everywhere.
            BaseException: What a participant or the check raised.

        Sharing: one call at a time.
        """
        __tracebackhide__ = True  # pytest shows the test's line, not ours
        from . import interleaving  # only who interleaves pays for it

        return interleaving.interleave(self, participants, order, reset=reset, check=check)

    def explore(
        self,
        participants: Mapping[str, Callable[[], object]],
        *,
        reset: Callable[[], object] | None = None,
        check: Callable[..., object] | None = None,
        preemptions: int | None = 2,
        orders: int = 1000,
        seconds: float = 60.0,
        seed: int | None = None,
    ) -> Exploration:
        """Run threads in many orders of their touches, until one goes wrong.

        Without a seed all orders are gone through, those with fewer preemptions first, and none
        twice.  A preemption takes the turn from a participant that could go on; most races show
        with one or two.  With a seed orders are drawn at random, the same ones for the same seed.

        Only touches of regions are told apart: what happens between two of them happens at once,
        and so does an instruction that loads and stores.

        Args:
            participants: As for ``interleave``.
            reset: Called before each order; it puts back all that the participants change.
            check: Called after each order, as for ``interleave``.
            preemptions: At most so many in an order; None: any number.
            orders: Stop after so many.
            seconds: Begin no more after that time; one is run in any case.
            seed: Draw orders at random, from this number.

        Returns:
            What was run, if nothing was wrong; ``complete`` says whether that was all.

        Raises:
            RaceFound: A check or a participant raised, or there was a deadlock or no end.  It has
                the order, the trace, and a test to paste that makes this order again.
            ValueError: There are no participants, or a bound is too small for anything to be run.
            TypeError: A bound is no number, or the participants are no functions by name.
            NotDeterministic: The same choices led elsewhere than before: ``reset`` does not put
                everything back, or something depends on time or chance.
            NotSupported: Touches after the first cannot be seen here: see ``limits``.
            HarnessError: As everywhere.

        Sharing: one call at a time.
        """
        __tracebackhide__ = True  # pytest shows the test's line, not ours
        from . import interleaving  # as above

        return interleaving.explore(
            self,
            participants,
            reset=reset,
            check=check,
            preemptions=preemptions,
            orders=orders,
            seconds=seconds,
            seed=seed,
            caller=sys._getframe(1),
        )

    # --- what has happened -------------------------------------------------------------

    def touches(self) -> list[Touch]:
        """Give all touches so far, in order of arrival; those that have not ended too.

        Raises:
            HarnessError: The helper has ended, and took the last ones along.
        """
        return self.ledger.touches(() if self._closed else self.ledger.fetch())

    def touch_count(self) -> int:
        """Give how many touches there were so far."""
        count: int = self._helper.ask("count")
        return count

    def record(self, *regions: Region, every: bool = False) -> Recording:
        """Record who touches what, from ``with`` to its end.

        The regions are armed again at the beginning, so that the first touch of each page
        counts, whatever was touched before.

        Args:
            regions: Which; all that are open if none is given.
            every: Each access, not only each page's first read and first write: threads are
                stepped over one by one, some 100 microseconds an access.

        Raises:
            TypeError: Something else than a region was given.
        """
        for each in regions:
            if not isinstance(each, Region):
                raise TypeError(f"regions are recorded, as uffd.region() gives them, not {each!r}")
        return Recording(self, regions, every=every)

    @property
    def record_so_far(self) -> Record:
        """Everything that was touched since the harness was opened."""
        return self.ledger.record(self.touches())

    def lost(self) -> list[str]:
        """Say what started functions have raised that nobody has asked for; each error once."""
        found = []
        for running in self._running:
            if (error := running.lost) is not None:
                running.tell()
                stack = "".join(traceback.format_exception(error)).rstrip()
                found.append(
                    f"{running.name} (tid {running.tid}) has raised an error, and nobody has asked"
                    f" for its result():\n{stack}"
                )
        return found

    def standing(self) -> list[tuple[Touch, str, str]]:
        """Give who stands now: the touch, what stops it in words, what holds it."""
        return [
            (touch, self._what(rule), held_by)
            for touch, rule, held_by in self.ledger.standing()
            if held_by
        ]

    def note_standing(self, error: BaseException) -> None:
        """Keep who stands and who waits in ``stood``: an error is about to let them go."""
        if self._noted != id(error):  # else it has left a freeze inside this one
            self._noted = id(error)
            with contextlib.suppress(HarnessError, ClosedError):
                self._note()

    def _note(self) -> None:
        lines = waiting.lines(self)
        if any(" stands before " in line for line in lines):  # not behind the event
            self.stood = lines

    def account(self, after: int = 0) -> str:
        """Say who did what after the first ``after`` touches, who stands, and what others do.

        Never raises: it is for the texts of errors.
        """
        try:
            touches = [touch for touch in self.touches() if touch.number > after]
            standing = self.standing()
        except (HarnessError, ClosedError) as error:
            return f"  (not known: {error})"
        lines = [f"  {self.ledger.line(touch)}" for touch in touches[-_ACCOUNT:]]
        if len(touches) > _ACCOUNT:
            lines.insert(0, f"  ... {len(touches) - _ACCOUNT} touches before these ...")
        if not touches:
            lines.append("  nothing was touched")
        lines += [
            f"  {self.ledger.name(touch.thread)} stands at {touch.region}[{touch.page}],"
            f" stopped by {what}, held by {held_by}"
            for touch, what, held_by in standing
        ]
        lines += [
            f"  {running.name} (tid {running.tid}) has ended: {raised}"
            for running in self._running
            if (raised := running.tell())
        ]
        lines.append("threads of this process:")
        stood = {touch.thread for touch, _, _ in standing}
        for thread in own_threads():
            if thread not in stood and thread != self._helper.porter:
                lines.append(f"  {self.ledger.name(thread)} {doing(thread)}")
        lines += self._programs.account()
        return "\n".join(lines)


def _weakly(harness: Harness) -> Callable[[Message | None], None]:
    """Give a harness's ear to a thread that must not keep the harness."""
    ear = weakref.WeakMethod(harness._hear)

    def hear(message: Message | None) -> None:
        if (listening := ear()) is not None:
            listening(message)

    return hear


def _features() -> tuple[int, str]:
    """Give what to ask of the userfaultfd, and what cannot be had with it."""
    features = Feature.THREAD_ID | Feature.EXACT_ADDRESS | Feature.WP_HUGETLBFS_SHMEM
    try:
        with Userfaultfd.open(
            features | Feature.EVENT_FORK, user_mode_only=False, allow_user_mode_only=True
        ):
            return features | Feature.EVENT_FORK, ""
    except NotSupported:
        return features, (
            "Children that fork from this process do not get its regions: watching them takes"
            " CAP_SYS_PTRACE."
        )


def _may_kernel_mode() -> bool:
    try:
        with Userfaultfd.open():
            return True
    except NotSupported:
        return False
