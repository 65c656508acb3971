"""Carry out one resolution on one stretch of memory, with one bounded ioctl.

Knows: which ioctl each resolution is, and how to walk a long range piece by piece.
Must not know: flights, handlers, event loops.

A new ioctl is one dataclass in ``resolutions``, one ``match`` arm here, one call in
``kernel.calls``; ``assert_never`` finds what was forgotten.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, assert_never

from .errors import HandlerError
from .events import PageFault
from .kernel import abi, buffers, calls
from .ranges import PAGE_SIZE, Range, is_aligned
from .resolutions import (
    Answer,
    Continue,
    Copy,
    Move,
    Poison,
    Resolution,
    Unprotect,
    Wake,
    Zero,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: The longest stretch one ioctl is given: some 0.1 to 0.3 ms of the loop's time.
PIECE_BYTES: Final = 512 * 1024

_ADDRESSES: Final = 1 << 64

_WAKE: Final = Wake()

_OUTCOMES: Final[dict[type, str]] = {
    Copy: "copy",
    Zero: "zero",
    Continue: "continue",
    Move: "move",
    Unprotect: "unprotect",
    Poison: "poison",
    Wake: "wake",
}


def outcome_of(resolution: Resolution) -> str:
    """Name what a resolution does, as observers are told."""
    return _OUTCOMES[type(resolution)]


def resolution_of(answer: Answer, fault: PageFault) -> Resolution:
    """Turn what a handler returned into a resolution that fits the fault.

    Raises:
        HandlerError: It is nothing that answers a fault, is not whole pages, or leaves the
            faulting page out.
    """
    if answer is None:
        return _WAKE
    if type(answer) in _OUTCOMES:
        resolution: Resolution = answer  # type: ignore[assignment]
    else:
        resolution = Copy(answer)  # type: ignore[arg-type]
    if type(resolution) is not Wake:
        span_of(resolution, fault)
    return resolution


def span_of(resolution: Resolution, fault: PageFault) -> Range:
    """Give the addresses that a resolution covers.

    Raises:
        HandlerError: They are not whole pages, leave the faulting page out, or are nothing
            that the kernel could be asked for.
    """
    page, size = fault.address, fault.length
    if isinstance(resolution, Wake):
        return Range(page, size)
    start = page if resolution.address is None else resolution.address
    try:
        if isinstance(resolution, Copy):
            length = _length_of(resolution.data, page)
        else:
            length = size if resolution.length is None else resolution.length
        whole = is_aligned(start, size) and is_aligned(length, size)
        whole = whole and 0 < length <= _ADDRESSES - start
        if whole and start <= page < start + length:
            if isinstance(resolution, Move) and not _is_source(resolution.source, length, size):
                raise HandlerError(
                    f"the handler answered the fault at {page:#x} with a move from"
                    f" {resolution.source:#x}, where no whole pages of {size} bytes are",
                    page,
                )
            return Range(start, length)
    except (TypeError, ValueError) as error:  # an address or length that is no number
        raise HandlerError(
            f"the handler answered the fault at {page:#x} with {resolution!r:.200}: {error}", page
        ) from error
    if not whole:
        raise HandlerError(
            f"the handler answered the fault at {page:#x} with {length} bytes at {start:#x};"
            f" whole pages of {size} bytes were expected",
            page,
        )
    raise HandlerError(
        f"the handler answered the fault at {page:#x} with {length} bytes at {start:#x},"
        " which leaves the faulting page out",
        page,
    )


def _length_of(data: Buffer, page: int) -> int:
    """Measure a buffer, in bytes.

    Raises:
        HandlerError: It is none, was released, or has gaps.
    """
    try:
        view = memoryview(data)
    except TypeError:
        raise HandlerError(
            f"the handler returned {type(data).__name__}; a resolution, a bytes-like object or"
            " None was expected",
            page,
        ) from None
    except (ValueError, BufferError) as error:  # a memoryview that was released, a closed mmap
        raise HandlerError(f"the handler returned an unusable buffer: {error}", page) from error
    if not view.c_contiguous:
        raise HandlerError(
            "the handler returned a buffer whose bytes do not lie in one piece; copy it first",
            page,
        )
    return view.nbytes


def _is_source(source: int, length: int, size: int) -> bool:
    return is_aligned(source, size) and 0 <= source <= _ADDRESSES - length


def perform(
    fd: int, resolution: Resolution, base: int, start: int, length: int, page_size: int
) -> int:
    """Do the part of a resolution that lies in ``[start, start + length)``, in one ioctl.

    Args:
        fd: The userfaultfd.
        resolution: What to do.
        base: Where the resolution as a whole begins.
        start: Where this part begins.
        length: Of this part, in bytes; at most PIECE_BYTES, or one page.
        page_size: Of the memory, in bytes.

    Returns:
        Bytes done if above zero, else minus the errno.
    """
    match resolution:
        case Copy(data, _, protect):
            mode = abi.UFFDIO_COPY_MODE_WP if protect else 0
            if type(data) is bytes:
                source = buffers.bytes_address(data) + start - base
                return calls.copy(fd, start, source, length, mode)
            with buffers.PinnedBuffer(data) as pinned:
                return calls.copy(fd, start, pinned.address + start - base, length, mode)
        case Zero():
            if page_size == PAGE_SIZE:
                done = calls.zeropage(fd, start, length)
                if done != -errno.EEXIST or length > page_size:
                    return done
                # Write protection leaves a mark on a page that is not there, and ZEROPAGE
                # takes it for the page; COPY does not, and keeps it if asked to.
                mode, zeros = abi.UFFDIO_COPY_MODE_WP, buffers.zeros_address(page_size)
                copied = calls.copy(fd, start, zeros, length, mode)
                return done if copied == -errno.EINVAL else copied
            # hugetlb memory has no ZEROPAGE
            length = min(length, max(buffers.ZEROS_BYTES, page_size))
            return calls.copy(fd, start, buffers.zeros_address(page_size), length)
        case Continue(_, _, protect):
            mode = abi.UFFDIO_CONTINUE_MODE_WP if protect else 0
            return calls.continue_(fd, start, length, mode)
        case Move(source, _, _, allow_holes):
            mode = abi.UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES if allow_holes else 0
            return calls.move(fd, start, source + start - base, length, mode)
        case Unprotect():
            return calls.writeprotect(fd, start, length, 0)
        case Poison():
            done = calls.poison(fd, start, length)
            if done == -errno.EEXIST and length == page_size:
                # As with ZEROPAGE; a page that is lost needs no mark.
                mode = abi.UFFDIO_WRITEPROTECT_MODE_DONTWAKE
                if calls.writeprotect(fd, start, length, mode) == length:
                    done = calls.poison(fd, start, length)
            return done
        case Wake():
            calls.wake(fd, start, length)
            return length
        case _:
            assert_never(resolution)


class Walk:
    """A long range, done one bounded ioctl at a time; the caller yields in between.

    It steps over pages that are there and over holes in the mapping.  On EAGAIN it stays
    where it is: let the reader run, then step again.

    Attributes:
        at: The next address; everything before it is settled.
        end: Where the range ends.
        done: Bytes done so far.
    """

    __slots__ = ("_page_size", "_piece", "_piece_max", "at", "done", "end")

    def __init__(self, where: Range, page_size: int, piece: int = PIECE_BYTES) -> None:
        self.at = where.start
        self.end = where.end
        self.done = 0
        self._page_size = page_size
        self._piece_max = self._piece = max(piece, page_size)

    def __bool__(self) -> bool:
        return self.at < self.end

    def step(self, fill: Callable[[int, int], int], wake: Callable[[int, int], None]) -> int:
        """Do one ioctl.

        Args:
            fill: Takes (start, length), gives bytes done or minus the errno.
            wake: Takes (start, length): called for a page that was there already, since
                EEXIST wakes nobody.

        Returns:
            What ``fill`` gave.
        """
        size = self._page_size
        length = min(self._piece, self.end - self.at)
        done = fill(self.at, length)
        if done > 0:
            self.at += done
            self.done += done
            self._piece = min(self._piece * 2, self._piece_max)
        elif done == -errno.EEXIST:
            wake(self.at, size)
            self.at += size
        elif done == -errno.ENOENT:
            # The mapping ends, or another begins, within the piece: narrow down to where.
            if length > size:
                self._piece = max(length // 2 & -size, size)
            else:
                self.at += size
        return done
