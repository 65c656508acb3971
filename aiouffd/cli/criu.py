"""``aiouffd criu``: the commands around checkpoints of processes that CRIU makes and restores.

Knows: the commands' names and modules.
Must not know: what a command does; CRIU.

Law of this file: as in ``main``, the module of the command asked for is imported, and no other.
Each is ``criu_NAME`` here, with ``add_parser(commands)``, which returns its parser, and
``run(args)``, which returns the exit status.
"""

from __future__ import annotations

import argparse
import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

#: Every command and what it does, in the order of the help.
COMMANDS: Final[dict[str, str]] = {
    "show": "say what a checkpoint holds: its processes and their memory",
    "lazy-pages": "serve the memory of what `criu restore --lazy-pages` restores",
    "strip": "copy a checkpoint without the memory that can be brought later",
    "page-server": "give a checkpoint's pages to criu lazy-pages, or receive those of a dump",
}

_EPILOG: Final = """\
`aiouffd criu COMMAND --help` explains a command.
"""


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.criu_{command.replace('-', '_')}")


def add_parser(subparsers: Subparsers, command: str | None = None) -> argparse.ArgumentParser:
    """Add the group and its commands.

    Args:
        subparsers: Of the program's parser.
        command: The one that was asked for, as far as is known: only it gets its options.
    """
    parser = subparsers.add_parser(
        "criu",
        help="checkpoints of processes, restored lazily by CRIU",
        description="Checkpoints of processes as CRIU (criu dump) makes them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="criu_command", metavar="COMMAND", title="commands", required=True
    )
    for name, summary in COMMANDS.items():
        if name == command:
            _module(name).add_parser(commands)
        else:
            commands.add_parser(name, help=summary)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    status: int = _module(args.criu_command).run(args)
    return status
