"""Pages of a tree that has moved, from the page server of its source, over connections made anew.

Knows: when a connection is lost, how long to try for another one.
Must not know: what the pages are for; the bytes of the wire.

CRIU's own page servers serve one connection, and when that is lost so is the memory.  Ours serves
any number, and answers the same however often it is asked: so what was not read is read again.

Laws of this file:

* A read ends when it has its pages, or has asked in vain for ``deadline`` seconds: a server that
  does not have a page can only close, and then that is asked again, too.
* The first read that ends in vain is the end of all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeVar

from ..errors import ClosedError, SourceError
from ..protocols.criu.page_client import PageClient

if TYPE_CHECKING:
    import ssl

    from typing_extensions import Buffer

log: Final = logging.getLogger("aiouffd.migration")

HEADER_BYTES: Final = 32  #: of both sides

_TIMEOUT: Final = 10.0  # seconds that a server may say nothing when it should
_FIRST_PAUSE: Final = 0.02  # seconds between two attempts ...
_LONGEST_PAUSE: Final = 1.0  # ... and once many have failed

_T = TypeVar("_T")


class TreePages:
    """A page server's pages, by process and address: a PageReader, and ReadsPagesInto.

    Attributes:
        connections: How many there were.
        given_up: Set to why, once there is nothing to be had any more.

    Sharing: the loop's thread.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        ssl: ssl.SSLContext | None = None,
        server_hostname: str = "",
        deadline: float = 30.0,
    ) -> None:
        """Prepare; ``start`` connects.

        Args:
            host: Where the server is.
            port: Its port.
            ssl: A client's context; None is plain TCP.
            server_hostname: The name in the server's certificate; "" is ``host``.
            deadline: Seconds without pages after which it is given up.
        """
        self.connections = 0
        self.given_up: Final[asyncio.Future[str]] = asyncio.get_running_loop().create_future()
        self._host, self._port = host, port
        self._ssl = ssl
        self._server_hostname = server_hostname
        self._deadline = deadline
        self._client: PageClient | None = None
        self._connecting = asyncio.Lock()

    async def start(self) -> None:
        """Connect.

        Raises:
            SourceError: The server cannot be reached.
        """
        self._client = await self._connect()

    async def finish(self) -> None:
        """Say that all has been had; a server that does not hear it is told by other means.

        Cancellation: the connection is cut.
        """
        if self._client is not None:
            try:
                await self._client.finish()
            except (SourceError, ClosedError) as error:
                log.info("the page server was not told the end: %s", error)

    async def aclose(self) -> None:
        """Cut the connection; every read fails.

        Cancellation: it is cut all the same.
        """
        if not self.given_up.done():
            self.given_up.set_result("it was closed")
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

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

    # --- reads ---------------------------------------------------------------------------

    async def read_pages(self, pid: int, address: int, pages: int) -> Buffer:
        """Give pages that may be served lazily.

        Raises:
            SourceError: There was no server for too long.

        Cancellation: answers on their way are thrown away.
        """
        return await self._read(lambda client: client.read_pages(pid, address, pages))

    async def read_pages_into(self, pid: int, address: int, buffer: memoryview) -> None:
        """Read pages into a buffer of the caller's, behind all that ``read_pages`` is asked for.

        Raises:
            SourceError: As ``read_pages``.

        Cancellation: the buffer may be written to for a while; do not use it again.
        """
        await self._read(lambda client: client.read_pages_into(pid, address, buffer))

    async def _read(self, read: Callable[[PageClient], Awaitable[_T]]) -> _T:
        loop = asyncio.get_running_loop()
        pause = since = 0.0
        while True:
            if self.given_up.done():
                raise SourceError(self.given_up.result())
            client = self._client
            try:
                if client is None:
                    client = await self._connect_again()
                return await read(client)
            except (SourceError, ClosedError) as error:
                since = since or loop.time()
                if loop.time() - since >= self._deadline:
                    self._give_up(str(error))
                    continue
                await asyncio.sleep(pause)
                pause = min(max(pause * 2, _FIRST_PAUSE), _LONGEST_PAUSE)
                if self._client is client:
                    await self._drop(client, error)

    async def _drop(self, client: PageClient | None, error: Exception) -> None:
        if client is not None:
            self._client = None
            log.warning("memory comes by another connection: %s", error)
            await client.aclose()

    async def _connect_again(self) -> PageClient:
        async with self._connecting:
            if self._client is None:
                self._client = await self._connect()
            return self._client

    async def _connect(self) -> PageClient:
        client = await PageClient.connect(
            self._host,
            self._port,
            header_bytes=HEADER_BYTES,
            ssl=self._ssl,
            server_hostname=self._server_hostname,
            timeout=min(_TIMEOUT, max(self._deadline, 1.0)),
        )
        self.connections += 1
        return client

    def _give_up(self, why: str) -> None:
        if not self.given_up.done():
            self.given_up.set_result(f"no memory has come for {self._deadline:g} s: {why}")
