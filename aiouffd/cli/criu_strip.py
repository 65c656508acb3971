"""``aiouffd criu strip``: what of a checkpoint has to be on the machine that restores.

Knows: options, what is said.
Must not know: how it is done.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from ..protocols.criu.checkpoint import Checkpoint
from ..protocols.criu.strip import strip
from .jobs import run_job
from .progress import Progress, amount

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EPILOG: Final = """\
example:
  aiouffd criu strip /checkpoints/web /restore/web

`criu restore --lazy-pages -D /restore/web` then needs nothing of /checkpoints/web but what is
served to it, from wherever that lies.
"""


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser = commands.add_parser(
        "strip",
        help="copy a checkpoint without the memory that can be brought later",
        description="Copy a checkpoint, but for the memory that can be brought after its processes"
        " run: what is left is small, and all that `criu restore --lazy-pages` itself reads.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("location", metavar="DIR", help="the checkpoint, which stays as it is")
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    parser.add_argument("--pages", metavar="DIR", help="the folder of its pages-N.img, if another")
    parser.add_argument(
        "--progress", action="store_true", help="say how far it has come even if stderr is a file"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    return run_job(_strip(args))


async def _strip(args: argparse.Namespace) -> int:
    async with await Checkpoint.open(args.location, pages=args.pages) as checkpoint:
        progress = Progress("copying", wanted=args.progress)
        try:
            done = await strip(checkpoint, args.out, watch=progress)
        finally:
            progress.end()
    print(
        f"{args.out}: {amount(done.kept_bytes)} of pages and {amount(done.other_bytes)} of other"
        f" images; {amount(done.left_bytes)} may be brought later"
    )
    return 0
