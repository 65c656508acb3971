"""The trampoline: the one SIGBUS handler of the process, under all lazy memory in it.

Knows: sigaction(2), which target owns an address, and how a failed access becomes an exception.
Must not know: userfaultfds, loops, handlers; a Target answers for its own range.

A userfaultfd with feature SIGBUS never parks a thread: the kernel sends SIGBUS to the thread
that touched the page, synchronously, in the middle of that instruction.  The handler is a
*ctypes callback*, so Python runs in that thread on top of the interrupted access; while it
waits on a lock the GIL is free and the event loop can bring the page.  When the callback
returns, the CPU restarts the instruction.  Python in a signal handler is sound here because
the signal is synchronous: it interrupts code that touches lazy memory, never malloc or the
garbage collector, whose objects do not live there.

Laws of this file:

* No exception leaves the callback: ctypes would print and drop it, and the instruction would
  fault again for ever.
* Four Python frames at most: the callback uses up the interrupted stack's recursion budget.
* Nothing is printed, logged or imported before the fault is answered.
* A SIGBUS that is not ours goes back to who had the signal before, and so does one that
  cannot be answered: the access faults again and the process dies with a report.

Kernel and C facts: ``SA_NODEFER``, because a synchronous signal that is blocked kills the
process, and another one may come while this thread waits.  Not ``SA_ONSTACK``: the alternate
stack (faulthandler installs one) is far too small for Python.  ``use_errno``, because the
interrupted C code's errno must survive.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import platform
import signal
import sys
import threading
from bisect import bisect_right
from collections import deque
from typing import Any, Final, Protocol

from . import frame_raise
from .errors import NotSupported, StuckPage

_SIGBUS: Final = int(getattr(signal, "SIGBUS", 7))
_BUS_MCEERR_AR: Final = 4  # the memory itself is broken
_SA_SIGINFO: Final = 0x4
_SA_RESTART: Final = 0x10000000
_SA_NODEFER: Final = 0x40000000

#: The page fault's error code in ucontext_t (gregs[REG_ERR]), in words; its bit 1 is "write".
_ERROR_CODE_WORD: Final = 24 if platform.machine() == "x86_64" else None


class Target(frame_raise.Undo, Protocol):
    """A range of memory whose SIGBUS is answered here."""

    @property
    def start(self) -> int:
        """Its first address; never changes."""

    @property
    def end(self) -> int:
        """One past its last address; never changes."""

    def fault(self, address: int, write: bool | None) -> BaseException | None:
        """Make the page at ``address`` accessible, waiting for it if need be.

        Args:
            address: The exact address that was touched.
            write: Whether it was a write; None where the CPU's error code is not known.

        Returns:
            None if the access can be tried again, else what to raise in the frame that
            made it.
        """

    def let_through(self, address: int) -> None:
        """Make the failed access complete, with nothing lost that ``undo`` cannot restore."""

    def forked(self) -> None:
        """Give up, in a forked child: no memory, no loop and no other thread is here."""

    def report(self, error: BaseException, address: int) -> None:
        """Tell somebody of an error that no Python frame can get; the process dies next."""


class _SigAction(ctypes.Structure):
    """``struct sigaction`` of glibc and musl on 64-bit Linux."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


#: Starts and targets in the same order, replaced as one object so that the callback needs no
#: lock to read it.
_table: tuple[list[int], list[Target]] = ([], [])
_changing = threading.Lock()  # guards _table's replacement and the disposition; not the callback

_gone: deque[Target] = deque()  # to be removed

_previous = _SigAction()
_ours = _SigAction()

# Bound once: near the recursion limit a call more is a call too many.
_getframe = sys._getframe
_write = os.write
#: All of this process's memory as words: what the kernel put on the stack for the handler is
#: read from here, in a fifth of the time that an object made ``from_address`` takes.
_words = (ctypes.c_uint64 * (1 << 45)).from_address(0)
_libc: Any = None
_TRIES: Final = (1, 2, 3)
_previous_ref = ctypes.byref(_previous)
_wild = ctypes.cast(8, ctypes.POINTER(ctypes.c_char))


def _on_sigbus(_number: int, info: int, context: int) -> None:
    target: Target | None = None
    address = 0
    error: BaseException | None = None
    try:
        address = _words[(info >> 3) + 2]  # si_addr
        starts, targets = _table
        index = bisect_right(starts, address) - 1
        if index >= 0 and address < targets[index].end:
            target = targets[index]
            write = None
            if _ERROR_CODE_WORD is not None:
                write = _words[(context >> 3) + _ERROR_CODE_WORD] & 2 != 0
            error = target.fault(address, write)
            if error is None:
                return
    except BaseException as caught:
        error = caught
    for _ in _TRIES:
        try:
            if target is None or error is None or isinstance(error, StuckPage):
                break
            frame = _getframe().f_back
            if frame is None:  # a thread that Python did not start
                target.report(error, address)
                break
            # Armed before the placeholder is there: an interrupt between the two can then at
            # worst repeat the fault, never leave zeros that nobody answers for.
            frame_raise.arm(frame, error, target, address)
            target.let_through(address)
        except KeyboardInterrupt as interrupt:
            error = interrupt
        except BaseException as caught:
            error = caught
            break
        else:
            return
    try:
        _libc.sigaction(_SIGBUS, _previous_ref, None)
        if target is not None:
            _write(2, f"aiouffd: fatal: no page at {address:#x}: {error!r}\n".encode())
    except BaseException:
        # So near the recursion limit that on 3.11 not even a C function can be called.  A
        # subscript is no call: better to die of this, with a report, than to spin for ever.
        _wild[0]


#: Kept for the life of the process: a freed callback is a jump into freed memory.
_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, use_errno=True)(
    _on_sigbus
)


def add(target: Target) -> None:
    """Answer for a range from now on; installs or repairs the signal handler.

    Args:
        target: Whatever else overlaps its range is forgotten.

    Raises:
        NotSupported: This is not 64-bit Linux, or not the main interpreter.
    """
    with _changing:
        _install()
        others = [
            # What overlaps is stale: its mapping is gone, or the kernel could not have given
            # these addresses away again.
            other
            for other in _table[1]
            if other.end <= target.start or target.end <= other.start
        ]
        _replace([*others, target])
    _sweep()


def remove(target: Target) -> None:
    """Stop answering for a range; with the last one the old disposition comes back."""
    _gone.append(target)
    _sweep()


def _sweep() -> None:
    # Never waits for the lock: a garbage collection may come here while this very thread
    # holds it.  Whoever holds it sweeps when he is done.
    while _gone and _changing.acquire(blocking=False):
        try:
            gone = [_gone.popleft() for _ in range(len(_gone))]
            before = _table[1]
            _replace([other for other in before if other not in gone])
            if before and not _table[1] and installed():
                _libc.sigaction(_SIGBUS, _previous_ref, None)
        finally:
            _changing.release()


def targets() -> tuple[Target, ...]:
    """Give the ranges that are answered for, in order of address."""
    return tuple(_table[1])


def installed() -> bool:
    """Say whether the process's SIGBUS handler is ours at this moment."""
    if _libc is None:
        return False
    current = _SigAction()
    _libc.sigaction(_SIGBUS, None, ctypes.byref(current))
    return bool(current.handler == ctypes.cast(_callback, ctypes.c_void_p).value)


def _replace(them: list[Target]) -> None:
    global _table
    them.sort(key=lambda one: one.start)
    _table = ([one.start for one in them], them)


def _install() -> None:
    global _libc
    if sys.platform != "linux" or sys.maxsize < 1 << 32:
        raise NotSupported(
            "lazy memory within this process takes 64-bit Linux", "Use another process for it."
        )
    if not _in_main_interpreter():
        raise NotSupported(
            "a signal handler belongs to the main interpreter", "Make lazy memory there."
        )
    if _libc is None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.sigaction.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        frame_raise.prepare()
        _libc = libc
    # Now, because enabling it for the first time replaces our handler, while enabling it
    # again does not.  It is also what reports a SIGBUS that we cannot answer.
    if not faulthandler.is_enabled():
        try:
            faulthandler.enable()
        except (AttributeError, OSError, RuntimeError, ValueError):  # no real sys.stderr
            faulthandler.enable(2)
    if installed():
        return
    _ours.handler = ctypes.cast(_callback, ctypes.c_void_p).value
    _ours.flags = _SA_SIGINFO | _SA_NODEFER | _SA_RESTART
    _libc.sigaction(_SIGBUS, ctypes.byref(_ours), _previous_ref)


def _in_main_interpreter() -> bool:
    name = "_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters"
    try:
        interpreters = importlib.import_module(name)
    except ImportError:  # a build without them has one only
        return True
    return bool(interpreters.get_current() == interpreters.get_main())


def _after_fork_in_child() -> None:
    # The mappings were not inherited, the loop is not here: whatever faults at these
    # addresses is somebody else's.
    global _changing, _table
    _changing = threading.Lock()
    gone, _table = _table[1], ([], [])
    _gone.clear()
    for target in gone:
        target.forked()


os.register_at_fork(after_in_child=_after_fork_in_child)
