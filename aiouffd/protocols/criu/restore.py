"""The lazy-pages daemon's side of ``criu restore --lazy-pages``: tasks in, hand-overs out.

Knows: the socket's messages, the checkpoint that is being restored.
Must not know: sessions, servers, how pages are served.

Laws of this file:

* A task is given on as soon as it has come: it may fault before the restore is finished, and the
  restore waits for it then.
* What cannot be served is no memory of zeros: the task is killed before its userfaultfd is
  closed.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Final

from ...closing import fail_closed
from ...errors import PeerError, SourceError
from ...fds import OwnedFd
from ...handover import Handover, Peer, peer_credentials
from ...kernel import calls
from ...uffd import Userfaultfd
from ...unix_socket import Connection
from .checkpoint import Checkpoint
from .lazy_socket import Finished, Handed, Message, Parser, Zombie
from .restored_tasks import pin_task
from .task_source import PageReader, TaskSource

if TYPE_CHECKING:
    from .task_memory import TaskMemory

log: Final = logging.getLogger("aiouffd.criu")

DIALECT: Final = "criu"

_SHORTAGES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_SHORTAGE_PAUSE: Final = 0.1  # seconds until a task is looked at again


class Restores:
    """Any number of restores of one checkpoint.

    ::

        restores = Restores(checkpoint)
        async with Server(path, restores.receive, restores, senders=True) as server:
            ...

    Attributes:
        checkpoint: What is restored.

    Sharing: one event loop.
    """

    def __init__(self, checkpoint: Checkpoint, reader: PageReader | None = None) -> None:
        """Prepare.

        Args:
            checkpoint: Stays the caller's to close, after the server.
            reader: A page server's: who has the pages.  Without it they are in files.
        """
        self.checkpoint: Final = checkpoint
        self._reader = reader

    async def open_part(self, part: str) -> TaskSource:
        """Open the memory of a task; see ImageParts.

        Raises:
            SourceError: It has none, or it cannot be read.
        """
        if not part.isdecimal():
            raise SourceError(f"{part!r} is no task of a checkpoint")
        if self._reader is None:
            return await self.checkpoint.source(int(part))
        memory = self.checkpoint.memory(int(part))
        left = await asyncio.to_thread(memory.left_to_a_server)  # runs of large memory are many
        return TaskSource(left, (), self._reader)

    async def receive(self, connection: Connection) -> AsyncGenerator[Handover, None]:
        """Receive the tasks of one restore, and end when it is finished; see Receive.

        Args:
            connection: From a listener that passes senders on.

        Yields:
            Each task that has memory to be served.

        Raises:
            PeerError: The restore has failed, broke the protocol, or is one of another
                checkpoint.
        """
        client = peer_credentials(connection.socket)
        parser = Parser()
        known = {task.pid for task in self.checkpoint.tasks}
        tasks = 0
        while parser.wanted:
            message, sender = await _next(connection, parser)
            if sender is not None and not isinstance(message, Handed):
                sender.close()
            match message:
                case Handed(pid, fd):
                    tasks += 1
                    peer = await _look_at(pid, fd, sender, client)
                    handover = await self._handover(pid, fd, peer)
                    if handover is not None:
                        yield handover
                case Zombie(pid):
                    if pid not in known:
                        raise PeerError(
                            f"dead task {pid} is restored, but there is none in the checkpoint;"
                            " is it a restore of other images?"
                        )
                    log.debug("task %d is dead, and has no memory", pid)
                case Finished():
                    log.debug("the restore is finished: %d tasks", tasks)

    async def _handover(self, pid: int, fd: OwnedFd, peer: Peer | None) -> Handover | None:
        """Find out what a task has handed over.

        Returns:
            None if nothing of it is to be served.

        Raises:
            PeerError: It is none of ours.
        """
        try:
            memory = await self._memory(pid, fd, peer)
        except BaseException:
            if peer is not None:
                peer.close()
            raise
        if peer is None:
            log.warning("task %d cannot be found: its exit will be noticed late", pid)
        if memory.regions:
            return Handover(
                fd,
                memory.regions,
                dialect=DIALECT,
                part=str(pid),
                zero_elsewhere=True,
                alone=True,  # the task has closed its own copy
                peer=peer,
            )
        log.debug("task %d has no memory that is restored lazily", pid)
        fd.close()
        if peer is not None:
            peer.close()
        return None

    async def _memory(self, pid: int, fd: OwnedFd, peer: Peer | None) -> TaskMemory:
        try:
            return self.checkpoint.memory(pid)
        except SourceError as error:
            refusal = PeerError(
                f"task {pid} is restored, but {error}; is it a restore of other images?"
            )
            refusal.__cause__ = error
        try:
            uffd = Userfaultfd.adopt(fd)
        except ValueError as error:
            fd.close()
            raise PeerError(f"what task {pid} handed over: {error}") from error
        await fail_closed(uffd, peer, refusal)
        if not uffd.closed:
            uffd.close()
        raise refusal


async def _look_at(
    pid: int, fd: OwnedFd, sender: OwnedFd | None, client: tuple[int, int, int]
) -> Peer | None:
    """See that a task has handed a userfaultfd over, and which process it is.

    To look takes descriptors.  Where there are none left the task waits: to close what it has
    handed over would make zeros of its memory.

    Raises:
        PeerError: It is none.
    """
    try:
        while True:
            try:
                if not calls.is_userfaultfd(fd.fileno()):
                    fd.close()
                    raise PeerError(f"what task {pid} handed over is no userfaultfd")
                return pin_task(pid, sender, client)
            except OSError as error:
                if error.errno not in _SHORTAGES:
                    raise
                log.warning("task %d waits: %s", pid, error)
                await asyncio.sleep(_SHORTAGE_PAUSE)
    except BaseException as error:
        if sender is not None and not sender.closed:
            sender.close()
        if not fd.closed:
            log.critical(
                "task %d cannot be served: %s; descriptor %d stays open, or it would read zeros",
                *(pid, error, fd.detach()),
            )
        raise


async def _next(connection: Connection, parser: Parser) -> tuple[Message, OwnedFd | None]:
    """Receive up to the next message; give it with a pidfd of who has sent it."""
    while True:
        data, fds, sender = await connection.receive_from(parser.wanted)
        try:
            if not data:
                parser.end()
            message = parser.feed(data, fds)
        except BaseException:
            if sender is not None:
                sender.close()
            raise
        if message is not None:
            return message, sender
        if sender is not None:
            sender.close()
