"""Real CRIU on a stage of its own: targets, checkpoints, page servers, daemons, restores.

    with Stage(criu) as stage:
        target = stage.pages(mib=8)
        images = stage.dump(target)
        stage.lazy_pages(images)
        restored = stage.restore(images, go="random 1 1")
        assert restored.result()["right"]

Knows: CRIU's options, pid namespaces, /proc; how to wait, and what to show when it was in vain.
Must not know: aiouffd, but for its command line; pytest.

Laws of this file:

* Each stage has a folder of its own, and each restore a pid namespace of its own, in which the
  old pids are free; ``FOLDER/run``, where targets read and write, is another place in each.
* Every wait has a deadline.  Past it the error shows the end of every log, what each process
  waits for in the kernel, and what is pending on each userfaultfd.
* Leaving a stage kills what runs, by pid, and says what was left over by others.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from benchmarks.build import compile_c
from tests.suites import CRIU, Foreign

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent.parent

#: How long anything may take, in seconds.
LIMIT: Final = 20.0 * float(os.environ.get("AIOUFFD_TIME_SCALE", "1"))

OURS: Final = (sys.executable, "-m", "aiouffd", "criu")

_PIPE_LIMIT: Final = Path("/proc/sys/fs/pipe-max-size")
_PIPE_WANTED: Final = 4 << 20
_PR_SET_CHILD_SUBREAPER: Final = 36
_LOG_END: Final = 3000  # characters of a log that are shown


class Late(AssertionError):
    """Something did not happen within its time."""


class Ended(AssertionError):
    """A program ended when it should not have, or with another status than it should."""


def versions() -> tuple[Foreign, ...]:
    """List CRIU's versions that tests are written for; whether they are there, each says."""
    return CRIU


@contextmanager
def large_pipes() -> Iterator[None]:
    """Let pipes grow to what a stock page server asks for when it lacks CAP_SYS_RESOURCE.

    One at a time, across processes too: the limit is one per machine.
    """
    with open(_PIPE_LIMIT, "r+", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = file.read()
        if int(before) >= _PIPE_WANTED:
            yield
            return
        _PIPE_LIMIT.write_text(str(_PIPE_WANTED), encoding="ascii")
        try:
            yield
        finally:
            _PIPE_LIMIT.write_text(before, encoding="ascii")


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
        self, stage: Stage, name: str, command: Sequence[object], *, mute: bool = False
    ) -> None:
        self.stage, self.name = stage, name
        self.command = [str(word) for word in command]
        self.log = self.also = stage.folder / f"{name}.log"  # CRIU writes another log as well
        with open(os.devnull if mute else self.log, "ab") as output:
            self.popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env=stage.environment,
                start_new_session=True,
                pass_fds=stage.handed,
            )
        self.pid = self.popen.pid

    @property
    def status(self) -> int | None:
        """Its exit status, None while it runs."""
        return self.popen.poll()

    def wait(self, *statuses: int, limit: float = LIMIT) -> int:
        """Wait for its end; only the statuses given (by default: 0) are right."""
        self.stage.until(lambda: self.status is not None, f"{self.name} ends", limit=limit)
        status = self.popen.wait()
        if status not in (statuses or (0,)):
            raise Ended(f"{self.name} ended with status {status}\n{self.stage.report()}")
        return status

    def text(self) -> str:
        """Give all that its logs say."""
        logs = dict.fromkeys((self.log, self.also))
        return "".join(log.read_text(errors="replace") for log in logs if log.exists())

    def end(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal, and wait until it has ended."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
            self.stage.until(lambda: self.popen.poll() is not None, f"{self.name} obeys {number}")

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

    stage: Stage
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
        self.stage.until(path.exists, f"{self.name} has checked its memory", limit=limit)
        result: dict[str, Any] = json.loads(path.read_text())
        return result

    def is_done(self) -> bool:
        """Say whether there is a result."""
        return (self.folder / "result").exists()


class Restored(Target):
    """A restore in a pid namespace of its own, and the tree in it."""

    def __init__(self, stage: Stage, name: str, running: Running, folder: Path) -> None:
        super().__init__(stage, name, running.pid, folder)
        self.running = running
        self._status = folder.with_name(f"{folder.name}.status")
        self.init = 0

    def status(self, limit: float = LIMIT) -> int:
        """Wait until ``criu restore`` has ended, and give its status."""

        def ended() -> bool:
            if self.running.status is not None:
                raise Ended(f"{self.name}: no namespace\n{self.stage.report()}")
            return self._status.exists() and self._status.read_text().endswith("\n")

        self.stage.until(ended, f"{self.name}: criu restore ends", limit=limit)
        return int(self._status.read_text())

    def wait(self, *, limit: float = LIMIT) -> Self:
        """Wait until ``criu restore`` has ended well."""
        status = self.status(limit)
        if status != 0:
            raise Ended(f"{self.name}: criu restore says {status}\n{self.stage.report()}")
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
            self.stage.until_gone(init)


class Stage:
    """One folder, and all that runs on it.

    Attributes:
        criu: The CRIU that is used.
        folder: Where everything lies.
        run: Where targets read and write; each restore has another folder in its place.
    """

    def __init__(self, criu: Foreign) -> None:
        self.criu = criu
        self.folder = Path(tempfile.mkdtemp(prefix="aiouffd-criu-", dir="/tmp"))
        self.run = self.folder / "run"
        self.run.mkdir()
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.handed: tuple[int, ...] = ()
        self._running: list[Running] = []
        self._restored: list[Restored] = []
        self._targets: list[Target] = []
        self._count = 0
        self._gone: set[int] = set()

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
        self._gone.add(pid)

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

    def start_criu(
        self, verb: str, images: Path, *options: object, ready: bool = False, level: int = 4
    ) -> Running:
        """Start CRIU, perhaps until it says that it is ready; its log goes beside the others."""
        log = self.folder / f"{self._count + 1}-{verb}.criu.log"
        start = self.start_ready if ready else self.start
        words = (verb, "-D", images, f"-v{level}", "-o", log)
        running = start(verb, self.criu.command, *words, *options)
        running.also = log
        return running

    # --- targets -----------------------------------------------------------------------

    def pages(self, mib: int, *, threads: int = 4, seed: int = 1) -> Target:
        """Start the threaded program that checks its memory (criu_pages.c)."""
        return self._target("pages", compiled("criu_pages.c"), self.run, mib, threads, seed)

    def tree(self, *, processes: int = 3, mib: int = 4, seed: int = 1) -> Target:
        """Start the tree of Python processes (criu_tree.py)."""
        program = (sys.executable, "-I", "-S", HERE / "criu_tree.py")
        return self._target("tree", *program, self.run, processes, mib, seed)

    def _target(self, name: str, *command: object) -> Target:
        for path in self.run.iterdir():
            path.unlink()
        self._count += 1
        # No file of ours may stay open in it: a checkpoint remembers the length of each.
        running = Running(self, f"{self._count}-{name}", command, mute=True)
        self._running.append(running)
        target = Target(self, running.name, running.pid, self.run)
        self._targets.append(target)

        def ready() -> bool:
            if running.status is not None:
                raise Ended(f"{running.name} ended with {running.status}")
            return (self.run / "ready").exists()

        self.until(ready, f"{name} is ready")
        return target

    def running(self, target: Target) -> Running:
        """Give the process of a target that was started here."""
        return next(each for each in self._running if each.pid == target.pid)

    # --- checkpoints and restores ------------------------------------------------------

    def images(self, name: str = "images") -> Path:
        """Make a folder for a checkpoint."""
        path = self.folder / name
        path.mkdir()
        return path

    def dump(self, target: Target, *options: object, name: str = "images") -> Path:
        """Dump a target, which ends, and give the folder of its checkpoint."""
        images = self.images(name)
        self.start_criu("dump", images, "-t", target.pid, "--shell-job", *options).wait()
        self.running(target).wait(-signal.SIGKILL)
        return images

    def lazy_pages(
        self, images: Path, *options: object, work: Path | None = None, level: int = 4
    ) -> Running:
        """Start the stock daemon and wait until it listens."""
        where = ("-W", work or images)
        (Path(work or images) / "lazy-pages.socket").unlink(missing_ok=True)
        return self.start_criu("lazy-pages", images, *where, *options, ready=True, level=level)

    def our_lazy_pages(
        self, images: Path | str, *options: object, work: Path | None = None, keep: bool = False
    ) -> Running:
        """Start our daemon and wait until it listens."""
        place = Path(work or images)
        (place / "lazy-pages.socket").unlink(missing_ok=True)
        keeper = (sys.executable, "-m", "aiouffd", "keep", "--") if keep else ()
        command = (*keeper, *OURS, "lazy-pages", "-D", images, "-W", place, *options)
        return self.start_ready("our-lazy-pages", *command)

    def page_server(self, images: Path, *options: object, level: int = 4) -> tuple[Running, int]:
        """Start the stock page server for lazy pages; give its port too."""
        port = free_port()
        address = ("--address", "127.0.0.1", "--port", port)
        options = ("--lazy-pages", *address, *options)
        running = self.start_criu("page-server", images, *options, level=level)
        self.until_listens(running, port)
        return running, port

    def our_page_server(self, images: Path | str, *options: object) -> tuple[Running, int]:
        """Start our page server; give its port too."""
        port = free_port()
        address = ("--address", "127.0.0.1", "--port", port)
        command = (*OURS, "page-server", "-D", images, *address, *options)
        running = self.start("our-page-server", *command)
        self.until_listens(running, port)
        return running, port

    def daemon(
        self, whose: str, images: Path, *options: object, work: Path | None = None, level: int = 4
    ) -> Running:
        """Start the lazy-pages daemon of "stock" CRIU or "ours"."""
        if whose == "stock":
            return self.lazy_pages(images, *options, work=work, level=level)
        return self.our_lazy_pages(images, *options, work=work)

    def server(
        self, whose: str, images: Path, *options: object, level: int = 4
    ) -> tuple[Running, int]:
        """Start the page server of "stock" CRIU or "ours"; give its port too."""
        if whose == "stock":
            return self.page_server(images, *options, level=level)
        return self.our_page_server(images, *options)

    def until_listens(self, running: Running, port: int) -> None:
        """Wait until a server's port is open."""

        def ready() -> bool:
            if running.status is not None:
                raise Ended(f"{running.name} ended with {running.status}\n{self.report()}")
            return listens(port)

        self.until(ready, f"{running.name} listens on port {port}")

    def restore(
        self,
        images: Path,
        *options: object,
        go: str | None = None,
        work: Path | None = None,
        lazy: bool = True,
    ) -> Restored:
        """Start a restore in a namespace of its own.

        Args:
            images: The checkpoint.
            options: More for ``criu restore``.
            go: What the target finds in ``go`` as soon as it runs.
            work: Where ``lazy-pages.socket`` is, if not with the images.
            lazy: False restores all memory at once.
        """
        self._count += 1
        folder = self.folder / f"run-{self._count}"
        folder.mkdir()
        if go is not None:
            (folder / "go").write_text(go)
        log = self.folder / f"{self._count}-restore.criu.log"
        command = [self.criu.command, "restore", "-D", images, "-W", work or images, "-d"]
        command += ["-v4", "-o", log, "--shell-job", *(["--lazy-pages"] if lazy else []), *options]
        script = 'mount --bind "$1" "$2"; shift 2; "$@"; echo $? > "$0.status"; exec sleep 1000000'
        inside = ("sh", "-c", script, folder, folder, self.run, *command)
        namespace = ("unshare", "--fork", "--pid", "--mount-proc", "--kill-child", "--")
        running = Running(self, f"{self._count}-restore", (*namespace, *inside))
        running.also = log
        self._running.append(running)
        restored = Restored(self, running.name, running, folder)
        self._restored.append(restored)
        return restored

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
        for pid in _children():
            with suppress(ChildProcessError, FileNotFoundError, ProcessLookupError):
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                if os.waitpid(pid, os.WNOHANG)[0] == 0:
                    left.append(f"{name} (pid {pid})")
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
        return left


def compiled(source: str) -> Path:
    """Compile one of the C files beside this one, once per change of its text."""
    return compile_c(source, HERE)


def _become_subreaper(on: bool) -> None:
    """Let processes whose parent has ended become ours, so that none is forgotten."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _children() -> list[int]:
    found: list[int] = []
    for thread in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError):
            found += map(int, Path(f"/proc/self/task/{thread}/children").read_text().split())
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
