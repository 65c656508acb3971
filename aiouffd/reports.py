"""What a server tells of its sessions: one value each, which reads as a line of text.

Knows: sessions, and peers that were refused.
Must not know: the server that tells it, where the lines go.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final, TypeAlias

from .session import Session

log: Final = logging.getLogger("aiouffd.server")


@dataclass(frozen=True, slots=True)
class Started:
    """A session has begun."""

    session: Session

    def __str__(self) -> str:
        handover = self.session.handover
        size = sum(region.length for region in handover.regions)
        return (
            f"session of {self.session.name} started: {len(handover.regions)} regions,"
            f" {_mib(size)}, pages of {handover.regions[0].page_size} bytes, {handover.dialect}"
        )


@dataclass(frozen=True, slots=True)
class HandedOver:
    """A peer that hands over piece by piece is through with it.

    Attributes:
        peer: Who it was, as far as the kernel says.
        sessions: How many have begun.
    """

    peer: str
    sessions: int

    def __str__(self) -> str:
        sessions = "1 session" if self.sessions == 1 else f"{self.sessions} sessions"
        return f"{self.peer} has handed everything over: {sessions}"


@dataclass(frozen=True, slots=True)
class TakenOver:
    """A session that a process before us had served goes on."""

    session: Session

    def __str__(self) -> str:
        return f"session {self.session.id} of {self.session.name} taken over"


@dataclass(frozen=True, slots=True)
class FirstPage:
    """A thread of the target that waited for a page has it.

    Attributes:
        session: Whose target.
        seconds: Since the session began.
    """

    session: Session
    seconds: float

    def __str__(self) -> str:
        return f"session of {self.session.name}: first page served after {self.seconds:.3f} s"


@dataclass(frozen=True, slots=True)
class Resident:
    """Every page of the target is there; it is served still.

    Attributes:
        session: Whose target.
        seconds: Since the session began.
    """

    session: Session
    seconds: float

    def __str__(self) -> str:
        return f"session of {self.session.name}: fully resident after {self.seconds:.3f} s"


@dataclass(frozen=True, slots=True)
class Detached:
    """The target has all of its memory and lives on without us."""

    session: Session

    def __str__(self) -> str:
        return f"session of {self.session.name}: detached, the target lives on by itself"


@dataclass(frozen=True, slots=True)
class Ended:
    """A session has ended."""

    session: Session

    def __str__(self) -> str:
        figures = self.session.figures()
        return (
            f"session of {self.session.name} ended after {figures.seconds:.3f} s"
            f" ({self.session.outcome}): {figures.faults} faults,"
            f" {_mib(figures.copied_bytes)} on demand, {_mib(figures.filled_bytes)} ahead,"
            f" {figures.zero_pages} zero pages, {figures.removed_pages} of them removed,"
            f" {figures.failures} failures, p50 {figures.p50_us:.0f} us,"
            f" p99 {figures.p99_us:.0f} us"
        )


@dataclass(frozen=True, slots=True)
class Refused:
    """A peer was not served.

    Attributes:
        peer: Who it was, as far as the kernel says.
        reason: Why.
        part: Which of its hand-overs, where it has several and only that one is not served.
    """

    peer: str
    reason: str
    part: str = ""

    def __str__(self) -> str:
        who = f"task {self.part} of {self.peer}" if self.part else self.peer
        return f"refused {who}: {self.reason}"


Report: TypeAlias = (
    Started | HandedOver | TakenOver | FirstPage | Resident | Detached | Ended | Refused
)


def log_report(report: Report) -> None:
    """Write one log line per report: what a server does with them by default."""
    failed = isinstance(report, Refused) or (
        isinstance(report, Ended) and report.session.error is not None
    )
    log.log(logging.WARNING if failed else logging.INFO, "%s", report)


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
