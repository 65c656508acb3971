"""CRIU's page-server protocol: pages asked for, or pushed, over any stream of bytes.

Knows: the bytes of both directions, which of the two layouts they have, what may follow what.
Must not know: sockets, the event loop, files, where pages lie.

Little-endian; no greeting, no version.  A header, in one of two sizes:

===== ====================================================== ============================
bytes fields                                                 spoken by
===== ====================================================== ============================
24    command u32, pages u32, address u64, id u64            CRIU up to 4.1
32    command u32, 4 unused, pages u64, address u64, id u64  CRIU from 4.2 on
===== ====================================================== ============================

The upper half of the command are flags of the pages.  Who connects either pulls or pushes:

================= ====== ========================== ===========================================
command           value  id                         answer
================= ====== ========================== ===========================================
GET               7      pid                        ADD_F of at most as many pages, then they
OPEN2             4      image                      one byte: is there a parent image?
OPEN              3      image                      none (older)
PARENT            5      image                      i32: is there a parent image?
ADD_F             6      image                      none; the pages follow if they are PRESENT
ADD, HOLE         1, 2   image                      as ADD_F with PRESENT, with PARENT (older)
CLOSE,            0x1023                            i32: 0
FORCE_CLOSE       0x1024                            i32: 0
================= ====== ========================== ===========================================

An image is a number and, in the lowest byte, what it is of: a task (1) or shared memory (2).

Laws of this file:

* No class makes a system call: bytes in, events and bytes to send out, in pieces of any size.
* Nothing is allocated because a peer says so: answers have the size that was asked for, pushed
  pages are passed on as they come.
* Answers come in the order of the requests and are checked against them.
* What breaks the protocol is PeerError, which says what was wrong; the machine is of no use
  afterwards.
"""

from __future__ import annotations

import struct
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from ...errors import PeerError
from ...ranges import PAGE_SIZE
from .images import PageFlag

if TYPE_CHECKING:
    from typing_extensions import Buffer

ADD: Final = 1
HOLE: Final = 2
OPEN: Final = 3
OPEN2: Final = 4
PARENT: Final = 5
ADD_F: Final = 6
GET: Final = 7
CLOSE: Final = 0x1023
FORCE_CLOSE: Final = 0x1024

#: The sizes of a header, in bytes: of CRIU up to 4.1, and from 4.2 on.
SHORT: Final = 24
LONG: Final = 32

#: Pages in one request: 4 GiB, a thousand times what CRIU asks for.
MAX_PAGES: Final = 1 << 20

_SHORT: Final = struct.Struct("<IIQQ")
_LONG: Final = struct.Struct("<I4xQQQ")
_PAIR: Final = struct.Struct("<QQ")
_STATUS: Final = struct.Struct("<i")

_COMMAND_MASK: Final = 0xFFFF
_FLAG_SHIFT: Final = 16
_TYPE_BITS: Final = 8
_PARENT: Final = int(PageFlag.PARENT)
_LAZY: Final = int(PageFlag.LAZY)
_PRESENT: Final = int(PageFlag.PRESENT)
_ALL_FLAGS: Final = _PARENT | _LAZY | _PRESENT
_PAGES_FOLLOW: Final = _PRESENT << _FLAG_SHIFT | ADD_F
_MOST_PID: Final = 1 << 22  # the kernel's PID_MAX_LIMIT
_MOST_ADDRESS: Final = 1 << 64

#: What may stand in the lowest byte of an image's id.  CRIU before 3.3 sent numbers of its own.
_TASK_TYPES: Final = frozenset({1, 10, 11, 16, 17})
_SHMEM_TYPES: Final = frozenset({2, 27, 28, 29, 32, 33, 34})

#: What follows how a header's size shows itself: which images are told by what.
_WITHOUT_PAGES: Final = frozenset({OPEN, OPEN2, PARENT})
_WITH_PAGES: Final = frozenset({ADD, HOLE, ADD_F})
_ENDS: Final = frozenset({CLOSE, FORCE_CLOSE})


def pack_header(size: int, command: int, pages: int = 0, address: int = 0, id_: int = 0) -> bytes:
    """Make a header.

    Args:
        size: SHORT or LONG.
        command: With the flags of pages in its upper half.
        pages: How many.
        address: Of the first.
        id_: A pid (GET and its answer) or an image.
    """
    return (_SHORT if size == SHORT else _LONG).pack(command, pages, address, id_)


# --- what pulls ------------------------------------------------------------------------


class Pages(NamedTuple):
    """An answer: pages, as many as were asked for or fewer.

    Attributes:
        pid: Whose.
        address: Of the first.
        data: Whole pages.
    """

    pid: int
    address: int
    data: Buffer


class Closed(NamedTuple):
    """The other side has taken note of the end.

    Attributes:
        status: 0 if all is well.
    """

    status: int


class _Asked(NamedTuple):
    """A request without an answer."""

    pid: int
    address: int
    pages: int
    into: memoryview | None


class Puller:
    """One connection, seen by the side that asks for pages.

    The stock server takes any end of a connection for a good one, also that of a client that has
    died, unless it is in the middle of a header: ``criu dump --lazy-pages`` then kills the tasks
    whose memory nobody has any more.  So, once ``guard`` was called, the first byte of the next
    request is sent with each request.  (Every request begins with the same byte; to end, one page
    is asked for once more.)  Over TLS a death shows itself, and CRIU does not take half headers
    there.

    Attributes:
        header_bytes: SHORT or LONG, as the server speaks.

    Sharing: none needed; it waits for nothing.
    """

    def __init__(self, header_bytes: int) -> None:
        self.header_bytes = header_bytes
        self._unpack = (_SHORT if header_bytes == SHORT else _LONG).unpack
        self._asked: deque[_Asked | None] = deque()  # None: the end
        self._head = bytearray()
        self._body: memoryview | None = None
        self._filled = 0
        self._begun = (0, 0)  # pid and address of the answer that is coming
        self._guard: tuple[int, int] | None = None
        self._ended = False

    @staticmethod
    def probe() -> tuple[bytes, bytes]:
        """Give what finds out which headers a server speaks, before anything else is asked.

        It is a question for a parent image, to which every server says something, in four bytes.
        The first part is all of it for one with short headers; one with long headers answers
        nothing until it has the second part, too.  One with short headers that was sent the
        second part, because it was slow, finds an unknown command and ends.  Not for TLS.
        """
        image = 1 << _TYPE_BITS | 1
        return pack_header(SHORT, PARENT, 0, 0, image), image.to_bytes(8, "little")

    @property
    def unanswered(self) -> int:
        """How many requests have no whole answer yet."""
        return len(self._asked) + (self._body is not None)

    @property
    def guarded(self) -> bool:
        """Whether the other side would notice if we died."""
        return self._guard is not None

    def guard(self, pid: int, address: int) -> bytes:
        """Give the byte that lets the other side notice our death; not for TLS.

        Args:
            pid: Of any page that may be asked for.
            address: Its address.
        """
        if self._guard is not None or self._ended:
            return b""
        self._guard = (pid, address)
        return _FIRST_OF_GET

    def get(self, pid: int, address: int, pages: int, into: memoryview | None = None) -> bytes:
        """Ask for pages: LAZY ones of a task of the dump, since the stock server takes no others.

        Args:
            pid: Whose.
            address: Of the first.
            pages: How many.
            into: Where the answer is to be put; None makes room for it when it comes.

        Returns:
            What to send.
        """
        self._asked.append(_Asked(pid, address, pages, into))
        header = pack_header(self.header_bytes, GET, pages, address, pid)
        return header if self._guard is None else header[1:] + _FIRST_OF_GET

    def close(self) -> bytes:
        """Say that all has been had; a live dump then ends its tasks.

        Returns:
            What to send; the answer is Closed, behind all others.
        """
        self._ended = True
        end = pack_header(self.header_bytes, CLOSE)
        if self._guard is not None:
            pid, address = self._guard
            self._asked.append(_Asked(pid, address, 1, None))
            end = pack_header(self.header_bytes, GET, 1, address, pid)[1:] + end
        self._asked.append(None)
        return end

    def room(self) -> memoryview | None:
        """Give where the next bytes belong, to be put there without a copy; see ``filled``.

        Returns:
            None where there is no such place: use ``feed``.
        """
        return self._body[self._filled :] if self._body is not None else None

    def filled(self, count: int) -> Pages | None:
        """Take note that so many bytes were put where ``room`` said.

        Returns:
            The answer, if it is whole.
        """
        body = self._body
        assert body is not None  # noqa: S101 - there was room
        self._filled += count
        if self._filled < len(body):
            return None
        self._body = None
        return self._answer(body)

    def _answer(self, body: Buffer) -> Pages | None:
        """Give an answer that is whole; nobody wants the one that the guard made necessary."""
        if self._guard is not None and self._asked and self._asked[0] is None:
            return None
        return Pages(*self._begun, body)

    def feed(self, data: Buffer) -> list[Pages | Closed]:
        """Take in what came.

        Raises:
            PeerError: The server broke the protocol.
        """
        view = memoryview(data)
        at, end = 0, len(view)
        events: list[Pages | Closed] = []
        while at < end:
            room = self.room()
            if room is not None:
                taken = min(end - at, len(room))
                room[:taken] = view[at : at + taken]
                at += taken
                whole = self.filled(taken)
                if whole is not None:
                    events.append(whole)
                continue
            if not self._asked:
                raise PeerError(
                    f"sent what nobody asked for: it began with {bytes(view[at : at + 16])!r}"
                )
            size = self.header_bytes if self._asked[0] is not None else _STATUS.size
            if self._head or end - at < size:
                taken = min(size - len(self._head), end - at)
                self._head += view[at : at + taken]
                at += taken
                if len(self._head) < size:
                    break
                head = bytes(self._head)
                self._head.clear()
            else:
                head = bytes(view[at : at + size])
                at += size
            asked = self._asked.popleft()
            if asked is None:
                events.append(Closed(_STATUS.unpack(head)[0]))
                continue
            length = self._begin(asked, *self._unpack(head)) * PAGE_SIZE
            into = asked.into
            if into is None and length <= end - at:  # whole, as an answer of a page often is
                whole = self._answer(bytes(view[at : at + length]))
                if whole is not None:
                    events.append(whole)
                at += length
            else:
                self._body = memoryview(bytearray(length)) if into is None else into[:length]
                self._filled = 0
        return events

    def _begin(self, asked: _Asked, command: int, pages: int, address: int, pid: int) -> int:
        """Check the header of an answer; give how many pages follow."""
        if command & ~(_LAZY << _FLAG_SHIFT) != _PAGES_FOLLOW:
            raise PeerError(
                f"answered with command {command:#x} where {_PAGES_FOLLOW:#x}, pages, should"
                f" come{_OTHER_SIZE}"
            )
        wanted_pid, wanted_address, wanted_pages, _ = asked
        if pid != wanted_pid:
            raise PeerError(
                f"answered pages of pid {pid} where pid {wanted_pid} was asked for{_OTHER_SIZE}"
            )
        if address != wanted_address:
            raise PeerError(
                f"answered pages at {address:#x} where {wanted_address:#x} was asked for"
            )
        if not 1 <= pages <= wanted_pages:
            raise PeerError(f"answered {pages} pages where {wanted_pages} were asked for")
        self._begun = (pid, address)
        return pages


_FIRST_OF_GET: Final = pack_header(SHORT, GET)[:1]
_OTHER_SIZE: Final = "; does it speak the other header size (--protocol 24 or 32)?"


# --- what is asked ---------------------------------------------------------------------


class ImageKind(Enum):
    """What a pushed image is of."""

    TASK = "task"
    SHMEM = "shared memory"


class ImageId(NamedTuple):
    """A pushed image.

    Attributes:
        kind: What it is of.
        number: The pid, or the number of the shared memory.
        id: As it stands in headers.
    """

    kind: ImageKind
    number: int
    id: int


class Get(NamedTuple):
    """Pages are asked for: answer with ``answer`` and the pages, in the order of the requests."""

    pid: int
    address: int
    pages: int


class Opened(NamedTuple):
    """An image begins; all runs until the next one belong to it.

    Attributes:
        image: Which.
        wants_answer: Whether ``has_parent`` has to be answered.
    """

    image: ImageId
    wants_answer: bool


class ParentAsked(NamedTuple):
    """Answer with ``parent_exists``."""

    image: ImageId


class Run(NamedTuple):
    """A run of pages of the image that was opened last.

    Attributes:
        address: Of the first.
        pages: How many.
        flags: PageFlag; if they are PRESENT, their bytes follow as Data.
    """

    address: int
    pages: int
    flags: int


class Data(NamedTuple):
    """Bytes of the last run, in order; they may end anywhere."""

    data: memoryview


class Ended(NamedTuple):
    """The other side is through: answer with ``END``, and it closes."""


Event: TypeAlias = Get | Opened | ParentAsked | Run | Data | Ended

END: Final = _STATUS.pack(0)


def has_parent(*, answer: bool) -> bytes:
    """Answer Opened: whether pages that did not change may be sent as holes."""
    return b"\1" if answer else b"\0"


def parent_exists(*, answer: bool) -> bytes:
    """Answer ParentAsked."""
    return _STATUS.pack(answer)


class Direction(Enum):
    """What a connection is for, as its first command says."""

    PULL = "pull"
    PUSH = "push"


class Acceptor:
    """One connection, seen by the side that was connected to.

    Attributes:
        header_bytes: SHORT or LONG; None until the first header has shown it.
        direction: What the other side does; None until then.
        ended: Whether it has said that it is through.

    Sharing: none needed; it waits for nothing.
    """

    def __init__(self, header_bytes: int | None = None) -> None:
        """Prepare.

        Args:
            header_bytes: What the other side speaks; None finds out.
        """
        self.header_bytes = header_bytes
        self.direction: Direction | None = None
        self._head = bytearray()
        self._image: ImageId | None = None
        self._left = 0  # bytes of the run that are still to come
        self.ended = False
        self._padding = 0  # bytes of a last header that may be longer than it showed

    @property
    def in_order(self) -> bool:
        """Whether the connection may end here without anything being lost."""
        return self.ended or (self.direction is not Direction.PUSH and not self._head)

    @property
    def at_rest(self) -> bool:
        """Whether the next request has not begun, but for the byte of ``Puller.guard``."""
        return not self.ended and (not self._head or self._head == _FIRST_OF_GET)

    def answer(self, get: Get, pages: int) -> bytes:
        """Make the header of an answer; the pages follow it.

        Args:
            get: The request.
            pages: How many there are to be; at least one, at most what was asked for.
        """
        size = self.header_bytes
        assert size is not None  # noqa: S101 - a request came in it
        return pack_header(size, _PAGES_FOLLOW, pages, get.address, get.pid)

    def feed(self, data: Buffer) -> list[Event]:
        """Take in what came.  Data events are views of it.

        Raises:
            PeerError: The other side broke the protocol.
        """
        view = memoryview(data)
        at, end = 0, len(view)
        events: list[Event] = []
        head = self._head
        while at < end:
            if self._left:
                taken = min(self._left, end - at)
                events.append(Data(view[at : at + taken]))
                self._left -= taken
                at += taken
                continue
            if self.ended:
                self._take_padding(view[at:])
                break
            size = self.header_bytes or SHORT
            if head or end - at < size:
                taken = min(size - len(head), end - at)
                head += view[at : at + taken]
                at += taken
                if len(head) < size:
                    break
                whole = bytes(head)
            else:
                whole = bytes(view[at : at + size])
                at += size
            if self.header_bytes is None and self._sniff(whole) == LONG:
                head[:] = whole  # the rest of it is to come
                continue
            head.clear()
            self._take(events, *(_SHORT if len(whole) == SHORT else _LONG).unpack(whole))
        return events

    def _sniff(self, head: bytes) -> int:
        """Tell the size of headers from the first 24 bytes of the first one."""
        command, short_pages, _, _ = _SHORT.unpack(head)
        first, second = _PAIR.unpack_from(head, 8)  # address and id, or pages and address
        command &= _COMMAND_MASK
        size = 0
        if command in _WITHOUT_PAGES:
            # An image's id is never 0; an address that means nothing is.
            size = SHORT if second else LONG
        elif command in _WITH_PAGES:
            # The lowest byte of an image's id is never 0; that of an address is.
            size = SHORT if second % PAGE_SIZE else LONG
        elif command == GET:
            if 1 <= short_pages <= MAX_PAGES and _is_page(first) and 0 < second < _MOST_PID:
                size = SHORT
            elif 1 <= first <= MAX_PAGES and _is_page(second):
                size = LONG
        elif command in _ENDS:
            # Zeros in either size, and 8 more of them in one: nothing comes behind.
            self._padding = LONG - SHORT
            return SHORT
        if not size:
            raise PeerError(f"does not speak CRIU's page-server protocol: it began with {head!r}")
        self.header_bytes = size
        return size

    def _take_padding(self, view: memoryview) -> None:
        self._padding -= len(view)
        if self._padding < 0 or any(view):
            raise PeerError("went on after it had said that it was through")

    def _take(self, events: list[Event], word: int, pages: int, address: int, id_: int) -> None:
        """Add the events of a header."""
        command, flags = word & _COMMAND_MASK, word >> _FLAG_SHIFT
        if command in _ENDS:
            self.ended = True
            events.append(Ended())
            return
        direction = Direction.PULL if command == GET else Direction.PUSH
        # The question for a parent comes before either, to find out who is there.
        if command != PARENT:
            if self.direction not in (None, direction):
                raise PeerError(
                    "asked for pages on a connection that sends some"
                    if command == GET
                    else f"gave command {command} on a connection that asks for pages"
                )
            self.direction = direction
        if command == GET:
            self._check_pages(pages, address, "asked for")
            if not 0 < id_ < _MOST_PID or pages > MAX_PAGES:
                raise PeerError(f"asked for {pages} pages at {address:#x} of pid {id_}")
            events.append(Get(id_, address, pages))
        elif command == PARENT:
            events.append(ParentAsked(_image(id_)))
        elif command in (OPEN, OPEN2):
            self._image = _image(id_)
            events.append(Opened(self._image, wants_answer=command == OPEN2))
        elif command in _WITH_PAGES:
            if self._image is None or self._image.id != id_:  # as CRIU 1.0 did
                self._image = _image(id_)
                events.append(Opened(self._image, wants_answer=False))
            if command != ADD_F:
                flags = _PRESENT if command == ADD else _PARENT
            if flags & ~_ALL_FLAGS or not flags or (flags & _PARENT and flags & _PRESENT):
                raise PeerError(f"sent pages at {address:#x} with the flags {flags:#x}")
            self._check_pages(pages, address, "sent")
            self._left = pages * PAGE_SIZE if flags & _PRESENT else 0
            events.append(Run(address, pages, flags))
        else:
            raise PeerError(f"gave the unknown command {command:#x}{_OTHER_SIZE}")

    @staticmethod
    def _check_pages(pages: int, address: int, verb: str) -> None:
        if not pages or address % PAGE_SIZE or address + pages * PAGE_SIZE > _MOST_ADDRESS:
            raise PeerError(f"{verb} {pages} pages at {address:#x}{_OTHER_SIZE}")


def _is_page(address: int) -> bool:
    return address > 0 and address % PAGE_SIZE == 0


def _image(id_: int) -> ImageId:
    kind, number = id_ & ((1 << _TYPE_BITS) - 1), id_ >> _TYPE_BITS
    if kind in _TASK_TYPES:
        if 0 < number < _MOST_PID:
            return ImageId(ImageKind.TASK, number, id_)
    elif kind in _SHMEM_TYPES:
        return ImageId(ImageKind.SHMEM, number, id_)
    raise PeerError(f"named an image {id_:#x} that no task and no shared memory has{_OTHER_SIZE}")
