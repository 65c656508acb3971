"""``aiouffd demo``: watch a process run on lazily served memory, and check its bytes.

Knows: how to show a map of pages, and a table.
Must not know: how to serve; it uses the server as any program would.

The process that is served is ``demo_target``.  It hands its memory over as a VMM does, so what
is seen here is what a snapshot restored by Firecracker goes through.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Final, TextIO

from ..errors import NotSupported, SourceError, UffdError
from ..events import Event, PageFault
from ..protocols import firecracker
from ..ranges import PAGE_SIZE, align_up
from ..reports import Ended, Refused, Report
from ..server import Server
from ..service import Service
from ..session_figures import Figures
from ..sources.file import FileSource
from ..uffd import Userfaultfd
from .demo_target import Figures as TargetFigures

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_MAX_BYTES: Final = 1 << 28  # of the image are served: a few seconds even on a busy machine
_MAX_FAULTS: Final = 1 << 14  # a larger image is brought in chunks
_SLOW_S: Final = 2.5  # how long the first third takes when somebody watches
_FRAME_S: Final = 0.05
_LIMIT_S: Final = 60.0
_USER_MODE_ONLY: Final = (
    "unprivileged: serving user-mode faults only, which is all that this demo needs"
)


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "demo",
        help="see a process run on lazily served memory, checked against the file",
        description="Start a server and a process whose memory is a file of this machine,"
        " brought page by page when it is touched; compare what it read with the file.",
    )
    parser.add_argument(
        "--image", metavar="FILE", help="the file to serve (default: Python's own library)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the demo; give the exit status."""
    user_mode_only = _needs_user_mode_only()
    return asyncio.run(_demo(args.image or find_python(), user_mode_only=user_mode_only))


def _needs_user_mode_only() -> bool:
    """Find out which userfaultfd this user may open.

    Raises:
        NotSupported: None; says what would help.
    """
    try:
        Userfaultfd.open().close()
    except NotSupported:
        Userfaultfd.open(user_mode_only=True).close()
        return True
    return False


def find_python() -> str:
    """Find the file that holds this interpreter's code: its library, else its executable."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            path = line.rstrip("\n").partition("/")[2]
            if os.path.basename(path).startswith("libpython"):
                return "/" + path
    return os.path.realpath("/proc/self/exe")


class Part(FileSource):
    """The beginning of a file that is too large for a demo."""

    @property
    def size(self) -> int:
        """Length of the part, in bytes."""
        return min(super().size, _MAX_BYTES)


class PageMap:
    """A map of pages drawn with characters; an Observer of what is served.

    Each cell stands for as many pages as make the map fit.
    """

    def __init__(self, size: int, chunk: int, columns: int, rows: int, *, unicode: bool) -> None:
        self.pages = align_up(size) // PAGE_SIZE
        self.faults = 0
        self.served = bytearray(self.pages)
        self._chunk_pages = max(chunk // PAGE_SIZE, 1)
        self._per_cell = max(1, -(-self.pages // (columns * rows)))
        self._columns = columns
        self._shades = "·░▒▓█" if unicode else ".-=*#"

    def begin(self, fault: PageFault) -> None:
        """Count it."""
        del fault
        self.faults += 1

    def end(self, fault: PageFault, outcome: str, elapsed_ns: int) -> None:
        """Note the page, and those that came with it."""
        del outcome, elapsed_ns
        first = fault.offset // PAGE_SIZE // self._chunk_pages * self._chunk_pages
        last = min(first + self._chunk_pages, self.pages)
        self.served[first:last] = b"\1" * (last - first)

    def event(self, event: Event) -> None:
        """Nothing to draw."""

    def failure(self, fault: PageFault, error: Exception) -> None:
        """Nothing to draw: the report at the end says it."""

    def lines(self) -> list[str]:
        """Draw the map as it is now."""
        step, shades = self._per_cell, self._shades
        cells = []
        for first in range(0, self.pages, step):
            part = self.served[first : first + step]
            full = part.count(1)
            shade = -(-full * (len(shades) - 1) // len(part))  # something is never nothing
            cells.append(shades[shade])
        text = "".join(cells)
        return [text[at : at + self._columns] for at in range(0, len(text), self._columns)]


async def _demo(image: str, *, user_mode_only: bool) -> int:
    whole = os.stat(image).st_size
    if not whole:
        raise SourceError(f"{image} is empty: nothing to serve")
    size = min(whole, _MAX_BYTES)
    live = sys.stdout.isatty()
    print(f"serving {image} to a process that has none of it")
    if size < whole:
        print(f"the file has {_human(whole)}; its first {_human(size)} are served")
    if user_mode_only:
        print(_USER_MODE_ONLY)
    chunk = 0
    while size // max(chunk, PAGE_SIZE) > _MAX_FAULTS:
        chunk = max(chunk * 2, 2 * PAGE_SIZE)
    page_map = _make_map(size, chunk)
    reports: list[Report] = []
    refused = asyncio.Event()

    def note(report: Report) -> None:
        reports.append(report)
        if isinstance(report, Refused):
            refused.set()

    with tempfile.TemporaryDirectory(prefix="aiouffd-demo-") as directory:
        server = Server(
            os.path.join(directory, "socket"),
            firecracker.receive,
            lambda: Part(image),
            service=Service(chunk=chunk),
            report=note,
            observers=[page_map],
        )
        async with server, asyncio.timeout(_LIMIT_S):
            drawing = asyncio.ensure_future(_draw(page_map, sys.stdout)) if live else None
            try:
                target = await _run_target(
                    refused,
                    path=server.path,
                    size=size,
                    user_mode_only=user_mode_only,
                    slow_s=_SLOW_S * live,
                )
                await server.drain()
            finally:
                if drawing is not None:
                    drawing.cancel()
                    await asyncio.wait([drawing])
        if target is None:
            raise UffdError(f"the demo's own process was {reports[0]}")
        if live:
            _redraw(page_map, sys.stdout)
        own = await asyncio.to_thread(_digest_of, image, size)
    return _conclude(image, size, target, own, reports)


def _make_map(size: int, chunk: int) -> PageMap:
    columns, rows = shutil.get_terminal_size()
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    return PageMap(size, chunk, min(columns - 2, 96), max(min(rows - 8, 16), 2), unicode=unicode)


async def _run_target(refused: asyncio.Event, **arguments: object) -> TargetFigures | None:
    """Run the process that is served; None if the server refused it."""
    # The child finds this very package, wherever it was started from.
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        f"{__package__}.demo_target",
        json.dumps(arguments),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    reading = asyncio.ensure_future(process.communicate())
    refusal = asyncio.ensure_future(refused.wait())
    try:
        await asyncio.wait((reading, refusal), return_when=asyncio.FIRST_COMPLETED)
    finally:
        refusal.cancel()
        if not reading.done():  # it waits for a page that nobody will bring
            process.kill()
        output, _ = await reading
    if refused.is_set():
        return None
    if process.returncode:
        raise UffdError(f"the served process ended with status {process.returncode}")
    figures: TargetFigures = json.loads(output)
    return figures


# --- what is shown ---------------------------------------------------------------------


async def _draw(page_map: PageMap, out: TextIO) -> None:
    """Draw the map until cancelled, each frame over the last."""
    began = time.monotonic()
    height = len(page_map.lines()) + 1
    out.write("\n" * height)
    while True:
        _redraw(page_map, out)
        await asyncio.sleep(_FRAME_S)
        if time.monotonic() - began > _LIMIT_S:
            return


def _redraw(page_map: PageMap, out: TextIO) -> None:
    lines = page_map.lines()
    served = page_map.served.count(1)
    lines.append(f"{served:,} of {page_map.pages:,} pages, {page_map.faults:,} faults")
    # Up over the last frame, then each line anew, with what was there before wiped out.
    out.write(f"\x1b[{len(lines)}F" + "".join(f"\x1b[2K{line}\n" for line in lines))
    out.flush()


def _conclude(image: str, size: int, target: TargetFigures, own: str, reports: list[Report]) -> int:
    """Print the table; give the exit status."""
    figures = next(report.session.figures() for report in reports if isinstance(report, Ended))
    equal = target["sha256"] == own
    pages = align_up(size) // PAGE_SIZE
    rows = [
        ("image", f"{image} ({_human(size)}, {pages:,} pages)"),
        ("first byte after", f"{target['first_byte_s'] * 1000:.2f} ms"),
        ("faults", f"{figures.faults:,}"),
        ("pages per second", _rate(target)),
        ("answered within", f"{figures.p50_us:.0f} us (median), {figures.p99_us:.0f} us (99 %)"),
        ("brought", _brought(figures)),
        ("SHA-256", target["sha256"]),
        ("the file's own", "equal" if equal else own),
    ]
    width = max(len(name) for name, _ in rows)
    print()
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    if not equal:
        print("\nThe process read other bytes than the file has.", file=sys.stderr)
    return 0 if equal else 1


def _rate(target: TargetFigures) -> str:
    if not target["pages"]:
        return "too few to tell"
    return f"{target['pages'] / max(target['seconds'], 1e-9):,.0f} (in random order)"


def _brought(figures: Figures) -> str:
    ahead = f", {_human(figures.filled_bytes)} ahead" if figures.filled_bytes else ""
    zeros = f", {figures.zero_pages:,} zero pages" if figures.zero_pages else ""
    return f"{_human(figures.copied_bytes)} on demand{ahead}{zeros}"


def _digest_of(image: str, size: int) -> str:
    digest = hashlib.sha256()
    with open(image, "rb") as file:
        while size:
            data = file.read(min(size, 1 << 20))
            if not data:
                break
            digest.update(data)
            size -= len(data)
    return digest.hexdigest()


def _human(size: int) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << shift:
            return f"{size / (1 << shift):.1f} {unit}"
    return f"{size} bytes"
