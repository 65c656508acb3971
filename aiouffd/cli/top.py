"""``aiouffd top``: the sessions of a running server, and a map of one's memory, kept up to date.

Knows: rich, keys, how much fits onto a screen.
Must not know: how figures come about.

rich (extra ``tui``) is imported when the command runs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import select
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from .control_client import add_option, ask, path_from
from .sessions import duration, row, size
from .statuses import DONE, FAILED, CommandError

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.text import Text

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_COLUMNS: Final = (
    "id",
    "state",
    "pid",
    "uid",
    "memory",
    "brought",
    "faults",
    "failed",
    "p50",
    "p99",
    "age",
)
#: How full a cell is, from a page or so to all.
_FULL: Final = "░▒▓█"
_IN_FLIGHT, _REMOVED, _ABSENT = "◆", "×", "·"
_KEYS: Final = "q: quit   up, down (k, j): another session"
_EPILOG: Final = """\
the map has one character per stretch of memory:
  ░▒▓█  a part, or all of it is there     ·  nothing is there yet
  ◆     pages are being brought           ×  the target gave it back
"""


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "top",
        help="watch a running server: its sessions, and a map of one's memory",
        description="Watch the sessions of a running server and the memory of one of them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_option(parser)
    parser.add_argument("--session", metavar="ID", help="draw this one's memory first")
    parser.add_argument(
        "--interval",
        type=_interval,
        default=1.0,
        metavar="SECONDS",
        help="between two looks (default: 1)",
    )
    parser.add_argument("--once", action="store_true", help="print one picture and end")
    return parser


def _interval(text: str) -> float:
    value = float(text)
    if not 0.05 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is no time between two looks, in seconds")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError as error:
        raise ImportError("aiouffd top needs rich: pip install 'aiouffd[tui]'") from error
    view = View(path_from(args), args.session)
    console = Console(highlight=False)
    if args.once:
        console.print(view.frame(console))
        return DONE
    if not (sys.stdin.isatty() and console.is_terminal):
        raise CommandError(FAILED, "top needs a terminal; --once prints one picture")
    with (
        _keys() as number,  # before anything is shown: it forgets what was typed till then
        Live(view.frame(console), console=console, screen=True, auto_refresh=False) as live,
    ):
        live.refresh()
        due = time.monotonic() + args.interval
        while True:
            key = _key(number, due - time.monotonic())
            if key in {"q", "Q", "\x1b"}:
                return DONE
            view.step({"j": 1, "\x1b[B": 1, "k": -1, "\x1b[A": -1}.get(key, 0))
            live.update(view.frame(console), refresh=True)
            if not key:
                due = time.monotonic() + args.interval


@contextlib.contextmanager
def _keys() -> Iterator[int]:
    """Have keys come one by one, unechoed; Ctrl-C stays what it is."""
    import termios  # not on every system: importing this module must not fail there
    import tty

    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    try:
        tty.setcbreak(number)
        yield number
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)


def _key(number: int, patience: float) -> str:
    """Wait for a key; give nothing when the time is over."""
    ready, _, _ = select.select([number], [], [], max(patience, 0))
    # An arrow is three bytes, which come together.  The end of the terminal counts as q.
    return os.read(number, 8).decode(errors="replace") or "q" if ready else ""


class View:
    """What is on the screen.

    Attributes:
        chosen: Whose memory is drawn: a session's id, or empty.
    """

    def __init__(self, path: str, chosen: str | None) -> None:
        self.chosen = chosen or ""
        self._path = path
        self._ids: list[str] = []

    def step(self, distance: int) -> None:
        """Choose another session, so many further down."""
        if distance and self._ids:
            at = self._ids.index(self.chosen) if self.chosen in self._ids else 0
            self.chosen = self._ids[(at + distance) % len(self._ids)]

    def frame(self, console: Console) -> Group:
        """Look at the server and draw what there is."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        _, stats = ask(self._path, "GET", "stats")
        _, health = ask(self._path, "GET", "health")
        _, answer = ask(self._path, "GET", "sessions")
        sessions = answer["sessions"]
        self._ids = [one["id"] for one in sessions]
        if self.chosen not in self._ids:
            self.chosen = self._ids[0] if self._ids else ""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in _COLUMNS:
            left = name in {"id", "state"}
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
        room = max(console.height - 12, 3)
        for one in _around(sessions, self.chosen, room):
            table.add_row(*row(one), style="reverse" if one["id"] == self.chosen else "")
        if len(sessions) > room:
            table.add_row("", f"... {len(sessions)} in all")
        return Group(
            *_head(health, stats),
            Text(),
            table,
            Text(),
            *self._map(console),
            *([Text(_KEYS, style="dim")] if console.is_terminal else []),
        )

    def _map(self, console: Console) -> list[Text]:
        from rich.text import Text

        if not self.chosen:
            return [Text("nobody is served")]
        width = min(max(console.width - 2, 8), 4096)
        try:
            _, one = ask(self._path, "GET", "sessions", self.chosen, query={"cells": width})
        except CommandError as gone:
            return [Text(str(gone), style="dim")]
        lines = []
        for region in one["regions"]:
            drawn = region["map"]
            label = f"session {self.chosen}, {region['name']}: {size(region['length'])}"
            lines.append(Text(f"{label}, {size(drawn['cell_bytes'])} a character"))
            lines.append(_cells(drawn, region["page_size"]))
        return lines


def _head(health: dict[str, Any], stats: dict[str, Any]) -> list[Text]:
    from rich.text import Text

    counters, latency, shares = stats["counters"], stats["latency"], stats["sharing"]
    brought = counters["copied_bytes"] + counters["filled_bytes"]
    lines = [
        Text(
            f"aiouffd {health['version']}, pid {health['pid']}, {health['status']}"
            f" {health['image']} on {health['socket']} for {duration(health['seconds'])}"
        ),
        Text(
            f"{stats['living']} sessions live, {stats['served']} in all,"
            f" {stats['refused']} peers refused;"
            f" {size(brought)} brought, {size(counters['filled_bytes'])} of it ahead"
        ),
        Text(
            f"{counters['faults']} faults, {stats['in_flight']} in flight,"
            f" {counters['failures']} failed; p50 {duration(latency['p50_us'] / 1e6)},"
            f" p99 {duration(latency['p99_us'] / 1e6)}"
        ),
    ]
    if shares is not None:
        saved = shares["saved_bytes"]
        lines.append(
            Text(
                f"{shares['clones']} clones map {size(shares['mapped_bytes'])} of one copy of"
                f" {size(shares['image_bytes'])}, which {'costs' if saved < 0 else 'saves'}"
                f" {size(abs(saved))}; {size(shares['private_bytes'])} are their own"
            )
        )
    return lines


def _around(sessions: list[dict[str, Any]], chosen: str, room: int) -> list[dict[str, Any]]:
    """Give the part of a long table that has the chosen row."""
    at = next((n for n, one in enumerate(sessions) if one["id"] == chosen), 0)
    first = max(min(at - room // 2, len(sessions) - room), 0)
    return sessions[first : first + room]


def _cells(drawn: dict[str, Any], page_size: int) -> Text:
    """Draw a region, one character per cell."""
    from rich.text import Text

    count = len(drawn["removed"])
    unknown = drawn["filled"] is None
    filled = [0] * count if unknown else drawn["filled"]
    pages = max(drawn["cell_bytes"] // page_size, 1)
    cells = []
    for there, busy, removed in zip(filled, drawn["in_flight"], drawn["removed"], strict=True):
        if busy:
            cells.append((_IN_FLIGHT, "yellow"))
        elif there:
            cells.append((_FULL[min(3 * there // pages, 3)], "green"))
        elif removed:
            cells.append((_REMOVED, "red"))
        else:
            cells.append(("?" if unknown else _ABSENT, "dim"))
    text = Text()
    for style, run in itertools.groupby(cells, key=lambda cell: cell[1]):
        text.append("".join(character for character, _ in run), style)
    return text
