"""Raise an exception in a frame of which one instruction is still running.

Knows: how to have Python call us back before a frame's next instruction.
Must not know: signals, userfaultfds; what there is to clean up it is told by an Undo.

The trampoline under LazyMemory runs in the middle of an instruction that touched a missing
page.  Nothing can be raised there: C code that copies bytes has no way to fail.  So the
instruction is let through on a placeholder, and *before the next instruction of that frame*
the placeholder goes away and the exception comes.

Laws of this file:

* Instruction events, never line events: with those, ``x = memory[i]`` as the last line of a
  ``try`` raises at a line that is already outside of it.
* One armed raise per frame.  A single C call may fail on many pages; arming twice would lose
  the first clean-up and leave a page of zeros behind.
* Arming is done before the placeholder becomes visible, and arming again does no harm: a
  Ctrl-C may interrupt any line here.

``PyThreadState_SetAsyncExc`` does not do: it would fire inside of the trampoline.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, Final, Protocol


class Undo(Protocol):
    """What made the instruction go through, and can take that back."""

    def undo(self, address: int) -> None:
        """Take back what was done for the access to ``address``; never raises."""


class _Pending:
    """An exception that waits for its frame."""

    __slots__ = ("error", "restore", "thread", "undone")

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.undone: list[tuple[Undo, int]] = []
        self.thread = threading.get_ident()
        #: the frame's own trace function and opcode switch, while ours is in their place
        self.restore: tuple[Any, bool] | None = None

    def undo(self) -> None:
        for what, address in self.undone:
            what.undo(address)


_pending: dict[FrameType, _Pending] = {}

#: Guards _pending together with the events of the code objects.  Reentrant: a Ctrl-C handler
#: that touches a missing page may run while this thread holds it.
_lock = threading.RLock()


def arm(frame: FrameType, error: BaseException, what: Undo, address: int) -> None:
    """Have ``error`` raised in ``frame`` before its next instruction.

    If the frame has an armed error already, that one is kept and only the clean-up is added,
    except that an error which is no Exception (KeyboardInterrupt) takes precedence.

    Args:
        frame: A frame of this thread, in the middle of an instruction.
        error: What to raise there.
        what: Whose ``undo`` to call first.
        address: The argument of that call.

    Sharing: any thread.
    """
    with _lock:
        pending = _pending.get(frame)
        if pending is None:
            pending = _pending[frame] = _Pending(error)
        elif not isinstance(error, Exception):
            pending.error = error
        pending.undone.append((what, address))
        _watch(frame, pending)


def armed(address_of: Undo) -> bool:
    """Say whether an armed error still has something to take back of ``address_of``."""
    return any(
        what is address_of
        for pending in list(_pending.values())
        for what, _ in list(pending.undone)
    )


# --- Python 3.12 and newer: sys.monitoring ----------------------------------------------

#: Tool ids that no convention claims (0 debugger, 1 coverage, 2 profiler, 5 optimizer).
_FREE_TOOL_IDS: Final = (4, 3)
_tool: int | None = None


def _fire(frame: FrameType) -> None:
    """Raise what is armed for a frame, if anything is."""
    pending = _pending.get(frame)
    if pending is None:  # another frame of the same code, or another thread's
        return
    pending.undo()  # at once: until then other threads may see the placeholder
    with _lock:
        _pending.pop(frame, None)
        _listen(frame.f_code)
    raise pending.error.with_traceback(None)


def _on_instruction(_code: CodeType, _offset: int) -> None:
    _fire(sys._getframe(1))


def _on_raise(_code: CodeType, _offset: int, _error: BaseException) -> None:
    # The interrupted call has failed by itself, perhaps because of what it read in the
    # placeholder.  Raised here, ours takes the place of that error within the same ``try``.
    _fire(sys._getframe(1))


if sys.version_info >= (3, 12):

    def _listen(code: CodeType) -> None:
        """Hear of just what is needed; events belong to a code object, not to a frame."""
        if _tool is not None:
            events, waiting = sys.monitoring.events, list(_pending)
            wanted = any(frame.f_code is code for frame in waiting)
            sys.monitoring.set_local_events(_tool, code, events.INSTRUCTION if wanted else 0)
            sys.monitoring.set_events(_tool, events.RAISE if waiting else 0)

    def _take_tool() -> int | None:
        for tool in _FREE_TOOL_IDS:
            try:
                sys.monitoring.use_tool_id(tool, "aiouffd")
            except ValueError:
                continue
            events = sys.monitoring.events
            sys.monitoring.register_callback(tool, events.INSTRUCTION, _on_instruction)
            sys.monitoring.register_callback(tool, events.RAISE, _on_raise)
            return tool
        return None

else:

    def _listen(_code: CodeType) -> None:
        raise NotImplementedError("sys.monitoring came with Python 3.12")

    def _take_tool() -> int | None:
        return None


def _watch_by_monitoring(frame: FrameType, _: _Pending) -> None:
    _listen(frame.f_code)


# --- Python 3.11: a trace function ------------------------------------------------------


def _ignore(_frame: FrameType, _event: str, _argument: object) -> None:
    """Trace nothing: it only makes Python look at ``f_trace`` at all."""


def _on_trace(frame: FrameType, _event: str, _argument: object) -> Any:
    pending = _pending.get(frame)
    if pending is None:
        return None
    pending.undo()  # at once: until then other threads may see the placeholder
    _pending.pop(frame, None)
    if pending.restore is not None:
        frame.f_trace, frame.f_trace_opcodes = pending.restore
    # Python drops this thread's trace function when one raises, so an outer frame that is
    # armed as well would never be told.  The exception on its way there takes its place.
    for other, waiting in list(_pending.items()):
        if waiting.thread == pending.thread:
            del _pending[other]
            if waiting.restore is not None:
                other.f_trace, other.f_trace_opcodes = waiting.restore
            waiting.undo()
    raise pending.error.with_traceback(None)


def _watch_by_trace(frame: FrameType, pending: _Pending) -> None:
    if pending.restore is None:
        pending.restore = frame.f_trace, frame.f_trace_opcodes
    frame.f_trace_opcodes = True  # before f_trace, or the first instruction goes unseen
    frame.f_trace = _on_trace
    sys.settrace(_ignore)


# --- the choice -------------------------------------------------------------------------

_watch: Callable[[FrameType, _Pending], None] = _watch_by_trace

MONITORING: Final = "monitoring"
TRACE: Final = "trace"


def prepare(mechanism: str | None = None) -> str:
    """Choose how frames are watched; must be called before the first ``arm``.

    Args:
        mechanism: ``monitoring`` (3.12 and newer; leaves debuggers and coverage alone) or
            ``trace`` (a tracer of the failing thread is lost).  By default the better one
            that is to be had.

    Returns:
        The mechanism in use.

    Raises:
        ValueError: It is not to be had here.
    """
    global _tool, _watch
    if mechanism != TRACE and _tool is None:
        _tool = _take_tool()
    if mechanism == MONITORING and _tool is None:
        raise ValueError("sys.monitoring is not there (Python 3.12), or its tool ids are taken")
    use_monitoring = _tool is not None and mechanism != TRACE
    _watch = _watch_by_monitoring if use_monitoring else _watch_by_trace
    return MONITORING if use_monitoring else TRACE


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()  # the copy may be held by a thread that is not here


os.register_at_fork(after_in_child=_after_fork_in_child)
