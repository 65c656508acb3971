"""``aiouffd sessions``: who is served by a running server.

Knows: how a table of sessions looks.
Must not know: how figures come about.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from .control_client import add_option, ask, path_from
from .statuses import DONE

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_HEAD = ("ID", "STATE", "PID", "UID", "MEMORY", "BROUGHT", "FAULTS", "FAILED", "P50", "P99", "AGE")


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "sessions",
        help="list who is served by a running server",
        description="List the sessions of a running server, the oldest first.",
    )
    add_option(parser)
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    _, answer = ask(path_from(args), "GET", "sessions")
    if args.json:
        print(json.dumps(answer, indent=2))
        return DONE
    rows = [_HEAD, *(row(one) for one in answer["sessions"])]
    widths = [max(len(line[column]) for line in rows) for column in range(len(_HEAD))]
    for line in rows:
        cells = zip(line, widths, strict=True)
        # Words to the left, numbers to the right.
        first, second, *rest = (f"{cell:<{width}}" for cell, width in cells)
        print("  ".join([first, second, *(cell.strip().rjust(len(cell)) for cell in rest)]))
    return DONE


def row(session: dict[str, Any]) -> tuple[str, ...]:
    """Give the cells of one session."""
    figures, peer = session["figures"], session["peer"] or {}
    brought = figures["copied_bytes"] + figures["filled_bytes"]
    return (
        str(session["id"]),
        str(session["state"]),
        str(peer.get("pid", "?")),
        str(peer.get("uid", "?")),
        size(figures["memory_bytes"]),
        size(brought),
        str(figures["faults"]),
        str(figures["failures"]),
        duration(figures["p50_us"] / 1e6),
        duration(figures["p99_us"] / 1e6),
        duration(figures["seconds"]),
    )


def size(count: float) -> str:
    """Write bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Write a time for people."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 60:
        return f"{seconds / 60:.1f} min"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 0.001 else f"{seconds * 1e6:.0f} us"
