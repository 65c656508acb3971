"""``aiouffd migrate``: the commands that move running programs.

Knows: the commands' names and modules.
Must not know: what a command does; migrations.

Law of this file: as in ``main``, the module of the command asked for is imported, and no other.
Each is ``migrate_NAME`` here, with ``add_parser(commands)``, which returns its parser, and
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
    "receive": "take a program that another machine sends",
    "send": "send a running program to another machine",
    "restart": "let a program go on here whose move has failed half-way",
    "receive-tree": "take a process and all that descend from it, by CRIU",
    "send-tree": "send a process and all that descend from it, by CRIU",
    "report": "show what a migration was, in figures or as a picture",
}

_EPILOG: Final = """\
a program that can move says so itself: aiouffd.migration.program, or any program that speaks
as it does.

  there:  aiouffd migrate receive 10.0.0.7:7440 TLS -- worker
  here:   aiouffd migrate send /run/worker.sock 10.0.0.7:7440 TLS --report move.json
  then:   aiouffd migrate report move.json --output move.png

any program, and all that descend from it, moves by CRIU:

  there:  aiouffd migrate receive-tree 10.0.0.7:7441 TLS
  here:   aiouffd migrate send-tree 4711 10.0.0.7:7441 TLS

TLS stands for --tls-cert, --tls-key and --tls-cacert (receive: and --client-name), or for --plain.

`aiouffd migrate COMMAND --help` explains a command.
"""


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.migrate_{command.replace('-', '_')}")


def add_parser(subparsers: Subparsers, command: str | None = None) -> argparse.ArgumentParser:
    """Add the group and its commands.

    Args:
        subparsers: Of the program's parser.
        command: The one that was asked for, as far as is known: only it gets its options.
    """
    parser = subparsers.add_parser(
        "migrate",
        help="move a running program to another machine, its memory before and behind it",
        description="Move a running program to another machine: its memory is copied while it"
        " runs, and what is left follows once it runs there.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="migrate_command", metavar="COMMAND", title="commands", required=True
    )
    for name, summary in COMMANDS.items():
        if name == command:
            _module(name).add_parser(commands)
        else:
            commands.add_parser(name, help=summary)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    status: int = _module(args.migrate_command).run(args)
    return status
