"""Give images to peers: other aiouffd servers that read them over TCP or TLS.

Knows: connections, limits, sources.
Must not know: who the images are for; the bytes of the wire (``protocols.pages`` does).

Without a TLS context that asks for client certificates, whoever can connect can read: keep to
loopback, or to a network where that is right.

Laws of this file:

* A peer costs a bounded amount of memory: what it has asked for and not taken yet stays below
  ``Limits.in_flight_bytes``; beyond that nothing more is read from it.
* A peer that takes next to nothing (256 KiB) for ``Limits.patience`` seconds is dropped, as is
  one that does not say what it wants in that time.  Under more connections than
  ``Limits.connections`` the oldest that has not said it yet goes; if all have, the new one.
* No peer holds the loop: requests are answered in steps of about STEP_BYTES.
* A source that fails for one read fails that read only; the peer hears why.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import secrets
import socket
import ssl
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, cast

from .errors import PeerError, UffdError
from .protocols import pages
from .sources import Source, identity_of
from .sources.buffer import BufferSource

if TYPE_CHECKING:
    from typing_extensions import Buffer

log: Final = logging.getLogger("aiouffd.export")

STEP_BYTES: Final = 1 << 20  # answered in one turn of the loop
_BACKLOG: Final = 1024  # requests that wait for the limits to let them in
_REQUEST_COST: Final = 4096  # bytes that a request counts at least
_HIGH, _LOW = 1 << 20, 1 << 18  # of answers that the kernel has not taken yet, in bytes
_LONG: Final = 32 << 10  # bytes of an answer from which on copying them is not worth a system call
_QUEUE: Final = 128  # connections that the kernel holds until they are accepted
_SHORTAGE_PAUSE: Final = 0.1  # seconds without accepting while descriptors are short
_SHORTAGES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What peers may cost.

    Attributes:
        connections: At once.
        in_flight_bytes: Per connection: read for it, or about to be.
        patience: Seconds that a peer may take to say what it wants, or to take answers.
    """

    connections: int = 128
    in_flight_bytes: int = 8 << 20
    patience: float = 30.0


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


class _Connection(asyncio.Protocol):
    """One peer, from its connection on."""

    def __init__(self, export: Export, peer: str) -> None:
        self.peer = peer
        self.error = ""  # why it was dropped
        self.task: asyncio.Task[None] | None = None  # the TLS handshake, or just its beginning
        self._export = export
        self._loop = asyncio.get_running_loop()
        self._wire = pages.Holder()
        self._image: _Image | None = None
        self._transport: asyncio.Transport | None = None
        self._backlog: deque[pages.Request] = deque()
        self._reads: dict[asyncio.Task[None], int] = {}  # and what they cost, in bytes
        self._reading_bytes = 0
        self._full = False  # the kernel does not take our answers
        self._goes_on = False  # a step is due
        self._draining = False
        self._impatience: asyncio.TimerHandle | None = None
        self._written_bytes = 0
        self._taken_bytes = -1  # of these by the peer when last looked; -1: not looked

    @property
    def silent(self) -> bool:
        """Whether it has not said yet what it wants."""
        return self._image is None

    # --- the transport's calls ---------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Give it some time to say what it wants."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(_HIGH, _LOW)
        self._wait_for_it("said nothing")

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

    def pause_writing(self) -> None:
        """Start no reads while it takes no answers."""
        self._full = True
        self._taken_bytes = -1
        self._look_whether_it_takes()

    def resume_writing(self) -> None:
        """Go on."""
        self._full = False
        self._stop_waiting()
        self._go_on_soon()

    def eof_received(self) -> bool:
        """Close: nothing more is asked."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """Read nothing more for it."""
        self._stop_waiting()
        self._backlog.clear()
        for task in self._reads:
            task.cancel()
        self._transport = None
        self._export._forget(self, error)

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

    def _go_on_soon(self) -> None:
        if not self._goes_on:
            self._goes_on = True
            self._loop.call_soon(self._go_on)

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

    def _write(self, transport: asyncio.Transport, parts: list[Buffer]) -> None:
        """Send parts of answers: short ones together, long ones as they are, without a copy."""
        # Not writelines: before Python 3.13.6 or so it never calls pause_writing.
        short: list[Buffer] = []
        for part in parts:
            length = len(part)  # type: ignore[arg-type]  # bytes, or a view of them
            self._written_bytes += length
            if length < _LONG:
                short.append(part)
                continue
            transport.write(b"".join(short))
            short.clear()
            transport.write(memoryview(part))
        if short:
            transport.write(b"".join(short))

    def _end_read(self, task: asyncio.Task[None]) -> None:
        self._reading_bytes -= self._reads.pop(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a read for %s failed", self.peer, exc_info=task.exception())
            self.drop("a source failed in an unknown way")
        elif self._backlog or self._draining:
            self._go_on_soon()

    # --- the end -----------------------------------------------------------------------

    def _wait_for_it(self, failing: str) -> None:
        patience = self._export._limits.patience
        text = f"{failing} for {patience:g} s"
        self._stop_waiting()
        self._impatience = self._loop.call_later(patience, self.drop, text)

    def _look_whether_it_takes(self) -> None:
        """Drop it when it has taken next to nothing for a while; slow is not silent."""
        if self._transport is None:
            return
        before = self._taken_bytes
        self._taken_bytes = self._written_bytes - self._transport.get_write_buffer_size()
        if before >= 0 and self._taken_bytes - before < _LOW:
            self.drop(f"takes no answers for {self._export._limits.patience:g} s")
            return
        self._stop_waiting()
        self._impatience = self._loop.call_later(
            self._export._limits.patience, self._look_whether_it_takes
        )

    def _stop_waiting(self) -> None:
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None

    def drain(self) -> None:
        """Answer what has been asked, then close."""
        self._draining = True
        if self._transport is None:
            self.drop("")
        elif not self._transport.is_closing():
            self._transport.pause_reading()
            self._go_on_soon()
            if self.silent:
                self.drop("")

    def drop(self, why: str, *, politely: bool = False) -> None:
        """Close now; ``politely``, once what was written has been taken.

        Args:
            why: What it did; "" if it did nothing wrong, which is then not counted as refused.
            politely: As said.
        """
        self.error = self.error or why
        if self._transport is None:
            if self.task is not None:
                self.task.cancel()
        elif politely:
            self._wait_for_it("takes no answers")
            self._transport.close()
        else:
            self._transport.abort()


class Export:
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
        self.port = port
        self.answered = 0
        self.answered_bytes = 0
        self.refused = 0
        self._given = {"": images} if isinstance(images, Source) else dict(images)
        self._images: dict[str, _Image] = {}
        self._host = host
        self._ssl = ssl
        self._granularity = granularity
        self._limits = limits if limits is not None else Limits()
        self._connections: dict[_Connection, None] = {}  # the oldest first
        self._accepting: list[asyncio.Task[None]] = []
        self._listeners: list[socket.socket] = []
        self._over = asyncio.Event()
        self._waiter: asyncio.Future[None] | None = None

    @property
    def connections(self) -> int:
        """How many peers there are now."""
        return len(self._connections)

    async def start(self) -> None:
        """Collect the images' extents, and listen.

        Raises:
            OSError: The address cannot be had.
            SourceError: An image's extents cannot be had.
        """
        for name, source in self._given.items():
            self._images[name] = await asyncio.to_thread(_Image, name, source, self._granularity)
        loop = asyncio.get_running_loop()
        flags = socket.AI_PASSIVE
        found = await loop.getaddrinfo(self._host, self.port, type=socket.SOCK_STREAM, flags=flags)
        try:
            for family, _, _, _, address in found:
                # All of a name's addresses have one port.
                where: Any = (address[0], self.port, *address[2:])
                listener = socket.create_server(where, family=family, backlog=_QUEUE)
                self._listeners.append(listener)
                listener.setblocking(False)
                self.port = listener.getsockname()[1]
        except BaseException:
            self._stop_listening()
            raise
        self._accepting = [loop.create_task(self._accept(each)) for each in self._listeners]

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def wait_closed(self) -> None:
        """Wait until the export was drained or closed.

        Cancellation: nothing happens to the export.
        """
        await self._over.wait()

    async def drain(self) -> None:
        """Refuse new peers, answer what has been asked, then close.

        A peer whose request was not read yet asks again elsewhere.

        Cancellation: new peers stay refused; call again, or ``aclose``.
        """
        accepting = self._stop_listening()
        for connection in tuple(self._connections):
            connection.drain()
        await self._end(accepting)

    async def aclose(self) -> None:
        """Close every connection now; a second call does nothing.

        Cancellation: the connections are closed all the same.
        """
        accepting = self._stop_listening()
        for connection in tuple(self._connections):
            connection.drop("")
        await self._end(accepting)

    async def _end(self, accepting: list[asyncio.Task[None]]) -> None:
        if accepting:
            await asyncio.wait(accepting)
        while self._connections:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._over.set()

    def _stop_listening(self) -> list[asyncio.Task[None]]:
        tasks, self._accepting = self._accepting, []
        for task in tasks:
            task.cancel()
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        return tasks

    # --- peers -------------------------------------------------------------------------

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, address = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno not in _SHORTAGES:
                    log.warning("a connection could not be accepted: %s", error)
                    await asyncio.sleep(0)
                    continue
                # The connection stays in the kernel's queue: pause, or nothing else is done.
                log.warning("new peers wait: %s", error)
                await asyncio.sleep(_SHORTAGE_PAUSE)
                continue
            self._admit(accepted, f"{address[0]}:{address[1]}")

    def _admit(self, accepted: socket.socket, peer: str) -> None:
        connection = _Connection(self, peer)
        if len(self._connections) >= self._limits.connections:
            silent = next((each for each in self._connections if each.silent), None)
            if silent is None:
                accepted.close()
                self._refuse(peer, "there are too many connections")
                return
            silent.drop("there are too many connections, and it was the slowest")
            self._forget(silent, None)
        self._connections[connection] = None
        connection.task = asyncio.create_task(self._begin(connection, accepted))

        def begun(_: asyncio.Task[None]) -> None:
            # A task that is cancelled before its first step never runs at all.
            connection.task = None
            if connection._transport is None:
                accepted.close()
                self._forget(connection, None)

        connection.task.add_done_callback(begun)

    async def _begin(self, connection: _Connection, accepted: socket.socket) -> None:
        """Make a transport of a new connection; with TLS that takes a handshake."""
        try:
            keep_alive(accepted)
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                accepted,
                ssl=self._ssl,
                ssl_handshake_timeout=self._limits.patience if self._ssl else None,
            )
        except OSError as error:  # SSLError is one, TimeoutError too
            connection.error = connection.error or f"failed to connect: {error}"

    def _forget(self, connection: _Connection, error: Exception | None) -> None:
        if connection not in self._connections:
            return
        del self._connections[connection]
        if connection.error:
            self._refuse(connection.peer, connection.error)
        elif error is not None:
            log.info("%s is gone: %s", connection.peer, error)
        if self._waiter is not None and not self._connections and not self._waiter.done():
            self._waiter.set_result(None)

    def _refuse(self, peer: str, reason: str) -> None:
        self.refused += 1
        log.warning("dropped %s: %s", peer, reason)

    def _find(self, name: str) -> _Image | None:
        if not name and len(self._images) == 1:
            return next(iter(self._images.values()))
        return self._images.get(name)

    def _count(self, length: int) -> None:
        self.answered += 1
        self.answered_bytes += length


def keep_alive(connection: socket.socket) -> None:
    """Send at once, and hear within a minute of a host that has gone without a word."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        with contextlib.suppress(AttributeError):  # an option that only Linux has
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
