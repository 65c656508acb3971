"""The helper process as the test process sees it: started, asked, heard, ended.

Knows: a subprocess, two channels, the trampoline's door.
Must not know: what is ordered, what is told.

Laws of this file:

* An order is sent and answered under one lock; no order waits for a thread of the test.
* An answer is that of the order: one whose wait was broken off is not taken for the next one's.
* The helper is the only one that keeps the userfaultfd: if it dies, threads go on at once.
* However it ends, no thread is left in the trampoline, and no descriptor or child behind.
* Nothing here keeps a harness: one that is dropped is collected.
* A forked child of the test process has no helper: it says so.
* A process that is kept for the next harness has said that nothing is left of the last one;
  any other ends.  Nobody gets one that was kept by another process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from ..errors import UffdError
from ..kernel import tracing
from ..uffd import Userfaultfd
from . import trampoline
from .channel import Channel, Message, pair
from .failures import HarnessError

#: An order takes microseconds; a helper that is silent that long is lost.
ANSWER_SECONDS: Final = 20.0
_EVERYBODY: Final = -1
_MARGIN_SECONDS: Final = 60.0  # for the stacks to be read, and a busy machine
ENDED: Final = (
    "the helper process has ended: threads that stood at a page went on, and pages that nobody"
    " had touched read as zeros"
)
SILENT: Final = (
    "the helper process did not answer in time and was ended: threads that stood at a page went"
    " on, and pages that nobody had touched read as zeros"
)
#: Those that have not been ended: who drops a harness still has to end its helper, so the
#: helper's own parts are not to be collected with it, or before it.
_open: Final[set[Helper]] = set()
#: Errors of the helper's that mean the same here.
_ERRORS: Final[dict[str, type[Exception]]] = {"ValueError": ValueError}


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Keep one helper process from each harness to the next, until the end of the block.

    Starting one takes some 50 milliseconds, most of it Python's own imports.
    """
    _spare.wanted += 1
    try:
        yield
    finally:
        _spare.wanted -= 1
        _spare.end()


class _Process:
    """The process itself, with both channels to it; it serves one harness after the other.

    Attributes:
        owner: The test process.
        is_clean: It has said that nothing is left of the last harness.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.is_clean = False
        with contextlib.ExitStack() as stack:
            self.commands, commands = pair()
            stack.callback(commands.close)
            self.events, events = pair()
            stack.callback(events.close)
            self.commands.sock.settimeout(ANSWER_SECONDS)
            undo = stack.enter_context(contextlib.ExitStack())
            undo.callback(self.commands.close)
            undo.callback(self.events.close)
            self._popen = subprocess.Popen(
                _command(commands.fileno(), events.fileno()),
                pass_fds=(commands.fileno(), events.fileno()),
                stdin=subprocess.DEVNULL,
            )
            undo.pop_all()
        self.pid = self._popen.pid

    @property
    def is_ours(self) -> bool:
        """Whether it serves this process, and lives."""
        # In this order: asked in a forked child, Popen learns that it has nothing to wait for.
        return self._popen.poll() is None and self.owner == os.getpid()

    def end(self) -> None:
        """Have it end, and wait until it has; whoever hears it, hears that."""
        for channel in (self.commands, self.events):
            with contextlib.suppress(OSError):
                channel.sock.shutdown(socket.SHUT_RDWR)
        try:
            self._popen.wait(ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()

    def kill(self) -> None:
        """Kill it."""
        self._popen.kill()
        self._popen.wait()

    def close(self) -> None:
        """Close the channels; after its end."""
        self.commands.close()
        self.events.close()


class _Spare:
    """At most one process without a harness.

    Sharing: any thread.
    """

    def __init__(self) -> None:
        self.wanted = 0
        self._processes: list[_Process] = []

    def take(self) -> _Process:
        """Give a process: the one that was kept, or a new one."""
        while self._processes:
            process = self._processes.pop()
            if process.is_ours:
                process.is_clean = False
                return process
            self._drop(process)
        return _Process()

    def keep(self, process: _Process) -> None:
        """Keep a process if one is wanted, or end it."""
        if self.wanted and not self._processes:
            self._processes.append(process)
        else:
            self._drop(process)

    def end(self) -> None:
        """End what was kept, unless somebody else still wants it."""
        while self._processes and not self.wanted:
            self._drop(self._processes.pop())

    @staticmethod
    def _drop(process: _Process) -> None:
        if process.owner == os.getpid():
            process.end()
        process.close()


_spare: Final = _Spare()


class Helper:
    """A helper process that serves a harness, and the thread that hears it.

    Attributes:
        pid: Its process id.
        cannot_step: Why it cannot step over threads; empty if it can.

    Sharing: any thread of the process that made it.
    """

    def __init__(
        self,
        uffd: Userfaultfd,
        hear: Callable[[Message | None], None],
        *,
        timeout: float,
        seed: int,
        trampoline_use: str,
    ) -> None:
        """Start it, or take the one that was kept.

        Args:
            uffd: Of this process's memory; the caller closes its own descriptor.
            hear: Gets what it tells, in a thread of its own; None once it has ended.
            timeout: Seconds that a thread may stand.
            seed: Of latencies.
            trampoline_use: ``auto``; ``never`` or ``always`` have threads wait there.

        Raises:
            HarnessError: It did not start.
            NotSupported: There is no free signal for the trampoline.
        """
        self._owner = os.getpid()
        self._over = threading.Event()
        self._ordering = threading.Lock()
        self._orders = 0
        with contextlib.ExitStack() as undo:
            self._stacks = trampoline.StackDump()
            undo.callback(self._stacks.close)
            door = trampoline.install(_nobody)
            self._process = _spare.take()
            undo.callback(self._process.close)
            undo.callback(self._reap)
            self._commands, self._events = self._process.commands, self._process.events
            self.pid = self._process.pid
            trampoline.set_service(
                self.pid,
                _teller(self._events),
                # After the helper's own limit, which is to be the one that is told.
                limit=max(trampoline.LIMIT, timeout + _MARGIN_SECONDS),
            )
            _open.add(self)
            undo.callback(self._forget)
            _name_tracer()
            self.cannot_step: str = (
                self.ask(
                    *("begin", timeout, seed, trampoline_use, door, int(self._stacks.signal)),
                    fds=(uffd.fileno(), self._stacks.fd),
                )
                or ""
            )
            undo.pop_all()
        self._porter = threading.Thread(
            target=_carry,
            args=(self._process, self._stacks.fd, hear, self._over.set),
            name="aiouffd porter",
            daemon=True,
        )
        self._porter.start()

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._over.is_set()

    @property
    def porter(self) -> int | None:
        """The number of the thread that hears it."""
        return self._porter.native_id

    def ask(self, name: str, *arguments: Any, fds: tuple[int, ...] = ()) -> Any:
        """Have it do something.

        Returns:
            What the service's method of that name (``do_...``) returns.

        Raises:
            HarnessError: It has ended, or could not do it.
            ValueError: It was asked for something that makes no sense.
        """
        if os.getpid() != self._owner:
            raise HarnessError(
                f"this harness is process {self._owner}'s; process {os.getpid()} was forked from"
                " it and has none: open one there"
            )
        try:
            with self._ordering:
                self._orders += 1
                self._commands.send((self._orders, name, *arguments), fds)
                answer = self._commands.receive()
                while answer is not None and answer[0][0] != self._orders:
                    answer = self._commands.receive()  # of an order that Ctrl-C has broken off
        except TimeoutError as error:
            self._process.kill()  # nobody is to stand for its sake
            raise HarnessError(SILENT) from error
        except OSError as error:
            raise HarnessError(ENDED) from error
        if answer is None:
            raise HarnessError(ENDED)
        _, state, *values = answer[0]
        if state == "ok":
            return values[0]
        kind, text = values
        raise _ERRORS.get(kind, HarnessError)(text)

    def end(self) -> None:
        """Have it end, and wait until it has; or keep it for the next harness."""
        # The porter ends objects, too, where garbage is collected.
        is_porter = threading.current_thread() is self._porter
        with contextlib.suppress(UffdError):
            self.ask("close", bool(_spare.wanted) and not is_porter)
            if not is_porter:
                self._porter.join(ANSWER_SECONDS)
        if self._process.is_clean:
            _spare.keep(self._process)
        else:
            self._reap()
            if not is_porter:
                self._porter.join()
            self._process.close()
        self._stacks.close()
        self._forget()

    def _forget(self) -> None:
        _open.discard(self)
        _name_tracer()

    def _reap(self) -> None:
        self._process.end()
        trampoline.release_all(self.pid)


def _carry(
    process: _Process,
    stacks: int,
    hear: Callable[[Message | None], None],
    end: Callable[[], None],
) -> None:
    """Hear what a helper tells, until it has closed; it ends with us, whatever we die of."""
    events = process.events
    try:
        while True:
            try:
                received = events.receive()
            except OSError:
                received = None
            if received is None:
                break
            match received[0]:
                case ("ping", number):
                    with contextlib.suppress(OSError):
                        events.send(("pong", number))
                case ("go", tid):
                    trampoline.go(tid)
                case ("late", number):
                    hear(("late",))
                    with contextlib.suppress(OSError):
                        # With the GIL held: nobody's stack changes while it is read.
                        faulthandler.dump_traceback(stacks, all_threads=True)
                        events.send(("dumped", number))
                case ("closed",):
                    process.is_clean = True
                    break
                case message:
                    hear(message)
    finally:
        if not process.is_clean:
            with contextlib.suppress(OSError):
                events.sock.shutdown(socket.SHUT_RDWR)
        trampoline.release_all(process.pid)
        end()
        hear(None)


def _teller(events: Channel) -> trampoline.Tell:
    """Make what tells the helper that a thread is parked."""

    def tell(tid: int) -> None:
        # On top of an interrupted access: one send, nothing else.
        events.send(("parked", tid) if tid > 0 else ("interrupted", -tid))

    return tell


def _name_tracer() -> None:
    """Let the helpers of this process trace it, where only who was named may (Yama)."""
    pids = [helper.pid for helper in list(_open) if helper._owner == os.getpid()]
    if not pids:
        tracing.allow_tracer(0)
    else:  # the last one that was named counts, so of several none is named
        tracing.allow_tracer(pids[0] if len(pids) == 1 else _EVERYBODY)


def _nobody(_tid: int) -> None:
    """Stand in: each helper is named to the trampoline with its own."""


def _command(commands: int, events: int) -> list[str]:
    """Give its command line: little is imported, and from where we came from."""
    root = str(Path(__file__).resolve().parent.parent.parent)
    program = (
        f"import sys; sys.path.insert(0, {root!r});"
        " from aiouffd.testing.service import main; main()"
    )
    return [
        *(sys.executable, "-S", "-E", "-c", program),
        *(str(commands), str(events), str(os.getpid())),
    ]
