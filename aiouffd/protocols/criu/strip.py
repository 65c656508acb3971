"""A copy of a checkpoint without the memory that can be brought after its processes run.

Knows: folders of images, which stretches of the files of pages a restore reads at once.
Must not know: command lines, terminals.

What comes out has all that ``criu restore --lazy-pages`` itself reads: every small image, and
files of pages of the same length as before, in which what may come lazily is a hole.  The whole
checkpoint stays where it is, for whoever serves the rest.  A file ``stripped`` marks the copy, so
that nobody here serves its holes as pages.

Laws of this file:

* Nothing half-done stays: the copy has its name when it is whole.
* Only its owner may read it, as memory may hold secrets.
* What belongs to no process (shared memory) is copied in full: it is never lazy.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from ...errors import ImageError, SourceError
from ...image import Watcher, watch_nothing
from ...image.copying import pieces, read_in_order
from ...image.new_file import NewFile
from ...image.sparse import SparseWriter
from ...sources import Extents
from ...sources.urls import shown
from ...threads import in_thread
from .checkpoint import STRIPPED, Checkpoint, Folder
from .images import parse_pagemap
from .task_memory import PagesFile

_PAGEMAP: Final = re.compile(r"pagemap-(?:(?P<pid>[0-9]+)|.+)\.img")
_PIECE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Stripped:
    """What a copy amounts to.

    Attributes:
        kept_bytes: Pages that are in it.
        left_bytes: Pages that are not: they may come after the processes run.
        other_bytes: All other images.
    """

    kept_bytes: int
    left_bytes: int
    other_bytes: int


async def strip(
    checkpoint: Checkpoint, out: str | os.PathLike[str], *, watch: Watcher = watch_nothing
) -> Stripped:
    """Copy a checkpoint, but for what can be brought after its processes run.

    Args:
        checkpoint: Whose small images lie in a folder of this machine; its pages may be anywhere.
        out: The folder to make; it must not be there, or be empty.
        watch: Called now and then.

    Raises:
        ImageError: An image is missing, damaged, or cut short.
        SourceError: The small images lie elsewhere, or pages cannot be had.
        OSError: The copy cannot be written; or something is in its place.

    Cancellation: nothing is left of the copy.
    """
    _path_of(checkpoint.chain.folders[0], "")
    return await _Copy(checkpoint, os.path.realpath(out), watch).run()


class _Copy:
    """One copy being made."""

    def __init__(self, checkpoint: Checkpoint, out: str, watch: Watcher) -> None:
        self._checkpoint = checkpoint
        self._out = out
        self._watch = watch
        self._at_once: dict[PagesFile, Extents] = {}
        self._lazy: dict[PagesFile, int] = {}
        self._pagemaps: list[set[str]] = []  # those of processes that are needed, by level
        self._done = self._total = self._left = self._other = 0

    async def run(self) -> Stripped:
        """Make it, and give it its name."""
        await in_thread(self._check_place)
        await in_thread(self._look)
        folder, name = os.path.split(self._out)
        temporary = os.path.join(folder, f".{name[:200]}.{secrets.token_hex(4)}.part")
        try:
            await self._copy_level(0, temporary, set())
            await in_thread(_give_name, temporary, self._out)
        finally:
            await in_thread(shutil.rmtree, temporary, ignore_errors=True)
        return Stripped(self._done, self._left, self._other)

    def _check_place(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISDIR(os.lstat(self._out).st_mode):
                raise OSError(errno.ENOTDIR, "Something else is in its place", self._out)
            if os.listdir(self._out):
                raise OSError(errno.ENOTEMPTY, "It is there, and not empty", self._out)

    def _look(self) -> None:
        """Find what of each file of pages a restore reads at once."""
        stretches: dict[PagesFile, list[tuple[int, int]]] = {}
        for task in self._checkpoint.tasks:
            if task.dead:
                continue
            memory = self._checkpoint.memory(task.pid)
            for level, file in enumerate(memory.files):
                if level == len(self._pagemaps):
                    self._pagemaps.append(set())
                self._pagemaps[level].add(f"pagemap-{task.pid}.img")
                stretches.setdefault(file, [])
            for run in memory.runs:
                if run.file >= 0 and run.lazy:
                    file = memory.files[run.file]
                    self._lazy[file] = self._lazy.get(file, 0) + run.length
                elif run.file >= 0:
                    stretches[memory.files[run.file]].append((run.place, run.length))
        self._at_once = {file: _joined(found) for file, found in stretches.items()}
        self._total = sum(length for kept in self._at_once.values() for _, length in kept)

    async def _copy_level(self, level: int, target: str, shared: set[str]) -> None:
        """Copy the folder so many parents away, and the one that it needs in turn.

        Args:
            level: How many.
            target: The folder to make.
            shared: The pagemaps of shared memory that are needed of a parent.
        """
        folder = await self._checkpoint.chain.folder(level)
        names = await in_thread(_begin, folder, target)
        if level:
            needed = shared.union(*self._pagemaps[level : level + 1], ("inventory.img",))
            names = [name for name in names if name in needed]
        pages: set[str] = set()
        leaning: set[str] = set()
        for name in names:
            match = _PAGEMAP.fullmatch(name)
            if match is not None:
                data = await folder.read(name)
                pagemap = await in_thread(parse_pagemap, data, folder.named(name))
                file = PagesFile(level, f"pages-{pagemap.pages_id}.img", pagemap.stored)
                if file.name in pages:
                    raise ImageError(
                        folder.named(name), None, f"{file.name} is another pagemap's already"
                    )
                pages.add(file.name)
                of_task = match["pid"] is not None
                if pagemap.leans and not of_task:
                    leaning.add(name)
                await self._copy_pages(file, of_task, os.path.join(target, file.name))
        for name in names:
            if name not in pages:
                self._other += await in_thread(
                    _copy_file, _path_of(folder, name), os.path.join(target, name)
                )
        if leaning or level + 1 < len(self._pagemaps):
            await self._copy_level(level + 1, os.path.join(target, "parent"), leaning)

    async def _copy_pages(self, file: PagesFile, of_task: bool, target: str) -> None:
        """Copy what has to be there at once."""
        if of_task:
            kept = self._at_once.get(file, Extents([]))
            self._left += self._lazy.get(file, 0)
        else:
            kept = Extents([(0, file.length)] if file.length else [])
            self._total += file.length
        async with SparseWriter(target, file.length) as writer:
            if len(kept):
                source = await self._checkpoint.pages(file, stripped=True)
                async with aclosing(read_in_order(source, pieces(kept))) as reads:
                    async for offset, data in reads:
                        await writer.put(offset, data)
                        self._done += len(data)
                        self._watch(self._done, self._total)
            await writer.finish()


def _joined(stretches: list[tuple[int, int]]) -> Extents:
    """Put stretches in order; some may lie over each other."""
    joined = Extents([])
    last = 0
    for start, length in sorted(stretches):
        if start + length > last:
            joined.add(max(start, last), start + length - max(start, last))
            last = start + length
    return joined


def _path_of(folder: Folder, name: str) -> str:
    """Give the path of a file.

    Raises:
        SourceError: The folder is not on this machine.
    """
    if folder.path is None:
        raise SourceError(
            f"{shown(folder.location)}: a checkpoint is stripped from a folder of this machine;"
            " its pages may lie elsewhere (--pages)"
        )
    return os.path.join(folder.path, name)


def _begin(folder: Folder, target: str) -> list[str]:
    """Make a folder, and say which files of another are to be looked at for it."""
    try:
        os.mkdir(target, 0o700)
        with NewFile(os.path.join(target, STRIPPED)) as file:
            file.commit()
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.path.dirname(target)) from error
    return sorted(
        entry.name
        for entry in os.scandir(_path_of(folder, ""))
        if entry.is_file() and not entry.name.endswith(".log") and entry.name != STRIPPED
    )


def _copy_file(path: str, target: str) -> int:
    """Copy a small image; give its length."""
    with open(path, "rb") as source, NewFile(target) as file:
        length = 0
        while data := source.read(_PIECE_BYTES):
            length = file.write(length, [data])
        file.commit()
    return length


def _give_name(temporary: str, out: str) -> None:
    """Give the copy its name, in the place of an empty folder at most."""
    try:
        os.rename(temporary, out)
    except OSError as error:
        raise OSError(error.errno, error.strerror, out) from error
    folder = os.open(os.path.dirname(out), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
