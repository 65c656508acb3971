"""Touch: one access that a thread made to a page of a region, and what became of it.

Knows: what there is to say about an access, how it travels between processes, how it reads.
Must not know: who recorded it, or any system call.

Laws of this file:

* A touch on the wire is a flat tuple of ints, strings and None, so that ``marshal`` carries it.
* The line about a touch needs nothing but the touch; names and a beginning only improve it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final, TypeAlias

Wire: TypeAlias = tuple[int | str | None, ...]


class Access(enum.StrEnum):
    """What a thread did to the memory."""

    READ = "read"
    WRITE = "write"  #: whatever the kernel calls a write fault: a read-modify-write is one


#: What may have become of a touch, with the words that a line about it uses.
OUTCOMES: Final[dict[str, str]] = {
    "passed": "",
    "frozen": "frozen",
    "delayed": "delayed",
    "changed": "saw other bytes",
    "failed": "failed",
    "overdue": "let go at the time limit",
}


@dataclass(frozen=True, slots=True)
class Touch:
    """One access to a page.

    Attributes:
        number: Counted from 1 in each harness, in the order in which the kernel told them.
        time_ns: When it was seen: nanoseconds of CLOCK_MONOTONIC.
        process: Who: the process's id.
        thread: Its thread's id, as the kernel counts threads.
        region: The region's name.
        page: The page's number in the region, from 0.
        offset: Of the very byte in the region; where the kernel does not tell it, of its page.
        access: Read or write.
        system_call: The number of the call that touched for the thread; None in user mode.
        pc: Where the thread's program stood, or None if that could not be read.
        where: The same for readers: ``libparse.so+0x1139``; empty if it is not known.
        outcome: One of ``OUTCOMES``.
        waited_ns: How long the thread stood still for it, as far as it is over.
    """

    number: int
    time_ns: int
    process: int
    thread: int
    region: str
    page: int
    offset: int
    access: Access
    system_call: int | None = None
    pc: int | None = None
    where: str = ""
    outcome: str = "passed"
    waited_ns: int = 0

    @property
    def offset_in_page(self) -> int:
        """Where in its page the byte lies.

        A page's size is a power of two, and only one of them puts the byte into this page.
        """
        if self.page == 0:
            return self.offset
        page_size = 1 << ((self.offset // self.page).bit_length() - 1)
        return self.offset - self.page * page_size

    def describe(
        self, *, began_ns: int | None = None, page_name: str = "", thread_name: str = ""
    ) -> str:
        """Say it in a line.

        Args:
            began_ns: What to count the time from; without it the line has no time.
            page_name: Instead of the page's number.
            thread_name: Beside the thread's id.
        """
        time = "" if began_ns is None else f" {(self.time_ns - began_ns) / 1e6:+.3f} ms "
        thread = f"{thread_name} (tid {self.thread})" if thread_name else f"tid {self.thread}"
        how = "user mode" if self.system_call is None else f"system call {self.system_call}"
        where = f"{how}, {self.where}" if self.where else how
        became = OUTCOMES.get(self.outcome, self.outcome)
        waited = f"waited {self.waited_ns / 1e6:.3f} ms" if self.waited_ns else ""
        end = ", ".join(each for each in (became, waited) if each)
        return (
            f"#{self.number}{time} {thread} {self.access.value}s"
            f" {self.region}[{page_name or self.page}]+{self.offset_in_page:#x} ({where})"
            + (f": {end}" if end else "")
        )

    def __str__(self) -> str:
        return self.describe()

    def to_wire(self) -> Wire:
        """Give the attributes in their order."""
        return (
            *(self.number, self.time_ns, self.process, self.thread),
            *(self.region, self.page, self.offset, self.access.value),
            *(self.system_call, self.pc, self.where, self.outcome, self.waited_ns),
        )

    @classmethod
    def from_wire(cls, wire: Wire) -> Touch:
        """Make a touch of what ``to_wire`` gave.

        Raises:
            ValueError: It has another form; the text says at which attribute.
        """
        if len(wire) != len(_FORM):
            raise ValueError(f"a touch has {len(_FORM)} attributes, not {len(wire)}")
        for (name, kinds), value in zip(_FORM.items(), wire, strict=True):
            if type(value) not in kinds:
                wanted = " or ".join(
                    "nothing" if each is _NONE else each.__name__ for each in kinds
                )
                raise ValueError(f"{name} of a touch is {wanted}, not {value!r}")
        access, outcome = wire[7], wire[11]
        if access not in _ACCESSES:
            raise ValueError(f"access of a touch is read or write, not {access!r}")
        if outcome not in OUTCOMES:
            raise ValueError(f"outcome of a touch is one of {', '.join(OUTCOMES)}, not {outcome!r}")
        return cls(*wire[:7], Access(access), *wire[8:])  # type: ignore[arg-type,call-arg]  # checked above


_NONE: Final = type(None)
_ACCESSES: Final = frozenset(each.value for each in Access)
_FORM: Final[dict[str, tuple[type, ...]]] = {
    **dict.fromkeys(("number", "time_ns", "process", "thread"), (int,)),
    "region": (str,),
    **dict.fromkeys(("page", "offset"), (int,)),
    "access": (str,),
    **dict.fromkeys(("system_call", "pc"), (int, _NONE)),
    **dict.fromkeys(("where", "outcome"), (str,)),
    "waited_ns": (int,),
}
