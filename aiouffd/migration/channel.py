"""Channel: one connection of a migration, from its preamble on.

Knows: an asyncio transport, frames on it, when the other side was last heard.
Must not know: what the frames mean, at which stage the migration is.

Laws of this file:

* Bytes are received where they belong: the decoder says where the next ones go, which for pages
  is the memory itself.
* Frames are taken one after the other, each before the next is looked at.  One that has to wait
  holds up its channel, and nothing else: nothing more is read meanwhile.
* A side that is silent for ``silence`` seconds is lost, as is one that breaks the protocol, or
  does not take what is said to it; it is told why, if it still listens.  Each side says something
  at least three times as often.
* What is lost is said once.  A lost channel is of no use; there is no coming back.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, TypeAlias, cast

from .. import eager
from ..errors import DamagedFrame, PeerError, UnknownVersion
from . import wire
from .stages import Stage
from .wire import Frame, Kind

log: Final = logging.getLogger("aiouffd.migration")

_HIGH, _LOW = 1 << 20, 1 << 18  # of frames that the kernel has not taken yet, in bytes
_MOST_UNTAKEN: Final = 8 << 20  # of these: a side that talks and does not listen is lost
_LONG: Final = 32 << 10  # bytes of a body from which on joining it to its head is not worth it
_DROPPED_BYTES: Final = 64 << 10  # of what nobody takes any more, at a time
_LISTENS: Final = 3  # a side says something so many times in the time that the other waits for it

#: Takes one frame.
Take: TypeAlias = Callable[[Frame], Coroutine[Any, Any, None]]


class Channel(asyncio.BufferedProtocol):
    """One connection.

    Attributes:
        encoder: Makes the frames to send.
        decoder: Has what was received so far.
        lost: Why it is of no use any more; None as long as it is.
        full: The kernel takes no more at the moment.
        is_parting: The last word was written; the other side is to close.
        sent_bytes: Given to the transport so far.

    Sharing: the loop's thread.
    """

    def __init__(
        self,
        decoder: wire.Decoder,
        *,
        take: Take,
        silence: float,
        on_lost: Callable[[Channel], None],
        on_turn: Callable[[Channel], None] | None = None,
        on_room: Callable[[], None] | None = None,
        stage: Callable[[], str] | None = None,
    ) -> None:
        """Prepare for ``connection_made``.

        Args:
            decoder: Fresh, or with what the connection has brought before.
            take: Called with each frame; a PeerError that it raises ends the channel.
            silence: Seconds without a byte after which the other side is lost.
            on_lost: Called once at the end.
            on_turn: Called when all frames that are here have been taken.
            on_room: Called when the kernel takes more again.
            stage: Gives the stage of the migration, which goes with an ERROR: the other side has
                to know what its end means.
        """
        self.encoder: Final = wire.Encoder()
        self.decoder: Final = decoder
        self.lost: Exception | None = None
        self.full = False
        self.is_parting = False
        self.sent_bytes = 0
        self._take = take
        self._silence = silence
        self._on_lost = on_lost
        self._on_turn = on_turn
        self._on_room = on_room
        self._stage = stage
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._heard = self._said = self._due = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: asyncio.Task[None] | None = None  # for a frame to be taken
        self._closed: asyncio.Future[None] = self._loop.create_future()

    def __repr__(self) -> str:
        return f"<Channel {'open' if self.lost is None else f'lost: {self.lost}'}>"

    # --- the transport's calls -----------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to listen for silence."""
        if self.lost is not None:  # given up while it was dialled: whoever dials may not hear of it
            cast("asyncio.Transport", transport).abort()
            return
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(_HIGH, _LOW)
        self._heard = self._said = self._due = self._loop.time()
        self._listen()

    def get_buffer(self, sizehint: int) -> bytearray:
        """Say where the next bytes go."""
        del sizehint  # a body's buffer is as long as what is still to come of it
        if self.lost is not None:
            return bytearray(_DROPPED_BYTES)
        return cast("bytearray", self.decoder.get_buffer())

    def buffer_updated(self, nbytes: int) -> None:
        """Take what has come."""
        self._heard = self._loop.time()
        if self.lost is None:
            self._take_all(self.decoder.received(nbytes))

    def eof_received(self) -> bool:
        """Close: each side ends a migration by a frame, not by silence."""
        self._end(ConnectionResetError("the other side has closed the connection"))
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """Tell why there is nothing more."""
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
        self._end(error if error is not None else ConnectionResetError("the connection is closed"))
        if not self._closed.done():
            self._closed.set_result(None)

    def pause_writing(self) -> None:
        """Note that the kernel takes no more."""
        self.full = True

    def resume_writing(self) -> None:
        """Note that it does again."""
        self.full = False
        if self._on_room is not None and self.lost is None:
            self._on_room()

    # --- frames --------------------------------------------------------------------------

    def take_what_is_here(self, frames: Iterator[Frame]) -> None:
        """Take frames that came in before the channel had this connection."""
        self._take_all(frames)

    def _take_all(self, frames: Iterator[Frame]) -> None:
        try:
            for frame in frames:
                if frame.kind is Kind.PING:
                    continue
                if frame.kind is Kind.ERROR:
                    raise _error_of(frame)
                task, _ = eager.start(self._loop, self._take(frame))
                if task is not None:
                    self._hold(task, frames)
                    return
                if self.lost is not None:
                    return
        except PeerError as error:
            self.fail(error)
        except Exception as error:
            log.exception("a frame could not be taken")
            self.fail(PeerError(f"an error on our side: {error}"))
        else:
            if self._on_turn is not None and self.lost is None:
                self._on_turn(self)

    def _hold(self, task: asyncio.Task[None], frames: Iterator[Frame]) -> None:
        """Read nothing more until a frame is taken."""
        self._waiting = task
        if self._transport is not None:
            self._transport.pause_reading()

        def go_on(task: asyncio.Task[None]) -> None:
            self._waiting = None
            self._heard = self._loop.time()
            if task.cancelled():
                return
            error = task.exception()
            if self.lost is not None:
                return
            if error is not None:
                if not isinstance(error, PeerError):
                    log.error("a frame could not be taken", exc_info=error)
                    error = PeerError(f"an error on our side: {error}")
                self.fail(error)
                return
            self._take_all(frames)
            self._read_on()

        task.add_done_callback(go_on)

    def _read_on(self) -> None:
        if self._waiting is None and self._transport is not None:
            self._transport.resume_reading()

    def send(self, parts: list[wire.Part]) -> None:
        """Send a frame.  Its bytes must not change any more."""
        transport = self._transport
        if transport is None or self.lost is not None:
            return
        self._said = self._loop.time()
        length = sum(map(len, parts))
        self.sent_bytes += length
        if length < _LONG:
            transport.write(b"".join(parts))
        else:
            for part in parts:
                transport.write(memoryview(part))  # what is left of it is not copied twice
        if self.full and transport.get_write_buffer_size() > _MOST_UNTAKEN:
            self.fail(ConnectionAbortedError("the other side takes nothing of what is said to it"))

    def send_preamble(self) -> None:
        """Send what a connection begins with."""
        self.send([wire.PREAMBLE])

    def send_json(self, kind: Kind, value: dict[str, Any], *, number: int = 0) -> None:
        """Send a frame whose body is JSON."""
        self.send([self.encoder.json(kind, value, number=number)])

    @property
    def socket(self) -> socket.socket | None:
        """The connection's socket, to set options of; None if it is gone."""
        if self._transport is None:
            return None
        found: socket.socket | None = self._transport.get_extra_info("socket")
        return found

    @property
    def is_closed(self) -> bool:
        """Whether the connection is gone, or was never made."""
        return self._transport is None

    # --- the end -------------------------------------------------------------------------

    def _listen(self) -> None:
        now = self._loop.time()
        # While this loop stood still nobody listened: what has come meanwhile is not read yet.
        self._heard = min(self._heard + now - self._due, now)
        if self._waiting is None and now - self._heard > self._silence:
            self.fail(ConnectionAbortedError(f"nothing was heard for {self._silence:g} s"))
            return
        if now - self._said >= self._silence / _LISTENS * 0.9:
            self.send(self.encoder.frame(Kind.PING))
        self._due = now + self._silence / _LISTENS
        self._timer = self._loop.call_at(self._due, self._listen)

    def fail(self, error: Exception) -> None:
        """Give the connection up.

        Args:
            error: Why; the other side is told of a PeerError of its own making.
        """
        if self.lost is not None:
            return
        if isinstance(error, PeerError) and not isinstance(error, ToldError):
            self.tell(_code_of(error), error)
        else:
            self._end(error)
            self._abort()

    def tell(self, code: str, error: Exception) -> None:
        """Give the connection up, and say why.

        Args:
            code: See ToldError.
            error: What is wrong.
        """
        if self.lost is None:
            value = {"code": code, "text": str(error)[: wire.MAX_TEXT]}
            stage = self._stage() if self._stage is not None else ""
            if stage:
                value["stage"] = stage
            self.send_json(Kind.ERROR, value)
            self._part(error)

    def part(self) -> None:
        """End the connection behind what was written: the other side closes it."""
        self._part(ConnectionResetError("the migration is over"))

    def _part(self, error: Exception) -> None:
        # Closing here, with bytes that nobody reads any more, would make the kernel take back
        # what was written and has not been read.
        if self.lost is None:
            self.is_parting = True
            self._end(error)
            if self._transport is not None:
                self._transport.resume_reading()
                self._timer = self._loop.call_later(self._silence, self._abort)

    def close(self) -> None:
        """End the connection: the other side has said its last word."""
        self._end(ConnectionResetError("the migration is over"))
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection now; nothing more of it is taken."""
        self._end(ConnectionResetError("the connection was given up"))
        self._abort()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _end(self, error: Exception) -> None:
        if self.lost is not None:
            return
        self.lost = error
        if self._timer is not None:
            self._timer.cancel()
        if self._waiting is not None:
            self._waiting.cancel()
        self._on_lost(self)

    async def wait_closed(self) -> None:
        """Wait until the connection is gone; one that was never made is.

        Cancellation: nothing happens to it.
        """
        if self._transport is not None:
            # No longer than the other side is waited for, whatever the loop says.
            await asyncio.wait((self._closed,), timeout=self._silence)


#: The code where, after the switch, the program has not run at the destination and will not.
NOT_STARTED: Final = "not started"


class ToldError(PeerError):
    """The other side has said what it found wrong.

    Attributes:
        code: In a word: ``version``, ``damaged``, ``protocol``, ``refused``, ``failed``,
            NOT_STARTED or UNKNOWN.
        stage: That the migration had for it; "" if it has not said.
    """

    def __init__(self, code: str, text: str, stage: str = "") -> None:
        super().__init__(f"ended the migration ({code}): {text}")
        self.code = code
        self.stage = stage

    @property
    def not_started(self) -> bool:
        """Whether it has let nothing run by then, and so never will."""
        return self.code == NOT_STARTED or self.stage in {
            Stage.OFFERED.value,
            Stage.COPYING.value,
        }


class UnknownMigration(PeerError):
    """The source comes back to a migration that the destination does not know, or not any more."""


class EndedMigration(PeerError):
    """The source comes back to a migration that has failed meanwhile, and is to hear how.

    Attributes:
        code: See ToldError.
        stage: That the migration had reached.
    """

    def __init__(self, code: str, text: str, stage: str) -> None:
        super().__init__(text)
        self.code = code
        self.stage = stage


def is_final(error: Exception | None) -> bool:
    """Say whether what has ended a connection ends the migration: another one would not help.

    It would where bytes were damaged on the way, or were lost.
    """
    return isinstance(error, PeerError) and not is_damage(error)


def is_damage(error: Exception | None) -> bool:
    """Say whether a connection has ended since bytes were changed on the way, on either side."""
    if isinstance(error, ToldError):
        return error.code == DAMAGED
    return isinstance(error, DamagedFrame)


#: The code of bytes that were changed on the way.
DAMAGED: Final = "damaged"

#: The code of a migration that is not known, or not any more.
UNKNOWN: Final = "unknown"

_CODES: Final = (
    ("version", UnknownVersion),
    (DAMAGED, DamagedFrame),
    (UNKNOWN, UnknownMigration),
)


def _code_of(error: PeerError) -> str:
    return next((code for code, kind in _CODES if isinstance(error, kind)), "protocol")


def _error_of(frame: Frame) -> ToldError:
    value = frame.json()
    return ToldError(
        wire.text_of(value.get("code")) or "failed",
        wire.text_of(value.get("text")) or "no reason given",
        wire.text_of(value.get("stage")),
    )
