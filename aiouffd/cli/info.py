"""``aiouffd info``: what this kernel, build, user and container allow.

Knows: how to show a probe's report to people, programs and scripts.
Must not know: how to probe.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Final

from .. import __version__
from ..kernel.capabilities import NAMES, Capability, canonical
from ..kernel.probe import Report, probe

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_GREEN: Final = "\x1b[32m"
_RED: Final = "\x1b[31m"
_BOLD: Final = "\x1b[1m"
_PLAIN: Final = "\x1b[0m"

_EPILOG: Final = """\
exit status: 0; with --require 1 if something required is missing (each with what
would help, on stderr), 2 if a name is unknown.

  aiouffd info --require minor-shmem,move && start-the-server
"""


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "info",
        help="say what this kernel, user and container allow, and how to get the rest",
        description="Say what this kernel, build, user and container allow.\n"
        "Everything is tried, not guessed from a version; whatever is missing says how to get it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.add_argument(
        "--require",
        metavar="NAME[,NAME...]",
        action="append",
        default=[],
        help="print nothing, exit with status 1 if one of these is missing; may be repeated",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    wanted = [name for text in args.require for name in text.split(",") if name.strip()]
    unknown = [name for name in wanted if canonical(name) is None]
    if unknown:
        print(
            f"aiouffd: no capability is called {', '.join(unknown)}; there are:\n"
            + "\n".join(_wrapped(", ".join(NAMES), 88, "  "))
            + "\n  and bit-N, ioctl-N for bits of newer kernels",
            file=sys.stderr,
        )
        return 2
    if args.require and not wanted:
        print("aiouffd: --require names nothing", file=sys.stderr)
        return 2
    report = probe()
    required = list(dict.fromkeys(report[name] for name in wanted))
    missing = [capability for capability in required if not capability.available]
    if args.json:
        print(json.dumps(_as_json(report, required), indent=2))
    elif not required:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        width = min(shutil.get_terminal_size().columns, 120) if sys.stdout.isatty() else 100
        print(_table(report, colour, width))
    for capability in missing:
        print(f"aiouffd: {capability.name} is missing. {capability.remedy}", file=sys.stderr)
    return 1 if missing else 0


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    """Break text into lines, but never a name or a command at its hyphens."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _machine(report: Report) -> list[str]:
    """Say in two lines on what and as whom this runs."""
    seen = report.seen
    at = seen.circumstances
    rights = [
        "CAP_SYS_PTRACE" if at.ptrace else "no CAP_SYS_PTRACE",
        "initial user namespace" if at.initial_namespace else "a child user namespace",
        "a seccomp filter" if at.seccomp else "no seccomp filter",
        "no sysctl" if at.sysctl is None else f"vm.unprivileged_userfaultfd={at.sysctl}",
    ]
    features = "unknown" if seen.features is None else f"{seen.features:#x}"
    system = f"Linux {seen.release} {seen.machine}, features {features}"
    return [
        f"aiouffd {__version__}, Python {platform.python_version()}, {system}",
        f"uid {seen.uid}, {', '.join(rights)}",
    ]


def _table(report: Report, colour: bool, width: int) -> str:
    """Lay the capabilities out for people."""
    green, red, bold, plain = (_GREEN, _RED, _BOLD, _PLAIN) if colour else ("", "", "", "")
    first = max(len(capability.name) for capability in report.capabilities) + 2
    rows = [*_machine(report), ""]
    rows.append(f"{bold}{'capability':{first}}here  since  what it is{plain}")
    indent = " " * (first + 13)
    for one in report.capabilities:
        word = f"{green}yes{plain}   " if one.available else f"{red}no{plain}    "
        rows.append(f"{one.name:{first}}{word}{one.since:7}{one.about}")
        if one.remedy:
            rows += _wrapped(one.remedy, max(width, first + 43), indent)
    lacking = [capability.name for capability in report.capabilities if not capability.available]
    rows += ["", f"missing: {', '.join(lacking)}" if lacking else "nothing is missing"]
    return "\n".join(rows)


def _as_json(report: Report, required: list[Capability]) -> dict[str, object]:
    """Lay the report out for programs; with ``--require`` only what was asked for."""
    seen = report.seen
    chosen = required or report.capabilities
    return {
        "aiouffd": __version__,
        "kernel": seen.release,
        "machine": seen.machine,
        "uid": seen.uid,
        "circumstances": dataclasses.asdict(seen.circumstances),
        "gates": [dataclasses.asdict(attempt) for attempt in seen.attempts],
        # Masks as text: bit 63 is in use, and many JSON readers have 53 bits.
        "features": None if seen.features is None else f"{seen.features:#x}",
        "ioctls": f"{seen.ioctls:#x}",
        "range_ioctls": f"{seen.range_ioctls:#x}",
        "capabilities": {
            capability.name: {
                key: value for key, value in dataclasses.asdict(capability).items() if key != "name"
            }
            for capability in chosen
        },
    }
