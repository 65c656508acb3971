"""Receive the memory of a process from ``criu dump --page-server``, into a folder of images.

Knows: what a dumper sends, how much of it may wait to be written.
Must not know: files (``image_folder`` does), the bytes of the wire (``page_wire`` does).

As CRIU's own (``criu page-server``), it takes one dump.  All other images are written by the
dumper, where it is told to; both together are what ``criu restore`` takes.

Laws of this file:

* A dump is received when the dumper has said that it was all and everything is on the disk; only
  then is it told so, and only then does a dumper that was to end the process end it.
* A dump that breaks off leaves a named error and nothing that looks like a checkpoint.
* A dumper that falls silent in the middle of a dump is waited for, but not for ever.
* Who connects and is no dumper is dropped, and the dump is waited for.
* A dumper that is quicker than the disk waits: no more than ``Limits.in_flight_bytes`` are held.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Final

from ...errors import ClosedError, PeerError, UffdError
from ...peers import Limits, Peer, Peers
from ...ranges import PAGE_SIZE
from ...threads import in_thread
from . import page_wire
from .image_folder import ImageFolder
from .images import PageFlag

if TYPE_CHECKING:
    import ssl

log: Final = logging.getLogger("aiouffd.criu.page_receiver")

_EVENT_COST: Final = 512  # bytes that an event counts at least
#: Between two runs a dumper may do much else, such as packing file systems in memory.
_BETWEEN_RUNS: Final = 10  # times as long a silence as within one


class _Connection(Peer):
    """One dumper, from its connection on."""

    def __init__(self, receiver: PageReceiver, peer: str) -> None:
        super().__init__(receiver, peer)
        self._receiver = receiver
        self._wire = page_wire.Acceptor(receiver.header_bytes)
        self._queue: list[page_wire.Event] = []
        self._queued_bytes = 0
        self._writing: asyncio.Task[None] | None = None
        self._begun = False  # it is the one that dumps
        self._heard_at = 0.0
        self._missing_bytes = 0  # of the run of pages that it is sending
        self._listening: asyncio.TimerHandle | None = None  # for its silence

    @property
    def silent(self) -> bool:
        """Whether it has sent nothing of a dump yet: a question for a parent is no dump."""
        return not self._begun

    def data_received(self, data: bytes) -> None:
        """Take what is sent; it is written in a thread."""
        self._heard_at = self._loop.time()
        try:
            events = self._wire.feed(data)
            if self._wire.direction is page_wire.Direction.PULL:
                raise PeerError("asks for pages; this server receives some (--lazy-pages gives)")
        except PeerError as error:
            self.drop(str(error))
            return
        if not events:
            return
        for event in events:
            if isinstance(event, page_wire.Data):
                self._missing_bytes -= len(event.data)
            elif isinstance(event, page_wire.Run) and event.flags & PageFlag.PRESENT:
                self._missing_bytes += event.pages * PAGE_SIZE
        if not self._begun and self._wire.direction is page_wire.Direction.PUSH:
            if not self._receiver._is_first(self):
                self.drop("sends a dump while another one is received")
                return
            self._begun = True
            self._stop_waiting()
            self._listen_for_it()
            log.info("%s sends a dump, headers of %s bytes", self.peer, self._wire.header_bytes)
        self._queue += events
        self._queued_bytes += len(data) + _EVENT_COST * len(events)
        if self._transport is not None and self._queued_bytes > self._peers._limits.in_flight_bytes:
            self._transport.pause_reading()
        if self._writing is None:
            self._writing = self._loop.create_task(self._write_all(), name="aiouffd page receiver")

    def drain(self) -> None:
        """Let a dump that has begun go on to its end; everybody else goes."""
        if not self._begun:
            self.drop("")

    def _listen_for_it(self) -> None:
        """Drop it when it has sent nothing for too long, though we were ready to take more."""
        self._listening = None
        if self._wire.ended:
            return
        now, silence = self._loop.time(), self._receiver._silence
        if self._writing is not None:  # perhaps it waits for us
            self._heard_at = now
        midway = self._missing_bytes > 0 or not self._wire.at_rest
        limit = silence if midway else silence * _BETWEEN_RUNS
        left = self._heard_at + limit - now
        if left > 0:
            self._listening = self._loop.call_later(min(left, silence), self._listen_for_it)
        else:
            self.drop(f"sent nothing for {limit:g} s, and was not through")

    def _go_on(self) -> None:
        self._goes_on = False  # answers are written at once: they are some bytes

    def _gone(self, error: Exception | None) -> None:
        if self._listening is not None:
            self._listening.cancel()
            self._listening = None
        if self._begun and not self._wire.ended:
            why = self.error or (str(error) if error else "")
            self._receiver._fail(
                PeerError(
                    f"the dump broke off: {why or 'the connection ended before the dump did'}",
                    self.peer,
                )
            )

    async def _write_all(self) -> None:
        """Write what has come, as long as something comes."""
        folder = self._receiver.folder
        try:
            while self._queue:
                events, self._queue = self._queue, []
                self._queued_bytes = 0
                transport = self._transport
                if transport is not None and not transport.is_closing():
                    transport.resume_reading()
                size = self._wire.header_bytes or page_wire.SHORT
                answer = await in_thread(_apply, folder, events, size, dumps=self._begun)
                if self._begun and isinstance(events[-1], page_wire.Ended):
                    self._receiver._succeed()
                if self._transport is not None and answer:
                    self._transport.write(answer)
        except (UffdError, OSError) as error:
            self._receiver._fail(error)
            self.drop(str(error))
        else:
            if self._wire.ended and self._transport is not None:
                # It closes, once it has our answer; if it does not, we do.
                self._wait_for_it("does not close, though it is through,")
        finally:
            self._writing = None


def _apply(
    folder: ImageFolder, events: list[page_wire.Event], header_bytes: int, *, dumps: bool
) -> bytes:
    """Do what a dumper says; runs in a thread.

    Args:
        folder: Where it sends to.
        events: What it says, in order.
        header_bytes: What it speaks.
        dumps: Whether it has sent any memory; if not, its end is not the dump's.

    Returns:
        What to answer.
    """
    answers = bytearray()
    data: list[memoryview] = []
    for event in events:
        if isinstance(event, page_wire.Data):
            data.append(event.data)
            continue
        if data and not isinstance(event, page_wire.Run):
            folder.add_data(data)
            data.clear()
        match event:
            case page_wire.Run():
                folder.add_run(event.address, event.pages, event.flags, header_bytes)
            case page_wire.Opened():
                held = folder.open(event.image)
                if event.wants_answer:
                    answers += page_wire.has_parent(answer=held)
            case page_wire.ParentAsked():
                answers += page_wire.parent_exists(answer=folder.parent_has(event.image))
            case page_wire.Ended():
                if dumps:
                    folder.commit()
                answers += page_wire.END
            case _:
                raise AssertionError(event)  # the rest is for who gives pages
    if data:
        folder.add_data(data)
    return bytes(answers)


class PageReceiver(Peers):
    """Receives one dump.

    ::

        async with PageReceiver(ImageFolder("/checkpoints/web"), port=7001) as receiver:
            await receiver.wait_received()

    Attributes:
        port: Where it listens, once it does.
        folder: Where the memory is written to.
        header_bytes: What the dumper speaks; None finds it out.
        refused: How many peers were dropped for what they did.

    Sharing: the loop's thread.
    """

    _log = log

    def __init__(
        self,
        folder: ImageFolder,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        ssl: ssl.SSLContext | None = None,
        client_name: str = "",
        header_bytes: int | None = None,
        limits: Limits | None = None,
        silence: float = 60.0,
    ) -> None:
        """Prepare; nothing listens before ``async with``.

        Args:
            folder: Where to; it stays the caller's to close, when the receiver is.
            host: An address or a name of this machine.  Others than loopback only behind TLS, or
                on a network where everybody may write to the folder.
            port: 0 takes a free one.
            ssl: A server's context, as ``tls.server_context`` makes it; None is plain TCP.
            client_name: The name or address that a dumper's certificate has to be for; "" is
                any that the context lets in.
            header_bytes: See the attribute.
            limits: What peers may cost.
            silence: Seconds that the dumper may send nothing in the middle of a run of pages; ten
                times as many between two, while it does other things.
        """
        super().__init__(host, port, ssl=ssl, limits=limits, client_name=client_name)
        self.folder = folder
        self.header_bytes = header_bytes
        self._silence = silence
        self._dumper: _Connection | None = None
        self._result: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def _peer(self, name: str) -> Peer:
        return _Connection(self, name)

    async def wait_received(self) -> None:
        """Wait until the dump is there.

        Raises:
            PeerError: It broke off, or the dumper broke the protocol.
            ImageError: The parent checkpoint is damaged.
            OSError: It could not be written.
            ClosedError: The receiver was closed before.

        Cancellation: the dump goes on.
        """
        await asyncio.shield(self._result)

    async def finish(self) -> None:
        """Refuse new peers; a dump that has begun is received to its end.

        Cancellation: new peers stay refused; call again, or ``aclose``.
        """
        await self.drain()
        if self._dumper is None:
            self._fail(ClosedError("the receiver was closed before a dump came"))

    async def aclose(self) -> None:
        """Close every connection now; a dump that is not complete breaks off.

        Cancellation: the connections are closed all the same; what is being written is left.
        """
        await super().aclose()
        writing = self._dumper._writing if self._dumper is not None else None
        if writing is not None:
            with contextlib.suppress(UffdError, OSError):
                await writing
        if not self._result.done():
            self._fail(ClosedError("the receiver was closed before the dump was there"))
        if self._result.exception() is not None:
            await in_thread(self.folder.discard)

    def _is_first(self, connection: _Connection) -> bool:
        if self._dumper is not None:
            return False
        self._dumper = connection
        return True

    def _fail(self, error: Exception) -> None:
        if not self._result.done():
            self._result.set_exception(error)
            self._result.exception()  # it counts as seen, though nobody may wait for it

    def _succeed(self) -> None:
        if not self._result.done():
            self._result.set_result(None)
