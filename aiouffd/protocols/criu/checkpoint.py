"""A checkpoint of CRIU's as it lies somewhere: its tasks, their memory, its parents.

Knows: the names of images in a folder, chains of folders, who has opened which file of pages.
Must not know: bytes of images; page faults.

A checkpoint is a folder on this machine or under a URL (``s3://bucket/checkpoints/web``).  Its
pages may lie somewhere else than its small images, and be packed (``aiouffd image pack``).  An
incremental one has its parent as ``parent`` beside its images: in a folder of this machine as
the link that CRIU makes, elsewhere as a folder within it.

Laws of this file:

* The small images are read once, when the checkpoint is opened; what is then wrong with any of
  them, or missing, is ImageError at once, not at a fault.
* A file of pages is opened when somebody wants to read from it, once for all who do.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import stat
from dataclasses import replace
from types import TracebackType
from typing import Final, Self

from ...errors import ClosedError, ImageError, SourceError, UffdError
from ...sources import Source
from ...sources.reads import all_of
from ...sources.urls import open_source, path_of, shown
from ...threads import in_thread
from .images import (
    Inventory,
    Pagemap,
    Task,
    Vma,
    has_wide_counts,
    parse_core,
    parse_inventory,
    parse_mm,
    parse_pagemap,
    parse_pstree,
)
from .task_memory import Level, PagesFile, TaskMemory
from .task_source import PageReader, TaskSource

#: A file that says that a folder is a copy without what comes lazily: its files of pages have
#: holes there, which must never be taken for zeros.
STRIPPED: Final = "stripped"

_AT_ONCE: Final = 16  # images being read
_MOST_BYTES: Final = 1 << 30  # of a small image
_MOST_PARENTS: Final = 200


def name_in(location: str, name: str) -> str:
    """Give the URL or path of a file in a folder that a URL or path names."""
    if path_of(location) is not None and not location.lower().startswith("file:"):
        return os.path.join(location, name)
    folder, question, query = location.partition("?")
    return f"{folder.rstrip('/')}/{name}{question}{query}"


class Folder:
    """The folder of one checkpoint in a chain.

    Attributes:
        location: A path or URL.
        level: How many parents away from the first it is.
    """

    def __init__(self, location: str, pages: str | None = None, level: int = 0) -> None:
        """Name a folder.

        Args:
            location: Where the small images are.
            pages: Where the files of pages are, if that is not there too.
            level: See the attribute.
        """
        self.location = location
        self.level = level
        self.path = path_of(location)
        self._pages = pages
        self._own_pages = location if pages is None else pages

    def named(self, name: str) -> str:
        """Give a file's name as errors have it."""
        return "parent/" * self.level + name

    async def read(self, name: str) -> bytes:
        """Read a small image.

        Raises:
            ImageError: It is missing, or is no file that can be read.
        """
        try:
            if self.path is not None:
                return await in_thread(_read_file, os.path.join(self.path, name))
            source = await open_source(name_in(self.location, name))
            try:
                if source.size > _MOST_BYTES:
                    raise SourceError(f"{source.size} bytes are no small image")
                return bytes(memoryview(await source.read(0, source.size))) if source.size else b""
            finally:
                await source.aclose()
        except FileNotFoundError as error:
            raise ImageError(
                self.named(name),
                None,
                f"there is none in {self.location}: no checkpoint, or not a whole one",
            ) from error
        except OSError as error:
            raise ImageError(self.named(name), None, error.strerror or str(error)) from error
        except SourceError as error:
            raise ImageError(self.named(name), None, str(error)) from error

    async def open_pages(self, file: PagesFile, *, stripped: bool = False) -> Source:
        """Open a file of pages, the caller's to close.

        Args:
            file: Which.
            stripped: A stripped copy will do.

        Raises:
            ImageError: It is missing, or too short, or a stripped copy.
        """
        if not stripped and await in_thread(self._is_stripped):
            raise ImageError(
                str(file),
                None,
                f"{shown(self.location)} is a stripped copy, which lacks what is brought later;"
                " name the folder or URL that has the whole files of pages (--images)",
            )
        try:
            source = await open_source(name_in(self._own_pages, file.name))
        except OSError as error:
            raise ImageError(str(file), None, error.strerror or str(error)) from error
        except SourceError as error:
            raise ImageError(str(file), None, str(error)) from error
        if source.size < file.length:
            await source.aclose()
            raise ImageError(
                str(file),
                source.size,
                f"it is cut short: the pagemap beside it tells of {file.length} bytes",
            )
        return source

    def _is_stripped(self) -> bool:
        if self._pages is not None or self.path is None:
            return False
        return os.path.exists(os.path.join(self.path, STRIPPED))

    def parent(self) -> Folder:
        """Give the folder of the parent.

        Raises:
            ImageError: There is none, or there are too many of them.
        """
        if self.level == _MOST_PARENTS:
            raise ImageError(
                self.named("parent"), None, f"there are more than {_MOST_PARENTS} parents"
            )
        pages = None if self._pages is None else name_in(self._pages, "parent")
        if self.path is None:
            return Folder(name_in(self.location, "parent"), pages, self.level + 1)
        path = os.path.join(self.path, "parent")
        if not os.path.isdir(path):
            raise ImageError(
                self.named("parent"),
                None,
                "pages lie in the parent checkpoint, which is not there: it belongs beside this"
                " one, where the link leads"
                if os.path.lexists(path)
                else "pages lie in the parent checkpoint, and there is no link to it",
            )
        return Folder(os.path.realpath(path), pages, self.level + 1)


class Checkpoint:
    """The processes of a checkpoint, and their memory.

    ::

        async with await Checkpoint.open("/checkpoints/web") as checkpoint:
            for task in checkpoint.tasks:
                ...
            source = await checkpoint.source(1234)

    Attributes:
        location: Where it lies, as it was given.
        inventory: What it says of itself.
        tasks: Its processes, parents before their children.
        chain: Its folder and those of its parents.

    Sharing: one event loop.
    """

    def __init__(
        self,
        location: str,
        inventory: Inventory,
        tasks: tuple[Task, ...],
        memories: dict[int, TaskMemory],
        chain: Chain,
    ) -> None:
        """Hold what was read; ``open`` makes one."""
        self.location = location
        self.inventory = inventory
        self.tasks = tasks
        self._memories = memories
        self.chain = chain
        self._opened: dict[tuple[int, str, bool], asyncio.Task[Source]] = {}
        self._closed = False

    @classmethod
    async def open(cls, location: str | os.PathLike[str], *, pages: str | None = None) -> Self:
        """Read what a checkpoint holds, but for the pages.

        Args:
            location: Its folder: a path, or a URL of any kind that ``open_source`` takes.
            pages: The folder of its ``pages-N.img`` if that is another one; its parents' are
                then in ``parent`` within it.

        Raises:
            ImageError: An image is missing, damaged, or cut short.
            SourceError: The location makes no sense.
            ImportError: A package is missing; the message says how to get it.

        Cancellation: nothing is left open.
        """
        location = os.fspath(location)
        chain = Chain(Folder(location, pages))
        data = await chain.folders[0].read("inventory.img")
        inventory = parse_inventory(data)
        room = asyncio.Semaphore(_AT_ONCE)
        loaded = await all_of(
            [
                _load(chain, task, data, room, bool(inventory.run_id))
                for task in parse_pstree(await chain.folders[0].read("pstree.img"))
            ]
        )
        tasks = tuple(task for task, _ in loaded)
        memories = {task.pid: memory for task, memory in loaded if memory is not None}
        return cls(location, inventory, tasks, memories, chain)

    def memory(self, pid: int) -> TaskMemory:
        """Say where the memory of a process lies.

        Raises:
            SourceError: There is no such process, or it is dead and has none.
        """
        try:
            return self._memories[pid]
        except KeyError:
            dead = any(task.pid == pid for task in self.tasks)
            raise SourceError(
                f"process {pid} of {shown(self.location)} is dead, and has no memory"
                if dead
                else f"there is no process {pid} in {shown(self.location)}"
            ) from None

    async def has_wide_counts(self) -> bool | None:
        """Say whether CRIU 4.2 or newer has made it; None if no pagemap tells.

        Raises:
            ImageError: A pagemap is not there any more.

        Cancellation: nothing is left open.
        """
        for pid in self._memories:
            name = f"pagemap-{pid}.img"
            wide = has_wide_counts(await self.chain.folders[0].read(name), name)
            if wide is not None:
                return wide
        return None

    async def source(self, pid: int, reader: PageReader | None = None) -> TaskSource:
        """Open the lazily servable memory of a process.

        Args:
            pid: Whose.
            reader: Who has the pages that lie in no file, if there are such.

        Returns:
            The source, the caller's to close; the checkpoint has to stay open meanwhile.

        Raises:
            ImageError: A file of pages is missing, too short, or stripped.
            SourceError: As ``memory``; or pages lie in no file, and there is no reader.
            ClosedError: The checkpoint is closed.

        Cancellation: a file that was being opened stays the checkpoint's.
        """
        memory = self.memory(pid)
        files = [await self.pages(file) for file in memory.files]
        return TaskSource(memory, files, reader)

    async def pages(self, file: PagesFile, *, stripped: bool = False) -> Source:
        """Open a file of pages, once for all; it stays the checkpoint's.

        Args:
            file: Of the memory of a process.
            stripped: A stripped copy will do: nothing is read that is brought lazily.

        Raises:
            ImageError: As ``source``.
            ClosedError: As ``source``.
        """
        if self._closed:
            raise ClosedError(f"the checkpoint {shown(self.location)} is closed")
        key = file.level, file.name, stripped
        opening = self._opened.get(key)
        if opening is None:
            folder = self.chain.folders[file.level]
            opening = asyncio.ensure_future(folder.open_pages(file, stripped=stripped))
            self._opened[key] = opening
        try:
            return await asyncio.shield(opening)
        except (UffdError, ImportError):
            self._opened.pop(key, None)  # the next one may have more luck
            raise

    async def find_pages(self) -> None:
        """Open every file of pages that a process needs, to know now what is missing.

        Raises:
            ImageError: As ``source``.
            ClosedError: As ``source``.

        Cancellation: files that were opened stay the checkpoint's.
        """
        memories = self._memories.values()
        files = {file: None for memory in memories for file in memory.files if file.length}
        await all_of([self.pages(file) for file in files])

    async def aclose(self) -> None:
        """Close every file; sources that were opened here are to be closed before.

        Cancellation: some may still be open; call again.
        """
        self._closed = True
        while self._opened:
            key = next(iter(self._opened))
            with contextlib.suppress(UffdError, ImportError):
                await (await asyncio.shield(self._opened[key])).aclose()
            self._opened.pop(key, None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()


# --- opening ---------------------------------------------------------------------------


class Chain:
    """The folders of a checkpoint and its parents, found as they are needed.

    Attributes:
        folders: Those that have been found so far.
    """

    def __init__(self, first: Folder) -> None:
        """Begin with the checkpoint's own."""
        self.folders = [first]
        self._looking = asyncio.Lock()

    async def folder(self, level: int) -> Folder:
        """Give the folder so many parents away.

        Raises:
            ImageError: There is none, or the chain bites its tail.
        """
        async with self._looking:
            while len(self.folders) <= level:
                self.folders.append(await in_thread(self._next))
            return self.folders[level]

    def _next(self) -> Folder:
        last = self.folders[-1]
        parent = last.parent()
        if parent.path is not None:
            for folder in self.folders:
                if folder.path is not None and os.path.samefile(folder.path, parent.path):
                    raise ImageError(
                        last.named("parent"),
                        None,
                        f"the parents go in a circle: {parent.path}",
                    )
        return parent


async def _load(
    chain: Chain, task: Task, inventory: bytes, room: asyncio.Semaphore, unique: bool
) -> tuple[Task, TaskMemory | None]:
    """Read the images of one process."""
    async with room:
        first = chain.folders[0]
        digest = hashlib.sha256(inventory)
        name = f"core-{task.pid}.img"
        data = await first.read(name)
        digest.update(data)
        core = parse_core(data, name)
        task = replace(task, name=core.name, dead=core.dead, stopped=core.stopped)
        if core.dead:
            return task, None
        name = f"mm-{task.pid}.img"
        data = await first.read(name)
        digest.update(data)
        vmas = parse_mm(data, name)
        pagemaps: list[tuple[str, Pagemap]] = []
        name = f"pagemap-{task.pid}.img"
        while not pagemaps or pagemaps[-1][1].leans:
            folder = await chain.folder(len(pagemaps))
            data = await folder.read(name)
            digest.update(data)
            named = folder.named(name)
            pagemaps.append((named, await in_thread(parse_pagemap, data, named)))
    return task, await in_thread(_build, task.pid, vmas, pagemaps, digest.hexdigest(), unique)


def _build(
    pid: int, vmas: tuple[Vma, ...], pagemaps: list[tuple[str, Pagemap]], digest: str, unique: bool
) -> TaskMemory:
    """Lay pagemaps over each other."""
    levels: list[Level] = []
    for number, (name, pagemap) in reversed(list(enumerate(pagemaps))):
        levels.insert(0, Level(name, pagemap, number, levels[0] if levels else None))
    return TaskMemory(pid, vmas, levels, digest=digest, unique=unique)


def _read_file(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise SourceError("it is no regular file")
        if status.st_size > _MOST_BYTES:
            raise SourceError(f"{status.st_size} bytes are no small image")
        return file.read(status.st_size)
