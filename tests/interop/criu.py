"""Real CRIU on a stage of its own: targets, checkpoints, page servers, daemons, restores.

    with Stage(criu) as stage:
        images = stage.dump(stage.pages(mib=8))
        stage.lazy_pages(images)
        restored = stage.restore(images, go="random 1 1")
        assert restored.result()["right"]

Knows: CRIU's options and ours.
Must not know: what aiouffd does, but for its command line; pytest.

Law of this file: each stage has a folder of its own, and each restore a pid namespace of its own,
in which the old pids are free; ``FOLDER/run``, where targets read and write, is another place in
each.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benchmarks.build import compile_c
from tests.interop.criu_running import (
    Crew,
    Ended,
    Restored,
    Running,
    Target,
    descendants,
    free_port,
    listens,
)
from tests.suites import Foreign

HERE: Final = Path(__file__).resolve().parent

OURS: Final = (sys.executable, "-m", "aiouffd", "criu")

_PIPE_LIMIT: Final = Path("/proc/sys/fs/pipe-max-size")
_PIPE_WANTED: Final = 4 << 20


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


def at_page_start(pid: int) -> bool:
    """Say whether a thread's stack pointer is a multiple of the page size.

    One program in 256 is so unlucky.  CRIU 4.1 and 4.2 compare only the low bits of addresses to
    find the page of a stack, which must not be lazy: they then take every page for one, and dump
    nothing that could be restored lazily.
    """
    for task in Path(f"/proc/{pid}/task").iterdir():
        words = (task / "syscall").read_text(encoding="ascii").split()
        stack = int(words[-2], 16) if len(words) > 2 else 0  # it runs; or is a zombie, without one
        if stack and stack % mmap.PAGESIZE == 0:
            return True
    return False


class Stage(Crew):
    """One folder, and all that CRIU does on it.

    Attributes:
        criu: The CRIU that is used.
        run: Where targets read and write; each restore has another folder in its place.
    """

    def __init__(self, criu: Foreign) -> None:
        super().__init__()
        self.criu = criu
        self.run = self.folder / "run"
        self.run.mkdir()

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
        return self._target("pages", compile_c("criu_pages.c", HERE), self.run, mib, threads, seed)

    def changes(self, daemon: str, operations: int, depth: int) -> str:
        """Say how often a tree may change its memory, and how deep it may fork.

        Under the stock daemon not at all.  It unregisters what is discarded, so that mremap fails
        across the cut; a zero page that meets EAGAIN it does not try again, and a fault of a
        forked child it can lose, so that threads hang for good; now and then it just ends.
        """
        return f"{operations} {depth}" if daemon == "ours" else "0 0"

    def tree(self, *, processes: int = 3, mib: int = 4, seed: int = 1) -> Target:
        """Start the tree of Python processes (criu_tree.py)."""
        program = (sys.executable, "-I", "-S", HERE / "criu_tree.py")
        return self._target("tree", *program, self.run, processes, mib, seed)

    def _target(self, name: str, *command: object) -> Target:
        """Start a target whose memory CRIU can dump lazily; see ``at_page_start``."""
        while True:
            target = self._any_target(name, *command)
            pids = (target.pid, *descendants(target.pid))
            if not any(map(at_page_start, pids)):
                return target
            self.running(target).end()
            for pid in pids[1:]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                self.until_gone(pid)

    def _any_target(self, name: str, *command: object) -> Target:
        for path in self.run.iterdir():
            path.unlink()
        self._count += 1
        # No file of ours may stay open in it: a checkpoint remembers the length of each.
        running = Running(self, f"{self._count}-{name}", command, mute=True)
        self._running.append(running)

        def ready() -> bool:
            if running.status is not None:
                raise Ended(f"{running.name} ended with {running.status}")
            return (self.run / "ready").exists()

        self.until(ready, f"{name} is ready")
        return Target(self, running.name, running.pid, self.run)

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
        tree = descendants(target.pid)
        self.start_criu("dump", images, "-t", target.pid, "--shell-job", *options).wait()
        self.running(target).wait(-signal.SIGKILL)
        for pid in tree:
            self.until_gone(pid)
        return images

    def lazy_pages(
        self, images: Path, *options: object, work: Path | None = None, level: int = 4
    ) -> Running:
        """Start the stock daemon and wait until it listens."""
        where = ("-W", work or images)
        (Path(work or images) / "lazy-pages.socket").unlink(missing_ok=True)
        return self.start_criu("lazy-pages", images, *where, *options, ready=True, level=level)

    def our_lazy_pages(
        self, images: Path, *options: object, work: Path | None = None, keep: bool = False
    ) -> Running:
        """Start our daemon and wait until it listens."""
        place = work or images
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
        command = (*OURS, "page-server", "--lazy-pages", "-D", images, *address, *options)
        running = self.start("our-page-server", *command)
        self.until_listens(running, port)
        return running, port

    def our_receiver(self, images: Path, *options: object) -> tuple[Running, int]:
        """Start our receiver of what a dump pushes; give its port too."""
        port = free_port()
        address = ("--address", "127.0.0.1", "--port", port)
        command = (*OURS, "page-server", "-D", images, *address, *options)
        running = self.start("our-receiver", *command)
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
