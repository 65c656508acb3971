"""Programs that tests start: their logs, their ends, and what they wait for meanwhile.

Knows: processes, pid namespaces, /proc; how to wait, and what to show when it was in vain.
Must not know: CRIU's options, aiouffd.

Laws of this file:

* Every wait has a deadline.  Past it the error shows the end of every log, what each process
  waits for in the kernel, and what is pending on each userfaultfd.
* Leaving a crew kills what runs, by pid, and says what was left over by others.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

ROOT: Final = Path(__file__).resolve().parent.parent.parent

#: How long anything may take, in seconds.
LIMIT: Final = 40.0 * float(os.environ.get("AIOUFFD_TIME_SCALE", "1"))

_ENDS_WITH_US: Final = ("setpriv", "--pdeathsig", "KILL", "--")  # if the tests are killed
_PR_SET_CHILD_SUBREAPER: Final = 36
_LOG_END: Final = 3000  # characters of a log that are shown


class Late(AssertionError):
    """Something did not happen within its time."""


class Ended(AssertionError):
    """A program ended when it should not have, or with another status than it should."""


def free_port() -> int:
    """Give a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def listens(port: int) -> bool:
    """Say whether somebody listens on a port, without a connection that it would count."""
    wanted = f":{port:04X} 00000000:0000 0A"
    return any(
        wanted in line
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text(encoding="ascii").replace("0" * 24, "").splitlines()
    )


class Running:
    """A program that was started, its log, and its end.

    Attributes:
        name: What it is in messages.
        pid: Its process.
        log: The file that its output goes to.
    """

    def __init__(
        self, crew: Crew, name: str, command: Sequence[object], *, mute: bool = False
    ) -> None:
        self.crew, self.name = crew, name
        # A target that is restored would end with the restore: a checkpoint remembers that, too.
        self.command = [str(word) for word in (*(() if mute else _ENDS_WITH_US), *command)]
        self.log = self.also = crew.folder / f"{name}.log"  # CRIU writes another log as well
        with open(os.devnull if mute else self.log, "ab") as output:
            self.popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env=crew.environment,
                start_new_session=True,
                pass_fds=crew.handed,
            )
        self.pid = self.popen.pid

    @property
    def status(self) -> int | None:
        """Its exit status, None while it runs."""
        return self.popen.poll()

    def wait(self, *statuses: int, limit: float = LIMIT) -> int:
        """Wait for its end; only the statuses given (by default: 0) are right."""
        self.crew.until(lambda: self.status is not None, f"{self.name} ends", limit=limit)
        status = self.popen.wait()
        if status not in (statuses or (0,)):
            raise Ended(f"{self.name} ended with status {status}\n{self.crew.report()}")
        return status

    def text(self) -> str:
        """Give all that its logs say."""
        logs = dict.fromkeys((self.log, self.also))
        return "".join(log.read_text(errors="replace") for log in logs if log.exists())

    def end(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal, and wait until it has ended."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
            self.crew.until(lambda: self.popen.poll() is not None, f"{self.name} obeys {number}")

    def cpu_seconds(self) -> float:
        """Give the processor time that it has used, in both modes."""
        return cpu_seconds(self.pid)


def cpu_seconds(pid: int) -> float:
    """Give the processor time of a process that runs, or of one that nobody has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Target:
    """A program that can be dumped, or was restored.

    Attributes:
        pid: Its process, as seen here.
        folder: Where it reads ``go`` and writes ``result``.
    """

    crew: Crew
    name: str
    pid: int
    folder: Path

    def go(self, text: str) -> None:
        """Tell it to go on."""
        (self.folder / "telling").write_text(text)
        (self.folder / "telling").rename(self.folder / "go")

    def result(self, limit: float = LIMIT) -> dict[str, Any]:
        """Wait for what it found."""
        path = self.folder / "result"
        self.crew.until(path.exists, f"{self.name} has checked its memory", limit=limit)
        result: dict[str, Any] = json.loads(path.read_text())
        return result

    def is_done(self) -> bool:
        """Say whether there is a result."""
        return (self.folder / "result").exists()


class Restored(Target):
    """A restore in a pid namespace of its own, and the tree in it."""

    def __init__(self, crew: Crew, name: str, running: Running, folder: Path) -> None:
        super().__init__(crew, name, running.pid, folder)
        self.running = running
        self._status = folder.with_name(f"{folder.name}.status")
        self.init = 0

    def status(self, limit: float = LIMIT) -> int:
        """Wait until ``criu restore`` has ended, and give its status."""

        def ended() -> bool:
            if self.running.status is not None:
                raise Ended(f"{self.name}: no namespace\n{self.crew.report()}")
            return self._status.exists() and self._status.read_text().endswith("\n")

        self.crew.until(ended, f"{self.name}: criu restore ends", limit=limit)
        return int(self._status.read_text())

    def has_ended(self) -> bool:
        """Say whether ``criu restore`` has ended, one way or the other."""
        return self._status.exists()

    def wait(self, *, limit: float = LIMIT) -> Self:
        """Wait until ``criu restore`` has ended well."""
        status = self.status(limit)
        if status != 0:
            raise Ended(f"{self.name}: criu restore says {status}\n{self.crew.report()}")
        return self

    def pids(self) -> list[int]:
        """List the processes of the namespace but its first, as seen here."""
        init = self._init()
        return [pid for pid in _in_namespace(init) if pid != init] if init else []

    def lives(self) -> bool:
        """Say whether any of its processes has not ended."""
        return any(_state(pid) not in ("Z", "") for pid in self.pids())

    def pid_of(self, inside: int) -> int:
        """Give a process of the namespace by the number that it has there."""
        for pid in self.pids():
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            numbers = next(line for line in lines if line.startswith("NSpid:")).split()
            if int(numbers[-1]) == inside:
                return pid
        raise ProcessLookupError(f"{self.name} has no process {inside}")

    def _init(self) -> int:
        if not self.init and self.running.status is None:
            path = Path(f"/proc/{self.running.pid}/task/{self.running.pid}/children")
            with suppress(OSError):
                self.init = next(map(int, path.read_text().split()), 0)
        return self.init

    def end(self) -> None:
        """Kill the tree and wait until nothing is left of it."""
        init = self._init()
        self.running.end()  # takes the namespace's first process along, and that one all others
        if init:
            self.crew.until_gone(init)


class Crew:
    """A folder, and all programs that work in it.

    Attributes:
        folder: Where everything lies.
        environment: Of the programs that are started.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="aiouffd-criu-", dir="/tmp"))
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.handed: tuple[int, ...] = ()
        self._running: list[Running] = []
        self._restored: list[Restored] = []
        self._count = 0

    # --- waiting -----------------------------------------------------------------------

    def until(self, condition: Callable[[], object], what: str, *, limit: float = LIMIT) -> None:
        """Poll until something is true.

        Raises:
            Late: It was not, in time; the message shows what everybody was doing.
        """
        end, pause = time.monotonic() + limit, 0.0005
        while not condition():
            if time.monotonic() > end:
                raise Late(f"not within {limit:g} s: {what}\n{self.report()}")
            time.sleep(pause)
            pause = min(0.02, pause * 1.2)

    def until_gone(self, pid: int) -> None:
        """Wait until a process that became ours has ended, and reap it."""

        def reaped() -> bool:
            try:
                return os.waitpid(pid, os.WNOHANG)[0] == pid
            except ChildProcessError:
                return not os.path.exists(f"/proc/{pid}")

        self.until(reaped, f"process {pid} is gone")

    def report(self) -> str:
        """Say what every process is doing, and show the end of every log."""
        parts = []
        for running in self._running:
            state = "runs" if running.status is None else f"ended with {running.status}"
            parts.append(f"=== {running.name} (pid {running.pid}) {state}")
            parts += _doings(running.pid)
        for restored in self._restored:
            parts.append(f"=== in the namespace of {restored.name}")
            parts += [line for pid in restored.pids() for line in _doings(pid)]
        for log in sorted(self.folder.rglob("*.log")):
            text = log.read_text(errors="replace")[-_LOG_END:]
            if text:
                parts.append(f"--- {log.relative_to(self.folder)}\n{text}")
        return "\n".join(parts)

    # --- programs ----------------------------------------------------------------------

    def start(self, name: str, *command: object) -> Running:
        """Start a program, its output into a log."""
        self._count += 1
        running = Running(self, f"{self._count}-{name}", command)
        self._running.append(running)
        return running

    def start_ready(self, name: str, *command: object) -> Running:
        """Start a program that tells by ``--status-fd`` when it is ready, and wait for that."""
        ours, theirs = os.pipe()
        try:
            self.handed = (theirs,)
            running = self.start(name, *command, "--status-fd", theirs)
        finally:
            self.handed = ()
            os.close(theirs)
        try:
            self._until_byte(ours, running)
        finally:
            os.close(ours)
        return running

    def _until_byte(self, fd: int, running: Running) -> None:
        readable, _, _ = select.select([fd], [], [], LIMIT)
        if not readable:
            raise Late(f"not within {LIMIT:g} s: {running.name} is ready\n{self.report()}")
        if os.read(fd, 1) != b"\0":
            running.popen.wait(LIMIT)
            raise Ended(f"{running.name} ended before it was ready\n{self.report()}")

    def forget(self) -> None:
        """Drop what has ended: many restores on one stage leave a long list."""
        self._running = [running for running in self._running if running.status is None]
        self._restored = [each for each in self._restored if each.running.status is None]

    # --- the end -----------------------------------------------------------------------

    def __enter__(self) -> Self:
        _become_subreaper(True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            for restored in self._restored:
                restored.end()
            for running in reversed(self._running):
                running.end()
            left = self._strays()
        finally:
            _become_subreaper(False)
            shutil.rmtree(self.folder)
        if left and error is None:
            raise Ended("left over: " + "; ".join(left))

    def _strays(self) -> list[str]:
        """End what fell to us because its parent has gone, and name it."""
        left = []
        for pid in children_of():
            with suppress(ChildProcessError, FileNotFoundError, ProcessLookupError):
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                if os.waitpid(pid, os.WNOHANG)[0] == 0:
                    left.append(f"{name} (pid {pid})")
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
        return left


def _become_subreaper(on: bool) -> None:
    """Let processes whose parent has ended become ours, so that none is forgotten."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def descendants(pid: int) -> list[int]:
    """List what a process has started, and what that has, nearest first."""
    found = children_of(pid)
    for child in found:  # which grows meanwhile
        found += children_of(child)
    return found


def children_of(pid: int | str = "self") -> list[int]:
    """List what a process has started, by any of its threads."""
    found: list[int] = []
    with suppress(FileNotFoundError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(FileNotFoundError):
                found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found


def _state(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def _in_namespace(init: int) -> list[int]:
    """List the processes of the pid namespace that a process is in."""
    try:
        wanted = os.readlink(f"/proc/{init}/ns/pid")
    except OSError:
        return []
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.readlink(f"/proc/{name}/ns/pid") == wanted:
                found.append(int(name))
    return found


def _doings(pid: int) -> list[str]:
    """Say what the threads of a process wait for, and what is pending on its userfaultfds.

    Nothing is read that lies in its memory (its command line, for one): that could wait for a
    page that nobody serves.
    """
    lines = []
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            place = f"/proc/{pid}/task/{thread}"
            with suppress(OSError):
                state = Path(place, "stat").read_text().rpartition(")")[2].split()[0]
                name = Path(place, "comm").read_text().strip()
                where = Path(place, "wchan").read_text()
                lines.append(f"{pid}/{thread} {name}: {state} in {where}")
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                if "userfaultfd" in os.readlink(f"/proc/{pid}/fd/{fd}"):
                    info = Path(f"/proc/{pid}/fdinfo/{fd}").read_text().split("\n")
                    counts = [line for line in info if line.startswith(("pending", "total"))]
                    lines.append(f"{pid} fd {fd}: userfaultfd {' '.join(counts)}")
    return lines
