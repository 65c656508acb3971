"""What a handler's answer means on lazy memory, and whom to blame when it means nothing.

Knows: resolutions, the mapping they act on, pages declared lost.
Must not know: threads that wait, loops.

Laws of this file:

* Answers are checked before anything is done: a wrong one leaves the page missing.
* A lost page is a matter of these books alone: a hole is SIGBUS and EFAULT already.
* Each access that fails gets an exception of its own; their cause is shared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from .errors import ClosedError, FaultError, HandlerError, SourceError
from .events import WP, PageFault
from .kernel import abi
from .lazy_mapping import LazyMapping, as_bytes
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
        """Do what a handler answered.

        Args:
            fault: What it was asked.
            answer: What it returned.

        Raises:
            HandlerError: The answer does not suit the fault.
            ResolutionRefused: The kernel refused it.
        """
        if type(answer) is bytes and len(answer) == fault.length and not fault.flags & WP:
            # The usual answer, ahead of the match: that asks for every class in turn.
            self.counters.filled_bytes += self.mapping.fill(fault.address, answer)
            return
        match answer:
            case Copy(data, address, protect):
                if protect and not self.mapping.write_protect:
                    raise HandlerError("Copy(protect=True) takes write_protect=True", fault.address)
                self._copy(fault, data, fault.address if address is None else address)
            case Zero(length, address):
                where = self._range(fault, address, length)
                self.counters.filled_bytes += self.mapping.fill_zeros(*where)
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
                self._copy(fault, answer, fault.address)

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

    def _copy(self, fault: PageFault, answer: Buffer, address: int) -> None:
        try:
            data = as_bytes(answer)
        except (TypeError, BufferError):
            raise HandlerError(
                f"a handler returns a resolution, a buffer or None, not {type(answer).__name__}",
                fault.address,
            ) from None
        page_size = self.mapping.page_size
        if (
            len(data) % page_size
            and address + len(data) == self.mapping.start + self.mapping.length
        ):
            data += bytes(-len(data) % page_size)  # behind the memory's end nobody looks
        if len(data) % page_size or not data:
            raise self.blame_kind(
                f"{self.name}: {len(data)} bytes are no whole pages of {page_size}", fault.address
            )
        self._range(fault, address, len(data))
        if fault.flags & WP and address <= fault.address < address + len(data):
            raise HandlerError("a write-protect fault is answered with Unprotect", fault.address)
        self.counters.filled_bytes += self.mapping.fill(address, data)

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
