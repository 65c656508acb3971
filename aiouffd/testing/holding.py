"""Threads that stand: who holds them, for how long, and what is shown when nobody lets them go.

Knows: the GIL of the test process, the trampoline's door, time limits.
Must not know: rules; how a page comes.

A thread stands because its fault is not answered.  If it has the GIL of the test process in its
hands, nothing there can run, the test that is to release it least of all.  Nobody can see that
from outside, so the test process is asked something that any thread of it answers at once
(``ping``); if it stays silent, the thread is sent through the trampoline's door, where it gives
the GIL away.

Laws of this file:

* Whoever stands is let go at the time limit, with the stacks of the test process.
* Only a thread that stands in a user-mode fault is sent a signal; no signal meets a thread
  elsewhere.  A system call that stands is not interrupted for that; one that is *stepped* may be
  cut short, as ``stepping`` says.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ..kernel import tracing
from .channel import fitting
from .engine import Engine, Standing, wire
from .turning import Teller, Turning
from .watching import threads_of

if TYPE_CHECKING:
    from .participants import Participants

_PING_NS: Final = 15_000_000  # without an answer that long, the GIL is held
_PARKS: Final = 3  # attempts to have one thread wait in the trampoline
_DUMP_NS: Final = 100_000_000  # between two looks at the stacks that are being written down
_SILENCE_NS: Final = 1_000_000_000  # a test process that has not written them then cannot run
_LOOKS: Final = 30  # at the most, for a machine may be busy
_LONGEST_TEXT: Final = 64 * 1024


class Holder:
    """Who stands, of one harness.

    Attributes:
        timeout_ns: How long a thread may stand.
        participants: Threads that go on one at a time, while the test process has some.

    Sharing: one thread.
    """

    def __init__(
        self,
        process: int,
        engine: Engine,
        turning: Turning,
        tell: Teller,
        *,
        trampoline: str,
        door: int,
        timeout_ns: int,
        dump_fd: int,
        dump_signal: int,
        let_go: Callable[[Standing, str], None],
        send_back: Callable[[Standing], None],
        disarm: Callable[[int], object],
    ) -> None:
        """Hold threads for a test process.

        Args:
            process: The test process.
            engine: The books.
            turning: The loop.
            tell: Tells the test process something.
            trampoline: ``auto``; ``never`` or ``always`` send a thread there.
            door: The signal that sends a thread there.
            timeout_ns: How long a thread may stand.
            dump_fd: Where the test process writes its stacks.
            dump_signal: The signal that makes it do so.
            let_go: Lets a thread go on.
            send_back: Has one leave the trampoline that was let go before it came there.
            disarm: Ends a rule.
        """
        self.timeout_ns = timeout_ns
        self._process = process
        self._engine = engine
        self._turning = turning
        self._tell = tell
        self._trampoline = trampoline
        self._door = door
        self._dump_fd = dump_fd
        self._dump_signal = dump_signal
        self._let_go = let_go
        self._send_back = send_back
        self._disarm = disarm
        self._dumping = False
        self._dumps = 0
        self._holds_gil: set[int] = set()
        self.participants: Participants | None = None
        # So that no answer to an earlier harness's question is taken for one to ours.
        self._pings = time.monotonic_ns()
        self._pongs = 0

    def close(self) -> None:
        """Close what the stacks are written to."""
        os.close(self._dump_fd)

    def hold(self, touch: Standing) -> None:
        """Have a thread stand until it is let go."""
        touch.held_by = "page"
        touch.outcome = "frozen"
        if self.participants is not None and touch.thread in self.participants:
            self._hold_participant(touch, self.participants)
            return
        touch.told = True
        self._tell("frozen", touch.freeze, wire(touch, time.monotonic_ns()))
        self._turning.after(self.timeout_ns, lambda: self.on_limit(touch))
        if (
            touch.process != self._process
            or touch.system_call is not None
            or self._trampoline == "never"
        ):
            return
        if self._trampoline == "always" or touch.thread in self._holds_gil:
            self._park(touch)
            return
        number = self.ping()
        self._turning.after(_PING_NS, lambda: self._on_silence(touch, number))

    def _hold_participant(self, touch: Standing, participants: Participants) -> None:
        """Have a participant stand; its own time limit and its own questions see to the rest."""
        if touch.system_call is not None or self._trampoline == "never":
            participants.on_stand(touch.thread)
        elif self._trampoline == "always" or touch.thread in self._holds_gil:
            self._park(touch)
        else:
            participants.on_touch(touch)

    def stands(self, touch: Standing) -> bool:
        """Say whether a touch still stands."""
        return bool(touch.held_by) and touch in self._engine.all_standing()

    # --- the trampoline ----------------------------------------------------------------

    def ping(self) -> int:
        """Ask the porter for an answer, which it cannot give without the GIL."""
        self._pings += 1
        self._tell("ping", self._pings)
        return self._pings

    def pong(self, number: int) -> None:
        """Note that the test process can run."""
        self._pongs = max(self._pongs, number)
        if self.participants is not None:
            self.participants.on_pong(number)

    def park_for_gil(self, touch: Standing) -> None:
        """Have a thread that may have the GIL wait in the trampoline, if it can."""
        if touch.held_by == "page" and touch.system_call is None:
            self._holds_gil.add(touch.thread)
            self._park(touch)

    def _on_silence(self, touch: Standing, number: int) -> None:
        if self._pongs < number and self.stands(touch) and touch.held_by == "page":
            self._holds_gil.add(touch.thread)
            self._park(touch)

    def _park(self, touch: Standing) -> None:
        """Have a thread wait in the trampoline, where it gives the GIL away."""
        with contextlib.suppress(ProcessLookupError):
            tracing.tgkill(self._process, touch.thread, self._door)
            touch.held_by = "trampoline"

    def parked(self, thread: int) -> None:
        """Note that a thread says it is in the trampoline."""
        touch = self._engine.standing.get((self._process, thread))
        if touch is None or not touch.held_by:
            self._tell("go", thread)
            return
        touch.parked = True
        if touch.returning:  # let go meanwhile
            self._send_back(touch)
            return
        touch.held_by = "trampoline"
        if self.participants is not None and thread in self.participants:
            self.participants.on_stand(thread)
        else:
            self._tell("held", touch.number, "trampoline")

    def came_back(self, touch: Standing) -> None:
        """Try again with a thread that has come back from the trampoline by itself.

        It has no stack or recursion left for the handler.  No pure Python can help that: past
        some attempts it stands in the kernel, until the time limit.
        """
        if touch.held_by != "trampoline":
            return
        touch.held_by = "page"
        touch.parked = False
        touch.parks += 1
        if touch.parks < _PARKS:
            self._park(touch)

    # --- the time limit ----------------------------------------------------------------

    def on_limit(self, touch: Standing) -> None:
        """Nobody has released a thread in time: show the stacks, and let it go."""
        if not self.stands(touch) or touch.returning:
            return
        touch.overdue = True
        if not self._dumping:
            self._dumping = True
            self._dumps += 1
            number = self._dumps
            os.ftruncate(self._dump_fd, 0)
            os.lseek(self._dump_fd, 0, os.SEEK_SET)  # one open file with the test process
            self._tell("late", number)  # says who waits for whom, and writes down the stacks
            self._turning.after(_SILENCE_NS, lambda: self._on_no_dump(number))

    def dumped(self, number: int) -> None:
        """Go on once the test process has written down its stacks."""
        if self._dumping and number == self._dumps:
            self._end_late()

    def _on_no_dump(self, number: int) -> None:
        """Have a signal handler write down the stacks: the test process cannot run, it seems.

        It is the interpreter's own, in C, and needs no GIL.  It reads the stacks of all threads,
        which must not run meanwhile: they do not, since somebody stands with the GIL.
        """
        if not self._dumping or number != self._dumps:
            return
        self._turning.after(_DUMP_NS, lambda: self._on_dumped(number))
        # A thread in a system call that stands would take the signal after it only.
        standing = {t.thread for t in self._engine.all_standing() if t.system_call is not None}
        for thread in threads_of(self._process):
            if thread not in standing:
                with contextlib.suppress(OSError):
                    tracing.tgkill(self._process, thread, self._dump_signal)
                    return

    def _on_dumped(self, number: int, before: int = 0, looks: int = 0) -> None:
        if not self._dumping or number != self._dumps:
            return
        written = os.fstat(self._dump_fd).st_size
        if looks < _LOOKS and (not written or written != before):  # it is still being written
            self._turning.after(_DUMP_NS, lambda: self._on_dumped(number, written, looks + 1))
        else:
            self._end_late()

    def _end_late(self) -> None:
        """Show the stacks, and let go who has stood too long."""
        self._dumping = False
        text = os.pread(self._dump_fd, _LONGEST_TEXT, 0).decode(errors="replace")
        now = time.monotonic_ns()
        late = [t for t in self._engine.all_standing() if t.overdue and self.stands(t)]
        told = [(wire(t, now), t.stopped_by, t.held_by) for t in late]
        while (count := fitting(told)) < len(told):
            self._tell("overdue", told[:count], "", True)
            del told[:count]
        self._tell("overdue", told, "", True)
        self._tell("overdue", [], text, False)
        rules = {touch.freeze for touch in late}
        for touch in late:
            self._let_go(touch, "overdue")
        for rule in rules:  # or the next touch would stand as long again
            self._disarm(rule)
