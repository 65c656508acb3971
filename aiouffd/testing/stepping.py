"""Let one thread make one access, and no more, while others stay where they are.

Knows: ptrace's stops, and in which order a step needs them.
Must not know: pages, rules; what is done before and after the access is handed in.

A thread that stands in a page fault is stopped with PTRACE_INTERRUPT: for ptrace the kernel
breaks off the wait, so the thread is stopped *before* its access, without a wake-up that others
would get too.  Now the page can come, the thread makes one instruction (PTRACE_SINGLESTEP), and
with the thread stopped after it the page can go again.

Within a system call there are no single steps.  There the interruption stays pending while the
call goes on, and the thread stops at the end of the call.  Meanwhile its waits for a page are
broken off and begun again by the kernel itself, so that it finds the page without a wake-up, too.
What the call does not get is sleep: it ends as after a signal that has no handler.  Most calls
are begun again then, without the program's notice; that one is stepped over as an instruction,
and sleeps.  But one that has done a part says so (a write to a pipe that is full), and
epoll_wait, semop and a few more end with EINTR: signal(7) has the list.

Laws of this file:

* A thread is let go of (PTRACE_DETACH) by whoever finishes with it, whatever has happened.
* Nobody else is woken for a step: who stands at the same page goes on standing.
* A thread that is not before its access any more (a signal handler runs) makes no step.
* No signal is lost: one that arrives during a step is delivered when the thread is let go of.
* Nothing waits long: a thread that does not stop at once (its instruction faults on a second
  page, its system call sleeps) is finished by ``poll`` when SIGCHLD comes.
* All requests come from the thread that made this object: the kernel wants that.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from typing import Final

from ..kernel import tracing

_STOP_NS: Final = 200_000_000  # until a thread that stands in a user-mode fault has stopped
_STEP_NS: Final = 1_000_000  # until one instruction is done, unless it faults again
_CALL_NS: Final = 100_000  # a short system call ends within that; others have SIGCHLD
_SIGNALS_AT_ONCE: Final = 1_000  # each is taken from the thread, so they come to an end
#: What an instruction itself can bring about.
_OF_THE_INSTRUCTION: Final = frozenset(
    {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
    if hasattr(signal, "SIGBUS")
    else ()
)


class Elsewhere(Exception):
    """The thread does not stand before its access: a signal handler runs, and it will be back."""


class _Attached:
    """A thread that has not come to the end of its access yet."""

    __slots__ = ("afters", "process", "signals", "stepped", "system_call")

    def __init__(self, process: int, system_call: int | None) -> None:
        self.process = process
        self.system_call = system_call  # that it is in
        self.afters: list[Callable[[], None]] = []
        self.signals: list[int] = []
        self.stepped = False


class Stepper:
    """Threads that are being stepped over.

    Sharing: the thread that made it.
    """

    def __init__(self, moves: Callable[[int], object]) -> None:
        """Begin with nobody attached.

        Args:
            moves: Called with a thread that is about to be let go of: what it has said of pages
                until now is over.
        """
        self._moves = moves
        self._attached: dict[int, _Attached] = {}

    def __len__(self) -> int:
        return len(self._attached)

    def __contains__(self, thread: object) -> bool:
        return thread in self._attached

    def call_of(self, thread: int) -> int | None:
        """Give the number of the system call in which a thread is being stepped over."""
        attached = self._attached.get(thread)
        return None if attached is None else attached.system_call

    def again(self, thread: int) -> None:
        """Have a thread that is in a system call look at its page once more, if it waits there."""
        with contextlib.suppress(ProcessLookupError):
            tracing.interrupt(thread)

    def over(
        self,
        process: int,
        thread: int,
        *,
        system_call: int | None,
        pc: int,
        let: Callable[[], None],
        after: Callable[[], None] | None,
    ) -> None:
        """Let a thread that stands in a page fault make its access, and only that thread.

        Args:
            process: Its process.
            thread: Who.
            system_call: The one that touched the page for it; None if it did so itself.
            pc: The instruction before which it stands; 0 if not known, or in a system call.
            let: Makes the page accessible, and wakes nobody.
            after: What to do once the access is made, with the thread stopped; None to let it
                run on.

        Raises:
            OSError: The thread cannot be traced (EPERM: by a debugger already, or not
                permitted; ESRCH: it has ended).  ``let`` was not called.
            Elsewhere: It does not stand there.  ``let`` was not called.
        """
        attached = self._attached.get(thread)
        if attached is None:  # else it stands on its way to the end of the step that it is in
            tracing.seize(thread)
            attached = self._attached[thread] = _Attached(process, system_call)
        tracing.interrupt(thread)
        in_call = attached.system_call is not None
        status = None if in_call else tracing.wait(thread, block_ns=_STOP_NS)
        stopped = status is not None and os.WIFSTOPPED(status)
        if stopped:
            assert status is not None
            self._note(thread, status)
            if pc and _pc_of(process, thread) not in (pc, 0):
                self._go(thread, 0)
                raise Elsewhere
        try:
            let()
        except BaseException:
            if stopped:
                self._go(thread, 0)
            raise  # else it is let go of when it stops
        if after is not None:
            attached.afters.append(after)
        if not stopped:
            # Not scheduled yet, say: ``poll`` has it make its step, or it has ended.
            self._finish(thread, status or tracing.wait(thread, block_ns=_CALL_NS))
        elif not attached.afters:
            self._go(thread, 0)
        else:
            tracing.singlestep(thread)
            self._finish(thread, tracing.wait(thread, block_ns=_STEP_NS))

    def beside(self, process: int, thread: int, do: Callable[[], None]) -> bool:
        """Do something while a thread stands still, whatever it was doing; then it goes on.

        Args:
            process: Its process.
            thread: One that waits in a system call which can be begun again.
            do: What to do.

        Returns:
            Whether that was done: False if the thread cannot be traced, or does not stop.
        """
        if thread in self._attached:
            return False
        try:
            tracing.seize(thread)
        except OSError:
            return False
        self._attached[thread] = _Attached(process, system_call=0)
        tracing.interrupt(thread)
        status = tracing.wait(thread, block_ns=_STOP_NS)
        if status is None or not os.WIFSTOPPED(status):
            return False  # ``poll`` lets go of it
        try:
            self._note(thread, status)
            do()
        finally:
            self._go(thread, 0)
        return True

    def then(self, thread: int, after: Callable[[], None]) -> None:
        """Do something more at the end of a thread's step; at once if it is over."""
        attached = self._attached.get(thread)
        if attached is None:
            after()
        else:
            attached.afters.append(after)

    def stop(self, process: int, thread: int) -> Callable[[], None] | None:
        """Stop a thread that stands in a user-mode fault: a wake-up does not reach it then.

        Returns:
            What lets go of it: it makes its access again.  None if it cannot be stopped.
        """
        if thread in self._attached:
            return None
        try:
            tracing.seize(thread)
            tracing.interrupt(thread)
        except OSError:
            return None
        attached = self._attached[thread] = _Attached(process, None)
        status = tracing.wait(thread, block_ns=_STOP_NS)
        if status is None or not os.WIFSTOPPED(status):
            self._finish(thread, status)
            return None
        self._note(thread, status)
        del self._attached[thread]

        def let_go() -> None:
            self._attached[thread] = attached
            self._go(thread, 0)

        return let_go

    def poll(self) -> list[Exception]:
        """Go on with whoever has stopped; to be called when SIGCHLD has come.

        Returns:
            What went wrong with what there was to do after an access.
        """
        failed: list[Exception] = []
        for thread in list(self._attached):
            try:
                self._finish(thread, tracing.wait(thread, block_ns=0))
            except ChildProcessError:  # its end was told already
                self._attached.pop(thread, None)
            except Exception as error:  # the others are to be let go of, whatever it is
                failed.append(error)
        return failed

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
            try:
                if attached.system_call is None:
                    is_made = number in _OF_THE_INSTRUCTION or (
                        not number and not tracing.is_event_stop(status)
                    )
                elif number:
                    is_made = True  # a handler is to interrupt the call, if there is one
                elif attached.stepped and tracing.is_event_stop(status):
                    is_made = False  # the step's own SIGTRAP is still to come, and would kill
                else:
                    is_made = not tracing.is_begun_again(thread)
                if is_made:
                    break
                attached.stepped = True
                tracing.singlestep(thread)
            except ProcessLookupError:
                return  # killed: its end comes next
            status = tracing.wait(thread, block_ns=_STEP_NS)
        self._go(thread, 0)

    def _go(self, thread: int, status: int | None) -> None:
        """Do what comes after the access, and let go of the thread; None: it has ended."""
        attached = self._attached.pop(thread)
        try:
            for after in attached.afters:
                after()
        finally:
            self._moves(thread)
            if status is not None:
                *earlier, last = attached.signals or [0]
                try:
                    tracing.detach(thread, last)
                    for number in earlier:
                        tracing.tgkill(attached.process, thread, number)
                except ProcessLookupError:
                    self._bury(thread, attached)

    def _bury(self, thread: int, attached: _Attached) -> None:
        """Hear the end of a thread that was killed: nobody else may until its tracer has."""
        attached.afters.clear()
        try:
            status = tracing.wait(thread, block_ns=0)
        except ChildProcessError:
            return  # it was let go of, and ended then
        if status is None or os.WIFSTOPPED(status):
            self._attached[thread] = attached  # ``poll`` will hear it


def _pc_of(process: int, thread: int) -> int:
    """Say before which instruction a stopped thread is; 0 if that cannot be told."""
    try:
        return tracing.in_system_call(process, thread)[1]
    except OSError:
        return 0
