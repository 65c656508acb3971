"""Checkpoints made by a test: small images with just what is read of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aiouffd.protocols.criu import images
from aiouffd.protocols.criu.images import Pagemap, PagemapEntry, Task, Vma
from aiouffd.protocols.criu.protobuf import write_bytes, write_number

PAGE = 4096
PRIVATE_ANONYMOUS = 0x22
REGULAR_ANONYMOUS = images.VMA_AREA_REGULAR | images.VMA_ANON_PRIVATE


def anonymous(start: int, pages: int, *, flags: int = PRIVATE_ANONYMOUS) -> Vma:
    """A mapping of private anonymous memory."""
    return Vma(start, start + pages * PAGE, 0, 0, 3, flags, REGULAR_ANONYMOUS)


def of_file(start: int, pages: int) -> Vma:
    """A private mapping of a file, such as a library."""
    status = images.VMA_AREA_REGULAR | images.VMA_FILE_PRIVATE
    return Vma(start, start + pages * PAGE, 0, 1, 3, 2, status)


def inventory(run_id: str = "a-run", version: int = 2) -> bytes:
    """The image of that name."""
    message = write_number(1, version)
    if run_id:
        message += write_bytes(13, run_id.encode())
    return images.INVENTORY_MAGIC.to_bytes(4, "little") + images.write_record(message)


def pstree(tasks: Iterable[Task]) -> bytes:
    """The image of that name."""
    return images.write_image(
        images.PSTREE_MAGIC,
        [
            write_number(1, task.pid)
            + write_number(2, task.ppid)
            + write_number(3, task.pgid)
            + write_number(4, task.sid)
            + b"".join(write_number(5, thread) for thread in task.threads)
            for task in tasks
        ],
    )


def core(task: Task) -> bytes:
    """The image of a task's registers, with name and state alone."""
    state = 2 if task.dead else 3 if task.stopped else 1
    about = write_number(1, state) + write_number(2, 0) + write_bytes(6, task.name.encode())
    return images.write_image(images.CORE_MAGIC, [write_number(1, 1) + write_bytes(3, about)])


def mm(vmas: Iterable[Vma]) -> bytes:
    """The image of a task's mappings."""
    return images.write_image(images.MM_MAGIC, [b"".join(map(_vma, vmas))])


def _vma(vma: Vma) -> bytes:
    values = (vma.start, vma.end, vma.pgoff, vma.shmid, vma.prot, vma.flags, vma.status, 1)
    message = b"".join(write_number(number, value) for number, value in enumerate(values, 1))
    return write_bytes(14, message + write_number(9, vma.madv))


def lone_task(pid: int = 1000, ppid: int = 0, *, name: str = "worker", dead: bool = False) -> Task:
    """A task with one thread."""
    return Task(pid, ppid, pid, pid, (pid,), name, dead)


@dataclass
class Memory:
    """What a task's memory is to be.

    Attributes:
        vmas: Its mappings.
        entries: Its pagemap.
        pages: What its file of pages holds.
    """

    vmas: Sequence[Vma]
    entries: Sequence[PagemapEntry]
    pages: bytes = b""


@dataclass
class Made:
    """A checkpoint to be written."""

    memories: Mapping[int, Memory]
    tasks: Sequence[Task] = field(default_factory=lambda: [lone_task()])
    run_id: str = "a-run"
    wide: bool = True

    def write(self, folder: Path, parent: str | None = None) -> Path:
        """Write it into a folder, and a link to its parent."""
        folder.mkdir(exist_ok=True)
        (folder / "inventory.img").write_bytes(inventory(self.run_id))
        (folder / "pstree.img").write_bytes(pstree(self.tasks))
        for number, task in enumerate(self.tasks, 1):
            (folder / f"core-{task.pid}.img").write_bytes(core(task))
            memory = self.memories.get(task.pid)
            if memory is not None:
                pagemap = Pagemap(number, tuple(memory.entries))
                (folder / f"mm-{task.pid}.img").write_bytes(mm(memory.vmas))
                (folder / f"pagemap-{task.pid}.img").write_bytes(
                    images.write_pagemap(pagemap, wide=self.wide)
                )
                (folder / f"pages-{number}.img").write_bytes(memory.pages)
        if parent is not None:
            os.symlink(parent, folder / "parent")
        return folder
