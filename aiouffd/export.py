"""Give images to peers: other aiouffd servers that read them over TCP or TLS.

Knows: what a peer asks for, sources.
Must not know: who the images are for; the bytes of the wire (``protocols.pages`` does); how
peers come and go (``peers`` does).

Without a TLS context that asks for client certificates, whoever can connect can read: keep to
loopback, or to a network where that is right.

Laws of this file:

* A peer costs a bounded amount of memory: what it has asked for and not taken yet stays below
  ``Limits.in_flight_bytes``; beyond that nothing more is read from it.
* No peer holds the loop: requests are answered in steps of about STEP_BYTES.
* A source that fails for one read fails that read only; the peer hears why.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import ssl
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from .errors import PeerError, UffdError
from .peers import Limits, Peer, Peers
from .protocols import pages
from .sources import Source, identity_of
from .sources.buffer import BufferSource

if TYPE_CHECKING:
    from typing_extensions import Buffer

log: Final = logging.getLogger("aiouffd.export")

STEP_BYTES: Final = 1 << 20  # answered in one turn of the loop
_BACKLOG: Final = 1024  # requests that wait for the limits to let them in
_REQUEST_COST: Final = 4096  # bytes that a request counts at least


class _Image:
    """A source that is exported, and what its hello says."""

    def __init__(self, name: str, source: Source, granularity: int) -> None:
        table = pages.pack_extents(source.extents(), source.size)
        self.name = name
        # An unknown generation is ours alone: after a restart nobody takes it for the same.
        identity = identity_of(source) or f"unknown {secrets.token_hex(8)}"
        self.hello = pages.Hello(
            source.size, identity, granularity, len(table) // pages.table_length(1)
        )
        self.sources: tuple[Source, Source] = (source, BufferSource(table))  # by kind


class _Connection(Peer):
    """One peer, from its connection on."""

    def __init__(self, export: Export, peer: str) -> None:
        super().__init__(export, peer)
        self._export = export
        self._wire = pages.Holder()
        self._image: _Image | None = None
        self._backlog: deque[pages.Request] = deque()
        self._reads: dict[asyncio.Task[None], int] = {}  # and what they cost, in bytes
        self._reading_bytes = 0

    @property
    def silent(self) -> bool:
        """Whether it has not said yet what it wants."""
        return self._image is None

    def data_received(self, data: bytes) -> None:
        """Take requests, or the greeting before them."""
        try:
            requests = self._wire.feed(data)
            if self._image is None and self._wire.name is not None:
                self._greet(self._wire.name)
        except PeerError as error:
            self.drop(str(error))
            return
        if requests:
            self._backlog += requests
            if not self._goes_on:
                self._go_on()

    def _gone(self, error: Exception | None) -> None:  # noqa: ARG002 - however it went
        self._backlog.clear()
        for task in self._reads:
            task.cancel()

    # --- requests ----------------------------------------------------------------------

    def _greet(self, name: str) -> None:
        assert self._transport is not None  # noqa: S101 - data came through it
        image = self._export._find(name)
        if image is None:
            self._transport.write(self._wire.refuse(f"there is no image {name!r}"))
            self.drop(f"asked for the image {name!r}, which is not there", politely=True)
            return
        self._stop_waiting()
        self._image = image
        self._transport.write(self._wire.hello(image.hello))
        log.info("%s reads %s", self.peer, image.name or "the image")

    def _go_on(self) -> None:
        """Answer what is at hand, start to read what is not, as far as the limits go."""
        self._goes_on = False
        transport, image = self._transport, self._image
        if transport is None or image is None or transport.is_closing():
            return
        backlog = self._backlog
        answers: list[Buffer] = []
        step = 0
        limit = self._export._limits.in_flight_bytes
        while backlog and step < STEP_BYTES and not self._full and self._reading_bytes < limit:
            request = backlog.popleft()
            number, offset, length, kind = request
            step += length + _REQUEST_COST
            source = image.sources[kind]
            try:
                data = source.read_nowait(offset, length)
            except (UffdError, OSError) as error:
                answers.append(self._wire.failure(number, str(error)))
                continue
            if data is None:
                self._start_read(source, request)
            else:
                self._export._count(length)
                answers += (self._wire.answer(number, length), data)
        if answers:
            self._write(transport, answers)
        if backlog and not self._full and self._reading_bytes < limit:
            self._go_on_soon()
        self._settle(transport)

    def _settle(self, transport: asyncio.Transport) -> None:
        """Read on only if nothing is left over; when draining, end with the last answer."""
        if transport.is_closing():
            return
        if self._draining:
            if not self._backlog and not self._reads:
                transport.close()
        elif (len(self._backlog) > _BACKLOG) == transport.is_reading():
            # Who is not read from cannot be seen to leave: a short backlog is read on.
            if transport.is_reading():
                transport.pause_reading()
            else:
                transport.resume_reading()

    def _start_read(self, source: Source, request: pages.Request) -> None:
        cost = max(request.length, _REQUEST_COST)
        task = self._loop.create_task(self._read(source, request), name="aiouffd export")
        self._reads[task] = cost
        self._reading_bytes += cost
        task.add_done_callback(self._end_read)

    async def _read(self, source: Source, request: pages.Request) -> None:
        try:
            data = await source.read(request.offset, request.length)
        except (UffdError, OSError) as error:
            answer: list[Buffer] = [self._wire.failure(request.id, str(error))]
        except asyncio.CancelledError:
            if self._transport is None:
                raise  # by us: the peer has gone
            answer = [self._wire.failure(request.id, "the read was cancelled by its source")]
        else:
            self._export._count(request.length)
            answer = [self._wire.answer(request.id, request.length), data]
        if self._transport is not None and not self._transport.is_closing():
            self._write(self._transport, answer)

    def _end_read(self, task: asyncio.Task[None]) -> None:
        self._reading_bytes -= self._reads.pop(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a read for %s failed", self.peer, exc_info=task.exception())
            self.drop("a source failed in an unknown way")
        elif self._backlog or self._draining:
            self._go_on_soon()


class Export(Peers):
    """Serves images to peers.

    ::

        async with Export({"vm1": source}, "10.0.0.5", 7433, ssl=context) as export:
            await export.wait_closed()

    Attributes:
        port: Where it listens, once it does.
        answered: How many requests were answered with bytes.
        answered_bytes: How many bytes those were.
        refused: How many peers were dropped for what they did, or for want of room.

    Sharing: the loop's thread.
    """

    def __init__(
        self,
        images: Source | Mapping[str, Source],
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        ssl: ssl.SSLContext | None = None,
        granularity: int = 4096,
        limits: Limits | None = None,
    ) -> None:
        """Prepare; nothing listens before ``async with``.

        Args:
            images: By name; or the only one.  They stay the caller's to close.  A peer that
                names none gets the only one.
            host: An address or a name of this machine.  Others than loopback only behind TLS
                with client certificates, or on a network where everybody may read everything.
            port: 0 takes a free one.
            ssl: A server's context; None is plain TCP.
            granularity: In what units the sources bring bytes: peers ask best for no less.
            limits: What peers may cost.
        """
        super().__init__(host, port, ssl=ssl, limits=limits)
        self.answered = 0
        self.answered_bytes = 0
        self._given = {"": images} if isinstance(images, Source) else dict(images)
        self._images: dict[str, _Image] = {}
        self._granularity = granularity

    def _peer(self, name: str) -> Peer:
        return _Connection(self, name)

    async def start(self) -> None:
        """Collect the images' extents, and listen.

        Raises:
            OSError: The address cannot be had.
            SourceError: An image's extents cannot be had.
        """
        for name, source in self._given.items():
            self._images[name] = await asyncio.to_thread(_Image, name, source, self._granularity)
        await super().start()

    def _find(self, name: str) -> _Image | None:
        if not name and len(self._images) == 1:
            return next(iter(self._images.values()))
        return self._images.get(name)

    def _count(self, length: int) -> None:
        self.answered += 1
        self.answered_bytes += length
