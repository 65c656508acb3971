"""What a userfaultfd says: page faults and events of the address space, as values.

Knows: the 32-byte messages and the 8-byte fault word.
Must not know: who reads them and what is done about them.

A page fault comes off the wire as a RawFault (what the kernel said); the pager, which knows
the registered ranges, makes a PageFault of it (what a handler needs).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from .fds import OwnedFd
from .kernel import abi
from .ranges import PAGE_SIZE, Range

WRITE: Final = abi.UFFD_PAGEFAULT_FLAG_WRITE
WP: Final = abi.UFFD_PAGEFAULT_FLAG_WP
MINOR: Final = abi.UFFD_PAGEFAULT_FLAG_MINOR

_PAGE_MASK: Final = -PAGE_SIZE


class RawFault(NamedTuple):
    """A page fault as the kernel reports it."""

    flags: int  #: UFFD_PAGEFAULT_FLAG_*, or'ed; bits of newer kernels are kept
    address: int  #: the page's address, or the exact one with EXACT_ADDRESS
    thread_id: int  #: with THREAD_ID, in the faulting task's own pid namespace; else 0


class PageFault(NamedTuple):
    """A thread touched a page and waits.

    A named tuple, not a frozen dataclass like the events below: one is made for every fault,
    and a frozen dataclass of six fields costs 0.9 microseconds against 0.3.

    Attributes:
        address: The page's address in the target, aligned to the range's page size.
        offset: Where the page lies in the range's source, in bytes; moves of the memory
            (mremap) do not change it.
        length: The page size, in bytes.
        flags: UFFD_PAGEFAULT_FLAG_*, or'ed.
        thread_id: Who faulted, in its own pid namespace; 0 without feature THREAD_ID.
        reported: The address as the kernel reported it: the exact one with EXACT_ADDRESS.
    """

    address: int
    offset: int
    length: int
    flags: int = 0
    thread_id: int = 0
    reported: int = 0

    @property
    def write(self) -> bool:
        """Whether it was a write."""
        return bool(self.flags & WRITE)

    @property
    def wp(self) -> bool:
        """Whether it was a write to a write-protected page: answer with Unprotect."""
        return bool(self.flags & WP)

    @property
    def minor(self) -> bool:
        """Whether the page is in the page cache and only not mapped: answer with Continue."""
        return bool(self.flags & MINOR)

    @property
    def missing(self) -> bool:
        """Whether there is no page: answer with Copy, Zero, Move or Poison."""
        return not self.flags & (WP | MINOR)

    @property
    def kind(self) -> str:
        """``missing``, ``wp`` or ``minor``."""
        return "wp" if self.wp else "minor" if self.minor else "missing"

    @property
    def word(self) -> int:
        """The fault as one u64, see fault_word."""
        return fault_word(self.address, self.flags)


@dataclass(slots=True, frozen=True)
class Forked:
    """The target forked; the child's memory is served through a userfaultfd of its own."""

    fd: OwnedFd


@dataclass(slots=True, frozen=True)
class Remapped:
    """The target moved memory with mremap; ``length`` is the old length, in bytes."""

    start: int
    to: int
    length: int


@dataclass(slots=True, frozen=True)
class Removed:
    """The target freed pages with madvise: they read zero from now on."""

    range: Range


@dataclass(slots=True, frozen=True)
class Unmapped:
    """The target unmapped a range; parts of it may never have been registered."""

    range: Range


@dataclass(slots=True, frozen=True)
class UnknownEvent:
    """A message of a kind that this version does not know, kept whole."""

    number: int
    message: bytes


Event = Forked | Remapped | Removed | Unmapped | UnknownEvent
Message = RawFault | Event

MESSAGE_SIZE: Final = abi.UFFD_MSG_SIZE
PAGEFAULT: Final = abi.UFFD_EVENT_PAGEFAULT


def decode(data: bytes | bytearray | memoryview) -> Iterator[Message]:
    """Decode the messages of one read.

    The caller owns the descriptor of each Forked from the moment it is yielded: drain the
    iterator, or descriptors leak.

    Args:
        data: Whole messages of 32 bytes, as read(2) gives them.

    Raises:
        ValueError: The length is no multiple of 32, or a range ends before it starts, which
            no kernel says.
    """
    if len(data) % MESSAGE_SIZE:
        raise ValueError(f"{len(data)} bytes are no whole number of {MESSAGE_SIZE}-byte messages")
    for at in range(0, len(data), MESSAGE_SIZE):
        number = data[at]
        if number == PAGEFAULT:
            _, flags, address, thread_id = abi.UFFD_MSG_PAGEFAULT.unpack_from(data, at)
            yield RawFault(flags, address, thread_id)
        elif number == abi.UFFD_EVENT_FORK:
            yield Forked(OwnedFd(abi.UFFD_MSG_FORK.unpack_from(data, at)[1]))
        elif number == abi.UFFD_EVENT_REMAP:
            _, start, to, length = abi.UFFD_MSG_REMAP.unpack_from(data, at)
            yield Remapped(start, to, length)
        elif number == abi.UFFD_EVENT_REMOVE:
            _, start, end = abi.UFFD_MSG_RANGE.unpack_from(data, at)
            yield Removed(Range.between(start, end))
        elif number == abi.UFFD_EVENT_UNMAP:
            _, start, end = abi.UFFD_MSG_RANGE.unpack_from(data, at)
            yield Unmapped(Range.between(start, end))
        else:
            yield UnknownEvent(number, bytes(data[at : at + MESSAGE_SIZE]))


def fault_word(address: int, flags: int) -> int:
    """Pack a fault into one u64: the record of traces and working sets.

    The form is that of the kernel's first userfaultfd patches (2015), whose read(2) gave just
    this: the page's address with UFFD_BIT_WRITE (1) and UFFD_BIT_WP (2) in its low bits.
    MINOR (4) was added since.

    Args:
        address: Any address within the page.
        flags: UFFD_PAGEFAULT_FLAG_*; other bits are dropped.

    Raises:
        ValueError: The address does not fit in 64 bits.
    """
    if not 0 <= address < 1 << 64:
        raise ValueError(f"an address has 64 bits: {address:#x}")
    return address & _PAGE_MASK | flags & (WRITE | WP | MINOR)


def decode_fault_word(word: int) -> tuple[int, int]:
    """Unpack a fault word into the page's address and UFFD_PAGEFAULT_FLAG_* bits.

    Raises:
        ValueError: It does not fit in 64 bits, or has bits between the flags and the page.
    """
    if not 0 <= word < 1 << 64:
        raise ValueError(f"a fault word has 64 bits: {word:#x}")
    address, flags = word & _PAGE_MASK, word & ~_PAGE_MASK
    if flags & ~(WRITE | WP | MINOR):
        raise ValueError(f"{word:#x} is no fault word: unknown low bits {flags:#x}")
    return address, flags
