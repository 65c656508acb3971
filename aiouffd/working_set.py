"""Working sets: which pages of an image a target needed, as a file and as a set.

Knows: the file format, offsets in an image.
Must not know: userfaultfds, addresses, who records and who replays.

The file (all numbers little-endian): a header of 48 bytes, the identity of the image in UTF-8
padded with zeros to a multiple of 16, then records of 16 bytes until the end of the file::

    header   magic "aiouffWS" | u16 version | u16 bytes of identity | u32 granule, 4096
             u64 image size | u32 page size | u32 flags | u64 when, ns since 1970
             u32 window, ms | u32 zero
    record   u64 fault word: the offset in the image, its low bits the kinds of fault
             u32 microseconds since the session began | u32 granules

Laws of this file:

* Every prefix of a file that holds the header is a valid file: a recording survives any end of
  its server.
* Granules of 4 KiB count, whatever the pages: a set recorded on small pages fits huge ones.
* Nothing in a file is believed.  A bad header refuses the file, a bad record is left out and
  counted; memory is one bit per granule of the image, however many records there are.
* Pages of one image mean nothing in another: sets know the identity of theirs.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO, Final, NamedTuple, Self

from .errors import WorkingSetError
from .events import MINOR, WP, WRITE

GRANULE: Final = 4096  #: bytes that one bit of a set stands for

MAGIC: Final = b"aiouffWS"
VERSION: Final = 1
#: The largest image that a set is read for: its bits are 128 MiB.
MAX_IMAGE_BYTES: Final = 1 << 42

_HEADER: Final = struct.Struct("<8sHHIQIIQII")
_RECORD: Final = struct.Struct("<QII")
_COMBINED: Final = 1  # a flag: ascending, without times
_MAX_IDENTITY: Final = 1024  # bytes
_MAX_RUN: Final = (1 << 30) // GRANULE  # granules per record: the largest of huge pages
_BAD_BITS: Final = (GRANULE - 1) & ~(WRITE | WP | MINOR)  # of a fault word
_BLOCK: Final = 4096 * _RECORD.size
_WINDOW_BYTES: Final = 512  # of the bitmap, looked at as one integer: 4,096 granules

pack_record = _RECORD.pack


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a working set was made for, and when.

    Attributes:
        identity: Of the image, as its source says; empty if unknown.
        image_size: In bytes.
        page_size: Of the memory that was recorded, in bytes; for people.
        when: Seconds since 1970.
        window: Seconds from the beginning of the session that were recorded; 0 if combined.
        combined: Made of other sets: its records ascend and have no times.
    """

    identity: str
    image_size: int
    page_size: int = GRANULE
    when: float = 0.0
    window: float = 0.0
    combined: bool = False

    def encode(self) -> bytes:
        """Give the bytes that a file begins with.

        Raises:
            ValueError: The identity is longer than 1,024 bytes.
        """
        name = self.identity.encode()
        if len(name) > _MAX_IDENTITY:
            raise ValueError(f"an identity of {len(name)} bytes; at most {_MAX_IDENTITY}")
        fixed = _HEADER.pack(
            MAGIC,
            VERSION,
            len(name),
            GRANULE,
            self.image_size,
            self.page_size,
            _COMBINED if self.combined else 0,
            int(self.when * 1e9),
            min(int(self.window * 1000), 0xFFFF_FFFF),
            0,
        )
        return fixed + name + bytes(-len(name) % 16)

    @classmethod
    def read(cls, file: BinaryIO) -> Self:
        """Read the header of a file, and leave the file at its first record.

        Raises:
            WorkingSetError: It is none that this version can read.
        """
        fixed = file.read(_HEADER.size)
        if len(fixed) < _HEADER.size or not fixed.startswith(MAGIC):
            raise WorkingSetError("this is no working set: it does not begin with a header")
        _, version, length, granule, size, page_size, flags, when_ns, window_ms, _ = _HEADER.unpack(
            fixed
        )
        if version != VERSION:
            raise WorkingSetError(f"version {version}; this program reads version {VERSION}")
        if granule != GRANULE:
            raise WorkingSetError(f"granules of {granule} bytes; they have {GRANULE}")
        if not 0 < size <= MAX_IMAGE_BYTES:
            raise WorkingSetError(f"an image of {size} bytes; at most {MAX_IMAGE_BYTES}")
        if page_size < GRANULE or page_size & (page_size - 1):
            raise WorkingSetError(f"pages of {page_size} bytes: no memory has those")
        padded = length + -length % 16
        name = file.read(padded)
        if length > _MAX_IDENTITY or len(name) < padded:
            raise WorkingSetError(f"an identity of {length} bytes that is not there")
        try:
            identity = name[:length].decode()
        except UnicodeDecodeError as error:
            raise WorkingSetError("an identity that is no UTF-8") from error
        return cls(
            identity=identity,
            image_size=size,
            page_size=page_size,
            when=when_ns / 1e9,
            window=window_ms / 1000,
            combined=bool(flags & _COMBINED),
        )

    def check_image(self, identity: str, size: int, *, any_image: bool = False) -> None:
        """Refuse a set that was made for another image, or another generation of it.

        Args:
            identity: Of the image at hand; empty if unknown.
            size: Of the image at hand, in bytes.
            any_image: Accept the set where one of the identities is unknown.

        Raises:
            WorkingSetError: The image is another, or may be.
        """
        if size != self.image_size:
            raise WorkingSetError(
                f"made for an image of {self.image_size} bytes; this one has {size}"
            )
        if identity and self.identity:
            if identity != self.identity:
                raise WorkingSetError(
                    f"made for another generation of the image ({self.identity!r}; this one is"
                    f" {identity!r}): record it anew"
                )
        elif not any_image:
            whose = "the set" if identity else "the image"
            raise WorkingSetError(
                f"{whose} does not say which image it is: allow any image if you know better"
            )


class Record(NamedTuple):
    """One record of a file."""

    offset: int  #: in the image, in bytes
    length: int  #: in bytes
    flags: int  #: UFFD_PAGEFAULT_FLAG_*, or'ed
    seconds: float  #: since the session began


class Records:
    """The good records of a file, one after the other; the bad ones are counted.

    Attributes:
        header: Of the file.
        skipped: Bad records so far.
        problem: What was wrong with the first of them.
    """

    def __init__(self, file: BinaryIO) -> None:
        """Read the header.

        Args:
            file: At its beginning; it stays the caller's.

        Raises:
            WorkingSetError: See Header.read.
        """
        self.header = Header.read(file)
        self.skipped = 0
        self.problem = ""
        self._file = file

    def __iter__(self) -> Iterator[Record]:
        for word, time_us, count in self._good():
            yield Record(
                word & -GRANULE, count * GRANULE, word & (GRANULE - 1), time_us / 1_000_000
            )

    def _good(self) -> Iterator[tuple[int, int, int]]:
        """Give fault word, microseconds and granules of each record that can be used."""
        size = self.header.image_size + -self.header.image_size % GRANULE
        while block := self._file.read(_BLOCK):
            whole = len(block) - len(block) % _RECORD.size  # the last may have been cut short
            for record in _RECORD.iter_unpack(memoryview(block)[:whole]):
                word, _, count = record
                if (
                    not word & _BAD_BITS
                    and 0 < count <= _MAX_RUN
                    and (word & -GRANULE) + count * GRANULE <= size
                ):
                    yield record
                else:
                    self._skip(word, count)

    def _skip(self, word: int, count: int) -> None:
        self.skipped += 1
        if self.problem:
            return
        if word & _BAD_BITS:
            self.problem = f"{word:#x} is no fault word"
        elif not 0 < count <= _MAX_RUN:
            self.problem = f"a stretch of {count} granules; they have 1 to {_MAX_RUN}"
        else:
            self.problem = (
                f"{count} granules at offset {word & -GRANULE:#x}, which is outside of the image"
            )


class WorkingSet:
    """A set of granules of one image: one bit each.

    Attributes:
        header: What it was made for.
        skipped: Records of its file that were left out because they made no sense.
        problem: What was wrong with the first of them.

    Sharing: read by anybody; changed by one thread.
    """

    def __init__(self, header: Header) -> None:
        """Make an empty set."""
        self.header = header
        self.skipped = 0
        self.problem = ""
        self.granules = -(-header.image_size // GRANULE)
        self._bits = bytearray(-(-self.granules // 8))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file.

        Args:
            path: Recorded or combined.

        Raises:
            WorkingSetError: It is no working set, or one that this version cannot read.
            OSError: It cannot be read.
        """
        with open(path, "rb") as file:
            try:
                records = Records(file)
            except WorkingSetError as error:
                raise WorkingSetError(f"{os.fspath(path)}: {error}") from error
            result = cls(records.header)
            bits, shift = result._bits, GRANULE.bit_length() - 1
            for word, _, count in records._good():
                number = word >> shift
                if count == 1:
                    bits[number >> 3] |= 1 << (number & 7)
                else:
                    result.add(number, count)
            result.skipped, result.problem = records.skipped, records.problem
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file, in the place of an older one only when it is complete.

        Raises:
            OSError: It cannot be written; an older file is as it was.
        """
        import tempfile  # whoever saves none need not have it

        path = os.fspath(path)
        fd, partial = tempfile.mkstemp(prefix=".working-set-", dir=os.path.dirname(path) or ".")
        try:
            with open(fd, "wb") as file:
                file.write(self.header.encode())
                for first, count in self.runs():
                    for start in range(first, first + count, _MAX_RUN):
                        length = min(_MAX_RUN, first + count - start)
                        file.write(pack_record(start * GRANULE, 0, length))
            os.chmod(partial, 0o644)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise

    # --- as a set ----------------------------------------------------------------------

    def add(self, first: int, count: int = 1) -> None:
        """Put granules in.

        Args:
            first: The first of them; its offset is ``first * GRANULE``.
            count: How many.

        Raises:
            ValueError: They lie outside of the image.
        """
        end = first + count
        if first < 0 or count < 0 or end > self.granules:
            raise ValueError(f"granules [{first}, {end}) of an image of {self.granules}")
        bits = self._bits
        if count == 1:
            bits[first >> 3] |= 1 << (first & 7)
            return
        low, high = -(-first // 8), end // 8
        if low < high:
            bits[low:high] = b"\xff" * (high - low)
        for number in (*range(first, min(low * 8, end)), *range(max(high * 8, first), end)):
            bits[number >> 3] |= 1 << (number & 7)

    def __contains__(self, granule: int) -> bool:
        return 0 <= granule < self.granules and bool(self._bits[granule >> 3] >> (granule & 7) & 1)

    def __len__(self) -> int:
        """Count the granules."""
        return self._as_int().bit_count()

    def __bool__(self) -> bool:
        return any(self._bits)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WorkingSet) and (self.granules, self._bits) == (
            other.granules,
            other._bits,
        )

    __hash__ = None  # type: ignore[assignment]  # it changes

    @property
    def length(self) -> int:
        """Bytes of the image that are in the set."""
        return len(self) * GRANULE

    @property
    def share(self) -> float:
        """Which part of the image is in the set, from 0 to 1."""
        return len(self) / self.granules

    def runs(self, first: int = 0) -> Iterator[tuple[int, int]]:
        """Give (first, count) of each run of neighbouring granules, in order.

        Args:
            first: Leave out the granules before this one.
        """
        return self._walk(inside=True, first=first)

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Give (first, count) of each run of granules that are not in the set, in order."""
        return self._walk(inside=False)

    def _walk(self, *, inside: bool, first: int = 0) -> Iterator[tuple[int, int]]:
        start = end = -1
        bits = self._bits
        for at in range(first // 8 // _WINDOW_BYTES * _WINDOW_BYTES, len(bits), _WINDOW_BYTES):
            window = int.from_bytes(bits[at : at + _WINDOW_BYTES], "little")
            base = at * 8
            if not inside:
                window ^= (1 << min(_WINDOW_BYTES * 8, self.granules - base)) - 1
            if base < first:
                window = window >> (first - base) << (first - base)
            while window:
                low = (window & -window).bit_length() - 1
                shifted = window >> low
                count = (~shifted & (shifted + 1)).bit_length() - 1
                window = shifted >> count
                base += low
                if base != end:
                    if start >= 0:
                        yield start, end - start
                    start = base
                base += count
                end = base
        if start >= 0:
            yield start, end - start

    def densities(self, cells: int) -> list[float]:
        """Say which part of each of so many equal stretches of the image is in the set.

        Args:
            cells: How many; fewer if the image has fewer granules.
        """
        cells = min(cells, self.granules)
        result = []
        for cell in range(cells):
            first, end = cell * self.granules // cells, (cell + 1) * self.granules // cells
            stretch = int.from_bytes(self._bits[first // 8 : -(-end // 8)], "little")
            stretch = stretch >> first % 8 & (1 << end - first) - 1
            result.append(stretch.bit_count() / (end - first))
        return result

    def _as_int(self) -> int:
        return int.from_bytes(self._bits, "little")


def combine(
    sets: Iterable[WorkingSet], at_least: int = 1, *, any_image: bool = False
) -> WorkingSet:
    """Make the set of the granules that lie in at least so many of the sets.

    1 gives the union, as many as there are sets the intersection.

    Args:
        sets: Of one image; may be an iterator that loads one after the other.
        at_least: In how many of them a granule must lie.
        any_image: Accept sets that do not say which image they were made for.

    Raises:
        WorkingSetError: They are of different images, or there is none.
        ValueError: ``at_least`` is below 1.
    """
    if at_least < 1:
        raise ValueError(f"a granule lies in at least one set, not {at_least}")
    header: Header | None = None
    planes: list[int] = []  # bit n of every granule's count, for all granules in one integer
    for one in sets:
        if header is None:
            header = one.header
        header.check_image(one.header.identity, one.header.image_size, any_image=any_image)
        carry = one._as_int()
        for number, plane in enumerate(planes):
            planes[number], carry = plane ^ carry, plane & carry
        if carry:
            planes.append(carry)
    if header is None:
        raise WorkingSetError("no working set was given")
    result = WorkingSet(replace(header, combined=True, window=0.0, when=time.time()))
    more, equal = 0, (1 << result.granules) - 1  # compared from the highest bit down
    for number in reversed(range(max(len(planes), at_least.bit_length()))):
        plane = planes[number] if number < len(planes) else 0
        if at_least >> number & 1:
            equal &= plane
        else:
            more |= equal & plane
            equal &= ~plane
    result._bits = bytearray((more | equal).to_bytes(len(result._bits), "little"))
    return result


class Comparison(NamedTuple):
    """How two sets differ, in granules."""

    both: int
    only_first: int
    only_second: int

    @property
    def jaccard(self) -> float:
        """What both have by what either has: 1 if they are equal."""
        either = self.both + self.only_first + self.only_second
        return self.both / either if either else 1.0


def compare(first: WorkingSet, second: WorkingSet, *, any_image: bool = False) -> Comparison:
    """Compare two sets of one image.

    Args:
        first: A set.
        second: Another.
        any_image: Accept sets that do not say which image they were made for.

    Raises:
        WorkingSetError: They are of different images.
    """
    theirs = second.header
    first.header.check_image(theirs.identity, theirs.image_size, any_image=any_image)
    a, b = first._as_int(), second._as_int()
    both = (a & b).bit_count()
    return Comparison(both, a.bit_count() - both, b.bit_count() - both)
