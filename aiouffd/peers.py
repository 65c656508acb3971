"""Peers that connect over TCP or TLS: accepted, limited, dropped, drained.

Knows: listening sockets, connections, what a peer may cost.
Must not know: what peers say, or get.

Laws of this file:

* A peer that takes next to nothing (256 KiB) for ``Limits.patience`` seconds is dropped, as is
  one that does not say what it wants in that time.  Under more connections than
  ``Limits.connections`` the oldest that has not said it yet goes; if all have, the new one.
* A shortage of descriptors is waited for: the loop does not spin, who is connected is served on.
* When a server is drained, each connection ends with what it was asked for last, or later, if
  its kind has to go on to an end of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, cast

from .certificates import is_for

if TYPE_CHECKING:
    from typing_extensions import Buffer

_HIGH, _LOW = 1 << 20, 1 << 18  # of answers that the kernel has not taken yet, in bytes
_LONG: Final = 32 << 10  # bytes of an answer from which on copying them is not worth a system call
_AT_ONCE: Final = 16  # connections accepted in one turn of the loop
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


class Peer(asyncio.Protocol):
    """One peer, from its connection on; subclasses say what it may ask for.

    Attributes:
        peer: Where it is: ``10.0.0.7:51234``.
        error: Why it was dropped.
        task: The TLS handshake, or just its beginning.

    Sharing: the loop's thread.
    """

    def __init__(self, peers: Peers, peer: str) -> None:
        self.peer = peer
        self.error = ""
        self.task: asyncio.Task[None] | None = None
        self._peers = peers
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._full = False  # the kernel does not take our answers
        self._goes_on = False  # a step is due
        self._draining = False
        self._dropped = False  # before there was a transport
        self._impatience: asyncio.TimerHandle | None = None
        self._written_bytes = 0
        self._taken_bytes = -1  # of these by the peer when last looked; -1: not looked

    # --- for subclasses ------------------------------------------------------------------

    @property
    def silent(self) -> bool:
        """Whether it has not said yet what it wants."""
        raise NotImplementedError

    def _go_on(self) -> None:
        """Answer what is left: it takes answers again, or this is the end.

        ``_goes_on`` is to be set to False first.
        """
        raise NotImplementedError

    def _go_on_soon(self) -> None:
        if not self._goes_on:
            self._goes_on = True
            self._loop.call_soon(self._go_on)

    def _gone(self, error: Exception | None) -> None:
        """Read nothing more for it.

        Args:
            error: How the connection broke, if it did.
        """
        raise NotImplementedError

    def _turn_away(self, why: str) -> None:
        """Close: it is not who may come; whose protocol has a word for that says it."""
        self.drop(why)

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

    # --- the transport's calls -----------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Give it some time to say what it wants."""
        self._transport = cast("asyncio.Transport", transport)
        if self._dropped:
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(_HIGH, _LOW)
        name = self._peers._client_name
        if name and not is_for(transport.get_extra_info("peercert") or {}, name):
            self._turn_away(f"shows a certificate that is not for {name}")
            return
        self._wait_for_it("said nothing")

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
        self._transport = None
        self._gone(error)
        self._peers._forget(self, error)

    # --- the end -------------------------------------------------------------------------

    def _wait_for_it(self, failing: str) -> None:
        patience = self._peers._limits.patience
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
            self.drop(f"takes no answers for {self._peers._limits.patience:g} s")
            return
        self._stop_waiting()
        self._impatience = self._loop.call_later(
            self._peers._limits.patience, self._look_whether_it_takes
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
            # A handshake is cut short.  Without one it is a matter of a turn or two; and uvloop's
            # connect_accepted_socket, if cancelled, may leave the connection open for good.
            self._dropped = True
            if self.task is not None and self._peers._ssl is not None:
                self.task.cancel()
        elif politely:
            self._wait_for_it("takes no answers")
            self._transport.close()
        else:
            self._transport.abort()


class Peers:
    """A server of peers; subclasses say of which.

    Attributes:
        port: Where it listens, once it does.
        refused: How many peers were dropped for what they did, or for want of room.

    Sharing: the loop's thread.
    """

    _log = logging.getLogger("aiouffd.peers")

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        ssl: ssl.SSLContext | None = None,
        limits: Limits | None = None,
        client_name: str = "",
    ) -> None:
        """Prepare; nothing listens before ``async with``.

        Args:
            host: An address or a name of this machine.
            port: 0 takes a free one.
            ssl: A server's context; None is plain TCP.
            limits: What peers may cost.
            client_name: The name or address that a client's certificate has to be for; "" is
                any that the context lets in.  Without ``ssl`` it says nothing.
        """
        self.port = port
        self.refused = 0
        self._host = host
        self._ssl = ssl
        self._limits = limits if limits is not None else Limits()
        self._client_name = client_name if ssl is not None else ""
        self._connections: dict[Peer, None] = {}  # the oldest first
        self._listeners: list[socket.socket] = []
        self._pause: asyncio.TimerHandle | None = None  # while descriptors are short
        self._over = asyncio.Event()
        self._waiter: asyncio.Future[None] | None = None

    def _peer(self, name: str) -> Peer:
        """Make what deals with a new peer."""
        raise NotImplementedError

    @property
    def connections(self) -> int:
        """How many peers there are now."""
        return len(self._connections)

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: The address cannot be had.
        """
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
        self._go_on_accepting()

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
        """Wait until the server was drained or closed.

        Cancellation: nothing happens to the server.
        """
        await self._over.wait()

    async def drain(self) -> None:
        """Refuse new peers, answer what has been asked, then close.

        A peer whose request was not read yet asks again elsewhere.

        Cancellation: new peers stay refused; call again, or ``aclose``.
        """
        self._stop_listening()
        for connection in tuple(self._connections):
            connection.drain()
        await self._end()

    async def aclose(self) -> None:
        """Close every connection now; a second call does nothing.

        Cancellation: the connections are closed all the same.
        """
        self._stop_listening()
        for connection in tuple(self._connections):
            connection.drop("")
        await self._end()

    async def _end(self) -> None:
        while self._connections:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._over.set()

    def _stop_listening(self) -> None:
        self._stop_accepting()
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def _stop_accepting(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            loop.remove_reader(listener.fileno())

    def _go_on_accepting(self) -> None:
        # Not sock_accept: what it has accepted is lost if its task is cancelled at that moment.
        self._pause = None
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            loop.add_reader(listener.fileno(), self._accept, listener)

    # --- peers -------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            try:
                accepted, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in _SHORTAGES:
                    self._log.warning("a connection could not be accepted: %s", error)
                    continue
                # The connection stays in the kernel's queue: pause, or nothing else is done.
                self._log.warning("new peers wait: %s", error)
                self._stop_accepting()
                self._pause = asyncio.get_running_loop().call_later(
                    _SHORTAGE_PAUSE, self._go_on_accepting
                )
                return
            accepted.setblocking(False)
            self._admit(accepted, f"{address[0]}:{address[1]}")

    def _admit(self, accepted: socket.socket, peer: str) -> None:
        connection = self._peer(peer)
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

    async def _begin(self, connection: Peer, accepted: socket.socket) -> None:
        """Make a transport of a new connection; with TLS that takes a handshake."""
        if connection._dropped:
            return
        try:
            keep_alive(accepted)
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                accepted,
                ssl=self._ssl,
                ssl_handshake_timeout=self._limits.patience if self._ssl else None,
            )
        except OSError as error:  # SSLError is one, TimeoutError too
            # asyncio sends no alert where a handshake fails: neither side hears the other's reason.
            text = str(error) or "it broke the handshake off (does it accept our certificate?)"
            connection.error = connection.error or f"failed to connect: {text}"

    def _forget(self, connection: Peer, error: Exception | None) -> None:
        if connection not in self._connections:
            return
        del self._connections[connection]
        if connection.error:
            self._refuse(connection.peer, connection.error)
        elif error is not None:
            self._log.info("%s is gone: %s", connection.peer, error)
        if self._waiter is not None and not self._connections and not self._waiter.done():
            self._waiter.set_result(None)

    def _refuse(self, peer: str, reason: str) -> None:
        self.refused += 1
        self._log.warning("dropped %s: %s", peer, reason)


def keep_alive(connection: socket.socket) -> None:
    """Send at once, and hear within a minute of a host that has gone without a word."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        with contextlib.suppress(AttributeError):  # an option that only Linux has
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
