"""The wire between aiouffd servers: stretches of an image, over any stream of bytes.

Knows: the bytes of both directions, and their limits.
Must not know: sockets, the event loop, sources.

Version 1; integers are big-endian, texts UTF-8.

======== ========= ===========================================================================
Sender   Message   Fields
======== ========= ===========================================================================
reader   greeting  magic (8, ``aiouffd`` and LF), version u16, length of the name u16, name
holder   hello     magic (8), version u16, refused u16, granularity u32, size u64,
                   extents u32, length of the text u32, text
reader   request   id u64, offset u64, length u32, kind u32
holder   answer    id u64, length u32, status u32, bytes
======== ========= ===========================================================================

The hello's text is the image's identity or, if ``refused`` is 1, the reason.  Kind 0 asks for
bytes of the image, kind 1 for bytes of the table of its extents: (offset u64, length u64) each.
Status 0 brings exactly the bytes asked for, status 1 a text that says why there are none.

Laws of this file:

* Neither class makes a system call: bytes in, messages out, in pieces of any size.
* Requests may be sent before earlier ones are answered, and answers come in any order.
* Nothing is allocated because a peer says so: a length is checked against what was asked for,
  or against a limit, before a byte of the body is taken.
* What breaks the protocol is PeerError, which says what was wrong; the parser is of no use
  afterwards.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import PeerError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC: Final = b"aiouffd\n"
VERSION: Final = 1

MAX_LENGTH: Final = 2 << 20  # bytes per request
MAX_TEXT: Final = 1024  # bytes of a name, an identity or a reason
MAX_EXTENTS: Final = 1 << 20
_PAGE_SIZES: Final = (4096, 1 << 30)

READ: Final = 0
EXTENTS: Final = 1

_OK: Final = 0
_FAILED: Final = 1

_GREETING: Final = struct.Struct(">8sHH")
_HELLO: Final = struct.Struct(">8sHHIQII")
_REQUEST: Final = struct.Struct(">QQII")
_ANSWER: Final = struct.Struct(">QII")
_EXTENT: Final = struct.Struct(">QQ")


class Hello(NamedTuple):
    """What the holder says about the image.

    Attributes:
        size: In bytes.
        identity: Which generation of which bytes.
        granularity: In what units the holder brings them, in bytes.
        extents: How many there are.
    """

    size: int
    identity: str
    granularity: int
    extents: int


class Request(NamedTuple):
    """One request, which lies inside of the image (READ) or of the table (EXTENTS)."""

    id: int
    offset: int
    length: int
    kind: int


class Answer(NamedTuple):
    """One answer.

    Attributes:
        id: The request's.
        data: The bytes; meaningless if there is an error.
        error: Why there are none, or "".
    """

    id: int
    data: Buffer
    error: str


class Reader:
    """One connection, seen by the side that asks.

    Attributes:
        hello: What the holder has said; None until then.

    Sharing: none needed; it waits for nothing.
    """

    def __init__(self, name: str = "") -> None:
        """Prepare to ask.

        Args:
            name: Of the image; "" is the only one.

        Raises:
            ValueError: The name is too long.
        """
        if len(name.encode()) > MAX_TEXT:
            raise ValueError(f"the name of an image has at most {MAX_TEXT} bytes")
        self.hello: Hello | None = None
        self._name = name.encode()
        self._head = bytearray()  # of a message whose head is incomplete
        self._lengths: dict[int, int] = {}  # of what was asked for and is not answered, by id
        self._next = 0
        self._id = 0  # the answer that is coming
        self._ok = False
        self._body: bytearray | None = None
        self._filled = 0

    def greeting(self) -> bytes:
        """Give the first bytes to send; nothing may follow until ``hello`` is there."""
        return _GREETING.pack(MAGIC, VERSION, len(self._name)) + self._name

    def request(self, offset: int, length: int, kind: int = READ) -> tuple[int, bytes]:
        """Make a request that lies inside and has at most MAX_LENGTH bytes.

        Returns:
            Its id, and the bytes to send.
        """
        number = self._next
        self._next += 1
        self._lengths[number] = length
        return number, _REQUEST.pack(number, offset, length, kind)

    def feed(self, data: Buffer) -> list[Answer]:
        """Take in what came.

        Raises:
            PeerError: The holder refused, or broke the protocol.
        """
        view = memoryview(data)
        at = 0
        if self.hello is None:
            at = self._take_hello(view)
            if self.hello is None:
                return []
        answers: list[Answer] = []
        end = len(view)
        while at < end:
            body = self._body
            if body is not None:
                taken = min(end - at, len(body) - self._filled)
                body[self._filled : self._filled + taken] = view[at : at + taken]
                self._filled += taken
                at += taken
                if self._filled == len(body):
                    self._body = None
                    answers.append(self._answer(body))
                continue
            if self._head or end - at < _ANSWER.size:
                at = self._take_head(view, at, _ANSWER.size)
                if len(self._head) < _ANSWER.size:
                    break
                length = self._begin(*_ANSWER.unpack(self._head))
                self._head.clear()
            else:
                length = self._begin(*_ANSWER.unpack_from(view, at))
                at += _ANSWER.size
            if length <= end - at:  # whole, as an answer of a page nearly always is
                answers.append(self._answer(bytes(view[at : at + length])))
                at += length
            else:
                self._body, self._filled = bytearray(length), 0
        return answers

    def _take_head(self, view: memoryview, at: int, size: int) -> int:
        taken = min(max(0, size - len(self._head)), len(view) - at)
        self._head += view[at : at + taken]
        return at + taken

    def _begin(self, number: int, length: int, status: int) -> int:
        """Check the head of an answer; give the length of its body."""
        wanted = self._lengths.pop(number, None)
        if wanted is None:
            raise PeerError(f"answered request {number}, which was not asked or was answered")
        if status == _OK:
            if length != wanted:
                raise PeerError(f"answered {length} bytes where {wanted} were asked for")
        elif status != _FAILED:
            raise PeerError(f"gave the unknown status {status}")
        elif length > MAX_TEXT:
            raise PeerError(f"gave a reason of {length} bytes; {MAX_TEXT} are allowed")
        self._id, self._ok = number, status == _OK
        return length

    def _answer(self, body: Buffer) -> Answer:
        return Answer(self._id, body, "" if self._ok else _text(body) or "no reason given")

    def _take_hello(self, view: memoryview) -> int:
        head = self._head
        at = self._take_head(view, 0, _HELLO.size)
        _check_magic(head)
        if len(head) < _HELLO.size:
            return at
        _, version, refused, granularity, size, extents, length = _HELLO.unpack_from(head)
        if length > MAX_TEXT:
            raise PeerError(f"gave a hello with {length} bytes of text; {MAX_TEXT} are allowed")
        at = self._take_head(view, at, _HELLO.size + length)
        if len(head) < _HELLO.size + length:
            return at
        text = _text(head[_HELLO.size :])
        if refused:
            raise PeerError(f"refused us: {text or 'no reason given'}")
        if version != VERSION:
            raise PeerError(f"speaks version {version} of the protocol; we speak {VERSION}")
        if size >= 1 << 63:
            raise PeerError(f"holds an image of {size} bytes, more than a machine can address")
        if not (_PAGE_SIZES[0] <= granularity <= _PAGE_SIZES[1]) or granularity & granularity - 1:
            raise PeerError(f"has a granularity of {granularity} bytes, which no page has")
        if extents > min(size, MAX_EXTENTS):
            raise PeerError(f"has {extents} extents in {size} bytes")
        head.clear()
        self.hello = Hello(size, text, granularity, extents)
        return at


class Holder:
    """One connection, seen by the side that has the image.

    Attributes:
        name: Of the image that the reader wants; None until it has said so.

    Sharing: none needed; it waits for nothing.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._head = bytearray()
        self._limits = (0, 0)  # end of the image, and of the table of extents

    def feed(self, data: Buffer) -> list[Request]:
        """Take in what came; once ``name`` is there, answer it by ``hello`` or ``refuse``.

        Raises:
            PeerError: The reader broke the protocol.
        """
        head = self._head
        head += data
        if self.name is None:
            self._take_greeting()
            return []
        whole = len(head) - len(head) % _REQUEST.size
        requests: list[Request] = []
        for number, offset, length, kind in _REQUEST.iter_unpack(bytes(head[:whole])):
            if kind > EXTENTS:
                raise PeerError(f"made a request of the unknown kind {kind}")
            if not 0 < length <= MAX_LENGTH:
                raise PeerError(f"asked for {length} bytes; 1 to {MAX_LENGTH} are allowed")
            if offset + length > self._limits[kind]:
                raise PeerError(
                    f"asked for {length} bytes at offset {offset}, behind the end"
                    f" ({self._limits[kind]})"
                )
            requests.append(Request(number, offset, length, kind))
        del head[:whole]
        return requests

    def _take_greeting(self) -> None:
        head = self._head
        _check_magic(head)
        if len(head) < _GREETING.size:
            return
        _, version, length = _GREETING.unpack_from(head)
        if version != VERSION:
            raise PeerError(f"speaks version {version} of the protocol; we speak {VERSION}")
        if length > MAX_TEXT:
            raise PeerError(f"gave a name of {length} bytes; {MAX_TEXT} are allowed")
        end = _GREETING.size + length
        if len(head) < end:
            return
        if len(head) > end:
            raise PeerError("went on before it was answered")
        try:
            self.name = head[_GREETING.size :].decode()
        except UnicodeDecodeError as error:
            raise PeerError("gave a name that is no UTF-8") from error
        head.clear()

    def hello(self, hello: Hello) -> bytes:
        """Say what the image is; requests that lie inside of it are taken from now on."""
        self._limits = (hello.size, hello.extents * _EXTENT.size)
        text = _bytes(hello.identity)
        return (
            _HELLO.pack(
                *(MAGIC, VERSION, 0, hello.granularity, hello.size, hello.extents, len(text))
            )
            + text
        )

    @staticmethod
    def refuse(reason: str) -> bytes:
        """Say why there is nothing to be had; close the connection behind it."""
        text = _bytes(reason)
        return _HELLO.pack(MAGIC, VERSION, 1, 0, 0, 0, len(text)) + text

    @staticmethod
    def answer(number: int, length: int) -> bytes:
        """Make the head of an answer; the bytes follow it."""
        return _ANSWER.pack(number, length, _OK)

    @staticmethod
    def failure(number: int, reason: str) -> bytes:
        """Make an answer that says why there are no bytes."""
        text = _bytes(reason)
        return _ANSWER.pack(number, len(text), _FAILED) + text


def pack_extents(extents: Iterator[tuple[int, int]], size: int) -> bytes:
    """Make the table of the extents; more than MAX_EXTENTS become one that covers the rest.

    Args:
        extents: (offset, length) pairs, in order and disjoint.
        size: Of the image, in bytes.
    """
    table = bytearray()
    for number, (offset, length) in enumerate(extents, 1):
        if number == MAX_EXTENTS:
            table += _EXTENT.pack(offset, size - offset)
            break
        table += _EXTENT.pack(offset, length)
    return bytes(table)


def unpack_extents(table: Buffer, size: int) -> Iterator[tuple[int, int]]:
    """Read the table of the extents.

    Raises:
        PeerError: They are not in order, not disjoint, or not inside of the image.
    """
    last = 0
    for offset, length in _EXTENT.iter_unpack(table):
        if not last <= offset < offset + length <= size:
            raise PeerError(f"has an extent of {length} bytes at offset {offset}: out of place")
        last = offset + length
        yield offset, length


def table_length(extents: int) -> int:
    """Give the length of the table of so many extents, in bytes."""
    return extents * _EXTENT.size


def _check_magic(head: bytearray) -> None:
    """Refuse a stranger at its first wrong byte."""
    if not MAGIC.startswith(head[: len(MAGIC)]):
        raise PeerError(f"does not speak this protocol: it began with {bytes(head[:16])!r}")


def _bytes(text: str) -> bytes:
    return text.encode(errors="replace")[:MAX_TEXT]


def _text(data: Buffer) -> str:
    """Read a text that ends up in messages to people: nothing in it moves a cursor."""
    text = bytes(data).decode(errors="replace")
    return "".join(each if each.isprintable() else "?" for each in text)
