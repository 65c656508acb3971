"""Arriving, for a tree of processes: made anew by CRIU, its memory brought from the source.

Knows: ``criu restore --lazy-pages``, the server of restored processes, whom they get pages from.
Must not know: what goes over the migration's own connections, and when.

Laws of this file:

* The tree runs when ``criu restore`` has ended well, and not before that; if it ends otherwise, or
  is too slow, whatever it has made is killed before the source hears that nothing was started.
* A tree that cannot get all of its memory is killed, and all of it: also those processes that
  have theirs already, and what they have started meanwhile.
* A tree that has all of its memory is not killed any more, and only then is the source told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import shlex
import signal
import tempfile
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from ..errors import MigrationFailed, PeerError, UffdError
from ..failure import Action, FailurePolicy
from ..fds import OwnedFd
from ..prefetch import Pace
from ..protection import PREFIX
from ..protocols.criu import parcel
from ..protocols.criu.checkpoint import Checkpoint
from ..protocols.criu.command import Criu
from ..protocols.criu.lazy_socket import NAME
from ..protocols.criu.restore import Restores
from ..reports import Report, Started, log_report
from ..server import Server
from ..service import Service
from ..threads import in_thread
from .incoming import Incoming
from .stages import Stage
from .tree_pages import TreePages

if TYPE_CHECKING:
    import ssl

    from ..fd_store import FdStore

log: Final = logging.getLogger("aiouffd.migration")

GROUP: Final = PREFIX + "tree"  #: in the store: pidfds of all processes

_CHUNK: Final = 64 << 10  # bytes around a fault
_MAX_CHILDREN: Final = 4096  # forked ones, served at once
#: Does not wait for whoever should read it: the tree runs, and that is no reason to hold it up.
_TOLD: Final = "told"
_SCRIPT: Final = """\
#!/bin/sh
# Run by criu restore
case "$CRTOOLS_SCRIPT_ACTION" in
pre-resume) : > {path}.may ;;
post-resume) echo it runs 1<> {path} ;;
esac
"""


class ArrivingTree:
    """A tree of processes that is made anew from what arrives.

    ::

        incoming = await listener.accept()
        async with ArrivingTree(incoming, folder, ssl=context) as tree:
            await tree.run()
            await tree.complete()

    A tree that is not complete at the end of the block is killed.

    Attributes:
        folder: Where the images are, and the logs.
        processes: How many there are, from ``run`` on.
        memory_bytes: That is brought after they run.
        server: Of their memory, while that comes.

    Sharing: the loop's thread.
    """

    def __init__(
        self,
        incoming: Incoming,
        folder: str,
        *,
        criu: str = "criu",
        options: Sequence[str] = (),
        namespace: bool = False,
        ssl: ssl.SSLContext | None = None,
        server_hostname: str = "",
        store: FdStore | None = None,
        timeout: float = 60.0,
        deadline: float = 30.0,
        report: Callable[[Report], None] = log_report,
    ) -> None:
        """Prepare.

        Args:
            incoming: Not prepared yet; closed at the end.
            folder: For the images; it is there, and has none.
            criu: The program.
            options: More of them, for ``criu restore``.
            namespace: Make the tree in a pid namespace of its own, where no pid is taken; CRIU
                stays as its first process, until the last one of the tree has ended.
            ssl: A client's context, for the connection that memory comes by; None is plain TCP.
            server_hostname: The name in the certificate of who gives it; "" is its address.
            store: Keeps what must outlive this process; see Server.
            timeout: Seconds that ``criu restore`` may take.
            deadline: Seconds that a fault may take.
            report: Told of the processes whose memory comes.
        """
        self.folder: Final = os.path.abspath(folder)
        self.processes = 0
        self.memory_bytes = 0
        self.server: Server | None = None
        self._incoming = incoming
        self._program = criu
        self._options = list(options)
        self._namespace = namespace
        self._ssl = ssl
        self._server_hostname = server_hostname
        self._store = store
        self._timeout = timeout
        self._report = report
        self._service = Service(
            failure=FailurePolicy(then=Action.KILL),
            on_close=Action.KILL,
            deadline=deadline,
            chunk=_CHUNK,
            max_children=_MAX_CHILDREN,
            hydrate=Pace.FULL,
            let_go=True,
        )
        self._deadline = deadline
        self._pages: TreePages | None = None
        self._is_complete = False
        self._members: list[tuple[int, OwnedFd]] = []  # pids and pidfds of its processes
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        incoming = self._incoming
        self._stack.push_async_callback(incoming.aclose)
        if incoming.extents:
            incoming.refuse("trees of processes are received here, and it is none")
            await self._stack.aclose()
            raise MigrationFailed("what has come is no tree of processes", outcome="source")
        await incoming.prepare([])
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if not self._is_complete:
                await self._kill()
        finally:
            await self._stack.aclose()

    async def run(self) -> None:
        """Wait for the switch, and make the tree run.

        Raises:
            MigrationFailed: It runs on at the source; or, with outcome ``lost``, CRIU may have let
                some of it run before it failed.

        Cancellation: what was made is killed, and the source hears of it, as for an error.
        """
        incoming = self._incoming
        state = await incoming.switched()
        try:
            await self._make(state)
            if incoming.stage is not Stage.SWITCHING:
                raise PeerError("has given the migration up meanwhile", incoming.peer)
        except BaseException as error:
            await self._kill()
            text = str(error) or type(error).__name__
            outcome = "lost" if incoming.may_run else "source"
            if not incoming.stage.is_over:
                incoming.note_failed(f"the processes do not run: {text}")
            if isinstance(error, UffdError | OSError):
                raise MigrationFailed(
                    f"the processes do not run here: {text}", stage="switching", outcome=outcome
                ) from error
            raise
        incoming.note_running(more=True)

    async def _make(self, state: bytes) -> None:
        notes = await in_thread(parcel.unpack, state, self.folder)
        host, port, tls = notes.get("host"), notes.get("port"), notes.get("tls")
        if not isinstance(host, str) or not isinstance(port, int) or not 0 < port < 1 << 16:
            raise PeerError("has not said where the memory is", self._incoming.peer)
        if bool(tls) != (self._ssl is not None):
            raise PeerError(
                "gives the memory over TLS, which was not asked for here"
                if tls
                else "gives the memory without TLS, which was asked for here",
                self._incoming.peer,
            )
        stack = self._stack
        checkpoint = await stack.enter_async_context(await Checkpoint.open(self.folder))
        pages = self._pages = await stack.enter_async_context(
            TreePages(
                host,
                port,
                ssl=self._ssl,
                server_hostname=self._server_hostname,
                deadline=self._deadline,
            )
        )
        living = [task.pid for task in checkpoint.tasks if not task.dead]
        self.processes = len(living)
        self.memory_bytes = sum(checkpoint.memory(pid).lazy_bytes for pid in living)
        restores = Restores(checkpoint, pages)
        self.server = await stack.enter_async_context(
            Server(
                os.path.join(self.folder, NAME),
                restores.receive,
                restores,
                service=self._service,
                handshake_timeout=None,
                senders=True,
                store=self._store,
                report=self._note,
            )
        )
        await self._restore()

    def _note(self, report: Report) -> None:
        """Hold each process: those that have all of their memory are served no more."""
        if isinstance(report, Started) and report.session.peer is not None:
            peer = report.session.peer
            self._members.append((peer.pid, peer.pidfd.dup()))
            if self._store is not None:
                self._store.put(GROUP, [self._members[-1][1]])
        self._report(report)

    async def _kill(self) -> None:
        """Kill all of it that there is, and wait until it is dead."""
        members = self._members
        living = [pid for pid, pidfd in members if pid > 0 and not _has_exited(pidfd.fileno())]
        started = await in_thread(_trees_of, living)
        if self.server is not None:
            await self.server.aclose()
        for pid in started:
            with contextlib.suppress(ProcessLookupError), OwnedFd(os.pidfd_open(pid)) as pidfd:
                signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
        for _, pidfd in members:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
        for _, pidfd in members:
            await _exit_of(pidfd.fileno())
        self._let_go()

    def _let_go(self) -> None:
        """Let it live, whatever becomes of us."""
        members, self._members = self._members, []
        if self._store is not None and members:
            self._store.remove(GROUP)
        for _, pidfd in members:
            pidfd.close()

    async def _restore(self) -> None:
        options = ["--lazy-pages", *self._options]
        before: Sequence[str] = ()
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="aiouffd-tree-"))
            script, fd = _make_teller(folder)
            stack.enter_context(fd)
            stack.callback(self._look_whether_it_may_run, f"{os.path.join(folder, _TOLD)}.may")
            options += ("--action-script", script)
            told = None
            if self._namespace:
                before = ("unshare", "--fork", "--pid", "--mount-proc")
                told = fd.fileno()
            else:
                options.append("--restore-detached")
            criu = Criu(self._program, "restore", self.folder, *options, before=before)
            try:
                async with asyncio.timeout(self._timeout):
                    ended = await _until_it_runs(criu, told)
            except BaseException as error:
                await _kill_all(criu)
                if isinstance(error, TimeoutError):
                    raise MigrationFailed(
                        f"criu restore has not ended within {self._timeout:g} s; see {criu.log}"
                    ) from error
                raise
        if ended and (told is not None or criu.status != 0):
            raise MigrationFailed(criu.why())
        criu.let_go()

    def _look_whether_it_may_run(self, path: str) -> None:
        """Tell, now that CRIU has ended or the tree runs, whether any of it may have run."""
        if os.path.exists(path):
            self._incoming.note_starting()

    async def complete(self) -> None:
        """Wait until all of the memory is here, and let the tree live on by itself.

        Raises:
            MigrationFailed: That will not be; the tree is killed.

        Cancellation: nothing happens; call again.
        """
        incoming, server, pages = self._incoming, self.server, self._pages
        assert server is not None  # noqa: S101 - it runs
        assert pages is not None  # noqa: S101 - it runs
        served = asyncio.ensure_future(server.drain())
        failed = asyncio.ensure_future(incoming.wait_done())
        ends = served, failed, pages.given_up
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                await failed
            if pages.given_up.done():
                raise MigrationFailed(pages.given_up.result())
            if server.failed:
                raise MigrationFailed("pages could not be brought")
            await pages.finish()
            if incoming.stage.is_over:  # the source has heard that it failed
                await incoming.wait_done()
        except (UffdError, OSError) as error:
            await self._kill()
            text = f"the processes were killed, as memory of theirs is missing: {error}"
            if not incoming.stage.is_over:
                incoming.note_failed(text)
            raise MigrationFailed(text, stage="following", outcome="lost") from error
        finally:
            for task in (served, failed):
                task.cancel()
            await asyncio.wait((served, failed))
            if not failed.cancelled():
                failed.exception()
        self._is_complete = True
        self._let_go()
        incoming.note_all_here()


def _make_teller(folder: str) -> tuple[str, OwnedFd]:
    """Make a command that CRIU runs when the tree runs; give it, and what is readable then."""
    path, script = os.path.join(folder, _TOLD), os.path.join(folder, "tell")
    os.mkfifo(path, 0o600)
    fd = OwnedFd(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    with open(script, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o700)
        file.write(_SCRIPT.format(path=shlex.quote(path)))
    return script, fd


async def _until_it_runs(criu: Criu, told: int | None) -> bool:
    """Wait until CRIU has ended, or has told that the tree runs; say whether it has ended."""
    if told is None:
        await criu.wait()
        return True
    loop, runs = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(told, runs.set)
    tasks = asyncio.ensure_future(runs.wait()), asyncio.ensure_future(criu.wait())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return not runs.is_set()
    finally:
        loop.remove_reader(told)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _kill_all(criu: Criu) -> None:
    """End a restore that is not to go on, with whatever it has made."""
    pids = await in_thread(_trees_of, [criu.pid])
    for pid in reversed(pids):
        with contextlib.suppress(ProcessLookupError), OwnedFd(os.pidfd_open(pid)) as pidfd:
            signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
    await criu.wait()


def _trees_of(pids: Sequence[int]) -> list[int]:
    """List processes and what descends from them, as far as it is seen while that changes."""
    found = list(pids)
    for each in found:  # which grows meanwhile
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{each}/task"):
                with open(f"/proc/{each}/task/{thread}/children", encoding="ascii") as file:
                    more = map(int, file.read().split())
                    found += [pid for pid in more if pid not in found]
    return found


def _has_exited(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


async def _exit_of(pidfd: int) -> None:
    loop, exited = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, exited.set)
    try:
        await exited.wait()
    finally:
        loop.remove_reader(pidfd)
