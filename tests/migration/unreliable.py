"""A TCP proxy that makes a bad network: cut at a byte, silent, slow, held back, refused.

    async with Unreliable("127.0.0.1", listener.port) as proxy:
        proxy.plan = lambda connection: connection.cut_after(connection.up, 1000)
        outgoing = Outgoing(memory, "127.0.0.1", proxy.port)

Knows: bytes and how many there were; of the migration's frames only where they begin and end, and
    what a connection has greeted with.
Must not know: what frames mean.

Laws of this file:

* Nothing is changed, doubled or invented: a direction gives what it got, up to some byte.
* A cut at a byte comes once all before it has been taken by the other side's kernel, and nothing
  behind it is: it is exact.
* Whatever is done to a connection is done by its owner's order: there is no chance in here.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
from collections.abc import Callable
from types import TracebackType
from typing import Final, NamedTuple, Self, cast

from aiouffd.migration import wire

_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: a close is a reset
_GREETING_BYTES: Final = 100  # as far as its role
_TICK: Final = 0.002  # seconds between two portions of a slow direction
_HEAD: Final = struct.Struct(">BBHI")  # how a frame begins


class Passed(NamedTuple):
    """One frame that went by."""

    kind: wire.Kind
    begin: int  #: bytes of its direction before it
    end: int  #: and up to its end


class _Frames:
    """Looks for the ends of frames in what goes by."""

    def __init__(self) -> None:
        self.begun: list[Passed] = []
        self.found: list[Passed] = []
        self._rest = b""
        self._at = 0
        self._skip = len(wire.PREAMBLE)

    def see(self, data: bytes) -> None:
        """Take note of bytes."""
        data = self._rest + data
        while True:
            if self._skip > len(data):
                self._skip -= len(data)
                self._at += len(data)
                self._rest = b""
                return
            data = data[self._skip :]
            self._at += self._skip
            self._skip = 0
            if len(self.found) < len(self.begun):
                self.found.append(self.begun[-1])
            if len(data) < wire.HEAD_BYTES:
                self._rest = data
                return
            kind, _, _, length = _HEAD.unpack_from(data)
            self._skip = wire.HEAD_BYTES + length
            self.begun.append(Passed(wire.Kind(kind), self._at, self._at + self._skip))


class Way:
    """One direction of a connection.

    Attributes:
        count: Bytes that have come so far.
        first: Those of them that tell what the connection is for.
        given: Bytes that were passed on.
        cut_at: The connection is cut behind so many bytes; None is never.
        cut_behind: The connection is cut behind so many frames; 0 is behind the preamble.
        cut_in: The number of a frame, from 0 on, and which part of it still passes; the connection
            is cut as soon as the frame comes.
        swallows: What comes is taken, and goes nowhere.
        held: What comes waits for ``release``.
        hold_at: What comes behind so many bytes waits for ``release``; None is never.
        rate: Bytes per second; None is as they come.
        frames: Those that have come.
    """

    def __init__(self, connection: Connection) -> None:
        self.count = 0
        self.first = b""
        self.given = 0
        self.cut_at: int | None = None
        self.cut_behind: int | None = None
        self.cut_in: tuple[int, float] | None = None
        self.swallows = False
        self.held = False
        self.hold_at: int | None = None
        self.rate: float | None = None
        self._connection = connection
        self._frames = _Frames()
        self._waiting = bytearray()
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False
        self.over = False  # its end was passed on
        self.to: asyncio.Transport | None = None

    @property
    def frames(self) -> list[Passed]:
        """The frames that have come, whole."""
        return self._frames.found

    def take(self, data: bytes) -> None:
        """Take what has come."""
        self.count += len(data)
        if len(self.first) < _GREETING_BYTES:
            self.first += data[:_GREETING_BYTES]
        before = len(self.frames)
        self._frames.see(data)
        for frame in self.frames[before:]:
            self._connection.passing(self, frame)
        if self.cut_at is None and self.cut_behind is not None:
            ends = [len(wire.PREAMBLE), *(frame.end for frame in self.frames)]
            if self.count >= ends[0] and len(ends) > self.cut_behind:
                self.cut_at = ends[self.cut_behind]
        if self.cut_at is None and self.cut_in is not None:
            number, part = self.cut_in
            if len(self._frames.begun) > number:
                frame = self._frames.begun[number]
                self.cut_at = frame.begin + int(part * (frame.end - frame.begin))
        if self.swallows:
            return
        self._waiting += data
        self.go_on()

    def end(self) -> None:
        """Take note that nothing more will come."""
        self._ended = True
        self.go_on()

    def hold(self) -> None:
        """Pass nothing on for a while."""
        self.held = True

    def release(self) -> None:
        """Hold nothing back any more."""
        self.held = self.swallows = False
        self.hold_at = self.rate = None
        self.go_on()

    def go_on(self) -> None:
        """Pass on what may be passed on."""
        to = self.to
        if to is None or self._connection.is_gone or self._timer is not None:
            return
        waiting = self._waiting
        if waiting and not self.held and not self.swallows:
            most = len(waiting)
            if self.rate is not None:
                most = min(most, max(1, int(self.rate * _TICK)))
            for end in (self.cut_at, self.hold_at):
                if end is not None:
                    most = min(most, max(end - self.given, 0))
            if most:
                to.write(bytes(waiting[:most]))
                del waiting[:most]
                self.given += most
            if self.rate is not None and most and waiting:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(_TICK, self._again)
        if self.cut_at is not None and self.given >= self.cut_at:
            self._cut_when_taken()
        elif self._ended and not waiting and not self.swallows:
            self._ended, self.over = False, True
            with contextlib.suppress(OSError):  # it has gone itself
                to.write_eof()
            self._connection.way_over()

    def _again(self) -> None:
        self._timer = None
        self.go_on()

    def _cut_when_taken(self) -> None:
        """Cut as soon as the kernel of the other side has all that was passed on."""
        to = self.to
        if to is None or self._connection.is_gone:
            return
        sock = cast("socket.socket", to.get_extra_info("socket"))
        unsent = to.get_write_buffer_size()
        (queued,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
        if unsent or queued:
            self._timer = asyncio.get_running_loop().call_later(_TICK, self._again)
        else:
            self._connection.cut()

    def stop(self) -> None:
        """Pass nothing on any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _End(asyncio.Protocol):
    """One end of a connection: what comes in here goes out by a way."""

    def __init__(self, connection: Connection, way: Way, back: Way) -> None:
        self._connection = connection
        self._way = way
        self._back = back
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = self._back.to = cast("asyncio.Transport", transport)
        if self._connection.is_gone:
            self._transport.abort()
            return
        self._back.go_on()

    def data_received(self, data: bytes) -> None:
        self._way.take(data)

    def eof_received(self) -> bool:
        self._way.end()
        return True  # the other direction may go on

    def connection_lost(self, error: Exception | None) -> None:
        self._back.to = None
        self._connection.end_lost()


class Connection:
    """One connection that was made through the proxy.

    Attributes:
        number: How many there were before.
        up: From who has connected.
        down: To it.
        is_gone: It was cut, or has ended.
        cuts_by: How it is cut: ``reset`` or ``close``.
        half_open: One end's loss is not told to the other, which may get bytes for long after.
    """

    def __init__(self, proxy: Unreliable, number: int) -> None:
        self.number = number
        self.up = Way(self)
        self.down = Way(self)
        self.is_gone = False
        self.cuts_by = "reset"
        self.half_open = False
        self._proxy = proxy
        self._ends = 0

    def __repr__(self) -> str:
        return f"<Connection {self.number}: {self.up.count} up, {self.down.count} down>"

    @property
    def ways(self) -> tuple[Way, Way]:
        """Both directions."""
        return self.up, self.down

    @property
    def role(self) -> wire.Role:
        """What it has greeted for."""
        return wire.Role.BULK if b'"bulk"' in self.up.first else wire.Role.DEMAND

    def passing(self, way: Way, frame: Passed) -> None:
        """Tell of a frame before a byte of it has been passed on."""
        self._proxy.on_frame(self, way, frame)

    def cut_after(self, way: Way, count: int) -> None:
        """Cut it once so many bytes have gone one way."""
        way.cut_at = count
        way.go_on()

    def swallow(self) -> None:
        """Let nothing through from now on; neither side hears of it."""
        for way in self.ways:
            way.swallows = True

    def cut(self) -> None:
        """Break it now, for both sides."""
        self.is_gone = True
        for way in self.ways:
            way.stop()
            self._break(way)

    def leave_half_open(self) -> None:
        """Break it for who has connected; the other side still gets what was held back for it."""
        self.half_open = True
        self._break(self.down)

    def _break(self, way: Way) -> None:
        """Break the end to which a direction leads."""
        if way.to is None:
            return
        if self.cuts_by == "reset":
            sock = cast("socket.socket", way.to.get_extra_info("socket"))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        way.to.abort()

    def way_over(self) -> None:
        """Take note that nothing more will go one way; if both, that is its end."""
        if all(way.over for way in self.ways):
            self.cut()

    def end_lost(self) -> None:
        """Take note that one end has gone: the other has nobody to talk to."""
        told = not self.half_open and not any(way.swallows for way in self.ways)
        if not self.is_gone and (told or self.is_closed):
            self.cut()
        self._proxy._look_whether_empty()

    @property
    def is_closed(self) -> bool:
        """Whether both ends are gone."""
        return all(way.to is None for way in self.ways)


def _nothing(*_: object) -> None:
    """Do nothing to anything."""


class Unreliable:
    """Listens on loopback and passes every connection on, as well as its owner lets it.

    Attributes:
        port: Where it listens, from ``async with`` on.
        connections: All that were made since the last ``forget``.
        plan: Told of each connection, before a byte of it has gone anywhere.
        on_frame: Told of each frame whose last byte has come, before that byte goes on.
        silent: New connections are accepted and swallowed: a black hole.
    """

    def __init__(self, host: str, port: int) -> None:
        """Say which server to stand before."""
        self.port = 0
        self.connections: list[Connection] = []
        self.plan: Callable[[Connection], object] = _nothing
        self.on_frame: Callable[[Connection, Way, Passed], object] = _nothing
        self.silent = False
        self._to = (host, port)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._empty: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.refuse()
        await self.cut_all()

    async def listen(self) -> None:
        """Take connections."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            self._accept, "127.0.0.1", self.port, reuse_address=True
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """Take no new connections: there is nobody at the port, until ``listen``."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        await asyncio.sleep(0)

    async def cut_all(self) -> None:
        """Break every connection, and wait until they are gone."""
        for connection in self.connections:
            connection.cut()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if not all(each.is_closed for each in self.connections):
            self._empty = asyncio.get_running_loop().create_future()
            await self._empty

    async def forget(self) -> None:
        """Begin anew: what was done and planned before is over."""
        await self.cut_all()
        self.connections.clear()
        self.plan = self.on_frame = _nothing
        self.silent = False

    def swallow_all(self) -> None:
        """Make the line a black hole: nothing goes through, nobody hears of it."""
        self.silent = True
        for connection in self.connections:
            connection.swallow()

    def _look_whether_empty(self) -> None:
        empty = self._empty
        if empty is not None and all(each.is_closed for each in self.connections):
            self._empty = None
            empty.set_result(None)

    def _accept(self) -> asyncio.Protocol:
        connection = Connection(self, len(self.connections))
        self.connections.append(connection)
        if self.silent:
            connection.swallow()
        self.plan(connection)
        if not connection.up.swallows:
            task = asyncio.get_running_loop().create_task(self._connect(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return _End(connection, connection.up, connection.down)

    async def _connect(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(
                lambda: _End(connection, connection.down, connection.up), *self._to
            )
        except OSError:
            connection.cut()
