"""What a handler may answer to a page fault: a closed union of values.

Knows: the answers and what each means to the faulting threads.
Must not know: how they are performed; the pager alone does that.

In all of them ``address`` None means the faulting page and ``length`` None means one page.
A longer answer that covers the faulting page is allowed: that page is served first.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, Union

from .events import PageFault

if TYPE_CHECKING:
    from typing_extensions import Buffer
else:
    Buffer = bytes | bytearray | memoryview


class Copy(NamedTuple):
    """Fill with these bytes, whole pages of the range's page size (UFFDIO_COPY, 4.3).

    A named tuple, not a frozen dataclass like the others: it is the answer to nearly every
    fault, and takes 0.25 microseconds to make instead of 0.4.

    Attributes:
        data: Any contiguous buffer; it must not be memory that this process serves, and must
            stay as it is until the fault has ended.
        address: Where its first byte goes; None is the faulting page.
        protect: Leave the pages write-protected, so that the first write faults again.
    """

    data: Buffer
    address: int | None = None
    protect: bool = False


@dataclass(frozen=True, slots=True)
class Zero:
    """Fill with zeros (UFFDIO_ZEROPAGE, 4.3; on hugetlb a copy of zeros)."""

    length: int | None = None
    address: int | None = None


@dataclass(frozen=True, slots=True)
class Continue:
    """Map what the page cache has: for minor faults (UFFDIO_CONTINUE, 5.13)."""

    length: int | None = None
    address: int | None = None
    protect: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    """Move pages in from elsewhere in the same process (UFFDIO_MOVE, 6.8).

    Attributes:
        source: Page-aligned address of what to move.
        allow_holes: Count holes in the source as moved.
    """

    source: int
    length: int | None = None
    address: int | None = None
    allow_holes: bool = False


@dataclass(frozen=True, slots=True)
class Unprotect:
    """Let the writers go on: for write-protect faults (UFFDIO_WRITEPROTECT, 5.7)."""

    length: int | None = None
    address: int | None = None


@dataclass(frozen=True, slots=True)
class Poison:
    """Declare the page lost: touching it is SIGBUS (UFFDIO_POISON, 6.6)."""

    length: int | None = None
    address: int | None = None


@dataclass(frozen=True, slots=True)
class Wake:
    """Let the threads try again: the handler has made the page itself (UFFDIO_WAKE, 4.3)."""


Resolution: TypeAlias = Copy | Zero | Continue | Move | Unprotect | Poison | Wake

#: What a handler returns: a Resolution; a buffer, which means Copy; or None, which means Wake.
Answer: TypeAlias = Union[Resolution, "Buffer", None]

#: A coroutine function that answers a page fault.
Handler: TypeAlias = Callable[[PageFault], Awaitable[Answer]]
