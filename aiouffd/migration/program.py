"""Program: what a program does so that it can move, in its own process and without a loop.

Knows: the program's memory, its Unix sockets, what is asked and answered there.
Must not know: where the program goes, how its memory gets there.

A program that can move keeps what is large in memory of this kind (a memfd), and can say the rest
in a few bytes.  ``Movable`` answers the process that sends it away, ``arrive`` the one that has
received it.  What they say is lines of JSON over a Unix stream socket, descriptors with the first
byte of a line; docs/reference/migration-program.md has it for programs in other languages.

Laws of this file:

* Until it was told to leave, a program whose mover has gone goes on as if nothing had happened.
  From then on it stands still until it is told to end, or to go on after all.
* A program that has arrived and lacks memory does not outlive who serves it: the kernel would
  make zeros of what is missing.  It is killed with it, whatever its threads are doing.
* A child that is forked does not have the memory: it dies where it touches it.  What it wrote would
  not be known to who sends the memory away, and what it read of missing pages would be made zeros.
* The userfaultfd is open here, too, until all is there: no end of another process closes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import mmap
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, Self

from ..errors import NotSupported, PeerError
from ..kernel.parent import die_with_parent
from ..ranges import PAGE_SIZE, align_up
from ..uffd import Feature, Userfaultfd
from .memory import seal

log: Final = logging.getLogger("aiouffd.migration")

VERSION: Final = 1
ARRIVAL_VARIABLE: Final = "AIOUFFD_ARRIVAL"  #: names the socket of who has received the program
MAX_REGIONS: Final = 12  #: their descriptors travel with one line
MAX_FDS: Final = MAX_REGIONS + 1
MAX_LINE: Final = 64 << 10
MAX_STATE: Final = 1 << 30  #: bytes; a destination may take less

#: What a program's own userfaultfd needs while it is written to and copied ...
_TRACKING: Final = Feature.WP_ASYNC | Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM
#: ... and what it needs while its memory follows.
_FOLLOWING: Final = (
    Feature.THREAD_ID
    | Feature.MISSING_SHMEM
    | Feature.EVENT_REMOVE
    | Feature.EVENT_UNMAP
    | Feature.EVENT_REMAP
)


class ProgramMemory:
    """A region of a program's memory that can move: a memfd, mapped.

    It is to be read and written by ``map`` or ``address``, and by this process alone: what gets
    into the memfd another way (write(2), another mapping) is not known to have changed, and what
    is read another way may not have come yet.  Children that are forked do not have it.

    Attributes:
        name: By which the other side knows it.
        map: The memory.
        address: Where it is.
        length: In bytes.
        is_arriving: Some of it may still be elsewhere; until it is here it cannot be sent on.

    Sharing: any thread.
    """

    def __init__(self, name: str, fd: int, length: int) -> None:
        """Map a memfd; the descriptor is this object's from here on."""
        self.name: Final = name
        self.length: Final = length
        self.fd: Final = fd
        self.is_arriving = False
        self.map: Final = mmap.mmap(fd, length, mmap.MAP_SHARED)
        self.map.madvise(mmap.MADV_DONTFORK)
        self.address: Final = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    @classmethod
    def create(cls, name: str, length: int) -> Self:
        """Make a region of zeros.

        Kernel: memfd_create, since Linux 3.17.

        Args:
            name: By which the other side knows it.
            length: In bytes; made whole pages.
        """
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        length = align_up(length)
        os.ftruncate(fd, length)
        seal(fd)
        return cls(name, fd, length)


class _Line:
    """A socket on which one line is said after the other."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._rest = b""

    def say(self, value: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Say something.

        Raises:
            OSError: Nobody listens any more.
        """
        data = json.dumps(value).encode() + b"\n"
        sent = socket.send_fds(self.socket, [data], list(fds), socket.MSG_NOSIGNAL)
        if sent < len(data):
            self.socket.sendall(data[sent:], socket.MSG_NOSIGNAL)

    def hear(self) -> tuple[dict[str, Any], list[int]]:
        """Wait for what is said.

        Returns:
            It, and the descriptors that came with it; nothing at the end.

        Raises:
            PeerError: It is no JSON object, or too long.
        """
        fds: list[int] = []
        try:
            while b"\n" not in self._rest:
                if len(self._rest) > MAX_LINE:
                    raise PeerError(f"said a line of more than {MAX_LINE} bytes")
                data, more, flags, _ = socket.recv_fds(self.socket, MAX_LINE, MAX_FDS)
                fds += more
                if flags & socket.MSG_CTRUNC or len(fds) > MAX_FDS:
                    raise PeerError("sent more descriptors than there is room for")
                if not data:
                    raise ConnectionResetError(errno.ECONNRESET, "the other side has gone")
                self._rest += data
            line, _, self._rest = self._rest.partition(b"\n")
            value = json.loads(line)
            if not isinstance(value, dict):
                raise PeerError("said something that is no JSON object")
        except ValueError as error:
            _close(fds)
            raise PeerError(f"said something that is no JSON: {error}") from error
        except BaseException:
            _close(fds)
            raise
        for fd in fds:
            os.set_inheritable(fd, False)
        return value, fds


class Movable:
    """Lets a running program be sent away.

    ::

        with Movable("/run/worker.sock", [memory], stop=stop, restart=restart) as movable:
            movable.wait_ended()            # it has moved: nothing is left to do here

    Attributes:
        stage: ``running``, ``stopped`` or ``left``.

    Sharing: any thread; ``stop`` and ``restart`` are called in a thread of its own.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        memory: Sequence[ProgramMemory],
        *,
        stop: Callable[[], bytes],
        restart: Callable[[], None],
        name: str = "",
    ) -> None:
        """Prepare; nothing listens before ``start``.

        Args:
            path: Of the socket; made for this user alone.
            memory: All that moves; at most MAX_REGIONS.
            stop: Lets every thread that writes to it stand still, and returns the state: what it
                takes to go on elsewhere, besides the memory.
            restart: Lets them go on.
            name: Of the program, for people.
        """
        if not 0 < len(memory) <= MAX_REGIONS:
            raise ValueError(f"a program has 1 to {MAX_REGIONS} regions that move")
        self.stage = "running"
        self._path = os.fspath(path)
        self._memory = list(memory)
        self._stop = stop
        self._restart = restart
        self._name = name
        self._ended = threading.Event()
        self._listener: socket.socket | None = None
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._listen, name="aiouffd movable", daemon=True)

    def start(self) -> None:
        """Listen, in a thread.

        Raises:
            OSError: The path cannot be had; a socket that nobody listens on is replaced.
        """
        self._listener = _listen_at(self._path)
        self._thread.start()

    def wait_ended(self, timeout: float | None = None) -> bool:
        """Wait until the program has moved.

        Args:
            timeout: Seconds, at most.

        Returns:
            Whether it has.
        """
        return self._ended.wait(timeout)

    def close(self) -> None:
        """Listen no more; a move under way is broken off."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        # Closing alone would not wake the thread.
        listener.shutdown(socket.SHUT_RDWR)
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        listener.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _listen(self) -> None:
        listener = self._listener
        while listener is not None and self._listener is listener and not self._ended.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # closed
            self._connection = connection
            with connection:
                try:
                    self._serve(_Line(connection))
                except (OSError, PeerError) as error:
                    log.info("the mover has gone: %s", error)
                except Exception:
                    log.exception("a move was broken off")
            self._connection = None
            if self.stage == "stopped":
                try:
                    self._go_on()
                except Exception:
                    log.exception("the program could not be told to go on")

    def _serve(self, line: _Line) -> None:
        """Answer one mover, to its end."""
        while True:
            order, fds = line.hear()
            _close(fds)  # nothing that is asked for brings any
            what = order.get("do")
            if any(each.is_arriving for each in self._memory):
                line.say({"error": f"{str(what)[:40]!r} is not possible: it is still arriving"})
            elif what == "describe":
                self._describe(line)
            elif what == "stop" and self.stage == "running":
                state = self._stand_still()
                try:
                    line.say({"stage": self.stage}, [state])
                finally:
                    os.close(state)
            elif what == "leave" and self.stage == "stopped":
                self.stage = "left"
                line.say({"stage": self.stage})
            elif what == "restart" and self.stage in {"stopped", "left"}:
                self._go_on()
                line.say({"stage": self.stage})
            elif what == "end" and self.stage == "left":
                line.say({"stage": "ended"})
                self._ended.set()
                return
            else:
                line.say({"error": f"{str(what)[:40]!r} is not possible: it is {self.stage}"})

    def _stand_still(self) -> int:
        """Stop it; give its state in a file.  If that cannot be made it goes on."""
        state = self._stop()
        self.stage = "stopped"
        try:
            return state_file(state)
        except BaseException:
            self._go_on()
            raise

    def _go_on(self) -> None:
        self._restart()
        self.stage = "running"

    def _describe(self, line: _Line) -> None:
        """Say what there is to move, and give it."""
        value: dict[str, Any] = {
            "version": VERSION,
            "name": self._name,
            "stage": self.stage,
            "pid": os.getpid(),
            "regions": [
                {
                    "name": each.name,
                    "start": each.address,
                    "length": each.length,
                    "page_size": PAGE_SIZE,
                }
                for each in self._memory
            ],
        }
        fds = [each.fd for each in self._memory]
        try:
            uffd = Userfaultfd.open(_TRACKING, user_mode_only=True)
        except NotSupported as error:
            line.say(value | {"untracked": str(error)}, fds)
            return
        with uffd:
            line.say(value, [*fds, uffd.fileno()])


class _Tie:
    """Ends this process with the one that started it, until it is cut.

    The signal that does it belongs to the thread that has asked for it: another one cannot take it
    back, and it is gone with that thread.  So it has a thread of its own.
    """

    def __init__(self) -> None:
        self._error: OSError | None = None
        self._tied = threading.Event()
        self._cut = threading.Event()
        self._thread = threading.Thread(target=self._hold, name="aiouffd tie", daemon=True)
        self._thread.start()
        self._tied.wait()
        if self._error is not None:
            raise self._error

    def _hold(self) -> None:
        try:
            die_with_parent(signal.SIGKILL)
        except OSError as error:
            self._error = error
            return
        finally:
            self._tied.set()
        self._cut.wait()
        die_with_parent(0)

    def cut(self) -> None:
        """Let this process outlive it."""
        self._cut.set()
        self._thread.join()


class Arrival:
    """A program that has come here with its state, and whose memory follows.

    Attributes:
        memory: Its regions by name.
        state: What ``stop`` returned at the source.

    Sharing: any thread.
    """

    def __init__(
        self,
        memory: dict[str, ProgramMemory],
        state: bytes,
        line: _Line,
        uffd: Userfaultfd,
        tie: _Tie,
    ) -> None:
        self.memory: Final = memory
        self.state: Final = state
        self._line = line
        self._uffd = uffd
        self._tie = tie
        self._complete = threading.Event()

    def note_running(self) -> None:
        """Say that the program runs; to be called once, as soon as it does.

        Raises:
            OSError: Who has received it is gone.
        """
        self._line.say({"stage": "running"})
        threading.Thread(target=self._wait, name="aiouffd arrival", daemon=True).start()

    def wait_complete(self, timeout: float | None = None) -> bool:
        """Wait until all of the memory is here.

        Args:
            timeout: Seconds, at most.

        Returns:
            Whether it is.
        """
        return self._complete.wait(timeout)

    def _wait(self) -> None:
        try:
            order, fds = self._line.hear()
            _close(fds)
        except (OSError, PeerError):
            order = {}
        if order.get("do") != "complete":
            os.kill(os.getpid(), signal.SIGKILL)  # else what is missing would read zeros
        for each in self.memory.values():
            each.is_arriving = False
        self._tie.cut()
        self._uffd.close()
        with contextlib.suppress(OSError):  # it is of no use to us any more
            self._line.say({"stage": "complete"})
        self._line.socket.close()
        self._complete.set()


def arrive() -> Arrival | None:
    """Come here, if this process was started for a program that moves.

    It waits until the program may run.

    Returns:
        What has come; None if this process was not started for it: the program begins afresh.

    Raises:
        NotSupported: Page faults cannot be served here.
        PeerError: Who has started it says something else than it should.
        OSError: It has gone.
    """
    number = os.environ.pop(ARRIVAL_VARIABLE, "")
    if not number:
        return None
    tie = _Tie()
    line = _Line(socket.socket(fileno=int(number)))
    os.set_inheritable(line.socket.fileno(), False)
    order, fds = line.hear()
    regions = order.get("regions")
    if order.get("do") != "arrive" or not isinstance(regions, list) or len(regions) != len(fds):
        _close(fds)
        raise PeerError(f"said {str(order)[:80]} where a program should arrive")
    memory = [
        ProgramMemory(str(each["name"]), fd, int(each["length"]))
        for each, fd in zip(regions, fds, strict=True)
    ]
    for each in memory:
        each.is_arriving = True
    # Without the right to kernel-mode faults a system call on missing memory gets EFAULT; plain
    # accesses are served all the same.
    uffd = Userfaultfd.open(_FOLLOWING, allow_user_mode_only=True)
    line.say(
        {
            "pid": os.getpid(),
            "regions": [{"name": each.name, "start": each.address} for each in memory],
        },
        [uffd.fileno()],
    )
    order, fds = line.hear()
    if order.get("do") != "run" or len(fds) != 1:
        _close(fds)
        raise PeerError(f"said {str(order)[:80]} where the program should run")
    try:
        state = read_state(fds[0])
    finally:
        _close(fds)
    return Arrival({each.name: each for each in memory}, state, line, uffd, tie)


def _listen_at(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) == errno.ECONNREFUSED:
                os.unlink(path)  # of a process that has ended
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, error.strerror, path) from error
    return listener


def state_file(state: bytes) -> int:
    """Put a state into a memfd, to be handed on; the caller's."""
    fd = os.memfd_create("state", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(state)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_state(fd: int) -> bytes:
    """Take a state out of the file in which it was handed over.

    Raises:
        PeerError: It is no file, or longer than any state.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_STATE:
        raise PeerError(f"gave a state that is no file of at most {MAX_STATE} bytes")
    with open(fd, "rb", closefd=False) as file:
        file.seek(0)
        return file.read()


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
