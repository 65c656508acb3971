"""``aiouffd criu show``: say what a checkpoint holds.

Knows: options, how a checkpoint looks in a terminal.
Must not know: the formats of its files.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING

from ..protocols.criu.images import parse_core, parse_pstree
from ..sources.urls import open_source

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser = commands.add_parser(
        "show",
        help="say what a checkpoint holds: its processes and their memory",
        description="Show the processes of a checkpoint that `criu dump` made.",
    )
    parser.add_argument("location", metavar="DIR", help="its folder: a path or a URL")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    return asyncio.run(_show(args.location))


async def _show(location: str) -> int:
    depth: dict[int, int] = {}
    for task in parse_pstree(await _read(location, "pstree.img")):
        name = f"core-{task.pid}.img"
        core = parse_core(await _read(location, name), name)
        depth[task.pid] = depth.get(task.ppid, -1) + 1
        print(f"{'  ' * depth[task.pid]}{task.pid} {core.name}{' (dead)' if core.dead else ''}")
    return 0


async def _read(location: str, name: str) -> bytes:
    source = await open_source(f"{location}/{name}")
    try:
        return bytes(memoryview(await source.read(0, source.size)))
    finally:
        await source.aclose()
