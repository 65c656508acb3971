"""The door for a thread that stands in a page fault with the GIL in its hands.

Knows: real-time signals, the handler that runs on top of an interrupted access, and its wait.
Must not know: userfaultfds, pages, rules; who decides about a touch sits in another process.

A Python access (``view[0]``, ``bytes(view)``) holds the GIL, and a thread that the kernel keeps
in a page fault keeps it too: no other thread of the process runs any Python.  The *service*,
another process, then sends that thread a real-time signal.  A user-mode fault can be
interrupted; the handler, a *ctypes callback*, runs in that thread on top of the access.  It
tells the service "parked" and waits on a lock, and a wait on a lock gives the GIL away.  When
``go`` releases the lock the handler returns and the CPU runs the instruction again.

For the service:

* The signal is for a thread whose fault is unanswered, and that stays so until "parked" is
  said.  Anywhere else the thread may hold a lock of malloc's, and Python on top of it hangs.
* ``tell(tid)`` says "parked", once per signal, and wants one ``go(tid)``.  Parking nests, since
  a handler of Python's that runs during the wait may touch a page, too: ``go`` ends the
  innermost.
* Between the signal and "parked" any time may pass: the callback needs the GIL, and another
  thread may stand with it, which has to be parked first.
* Any other signal to a standing thread makes its fault come twice.  So a second message is no
  sign that ours was in vain; that it is no longer pending (``SigPnd``), "parked" is not said,
  and the thread is in a fault all the same, is one.
* A handler of Python's that is due when the thread is parked runs before our first line, with
  the signal still blocked (``SigBlk``).  If it touches a page that stands, nothing can help it.
* ``tell(-tid)`` says "parked, and interrupted, by Ctrl-C for one": answer the fault, then
  ``go``.  It may come again, and without a ``tell(tid)`` before it.
* A thread that has used up its recursion limit cannot say anything: the handler returns and
  the same fault comes again.  Who has sent the signal for the same fault a few times in vain
  lets that thread pass; no pure Python can help it.

Laws of this file:

* No exception leaves the callback: ctypes would print and drop it.  One that a signal handler
  of Python's raised (KeyboardInterrupt) is raised again once the access is done.
* Four Python frames at most, ``tell`` included: the callback uses up the interrupted stack's
  recursion budget.
* Nothing is printed, logged or imported in the callback, and no lock is taken in it that any
  other code holds: what is shared is a deque, whose single operations are atomic.
* A signal of anybody else's, and any in a forked child, returns at once.
* Every wait ends: by ``go``, by ``release_all``, or after the service's limit.

C facts (``sigbus`` has more).  Not ``SA_NODEFER``: a second signal that comes while the first
is on its way into Python would run on top of whatever that is just doing, and crash it (seen).
The callback lets it through first of all, for parking nests.  Not ``SA_ONSTACK``: the alternate
stack is far too small for Python.  ``use_errno`` keeps the interrupted C code's errno in
ctypes' own copy meanwhile; that copy is put back at the end, for a callback nested in the wait
swaps it away.
"""

from __future__ import annotations

import _thread
import ctypes
import errno
import faulthandler
import importlib
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, Final, Self

from .. import sigbus
from ..errors import ClosedError, NotSupported

#: Tells the service that thread ``tid`` is parked, or with ``-tid`` that it was interrupted.
#: It sends and does not wait for an answer; it raises OSError if the service is gone.
Tell = Callable[[int], object]

#: Seconds after which a thread no longer waits for ``go``: a backstop, for the service has a
#: limit of its own, and when it dies the porter calls ``release_all``.
LIMIT: Final = 120.0

_SI_TKILL: Final = -6 & 0xFFFFFFFF
_LOW: Final = 0xFFFFFFFF
_FLAGS: Final = sigbus._SA_SIGINFO | sigbus._SA_RESTART
_GONE: Final = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF})

#: One that stands: its thread, its lock, the service that it waits for, how that hears of it, and
#: for how many seconds it waits.  No named tuple: making one takes a frame of its own.
_Place = tuple[int, _thread.LockType, int, Tell, float]

_parked: deque[_Place] = deque()
_services: dict[int, tuple[Tell, float]] = {}
_home = 0  # the process that the services are of

_changing = threading.Lock()  # guards installation; the callback never takes it
_tell: Tell | None = None
_number = 0  # the signal, once there is one
_again = 0  # another one, with which an exception is raised after the access
_late: deque[BaseException] = deque()

# Bound once: near the recursion limit a call more is a call too many.
_words = sigbus._words
_getpid = os.getpid
_get_native_id = threading.get_native_id
_get_ident = threading.get_ident
_allocate_lock = _thread.allocate_lock
_get_errno = ctypes.get_errno
_set_errno = ctypes.set_errno
#: ``signal``'s own functions wrap these and make enums, which is deep.
_signal: Any = importlib.import_module("_signal")
_pthread_sigmask = _signal.pthread_sigmask
_SIG_UNBLOCK: Final = _signal.SIG_UNBLOCK
_TRIES: Final = (1, 2, 3)


def _on_signal(
    number: int,
    info: int,
    _context: int,
    # Not for ctypes, which gives three: bound before the first instruction, which may raise.
    place: _Place | None = None,
    error: BaseException | None = None,
    saved: int = 0,
) -> None:
    while True:
        try:
            if place is None:
                # Until it is let through a second signal stays blocked, and a handler of
                # Python's would stand for good: so nothing is called here that looks for one.
                sender = _words[(info >> 3) + 2] & _LOW  # si_pid
                if sender not in _services or _words[(info >> 3) + 1] & _LOW != _SI_TKILL:
                    break
                tell, limit = _services[sender]
                _pthread_sigmask(_SIG_UNBLOCK, (number,))
                if _getpid() != _home:
                    break
                saved = _get_errno()
                lock = _allocate_lock()
                lock.acquire()
                place = (_get_native_id(), lock, sender, tell, limit)
                _parked.append(place)
                if sender not in _services:  # all were released just before we came
                    break
            elif place not in _parked:  # interrupted when somebody had already let us go
                break
            tid, lock, _, tell, limit = place
            tell(tid if error is None else -tid)
            lock.acquire(True, limit)
            break
        except BaseException as caught:
            if isinstance(caught, RecursionError) or getattr(caught, "errno", None) in _GONE:
                break
            error = caught
    for _ in _TRIES:
        try:
            if place is not None and place in _parked:
                _parked.remove(place)
            if error is not None:
                _raise_after_the_access(error)
            if place is not None:
                _set_errno(saved)
            break
        except BaseException as caught:
            if error is None:
                error = caught


def _raise_after_the_access(error: BaseException) -> None:
    # Nothing can be raised in C code that copies bytes, and until the access is done the only
    # Python code of this thread is ours.  So the thread sends itself a signal, blocked until
    # the callback has returned to the kernel, which restores the mask; Python handles it as
    # any other, after the interrupted bytecode.  Only the main thread can be interrupted in a
    # wait, and only it may do this; what SetAsyncExc threw at another one is lost.
    _signal.signal(_again, _raise_late)
    if error not in _late:  # this may be a second try
        _late.append(error)
    _pthread_sigmask(_signal.SIG_BLOCK, (_again,))
    _signal.pthread_kill(_get_ident(), _again)


def _raise_late(_signal_number: int, _frame: FrameType | None) -> None:
    if _late:
        raise _late.popleft().with_traceback(None)


def _cover_the_entry(function: Any) -> None:
    """Have a function's first ``try`` cover its first instruction, too.

    Python runs signal handlers at the entry of a function, in CPython's RESUME instruction,
    which no ``try`` in the source can stand before.  A Ctrl-C that came while the main thread
    stood in the fault raises just there.  So the first range of the function's exception table
    is repeated for what stands before it.
    """
    code = function.__code__
    table = code.co_exceptiontable
    entry: list[int] = []
    at = 0
    while len(entry) < 4:  # start, size, target, depth: six bits a byte, 0x40 if more follow
        value = table[at] & 0x3F
        while table[at] & 0x40:
            at += 1
            value = value << 6 | table[at] & 0x3F
        entry.append(value)
        at += 1
    start, _size, target, depth = entry
    function.__code__ = code.replace(
        co_exceptiontable=_varints((0, start, target, depth)) + table,
    )


def _varints(values: Sequence[int]) -> bytes:
    written = bytearray()
    for value in values:
        groups = [value & 0x3F]
        while value := value >> 6:
            groups.append(value & 0x3F | 0x40)
        written += bytes(reversed(groups))
    written[0] |= 0x80  # an entry starts here
    return bytes(written)


if sys.version_info < (3, 15):  # the table's form is CPython's own affair, and may change
    _cover_the_entry(_on_signal)

#: Kept for the life of the process: a freed callback is a jump into freed memory.
_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, use_errno=True)(
    _on_signal
)


# --- for the harness and its porter -----------------------------------------------------


def install(tell: Tell) -> int:
    """Take a free real-time signal for parking; the second time, the same one.

    Kernel: sigaction(2); real-time signals, since Linux 2.2.

    Args:
        tell: Runs in the parked thread, on top of what it was doing: it sends the number it is
            given and nothing else.  Services named from now on hear by it.

    Returns:
        The number of the signal that the service has to send, by tgkill(2).

    Raises:
        NotSupported: No signal is free, or this is not the main interpreter of a Python on
            64-bit Linux.

    Sharing: any thread.
    """
    global _tell, _number, _again
    if sys.platform != "linux" or sys.maxsize < 1 << 32:
        raise NotSupported(
            "parking a thread takes 64-bit Linux", "Freeze threads of another process instead."
        )
    if not sigbus._in_main_interpreter():
        raise NotSupported(
            "a signal handler belongs to the main interpreter", "Use the harness there."
        )
    with _changing:
        if not _number or not _is_ours(_number):
            number = _take_signal()
            if not _again:
                _again = _take_signal()
            _number = number
        _tell = tell
    return _number


def set_service(pid: int, tell: Tell | None = None, *, limit: float = LIMIT) -> None:
    """Answer the signals of a service from now on, beside those of others.

    Args:
        pid: The service's process id, as this process sees it.
        tell: How it hears of parked threads; None: by what ``install`` was given last.
        limit: Seconds that a thread waits for its ``go`` at the most.

    Sharing: any thread.
    """
    global _home
    tell = tell or _tell
    if tell is None:
        raise RuntimeError("install() comes before set_service()")
    _home = os.getpid()
    _services[pid] = tell, min(limit, threading.TIMEOUT_MAX)


def go(tid: int) -> bool:
    """Let a parked thread go on: its access runs again.

    Args:
        tid: The thread, as ``tell`` was given it.

    Returns:
        Whether it was parked; of several waits in one thread the innermost ends.

    Sharing: any thread.
    """
    for place in reversed(list(_parked)):
        if place[0] == tid:
            try:
                _parked.remove(place)
            except ValueError:  # another call of these, or its limit, was first
                continue
            place[1].release()
            return True
    return False


def release_all(pid: int | None = None) -> int:
    """Let every parked thread go on, and park no more for this service.

    Args:
        pid: The service that is gone; None: all of them.

    Returns:
        How many waits ended.

    Sharing: any thread.
    """
    if pid is None:
        _services.clear()
    else:
        _services.pop(pid, None)
    released = 0
    for place in reversed(list(_parked)):
        if pid is None or place[2] == pid:
            try:
                _parked.remove(place)
            except ValueError:
                continue
            place[1].release()
            released += 1
    return released


def parked() -> tuple[int, ...]:
    """Give the threads that are parked at this moment, in the order in which they came."""
    return tuple(place[0] for place in list(_parked))


# --- signals ----------------------------------------------------------------------------


def _free_signal() -> int:
    """Find a real-time signal that nobody uses and that this thread does not block."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    # From the top: what programs choose for themselves they count from SIGRTMIN.
    for number in range(signal.SIGRTMAX, signal.SIGRTMIN - 1, -1):
        if number not in blocked and not _handler(number):  # SIG_DFL is 0
            return number
    raise NotSupported(
        f"every real-time signal ({signal.SIGRTMIN} to {signal.SIGRTMAX}) has a handler or is"
        " blocked in this process",
        "Leave one to the harness: it stops threads with it.",
    )


def _take_signal() -> int:
    number = _free_signal()
    action = sigbus._SigAction()
    action.handler = ctypes.cast(_callback, ctypes.c_void_p).value
    action.flags = _FLAGS
    _sigaction(number, ctypes.byref(action), None)
    return number


def _is_ours(number: int) -> bool:
    return _handler(number) == ctypes.cast(_callback, ctypes.c_void_p).value


def _handler(number: int) -> int:
    current = sigbus._SigAction()
    _sigaction(number, None, ctypes.byref(current))
    return int(current.handler or 0)


def _sigaction(number: int, new: object, old: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sigaction.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    if libc.sigaction(number, new, old) != 0:
        failed = ctypes.get_errno()
        raise OSError(failed, os.strerror(failed), f"sigaction of signal {number}")


def _after_fork_in_child() -> None:
    # The services are the parent's.  Its parked threads are not here, but one of them may be
    # this very thread, forked by a signal handler that ran in its wait.
    global _changing
    _changing = threading.Lock()
    release_all()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


# --- stacks of all threads --------------------------------------------------------------


class StackDump:
    """What every thread is doing, written by a signal into memory that others can read.

    The handler is faulthandler's own, in C: it takes no GIL, so it also works while a thread
    stands in a page fault with the GIL in its hands.

    Attributes:
        signal: Send this one to the process, by kill(2) or tgkill(2).

    Sharing: any thread; close it once.
    """

    def __init__(self) -> None:
        """Open the memory and take a free real-time signal.

        Kernel: memfd_create(2), since Linux 3.17.

        Raises:
            NotSupported: No signal is free, or this is not Linux.
        """
        self._fd = -1  # so that __del__ is safe when something below raises
        if sys.platform != "linux":
            raise NotSupported("stacks are dumped on Linux only", "Use it there.")
        with _changing:
            self.signal = _free_signal()
            self._fd = os.memfd_create("stacks", os.MFD_CLOEXEC)
            try:
                faulthandler.register(self.signal, file=self._fd, all_threads=True, chain=False)
            except BaseException:
                os.close(self._fd)
                self._fd = -1
                raise

    @property
    def fd(self) -> int:
        """The memfd, to be handed to whoever sends the signal; it stays ours.

        Raises:
            ClosedError: It is closed.
        """
        if self._fd < 0:
            raise ClosedError("this stack dump is closed")
        return self._fd

    def text(self) -> str:
        """Read what was dumped since the start or since ``clear``; empty if nothing was."""
        size = os.fstat(self.fd).st_size
        return os.pread(self.fd, size, 0).decode(errors="replace")

    def clear(self) -> None:
        """Forget what was dumped."""
        os.ftruncate(self.fd, 0)
        os.lseek(self.fd, 0, os.SEEK_SET)

    def close(self) -> None:
        """Give the signal back; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            faulthandler.unregister(self.signal)
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._fd >= 0:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
