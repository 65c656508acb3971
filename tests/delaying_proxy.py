"""A TCP proxy that makes a server on this machine look far away: a delay, and a bandwidth.

    async with DelayingProxy("127.0.0.1", port, delay=0.020) as proxy:
        source = await HttpSource.open(f"http://127.0.0.1:{proxy.port}/image")

    python -m tests.delaying_proxy --to 127.0.0.1:6379 --delay-ms 20    prints its port

Knows: bytes, and when they are due.
Must not know: what they mean; any protocol over TCP will do, TLS too.

Laws of this file:

* What a client sends arrives ``delay`` seconds later; what the server answers is not delayed.
  A request then costs one delay, however many pieces its answer has, and requests that are
  in flight together share it, as on a long line.
* With a bandwidth, answers leave no faster than that, each connection for itself.
* Nothing is lost, reordered or invented; an end or a reset on one side reaches the other.
* asyncio's clock ticks in milliseconds: a delay of 1 ms is one of 1.2 to 1.3 ms (measured on
  loopback, medians), one of 20 ms is 20.4 to 20.6 ms.  Without any delay a round trip costs
  0.02 to 0.1 ms more than the direct way.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from types import TracebackType
from typing import Final, Self

_PIECE: Final = 64 << 10
_PIECES: Final = 64  # read ahead, per direction: as much as a socket buffer holds


class DelayingProxy:
    """Listens on loopback and passes every connection on, later.

    Attributes:
        port: Where it listens, from ``async with`` on.
        delay: Seconds that what clients send is held back; may be changed at any time.
        bytes_per_second: How fast answers leave, per connection; None is as they come.
        connections: How many were made so far.
    """

    def __init__(
        self, host: str, port: int, *, delay: float = 0.0, bytes_per_second: float | None = None
    ) -> None:
        """Say which server to stand before."""
        self.port = 0
        self.delay = delay
        self.bytes_per_second = bytes_per_second
        self.connections = 0
        self._to = (host, port)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._server.wait_closed()

    def cut(self) -> None:
        """Break every connection there is; new ones may come."""
        for task in self._tasks:
            task.cancel()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.get_running_loop().create_task(self._connect(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(lambda _: writer.transport.abort())  # it may never have begun
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        try:
            there, to = await asyncio.open_connection(*self._to)
            ends.append(to)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(reader, to, delayed=True))
                group.create_task(self._pass_on(there, writer, delayed=False))
        except (OSError, ExceptionGroup):
            pass  # one side has gone; the other side learns it by the close
        finally:
            for end in ends:
                end.transport.abort()
            for end in ends:  # this wait may be cancelled; both have their end already
                with contextlib.suppress(OSError):
                    await end.wait_closed()

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, delayed: bool
    ) -> None:
        """Pass one direction on, to its end."""
        loop = asyncio.get_running_loop()
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_PIECES)

        async def send() -> None:
            free = 0.0  # when the line can take the next piece
            while True:
                due, data = await line.get()
                await asyncio.sleep(max(due, free) - loop.time())
                if not data:
                    writer.write_eof()
                    return
                if self.bytes_per_second is not None and not delayed:
                    free = max(free, loop.time()) + len(data) / self.bytes_per_second
                writer.write(data)
                await writer.drain()

        async with asyncio.TaskGroup() as group:
            group.create_task(send())
            data = b"more"
            while data:
                data = await reader.read(_PIECE)
                await line.put((loop.time() + (self.delay if delayed else 0.0), data))


async def _main(arguments: argparse.Namespace) -> None:
    host, _, port = arguments.to.rpartition(":")
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with DelayingProxy(
        host,
        int(port),
        delay=arguments.delay_ms / 1000,
        bytes_per_second=arguments.bytes_per_second,
    ) as proxy:
        print(proxy.port, flush=True)
        await stop.wait()


def main(argv: list[str]) -> None:
    """Run until SIGTERM; the first line of output is the port."""
    parser = argparse.ArgumentParser(prog="python -m tests.delaying_proxy")
    parser.add_argument("--to", metavar="HOST:PORT", required=True)
    parser.add_argument("--delay-ms", type=float, default=0.0, metavar="MS")
    parser.add_argument("--bytes-per-second", type=float, metavar="N")
    asyncio.run(_main(parser.parse_args(argv)))


if __name__ == "__main__":
    main(sys.argv[1:])
