"""The keeper: holds descriptors for a command, and starts it again when it dies.

Knows: a command, its notify socket, the descriptors that it has stored, by name.
Must not know: what the descriptors are for (only what a pidfd is).

It plays systemd's part where there is no systemd: the same messages, the same environment.

Laws of this file:

* What was stored is closed only when its owner says so, or after ``fail_closed`` has seen to
  it: the last close of a userfaultfd turns missing memory into zeros.
* Messages are worked off before a death is: what a process sent with its last breath counts.
* Only the command and its children are heard, and only those of our own user.
* A command that dies again and again is given up, with everything closed down safely.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import logging
import os
import shutil
import signal
import socket
import struct
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn, TypeAlias

from .fds import OwnedFd
from .kernel.calls import is_pidfd, is_userfaultfd

log: Final = logging.getLogger("aiouffd.keeper")

_FIRST_FD: Final = 3
_MESSAGE_BYTES: Final = 4096
_MAX_FDS: Final = 253  # in one message: SCM_MAX_FD
_UCRED: Final = struct.Struct("=iII")
_CONTROL_BYTES: Final = socket.CMSG_SPACE(_MAX_FDS * 4) + socket.CMSG_SPACE(_UCRED.size)
_NAME_BYTES: Final = 255
_NOT_FOUND: Final = 127

#: Stored descriptors by name.
Kept: TypeAlias = dict[str, list[OwnedFd]]
#: Sees to it that closing descriptors does no harm; gives the names of those that may not be
#: closed all the same.
FailClosed: TypeAlias = Callable[[Kept], Awaitable[set[str]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How often a command may die.

    Attributes:
        tries: Deaths in a row after which it is given up.
        healthy_after: Seconds of life after which a death is the first of a row again.
        first_delay: Seconds before the second restart in a row; each further one doubles it.
            The first is at once.
        max_delay: Seconds that a restart is delayed at most.
    """

    tries: int = 10
    healthy_after: float = 10.0
    first_delay: float = 0.1
    max_delay: float = 5.0

    def delay(self, deaths: int) -> float:
        """Give the seconds to wait after so many deaths in a row."""
        return min(self.first_delay * 2.0 ** (deaths - 2), self.max_delay) if deaths > 1 else 0.0


@dataclass(eq=False)
class Generation:
    """One run of the command, and what it has stored."""

    pid: int
    pidfd: OwnedFd
    kept: Kept = field(default_factory=dict)
    heard: set[int] = field(default_factory=set)  # pids of its that have spoken
    began: float = field(default_factory=time.monotonic)
    ready: bool = False
    retiring: bool = False  # a newer one has taken its place


class Keeper:
    """Runs a command and keeps its descriptors.

    Attributes:
        path: The notify socket.
        current: The run that new peers come to; None between two.
        restarts: How often the command was started again.

    Sharing: the loop's thread; one per process, since it reaps children by pid.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        fail_closed: FailClosed,
        patience: Patience | None = None,
        max_fds: int = 4096,
        permanent: Sequence[tuple[str, OwnedFd]] = (),
    ) -> None:
        """Prepare; ``run`` starts the command.

        Args:
            command: The program and its arguments.
            fail_closed: Called with what is left when the command is through.
            patience: How often it may die.
            max_fds: Descriptors to keep at most, together.
            permanent: Descriptors for every run, such as listening sockets; kept and owned.

        Raises:
            FileNotFoundError: There is no such program.
        """
        program = shutil.which(command[0]) if command else None
        if program is None:
            raise FileNotFoundError(errno.ENOENT, "no such program", command[0] if command else "")
        self._program = program
        self._command = list(command)
        self._fail_closed = fail_closed
        self._patience = patience if patience is not None else Patience()
        self._max_fds = max_fds
        self._permanent: Kept = {}
        for name, fd in permanent:
            self._permanent.setdefault(name, []).append(fd)
        self.current: Generation | None = None
        self.restarts = 0
        self._generations: list[Generation] = []
        self._orphans: Kept = {}  # of runs that died: for the next one
        self._deaths = 0
        self._stopping = False
        self._result: int | None = None
        self._over = asyncio.Event()
        self._ever_ready = False
        self._restart: asyncio.TimerHandle | None = None

    # --- life --------------------------------------------------------------------------

    async def run(self) -> int:
        """Run the command until it is through; give its exit status.

        SIGTERM and SIGINT are passed on; SIGHUP starts a new run beside the old one, which is
        asked to end once the new one is ready.
        """
        self._loop = asyncio.get_running_loop()
        directory = tempfile.mkdtemp(prefix="aiouffd-keep-")
        self.path = os.path.join(directory, "notify")
        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as self._socket:
                self._socket.setblocking(False)
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
                self._socket.bind(self.path)
                self._loop.add_reader(self._socket.fileno(), self._receive_all)
                for number in signals:
                    self._loop.add_signal_handler(number, self._on_signal, number)
                try:
                    self._start({})
                    await self._over.wait()
                finally:
                    for number in signals:
                        self._loop.remove_signal_handler(number)
                    self._loop.remove_reader(self._socket.fileno())
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        assert self._result is not None  # noqa: S101 - set before it is over
        return await self._close_down(self._result)

    async def _close_down(self, status: int) -> int:
        """Let go of everything that was stored, but safely."""
        left = self._orphans
        for generation in self._generations:
            _merge(left, generation.kept)
        try:
            unsettled = await self._fail_closed(left) if left else set[str]()
        except Exception:
            log.exception("what is kept could not be settled")
            unsettled = set(left)
        for name, fds in [*left.items(), *self._permanent.items()]:
            if name not in unsettled:
                for fd in fds:
                    fd.close()
        if unsettled:
            log.critical(
                "%d groups of descriptors stay open, or their memory would read as zeros; this"
                " process stays for that, until it is killed",
                len(unsettled),
            )
            await asyncio.Event().wait()
        return status

    def _end(self, status: int) -> None:
        if self._result is None:
            self._result = status
        self._over.set()

    # --- runs --------------------------------------------------------------------------

    def _start(self, kept: Kept) -> Generation:
        """Start the command with what is kept for it, which stays the caller's if that fails.

        Raises:
            OSError: There is no process or no descriptor to be had.
        """
        given = [
            (name, fd)
            for group in (self._permanent, kept)
            for name, fds in group.items()
            for fd in fds
        ]
        environment = dict(os.environ)
        for name in ("LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID"):
            environment.pop(name, None)
        others = sum(len(fds) for one in self._generations for fds in one.kept.values())
        room = max(self._max_fds - others, 1)
        environment |= {"NOTIFY_SOCKET": self.path, "FDSTORE": str(room)}
        if given:
            environment |= {
                "LISTEN_FDS": str(len(given)),
                "LISTEN_FDNAMES": ":".join(name for name, _ in given),
            }
        pid = os.fork()
        if pid == 0:
            _become(self._program, self._command, environment, [fd.fileno() for _, fd in given])
        try:
            pidfd = OwnedFd(os.pidfd_open(pid))
        except OSError:  # nobody would know of it
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        generation = Generation(pid, pidfd, kept)
        self._generations.append(generation)
        self.current = generation
        self._loop.add_reader(generation.pidfd.fileno(), self._on_death, generation)
        log.info("started %s as pid %d with %d descriptors", self._command[0], pid, len(given))
        return generation

    def _on_death(self, dead: Generation) -> None:
        self._receive_all()  # what it had sent counts
        self._loop.remove_reader(dead.pidfd.fileno())
        dead.pidfd.close()
        status = os.waitstatus_to_exitcode(os.waitpid(dead.pid, 0)[1])
        self._generations.remove(dead)
        if dead is self.current:
            self.current = None
        old = next((one for one in self._generations if one.retiring), None)
        if status == 0 or (self._stopping and status > 0):
            _merge(self._orphans, dead.kept)
            if not self._generations and self._restart is None:
                self._end(status)
            elif not dead.retiring:
                log.warning("the new run has ended; the old one is served by to its end")
            return
        how = f"was killed by signal {-status}" if status < 0 else f"failed with status {status}"
        log.error("%s (pid %d) %s", self._command[0], dead.pid, how)
        _merge(self._orphans, dead.kept)
        if not dead.retiring and not dead.ready and old is not None:
            log.error("the new run never was ready: the old one stays")
            old.retiring = False
            self.current = old
            if self._orphans:
                _signal(old, signal.SIGKILL)  # the next run adopts what both had
            return
        if self.current is not None:  # a retiring run died: the new one cannot be given its fds
            log.error("the new run is started again, to take over what the old one served")
            _signal(self.current, signal.SIGKILL)
            return
        self._bury(dead, status)

    def _bury(self, dead: Generation, status: int) -> None:
        """Start the command again, or give it up."""
        alive = time.monotonic() - dead.began
        self._deaths = 1 if alive >= self._patience.healthy_after else self._deaths + 1
        self._try_again(status)

    def _try_again(self, status: int) -> None:
        if not self._ever_ready and not self._orphans:
            self._end(status if status > 0 else 1)  # it cannot be started at all
        elif self._deaths >= self._patience.tries:
            log.critical("given up: it died %d times in a row", self._deaths)
            self._end(status if status > 0 else 1)
        else:
            delay = self._patience.delay(self._deaths)
            if delay:
                log.info("starting again in %g s", delay)
                self._restart = self._loop.call_later(delay, self._start_again)
            else:
                self._start_again()

    def _start_again(self) -> None:
        self._restart = None
        self.restarts += 1
        try:
            self._start(self._orphans)
        except OSError:
            log.exception("%s cannot be started", self._command[0])
            self._deaths += 1
            self._try_again(1)
        else:
            self._orphans = {}  # they are the run's

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._upgrade()
            return
        self._stopping = True
        if self._restart is not None:
            self._restart.cancel()
            self._restart = None
        if not self._generations:
            self._end(0)
        for generation in self._generations:
            _signal(generation, number)

    def _upgrade(self) -> None:
        """Start a new run beside the present one; see ``_say`` for what follows."""
        if self._stopping or self.current is None or len(self._generations) > 1:
            log.warning("no new run is started: the last change is not through yet")
            return
        old = self.current
        try:
            self._start({})
        except OSError:
            log.exception("no new run is started")
        else:
            old.retiring = True

    # --- messages ----------------------------------------------------------------------

    def _receive_all(self) -> None:
        """Take everything that has come; never raises."""
        while True:
            try:
                data, control, flags, _ = self._socket.recvmsg(
                    _MESSAGE_BYTES, _CONTROL_BYTES, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                log.exception("a message could not be received")
                return
            fds, credentials = _unpack(control)
            if flags & socket.MSG_CTRUNC:
                log.critical("descriptors were lost: there is no room for more (see ulimit -n)")
            try:
                self._hear(data, fds, credentials)
            finally:
                for fd in fds:  # those that were kept have another owner now
                    fd.close()

    def _hear(
        self, data: bytes, fds: list[OwnedFd], credentials: tuple[int, int, int] | None
    ) -> None:
        if credentials is None:
            return
        pid, uid, _ = credentials
        sender = self._sender(pid) if uid in (0, os.geteuid()) else None
        if sender is None:
            log.warning("a message of pid %d (uid %d) was not heard: it is a stranger's", pid, uid)
            return
        sender.heard.add(pid)
        self._say(sender, dict(_fields(data)), fds)

    def _sender(self, pid: int) -> Generation | None:
        """Find the run that a process belongs to."""
        for generation in reversed(self._generations):
            if pid == generation.pid or pid in generation.heard:
                return generation
        for ancestor in _ancestors(pid):
            for generation in self._generations:
                if ancestor == generation.pid:
                    return generation
        return None

    def _say(self, sender: Generation, fields: Mapping[str, str], fds: list[OwnedFd]) -> None:
        name = fields.get("FDNAME", "")
        if not _is_name(name):
            name = "stored"
        if fields.get("FDSTORE") == "1":
            self._keep(sender, name, fds)
        if fields.get("FDSTOREREMOVE") == "1":
            for fd in sender.kept.pop(name, ()):
                fd.close()
        if fields.get("READY") == "1" and not sender.ready:
            sender.ready = self._ever_ready = True
            for generation in self._generations:
                if generation.retiring:
                    _signal(generation, signal.SIGTERM)
            if self._stopping:
                _signal(sender, signal.SIGTERM)

    def _keep(self, sender: Generation, name: str, fds: list[OwnedFd]) -> None:
        self._ever_ready = True  # it works
        count = sum(len(group) for one in self._generations for group in one.kept.values())
        if count + len(fds) > self._max_fds:
            log.critical(
                "%d descriptors named %s are not kept: there are %d of at most %d",
                *(len(fds), name, count, self._max_fds),
            )
            return
        sender.kept.setdefault(name, []).extend(OwnedFd(fd.detach()) for fd in fds)


def _merge(into: Kept, kept: Kept) -> None:
    """Move groups over; of two of one name the first stays and the other is closed."""
    for name, fds in kept.items():
        if name in into:
            for fd in fds:
                fd.close()
        else:
            into[name] = fds
    kept.clear()


def _signal(generation: Generation, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(generation.pidfd.fileno(), number)


def _become(
    program: str, command: list[str], environment: dict[str, str], fds: list[int]
) -> NoReturn:
    """Turn the forked process into the command, with descriptors from 3 on."""
    import fcntl  # not on every system: importing this module must not fail there

    try:
        beyond = _FIRST_FD + len(fds)
        # Out of the way first: one of them may have the number that another is to get.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, beyond) for fd in fds]
        for number, fd in enumerate(high, _FIRST_FD):
            os.dup2(fd, number)
        if fds:
            environment["LISTEN_PID"] = str(os.getpid())
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
            signal.signal(number, signal.SIG_DFL)
        os.execve(program, command, environment)  # noqa: S606 - that is the task
    except BaseException as error:
        os.write(2, f"aiouffd keep: {program} cannot be started: {error}\n".encode())
    finally:
        os._exit(_NOT_FOUND)


def _fields(data: bytes) -> Iterator[tuple[str, str]]:
    for line in data.decode("utf-8", "replace").split("\n"):
        name, equals, value = line.partition("=")
        if equals:
            yield name, value


def _is_name(name: str) -> bool:
    return (
        0 < len(name) <= _NAME_BYTES and name.isascii() and name.isprintable() and ":" not in name
    )


def _unpack(
    control: Sequence[tuple[int, int, bytes]],
) -> tuple[list[OwnedFd], tuple[int, int, int] | None]:
    """Take descriptors and credentials out of a message's ancillary data."""
    fds: list[OwnedFd] = []
    credentials: tuple[int, int, int] | None = None
    for level, kind, data in control:
        if level != socket.SOL_SOCKET:
            continue
        if kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            fds.extend(OwnedFd(number) for number in numbers)
        elif kind == socket.SCM_CREDENTIALS and len(data) == _UCRED.size:
            credentials = _UCRED.unpack(data)
    return fds, credentials


def _ancestors(pid: int) -> Iterator[int]:
    """Give the parents of a process, up to the first that cannot be read."""
    for _ in range(64):
        try:
            status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return
        pid = int(status.rpartition(")")[2].split()[1])
        if pid <= 0:
            return
        yield pid


async def kill_targets(kept: Kept) -> set[str]:
    """Kill every process of which there is a pidfd, and wait until it is dead.

    Returns:
        The names of groups that have a userfaultfd and no pidfd: whoever has that memory
        cannot be killed.
    """
    unsettled = set()
    for name, fds in kept.items():
        pidfds = [fd.fileno() for fd in fds if is_pidfd(fd.fileno())]
        for pidfd in pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                log.critical("%s: its target is killed, or it would read zeros", name)
            await _exit_of(pidfd)
        if not pidfds and any(is_userfaultfd(fd.fileno()) for fd in fds):
            unsettled.add(name)
    return unsettled


async def _exit_of(pidfd: int) -> None:
    loop, exited = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, exited.set)
    try:
        await exited.wait()
    finally:
        loop.remove_reader(pidfd)
