"""``aiouffd criu show``: say what a checkpoint holds.

Knows: options, how a checkpoint looks in a terminal.
Must not know: the formats of its files.

Law of this file: what is wrong with a file of pages does not hide the rest: it is said on stderr,
and the status is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from ..errors import ImageError
from ..protocols.criu.checkpoint import Checkpoint
from ..protocols.criu.images import Task
from ..protocols.criu.survey import Cell, Kind, Survey, picture, survey
from ..protocols.criu.task_memory import TaskMemory
from ..sources.urls import shown
from .picture import CELLS, ROWS, can_show, printable, rows, scale, shade_of, shades
from .progress import amount

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

#: Processes whose memory is drawn without being asked for.
_DRAWN: Final = 4

#: Characters that a process is set in at most, however deep in the tree it is.
_DEEPEST: Final = 60

#: What stands in a cell where most is not lazy.
_MARKS: Final = {Kind.LIVE: "~", Kind.AT_ONCE: "x"}

_EPILOG: Final = """\
examples:
  aiouffd criu show /checkpoints/web
  aiouffd criu show s3://bucket/checkpoints/web --pid 1234
  aiouffd criu show /checkpoints/web --plot web.svg
"""


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser = commands.add_parser(
        "show",
        help="say what a checkpoint holds: its processes and their memory",
        description="Show what a checkpoint holds: its processes, how much of their memory can be"
        " brought after they run, and where it lies.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "location", metavar="DIR", help="its folder: a path or a URL, as for `aiouffd serve`"
    )
    parser.add_argument("--pages", metavar="DIR", help="the folder of its pages-N.img, if another")
    parser.add_argument("--pid", type=int, help="draw the memory of this process alone")
    parser.add_argument(
        "--plot", metavar="OUT", help="draw into a file, .png or .svg (pip install aiouffd[plot])"
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    return asyncio.run(_show(args))


async def _show(args: argparse.Namespace) -> int:
    async with await Checkpoint.open(args.location, pages=args.pages) as checkpoint:
        if args.pid is not None:
            checkpoint.memory(args.pid)  # says what is wrong with it
        problems = await _check_pages(checkpoint)
    living = [task for task in checkpoint.tasks if not task.dead]
    surveys = {task.pid: survey(checkpoint.memory(task.pid)) for task in living}
    drawn = [task for task in living if args.pid in (None, task.pid)]
    if args.plot is not None:
        from ..protocols.criu import plot

        plot.plot(
            [
                (
                    f"{task.pid} {printable(task.name)}",
                    picture(checkpoint.memory(task.pid), plot.CELLS),
                )
                for task in drawn[: plot.MOST]
            ],
            args.plot,
        )
    if args.json:
        print(json.dumps(_fields(checkpoint, surveys, problems)))
    else:
        print("\n".join(_tree(checkpoint, surveys)))
        if args.pid is None and len(drawn) > _DRAWN:
            print(f"\n--pid PID draws the memory of one of {len(drawn)} processes.")
        else:
            for task in drawn:
                print()
                print("\n".join(_picture(task, checkpoint.memory(task.pid))))
    for problem in problems:
        print(f"aiouffd: {problem}", file=sys.stderr)
    return 1 if problems else 0


async def _check_pages(checkpoint: Checkpoint) -> list[ImageError]:
    """Open every file of pages that is needed, and say what is wrong with it."""
    problems = []
    needed = {
        file: None
        for task in checkpoint.tasks
        if not task.dead
        for file in checkpoint.memory(task.pid).files
        if file.length
    }
    for file in needed:
        try:
            await checkpoint.pages(file, stripped=True)
        except ImageError as error:
            problems.append(error)
    return problems


# --- for programs ----------------------------------------------------------------------


def _state(task: Task) -> str:
    return "dead" if task.dead else "stopped" if task.stopped else "alive"


def _fields(
    checkpoint: Checkpoint, surveys: Mapping[int, Survey], problems: list[ImageError]
) -> dict[str, Any]:
    processes = []
    for task in checkpoint.tasks:
        fields: dict[str, Any] = {
            "pid": task.pid,
            "ppid": task.ppid,
            "pgid": task.pgid,
            "sid": task.sid,
            "name": task.name,
            "state": _state(task),
            "threads": [] if task.dead else list(task.threads),
        }
        if task.pid in surveys:
            memory, one = checkpoint.memory(task.pid), surveys[task.pid]
            fields |= dataclasses.asdict(one) | {"lazy_share": one.lazy_share}
            fields["registered_bytes"] = memory.size
            fields["files"] = [{"name": str(file), "length": file.length} for file in memory.files]
        processes.append(fields)
    return {
        "location": shown(checkpoint.location),
        "run_id": checkpoint.inventory.run_id,
        "processes": processes,
        "problems": [
            {"file": one.file, "offset": one.offset, "problem": one.problem} for one in problems
        ],
    }


# --- for people ------------------------------------------------------------------------


def _tree(checkpoint: Checkpoint, surveys: Mapping[int, Survey]) -> Iterator[str]:
    sums = [
        sum(getattr(one, f"{name}_bytes") for one in surveys.values())
        for name in ("mapped", "dumped", "lazy", "live")
    ]
    mapped, dumped, lazy, live = sums
    dead = len(checkpoint.tasks) - len(surveys)
    share = f" ({lazy / dumped:.1%})" if dumped else ""
    yield f"{printable(shown(checkpoint.location))}: {_processes(len(checkpoint.tasks), dead)}"
    yield f"  {amount(mapped)} mapped, {amount(dumped)} dumped, {amount(lazy)} of it lazily{share}"
    if live:
        yield f"  {amount(live)} is in no file: only the page server of the dump has it"
    yield ""
    names = _names(checkpoint.tasks)
    width = max(7, *map(len, names.values()))
    yield f"{'process':{width}}  threads       mapped       dumped       lazily"
    tasks = {task.pid: task for task in checkpoint.tasks}
    for pid, name in names.items():
        task, head = tasks[pid], f"{name:{width}}"
        one = surveys.get(pid)
        if one is None:
            yield f"{head}  dead: its parent has not waited for it"
            continue
        notes = [
            *(["stopped"] if task.stopped else []),
            *([f"{amount(one.parent_bytes)} in parents"] if one.parent_bytes else []),
            *([f"{amount(one.live_bytes)} at its page server"] if one.live_bytes else []),
        ]
        line = (
            f"{head}  {len(task.threads):7}  {amount(one.mapped_bytes):>11}"
            f"  {amount(one.dumped_bytes):>11}  {amount(one.lazy_bytes):>11} {one.lazy_share:6.1%}"
        )
        yield f"{line}  {', '.join(notes)}".rstrip()


def _processes(count: int, dead: int) -> str:
    text = f"{count} process{'es' if count > 1 else ''}"
    return f"{text}, {dead} of them dead" if dead else text


def _names(tasks: tuple[Task, ...]) -> dict[int, str]:
    """Give each task's pid and name, drawn as a tree, from the top down."""
    bend, last, down = ("├─ ", "└─ ", "│  ") if can_show("├─└│") else ("|- ", "`- ", "|  ")
    children: dict[int, list[Task]] = {}
    for task in tasks:
        children.setdefault(task.ppid, []).append(task)
    names: dict[int, str] = {}
    waiting = [(task, "", "") for task in reversed(children.get(0, []))]
    while waiting:
        task, before, behind = waiting.pop()
        names[task.pid] = f"{before}{task.pid} {printable(task.name)}"
        below = children.get(task.pid, [])
        for child in reversed(below):
            is_last = child is below[-1]
            before = behind + (last if is_last else bend)
            further = (behind + ("   " if is_last else down))[:_DEEPEST]
            waiting.append((child, before, further))
    return names


def _picture(task: Task, memory: TaskMemory) -> Iterator[str]:
    drawn = picture(memory, CELLS * ROWS)
    if not drawn.cells:
        yield f"{task.pid} {printable(task.name)}: there is no page of it"
        return
    yield f"{task.pid} {printable(task.name)}: mappings that hold pages, end to end"
    of = shades()
    labels = (f"{cell.address:#x}" for cell in drawn.cells[::CELLS])
    yield from rows((_mark(cell, of) for cell in drawn.cells), labels)
    marks = {_MARKS[cell.kind] for cell in drawn.cells if cell.share and cell.kind in _MARKS}
    text = f"a cell is {amount(drawn.cell_bytes)}: {scale(of)}"
    if "x" in marks:
        text += ", x not lazily"
    if "~" in marks:
        text += ", ~ at its page server"
    yield f"{'address':>14}  {text}"


def _mark(cell: Cell, of: str) -> str:
    return _MARKS.get(cell.kind) or shade_of(cell.share, of) if cell.share else of[0]
