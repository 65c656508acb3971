"""The ``aiouffd`` command: which commands there are, and how they end.

Knows: the commands' names and modules; how they end.
Must not know: what a command does.

Laws of this file:

* A command's module is imported when that command is asked for, and no other: help and a
  mistyped option cost no event loop.  Each module has ``add_parser(subparsers)``, which
  returns its parser, and ``run(args)``, which returns the exit status.  A module that has
  commands of its own does as much with them: its ``add_parser`` takes the name of the one that
  was asked for besides.
* Errors that say what to do (UffdError, OSError, ImportError) are one line on stderr and status
  1, or the CommandError's own; what argparse refuses is 2, Ctrl-C 130, a closed pipe 141.
  ``python -X dev`` shows tracebacks.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Final

from .. import __version__
from ..errors import UffdError
from . import statuses

#: Every command and what it does, in the order of the help.
COMMANDS: Final[dict[str, str]] = {
    "info": "say what this kernel, user and container allow, and how to get the rest",
    "serve": "serve the memory of other processes from an image file",
    "export": "let other aiouffd servers read an image over the network",
    "keep": "run a server so that nothing is lost when it dies",
    "criu": "checkpoints of processes, restored lazily by CRIU",
    "migrate": "move a running program to another machine, its memory before and behind it",
    "image": "pack, unpack, compare and check images",
    "working-set": "look at recorded sets of pages, combine and compare them",
    "sessions": "list who is served by a running server",
    "top": "watch a running server: its sessions, and a map of one's memory",
    "complete": "give a target all of its memory, then let it live on by itself",
    "snapshot": "write what a target's memory holds now into a file",
    "drain": "let a running server refuse new targets and stop when the last is through",
    "demo": "see a process run on lazily served memory, checked against the file",
}

#: Those whose own commands are modules, too.
GROUPS: Final = frozenset({"criu", "migrate"})

_DESCRIPTION: Final = "Page faults as coroutines: serve the memory of processes from user space."

_EPILOG: Final = """\
start here:
  aiouffd info                           what works on this machine
  aiouffd demo                           watch memory arrive page by page
  aiouffd serve IMAGE --socket PATH      a lazy-memory server (Firecracker's protocol)
  aiouffd export IMAGE                   the image for other servers to read
  aiouffd keep -- aiouffd serve …         the same, and nothing is lost when it dies
  aiouffd criu show DIR                  what a checkpoint of CRIU's holds
  aiouffd migrate send, receive          move a running program to another machine
  aiouffd image pack IMAGE OUT           a compressed image, served as it is
  aiouffd working-set show FILE          what `serve --record` has seen
  aiouffd sessions, aiouffd top          who is served by one that runs (with --control)
  aiouffd snapshot ID OUT                write what one of them has changed into a file
  aiouffd complete, aiouffd drain        let one target, or all, live on without it

`aiouffd COMMAND --help` explains a command.
"""


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{command.replace('-', '_')}")


def _parser(command: str | None, inner: str | None) -> argparse.ArgumentParser:
    """Make the parser; only the chosen command's module is imported."""
    parser = argparse.ArgumentParser(
        prog="aiouffd",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"aiouffd {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, summary in COMMANDS.items():
        if name == command:
            also = (inner,) if name in GROUPS else ()
            _module(name).add_parser(subparsers, *also)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def _quiet_stdout() -> None:
    """Let the interpreter flush at exit into nothing: the reader of our output has gone."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)


def _stand_in_for_closed() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed: else the next socket becomes it."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
            setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: SIM115 - for good


def _told(error: BaseException) -> str:
    """Say an error as people do: what it is about, and what is the matter."""
    if isinstance(error, OSError) and error.strerror:
        about = "" if error.filename is None else f"{error.filename}: "
        return about + error.strerror
    return str(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the program's name; by default those of this process.

    Returns:
        The exit status.
    """
    _stand_in_for_closed()
    arguments = list(sys.argv[1:] if argv is None else argv)
    status: int
    # The first words that are no options: neither the program itself nor a group of commands
    # has an option with a value.
    words = (word for word in arguments if not word.startswith("-"))
    command, inner = next(words, None), next(words, None)
    try:
        parser = _parser(command, inner)
        args = parser.parse_args(arguments)
        if args.command is None:
            parser.print_help()
            status = 0
        else:
            status = _module(args.command).run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return statuses.INTERRUPTED
    except BrokenPipeError:
        _quiet_stdout()
        return statuses.NO_READER
    except (UffdError, OSError, ImportError) as error:
        # An ImportError names the extra that is missing.
        if sys.flags.dev_mode:
            raise
        print(f"aiouffd: {_told(error)}", file=sys.stderr)
        return error.status if isinstance(error, statuses.CommandError) else statuses.FAILED
    return status
