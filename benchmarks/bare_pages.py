"""As little as a server of pages can be: who asks by 24 bytes gets 16 and a page's worth.

Knows: asyncio's protocols, and the sizes of the messages between aiouffd servers.
Must not know: what they mean; no source, no limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator

_REQUEST = struct.Struct(">QQII")
_HEAD = 16
_DATA = bytes(2 << 20)


class _Answering(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.rest = b""

    def data_received(self, data: bytes) -> None:
        data = self.rest + data
        whole = len(data) - len(data) % _REQUEST.size
        self.rest = data[whole:]
        for _, _, length, _ in _REQUEST.iter_unpack(data[:whole]):
            self.transport.write(bytes(_HEAD) + _DATA[:length])


@contextlib.asynccontextmanager
async def bare_client(port: int) -> AsyncIterator[Reader]:
    """Connect."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    yield Reader(reader, writer)
    writer.close()


class Reader:
    """Asks in order, and takes the answers in order."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._turn = asyncio.Lock()

    async def read(self, offset: int, length: int) -> bytes:
        """Exchange the same bytes as a read from a peer."""
        self._writer.write(_REQUEST.pack(0, offset, length, 0))
        async with self._turn:  # waiters get it in the order in which they asked
            await self._reader.readexactly(_HEAD)
            return await self._reader.readexactly(length)


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(_Answering, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve())
