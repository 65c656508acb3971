"""Serve the pages of a checkpoint to ``criu lazy-pages --page-server``, as CRIU's own would.

Knows: a checkpoint, what a client asks for, limits.
Must not know: the bytes of the wire (``page_wire`` does), how clients come and go (``peers``).

CRIU's own server (``criu page-server --lazy-pages``) serves one client and ends.  This one serves
any number at once, one after the other, of either header size.

Without a TLS context whoever can connect can read the memory: keep to loopback, or to a network
where that is right.

Laws of this file:

* Answers go out in the order of the requests: a client knows them by nothing else.
* A client may say nothing for as long as there is room for others, since a daemon connects long
  before its restore; a first request that has begun has to end within ``Limits.patience``.
* A client costs a bounded amount of memory: what it has asked for and not taken yet stays below
  ``Limits.in_flight_bytes``; beyond that nothing more is read from it.
* What a file's page cache has goes to the socket straight from there, where a source can do that
  (``SendsItself``): a third of the work of reading and writing it.
* No client holds the loop: answers are read and sent in steps of STEP_BYTES, and
  after TURN_BYTES it is the others' turn.
* What the checkpoint does not have ends that connection, and the log says why: the protocol has
  no other way to say no, and an answer without pages is an error to CRIU.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from ...errors import PeerError, SourceError, UffdError
from ...peers import Limits, Peer, Peers
from ...ranges import PAGE_SIZE
from ...sources import SendsItself, Source
from . import page_wire
from .checkpoint import Checkpoint
from .task_memory import TaskMemory

if TYPE_CHECKING:
    import ssl

    from typing_extensions import Buffer

log: Final = logging.getLogger("aiouffd.criu.page_server")

STEP_BYTES: Final = 256 << 10  # read at once
TURN_BYTES: Final = 1 << 20  # sent in one turn of the loop
_WORTH_IT: Final = 64 << 10  # bytes that are let to the source to send
_BACKLOG: Final = 1024  # requests that wait for the limits to let them in


class Left(NamedTuple):
    """A client that has left, and what it has had.

    Attributes:
        peer: Where it was.
        answered: How many requests were answered.
        answered_bytes: How many bytes of pages that were.
        ended: Whether it had said that it was through.
        error: Why it was dropped, or how the connection broke; "" if neither.
    """

    peer: str
    answered: int
    answered_bytes: int
    ended: bool
    error: str


class _File(NamedTuple):
    """A file of pages; ``sender`` is the same, if it can send itself."""

    source: Source
    sender: SendsItself | None


class _Rest(NamedTuple):
    """What of an answer is still to be cut into pieces."""

    file: _File
    offset: int
    length: int


class _Task(NamedTuple):
    """The memory of a process, ready to be read."""

    memory: TaskMemory
    files: tuple[_File, ...]

    def find(self, get: page_wire.Get) -> _Rest:
        """Say where pages are, and how many of those that are asked for are in one run.

        Raises:
            PeerError: There are none.
        """
        run = self.memory.run_at(get.address)
        if run is None or run.file < 0:
            raise PeerError(
                f"asked for {get.pages} pages at {get.address:#x} of process {get.pid}, which are"
                + (" not in the checkpoint" if run is None else " in no file of the checkpoint")
            )
        skipped = get.address - run.address
        length = min(get.pages * PAGE_SIZE, run.length - skipped)
        return _Rest(self.files[run.file], run.place + skipped, length)


class _Piece:
    """What is to be sent next: a header, or none, and bytes that may have to be read first."""

    __slots__ = (
        "data",
        "ends",
        "error",
        "header",
        "last",
        "length",
        "offset",
        "read",
        "sender",
        "source",
    )

    def __init__(
        self, header: bytes, length: int, source: Source | None, offset: int, *, last: bool
    ) -> None:
        self.header = header
        self.length = length
        self.source = source  # None: there is nothing but the header
        self.offset = offset
        self.last = last  # of its answer
        self.ends = False  # the client closes, once it has this
        self.sender: SendsItself | None = None  # who may send the bytes
        self.data: Buffer | None = None
        self.read: asyncio.Task[Buffer] | None = None
        self.error = ""  # why there are no bytes


class _Connection(Peer):
    """One client, from its connection on."""

    def __init__(self, server: PageServer, peer: str) -> None:
        super().__init__(server, peer)
        self._server = server
        self._wire = page_wire.Acceptor(server.header_bytes)
        self._backlog: deque[page_wire.Event] = deque()
        self._rest: _Rest | None = None
        self._pieces: deque[_Piece] = deque()
        self._pieces_bytes = 0
        self._answered = 0
        self._answered_bytes = 0
        self._socket: socket.socket | None = None  # another descriptor of the connection
        self._broken = ""  # how the connection broke, if we were told first

    @property
    def silent(self) -> bool:
        """Whether it has asked for nothing yet."""
        return self._wire.header_bytes is None

    # --- the transport's calls -----------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let it be silent: it may have come long before the restore that it is for."""
        super().connection_made(transport)
        self._stop_waiting()

    def data_received(self, data: bytes) -> None:
        """Take requests."""
        was_silent = self.silent
        try:
            events = self._wire.feed(data)
            if self._wire.direction is page_wire.Direction.PUSH:
                raise PeerError(
                    "sends pages; this server only gives them (without --lazy-pages it receives)"
                )
        except PeerError as error:
            self.drop(str(error))
            return
        if events:
            if was_silent:
                self._stop_waiting()
                log.info("%s speaks headers of %s bytes", self.peer, self._wire.header_bytes)
            self._backlog += events
            if not self._goes_on:
                self._go_on()
        elif was_silent and not self._wire.at_rest:
            self._wait_for_it("did not end its first request")

    def eof_received(self) -> bool:
        """Close: nothing more is asked."""
        if not self._wire.ended:
            log.info(
                "%s has closed without saying that it is through%s",
                self.peer,
                "" if self._wire.in_order else ", within a request",
            )
        return False

    def _gone(self, error: Exception | None) -> None:
        if self._server._on_left is not None and (not self.silent or self._wire.ended):
            ended = self._wire.ended
            broken = str(error) if error is not None else self._broken
            why = self.error or ("" if ended else broken)
            left = Left(self.peer, self._answered, self._answered_bytes, ended, why)
            self._server._on_left(left)
        if self._socket is not None:
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
            self._socket = None
        self._backlog.clear()
        self._rest = None
        pieces, self._pieces = self._pieces, deque()
        for piece in pieces:
            if piece.read is not None:
                piece.read.cancel()

    def drain(self) -> None:
        """Serve it until it is through: a restored process lives on what it asks for."""
        if self.silent:
            self.drop("")

    # --- answers -------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Answer what is at hand, in order, as far as one step and the client go."""
        self._goes_on = False
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        sent = 0
        try:
            while sent < TURN_BYTES and not self._full:
                if not self._pieces and not self._add_piece(transport):
                    break
                piece = self._pieces[0]
                length = piece.length
                if piece.error:
                    raise SourceError(piece.error)
                if piece.sender is not None and not self._send_itself(transport, piece):
                    break
                if piece.data is None and piece.length:
                    break
                self._pieces.popleft()
                self._pieces_bytes -= piece.length
                if piece.data is not None:
                    self._send(transport, piece, piece.data)
                self._count(piece)
                sent += length
            self._read_ahead(transport)
        except ConnectionError as error:
            # The transport finds it out only if it is reading; that error is had once, and by us.
            self._broken = str(error)
            transport.abort()
            return
        except (UffdError, OSError) as error:
            self.drop(str(error))
            return
        if sent >= TURN_BYTES and not self._full:
            self._go_on_soon()
        self._settle(transport)

    def _read_ahead(self, transport: asyncio.Transport) -> None:
        """While one piece is read, begin with those behind it."""
        limit = self._peers._limits.in_flight_bytes
        while self._pieces and self._pieces[-1].read is not None and self._pieces_bytes < limit:
            if not self._add_piece(transport):
                break

    def _add_piece(self, transport: asyncio.Transport) -> bool:
        """Begin with the next piece; False if nothing more is asked for.

        Raises:
            PeerError: It asks for what there is not.
            SourceError: It cannot be read.
        """
        header = b""
        left = self._rest
        while left is None:
            if not self._backlog:
                return False
            event = self._backlog.popleft()
            if isinstance(event, page_wire.Get):
                left = self._server._find(event)
                header = self._wire.answer(event, left.length // PAGE_SIZE)
            else:
                self._answer_shortly(transport, event)
                if self._pieces:
                    return True
        file, offset, rest = left
        length = min(rest, STEP_BYTES)
        piece = _Piece(header, length, file.source, offset, last=length == rest)
        self._rest = None if piece.last else _Rest(file, offset + length, rest - length)
        self._pieces.append(piece)
        self._pieces_bytes += length
        if length >= _WORTH_IT and self._server._ssl is None and file.sender is not None:
            piece.sender = file.sender
        else:
            self._fetch(piece)
        return True

    def _fetch(self, piece: _Piece) -> None:
        """Read a piece, or begin to."""
        source = piece.source
        assert source is not None  # noqa: S101 - there is something to read
        piece.data = source.read_nowait(piece.offset, piece.length)
        if piece.data is None:
            read = self._loop.create_task(
                _read(source, piece.offset, piece.length), name="aiouffd page server"
            )
            piece.read = read
            read.add_done_callback(lambda _: self._end_read(piece, read))

    def _send_itself(self, transport: asyncio.Transport, piece: _Piece) -> bool:
        """Let a source send as much of a piece as the socket takes.

        Returns:
            Whether it is sent, or is to be sent in the ordinary way; else the socket is full.
        """
        sender = piece.sender
        assert sender is not None  # noqa: S101 - it has one
        if self._socket is None:
            # The transport does not let others wait on its own descriptor.
            taken: socket.socket = transport.get_extra_info("socket")
            self._socket = socket.socket(fileno=os.dup(taken.fileno()))
            self._socket.setblocking(False)
        fd = self._socket.fileno()
        while piece.length and not transport.get_write_buffer_size():
            if piece.header:
                self._send_header(transport, piece)
                continue
            sent = sender.send_nowait(fd, piece.offset, piece.length)
            if sent is None:
                break
            if not sent:
                self._loop.add_writer(fd, self._writable)
                self.pause_writing()
                return False
            self._account(piece, sent)
        if piece.length:
            piece.sender = None
            self._fetch(piece)
        return True

    def _send_header(self, transport: asyncio.Transport, piece: _Piece) -> None:
        """Send a header so that it waits for the bytes behind it."""
        assert self._socket is not None  # noqa: S101 - made before
        header, piece.header = piece.header, b""
        try:
            sent = self._socket.send(header, socket.MSG_MORE)
        except BlockingIOError:
            sent = 0
        if sent < len(header):
            transport.write(header[sent:])  # rare; then what follows goes that way, too

    def _account(self, piece: _Piece, sent: int) -> None:
        piece.offset += sent
        piece.length -= sent
        self._pieces_bytes -= sent
        self._written_bytes += sent
        self._answered_bytes += sent
        self._server.answered_bytes += sent

    def _writable(self) -> None:
        if self._socket is not None:
            self._loop.remove_writer(self._socket.fileno())
            self.resume_writing()

    def _answer_shortly(self, transport: asyncio.Transport, event: page_wire.Event) -> None:
        match event:
            case page_wire.Ended():
                answer = page_wire.END
            case page_wire.ParentAsked():
                answer = page_wire.parent_exists(answer=False)
            case _:
                raise AssertionError(event)  # the rest is for who receives
        piece = _Piece(answer, 0, None, 0, last=False)
        piece.data = b""
        piece.ends = isinstance(event, page_wire.Ended)
        if self._pieces:
            self._pieces.append(piece)
        else:
            self._send(transport, piece, piece.data)

    def _send(self, transport: asyncio.Transport, piece: _Piece, data: Buffer) -> None:
        if self._server._ssl is not None and piece.header:
            # CRIU reads a header, then waits for the socket: what came in one TLS record with
            # the header lies inside its library and is never noticed.
            self._write(transport, [piece.header])
            self._write(transport, [data])
        else:
            self._write(transport, [piece.header, data] if piece.header else [data])
        if piece.ends:
            # It closes, once it has this; if it does not, we do.
            self._wait_for_it("does not close, though it is through,")

    def _count(self, piece: _Piece) -> None:
        self._answered += piece.last
        self._answered_bytes += piece.length
        self._server.answered += piece.last
        self._server.answered_bytes += piece.length

    def _end_read(self, piece: _Piece, read: asyncio.Task[Buffer]) -> None:
        piece.read = None
        if read.cancelled():
            piece.error = "the read was cancelled by its source"
        elif (error := read.exception()) is not None:
            if not isinstance(error, (UffdError, OSError)):
                log.error("a read for %s failed", self.peer, exc_info=error)
            piece.error = f"pages that it asked for could not be read: {error}"
        else:
            piece.data = read.result()
        if self._pieces and piece is self._pieces[0]:
            self._go_on_soon()

    def _settle(self, transport: asyncio.Transport) -> None:
        """Read on only if little is left over."""
        if transport.is_closing():
            return
        if (len(self._backlog) > _BACKLOG) == transport.is_reading():
            # Who is not read from cannot be seen to leave: a short backlog is read on.
            if transport.is_reading():
                transport.pause_reading()
            else:
                transport.resume_reading()


async def _read(source: Source, offset: int, length: int) -> Buffer:
    return await source.read(offset, length)


class PageServer(Peers):
    """Serves the pages of a checkpoint.

    ::

        async with (
            await Checkpoint.open("s3://checkpoints/web") as checkpoint,
            PageServer(checkpoint, port=7001) as server,
        ):
            await server.wait_closed()

    Attributes:
        port: Where it listens, once it does.
        header_bytes: What clients speak; None finds it out of each.
        answered: How many requests were answered.
        answered_bytes: How many bytes of pages that were.
        refused: How many clients were dropped for what they did, or for want of room.

    Sharing: the loop's thread.
    """

    _log = log

    def __init__(
        self,
        checkpoint: Checkpoint,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        ssl: ssl.SSLContext | None = None,
        client_name: str = "",
        header_bytes: int | None = None,
        limits: Limits | None = None,
        on_left: Callable[[Left], object] | None = None,
    ) -> None:
        """Prepare; nothing listens before ``async with``.

        Args:
            checkpoint: Whose pages; it stays the caller's to close.
            host: An address or a name of this machine.  Others than loopback only behind TLS, or
                on a network where everybody may read everything.
            port: 0 takes a free one.
            ssl: A server's context, as ``tls.server_context`` makes it; None is plain TCP.
            client_name: The name or address that a client's certificate has to be for; "" is
                any that the context lets in.
            header_bytes: See the attribute.
            limits: What clients may cost.
            on_left: Told of each client that had asked for something, and has left.
        """
        super().__init__(host, port, ssl=ssl, limits=limits, client_name=client_name)
        self.header_bytes = header_bytes
        self.answered = 0
        self.answered_bytes = 0
        self._checkpoint = checkpoint
        self._on_left = on_left
        self._tasks: dict[int, _Task] = {}

    def _peer(self, name: str) -> Peer:
        return _Connection(self, name)

    async def start(self) -> None:
        """Open the files of pages, and listen.

        Raises:
            OSError: The address cannot be had.
            SourceError: A file cannot be opened, or no process has pages in one.
        """
        checkpoint = self._checkpoint
        for task in checkpoint.tasks:
            if not task.dead:
                memory = checkpoint.memory(task.pid)
                sources = [await checkpoint.pages(file) for file in memory.files]
                files = (
                    _File(source, source if isinstance(source, SendsItself) else None)
                    for source in sources
                )
                self._tasks[task.pid] = _Task(memory, tuple(files))
        if self._tasks and not any(
            run.file >= 0 for task in self._tasks.values() for run in task.memory.runs
        ):
            raise SourceError(
                f"no page lies in a file of {checkpoint.location}: it was dumped with --lazy-pages,"
                " and only the dump that waits for its client has them"
            )
        await super().start()

    def _find(self, get: page_wire.Get) -> _Rest:
        """Say where pages are that are asked for.

        Raises:
            PeerError: There are none.
        """
        task = self._tasks.get(get.pid)
        if task is None:
            raise PeerError(
                f"asked for pages of process {get.pid}, which the checkpoint does not have"
            )
        return task.find(get)
