"""``aiouffd migrate report``: what a migration was, in figures or as a picture.

Knows: options.
Must not know: how reports come about, how pictures are drawn.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Final

from ..migration.report import ReportError, load
from .migrate_figures import table

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EPILOG: Final = """\
examples:
  aiouffd migrate send /run/worker.sock 10.0.0.7:7440 --plain --report move.json
  aiouffd migrate report move.json
  aiouffd migrate report move.json --output move.png

The picture shows over time what was sent and what the program wrote meanwhile, the demand faults
behind the switch, and which threads have waited for memory.
"""


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser = commands.add_parser(
        "report",
        help="show what a migration was, in figures or as a picture",
        description="Show the report that --report of `aiouffd migrate send` or `receive` writes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE")
    parser.add_argument(
        "--output",
        "-o",
        metavar="PICTURE",
        help="draw its timeline into this file, .png or .svg (pip install aiouffd[plot])",
    )
    parser.add_argument("--json", action="store_true", help="print the figures for programs")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    report = load(args.file)
    try:
        lines = table(report)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(f"{args.file} is not what it should be: {error!r}") from error
    if args.output is not None:
        from ..migration.report_plot import plot

        plot(report, args.output)
    if args.json:
        kept = ("version", "side", "name", "peer", "outcome", "error", "stage", "figures")
        print(json.dumps({name: report.get(name) for name in kept}))
    else:
        print("\n".join(lines))
    return 0
