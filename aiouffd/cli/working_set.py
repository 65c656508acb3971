"""``aiouffd working-set``: look at recorded sets of pages, combine them, compare them.

Knows: options, and how a set looks in a terminal.
Must not know: the file format, how sets are recorded and replayed.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from ..working_set import GRANULE, Records, WorkingSet, combine, compare
from .picture import CELLS, ROWS, printable, rows, scale, shade_of, shades

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EPILOG: Final = """\
examples:
  aiouffd serve memory.img --socket vm.sock --record 'run-{id}.set'
  aiouffd working-set show run-1.set
  aiouffd working-set combine run-*.set --at-least 2 --output memory.set
  aiouffd serve memory.img --socket vm.sock --replay memory.set
"""


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "working-set",
        help="look at recorded sets of pages, combine and compare them",
        description="Which pages of an image its users need, as `aiouffd serve --record` saw it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    jobs = parser.add_subparsers(dest="job", metavar="JOB", required=True)
    show = jobs.add_parser("show", help="say what a set holds, and draw where it lies")
    show.add_argument("file", metavar="FILE")
    show.add_argument(
        "--plot",
        metavar="OUT",
        help="draw it into a file, .png or .svg (pip install aiouffd[plot])",
    )
    show.add_argument("--json", action="store_true", help="print JSON for programs")
    merge = jobs.add_parser("combine", help="make one set of several")
    merge.add_argument("files", metavar="FILE", nargs="+")
    merge.add_argument("--output", "-o", metavar="OUT", required=True)
    how = merge.add_mutually_exclusive_group()
    how.add_argument(
        "--at-least",
        type=int,
        default=1,
        metavar="K",
        help="pages that lie in so many of the sets (default: 1, the union)",
    )
    how.add_argument("--all", action="store_true", help="pages that lie in every set")
    merge.add_argument("--json", action="store_true", help="print JSON for programs")
    versus = jobs.add_parser("compare", help="say how alike two sets are")
    versus.add_argument("first", metavar="FIRST")
    versus.add_argument("second", metavar="SECOND")
    versus.add_argument("--json", action="store_true", help="print JSON for programs")
    for job in (merge, versus):
        job.add_argument(
            "--any-image",
            action="store_true",
            help="though a set does not say which image it was made for",
        )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    jobs = {"show": _show, "combine": _combine, "compare": _compare}
    return jobs[args.job](args)


def _show(args: argparse.Namespace) -> int:
    one = _load(args.file)
    with open(args.file, "rb") as file:
        records = sum(1 for _ in Records(file))
    if args.plot is not None:
        from ..working_set_plot import plot

        try:
            plot(args.file, args.plot)
        except ImportError as error:
            print(f"aiouffd: {error}", file=sys.stderr)
            return 1
    fields = _fields(one) | {"records": records}
    if args.json:
        print(json.dumps(fields | {"densities": one.densities(CELLS * ROWS)}))
        return 0
    print("\n".join(_lines(one, records)))
    print()
    print("\n".join(_picture(one)))
    return 0


def _combine(args: argparse.Namespace) -> int:
    at_least = len(args.files) if args.all else args.at_least
    if not 1 <= at_least <= len(args.files):
        print(
            f"aiouffd: {len(args.files)} sets: a page lies in 1 to {len(args.files)} of them,"
            f" not in {at_least}",
            file=sys.stderr,
        )
        return 2
    result = combine(map(_load, args.files), at_least, any_image=args.any_image)
    result.save(args.output)
    if args.json:
        print(json.dumps(_fields(result)))
    else:
        print(f"{args.output}: {_amount(result)}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    first, second = _load(args.first), _load(args.second)
    found = compare(first, second, any_image=args.any_image)
    if args.json:
        fields = {f"{name}_bytes": count * GRANULE for name, count in found._asdict().items()}
        print(json.dumps(fields | {"jaccard": found.jaccard}))
        return 0
    either = found.both + found.only_first + found.only_second
    for name, count in (
        ("in both", found.both),
        (f"only in {args.first}", found.only_first),
        (f"only in {args.second}", found.only_second),
    ):
        print(f"{_size(count * GRANULE):>12}  {count / either if either else 0:6.1%}  {name}")
    print(f"alike (Jaccard): {found.jaccard:.3f}")
    return 0


def _load(path: str) -> WorkingSet:
    one = WorkingSet.load(path)
    if one.skipped:
        print(
            f"aiouffd: {path}: {one.skipped} bad records left out; the first: {one.problem}",
            file=sys.stderr,
        )
    return one


def _fields(one: WorkingSet) -> dict[str, Any]:
    header = one.header
    return {
        "identity": header.identity,
        "image_size": header.image_size,
        "page_size": header.page_size,
        "when": header.when,
        "window": header.window,
        "combined": header.combined,
        "bytes": one.length,
        "share": one.share,
        "runs": sum(1 for _ in one.runs()),
        "skipped": one.skipped,
    }


def _lines(one: WorkingSet, records: int) -> list[str]:
    header = one.header
    when = datetime.fromtimestamp(header.when).astimezone().isoformat(" ", "seconds")
    how = "combined" if header.combined else f"recorded for {header.window:g} s"
    identity = printable(header.identity) or "which one is not known"
    return [
        f"image    {_size(header.image_size)}, {identity}",
        f"set      {_amount(one)}, in {sum(1 for _ in one.runs())} runs",
        f"made     {when}, {how}, {records} records, pages of {header.page_size} bytes",
    ]


def _amount(one: WorkingSet) -> str:
    return f"{_size(one.length)}, {one.share:.1%} of the image"


def _size(count: int) -> str:
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.1f} {unit}"
    return f"{count} B"


def _picture(one: WorkingSet) -> list[str]:
    """Draw where in the image the set lies: a row per eighth, the darker the more of it."""
    densities = one.densities(CELLS * ROWS)
    count = len(densities)
    of = shades()
    labels = (f"{at * one.granules // count * GRANULE:,}" for at in range(0, count, CELLS))
    lines = rows((shade_of(density, of) for density in densities), labels)
    cell = _size(one.granules * GRANULE // count)
    return [*lines, f"{'offset':>14}  a cell is {cell}: {scale(of)}"]
