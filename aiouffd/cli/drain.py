"""``aiouffd drain``: let a running server take nobody new, and stop when the last is through.

Knows: how to ask for it.
Must not know: how a server drains.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .control_client import add_option, ask, path_from
from .statuses import DONE

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "drain",
        help="let a running server refuse new targets and stop when the last is through",
        description="Refuse new targets, serve the living to their end, then stop: as SIGTERM.",
    )
    add_option(parser)
    parser.add_argument("--wait", action="store_true", help="return when the last is through")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    query: dict[str, object] = {} if args.wait else {"wait": 0}
    _, answer = ask(path_from(args), "POST", "drain", query=query, timeout=None)
    living = answer["living"]
    print(f"draining: {living} sessions live on" if answer["draining"] else "drained")
    return DONE
