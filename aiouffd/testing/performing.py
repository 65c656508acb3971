"""Touches that are let through: one by one, as decided, each at its end written down.

Knows: pages, the stepper, who else stands at the page.
Must not know: rules; why a touch was delayed or stopped.

Laws of this file:

* Faults that were read are all taken in before a page is filled, so that who else stands there
  is known; then only the one is let through whose turn it is.
* What has to be seen again is stepped over; what cannot be stepped over is let through, and the
  test is told.
* A page that comes for one access only (a *visit*) is there for all threads that run just then:
  what they do to it in these microseconds is not seen.  Threads that stand do not run.
* A message is of a touch only if its thread stands there: one that is read while the page comes
  may be of a thread that goes on.
* A touch that cannot be made (its memory is gone, or the kernel has none) ends, too.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from ..errors import ClosedError, RangeGone, TargetGone, UffdError
from ..kernel import abi, pagemap, tracing
from .engine import Engine, Standing
from .pages import Mapping
from .stepping import Elsewhere, Stepper
from .turning import Teller, Turning
from .watching import has_ended

#: A thread that has left the trampoline and not faulted again within that may have passed.
_RETURN_NS: Final = 1_000_000_000
#: A thread that was sent there and has not said that it is in the trampoline is not coming.
_PARK_NS: Final = 300_000_000
#: A thread that was woken has run within that.
_SEE_OFF_NS: Final = 50_000_000
_MADV_DONTNEED: Final = 4


class Performer:
    """Lets touches through.

    Attributes:
        cannot_step: Why threads cannot be stepped over here; None if they can.
        stepper: Those that are being stepped over.

    Sharing: one thread, the one that made it.
    """

    def __init__(
        self,
        process: int,
        engine: Engine,
        turning: Turning,
        tell: Teller,
        pump: Callable[[], None],
        take_in: Callable[[], None],
        unread: Callable[[int], None],
    ) -> None:
        """Let touches through for a test process.

        Args:
            process: The test process.
            engine: The books.
            turning: The loop.
            tell: Tells the test process something.
            pump: Reads all userfaultfds.
            take_in: Takes in the faults that were read.
            unread: Forgets those of one thread.
        """
        self.cannot_step = tracing.can_trace()
        self.stepper = Stepper(unread)
        self._engine = engine
        self._turning = turning
        self._tell = tell
        self._pump = pump
        self._take_in = take_in
        self._ready: deque[Standing] = deque()
        self._deferred: list[Standing] = []  # their page is being discarded
        self._process = process
        self._pagemap = pagemap.open_pagemap(process)

    def close(self) -> None:
        """Close what it looks with."""
        os.close(self._pagemap)

    # --- who may go --------------------------------------------------------------------

    def let_go(self, touch: Standing, outcome: str = "") -> None:
        """Have a touch made, as soon as its thread stands before it.

        Args:
            touch: Which.
            outcome: What to write down; what the rules have done to it if empty.
        """
        if touch.returning or touch in self._ready or touch in self._deferred:
            return
        touch.freeze = 0
        touch.going = True
        touch.outcome = "failed" if touch.failing else outcome or _outcome(touch)
        if not self._engine.is_innermost(touch):
            return  # ``end`` goes on with it
        if touch.parked:
            self.send_back(touch)
        elif touch.held_by == "trampoline":
            # On its way there: a step now would be one of the handler's instructions.
            touch.returning = True
            self._turning.after(_PARK_NS, lambda: self._on_no_park(touch))
        else:
            touch.held_by = ""
            self._ready.append(touch)

    def send_back(self, touch: Standing) -> None:
        """Have a thread leave the trampoline and make its access."""
        self._tell("go", touch.thread)
        mapping, page = touch.mapping, touch.page
        is_visit = page in mapping.contents.visits
        if self._is_open(mapping, page, touch.access) and not is_visit:
            self.end(touch)
        else:  # a visit: it passes, or comes too late, nobody can say
            touch.comings = -1 if is_visit else mapping.comings[page]
            self._expect(touch)

    def came_back(self, touch: Standing) -> None:
        """Go on with a thread that was let out of the trampoline and stands at its page again."""
        touch.returning = touch.parked = False
        touch.held_by = ""
        self._ready.append(touch)

    def end(self, touch: Standing) -> None:
        """Write down that a touch is over."""
        touch.returning = False
        outcome = touch.outcome or _outcome(touch)
        self._engine.end(touch, outcome, time.monotonic_ns())
        if touch.told:
            self._tell("ended", touch.number, outcome)
        outer = touch.outer
        if outer is not None and outer.going and self._engine.is_innermost(outer):
            self.let_go(outer, outer.outcome)

    def go_on(self) -> None:
        """Try again with those whose page was being discarded."""
        self._ready.extend(self._deferred)
        self._deferred.clear()

    def is_echo(
        self, mapping: Mapping, page: int, access: str, thread: int, *, is_running: bool
    ) -> bool:
        """Say whether a message is of a touch that nobody stands at.

        A thread asks for its page and then looks once more whether it is there; and in a system
        call that is stepped over it asks again and again.  So its message may be read while it
        goes on.
        """
        in_call = self.stepper.call_of(thread) is not None
        if not (in_call or is_running) or not self._is_open(mapping, page, access):
            return False
        # Should it sleep there after all, it looks again.
        if in_call:
            self.stepper.again(thread)
            return True
        return self.stepper.beside(mapping.process, thread, lambda: None)

    def _is_open(self, mapping: Mapping, page: int, access: str) -> bool:
        """Say whether an access would not fault now."""
        own = mapping.process == self._process
        try:
            file = self._pagemap if own else pagemap.open_pagemap(mapping.process)
        except OSError:
            return False
        try:
            entry = pagemap.entries(file, mapping.address_of(page), mmap.PAGESIZE)[0]
        finally:
            if not own:
                os.close(file)
        return bool(entry & abi.PM_PRESENT) and (access == "read" or not entry & abi.PM_UFFD_WP)

    def _on_no_park(self, touch: Standing) -> None:
        """A signalled thread has not come to the trampoline (it blocks the signal, say)."""
        if touch.returning and not touch.parked and self._stands(touch):
            touch.returning = False
            touch.held_by = ""
            self._ready.append(touch)

    def _stands(self, touch: Standing) -> bool:
        return self._engine.standing.get((touch.process, touch.thread)) is touch

    def _expect(self, touch: Standing) -> None:
        """Have a thread that is elsewhere come back to its access: it will fault again."""
        touch.returning = True
        self._turning.after(_RETURN_NS, lambda: self._on_return(touch))

    def _on_return(self, touch: Standing) -> None:
        """A thread has not faulted again: it takes long, or its page was there for that moment."""
        if not touch.returning or touch not in self._engine.all_standing():
            return
        was_there = touch.comings != touch.mapping.comings[touch.page]
        is_alive = os.path.exists(f"/proc/{touch.process}/task/{touch.thread}")
        if is_alive and not (was_there and self._stands(touch)):
            self._turning.after(_RETURN_NS, lambda: self._on_return(touch))  # it cannot have passed
        else:
            self.end(touch)

    def _pass_returning(self, touch: Standing, *, woken: bool) -> None:
        """Note that a page which is there to stay is there for who leaves the trampoline, too.

        Who had faulted before the page came has said so by now, unless it was woken.
        """
        if not woken:
            self._pump()
            self._take_in()
        for other in self._engine.returning(touch):
            if touch.access == "write" or other.access == "read":
                self.end(other)

    # --- how they go -------------------------------------------------------------------

    def perform(self) -> None:
        """Let through whoever may go."""
        while self._ready:
            self._take_in()
            touch = self._ready.popleft()
            try:
                self._perform(touch)
            except (RangeGone, TargetGone, ClosedError):
                self.end(touch)  # unmapped, or its process has ended
            except (UffdError, OSError) as error:
                self.trouble(touch, error)
                self.end(touch)

    def _perform(self, touch: Standing) -> None:
        """Make the page accessible for this touch, and see to it that the next one shows."""
        mapping: Mapping = touch.mapping
        memory, page = mapping.memory, touch.page
        if page in mapping.contents.leaving:
            self._deferred.append(touch)
            return
        for start, value in touch.values:
            memory.write(mapping, start, value)
        touch.values = []  # should its thread have to come a second time
        if page in mapping.poisoned:
            touch.failing, touch.once, touch.outcome = True, False, "failed"

        def discard(address: int, length: int) -> None:
            drop(touch.thread, address, length)

        def fill(wake: bool) -> None:
            memory.fill(mapping, page, protect=touch.access == "read", wake=wake)

        def take_away() -> None:
            memory.take_away(mapping, page, discard)

        began = 0

        def visit(wake: bool) -> None:
            nonlocal began
            fill(wake)
            began = mapping.contents.begin_visit(page)

        def end_visit() -> None:
            if mapping.contents.end_visit(page, began):
                take_away()  # else the last one does it

        def poison(wake: bool) -> None:
            take_away()
            memory.poison(mapping, page, wake=wake)

        def heal() -> None:
            memory.fill(mapping, page, protect=True, wake=False)
            if again:
                take_away()

        again = self.cannot_step is None and self._engine.sees_more(touch)
        try:
            if touch.failing:
                # A private page that is there can only be dropped by its own process.
                drops = not memory.shared and page in mapping.contents.present
                self._let(touch, poison, heal if touch.once else None, alone=not drops)
                self.end(touch)
            elif again:
                self._let(touch, visit, end_visit)
                self.end(touch)
            else:
                woken = self._let(touch, fill, None)
                self.end(touch)
                if woken:
                    mapping.woken[page] = touch, time.monotonic_ns()
                self._pass_returning(touch, woken=woken)
        except Elsewhere:
            self._expect(touch)  # from a signal handler

    def _safely(self, touch: Standing, after: Callable[[], None]) -> None:
        """Do what comes after an access; the thread has to be let go of whatever happens."""
        if touch.mapping.memory.closed:
            return  # no page is taken away from who goes on with it
        try:
            after()
        except (TargetGone, RangeGone, ClosedError, ProcessLookupError, FileNotFoundError):
            pass  # its process has ended, or has unmapped the page
        except (UffdError, OSError) as error:
            self._tell("trouble", f"page {touch.page} cannot be taken away again: {error}")

    def _let(
        self,
        touch: Standing,
        let: Callable[[bool], None],
        after: Callable[[], None] | None,
        *,
        alone: bool = True,
    ) -> bool:
        """Let one thread make its access; say whether everybody there was woken for it."""
        alone = alone and not any(True for _ in self._engine.others(touch))
        if self.cannot_step is None and (after is not None or not alone):
            try:
                self.stepper.over(
                    touch.process,
                    touch.thread,
                    system_call=touch.system_call,
                    pc=0 if touch.system_call is not None else touch.pc,
                    # A call that pins pages waits for one until it is woken, whatever is pending.
                    let=lambda: let(alone and touch.system_call is not None),
                    after=None if after is None else partial(self._safely, touch, after),
                )
                # One that was let go of has passed, and may wait for its next page.
                in_call = touch.system_call is not None and touch.thread in self.stepper
                if not alone and in_call and _is_stuck(touch):
                    self._wake_past_others(touch)
                return False
            except ProcessLookupError:
                pass  # it has ended
            except PermissionError as error:  # said of a thread that was killed just now, too
                if not has_ended(touch.process, touch.thread):
                    self._tell("trouble", f"thread {touch.thread} cannot be stepped over: {error}")
        let(True)
        return True

    def _wake_past_others(self, touch: Standing) -> None:
        """Wake a system call that pins its page, and nobody else who stands there.

        Such a call (futex, vmsplice, O_DIRECT) waits for its page until it is woken.  The others
        are stopped meanwhile, and find the page gone when they make their access again.
        """
        mapping: Mapping = touch.mapping
        stopped = []
        for other in self._engine.others(touch):
            let_go = None
            if other.system_call is None:
                let_go = self.stepper.stop(other.process, other.thread)
            if let_go is None:
                self._tell(
                    "trouble",
                    f"thread {other.thread} went on with thread {touch.thread}, which is in a"
                    " system call at the same page that only a wake-up lets go on",
                )
            else:
                stopped.append(let_go)

        def go_on() -> None:
            try:
                mapping.memory.take_away(mapping, touch.page, lambda *at: drop(touch.thread, *at))
            finally:
                for let_go in stopped:
                    let_go()

        mapping.memory.wake(mapping, touch.page)
        self.stepper.then(touch.thread, partial(self._safely, touch, go_on))

    def see_off(self, mapping: Mapping, page: int) -> None:
        """Have a thread make its access that was woken for it a moment ago and may not have run.

        Else it would find its page gone again, and stand a second time at the same touch.
        """
        touch, when = mapping.woken.pop(page, (None, 0))
        if touch is None or touch.system_call is not None or not touch.pc:
            return
        if self.cannot_step is not None or time.monotonic_ns() - when > _SEE_OFF_NS:
            return
        with contextlib.suppress(OSError, Elsewhere):
            call, pc = tracing.in_system_call(touch.process, touch.thread)
            if call is None and pc in (0, touch.pc):
                self.stepper.over(
                    *(touch.process, touch.thread),
                    system_call=None,
                    pc=touch.pc,
                    let=_nothing,
                    after=_nothing,
                )

    def poll(self) -> None:
        """Go on with threads that have stopped for the stepper."""
        for error in self.stepper.poll():
            self._tell("trouble", f"a thread was let go of within its step: {error!r}")

    def trouble(self, touch: Standing, error: Exception) -> None:
        """Tell what went wrong with a touch, and leave nobody standing for it."""
        memory, mapping, page = touch.mapping.memory, touch.mapping, touch.page
        there = page in mapping.contents.present
        what = "made to fail" if touch.failing else "filled"
        self._tell("trouble", f"page {page} cannot be {what}: {error}")
        with contextlib.suppress(UffdError):
            if there:
                memory.fill(mapping, page, protect=False, wake=True)
            else:
                memory.poison(mapping, page, wake=True)


def _is_stuck(touch: Standing) -> bool:
    """Say whether a system call still waits for its page, which is there."""
    try:
        with open(f"/proc/{touch.process}/task/{touch.thread}/wchan", encoding="ascii") as file:
            return file.read() == "handle_userfault"
    except OSError:
        return False


def _nothing() -> None:
    """Do nothing, before and after an access."""


def _outcome(touch: Standing) -> str:
    """Say what the rules have done to a touch."""
    if touch.failing:
        return "failed"
    if touch.delay:
        return "delayed"
    return "changed" if touch.values else "passed"


def drop(thread: int, address: int, length: int) -> None:
    """Drop private pages of a thread that stands still, by a call made in its name."""
    arguments = (address, length, _MADV_DONTNEED)
    if (error := tracing.call_in(thread, abi.NR_MADVISE, *arguments)) < 0:
        raise OSError(-error, os.strerror(-error), "madvise")
