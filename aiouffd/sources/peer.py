"""A source over an image that another aiouffd server exports, over TCP or TLS.

Knows: two connections, and how to get others.
Must not know: the bytes on it (``protocols.pages`` does), what the other server reads from.

Laws of this file:

* A lost connection is no error: reads in flight are repeated on the next one, within their time
  limit.  There is one only while somebody reads: an idle source wakes nobody up.
* The next connection has to lead to the same image, by size and identity.  If it leads to
  another, every read from then on raises SourceError: bytes of two images are never mixed.
* A read that nobody waits for any more is answered all the same; the answer is thrown away.
* One connection carries any number of reads at once, answered in any order.
* What a fault waits for does not stand in line behind megabytes: long reads have a connection
  of their own, made when there is one; unless the other server has no room for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Self, cast
from urllib.parse import parse_qsl, unquote, urlsplit

from ..errors import PeerError, SourceError
from ..protocols import pages
from . import Extents, check_read
from .reads import ReadsUnderWay

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: How long to wait before the second connection in a row that brings nothing; doubled each time.
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0
_LONG: Final = 128 << 10  # bytes of a read that goes over the second connection
_AT_ONCE: Final = 4  # pieces of one long read that are asked for at once
_USER_TIMEOUT_MS: Final = 10_000  # until the kernel gives up on bytes that nobody acknowledges


class _Lost(Exception):
    """The connection ended; the argument says how."""


def _expire(answer: asyncio.Future[Buffer]) -> None:
    if not answer.done():
        answer.set_exception(TimeoutError())


class _Link(asyncio.Protocol):
    """One connection."""

    def __init__(self, name: str) -> None:
        self.lost = False
        self.greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._wire = pages.Reader(name)
        self._waiting: dict[int, asyncio.Future[Buffer]] = {}
        self._transport: asyncio.Transport | None = None
        self._why = "the connection was closed"

    @property
    def hello(self) -> pages.Hello:
        """What was said of the image."""
        assert self._wire.hello is not None  # noqa: S101 - who asks has awaited ``greeted``
        return self._wire.hello

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say which image is wanted."""
        self._transport = cast("asyncio.Transport", transport)
        with contextlib.suppress(AttributeError, OSError):  # what only Linux has
            peer: socket.socket = transport.get_extra_info("socket")
            for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2)):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
        self._transport.write(self._wire.greeting())

    def data_received(self, data: bytes) -> None:
        """Hand out answers."""
        try:
            answers = self._wire.feed(data)
        except PeerError as error:
            self._end(error)
            return
        if self._wire.hello is not None and not self.greeted.done():
            self.greeted.set_result(None)
        for number, body, reason in answers:
            future = self._waiting.pop(number, None)
            if future is None or future.done():
                continue  # cancelled
            if reason:
                future.set_exception(SourceError(reason))
            else:
                future.set_result(body)

    def connection_lost(self, error: Exception | None) -> None:
        """Tell everybody who waits."""
        if error is not None:
            self._why = str(error) or type(error).__name__
        self._end(None)

    def ask(self, offset: int, length: int, kind: int) -> tuple[int, asyncio.Future[Buffer]]:
        """Send one request."""
        assert self._transport is not None  # noqa: S101 - it was greeted
        number, request = self._wire.request(offset, length, kind)
        future: asyncio.Future[Buffer] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._transport.write(request)
        return number, future

    def forget(self, number: int) -> None:
        """Throw an answer away when it comes."""
        self._waiting.pop(number, None)

    def close(self) -> None:
        """End the connection."""
        self._end(None)

    def _end(self, error: PeerError | None) -> None:
        if self.lost:
            return
        self.lost = True
        if self._transport is not None:
            self._transport.abort()
        if not self.greeted.done():
            self.greeted.set_exception(error or PeerError(f"gave no hello: {self._why}"))
            self.greeted.exception()  # it counts as seen, though the one who dialled has gone
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(_Lost(str(error) if error else self._why))


class _Way:
    """A way to the other server: one connection after the other."""

    __slots__ = ("dialling", "link", "pause")

    def __init__(self) -> None:
        self.link: _Link | None = None
        self.dialling = asyncio.Lock()
        self.pause = 0.0  # before the next connection; 0 once one has brought something

    def close(self) -> None:
        """End the connection, if there is one."""
        link, self.link = self.link, None
        if link is not None:
            link.close()


class PeerSource:
    """An image of another aiouffd server.

    ::

        source = await PeerSource.open("10.0.0.5", 7433, "vm1", ssl=context)

    Attributes:
        granularity: In what units the other server brings bytes: ask best for no less.
    """

    def __init__(
        self,
        host: str,
        port: int,
        name: str = "",
        *,
        ssl: ssl.SSLContext | None = None,
        timeout: float = 10.0,
    ) -> None:
        """Prepare; ``open`` is the way in."""
        self.granularity = 4096
        self._where = f"{'aiouffds' if ssl else 'aiouffd'}://{host}:{port}/{name}"
        self._host = host
        self._port = port
        self._name = name
        self._ssl = ssl
        self._timeout = timeout
        self._hello: pages.Hello | None = None
        self._extents = Extents(())
        self._way = _Way()
        self._long_way = _Way()
        self._why = "it does not answer"  # the last loss
        self._changed: str | None = None
        self._reads = ReadsUnderWay(f"the source over {self._where}")

    @classmethod
    async def open(
        cls,
        host: str,
        port: int,
        name: str = "",
        *,
        ssl: ssl.SSLContext | None = None,
        timeout: float = 10.0,
    ) -> Self:
        """Connect, and learn the image's size, identity and extents.

        Args:
            host: Where the other server is; with TLS also the name in its certificate.
            port: Its ``--export`` port.
            name: Of the image, if it has several.
            ssl: A client's context; None is plain TCP.
            timeout: Seconds that a read may take, connections lost meanwhile included.

        Raises:
            SourceError: It cannot be reached, or does not have the image.

        Cancellation: nothing is left behind.
        """
        source = cls(host, port, name, ssl=ssl, timeout=timeout)
        try:
            async with asyncio.timeout(timeout):
                link = source._way.link = await source._dial()
            hello = source._hello = link.hello
            source.granularity = hello.granularity
            length = pages.table_length(hello.extents)
            table = await source._read(0, length, pages.EXTENTS) if length else b""
            source._extents = Extents(pages.unpack_extents(table, hello.size))
        except (OSError, PeerError) as error:
            source._close()
            text = str(error) or f"no answer within {timeout:g} s"
            raise SourceError(f"{source._where}: {text}") from error
        except BaseException:
            source._close()
            raise
        return source

    @property
    def size(self) -> int:
        """Length of the image, in bytes."""
        return self._hello.size if self._hello else 0

    @property
    def identity(self) -> str:
        """The image's, as the other server knows it."""
        return self._hello.identity if self._hello else ""

    @property
    def holes_known(self) -> bool:
        """Whether all extents came over: so many that the last one covers the rest did not."""
        return self._hello is not None and self._hello.extents < pages.MAX_EXTENTS

    def extents(self) -> Iterator[tuple[int, int]]:
        """Give the image's extents, as of the opening."""
        return iter(self._extents)

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """Nothing is ever at hand."""
        self._check(offset, length)
        return None

    async def read(self, offset: int, length: int) -> Buffer:
        """Ask the other server.

        Raises:
            SourceError: No answer within the time limit, it could not read, or it has another
                image now.
            ClosedError: The source is closed.

        Cancellation: the answer is thrown away when it comes.
        """
        self._check(offset, length)
        return await self._read(offset, length, pages.READ)

    async def aclose(self) -> None:
        """Let reads in flight end, then close the connections; what is lost now stays lost.

        Cancellation: the connections are closed at once.
        """
        try:
            await self._reads.end()
        finally:
            self._close()

    def _close(self) -> None:
        self._way.close()
        self._long_way.close()

    def _check(self, offset: int, length: int) -> None:
        self._reads.check()
        check_read(offset, length, self.size)

    # --- reads -------------------------------------------------------------------------

    async def _read(self, offset: int, length: int, kind: int) -> Buffer:
        with self._reads:
            if length <= pages.MAX_LENGTH:
                return await self._read_piece(offset, length, kind)
            return await self._read_long(offset, length, kind)

    async def _read_long(self, offset: int, length: int, kind: int) -> Buffer:
        data = bytearray(length)

        async def take(at: int) -> None:
            size = min(pages.MAX_LENGTH, length - at)
            data[at : at + size] = memoryview(await self._read_piece(offset + at, size, kind))

        stride = _AT_ONCE * pages.MAX_LENGTH
        for first in range(0, length, stride):
            starts = range(first, min(first + stride, length), pages.MAX_LENGTH)
            tasks = [asyncio.ensure_future(take(at)) for at in starts]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
        return data

    async def _read_piece(self, offset: int, length: int, kind: int) -> Buffer:
        """Ask until there is an answer, or the time is over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        way = self._long_way if length > _LONG and kind == pages.READ else self._way
        try:
            while True:
                link = way.link
                if link is None or link.lost:
                    async with asyncio.timeout_at(deadline):
                        link = await self._connect(way)
                number, future = link.ask(offset, length, kind)
                # A timer of our own: asyncio.timeout costs a tenth of the whole exchange.
                timer = loop.call_at(deadline, _expire, future)
                try:
                    data = await future
                except _Lost as lost:
                    self._why = str(lost)
                    continue
                except SourceError as error:
                    way.pause = 0.0
                    raise SourceError(f"{self._where}: {error}") from None
                except (TimeoutError, asyncio.CancelledError):
                    link.forget(number)
                    raise
                finally:
                    timer.cancel()
                way.pause = 0.0
                return data
        except TimeoutError:
            raise SourceError(
                f"{self._where}: {length} bytes at offset {offset} did not come within"
                f" {self._timeout:g} s: {self._why}"
            ) from None

    # --- connections -------------------------------------------------------------------

    async def _connect(self, way: _Way) -> _Link:
        """Get another connection; the first read that needs it does so for all."""
        async with way.dialling:
            while True:
                if self._changed is not None:
                    raise SourceError(self._changed)
                if way.link is not None and not way.link.lost:
                    return way.link
                if self._reads.closed:
                    raise SourceError(f"{self._where}: {self._why}, and the source is closing")
                pause, way.pause = way.pause, max(_FIRST_PAUSE, way.pause * 2)
                way.pause = min(way.pause, _LONGEST_PAUSE)
                # Not all clients of a server that comes back come at the same moment.
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
                try:
                    link = await self._dial()
                except (OSError, PeerError) as error:
                    self._why = str(error)
                    first = self._way.link
                    if way is not self._way and first is not None and not first.lost:
                        self._long_way = self._way  # there is no room for a second one now
                        return first
                    continue
                self._check_same(link)
                way.link = link
                if way is self._way and self._long_way is way:
                    self._long_way = _Way()  # a server that comes back may have room

    async def _dial(self) -> _Link:
        """Connect and greet.

        Raises:
            OSError: There is no connection to be had.
            PeerError: The other side is no server of ours, or has no such image.
        """
        link = _Link(self._name)
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: link, self._host, self._port, ssl=self._ssl
            )
            await link.greeted
        except BaseException:
            link.close()
            raise
        return link

    def _check_same(self, link: _Link) -> None:
        assert self._hello is not None  # noqa: S101 - the source was opened
        was, now = self._hello, link.hello
        if (was.size, was.identity, was.extents) == (now.size, now.identity, now.extents):
            return
        link.close()
        self._changed = (
            f"{self._where} was changed while it was served: it has another image now,"
            f" {now.size} bytes, identity {now.identity!r}; it had {was.size} bytes, identity"
            f" {was.identity!r}"
        )
        self._close()  # what is under way on the other connection hears of it, too
        raise SourceError(self._changed)


def client_context(ca: str = "", cert: str = "", key: str = "") -> ssl.SSLContext:
    """Make the TLS context of a reader.

    Args:
        ca: A file with the authorities that may vouch for the server; "" takes the system's.
        cert: A file with our certificate, if the server asks for one.
        key: A file with its key, if that is another one.

    Raises:
        OSError: A file cannot be read (SSLError is one), or is no certificate.
    """
    context = ssl.create_default_context(cafile=ca or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if cert:
        context.load_cert_chain(cert, key or None)
    return context


async def open_url(url: str) -> PeerSource:
    """Open ``aiouffd://HOST:PORT[/NAME]``, or ``aiouffds://`` for TLS.

    The query may have ``timeout`` (seconds per read) and, with TLS, ``ca``, ``cert`` and ``key``
    (files): ``aiouffds://rack1:7433/vm1?ca=ca.pem``.

    Raises:
        SourceError: The URL makes no sense, or the image cannot be had.
    """
    parts = urlsplit(url)
    try:
        port = parts.port
        query = dict(
            parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        )
        timeout = float(query.pop("timeout", "10"))
    except ValueError as error:
        raise SourceError(f"{url}: {error}") from error
    files = {name: query.pop(name) for name in ("ca", "cert", "key") if name in query}
    if query:
        raise SourceError(f"{url}: unknown in the query: {', '.join(query)}")
    if parts.scheme not in {"aiouffd", "aiouffds"} or not parts.hostname or not port:
        raise SourceError(f"{url} is not aiouffd://HOST:PORT/NAME or aiouffds://HOST:PORT/NAME")
    if files and parts.scheme == "aiouffd":
        raise SourceError(f"{url}: {', '.join(files)} is for TLS, which is aiouffds://")
    try:
        context = client_context(**files) if parts.scheme == "aiouffds" else None
    except OSError as error:
        raise SourceError(f"{url}: {error}") from error
    return await PeerSource.open(
        parts.hostname, port, unquote(parts.path[1:]), ssl=context, timeout=timeout
    )
