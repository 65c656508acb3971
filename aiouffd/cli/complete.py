"""``aiouffd complete``: give a target all of its memory and let it live on by itself.

Knows: how to ask for it.
Must not know: how a session is completed.
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
        "complete",
        help="give a target all of its memory, then let it live on by itself",
        description="Bring every page of a target that is not there yet, then stop serving it:"
        " it needs the server no more.",
    )
    parser.add_argument("id", metavar="ID", help="of the session; aiouffd sessions lists them")
    add_option(parser)
    parser.add_argument("--wait", action="store_true", help="return when it is done")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    query: dict[str, object] = {} if args.wait else {"wait": 0}
    place = ("sessions", args.id, "complete")
    status, answer = ask(path_from(args), "POST", *place, query=query, timeout=None)
    if status == 202:
        print(f"session {args.id} is being completed")
    else:
        print(f"session {args.id}: {answer['outcome']}")
    return DONE
