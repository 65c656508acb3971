"""The journal: what a server knows of one userfaultfd, in a memory file that outlives it.

Knows: the books of an address space, what the kernel says of its changes, pages filled.
Must not know: who keeps the file, sessions, how faults are served.

The file (a memfd) lies in the fd store beside the userfaultfd.  It is a header, a manifest (what
its maker wants to know again), a bit for each page of each region, and a log.  Whoever takes the
file over reads the log through an AddressSpace, with the code that applied it the first time.

What a kill -9 between any two instructions leaves behind, and why it is right:

* **The kernel writes the log.**  Messages are read from the userfaultfd straight into the log's
  end (``inbox``).  An event that read(2) has taken out of the kernel's queue, so that nobody
  will ever be told of it again, is in the log at that same moment.  There is no time in which a
  removal is known to nobody, and no event can be applied twice.
* A record of our own (``grew``, ``dropped``, ``adopted``) is written body first; its first byte,
  its kind, is last.  Before that byte it is a message about a page fault, or nothing: both are
  skipped.  It is written before what it tells is done; only ``dropped`` comes after: what is
  registered and not known would have faults that nobody serves.
* A full log is compacted: the books are written into the other half, and one byte of the header
  says which half counts.  Before that byte the old half is whole, after it the new one.
* A page's bit is set after its fill has succeeded.  Without the bit the fill is repeated, and
  the kernel answers that the page is there.  A page "being filled" needs no state of its own:
  whether the kernel has it is all that matters, and the kernel knows.
* A page with its bit set that is missing after a take-over was removed, and reads zero.  The log
  says so by itself; the bit is the second lock on that door.  It only holds for memory whose
  removals are told (EVENT_REMOVE), and only for bits set before the take-over: a living
  server's books say what was removed, and its bits may be younger than its books.
* Zeros and continued pages set no bit: zeros made again are zeros, and of a continued page the
  page cache knows better than we do.
* A fork's message is in the log as soon as its descriptor is in this process.  ``took`` hands
  the descriptor over at once, before any other message of the batch is looked at, and then
  ``adopted`` is written.  A log with a fork that was never adopted tells its reader that a child
  was lost in between: nothing can bring its memory back, but it is seen.

Cost: 2 bits a page (the bit, and one for a removed page in the log) and some 80 KiB.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final, Generic, Protocol, Self, TypeVar

from .address_space import AddressSpace, Placement
from .errors import UffdError
from .events import MESSAGE_SIZE, PAGEFAULT
from .fds import OwnedFd
from .filled_pages import FilledPages
from .kernel import abi
from .ranges import CHUNK_PAGES, PAGE_SIZE, Range, align_up

with contextlib.suppress(ImportError):  # not a Unix: importing works, making one does not
    import fcntl

R = TypeVar("R")
F = TypeVar("F")

VERSION: Final = 1
MAGIC: Final = b"aiouffdJ"
INBOX_BYTES: Final = 64 * MESSAGE_SIZE  #: what one read may bring

# magic, version, which half counts, whether it was given up, then offsets in bytes: end of the
# manifest, beginning of the bits, their length, beginning of the logs.
_HEADER: Final = struct.Struct("<8sIBB2xQQQQ")
_HALF_AT: Final = 12
_BROKEN_AT: Final = 13
_HALF_BYTES: Final = 16 << 20  # of address space, not of memory
_GROWTH: Final = 32 << 10  # bytes of log after which it is compacted, at least
_SLACK: Final = 8192  # bytes for records between two occasions to compact
_CHUNK_BYTES: Final = CHUNK_PAGES // 8

_PLACED: Final = 0x80  # kind, vacated, region; start, length, offset
_REMOVED: Final = 0x81  # start, length
_REMOVED_BITS: Final = 0x82  # number of the chunk; its bits follow
_GREW: Final = 0x83  # address
_DROPPED: Final = 0x84  # start, length
_ADOPTED: Final = 0x85  # number of the fork
_FORKS: Final = 0x86  # forks so far

_RECORD: Final = struct.Struct("<BBHxxxxQQq")


class JournalError(UffdError):
    """A journal cannot be used: of another version, damaged, or given up by its writer."""


class RegionLike(Protocol):
    """What a journal must know of a region."""

    @property
    def length(self) -> int:
        """In bytes."""

    @property
    def offset(self) -> int:
        """Where it begins in its source, in bytes."""

    @property
    def page_size(self) -> int:
        """Of its memory, in bytes."""


@dataclass
class Replayed(Generic[R, F]):
    """What a journal's writer knew.

    Attributes:
        space: Its books.
        forks: How many forks it was told of.
        lost: By number, the forks whose children it had not adopted yet, each with the books
            of its child.
    """

    space: AddressSpace[R, F]
    forks: int = 0
    lost: dict[int, AddressSpace[R, F]] = field(default_factory=dict)


class Journal:
    """The journal of one userfaultfd: written by one process, read by its successor.

    Attributes:
        manifest: What its maker wants to know again.
        inbox: Where the next messages are to be read to: 64 of them.
        forks: How many forks were told of so far.

    Sharing: one thread.
    """

    _map: ClassVar[type[mmap.mmap]] = mmap.mmap  # tests watch what is written, and in which order

    def __init__(self, fd: OwnedFd) -> None:
        """Use ``create`` or ``adopt`` instead."""
        self._fd = fd
        self._memory = self._map(fd.fileno(), os.fstat(fd.fileno()).st_size)
        header: tuple[int, ...] = _HEADER.unpack_from(self._memory)
        _, _, half, _, end, self._bits_at, self._bits_bytes, self._logs_at = header
        self.manifest: Final = bytes(self._memory[_HEADER.size : end])
        self._half: int = half
        self._tail = self._limit = self._start_of(half)
        self._inbox_at = -1
        self.inbox = memoryview(b"")
        self.forks = 0
        self.on_fork: Callable[[int, int], object] | None = None
        self.on_end: Callable[[], object] | None = None

    @classmethod
    def create(cls, manifest: bytes, regions: Sequence[RegionLike]) -> Self:
        """Make a new journal; ``write_books`` makes it whole.

        Args:
            manifest: See the attribute.
            regions: Those whose pages have bits, in the order of their numbers.
        """
        end = _HEADER.size + len(manifest)
        bits_at = align_up(end, 64)
        bits = sum(FilledPages.bytes_for(one.length, one.page_size) for one in regions)
        logs_at = align_up(bits_at + bits)
        fd = OwnedFd(os.memfd_create("aiouffd-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        try:
            os.ftruncate(fd.fileno(), logs_at + 2 * _HALF_BYTES)
            header = _HEADER.pack(MAGIC, VERSION, 1, 0, end, bits_at, bits, logs_at)
            os.pwrite(fd.fileno(), header + manifest, 0)
            # Nobody may take away what is mapped: touching it would be the end of us.
            fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            return cls(fd)
        except BaseException:
            fd.close()
            raise

    @classmethod
    def adopt(cls, fd: OwnedFd) -> Self:
        """Take over a journal that another process has written; the descriptor is owned.

        Raises:
            JournalError: It is none, of another version, damaged or given up.  The descriptor
                is closed.
        """
        try:
            _check(fd.fileno())
            return cls(fd)
        except BaseException:
            fd.close()
            raise

    @staticmethod
    def is_one(fd: int) -> bool:
        """Say whether a descriptor is a journal's, of whatever version.

        What somebody could cut short is none: reading it could be the end of us.
        """
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            return bool(sealed) and os.pread(fd, len(MAGIC), 0) == MAGIC
        except OSError:
            return False

    def fileno(self) -> int:
        """Give the memory file's number."""
        return self._fd.fileno()

    def filled(self, regions: Sequence[RegionLike]) -> list[FilledPages]:
        """Give the bits of each region; the same regions as at its creation."""
        result, at = [], self._bits_at
        for one in regions:
            result.append(FilledPages(self._memory, at, one.offset, one.length, one.page_size))
            at += FilledPages.bytes_for(one.length, one.page_size)
        return result

    @property
    def bits(self) -> bytes:
        """The bits of all regions, as they are now: those that a forked child begins with."""
        return self._memory[self._bits_at : self._bits_at + self._bits_bytes]

    @bits.setter
    def bits(self, bits: bytes) -> None:
        self._memory[self._bits_at : self._bits_at + self._bits_bytes] = bits

    def close_file(self) -> None:
        """Close the descriptor; the memory stays as long as somebody writes to it."""
        self._fd.close()

    def end(self) -> None:
        """Say that it is of no use any more: what it tells of is over."""
        on_end, self.on_end, self.on_fork = self.on_end, None, None
        if on_end is not None:
            on_end()
        self._fd.close()  # if it could not be stored
        self.inbox.release()
        with contextlib.suppress(BufferError):  # a batch is under way; its end lets go
            self._memory.close()

    # --- writing -----------------------------------------------------------------------

    def _start_of(self, half: int) -> int:
        return self._logs_at + half * _HALF_BYTES

    def took(self, count: int) -> None:
        """Keep what was read into ``inbox``; hand on the descriptors of forked children.

        Args:
            count: Bytes that were read.
        """
        memory, tail = self._memory, self._tail
        for at in range(tail, tail + count, MESSAGE_SIZE):
            kind = memory[at]
            if kind == PAGEFAULT:
                continue
            # All of it is kept, for the faults among it are looked at later.
            self._tail = tail + count
            if kind == abi.UFFD_EVENT_FORK:
                self.forks += 1
                if self.on_fork is not None:
                    self.on_fork(self.forks, abi.UFFD_MSG_FORK.unpack_from(memory, at)[1])

    def settled(self, space: AddressSpace[R, F], number_of: Callable[[R], int | None]) -> bool:
        """Everything taken is in the books: make room for the next messages.

        Args:
            space: The books.
            number_of: Gives a region's number; None for one that was not there at first.

        Returns:
            Whether ``inbox`` is another one now.

        Raises:
            JournalError: See ``write_books``.
        """
        if self._tail > self._limit:
            self.write_books(space, number_of)
        elif self._tail == self._inbox_at:
            return False
        else:
            self._move_inbox()
        return True

    def _move_inbox(self) -> None:
        self._inbox_at = self._tail
        self.inbox.release()
        self.inbox = memoryview(self._memory)[self._tail : self._tail + INBOX_BYTES]

    def write_books(self, space: AddressSpace[R, F], number_of: Callable[[R], int | None]) -> None:
        """Write the books into the other half, and let that one count.

        Raises:
            JournalError: They are too large; from here on the journal is of no use, and says so.
        """
        half = 1 - self._half
        start = self._start_of(half)
        at = start
        beyond = start + _HALF_BYTES - 2 * INBOX_BYTES - 2 * _SLACK
        for record in _records(space, number_of, self.forks):
            if at + len(record) > beyond:
                self._memory[_BROKEN_AT] = 1
                raise JournalError("the books of this address space are too large for a journal")
            self._memory[at : at + len(record)] = record
            at += len(record)
        limit = min(at + max(_GROWTH, at - start), beyond)
        # What lies behind is nothing at all, and present: the kernel must find it there.
        end = limit + _SLACK + INBOX_BYTES
        for page in range(at, end, PAGE_SIZE):
            self._memory[page : min(page + PAGE_SIZE, end)] = bytes(min(PAGE_SIZE, end - page))
        self._memory[_HALF_AT] = half
        self._half, self._tail, self._limit = half, at, limit
        self._move_inbox()
        self._memory.madvise(mmap.MADV_REMOVE, self._start_of(1 - half), _HALF_BYTES)

    def grew(self, address: int) -> None:
        """Write that memory is about to be known to reach up to an address."""
        self._append(_RECORD.pack(_GREW, 0, 0, address, 0, 0))

    def dropped(self, where: Range) -> None:
        """Write that a range is served no longer."""
        self._append(_RECORD.pack(_DROPPED, 0, 0, where.start, where.length, 0))

    def adopted(self, fork: int) -> None:
        """Write that a forked child has a journal of its own, and is safe."""
        self._append(_RECORD.pack(_ADOPTED, 0, 0, fork, 0, 0))

    def _append(self, record: bytes) -> None:
        at = self._tail
        if at + 2 * MESSAGE_SIZE > self._limit + _SLACK:  # the inbox lies behind
            self._memory[_BROKEN_AT] = 1
            raise JournalError("records were written without an occasion to compact")
        self._memory[at + 1 : at + MESSAGE_SIZE] = record[1:]
        self._memory[at] = record[0]
        self._tail = at + MESSAGE_SIZE

    # --- reading -----------------------------------------------------------------------

    def replay(self, regions: Sequence[R], page_sizes: Sequence[int]) -> Replayed[R, F]:
        """Read what the writer knew; afterwards ``write_books`` before anything else.

        Args:
            regions: That serve now, in the order of their numbers.
            page_sizes: Theirs.

        Raises:
            JournalError: It tells of a region that is not there.
        """
        result: Replayed[R, F] = Replayed(AddressSpace())
        memory = self._memory
        at, end = self._start_of(self._half), self._start_of(self._half) + _HALF_BYTES
        while at < end:
            kind = memory[at]
            if kind == _REMOVED_BITS:
                number: int = _RECORD.unpack_from(memory, at)[3]
                bits = memory[at + MESSAGE_SIZE : at + MESSAGE_SIZE + _CHUNK_BYTES]
                result.space.removed.add_chunk(number, int.from_bytes(bits, "little"))
                at += _CHUNK_BYTES
            elif kind == 0:
                break  # nothing was written here, nor behind
            elif kind != PAGEFAULT:
                _apply(result, memory, at, regions, page_sizes)
            at += MESSAGE_SIZE
        self.forks = result.forks
        return result


def _check(fd: int) -> None:
    """Refuse what is no journal of ours."""
    header = os.pread(fd, _HEADER.size, 0)
    size = os.fstat(fd).st_size
    if len(header) < _HEADER.size or header[: len(MAGIC)] != MAGIC:
        raise JournalError("this is no journal")
    _, version, half, broken, end, bits_at, bits, logs_at = _HEADER.unpack(header)
    if version != VERSION:
        raise JournalError(
            f"the journal is of version {version}, and this program reads version {VERSION}"
        )
    if broken:
        raise JournalError("the journal was given up by its writer")
    if not (half in (0, 1) and _HEADER.size <= end <= bits_at <= bits_at + bits <= logs_at) or (
        size != logs_at + 2 * _HALF_BYTES
    ):
        raise JournalError("the journal is damaged")


def _records(
    space: AddressSpace[R, F], number_of: Callable[[R], int | None], forks: int
) -> Iterator[bytes]:
    """Give the records that make the books out of nothing."""
    yield _RECORD.pack(_FORKS, 0, 0, forks, 0, 0)
    for where, placement in space.placements:
        number = number_of(placement.region)
        if number is not None:
            yield _RECORD.pack(
                *(_PLACED, placement.vacated, number, where.start, where.length, placement.delta)
            )
    whole = (1 << CHUNK_PAGES) - 1
    run: Range | None = None  # of chunks that are removed as a whole
    for number, bits in sorted(space.removed.chunks()):
        start = number * CHUNK_PAGES * PAGE_SIZE
        if bits != whole:
            yield _RECORD.pack(_REMOVED_BITS, 0, 0, number, 0, 0)
            yield bits.to_bytes(_CHUNK_BYTES, "little")
        elif run is not None and run.end == start:
            run = Range.between(run.start, start + CHUNK_PAGES * PAGE_SIZE)
        else:
            if run is not None:
                yield _RECORD.pack(_REMOVED, 0, 0, run.start, run.length, 0)
            run = Range(start, CHUNK_PAGES * PAGE_SIZE)
    if run is not None:
        yield _RECORD.pack(_REMOVED, 0, 0, run.start, run.length, 0)


def _apply(
    result: Replayed[R, F],
    memory: mmap.mmap,
    at: int,
    regions: Sequence[R],
    page_sizes: Sequence[int],
) -> None:
    """Do to the books what a record says."""
    space = result.space
    kind, vacated, number, one, two, delta = _RECORD.unpack_from(memory, at)
    match kind:
        case abi.UFFD_EVENT_REMOVE:
            _, start, end = abi.UFFD_MSG_RANGE.unpack_from(memory, at)
            space.remove(Range.between(start, end))
        case abi.UFFD_EVENT_UNMAP:
            _, start, end = abi.UFFD_MSG_RANGE.unpack_from(memory, at)
            space.unmap(Range.between(start, end))
        case abi.UFFD_EVENT_REMAP:
            space.remap(*abi.UFFD_MSG_REMAP.unpack_from(memory, at)[1:])
        case abi.UFFD_EVENT_FORK:
            result.forks += 1
            result.lost[result.forks] = space.fork()
        case _ if kind == _ADOPTED:
            result.lost.pop(one, None)
        case _ if kind == _FORKS:
            result.forks = one
        case _ if kind == _PLACED:
            if number >= len(regions):
                raise JournalError(f"the journal tells of region {number}, which is not there")
            size = page_sizes[number]
            placement = Placement(regions[number], delta, size, -size, bool(vacated))
            space.placements.set(Range(one, two), placement)
        case _ if kind == _REMOVED:
            space.removed.add(Range(one, two))
        case _ if kind == _GREW:
            if space.growth(one) is not None:
                space.grow(one)
        case _ if kind == _DROPPED:
            space.drop(Range(one, two))
        case _ if kind >= _PLACED:
            raise JournalError(f"the journal has a record of an unknown kind ({kind:#x})")
