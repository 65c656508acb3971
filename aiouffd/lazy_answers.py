"""What a handler's answer means on lazy memory, and whom to blame when it means nothing.

Knows: resolutions, the mapping they act on, pages declared lost.
Must not know: threads that wait, loops.

Laws of this file:

* Answers are checked before anything is done: a wrong one leaves the page missing.
* A lost page is a matter of these books alone: a hole is SIGBUS and EFAULT already.
* Each access that fails gets an exception of its own; their cause is shared.
* A long answer is done piece by piece, the faulting page first; the loop yields in between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from .errors import ClosedError, FaultError, HandlerError, SourceError
from .events import WP, PageFault
from .kernel import abi
from .lazy_mapping import LazyMapping, as_bytes
from .performer import PIECE_BYTES
from .ranges import PAGE_SIZE
from .resolutions import Answer, Continue, Copy, Move, Poison, Unprotect, Wake, Zero

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Counters:
    """What happened so far; each figure is at most a few behind while threads fault.

    Attributes:
        faults: Accesses that found no page (or a protected one) and had it brought.
        joined: Accesses that found their page already on its way.
        inline: Pages answered in the faulting thread.
        failures: Accesses that ended in an exception.
        filled_bytes: Bytes brought, in whole pages.
        evicted_bytes: Bytes made missing again.
    """

    __slots__ = ("evicted_bytes", "failures", "faults", "filled_bytes", "inline", "joined")

    def __init__(self) -> None:
        self.faults = 0
        self.joined = 0
        self.inline = 0
        self.failures = 0
        self.filled_bytes = 0
        self.evicted_bytes = 0

    def __repr__(self) -> str:
        return f"Counters({', '.join(f'{name}={getattr(self, name)}' for name in self.__slots__)})"


class Pieces:
    """A long answer that is still to be done; going over it does it.

    Attributes:
        start: The first address it covers.
        end: One past the last.
    """

    __slots__ = ("_counters", "_fault", "_step", "end", "start")

    def __init__(
        self,
        fault: PageFault,
        where: tuple[int, int],
        step: Callable[[int, int], int],
        counters: Counters,
    ) -> None:
        self._fault = fault
        self.start, length = where
        self.end = self.start + length
        self._step = step
        self._counters = counters

    def __iter__(self) -> Iterator[bool]:
        """Do a piece, then say whether the faulting page is there; and so on."""
        fault = self._fault
        covered = self.start <= fault.address < self.end
        first = fault.address if covered else self.start
        settled = False
        for start, end in (first, self.end), (self.start, first):
            for at in range(start, end, PIECE_BYTES):
                after = min(at + PIECE_BYTES, end)
                self._counters.filled_bytes += self._step(at, after - at)
                settled = settled or (covered and after >= fault.address + fault.length)
                yield settled


class Answers:
    """Performs the answers of one LazyMemory's handler.

    Sharing: any thread; the pages of a fault belong to whoever owns its flight.
    """

    def __init__(
        self,
        mapping: LazyMapping,
        counters: Counters,
        blame_kind: type[HandlerError] | type[SourceError],
        name: str,
    ) -> None:
        """Prepare to perform.

        Args:
            mapping: The memory.
            counters: Where filled bytes are counted.
            blame_kind: The error to make of an exception that is not aiouffd's own.
            name: The memory's, for messages.
        """
        self.mapping: Final = mapping
        self.counters: Final = counters
        self.blame_kind: Final = blame_kind
        self.name: Final = name
        self.poisoned: Final[set[int]] = set()

    def perform(self, fault: PageFault, answer: Answer) -> None:
        """Do what a handler answered, all of it at once: not for the loop's thread.

        Args:
            fault: What it was asked.
            answer: What it returned.

        Raises:
            HandlerError: The answer does not suit the fault.
            ResolutionRefused: The kernel refused it.
        """
        pieces = self.begin(fault, answer)
        if pieces is not None:
            for _ in pieces:
                pass

    def begin(self, fault: PageFault, answer: Answer) -> Pieces | None:
        """Check what a handler answered, and do it if it is short.

        Args:
            fault: What it was asked.
            answer: What it returned.

        Returns:
            What is left to do; None if that is nothing.

        Raises:
            HandlerError: The answer does not suit the fault.
            ResolutionRefused: The kernel refused it.
        """
        if (
            type(answer) is bytes
            and len(answer) == fault.length <= PIECE_BYTES
            and not fault.flags & WP
        ):
            # The usual answer, ahead of the match: that asks for every class in turn.
            self.counters.filled_bytes += self.mapping.fill(fault.address, answer)
            return None
        match answer:
            case Copy(data, address, protect):
                if protect and not self.mapping.write_protect:
                    raise HandlerError("Copy(protect=True) takes write_protect=True", fault.address)
                return self._copy(fault, data, fault.address if address is None else address)
            case Zero(length, address):
                where = self._range(fault, address, length)
                return self._begin(fault, where, self.mapping.fill_zeros)
            case Unprotect(length, address):
                self.mapping.unprotect(*self._range(fault, address, length))
            case Poison(length, address):
                first, size = self._range(fault, address, length)
                # Books suffice: a hole is SIGBUS and EFAULT already.
                self.poisoned.update(range(first, first + size, self.mapping.page_size))
                self.refuse_poisoned(fault.address)
            case None | Wake():
                self._check_resolved(fault)
            case Continue() | Move():
                raise HandlerError(f"{answer!r} does not suit lazy memory", fault.address)
            case _:
                return self._copy(fault, answer, fault.address)
        return None

    def _begin(
        self, fault: PageFault, where: tuple[int, int], step: Callable[[int, int], int]
    ) -> Pieces | None:
        if where[1] > PIECE_BYTES:
            return Pieces(fault, where, step, self.counters)
        self.counters.filled_bytes += step(*where)
        return None

    def refuse_poisoned(self, start: int) -> None:
        """Raise for a page that the handler has declared lost.

        Raises:
            FaultError: It is one.
        """
        if start in self.poisoned:
            raise FaultError(f"{self.name}: the page at {start:#x} is lost (poisoned)", start)

    def _check_resolved(self, fault: PageFault) -> None:
        for page in range(fault.address, fault.address + fault.length, PAGE_SIZE):
            entry = self.mapping.pages.entry(page)
            if self.mapping.pages.is_missing(entry):
                raise HandlerError(
                    f"{self.name}: the handler returned None and has not filled the page at"
                    f" {page:#x}",
                    page,
                )
            if fault.flags & WP and entry & abi.PM_UFFD_WP:
                raise HandlerError(
                    f"{self.name}: the page at {page:#x} is still protected; return Unprotect()",
                    page,
                )

    def _copy(self, fault: PageFault, answer: Buffer, address: int) -> Pieces | None:
        try:
            data = _as_bytes_if_short(answer)
        except (TypeError, BufferError):
            raise HandlerError(
                f"a handler returns a resolution, a buffer or None, not {type(answer).__name__}",
                fault.address,
            ) from None
        page_size = self.mapping.page_size
        length = len(data)
        if length % page_size and address + length == self.mapping.start + self.mapping.length:
            length += -length % page_size  # behind the memory's end nobody looks
        if length % page_size or not length:
            raise self.blame_kind(
                f"{self.name}: {len(data)} bytes are no whole pages of {page_size}", fault.address
            )
        where = self._range(fault, address, length)
        if fault.flags & WP and address <= fault.address < address + length:
            raise HandlerError("a write-protect fault is answered with Unprotect", fault.address)

        def step(at: int, size: int) -> int:
            piece = bytes(data[at - address : at - address + size])
            return self.mapping.fill(at, piece if len(piece) == size else piece.ljust(size, b"\0"))

        return self._begin(fault, where, step)

    def _range(self, fault: PageFault, address: int | None, length: int | None) -> tuple[int, int]:
        address = fault.address if address is None else address
        length = fault.length if length is None else length
        if (
            (address - self.mapping.start) % self.mapping.page_size
            or length % self.mapping.page_size
            or length <= 0
            or not self.mapping.start <= address <= self.mapping.end - length
        ):
            raise HandlerError(
                f"{length} bytes at {address:#x} are not whole pages of {self.name}", fault.address
            )
        return address, length

    def blame(self, error: BaseException, address: int) -> Callable[[], BaseException]:
        """Make of a handler's or source's exception one for each access that it failed."""

        def fresh() -> BaseException:
            raised: BaseException
            if type(error) in {FaultError, HandlerError, SourceError}:  # it says all already
                raised = type(error)(str(error), getattr(error, "address", address))
                raised.__cause__ = error.__cause__
            elif isinstance(error, ClosedError):
                raised = ClosedError(*error.args)
            else:
                text = f"{self.name}: no page at {address:#x}: {error!r}"
                raised = self.blame_kind(text, address)
                raised.__cause__ = error
            return raised

        return fresh


def _as_bytes_if_short(data: Buffer) -> bytes | memoryview:
    """Give a buffer's bytes; a long one's are copied piece by piece, as they are needed."""
    if type(data) is bytes:
        return data
    view = memoryview(data)
    if view.nbytes > PIECE_BYTES and view.c_contiguous:
        with contextlib.suppress(TypeError):  # a format that nothing can be made of
            return view.cast("B")
    return as_bytes(data)
