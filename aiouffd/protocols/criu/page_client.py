"""Ask a page server of CRIU for pages: ``criu page-server`` or ``criu dump`` with --lazy-pages.

Knows: one connection, what is asked first, how the end is said.
Must not know: the bytes of the wire (``page_wire`` does), what the pages are for.

A stock server serves one connection, then ends; so there is one for all tasks of a dump, and
when it is lost, what was not read is lost.

How it ends matters for a live dump (``criu dump --lazy-pages``), which has stopped its tasks and
keeps their memory: after ``finish`` it ends them, after anything else it lets them go on.  That
holds when this process is killed, too; see ``page_wire.Puller``.

Laws of this file:

* Demand first: a long read is cut into pieces, of which no more are asked for at a time than come
  within a moment (``flow``), so that a short read does not wait long behind them.
* What is asked for twice travels once, if it is on its way already.
* A server that says nothing for ``timeout`` seconds while it should is given up.
* An end of any kind ends every read, with SourceError.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Self, cast

from ...errors import ClosedError, PeerError, SourceError, UffdError
from ...flow import Flow
from ...peers import keep_alive
from ...ranges import PAGE_SIZE, align_down
from .checkpoint import Checkpoint
from .page_wire import LONG, SHORT, Closed, Pages, Puller

if TYPE_CHECKING:
    import ssl
    from types import TracebackType

    from typing_extensions import Buffer

#: Pages of a read that somebody waits for at a fault; what is longer is bulk.
DEMAND_PAGES: Final = 16
#: Bytes of bulk that are asked for and have not come, at most.
BULK_BYTES: Final = 4 << 20
#: Bytes of one request of a longer read, at most.
PIECE_BYTES: Final = 1 << 20

_SLOWEST: Final = 256 << 10  # bytes of bulk in one request, and at once, however slowly they come
_SCRATCH: Final = 256 << 10  # bytes that are read at once where no long answer is coming
_WORTH_IT: Final = 8 << 10  # bytes that are read straight to where they belong
#: Seconds that a server with short headers may take to answer a probe.  The stock one holds its
#: answer back for 0.2 s (TCP_CORK).
_PROBE_SECONDS: Final = 1.0
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: close by a reset


async def header_bytes_of(checkpoint: Checkpoint) -> int | None:
    """Tell which headers the CRIU speaks that has made a checkpoint.

    Its live dump speaks them, and so do other servers of the same version: 4.2 has begun to
    count pages in 64 bits, in its images and on the wire.

    Returns:
        24 or 32; None if the checkpoint does not tell.

    Raises:
        ImageError: A pagemap is not there any more.
    """
    wide = await checkpoint.has_wide_counts()
    return None if wide is None else LONG if wide else SHORT


class _Read:
    """A long read: ready when all that was asked for it has come."""

    __slots__ = ("left", "whole")

    def __init__(self, whole: asyncio.Future[None], left: int) -> None:
        self.whole = whole
        self.left = left  # requests


class _Ask:
    """One request."""

    __slots__ = ("address", "behind", "into", "pages", "pid", "read", "sent", "waiters")

    def __init__(
        self,
        pid: int,
        address: int,
        pages: int,
        into: memoryview | None,
        read: _Read | None = None,
    ) -> None:
        self.pid = pid
        self.address = address
        self.pages = pages
        self.into = into
        self.read = read  # that it is a piece of; None: somebody waits for it at a fault
        self.behind: _Ask | None = None  # what this one is the rest of
        self.sent = 0.0  # when
        #: Who waits for it besides, and which of its bytes they want; None: all.
        self.waiters: list[tuple[asyncio.Future[Buffer], tuple[int, int] | None]] = []

    def __iter__(self) -> Iterator[_Ask]:
        """Give it, and all that it is the rest of."""
        ask: _Ask | None = self
        while ask is not None:
            yield ask
            ask = ask.behind

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for it."""
        if self.read is not None and not self.read.whole.done():
            return True
        return any(not future.done() for ask in self for future, _ in ask.waiters)

    def covers(self, pid: int, address: int, pages: int) -> bool:
        """Say whether its answer will hold some pages."""
        return (
            pid == self.pid
            and self.address <= address
            and address + pages * PAGE_SIZE <= self.address + self.pages * PAGE_SIZE
        )

    def succeed(self, data: Buffer) -> None:
        """Give everybody what they wait for.

        Who reads into a buffer is told last: it is used for other things then.
        """
        for ask in self:
            whole = data if ask is self else ask.into
            assert whole is not None  # noqa: S101 - what has a rest has a place
            for future, part in ask.waiters:
                if not future.done():
                    # A part is copied: the whole may be in a buffer of somebody else's.
                    mine = whole if part is None else bytes(memoryview(whole)[slice(*part)])
                    future.set_result(mine)
        read = self.read
        if read is not None:
            read.left -= 1
            if not read.left and not read.whole.done():
                read.whole.set_result(None)

    def fail(self, error: Exception) -> None:
        """Tell everybody that it does not come."""
        if self.read is not None and not self.read.whole.done():
            self.read.whole.set_exception(error)
        for ask in self:
            for future, _ in ask.waiters:
                if not future.done():
                    future.set_exception(error)


class _Link(asyncio.BufferedProtocol):
    """The connection: bytes in, answers to the client."""

    def __init__(self, client: PageClient) -> None:
        self.transport: asyncio.Transport | None = None
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._client = client
        self._scratch = memoryview(bytearray(_SCRATCH))
        self._direct = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's
        room = self._client._room()
        self._direct = room is not None and len(room) >= _WORTH_IT
        return room if self._direct and room is not None else self._scratch

    def buffer_updated(self, nbytes: int) -> None:
        self._client._take(None if self._direct else self._scratch[:nbytes], nbytes)

    def eof_received(self) -> bool:
        self._client._end("it has closed the connection")
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._client._end(str(error) if error else "the connection was closed")
        if not self.lost.done():
            self.lost.set_result(None)


class PageClient:
    """A page server's pages, by process and address: a PageReader, and ReadsPagesInto.

    ::

        async with await PageClient.connect("10.0.0.5", 7001, header_bytes=32) as client:
            data = await client.read_pages(4711, 0x7F0012345000, 1)
            await client.finish()

    Without ``finish`` the end of the block cuts the connection, and a live dump's tasks go on.

    Attributes:
        where: The server, for messages.
        answered: How many requests were answered.
        answered_bytes: How many bytes of pages came.

    Sharing: the loop's thread.
    """

    def __init__(
        self,
        where: str,
        *,
        timeout: float = 10.0,
        bulk_bytes: int = BULK_BYTES,
        piece_bytes: int = PIECE_BYTES,
        demand_pages: int = DEMAND_PAGES,
    ) -> None:
        """Prepare; ``connect`` is the way in."""
        self.where = where
        self.answered = 0
        self.answered_bytes = 0
        self._timeout = timeout
        self._bulk_bytes = bulk_bytes
        self._piece_bytes = piece_bytes
        self._demand_pages = demand_pages
        self._loop = asyncio.get_running_loop()
        self._link = _Link(self)
        self._puller: Puller | None = None  # None: the probe is under way
        self._probe: asyncio.Future[None] = self._loop.create_future()
        self._tls = False
        self._sent: deque[_Ask] = deque()
        self._demand: deque[_Ask] = deque()
        self._bulk: deque[_Ask] = deque()
        self._bulk_sent = 0  # bytes
        self._flow = Flow()  # of bulk
        self._error = ""  # why nothing can be had any more
        self._closing = False
        self._over = False  # the connection was cut, whoever did it
        self._idle: asyncio.Future[None] | None = None  # who waits for the last answer
        self._closed: asyncio.Future[int] | None = None
        self._heard = 0.0
        self._watch: asyncio.TimerHandle | None = None

    @classmethod
    async def connect(
        cls,
        host: str,
        port: int,
        *,
        header_bytes: int | None = None,
        ssl: ssl.SSLContext | None = None,
        server_hostname: str = "",
        guard: tuple[int, int] | None = None,
        timeout: float = 10.0,
        bulk_bytes: int = BULK_BYTES,
        piece_bytes: int = PIECE_BYTES,
        demand_pages: int = DEMAND_PAGES,
    ) -> Self:
        """Connect.

        Args:
            host: Where the server is; with TLS also the name in its certificate.
            port: Its port.
            header_bytes: 24 for CRIU up to 4.1, 32 from 4.2 on; a checkpoint's pagemaps tell which
                CRIU has made it.  None asks the server, which takes 0.2 to 1.2 s.
            ssl: A client's context, as ``tls.client_context`` makes it; None is plain TCP.
            server_hostname: The name in the server's certificate; "" is ``host``.
            guard: A process and the address of any page of it that may be asked for: with that
                a live dump notices from the beginning if this process dies, and not just from
                the first read on.
            timeout: Seconds that a server may say nothing when it should.
            bulk_bytes: How much of long reads is asked for at a time at most; on a slow link it is
                less, since a short read has to wait behind it.
            piece_bytes: How long the pieces of long reads are at most.
            demand_pages: Up to which length a read is short.

        Raises:
            SourceError: The server cannot be reached, or does not speak the protocol.
            ValueError: Over TLS the size of headers cannot be asked for.

        Cancellation: nothing is left behind.
        """
        if header_bytes is None and ssl is not None:
            raise ValueError("over TLS a server cannot be asked which headers it speaks")
        shown = f"[{host}]" if ":" in host else host
        client = cls(
            f"the page server {shown}:{port}",
            timeout=timeout,
            bulk_bytes=bulk_bytes,
            piece_bytes=piece_bytes,
            demand_pages=demand_pages,
        )
        try:
            async with asyncio.timeout(timeout):
                await client._connect(host, port, ssl, server_hostname or host)
                if header_bytes is None:
                    header_bytes = await client._ask_for_size()
        except TimeoutError:
            client._cut()
            why = "says nothing" if client._link.transport else "cannot be reached"
            raise SourceError(f"{client.where} {why}: no answer within {timeout:g} s") from None
        except (OSError, PeerError) as error:
            client._cut()
            raise SourceError(f"{client.where} cannot be used: {error}") from error
        except BaseException:
            client._cut()
            raise
        client._puller = Puller(header_bytes)
        if guard is not None:
            client._guard(*guard)
        return client

    async def _connect(
        self, host: str, port: int, context: ssl.SSLContext | None, name: str
    ) -> None:
        link = self._link
        await self._loop.create_connection(
            lambda: link, host, port, ssl=context, server_hostname=name if context else None
        )
        assert link.transport is not None  # noqa: S101 - it was made
        self._tls = context is not None
        keep_alive(link.transport.get_extra_info("socket"))

    async def _ask_for_size(self) -> int:
        """Find out which headers the server speaks: who answers the first part has short ones."""
        transport = self._link.transport
        assert transport is not None  # noqa: S101 - connected
        first, rest = Puller.probe()
        transport.write(first)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._probe), _PROBE_SECONDS)
            return SHORT
        transport.write(rest)
        await self._probe
        return LONG

    # --- reads ---------------------------------------------------------------------------

    async def read_pages(self, pid: int, address: int, pages: int) -> Buffer:
        """Give pages that may be served lazily, and are LAZY in the pagemap.

        The stock server does not survive to be asked for others.

        Raises:
            SourceError: The server has gone, breaks its protocol, or says nothing.
            ClosedError: The client is closed.

        Cancellation: what was not asked for yet is not; answers on their way are thrown away.
        """
        self._check()
        future: asyncio.Future[Buffer] = self._loop.create_future()
        if pages <= self._demand_pages:
            for sent in self._sent:
                if sent.covers(pid, address, pages):
                    start = address - sent.address
                    sent.waiters.append((future, (start, start + pages * PAGE_SIZE)))
                    return await future
            into = None if pages == 1 else memoryview(bytearray(pages * PAGE_SIZE))
            ask = _Ask(pid, address, pages, into)
            ask.waiters.append((future, None))
            self._demand.append(ask)
            self._send_what_may_be()
            return await future
        whole = bytearray(pages * PAGE_SIZE)
        await self._read_bulk(pid, address, memoryview(whole))
        return whole

    async def read_pages_into(self, pid: int, address: int, buffer: memoryview) -> None:
        """Read pages into a buffer of the caller's, behind all that ``read_pages`` is asked for.

        Raises:
            SourceError: As ``read_pages``.
            ClosedError: As ``read_pages``.

        Cancellation: the buffer may be written to for a while; do not use it again.
        """
        self._check()
        await self._read_bulk(pid, address, buffer)

    async def _read_bulk(self, pid: int, address: int, view: memoryview) -> None:
        """Cut a read into pieces, and wait for them all."""
        step = align_down(min(self._piece_bytes, max(self._flow.step, _SLOWEST))) or PAGE_SIZE
        read = _Read(self._loop.create_future(), 0)
        for start in range(0, len(view), step):
            into = view[start : start + step]
            self._bulk.append(_Ask(pid, address + start, len(into) // PAGE_SIZE, into, read))
            read.left += 1
        self._send_what_may_be()
        if read.left:
            await read.whole

    def _check(self) -> None:
        if self._error:
            raise SourceError(self._error)
        if self._closing:
            raise ClosedError(f"the connection to {self.where} is closed")

    def _send_what_may_be(self) -> None:
        """Ask for all that is demanded, and for as much of the rest as may be on its way."""
        requests: list[bytes] = []
        while self._demand:
            self._send(self._demand.popleft(), requests)
        window = self._window
        while self._bulk and (not self._bulk_sent or self._bulk_sent < window):
            self._send(self._bulk.popleft(), requests)
        if requests:
            assert self._link.transport is not None  # noqa: S101 - connected
            self._link.transport.write(b"".join(requests))
            self._keep_watch()
        if self._idle is not None and not self._sent and not self._idle.done():
            self._idle.set_result(None)

    @property
    def _window(self) -> int:
        """Bytes of bulk that may be on their way."""
        return min(max(self._flow.window, _SLOWEST), self._bulk_bytes)

    def _send(self, ask: _Ask, requests: list[bytes]) -> None:
        puller = self._puller
        if not ask.wanted or self._link.transport is None or puller is None:
            return
        if not self._tls and not puller.guarded:
            self._guard(ask.pid, ask.address)
        ask.sent = self._loop.time()
        if ask.read is not None:
            self._bulk_sent += ask.pages * PAGE_SIZE
        if not self._sent:
            self._heard = ask.sent  # before it was asked, it owed nothing
        self._sent.append(ask)
        requests.append(puller.get(ask.pid, ask.address, ask.pages, ask.into))

    def _guard(self, pid: int, address: int) -> None:
        assert self._link.transport is not None  # noqa: S101 - connected
        if self._puller is not None and not self._tls:
            self._link.transport.write(self._puller.guard(pid, address))

    # --- answers -------------------------------------------------------------------------

    def _room(self) -> memoryview | None:
        return self._puller.room() if self._puller is not None else None

    def _take(self, data: memoryview | None, length: int) -> None:
        """Take bytes in.

        Args:
            data: They; None if they were put where they belong.
            length: How many.
        """
        self._heard = self._loop.time()
        puller = self._puller
        if puller is None:
            if not self._probe.done():
                self._probe.set_result(None)
            return
        try:
            if data is None:
                whole = puller.filled(length)
                events: list[Pages | Closed] = [whole] if whole is not None else []
            else:
                events = puller.feed(data)
        except PeerError as error:
            self._fail(str(error))
            return
        for event in events:
            if isinstance(event, Pages):
                self._answer(event)
            elif self._closed is not None and not self._closed.done():
                self._closed.set_result(event.status)
        if events:
            self._send_what_may_be()

    def _answer(self, answer: Pages) -> None:
        ask = self._sent.popleft()
        length = memoryview(answer.data).nbytes
        self.answered += 1
        self.answered_bytes += length
        if ask.read is not None:
            self._bulk_sent -= ask.pages * PAGE_SIZE
            self._flow.note(length, ask.sent, self._heard)
        if length == ask.pages * PAGE_SIZE:
            ask.succeed(answer.data if ask.into is None else ask.into)
            return
        self._ask_for_rest(ask, length)

    def _ask_for_rest(self, ask: _Ask, length: int) -> None:
        """Ask again for what a clamped answer has left out, before all else of its kind."""
        if not ask.wanted:
            return
        assert ask.into is not None  # noqa: S101 - one page is never clamped
        rest = _Ask(
            ask.pid,
            ask.address + length,
            ask.pages - length // PAGE_SIZE,
            ask.into[length:],
            ask.read,
        )
        rest.behind = ask
        (self._bulk if ask.read is not None else self._demand).appendleft(rest)

    # --- silence and the end -------------------------------------------------------------

    def _keep_watch(self) -> None:
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout, self._look)

    def _look(self) -> None:
        """Give a server up that owes answers and says nothing."""
        self._watch = None
        if not self._sent and (self._closed is None or self._closed.done()):
            return
        left = self._heard + self._timeout - self._loop.time()
        if left > 0:
            self._watch = self._loop.call_later(left, self._look)
            return
        self._fail(f"it has said nothing for {self._timeout:g} s, though it was asked")

    def _end(self, why: str) -> None:
        """Take note of an end that the server or the network has made."""
        if self._closed is None or not self._closed.done():
            self._fail(why)

    def _fail(self, why: str) -> None:
        """End every read; a second reason is not heard."""
        if not self._over:
            hint = ""
            if self._puller is not None and not self.answered and self._sent:
                other = SHORT + LONG - self._puller.header_bytes
                hint = (
                    " (nothing was answered; what its own log does not explain, the other size of"
                    f" headers may: --protocol {other})"
                )
            self._error = f"{self.where}: {why}{hint}"
        self._cut()

    def _cut(self) -> None:
        """End the connection so that a live dump takes it for a failure, and lets its tasks go."""
        self._closing = self._over = True
        transport = self._link.transport
        if transport is not None and not transport.is_closing():
            # The stock server takes an ordinary end for success, but not a reset, or a TLS
            # connection that ends without its goodbye.
            if self._closed is None or not self._closed.done():
                with contextlib.suppress(OSError):
                    peer: socket.socket = transport.get_extra_info("socket")
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            transport.abort()
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        left = [*self._sent, *self._demand, *self._bulk]
        for asks in (self._sent, self._demand, self._bulk):
            asks.clear()
        error: UffdError = (
            SourceError(self._error)
            if self._error
            else ClosedError(f"the connection to {self.where} is closed")
        )
        for ask in left:
            ask.fail(error)
        for future in (self._closed, self._idle, None if self._puller else self._probe):
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # it counts as seen, though nobody may wait for it

    async def finish(self) -> None:
        """Say that all has been had, behind the last read; a live dump then ends its tasks.

        Raises:
            SourceError: The server did not take note of it; then its tasks go on.
            ClosedError: The connection was closed before.

        Cancellation: the connection is cut.
        """
        self._check()
        self._closing = True
        transport, puller = self._link.transport, self._puller
        assert transport is not None  # noqa: S101 - connected
        assert puller is not None  # noqa: S101 - connected
        try:
            if self._sent or self._demand or self._bulk:
                self._idle = self._loop.create_future()
                await self._idle
            self._closed = self._loop.create_future()
            self._heard = self._loop.time()
            transport.write(puller.close())
            self._keep_watch()
            status = await self._closed
            if status:
                raise SourceError(f"{self.where} has ended with status {status}")
            transport.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._link.lost), self._timeout)
        finally:
            await self.aclose()

    async def wait_lost(self) -> str:
        """Wait until the connection is over, and say why it was lost; "" if we have ended it.

        Cancellation: nothing happens to the connection.
        """
        await asyncio.shield(self._link.lost)
        return self._error

    async def aclose(self) -> None:
        """Cut the connection; a second call does nothing.

        Without ``finish`` before, a live dump lets its tasks go on.

        Cancellation: it is cut all the same.
        """
        self._cut()
        if self._link.transport is not None:
            await asyncio.shield(self._link.lost)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()
