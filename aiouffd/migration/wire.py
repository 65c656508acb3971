"""The wire of a migration: frames over two streams of bytes, one for demand and one for bulk.

Knows: the bytes of both directions, their limits, what has been negotiated.
Must not know: sockets, the event loop, memory, who is at which stage.

Version 1; integers are big-endian, texts UTF-8.  docs/reference/migration-protocol.md has all of it
for who writes another implementation.

A connection begins on either side with a preamble (magic 8, newest version u16, oldest u16, CRC-32
of these u32), then there are frames only: 36 bytes of head, and a body.

=========== ====== ================================================================================
Field       Type   Meaning
=========== ====== ================================================================================
kind        u8     one of Kind
flags       u8     one or more of the FLAG_*
region      u16    a number of the hello's regions, or 0
length      u32    bytes of the body
number      u64    of the frame, or what the kind says
offset      u64    in the region, in bytes, or what the kind says
span        u32    bytes of memory that it is about, or what the kind says
body check  u32    CRC-32 of the body with FLAG_CHECKED, else 0
head check  u32    CRC-32 of the 32 bytes before
=========== ====== ================================================================================

Laws of this file:

* Nothing here makes a system call: bytes in, frames out, in pieces of any size.
* Nothing is allocated because a peer says so: the length of a body is checked against the limit
  of its kind before a byte of it is taken, and so is what it decompresses to.  A long body gets
  its room when some of it is there.
* Every frame about memory lies in a negotiated region and is made of its whole pages, or it is
  PeerError; whoever uses the frames need not look again.
* What was damaged on the way is DamagedFrame, always: but for bodies of PAGES and BATCH, which
  have a checksum only where both sides agreed on it.  Another version is UnknownVersion.  The
  decoder is of no use afterwards.
"""

from __future__ import annotations

import enum
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, TypeGuard

from ..errors import DamagedFrame, PeerError, UnknownVersion
from ..ranges import PAGE_SIZE, is_aligned, is_power_of_two

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC: Final = b"aiouffdM"
VERSION: Final = 1  #: the newest that we speak
OLDEST: Final = 1  #: the oldest

MAX_DATA: Final = 1 << 20  #: bytes of memory in one frame that carries them
MAX_RUNS: Final = 4096  #: in one frame
MAX_SPAN: Final = 1 << 30  #: bytes that one ZERO, or one run of MISSING, may be about
MAX_DEMANDS: Final = 4096  #: that may wait at the source
MAX_REGIONS: Final = 1024
MAX_FEATURES: Final = 64  #: that may be offered, of MAX_NAME characters each
MAX_NAME: Final = 255  #: bytes of a region's
MAX_TEXT: Final = 1024  #: characters of an error's text, and of a program's name
MAX_EPOCH: Final = (1 << 63) - 1
MAX_TOKEN: Final = 64  #: characters
_MAX_JSON: Final = 64 << 10
_MAX_HELLO: Final = 1 << 20
MAX_PAGE: Final = 1 << 20  #: bytes; a frame has at least one

FLAG_CHECKED: Final = 1  #: the body has a checksum; of PAGES and BATCH only if agreed on
FLAG_ZSTD: Final = 2  #: the body is one zstd frame
FLAG_LZ4: Final = 4  #: the body is one lz4 block

#: Ways to make bodies smaller, by the name under which they are negotiated.
COMPRESSION: Final = {"zstd": FLAG_ZSTD, "lz4": FLAG_LZ4}
CHECKSUMS: Final = "checksums"  #: another feature: bodies of memory have checksums, too

_PREAMBLE: Final = struct.Struct(">8sHH")
_HEAD: Final = struct.Struct(">BBHIQQII")
_CHECK: Final = struct.Struct(">I")
_RUN: Final = struct.Struct(">QI")
HEAD_BYTES: Final = _HEAD.size + _CHECK.size
RUN_BYTES: Final = _RUN.size  #: of a table in a body
PREAMBLE_BYTES: Final = _PREAMBLE.size + _CHECK.size

_TLS_RECORDS: Final = (b"\x15", b"\x16")  # what TLS begins with: an alert, or a handshake
_BUFFER_BYTES: Final = 64 << 10  # what arrives is taken in these, but for long bodies
_MUCH: Final = 32 << 10  # bytes of a long body that are there before there is room for all of it


def preamble(newest: int, oldest: int) -> bytes:
    """Make what a connection begins with, for who speaks these versions."""
    begin = _PREAMBLE.pack(MAGIC, newest, oldest)
    return begin + _CHECK.pack(zlib.crc32(begin))


PREAMBLE: Final = preamble(VERSION, OLDEST)  #: ours


class Kind(enum.IntEnum):
    """What a frame is.  S is the source, D the destination."""

    HELLO = 1  #: S: JSON; the first frame of a connection
    WELCOME = 2  #: D: JSON; the answer
    ERROR = 3  #: either: JSON; the last frame
    PAGES = 4  #: S: the bytes of one run; number: of the frame
    BATCH = 5  #: S: a table of runs, then their bytes; span: how many; number: of the frame
    ZERO = 6  #: S: a run of zeros; number: of the frame
    MISSING = (
        7  #: S: a table of runs that follow after the switch; span: how many; number: as above
    )
    STATE = 8  #: S: a part of the state; offset: where in it, span: how long it is in all
    SWITCH = 9  #: S: all before it is there: run; number: of the frame
    RUNNING = 10  #: D: it runs; JSON
    DEMAND = 11  #: D: a run is waited for; number: priority, the higher the sooner
    ACK = 12  #: D: the frames of this connection up to ``number`` have landed
    PROGRESS = 13  #: either: JSON; for people
    DONE = 14  #: D: all is there; JSON
    END = 15  #: S: it has let go; JSON
    CANCEL = 16  #: S: forget it; the source runs on
    PING = 17  #: either: still here


_JSON: Final = frozenset(
    (*(Kind.HELLO, Kind.WELCOME, Kind.ERROR, Kind.RUNNING), Kind.PROGRESS, Kind.DONE, Kind.END)
)
#: Those about memory: their region, offset and span, or each of their runs, lie inside.
_PLACED: Final = frozenset((Kind.PAGES, Kind.ZERO, Kind.DEMAND))
_TABLES: Final = frozenset((Kind.BATCH, Kind.MISSING))
_MEMORY: Final = frozenset((Kind.PAGES, Kind.BATCH))
#: How many bytes a body may have.
LIMITS: Final = {
    **dict.fromkeys(Kind, 0),
    **dict.fromkeys(_JSON, _MAX_JSON),
    Kind.HELLO: _MAX_HELLO,
    Kind.PAGES: MAX_DATA,
    Kind.BATCH: MAX_DATA + MAX_RUNS * _RUN.size,
    Kind.MISSING: MAX_RUNS * _RUN.size,
    Kind.STATE: MAX_DATA,
}
#: Who may send what.
FROM_SOURCE: Final = frozenset(
    (
        *(Kind.HELLO, Kind.ERROR, Kind.PAGES, Kind.BATCH, Kind.ZERO, Kind.MISSING, Kind.STATE),
        *(Kind.SWITCH, Kind.PROGRESS, Kind.END, Kind.CANCEL, Kind.PING),
    )
)
FROM_DESTINATION: Final = frozenset(
    (
        *(Kind.WELCOME, Kind.ERROR, Kind.RUNNING, Kind.DEMAND, Kind.ACK, Kind.PROGRESS),
        *(Kind.DONE, Kind.PING),
    )
)


class Role(enum.Enum):
    """What a connection is for."""

    DEMAND = "demand"  #: what a thread waits for, and what must not stand in line
    BULK = "bulk"  #: everything else, in order


class Extent(NamedTuple):
    """A region, as it is negotiated."""

    name: str
    length: int  #: in bytes
    page_size: int  #: in bytes; frames about it are made of whole pages

    @classmethod
    def checked(cls, name: object, length: object, page_size: object) -> Extent:
        """Take one from a peer.

        Raises:
            PeerError: It is no region.
        """
        if (
            not isinstance(name, str)
            or not name.isprintable()
            or len(name.encode(errors="replace")) > MAX_NAME
        ):
            raise PeerError(
                f"named a region {str(name)[:80]!r}; a name has at most {MAX_NAME} bytes, all of"
                " which can be shown"
            )
        if not isinstance(page_size, int) or not (
            PAGE_SIZE <= page_size <= MAX_PAGE and is_power_of_two(page_size)
        ):
            raise PeerError(f"gave region {name!r} a page size of {page_size!r}")
        if (
            not isinstance(length, int)
            or not 0 < length < 1 << 56
            or not is_aligned(length, page_size)
        ):
            raise PeerError(f"gave region {name!r} a length of {length!r}: no whole pages")
        return cls(name, length, page_size)


class Head(NamedTuple):
    """The head of a frame whose body is still to come."""

    kind: Kind
    flags: int
    region: int
    length: int
    number: int
    offset: int
    span: int


class Frame(NamedTuple):
    """One frame.

    Attributes:
        body: What came, decompressed; of a frame that was placed the place itself.  It is valid
            until the next bytes are received.
        placed: The body lies where ``place`` said.
    """

    kind: Kind
    region: int
    number: int
    offset: int
    span: int
    body: Buffer
    placed: bool = False

    def json(self) -> dict[str, Any]:
        """Read the body of a kind that has JSON.

        Raises:
            PeerError: It is none, or no object.
        """
        try:
            value = json.loads(bytes(self.body).decode()) if memoryview(self.body) else {}
        except (ValueError, RecursionError) as error:
            raise PeerError(f"sent a {self.kind.name} that is no JSON: {error}") from error
        if not isinstance(value, dict):
            raise PeerError(f"sent a {self.kind.name} that is no JSON object")
        return value

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Give (offset in the region, length, offset in the body) of each run of a table."""
        at = self.span * RUN_BYTES
        for offset, length in _RUN.iter_unpack(memoryview(self.body)[:at]):
            yield offset, length, at
            at += length


#: Where the body of a PAGES frame may go directly: as many bytes, or None for a buffer of ours.
Place: TypeAlias = Callable[[Head], memoryview | None]
#: Of a frame.
Part: TypeAlias = "bytes | bytearray | memoryview"
#: Makes a body small, or gives None; or the bytes again, of so many at most.
Compress: TypeAlias = Callable[[bytes], bytes | None]
Decompress: TypeAlias = "Callable[[Buffer, int], Buffer]"


class Encoder:
    """Makes frames, of one connection.

    Sharing: none needed.
    """

    def __init__(self) -> None:
        self.checked = False  #: bodies of memory get a checksum, too
        self._compress: Compress | None = None
        self._flag = 0

    def compress_by(self, name: str, compress: Compress) -> None:
        """Make bodies of memory smaller from now on.

        Args:
            name: One of COMPRESSION.
            compress: Returns None where it would not pay.
        """
        self._flag, self._compress = COMPRESSION[name], compress

    @property
    def takes_what_changes(self) -> bool:
        """Whether a body may change while it is sent: nothing is computed of it."""
        return not self.checked and self._compress is None

    def frame(
        self,
        kind: Kind,
        body: Part = b"",
        *,
        region: int = 0,
        number: int = 0,
        offset: int = 0,
        span: int = 0,
    ) -> list[Part]:
        """Make a frame: its parts, to be sent one behind the other.

        Raises:
            ValueError: The body is longer than the other side may take.
        """
        flags = 0
        length = len(body)
        if length > LIMITS[kind]:
            raise ValueError(f"a {kind.name} has at most {LIMITS[kind]} bytes; here are {length}")
        if self._compress is not None and length and kind in _MEMORY:
            small = self._compress(bytes(body))
            if small is not None and len(small) < length:
                body, length, flags = small, len(small), self._flag
        check = 0
        if length and (self.checked or kind not in _MEMORY):
            flags |= FLAG_CHECKED
            check = zlib.crc32(body)
        head = _HEAD.pack(kind, flags, region, length, number, offset, span, check)
        head += _CHECK.pack(zlib.crc32(head))
        return [head, body] if length else [head]

    def json(self, kind: Kind, value: dict[str, Any], *, number: int = 0) -> bytes:
        """Make a frame whose body is JSON."""
        return b"".join(self.frame(kind, json.dumps(value).encode(), number=number))


def table(runs: Iterable[tuple[int, int]]) -> bytes:
    """Make the table of some (offset, length) runs, at most MAX_RUNS."""
    return b"".join(_RUN.pack(offset, length) for offset, length in runs)


class Decoder:
    """Takes in one connection's bytes.

    ::

        while data := connection.recv_into(decoder.get_buffer()):
            for frame in decoder.received(data):
                ...

    Attributes:
        regions: What was negotiated; frames about memory are refused before.
        place: Where bodies of PAGES go.
        checked: Bodies of memory must have a checksum, as all others must.
        version: What the other side speaks and we do; 0 until its preamble is there.

    Sharing: none needed; it waits for nothing.
    """

    def __init__(self, *, from_source: bool) -> None:
        """Begin with the preamble.

        Args:
            from_source: Whether the other side is the source; each has its own kinds.
        """
        self.regions: Sequence[Extent] = ()
        self.place: Place | None = None
        self.checked = False
        self.version = 0
        self._kinds = FROM_SOURCE if from_source else FROM_DESTINATION
        self._decompress: dict[int, Decompress] = {}
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._filled = 0  # bytes of the buffer that were received and not used
        self._head: Head | None = None  # of the body that comes
        self._check = 0  # of that body
        self._body: memoryview | None = None
        self._body_filled = 0
        self._placed = False

    def decompress_by(self, name: str, decompress: Decompress) -> None:
        """Understand one way to make bodies smaller; others are refused.

        Args:
            name: One of COMPRESSION.
            decompress: Takes a body and the most bytes it may become; ValueError if it cannot.
        """
        self._decompress[COMPRESSION[name]] = decompress

    def get_buffer(self) -> memoryview:
        """Say where the next bytes go; at least one fits."""
        if self._body is not None:
            return self._body[self._body_filled :]
        return self._view[self._filled :]

    def feed(self, data: Buffer) -> Iterator[Frame]:
        """Take in bytes that lie elsewhere; each frame is to be used before the next is taken."""
        view = memoryview(data).cast("B")
        while view:
            into = self.get_buffer()
            taken = min(len(into), len(view))
            into[:taken] = view[:taken]
            view = view[taken:]
            yield from self.received(taken)

    def received(self, count: int) -> Iterator[Frame]:
        """Take note that so many bytes are in the buffer that ``get_buffer`` gave.

        Each frame is to be used before the next one is taken, and all before more is received.

        Raises:
            UnknownVersion: The other side speaks no version that we do.
            DamagedFrame: Bytes were changed on the way.
            PeerError: It broke the protocol.
        """
        if self._body is not None:
            self._body_filled += count
            if self._body_filled == len(self._body) and self._has_all():
                yield self._finish()
            return
        self._filled += count
        at = 0
        if not self.version:
            at = self._take_preamble()
        while self.version:
            left = self._filled - at
            if left < HEAD_BYTES:
                break
            head = self._take_head(at)
            at += HEAD_BYTES
            left -= HEAD_BYTES
            self._head = head
            body = self._place(head)
            # A short body that is here in full, as nearly all are, is used where it lies.
            if body is None and head.length <= left:
                self._body = self._view[at : at + head.length]
                at += head.length
                yield self._finish()
                continue
            taken = min(head.length, left)
            if body is None:
                room = head.length if taken >= _MUCH else min(head.length, _BUFFER_BYTES)
                body = memoryview(bytearray(room))
            self._body = body
            self._body[:taken] = self._view[at : at + taken]
            at += taken
            self._body_filled = taken
            if taken < head.length:
                break
            yield self._finish()
        rest = self._filled - at
        if at and rest:
            self._buffer[:rest] = self._buffer[at : self._filled]
        self._filled = rest

    def _take_preamble(self) -> int:
        magic = bytes(self._view[: min(self._filled, len(MAGIC))])
        if not MAGIC.startswith(magic):
            what = f": it began with {magic!r}"
            if magic[:1] in _TLS_RECORDS and magic[1:2] in {b"", b"\x03"}:
                what = ", but TLS, which this side was not told to speak"
            raise PeerError(f"does not speak this protocol{what}")
        if self._filled < PREAMBLE_BYTES:
            return 0
        _, newest, oldest = _PREAMBLE.unpack_from(self._buffer)
        (check,) = _CHECK.unpack_from(self._buffer, _PREAMBLE.size)
        if zlib.crc32(self._view[: _PREAMBLE.size]) != check:
            raise DamagedFrame("began with a preamble that was damaged on the way")
        if newest < OLDEST or oldest > VERSION or oldest > newest:
            raise UnknownVersion(
                f"speaks versions {oldest} to {newest} of the protocol; we speak {OLDEST} to"
                f" {VERSION}"
            )
        self.version = min(newest, VERSION)
        return PREAMBLE_BYTES

    def _take_head(self, at: int) -> Head:
        (check,) = _CHECK.unpack_from(self._buffer, at + _HEAD.size)
        if zlib.crc32(self._view[at : at + _HEAD.size]) != check:
            raise DamagedFrame("sent a frame whose head was damaged on the way")
        number, flags, region, length, *rest, self._check = _HEAD.unpack_from(self._buffer, at)
        try:
            kind = Kind(number)
        except ValueError:
            raise PeerError(f"sent a frame of the unknown kind {number}") from None
        if kind not in self._kinds:
            raise PeerError(f"sent a {kind.name}, which is for us to send")
        head = Head(kind, flags, region, length, *rest)
        if length > LIMITS[kind]:
            raise PeerError(
                f"sent a {kind.name} of {length} bytes; {LIMITS[kind]} are the most of its kind"
            )
        if flags & ~(FLAG_CHECKED | FLAG_ZSTD | FLAG_LZ4):
            raise PeerError(f"sent a {kind.name} with the unknown flags {flags:#x}")
        packed = flags & ~FLAG_CHECKED
        if packed and (packed not in self._decompress or kind not in _MEMORY):
            raise PeerError(f"compressed a {kind.name}, which was not agreed on")
        if length and not flags & FLAG_CHECKED and (self.checked or kind not in _MEMORY):
            raise PeerError(f"sent a {kind.name} without its checksum")
        if kind in _PLACED:
            most = MAX_SPAN if kind is Kind.ZERO else MAX_DATA
            self._check_run(kind, region, head.offset, head.span, most)
            if kind is Kind.PAGES and not packed and length != head.span:
                raise PeerError(f"sent {length} bytes for {head.span} bytes of memory")
        elif kind in _TABLES:
            if not 0 < head.span <= MAX_RUNS:
                raise PeerError(f"sent a {kind.name} of {head.span} runs; 1 to {MAX_RUNS} may be")
            self._region(kind, region)
        return head

    def _region(self, kind: Kind, number: int) -> Extent:
        if number >= len(self.regions):
            raise PeerError(
                f"sent a {kind.name} about region {number}; {len(self.regions)} were agreed on"
            )
        return self.regions[number]

    def _check_run(self, kind: Kind, region: int, offset: int, length: int, most: int) -> None:
        extent = self._region(kind, region)
        if not 0 < length <= most:
            raise PeerError(f"sent a {kind.name} about {length} bytes; 1 to {most} may be")
        if not (is_aligned(offset, extent.page_size) and is_aligned(length, extent.page_size)):
            raise PeerError(
                f"sent a {kind.name} about {length} bytes at offset {offset} of region {region}:"
                f" no whole pages of {extent.page_size} bytes"
            )
        if offset + length > extent.length:
            raise PeerError(
                f"sent a {kind.name} about {length} bytes at offset {offset} of region {region},"
                f" behind its end ({extent.length})"
            )

    def _place(self, head: Head) -> memoryview | None:
        if head.kind is not Kind.PAGES or head.flags & ~FLAG_CHECKED or self.place is None:
            self._placed = False
            return None
        place = self.place(head)
        self._placed = place is not None
        return place

    def _has_all(self) -> bool:
        """Say whether a body that has filled its room is complete; if not, give it all of it."""
        head, body = self._head, self._body
        assert head is not None and body is not None  # noqa: S101, PT018 - both were set together
        if len(body) == head.length:
            return True
        self._body = memoryview(bytearray(head.length))
        self._body[: len(body)] = body
        return False

    def _finish(self) -> Frame:
        """Make a frame of the head and its body, which is complete."""
        head, body = self._head, self._body
        assert head is not None and body is not None  # noqa: S101, PT018 - both were set together
        self._head = self._body = None
        kind, flags, region, _, number, offset, span = head
        if flags & FLAG_CHECKED and zlib.crc32(body) != self._check:
            raise DamagedFrame(f"sent a {kind.name} whose body was damaged on the way")
        packed = flags & ~FLAG_CHECKED
        if packed:
            body = self._unpack(head, packed, body)
        if kind in _TABLES:
            self._check_table(kind, region, span, body)
        return Frame(kind, region, number, offset, span, body, self._placed)

    def _unpack(self, head: Head, packed: int, body: memoryview) -> memoryview:
        wanted = head.span if head.kind is Kind.PAGES else LIMITS[head.kind]
        try:
            data = memoryview(self._decompress[packed](body, wanted))
        except ValueError as error:
            raise DamagedFrame(
                f"sent a {head.kind.name} that cannot be decompressed: {error}"
            ) from error
        if len(data) > wanted or (head.kind is Kind.PAGES and len(data) != wanted):
            raise DamagedFrame(f"sent a {head.kind.name} that decompresses to {len(data)} bytes")
        return data

    def _check_table(self, kind: Kind, region: int, count: int, body: memoryview) -> None:
        size = count * RUN_BYTES
        if len(body) < size:
            raise PeerError(f"sent a {kind.name} of {count} runs in {len(body)} bytes")
        most = MAX_DATA if kind is Kind.BATCH else MAX_SPAN
        total = end = 0
        for offset, length in _RUN.iter_unpack(body[:size]):
            self._check_run(kind, region, offset, length, most)
            if offset < end:
                raise PeerError(
                    f"sent a {kind.name} whose run at offset {offset} comes behind one that ends"
                    f" at {end}"
                )
            end = offset + length
            total += length
        wanted = size + (total if kind is Kind.BATCH else 0)
        if len(body) != wanted:
            raise PeerError(f"sent a {kind.name} of {len(body)} bytes whose runs make {wanted}")


def extents_of(value: object, most_bytes: int) -> list[Extent]:
    """Take the regions out of a hello.

    Args:
        value: What stands there.
        most_bytes: That all together may have.

    Raises:
        PeerError: They are none, too many, too large, or two have one name.
    """
    if not isinstance(value, list) or len(value) > MAX_REGIONS:
        raise PeerError(f"sent a hello without a list of at most {MAX_REGIONS} regions")
    regions = []
    for each in value:
        if not isinstance(each, dict):
            raise PeerError("sent a hello with a region that is no JSON object")
        regions.append(Extent.checked(each.get("name"), each.get("length"), each.get("page_size")))
    if len({each.name for each in regions}) < len(regions):
        raise PeerError("sent a hello with two regions of one name")
    total = sum(each.length for each in regions)
    if total > most_bytes:
        raise PeerError(f"wants to bring {total} bytes of memory; {most_bytes} are allowed")
    return regions


def are_features(value: object) -> TypeGuard[list[str]]:
    """Say whether it is a list of names, known or not, as a hello and a welcome have one."""
    return (
        isinstance(value, list)
        and len(value) <= MAX_FEATURES
        and all(isinstance(each, str) and len(each) <= MAX_NAME for each in value)
    )


def text_of(value: object) -> str:
    """Take a text that ends up in messages to people: nothing in it moves a cursor."""
    text = value[:MAX_TEXT] if isinstance(value, str) else ""
    return "".join(each if each.isprintable() else "?" for each in text)
