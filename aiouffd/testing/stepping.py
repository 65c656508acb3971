"""Let one thread make one access, and no more, while others stay where they are.

Knows: ptrace's stops, and in which order a step needs them.
Must not know: pages, rules; what is done before and after the access is handed in.

A thread that stands in a page fault is stopped with PTRACE_INTERRUPT: for ptrace the kernel
breaks off the wait, so the thread is stopped *before* its access, without a wake-up that others
would get too.  Now the page can come, the thread makes one instruction (PTRACE_SINGLESTEP), and
with the thread stopped after it the page can go again.

Within a system call there are no single steps.  There the interruption stays pending while the
call goes on, and the thread stops at the end of the call.

Laws of this file:

* A thread is let go of (PTRACE_DETACH) by whoever finishes with it, whatever has happened.
* No signal is lost: one that arrives during a step is delivered when the thread is let go of.
* Nothing waits long: a thread that does not stop at once (its instruction faults on a second
  page, its system call sleeps) is finished by ``poll`` when SIGCHLD comes.
* All requests come from the thread that made this object: the kernel wants that.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Final

from ..kernel import tracing

_STOP_NS: Final = 200_000_000  # until a thread that stands in a user-mode fault has stopped
_STEP_NS: Final = 1_000_000  # until one instruction is done, unless it faults again
_CALL_NS: Final = 100_000  # a short system call ends within that; others have SIGCHLD
_SIGNALS_AT_ONCE: Final = 16
#: What an instruction itself can bring about.
_OF_THE_INSTRUCTION: Final = frozenset(
    {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
    if hasattr(signal, "SIGBUS")
    else ()
)


class _Attached:
    """A thread that has not come to the end of its access yet."""

    __slots__ = ("afters", "process", "signals", "stepping")

    def __init__(self, process: int, after: Callable[[], None] | None, *, stepping: bool) -> None:
        self.process = process
        self.afters = [after] if after is not None else []
        self.signals: list[int] = []
        self.stepping = stepping  # else in a system call


class Stepper:
    """Threads that are being stepped over.

    Sharing: the thread that made it.
    """

    def __init__(self) -> None:
        """Begin with nobody attached."""
        self._attached: dict[int, _Attached] = {}

    def __len__(self) -> int:
        return len(self._attached)

    def __contains__(self, thread: object) -> bool:
        return thread in self._attached

    def over(
        self,
        process: int,
        thread: int,
        *,
        in_call: bool,
        let: Callable[[bool], None],
        after: Callable[[], None] | None,
    ) -> None:
        """Let a thread that stands in a page fault make its access, and only that thread.

        Args:
            process: Its process.
            thread: Who.
            in_call: A system call touched the page for it.
            let: Makes the page accessible; its argument says whether who waits there has to
                be woken.
            after: What to do once the access is made, with the thread stopped; None to let it
                run on.

        Raises:
            OSError: The thread cannot be traced (EPERM: by a debugger already, or not
                permitted; ESRCH: it has ended).  ``let`` was not called.
        """
        attached = self._attached.get(thread)
        if attached is not None:
            # It stands on its way to the end of the step that it is in already.
            if after is not None:
                attached.afters.append(after)
            let(True)
            return
        tracing.seize(thread)
        self._attached[thread] = _Attached(process, after, stepping=not in_call)
        tracing.interrupt(thread)
        status = None if in_call else tracing.wait(thread, block_ns=_STOP_NS)
        stopped = status is not None and os.WIFSTOPPED(status)
        try:
            let(not stopped)
        except BaseException:
            self._attached[thread].afters.clear()
            if stopped:
                self._go(thread, 0)
            raise  # else it is let go of when it stops
        if not stopped:
            self._finish(thread, tracing.wait(thread, block_ns=_CALL_NS) if in_call else status)
            return
        assert status is not None
        if after is None:
            self._go(thread, 0)
        else:
            self._note(thread, status)
            tracing.singlestep(thread)
            self._finish(thread, tracing.wait(thread, block_ns=_STEP_NS))

    def poll(self) -> None:
        """Go on with whoever has stopped; to be called when SIGCHLD has come."""
        for thread in list(self._attached):
            self._finish(thread, tracing.wait(thread, block_ns=0))

    def _note(self, thread: int, status: int) -> int:
        """Keep a signal that was about to be delivered; give its number, 0 for other stops."""
        number = tracing.stopped_by_signal(status)
        if number and not tracing.is_event_stop(status) and number != signal.SIGTRAP:
            self._attached[thread].signals.append(number)
            return number
        return 0

    def _finish(self, thread: int, status: int | None) -> None:
        """Go on with a thread: the access is made, or a signal came first, or not yet."""
        attached = self._attached[thread]
        for _ in range(_SIGNALS_AT_ONCE):
            if status is None:
                return  # later, by ``poll``
            if os.WIFEXITED(status) or os.WIFSIGNALED(status):
                self._go(thread, None)
                return
            number = self._note(thread, status)
            is_made = (
                not attached.stepping
                or number in _OF_THE_INSTRUCTION
                or (not number and not tracing.is_event_stop(status))
            )
            if is_made:
                break
            tracing.singlestep(thread)
            status = tracing.wait(thread, block_ns=_STEP_NS)
        self._go(thread, 0)

    def _go(self, thread: int, status: int | None) -> None:
        """Do what comes after the access, and let go of the thread; None: it has ended."""
        attached = self._attached.pop(thread)
        try:
            for after in attached.afters:
                after()
        finally:
            if status is not None:
                *earlier, last = attached.signals or [0]
                try:
                    tracing.detach(thread, last)
                    for number in earlier:
                        tracing.tgkill(attached.process, thread, number)
                except ProcessLookupError:
                    pass  # killed meanwhile
