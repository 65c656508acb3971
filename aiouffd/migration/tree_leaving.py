"""Leaving, for a tree of processes that CRIU stops: the source's side of moving one.

Knows: ``criu dump``, the tree's processes, whom CRIU asks what is to become of them.
Must not know: what goes over the network, and when; how the tree is made anew.

CRIU asks a command of its user's when a dump is complete (``--action-script``, ``post-dump``), and
waits for it with the tree in its hands: status 0, and it kills the tree; anything else, and it
lets it go on as if nothing had happened.  Our command asks us, over a socket.  So up to the switch
the tree has noticed nothing: no signal, no closed connection, no lost child.

From the switch on it must not go on, whoever dies.  So each process of it is sent SIGSTOP while
CRIU holds it: that takes effect only if CRIU lets go of it, or is killed, and then before the
process has run one instruction.  If the destination says that it has not started the tree,
SIGCONT takes it back.

Laws of this file:

* Until it has left, the tree goes on here whatever happens to us: without us the command says so.
* From then on it stands still here until it is killed, or the destination has said that it does
  not run there.
* CRIU is never killed: half-way through a dump its code is in the tree's processes.
* The images are kept until the tree runs elsewhere with all of its memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..errors import MigrationFailed, NotSupported, UffdError
from ..fds import OwnedFd
from ..protocols.criu import parcel
from ..protocols.criu.checkpoint import Checkpoint
from ..protocols.criu.command import Criu
from ..protocols.criu.page_server import PageServer
from ..threads import in_thread
from .line import is_loopback

if TYPE_CHECKING:
    import ssl

log: Final = logging.getLogger("aiouffd.migration")

MOST_IMAGES: Final = 1 << 30  #: bytes of images that go before the switch, with shared memory

_ON: Final = b"C"  # CRIU lets the tree go on
_END: Final = b"K"  # CRIU kills it

_SCRIPT: Final = """\
#!/bin/sh
# Asked by criu dump: what is to become of the processes that it has dumped?
[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0
exec {python} -I -S -c 'import socket, sys
asked = socket.socket(socket.AF_UNIX)
asked.connect(sys.argv[1])
sys.exit(asked.recv(1) != b"K")' {socket}
"""


@dataclass(slots=True)
class _Process:
    """One process of the tree.

    Attributes:
        pid: Its process id here; for messages.
        pidfd: Holds it.
        was_stopped: A signal had stopped it before we came.
    """

    pid: int
    pidfd: OwnedFd
    was_stopped: bool

    def send(self, number: int) -> None:
        """Send a signal, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd.fileno(), number)


class LeavingTree:
    """A process and all that descend from it, to be sent away; an ``outgoing.Program``.

    ::

        async with LeavingTree(pid, folder, host="10.0.0.5", ssl=context) as tree:
            outgoing = Outgoing([], host, port, plan=Plan(rounds=0), ssl=...)
            await outgoing.run(tree)
            await tree.end()

    Attributes:
        name: For people.
        folder: Where the images are.
        has_left: It must not go on here by itself.
        has_ended: It is gone from here.
        memory_bytes: That is brought after the switch.
        image_bytes: That went before it.
        server: Gives the memory, from ``stop`` on.

    Sharing: the loop's thread.
    """

    def __init__(
        self,
        pid: int,
        folder: str,
        *,
        criu: str = "criu",
        options: Sequence[str] = (),
        host: str = "127.0.0.1",
        port: int = 0,
        ssl: ssl.SSLContext | None = None,
        plain: bool = False,
        client_name: str = "",
    ) -> None:
        """Prepare; nothing happens to the tree.

        Args:
            pid: Of the first process.
            folder: For the images; it is there, and empty.
            criu: The program.
            options: More of them, for ``criu dump``.
            host: An address of this machine, where the destination gets the memory.
            port: 0 takes a free one.
            ssl: A server's context, which asks for certificates; None is plain TCP.
            plain: Let other machines have the memory without TLS.
            client_name: The name or address that the destination's certificate has to be for;
                "" is any that the context lets in.

        Raises:
            ValueError: It is for other machines, without TLS, and that was not asked for.
            NotSupported: This user may not.
            ProcessLookupError: There is no such process.
        """
        if os.geteuid() != 0:
            raise NotSupported(
                "only root can move processes", "CRIU makes processes with any user's rights"
            )
        if ssl is None and not plain and not is_loopback(host):
            raise ValueError(
                f"{host} can be reached by other machines, and without TLS whoever connects can"
                " read the memory of the processes: give certificates, or ask for plain connections"
            )
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            self.name: Final = f"{file.read().strip()} (pid {pid})"
        self.pid: Final = pid
        self.folder: Final = os.path.abspath(folder)
        self.has_left = False
        self.has_ended = False
        self.memory_bytes = 0
        self.image_bytes = 0
        self.server: PageServer | None = None
        self._program = criu
        self._options = list(options)
        self._host, self._port = host, port
        self._ssl = ssl
        self._client_name = client_name
        self._hooks = ""  # the folder of the command that CRIU asks
        self._asking: asyncio.Server | None = None
        self._asked: asyncio.Future[asyncio.StreamWriter] | None = None
        self._criu: Criu | None = None
        self._checkpoint: Checkpoint | None = None
        self._processes: list[_Process] = []

    # --- an outgoing.Program -------------------------------------------------------------

    async def stop(self) -> bytes:
        """Dump it, and have CRIU hold it; give the images but for the memory.

        Raises:
            MigrationFailed: It cannot be dumped; it goes on.

        Cancellation: CRIU is still at work; ``restart`` waits for that.
        """
        await self._dump()
        checkpoint = self._checkpoint = await Checkpoint.open(self.folder)
        self._hold(checkpoint)
        self.server = PageServer(
            checkpoint, self._host, self._port, ssl=self._ssl, client_name=self._client_name
        )
        await self.server.start()
        living = [task.pid for task in checkpoint.tasks if not task.dead]
        self.memory_bytes = sum(checkpoint.memory(pid).lazy_bytes for pid in living)
        notes = {
            "host": self._host,
            "port": self.server.port,
            "tls": self._ssl is not None,
            "processes": len(living),
            "memory_bytes": self.memory_bytes,
        }
        images = await in_thread(parcel.pack, checkpoint, notes)
        self.image_bytes = len(images)
        if len(images) > MOST_IMAGES:
            raise MigrationFailed(
                f"{len(images)} bytes of it would have to go before it runs, shared memory most"
                f" likely; that is more than {MOST_IMAGES}",
                outcome="source",
            )
        return images

    async def restart(self) -> None:
        """Let it go on here."""
        for process in self._processes if self.has_left else ():
            if not process.was_stopped:
                process.send(signal.SIGCONT)
        self.has_left = False
        await self._decide(_ON)
        await self._close_server()

    async def leave(self) -> None:
        """See to it that it does not go on here by itself, even if CRIU is killed.

        Raises:
            MigrationFailed: CRIU does not hold it any more.
        """
        self.has_left = True
        for process in self._processes:
            process.send(signal.SIGSTOP)
        if self._criu is None or self._criu.status is not None:
            raise MigrationFailed("criu dump has let go of it", outcome="source")

    # --- after it ------------------------------------------------------------------------

    async def end(self) -> None:
        """Kill what stands still here: it runs elsewhere with all that it had.

        Cancellation: it may still stand; call again.
        """
        await self._decide(_END)
        for process in self._processes:
            process.send(signal.SIGKILL)  # CRIU has done so, unless it was killed
        for process in self._processes:
            await _exit_of(process.pidfd.fileno())
        self.has_ended = True
        await self._close_server()

    async def aclose(self) -> None:
        """Let go of it: it goes on, or if it has left, stands still as stopped by a signal.

        Cancellation: CRIU is told nothing; it lets go of the tree when this process ends.
        """
        if not self.has_ended:
            await self._decide(_ON)
        await self._close_server()
        for process in self._processes:
            process.pidfd.close()
        self._processes.clear()
        if self._asking is not None:
            self._asking.close()
            await self._asking.wait_closed()
            self._asking = None
        if self._hooks:
            await in_thread(shutil.rmtree, self._hooks, ignore_errors=True)

    async def __aenter__(self) -> LeavingTree:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    @property
    def pids(self) -> list[int]:
        """The processes that stand here, as they were when it was stopped."""
        return [process.pid for process in self._processes]

    # --- CRIU ----------------------------------------------------------------------------

    async def _dump(self) -> None:
        """Start CRIU, and wait until it asks."""
        loop = asyncio.get_running_loop()
        self._hooks = tempfile.mkdtemp(prefix="aiouffd-tree-")
        path = os.path.join(self._hooks, "socket")
        script = _write_script(os.path.join(self._hooks, "ask"), path)
        asked = self._asked = loop.create_future()

        def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if asked.done():
                writer.close()
            else:
                asked.set_result(writer)

        self._asking = await asyncio.start_unix_server(answer, path)
        self._criu = Criu(
            self._program,
            "dump",
            self.folder,
            *("-t", str(self.pid), "--action-script", script, *self._options),
        )
        await self._until_asked()
        if not asked.done():
            raise MigrationFailed(self._criu.why(), outcome="source")

    async def _until_asked(self) -> None:
        """Wait until CRIU asks, or has ended."""
        assert self._criu is not None  # noqa: S101 - started
        assert self._asked is not None  # noqa: S101 - made before
        exited = asyncio.ensure_future(self._criu.wait())
        try:
            await asyncio.wait((exited, self._asked), return_when=asyncio.FIRST_COMPLETED)
        finally:
            exited.cancel()

    async def _decide(self, what: bytes) -> None:
        """Tell CRIU what is to become of the tree, and wait until it has done so."""
        criu, asked = self._criu, self._asked
        if criu is None or asked is None:
            return
        await self._until_asked()
        if asked.done() and not asked.result().is_closing():
            writer = asked.result()
            writer.write(what)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        await criu.wait()

    def _hold(self, checkpoint: Checkpoint) -> None:
        """Hold every process of the tree, which stands still.

        Raises:
            MigrationFailed: There are others than those that were dumped.
        """
        stopped = {task.pid for task in checkpoint.tasks if task.stopped}
        for pid in _tree_of(self.pid):
            pidfd = OwnedFd(os.pidfd_open(pid))
            self._processes.append(_Process(pid, pidfd, _inner_pid(pid) in stopped))
        if len(self._processes) != len(checkpoint.tasks):
            raise MigrationFailed(
                f"{len(checkpoint.tasks)} processes were dumped, and there are"
                f" {len(self._processes)}",
                outcome="source",
            )

    async def _close_server(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            await server.aclose()
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is not None:
            await checkpoint.aclose()


def _write_script(script: str, path: str) -> str:
    """Write the command that CRIU asks; give its path."""
    text = _SCRIPT.format(python=shlex.quote(sys.executable), socket=shlex.quote(path))
    with open(script, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o700)
        file.write(text)
    return script


def _tree_of(pid: int) -> list[int]:
    """List a process and all that descend from it, which stand still."""
    found = [pid]
    for each in found:  # which grows meanwhile
        for thread in os.listdir(f"/proc/{each}/task"):
            with open(f"/proc/{each}/task/{thread}/children", encoding="ascii") as file:
                found += map(int, file.read().split())
    return found


def _inner_pid(pid: int) -> int:
    """Give the number that a process has in its own namespace."""
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    raise UffdError(f"process {pid} says no number of its own")


async def _exit_of(pidfd: int) -> None:
    loop, exited = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, exited.set)
    try:
        await exited.wait()
    finally:
        loop.remove_reader(pidfd)
