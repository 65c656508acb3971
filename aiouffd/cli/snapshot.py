"""``aiouffd snapshot``: write what a target's memory holds now into a file.

Knows: how to ask for it.
Must not know: how a snapshot is taken.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from .control_client import add_option, ask, path_from
from .sessions import duration, size
from .statuses import DONE

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EPILOG = """\
The target is stopped (SIGSTOP) for the time of the copy and goes on after it.  The file is a
sparse layer over the image that the server serves:
  aiouffd snapshot 1 monday.diff
  aiouffd serve memory.img --layer monday.diff --socket vm.sock
"""


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "snapshot",
        help="write what a target's memory holds now into a file",
        description="Write what a target has changed of its image, without touching what it has"
        " not got yet.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("id", metavar="ID", help="of the session; aiouffd sessions lists them")
    parser.add_argument("output", metavar="OUT", help="written by the server, as its own user")
    add_option(parser)
    parser.add_argument(
        "--whole",
        action="store_true",
        help="bring what is missing first and write all of it: a file that needs no image",
    )
    parser.add_argument(
        "--paused",
        action="store_true",
        help="its owner has paused the target: do not stop it",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    query: dict[str, object] = {
        "path": os.path.abspath(args.output),
        "whole": int(args.whole),
        "stop": int(not args.paused),
    }
    place = ("sessions", args.id, "snapshot")
    _, taken = ask(path_from(args), "POST", *place, query=query, timeout=None)
    print(
        f"{args.output}: {size(taken['written_bytes'])} of {size(taken['compared_bytes'])} that the"
        f" target had, {size(taken['zero_bytes'])} of zeros that it had given back; it was paused"
        f" for {duration(taken['pause_seconds'])}"
    )
    return DONE
