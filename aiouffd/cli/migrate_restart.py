"""``aiouffd migrate restart``: an operator's order to a program whose move has failed half-way.

Knows: options, what is said.
Must not know: migrations.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING, Final

from ..errors import PeerError
from ..migration.moving import Leaving
from . import statuses

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EPILOG: Final = """\
When `aiouffd migrate send` ends with status 7, the program stands still here with all of its
memory: it was told to move, and whether it runs there is not known.  This lets it go on here.

That is safe only if it does not run there, and never will: look whether its process lives on the
other machine, and end it there first.  Else there are two of it, and what the other one has done
since is done again.
"""


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser = commands.add_parser(
        "restart",
        help="let a program go on here whose move has failed half-way",
        description="Let a program go on here that stands still since its move has failed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("socket", metavar="SOCKET", help="where the program can be told to")
    return parser


def run(args: argparse.Namespace) -> int:
    """Give the order."""
    return asyncio.run(_restart(args.socket))


async def _restart(path: str) -> int:
    try:
        leaving = await Leaving.open(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    async with leaving:
        if leaving.stage == "running":
            print(f"{leaving.name or 'the program'} (pid {leaving.peer.pid}) runs; nothing to do")
            return statuses.DONE
        try:
            await leaving.restart()
        except PeerError as error:
            raise statuses.CommandError(statuses.REFUSED, f"{path}: {error}") from error
        print(
            f"{leaving.name or 'the program'} (pid {leaving.peer.pid}) goes on here.  It must not"
            " run anywhere else"
        )
    return statuses.DONE
