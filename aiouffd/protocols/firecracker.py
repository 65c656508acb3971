"""Firecracker's hand-over of guest memory, and that of its relatives.

Knows: the message's bytes, and which descriptor in it is which.
Must not know: sessions, servers, sources.

The VMM maps and registers its guest's memory, connects, and sends one message: a JSON array
with an object per region, no length and no terminator, and SCM_RIGHTS with the userfaultfd.
Nothing else follows.

========= ================================================== ==============================
Release   Fields of a region                                 Otherwise
========= ================================================== ==============================
1.1-1.6   base_host_virt_addr, size, offset                  pages of 4096 bytes
1.7-1.11  + page_size_kib                                    which holds **bytes**, always
1.12-     + page_size (bytes), page_size_kib the same        the socket stays open
E2B       as Firecracker's                                   [uffd] or [uffd, memfd]
StratoV.  base_hva instead of base_host_virt_addr            waits for one byte when served
========= ================================================== ==============================

Laws of this file:

* The parser makes no system call.  Whoever feeds it descriptors owns them again only through
  the message; a refusal closes them all.
* Text and descriptors may come in any pieces and in any order; the message is complete when
  one JSON value and at least one descriptor are there.
* What is refused is refused by name: which region, which field, which descriptor.
* A hostile peer costs at most MAX_BYTES, MAX_DEPTH, MAX_REGIONS and MAX_FDS.

Firecracker's own example handler reads again when it sees the end of the stream before a
descriptor.  Nothing can follow the end of a Unix stream, so here it is a refusal at once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NoReturn

from ..errors import PeerError
from ..fds import OwnedFd
from ..handover import HandedRegion, Handover
from ..kernel import calls
from ..ranges import is_aligned, is_power_of_two
from ..unix_socket import MAX_FDS, Connection

MAX_BYTES: Final = 1 << 20
MAX_REGIONS: Final = 4096
MAX_DEPTH: Final = 16  # of nested arrays and objects; two or three are real

#: Smallest and largest page that memory can have.
_PAGE_SIZES: Final = (4096, 1 << 30)
_ADDRESS_KEYS: Final = ("base_host_virt_addr", "base_hva")
_STRUCTURE: Final = re.compile(rb'["\\\[\]{}]')
_WHITESPACE: Final = b" \t\r\n"


@dataclass(frozen=True, slots=True)
class Message:
    """One hand-over, checked.

    Attributes:
        regions: In the order they were sent.
        fds: At least one; which one is the userfaultfd only the kernel can tell.
        dialect: ``firecracker 1.1``, ``1.7`` or ``1.12``: the release that brought the fields
            seen; or ``stratovirt``.
        trailing: Bytes behind the JSON value, which mean nothing.
    """

    regions: tuple[HandedRegion, ...]
    fds: tuple[OwnedFd, ...]
    dialect: str
    trailing: bytes


class Parser:
    """Bytes and descriptors in, one Message out.

    Sharing: none needed; it waits for nothing.
    """

    def __init__(self) -> None:
        self._text = bytearray()
        self._scanned = 0
        self._blanks = 0  # white space before the value
        self._depth = 0
        self._in_string = False
        self._escaped_at = -1  # where the byte stands that a backslash has made harmless
        self._end = 0  # behind the JSON value; 0 while it is incomplete
        self._fds: list[OwnedFd] = []

    def feed(self, data: bytes, fds: Sequence[OwnedFd] = ()) -> Message | None:
        """Take in what one read gave.

        Args:
            data: Any bytes, in any pieces.
            fds: The descriptors that came with them; from now on the parser's to close.

        Returns:
            The message once it is complete, with all descriptors; else None.

        Raises:
            PeerError: The peer broke the protocol; every descriptor is closed.
        """
        self._fds += fds
        try:
            if len(self._fds) > MAX_FDS:
                raise PeerError(f"sent {len(self._fds)} descriptors; {MAX_FDS} are allowed")
            self._text += data
            if not self._end:
                self._scan()
            if not self._end and len(self._text) > MAX_BYTES:
                raise PeerError(f"the hand-over is no JSON value within {MAX_BYTES} bytes")
            if not self._end or not self._fds:
                if self._end and len(self._text) - self._end > MAX_BYTES:
                    raise PeerError("bytes without end follow the hand-over, but no descriptor")
                return None
            regions, dialect = _parse(bytes(self._text[: self._end]))
        except BaseException:
            self.close()
            raise
        taken, self._fds = tuple(self._fds), []
        return Message(regions, taken, dialect, bytes(self._text[self._end :]))

    def end(self) -> NoReturn:
        """Take in the end of the stream, which must not come before the message.

        Raises:
            PeerError: Always; it says what was still missing.
        """
        count = len(self._fds)
        self.close()
        if not self._text and not count:
            raise PeerError("closed the connection without sending anything")
        if self._end:
            raise PeerError("closed the connection without sending a descriptor")
        raise PeerError(
            f"closed the connection in the middle of the hand-over, after {len(self._text)} bytes"
            f" and {count} descriptors"
        )

    def close(self) -> None:
        """Close every descriptor that has not become part of a message."""
        fds, self._fds = self._fds, []
        for fd in fds:
            fd.close()

    def _scan(self) -> None:
        """Find the end of the JSON value, looking at each byte once."""
        text = self._text
        if not self._depth:
            start = len(text) - len(text.lstrip(_WHITESPACE))
            if start == len(text):
                self._blanks += start  # not kept: looking at them again for each byte costs
                text.clear()
                if self._blanks > MAX_BYTES:
                    raise PeerError("nothing but white space came")
                return
            if text[start] not in b"[{":
                raise PeerError(
                    f"the hand-over begins with {bytes(text[start : start + 1])!r},"
                    " not with a JSON array"
                )
            self._scanned = max(self._scanned, start)
        for match in _STRUCTURE.finditer(text, self._scanned):
            at = match.start()
            if at == self._escaped_at:
                continue
            byte = text[at]
            if byte == 0x5C:  # a backslash, which outside of a string the real parser refuses
                self._escaped_at = at + 1
            elif byte == 0x22:
                self._in_string = not self._in_string
            elif self._in_string:
                continue
            elif byte in b"[{":
                self._depth += 1
                if self._depth > MAX_DEPTH:
                    raise PeerError(f"the hand-over nests more than {MAX_DEPTH} levels deep")
            else:
                self._depth -= 1
                if not self._depth:
                    self._end = at + 1
                    break
        self._scanned = len(text)


def _parse(text: bytes) -> tuple[tuple[HandedRegion, ...], str]:
    try:
        value: object = json.loads(text)
    except ValueError as error:  # bad JSON, bad UTF-8, or a number without end
        raise PeerError(f"the hand-over is no JSON: {error}") from error
    items = _find_regions(value)
    if not 0 < len(items) <= MAX_REGIONS:
        raise PeerError(f"the hand-over has {len(items)} regions; 1 to {MAX_REGIONS} are allowed")
    regions = tuple(_region(number, item) for number, item in enumerate(items))
    _check_together(regions)
    first = items[0]
    if "base_hva" in first:
        return regions, "stratovirt"
    if "page_size" in first:
        return regions, "firecracker 1.12"
    return regions, "firecracker 1.7" if "page_size_kib" in first else "firecracker 1.1"


def _find_regions(value: object) -> list[dict[str, object]]:
    """Find the array of regions: the value itself, or the one such array in an object."""
    if isinstance(value, dict):
        arrays = [item for item in value.values() if isinstance(item, list) and item]
        found = [items for items in arrays if all(_looks_like_region(item) for item in items)]
        if len(found) != 1:
            raise PeerError(f"the hand-over's object holds {len(found)} arrays of regions, not one")
        value = found[0]
    assert isinstance(value, list)  # the scanner lets nothing else through  # noqa: S101
    for number, item in enumerate(value):
        if not isinstance(item, dict):
            raise PeerError(f"region {number} is no JSON object")
    return value


def _looks_like_region(item: object) -> bool:
    return isinstance(item, dict) and any(key in item for key in _ADDRESS_KEYS)


def _region(number: int, item: dict[str, object]) -> HandedRegion:
    key = next((key for key in _ADDRESS_KEYS if key in item), _ADDRESS_KEYS[0])
    start = _integer(number, item, key)
    length = _integer(number, item, "size")
    offset = _integer(number, item, "offset")
    page_size = 4096
    # Never times 1024: page_size_kib has held bytes from the first release on.
    for size_key in ("page_size", "page_size_kib"):
        if size_key in item:
            page_size = _integer(number, item, size_key)
            break
    region = HandedRegion(start, length, offset, page_size)
    name = f"region {number} ({region})"
    if not (_PAGE_SIZES[0] <= page_size <= _PAGE_SIZES[1] and is_power_of_two(page_size)):
        raise PeerError(f"{name} has a page size of {page_size} bytes, which no memory has")
    if not length:
        raise PeerError(f"{name} is empty")
    if region.end > 1 << 64 or offset + length > 1 << 63:
        raise PeerError(f"{name} from offset {offset} on goes beyond what a machine can address")
    if not is_aligned(start, page_size) or not is_aligned(length, page_size):
        raise PeerError(f"{name} is not aligned to its pages of {page_size} bytes")
    if not is_aligned(offset, _PAGE_SIZES[0]):
        raise PeerError(f"{name} begins at offset {offset}, which is not aligned to a page")
    return region


def _integer(number: int, item: dict[str, object], key: str) -> int:
    if key not in item:
        raise PeerError(f"region {number} has no {key}")
    value = item[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise PeerError(f"region {number}: {key} is no integer")
    if not 0 <= value < 1 << 64:
        raise PeerError(f"region {number}: {key} is not in the range of 64 bits")
    return value


def _check_together(regions: Sequence[HandedRegion]) -> None:
    order = sorted(range(len(regions)), key=lambda number: regions[number].start)
    for first, second in pairwise(order):
        if regions[first].end > regions[second].start:
            raise PeerError(
                f"region {first} ({regions[first]}) overlaps region {second} ({regions[second]})"
            )
    for number, region in enumerate(regions):
        if region.page_size != regions[0].page_size:
            raise PeerError(
                f"region {number} has pages of {region.page_size} bytes,"
                f" region 0 of {regions[0].page_size}"
            )


async def receive(connection: Connection) -> Handover:
    """Receive one hand-over from a VMM that has just connected.

    Put a time limit around it: the VMM may die, or say nothing.

    Args:
        connection: The new connection; it stays the caller's.

    Returns:
        The hand-over, whose descriptors are the caller's.

    Raises:
        PeerError: The peer broke the protocol, or sent no userfaultfd, or two.

    Cancellation: every descriptor received so far is closed.
    """
    parser = Parser()
    try:
        message = None
        while message is None:
            data, fds = await connection.receive()
            if not data:
                parser.end()
            message = parser.feed(data, fds)
    finally:
        parser.close()
    try:
        uffd = _find_userfaultfd(message.fds)
    except BaseException:
        for fd in message.fds:
            fd.close()
        raise
    return Handover(
        fd=uffd,
        regions=message.regions,
        others=tuple(fd for fd in message.fds if fd is not uffd),
        acknowledge=b"\x01" if message.dialect == "stratovirt" else b"",
        dialect=message.dialect,
    )


def _find_userfaultfd(fds: Sequence[OwnedFd]) -> OwnedFd:
    found = [fd for fd in fds if calls.is_userfaultfd(fd.fileno())]
    if not found:
        kinds = ", ".join(os.readlink(f"/proc/self/fd/{fd.fileno()}") for fd in fds)
        raise PeerError(f"sent no userfaultfd but: {kinds}")
    if len(found) > 1:
        raise PeerError(f"sent {len(found)} userfaultfds; one was expected")
    return found[0]
