"""What a test asks for: rules about the touches of some bytes, as values.

Knows: what a rule says, and how it is written on the wire.
Must not know: processes, pages, who has touched what.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

#: Kinds of memory, by the names that the kernel's own tests have for them.
SHARED_KINDS = ("shmem", "hugetlb")
PRIVATE_KINDS = ("anon", "shmem-private", "hugetlb-private")
KINDS = (*SHARED_KINDS, *PRIVATE_KINDS)


class Kind(StrEnum):
    """What happens to a touch that a rule fits."""

    FREEZE = "freeze"  #: its thread stands until it is released
    SLOW = "slow"  #: it takes longer
    FAIL = "fail"  #: SIGBUS, or EFAULT in a system call
    CHANGE = "change"  #: it finds other bytes
    WATCH = "watch"  #: it is written down, and so is the next one


def check(access: str, mode: str, nth: int) -> None:
    """Refuse what no rule can say about touches.

    Raises:
        ValueError: There is no such access or mode, or the number is not above zero.
        TypeError: The number is no whole number.
    """
    if access not in ("any", "read", "write"):
        raise ValueError(f"access is 'any', 'read' or 'write', not {access!r}")
    if mode not in ("any", "user", "kernel"):
        raise ValueError(f"mode is 'any', 'user' or 'kernel', not {mode!r}")
    if type(nth) is not int:
        raise TypeError(f"nth is a whole number, not {nth!r}")
    if nth < 1:
        raise ValueError(f"nth counts touches from 1, not {nth}")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule about the bytes from ``start`` to ``end`` of a region.

    Attributes:
        number: Its number, one per harness.
        kind: What happens.
        region: The region's number.
        start: Offset of its first byte.
        end: Offset one past its last byte.
        access: ``read``, ``write`` or ``any``.
        mode: ``user``: the program itself; ``kernel``: a system call; or ``any``.
        threads: Only these threads; all if empty.
        nth: Touches before the n-th do not count.
        every: Not once, but each time.
        latency: SLOW: a distribution, as ``latency.to_wire`` writes it.
        values: CHANGE: what the first touch finds, the second, and so on.
    """

    number: int
    kind: Kind
    region: int
    start: int
    end: int
    access: str = "any"
    mode: str = "any"
    threads: frozenset[int] = frozenset()
    nth: int = 1
    every: bool = False
    latency: tuple[Any, ...] = ()
    values: tuple[bytes, ...] = ()

    def fits(
        self, region: int, offset: int, access: str, thread: int, system_call: int | None
    ) -> bool:
        """Say whether a touch is of these bytes, of this kind, by one of these threads."""
        return (
            region == self.region
            and self.start <= offset < self.end
            and self.access in ("any", access)
            and self.mode in ("any", "user" if system_call is None else "kernel")
            and (not self.threads or thread in self.threads)
        )

    def covers(self, region: int, start: int, end: int) -> bool:
        """Say whether it is about any of the bytes from ``start`` to ``end``."""
        return region == self.region and self.start < end and start < self.end

    def to_wire(self) -> tuple[Any, ...]:
        """Give it as a tuple that ``from_wire`` reads."""
        return (
            self.number,
            self.kind.value,
            self.region,
            self.start,
            self.end,
            self.access,
            self.mode,
            tuple(self.threads),
            self.nth,
            self.every,
            self.latency,
            self.values,
        )

    @classmethod
    def from_wire(cls, fields: tuple[Any, ...]) -> Rule:
        """Read what ``to_wire`` wrote."""
        number, kind, region, start, end, access, mode, threads, nth, every, latency, values = (
            fields
        )
        return cls(
            number=number,
            kind=Kind(kind),
            region=region,
            start=start,
            end=end,
            access=access,
            mode=mode,
            threads=frozenset(threads),
            nth=nth,
            every=every,
            latency=tuple(latency),
            values=tuple(values),
        )
