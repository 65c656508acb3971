"""Listener: where migrations come in.

Knows: connections from sources, their greetings, which migration each belongs to.
Must not know: memory, what comes behind the greetings.

Laws of this file:

* Nobody is let in by a plain connection from another machine unless that was asked for by name.
* A connection says what it is within the limits' patience, and is then handed on; one that says
  something else is told what was wrong with it, and closed.
* A migration is known by its token from its first greeting until it has ended; whoever has the
  token has the migration.
* How one has failed is remembered: a source that was away hears whether its program ever ran.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from typing import Any, Final

from ..errors import ClosedError, PeerError
from ..peers import Limits, Peer, Peers
from . import wire
from .channel import Channel, EndedMigration, UnknownMigration
from .incoming import Incoming
from .line import is_loopback
from .stages import Stage
from .wire import Frame, Kind, Role

MOST_MEMORY: Final = 1 << 40  #: bytes that one migration may bring, unless said otherwise
MOST_STATE: Final = 64 << 20  #: bytes of its state

_OPEN: Final = (
    "{} can be reached by other machines, and without TLS whoever connects can bring a program and"
    " read what it had: give certificates, or ask for plain connections"
)
_WAITING: Final = 16  # migrations that nobody has accepted yet
_REMEMBERED: Final = 256  # that have failed, whose sources may come back


class Listener(Peers):
    """Takes migrations in.

    ::

        async with Listener("10.0.0.7", 7440, ssl=context) as listener:
            incoming = await listener.accept()

    Sharing: the loop's thread.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        ssl: ssl.SSLContext | None = None,
        plain: bool = False,
        client_name: str = "",
        limits: Limits | None = None,
        deadline: float = 30.0,
        silence: float = 5.0,
        most_memory: int = MOST_MEMORY,
        most_state: int = MOST_STATE,
    ) -> None:
        """Prepare; nothing listens before ``async with``.

        Args:
            host: An address or a name of this machine.
            port: 0 takes a free one.
            ssl: A server's context, which asks for certificates; None is plain TCP.
            plain: Let other machines in without TLS: whoever can connect can bring a program.
            client_name: The name or address that a source's certificate has to be for; "" is
                any that the context lets in.
            limits: What connections may cost.
            deadline: Seconds without a line after which a migration fails.
            silence: Seconds after which a side that says nothing is lost.
            most_memory: Bytes that one migration may bring.
            most_state: Bytes that a program's state may have.

        Raises:
            ValueError: It is for other machines, without TLS, and that was not asked for; or
                the context lets in who shows no certificate.
        """
        self._is_for_here = ssl is None and not plain
        if self._is_for_here and not is_loopback(host):
            raise ValueError(_OPEN.format(host))
        if ssl is not None and ssl.verify_mode != _CERT_REQUIRED:
            raise ValueError("the TLS context must ask for certificates: CERT_REQUIRED")
        super().__init__(host, port, ssl=ssl, limits=limits, client_name=client_name)
        self._deadline = deadline
        self._silence = silence
        self._most_memory = most_memory
        self._most_state = most_state
        self._known: dict[str, Incoming] = {}  # by token
        self._ended: dict[str, EndedMigration] = {}  # by token, the oldest first
        self._waiting: deque[Incoming] = deque()
        self._acceptors: deque[asyncio.Future[None]] = deque()

    def _peer(self, name: str) -> Peer:
        return _Guest(self, name)

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: The address cannot be had.
            ValueError: The host's name has come to mean one that other machines can reach.
        """
        await super().start()
        found = [each.getsockname()[0] for each in self._listeners]
        if self._is_for_here and not all(is_loopback(each) for each in found):
            self._stop_listening()
            raise ValueError(_OPEN.format(self._host))

    async def accept(self) -> Incoming:
        """Wait for a migration.

        Raises:
            ClosedError: The listener is closed.

        Cancellation: the migration waits for the next call.
        """
        while True:
            while self._waiting:
                incoming = self._waiting.popleft()
                if not incoming.stage.is_over:
                    return incoming
            if self._over.is_set():
                raise ClosedError("the listener is closed")
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._acceptors.append(future)
            try:
                await future
            finally:
                if future in self._acceptors:
                    self._acceptors.remove(future)

    async def aclose(self) -> None:
        """Stop listening and end all migrations; those that are not there yet have failed.

        Cancellation: the connections are closed all the same.
        """
        for incoming in tuple(self._known.values()):
            if not incoming.stage.is_over:
                if incoming.stage is Stage.SWITCHING:
                    incoming.note_starting()  # whoever has taken it may be letting it run
                incoming.note_failed("the destination was closed")
        await super().aclose()
        while self._acceptors:
            future = self._acceptors.popleft()
            if not future.done():
                future.set_result(None)

    def greet(self, hello: dict[str, Any], peer: str) -> Incoming:
        """Find the migration that a greeting is about, or begin one.

        Raises:
            PeerError: There is none, or it cannot begin.
        """
        token = hello.get("token")
        if token:
            incoming = self._known.get(token) if isinstance(token, str) else None
            ended = self._ended.get(token) if isinstance(token, str) else None
            if ended is not None:
                raise EndedMigration(ended.code, str(ended), ended.stage)
            if incoming is None:
                raise UnknownMigration(
                    "comes back to a migration that is not known here, or is over"
                )
            return incoming
        if hello.get("role") != Role.DEMAND.value:
            raise PeerError("begins a migration with a connection for bulk")
        if len(self._waiting) >= _WAITING:
            raise PeerError(f"{_WAITING} migrations wait to be taken already")
        extents = wire.extents_of(hello.get("regions"), self._most_memory)
        offered = hello.get("features")
        if not wire.are_features(offered):
            raise PeerError("sent a hello without a list of features")
        incoming = Incoming(
            extents,
            offered,
            name=wire.text_of(hello.get("name")),
            peer=peer,
            deadline=self._deadline,
            most_state=self._most_state,
            on_end=self._forget_migration,
        )
        self._known[incoming.token] = incoming
        self._waiting.append(incoming)
        while self._acceptors:
            future = self._acceptors.popleft()
            if not future.done():
                future.set_result(None)
                break
        return incoming

    def _forget_migration(self, incoming: Incoming) -> None:
        if self._known.pop(incoming.token, None) is None:
            return
        if incoming.ended is not None:
            if len(self._ended) >= _REMEMBERED:
                del self._ended[next(iter(self._ended))]
            self._ended[incoming.token] = incoming.ended
        if incoming in self._waiting:  # or those that have gone would keep others out
            self._waiting.remove(incoming)


_CERT_REQUIRED: Final = ssl.CERT_REQUIRED


class _Guest(Peer):
    """One connection, until it has said what it is."""

    def __init__(self, listener: Listener, peer: str) -> None:
        super().__init__(listener, peer)
        self._listener = listener
        self._decoder = wire.Decoder(from_source=True)
        self._is_silent = True
        self._is_refused = False

    @property
    def silent(self) -> bool:
        """Whether it has not said yet what it wants, or has said something else."""
        return self._is_silent or self._is_refused

    def data_received(self, data: bytes) -> None:
        """Take the greeting."""
        try:
            for frame in self._decoder.feed(data):
                if not self._is_silent:
                    raise PeerError("went on before it was welcomed")
                if frame.kind is not Kind.HELLO:
                    raise PeerError(f"began with a {frame.kind.name}")
                self._greet(frame)
        except PeerError as error:
            self._refuse(error)

    def _greet(self, frame: Frame) -> None:
        transport = self._transport
        if transport is None:
            return
        hello = frame.json()
        role, epoch = hello.get("role"), hello.get("epoch")
        if role not in [each.value for each in Role]:  # it may be anything
            raise PeerError(f"sent a hello with the role {str(role)[:40]!r}")
        if not isinstance(epoch, int) or not 0 < epoch <= wire.MAX_EPOCH:
            raise PeerError("sent a hello without an epoch")
        incoming = self._listener.greet(hello, self.peer)
        self._is_silent = False
        self._stop_waiting()
        channel = _Accepted(self, incoming, Role(role), self._listener._silence)
        transport.set_protocol(channel)
        channel.connection_made(transport)
        channel.send_preamble()
        try:
            incoming.welcome(Role(role), epoch, channel)
        except ConnectionError as error:
            channel.fail(error)
            self.error = str(error)

    def _turn_away(self, why: str) -> None:
        """Tell it: a certificate is soon mistaken for another."""
        self._refuse(PeerError(why))

    def _refuse(self, error: PeerError) -> None:
        """Say what was wrong, as a channel does, and close."""
        self.error = self.error or str(error)
        transport = self._transport
        if transport is None:
            return
        if self._is_silent:
            self._is_silent, self._is_refused = False, True
            self._stop_waiting()
            ended = error if isinstance(error, EndedMigration) else None
            channel = _Accepted(self, None, Role.DEMAND, self._listener._silence, ended)
            transport.set_protocol(channel)
            channel.connection_made(transport)
            channel.send_preamble()
            if ended is None:
                channel.fail(error)
            else:
                channel.tell(ended.code, ended)
        else:
            transport.abort()

    def _gone(self, error: Exception | None) -> None:
        """Nothing is read for it."""

    def _go_on(self) -> None:
        self._goes_on = False


class _Accepted(Channel):
    """A connection that has said what it is; its guest stands in the listener's list."""

    def __init__(
        self,
        guest: _Guest,
        incoming: Incoming | None,
        role: Role,
        silence: float,
        ended: EndedMigration | None = None,
    ) -> None:
        async def take(frame: Frame) -> None:
            if incoming is not None:
                await incoming.take(role, frame)

        def lost(channel: Channel) -> None:
            if incoming is not None:
                incoming.note_lost(channel)

        def turn(channel: Channel) -> None:
            if incoming is not None:
                incoming.acknowledge(channel)

        def stage() -> str:
            if incoming is not None:
                return incoming.reached.value
            return "" if ended is None else ended.stage

        super().__init__(
            guest._decoder, take=take, silence=silence, on_lost=lost, on_turn=turn, stage=stage
        )
        self._guest = guest

    def connection_lost(self, error: Exception | None) -> None:
        """Leave the listener's list, too."""
        super().connection_lost(error)
        self._guest.connection_lost(error)
