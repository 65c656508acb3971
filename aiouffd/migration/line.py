"""The line to the destination: two connections, made anew when they break.

Knows: how to dial, greetings, when to give up.
Must not know: memory, stages; what is said after the greetings.

Laws of this file:

* Both connections stand, or none: what one carried cannot be told apart from what the other lost.
* The first attempt fails at once, with what was wrong; from then on it is tried again until there
  has been no line for ``deadline`` seconds.  Where one side says that it will have no more of it
  it is not tried again, nor where bytes are damaged on the way again and again.
* Each pair has a number, its epoch, by which the other side knows what is left of earlier ones.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import ssl
from collections.abc import Callable, Coroutine
from typing import Any, Final

from ..errors import PeerError, UnknownVersion
from ..peers import keep_alive
from . import wire
from .channel import Channel, ToldError, is_damage, is_final
from .wire import Frame, Kind, Role

_MOST_DAMAGED: Final = 8  # lines on which bytes were damaged
_FIRST_PAUSE: Final = 0.02  # seconds between two attempts ...
_LONGEST_PAUSE: Final = 1.0  # ... and once many have failed


class Line:
    """Two connections to one destination.

    Attributes:
        channels: By role; both as long as ``is_up``.
        epoch: The number of this pair, from 1 on.
        is_up: Whether there is a line.
        why: Why there is none, or was none before.
        made: How many pairs there have been.
        away: Seconds without one, after the first.

    Sharing: the loop's thread.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        ssl: ssl.SSLContext | None,
        server_hostname: str,
        silence: float,
        deadline: float,
        hello: Callable[[Role, int], dict[str, Any]],
        prepare: Callable[[Channel, dict[str, Any]], None],
        take: Callable[[Role, Frame], Coroutine[Any, Any, None]],
        on_up: Callable[[dict[str, Any]], None],
        on_change: Callable[[], None],
    ) -> None:
        """Prepare; nothing is dialled before ``keep``.

        Args:
            host: The destination's address or name.
            port: Where it listens.
            ssl: A client's context; None is plain TCP.
            server_hostname: The name in its certificate; "" is ``host``.
            silence: Seconds after which a side that says nothing is lost.
            deadline: Seconds without a line after which it is given up.
            hello: Gives what to greet with, by role and epoch.
            prepare: Told of a channel and its welcome, before anything else is said there.
            take: Takes the frames behind the welcomes.
            on_up: Told the welcome of the demand channel whenever there is a line.
            on_change: Called when the line comes, breaks, or takes more.
        """
        self.channels: dict[Role, Channel] = {}
        self.epoch = 0
        self.is_up = False
        self.why = "it was not dialled"
        self.made = 0
        self.away = 0.0
        self._where = f"{host}:{port}"
        self._host, self._port = host, port
        self._ssl = ssl
        self._server_hostname = server_hostname
        self._silence = silence
        self._deadline = deadline
        self._hello = hello
        self._prepare = prepare
        self._take = take
        self._on_up = on_up
        self._on_change = on_change
        self._broken = asyncio.Event()
        self._is_over = False
        self._sent_bytes = 0  # on channels that are gone
        self._old: list[Channel] = []

    @property
    def sent_bytes(self) -> int:
        """Sent on all connections so far."""
        return self._sent_bytes + sum(each.sent_bytes for each in self.channels.values())

    async def keep(self) -> None:
        """Have a line until this is cancelled, or it is hung up.

        Raises:
            OSError: The first attempt failed, or all for ``deadline`` seconds.
            PeerError: The other side will not have it, or cannot be understood.

        Cancellation: the connections are given up at once.
        """
        loop = asyncio.get_running_loop()
        pause, since, damaged = 0.0, loop.time(), 0
        try:
            while not self._is_over:
                self._broken.clear()
                try:
                    async with asyncio.timeout(self._silence + self._deadline * (not self.made)):
                        await self._dial_both()
                except (OSError, PeerError) as error:  # TimeoutError is an OSError
                    self._drop()
                    self.why = str(error) or f"no answer within {self._silence:g} s"
                    final = isinstance(error, ToldError | UnknownVersion)
                    if final or not self.made or loop.time() - since >= self._deadline:
                        raise
                    await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
                    pause = min(max(pause * 2, _FIRST_PAUSE), _LONGEST_PAUSE)
                    continue
                self.away += loop.time() - since if self.made else 0.0
                self.made += 1
                pause = 0.0
                await self._broken.wait()
                if self._is_over:
                    return
                since = loop.time()
                lost = [each.lost for each in self.channels.values() if each.lost is not None]
                self.why = str(lost[0])
                self._drop()
                if not any(map(is_damage, lost)):
                    damaged = 0  # one after the other is too much
                for broken in lost:
                    damaged += is_damage(broken)
                    if is_final(broken) or damaged > _MOST_DAMAGED:
                        raise broken
        finally:
            self._drop()

    async def _dial_both(self) -> None:
        self.epoch += 1
        welcome = await self._dial(Role.DEMAND)
        await self._dial(Role.BULK)
        for channel in self.channels.values():
            if channel.lost is not None:
                raise channel.lost
        self.is_up = True
        self._on_up(welcome)
        self._on_change()

    async def _dial(self, role: Role) -> dict[str, Any]:
        """Connect and greet; give the welcome."""
        loop = asyncio.get_running_loop()
        welcome: asyncio.Future[dict[str, Any]] = loop.create_future()

        async def take(frame: Frame) -> None:
            if welcome.done():
                await self._take(role, frame)
            elif frame.kind is not Kind.WELCOME:
                raise PeerError(f"sent a {frame.kind.name} before it has welcomed us")
            else:
                value = frame.json()
                self._prepare(channel, value)
                welcome.set_result(value)

        def lost(channel: Channel) -> None:
            if not welcome.done():
                error = channel.lost or ConnectionResetError("the line is gone")
                if isinstance(error, OSError) and not channel.decoder.version:
                    error = self._wordless(error)
                welcome.set_exception(error)
                welcome.exception()  # nobody waits for it if the dialling was given up
            self._break(channel)

        decoder = wire.Decoder(from_source=False)
        channel = Channel(
            decoder, take=take, silence=self._silence, on_lost=lost, on_room=self._on_change
        )
        self.channels[role] = channel
        try:
            await loop.create_connection(
                lambda: channel,
                self._host,
                self._port,
                ssl=self._ssl,
                server_hostname=(self._server_hostname or self._host) if self._ssl else None,
            )
        except BaseException as error:
            # uvloop does not tell of the end of one whose making was cancelled.
            channel.connection_lost(None)
            if isinstance(error, OSError):
                raise ConnectionError(self._unreachable(error)) from error
            raise
        if channel.socket is not None:
            keep_alive(channel.socket)
        channel.send_preamble()
        channel.send_json(Kind.HELLO, self._hello(role, self.epoch))
        return await welcome

    def _wordless(self, error: OSError) -> ConnectionError:
        """Say why there may have been no answer, not even a preamble."""
        # Where it does not accept a certificate, TLS 1.3 has ended its handshake here by then.
        guess = "ask for TLS" if self._ssl is None else "accept our certificate"
        reason = error.reason if isinstance(error, ssl.SSLError) and error.reason else error
        return ConnectionError(
            f"{self._where} said nothing: {reason} (does it {guess}? its log may tell)"
        )

    def _unreachable(self, error: OSError) -> str:
        """Say what came of dialling."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"{self._where} shows a certificate that does not hold: {error.verify_message}"
        if isinstance(error, ssl.SSLError):
            return (
                f"{self._where} does not speak TLS, or not with us:"
                f" {error.reason or error.strerror or error}"
            )
        number = error.errno or 0  # below 0 where a name is not known
        why = os.strerror(number) if number > 0 else error.strerror
        return f"{self._where} cannot be reached: {why or error}"

    def _break(self, channel: Channel) -> None:
        if channel not in self.channels.values():
            return
        if self.is_up:
            self.is_up = False
            self._on_change()
        self._broken.set()

    def _drop(self) -> None:
        """Give both connections up."""
        self.is_up = False
        channels, self.channels = self.channels, {}
        for channel in channels.values():
            self._sent_bytes += channel.sent_bytes
            if not channel.is_parting:
                channel.abort()
            self._old.append(channel)
        self._old = [each for each in self._old if not each.is_closed]

    def hang_up(self) -> None:
        """End both connections behind what was written; there will be no others."""
        self._is_over = True
        for channel in self.channels.values():
            channel.part()

    async def wait_closed(self) -> None:
        """Wait until every connection is gone.

        Cancellation: nothing happens to them.
        """
        for channel in (*self._old, *self.channels.values()):
            await channel.wait_closed()


def is_loopback(host: str) -> bool:
    """Say whether an address can only be reached from this machine; a name is looked up.

    Raises:
        OSError: There is no such name.
    """
    found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return all(address[0] == "::1" or str(address[0]).startswith("127.") for *_, address in found)
