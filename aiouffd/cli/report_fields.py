"""A server's reports as fields, for programs that read its lines.

Knows: reports.
Must not know: who writes them where.
"""

from __future__ import annotations

from typing import Any, Final

from ..reports import (
    Detached,
    Ended,
    FirstPage,
    HandedOver,
    Refused,
    Report,
    Resident,
    Started,
    TakenOver,
)

_EVENTS: Final[dict[type[Report], str]] = {
    Started: "started",
    TakenOver: "taken_over",
    FirstPage: "first_page",
    Resident: "resident",
    Detached: "detached",
    Ended: "ended",
}


def fields_of(report: Report) -> dict[str, Any]:
    """Give a report as what a program wants to read."""
    if isinstance(report, Refused):
        refused = {"event": "refused", "peer": report.peer, "reason": report.reason}
        return refused | ({"part": report.part} if report.part else {})
    if isinstance(report, HandedOver):
        return {"event": "handed_over", "peer": report.peer, "sessions": report.sessions}
    session = report.session
    event: dict[str, Any] = {"event": _EVENTS[type(report)], "session": session.id}
    if session.peer is not None:
        event |= {"pid": session.peer.pid, "uid": session.peer.uid}
    if session.handover.part:
        event["part"] = session.handover.part
    if isinstance(report, FirstPage | Resident):
        return event | {"seconds": report.seconds}
    if isinstance(report, Detached):
        return event
    if isinstance(report, Started | TakenOver):
        regions = session.handover.regions
        return event | {
            "dialect": session.handover.dialect,
            "regions": len(regions),
            "memory_bytes": sum(region.length for region in regions),
            "page_size": regions[0].page_size,
        }
    error = session.error
    return event | {
        "outcome": session.outcome,
        "error": None if error is None else str(error),
        **session.figures().as_dict(),
    }
