"""Report: what a migration was, in one document, for programs; written as JSON.

Knows: the document's form; docs/reference/migration-report.md has it, too.
Must not know: who reads it.

Laws of this file:

* It is there after a failure as well, with all that was known.
* It is written whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, Final

from ..errors import UffdError
from .incoming import Incoming
from .outgoing import Outgoing, Plan

VERSION: Final = 1

MOVED: Final = "moved"  #: the outcome of a migration that did not fail
CANCELLED: Final = "cancelled"  #: before the switch; the program runs on at the source
UNDER_WAY: Final = ""


class ReportError(UffdError):
    """A file is no report of a migration."""


def of_source(
    outgoing: Outgoing,
    *,
    plan: Plan,
    peer: str,
    began: float,
    name: str = "",
    outcome: str = UNDER_WAY,
    error: str = "",
    short: bool = False,
) -> dict[str, Any]:
    """Make the report of the side that sends.

    Args:
        outgoing: The migration, over or not.
        plan: Its numbers.
        peer: Where the program goes: ``10.0.0.7:7440``.
        began: Seconds since 1970.
        name: Of the program.
        outcome: MOVED, CANCELLED or that of a ``MigrationFailed``.
        error: What was wrong.
        short: Without the samples.
    """
    figures = outgoing.figures.as_dict(short=short)
    if not figures["seconds"] and outgoing.figures.samples:
        figures["seconds"] = outgoing.figures.samples[-1].seconds
    return _document(
        "source",
        source=figures,
        destination=dict(outgoing.destination),
        stage=outgoing.stage.value,
        left_bytes=outgoing.left_bytes,
        dirty_rate=outgoing.dirty_rate,
        rounds=outgoing.rounds,
    ) | {
        "peer": peer,
        "name": name,
        "began": began,
        "outcome": outcome,
        "error": error,
        "plan": dataclasses.asdict(plan),
    }


def of_destination(
    incoming: Incoming, *, began: float, outcome: str = UNDER_WAY, error: str = ""
) -> dict[str, Any]:
    """Make the report of the side that receives.

    What the source has seen is in it once it has said its last word.

    Args:
        incoming: The migration, over or not.
        began: Seconds since 1970.
        outcome: MOVED, or that of a ``MigrationFailed``.
        error: What was wrong.
    """
    told = incoming.source
    source = dict(told.get("figures") or {})
    source.setdefault("memory_bytes", sum(each.length for each in incoming.extents))
    return _document(
        "destination",
        source=source,
        destination=incoming.stalls.as_dict(timeline=True)
        | {"received_bytes": incoming.received_bytes},
        stage=incoming.stage.value,
        left_bytes=incoming.left_bytes,
        dirty_rate=float(told.get("dirty_rate") or 0.0),
        rounds=len(source.get("rounds", ())) or int(told.get("round") or 0),
    ) | {
        "peer": incoming.peer,
        "name": incoming.name,
        "began": began,
        "outcome": outcome,
        "error": error,
        "plan": {},
    }


def _document(
    side: str,
    *,
    source: dict[str, Any],
    destination: dict[str, Any],
    stage: str,
    left_bytes: int,
    dirty_rate: float,
    rounds: int,
) -> dict[str, Any]:
    figures = {
        name: source.get(name, 0)
        for name in (
            *("memory_bytes", "sent_bytes", "sent_over_memory", "page_bytes", "zero_bytes"),
            *("again_bytes", "demand", "demand_bytes", "downtime", "seconds"),
            *("connections", "disconnected"),
        )
    } | {
        name: destination.get(name, 0)
        for name in (
            *("faults", "failures", "demand_faults", "demand_p50", "demand_p99"),
            *("demand_longest", "stall"),
        )
    }
    figures |= {
        "stall_by_thread": destination.get("stall_by_thread", {}),
        "left_bytes": left_bytes,
        "dirty_rate": dirty_rate,
        "rounds": rounds,
    }
    return {
        "version": VERSION,
        "side": side,
        "stage": stage,
        "figures": figures,
        "source": source,
        "destination": destination,
    }


def save(report: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a report; what was there before is replaced.

    Raises:
        OSError: It cannot be written.
    """
    target = os.fspath(path)
    part = f"{target}.part"
    try:
        with open(part, "w", encoding="utf-8") as file:
            json.dump(report, file)
            file.write("\n")
        os.replace(part, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, target) from error


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a report.

    Raises:
        OSError: It cannot be read.
        ReportError: It is none, or of a version that is not known here.
    """
    name = os.fspath(path)
    with open(path, encoding="utf-8") as file:
        try:
            report = json.load(file)
        except ValueError as error:
            raise ReportError(f"{name} is no report of a migration: {error}") from error
    if not isinstance(report, dict) or not isinstance(report.get("figures"), dict):
        raise ReportError(f"{name} is no report of a migration")
    if report.get("version") != VERSION:
        raise ReportError(
            f"{name} is a report of version {report.get('version')!r}; this is for {VERSION}"
        )
    return report
