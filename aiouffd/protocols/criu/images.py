"""Checkpoint images of CRIU: what a checkpoint's small files say, read and written.

Knows: containers, magics, the messages that tell of tasks and of their memory.
Must not know: files, the event loop, where the images lie.

A checkpoint is a folder of files.  Most are two magic numbers and then records: a length (u32)
and a message of protocol buffers.  ``inventory.img`` has one magic, ``pages-N.img`` is nothing
but pages.

==================== ========== ===========================================================
file                 magic      what it is read for
==================== ========== ===========================================================
``inventory.img``    0x58313116 the version of all images, and which run of CRIU made them
``pstree.img``       0x50273030 one record per task: pid, parent, group, session, threads
``core-PID.img``     0x55053847 name and state of a task (dead ones have nothing else)
``mm-PID.img``       0x57492820 its mappings
``pagemap-PID.img``  0x56084025 which page lies where: see ``PagemapEntry``
==================== ========== ===========================================================

Laws of this file:

* What is damaged, cut short or makes no sense is ImageError, which names file and offset; no
  other error comes out, whatever the bytes are.
* Nothing is allocated because a file says so: all that is made has its bytes in the file.
* A page count is field 5 (CRIU 4.2 and newer, which writes 0 into field 2) or field 2.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING, Final, NamedTuple

from ...errors import ImageError
from ...ranges import PAGE_SIZE
from .protobuf import Message, WireError, numbers, write_number

if TYPE_CHECKING:
    from typing_extensions import Buffer

COMMON_MAGIC: Final = 0x54564319
INVENTORY_MAGIC: Final = 0x58313116
PSTREE_MAGIC: Final = 0x50273030
CORE_MAGIC: Final = 0x55053847
MM_MAGIC: Final = 0x57492820
PAGEMAP_MAGIC: Final = 0x56084025

#: The version whose images have the common magic; CRIU has written it since 2014.
_VERSION: Final = 2

_WORD: Final = struct.Struct("<I")

_MOST_PID: Final = 1 << 22  # the kernel's PID_MAX_LIMIT
_MOST_ADDRESS: Final = (1 << 64) - PAGE_SIZE


class PageFlag(IntFlag):
    """What a pagemap says about a run of pages."""

    PARENT = 1
    """They lie in the parent checkpoint."""
    LAZY = 2
    """They may be brought after the task runs."""
    PRESENT = 4
    """They lie in this checkpoint's own pages."""


# Kernel and CRIU numbers that the inner loops use as they are.
_PARENT: Final = int(PageFlag.PARENT)
_LAZY: Final = int(PageFlag.LAZY)
_PRESENT: Final = int(PageFlag.PRESENT)

_MAP_PRIVATE: Final = 0x2
_MAP_ANONYMOUS: Final = 0x20
_MAP_LOCKED: Final = 0x2000
_MAP_HUGETLB: Final = 0x40000

#: Status bits of a mapping, under CRIU's names.
VMA_AREA_REGULAR: Final = 1 << 0
VMA_AREA_STACK: Final = 1 << 1
VMA_AREA_VSYSCALL: Final = 1 << 2
VMA_AREA_VDSO: Final = 1 << 3
VMA_AREA_HEAP: Final = 1 << 5
VMA_FILE_PRIVATE: Final = 1 << 6
VMA_FILE_SHARED: Final = 1 << 7
VMA_ANON_SHARED: Final = 1 << 8
VMA_ANON_PRIVATE: Final = 1 << 9
VMA_AREA_VVAR: Final = 1 << 12
VMA_AREA_GUARD: Final = 1 << 16  # a note about a stretch of a mapping that is listed besides

_NEVER_LAZY: Final = VMA_AREA_VSYSCALL | VMA_AREA_VDSO | VMA_AREA_VVAR
_UNMOVABLE: Final = _MAP_LOCKED | _MAP_HUGETLB
_PRIVATE_ANONYMOUS: Final = _MAP_PRIVATE | _MAP_ANONYMOUS

_TASK_DEAD: Final = 2
_TASK_STOPPED: Final = 3
_TASK_ZOMBIE: Final = 6


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a checkpoint says of itself.

    Attributes:
        version: Of its images.
        run_id: A word that no other run of CRIU has; "" before CRIU 4.1.
    """

    version: int
    run_id: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """One process of a checkpoint.

    Attributes:
        pid: Its process id, as it saw it.
        ppid: Its parent's, 0 for the first.
        pgid: Its process group's.
        sid: Its session's.
        threads: The ids of its threads; of a dead task they may be anything.
        name: Its command name, as in ``ps``.
        dead: Whether it had ended and was not waited for yet; then it has no memory.
        stopped: Whether a signal had stopped it.
    """

    pid: int
    ppid: int
    pgid: int
    sid: int
    threads: tuple[int, ...]
    name: str = ""
    dead: bool = False
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class Core:
    """What the image of a task's registers says besides.

    Attributes:
        name: The command name.
        dead: See ``Task``.
        stopped: See ``Task``.
    """

    name: str
    dead: bool
    stopped: bool


@dataclass(frozen=True, slots=True)
class Vma:
    """One mapping of a task.

    Attributes:
        start: Its first address.
        end: The first address behind it.
        pgoff: Where in its file it begins, in bytes.
        shmid: Which file or shared memory it maps.
        prot: Its protection, as mmap takes it.
        flags: Its flags, as mmap takes them.
        status: What kind of a mapping it is, in CRIU's bits.
        madv: Advice it was given: bit n for MADV number n.
    """

    start: int
    end: int
    pgoff: int
    shmid: int
    prot: int
    flags: int
    status: int
    madv: int = 0

    @property
    def length(self) -> int:
        """How long it is, in bytes."""
        return self.end - self.start

    @property
    def lazy(self) -> bool:
        """Whether ``criu restore --lazy-pages`` registers it with userfaultfd."""
        return (
            self.flags & _PRIVATE_ANONYMOUS == _PRIVATE_ANONYMOUS
            and not self.flags & _UNMOVABLE
            and self.status & (_NEVER_LAZY | VMA_AREA_REGULAR) == VMA_AREA_REGULAR
        )


class PagemapEntry(NamedTuple):
    """A run of pages, and where they are.

    Attributes:
        vaddr: Address of the first.
        pages: How many.
        flags: PageFlag: PARENT 1, LAZY 2, PRESENT 4.
    """

    vaddr: int
    pages: int
    flags: int

    @property
    def end(self) -> int:
        """The first address behind the run."""
        return self.vaddr + self.pages * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Pagemap:
    """Which pages of a task, or of shared memory, a checkpoint holds.

    Attributes:
        pages_id: The N of the ``pages-N.img`` that holds those that are PRESENT, in order.
        entries: Runs, in ascending order.
    """

    pages_id: int
    entries: tuple[PagemapEntry, ...]

    @property
    def stored(self) -> int:
        """How long its pages' file has to be, in bytes."""
        return PAGE_SIZE * sum(entry.pages for entry in self.entries if entry.flags & _PRESENT)

    @property
    def leans(self) -> bool:
        """Whether some of its pages lie in the parent checkpoint."""
        return any(entry.flags & _PARENT for entry in self.entries)


# --- reading ---------------------------------------------------------------------------


def parse_inventory(data: bytes, file: str = "inventory.img") -> Inventory:
    """Read the inventory.

    Raises:
        ImageError: It is none, or of a version that is not read here.
    """
    _check_magic(data, file, 0, INVENTORY_MAGIC)
    record = next(_records(data, file, 4), None)
    if record is None:
        raise ImageError(file, len(data), "there is no record in it")
    try:
        message = Message(data, *record, (1, 13))
        version = message.number(1, bits=32)
        run_id = message.text(13)
    except WireError as error:
        raise ImageError(file, error.offset, error.problem) from error
    if version != _VERSION:
        raise ImageError(
            file,
            record[0],
            f"images of version {version}, where {_VERSION} is read: dump with a newer CRIU",
        )
    return Inventory(version, run_id)


def parse_pstree(data: bytes, file: str = "pstree.img") -> tuple[Task, ...]:
    """Read the list of tasks; names and states stand in other images.

    Raises:
        ImageError: It is none, or its tasks are no tree.
    """
    tasks: dict[int, Task] = {}
    for start, end in records_of(data, file, PSTREE_MAGIC):
        try:
            message = Message(data, start, end, range(1, 6))
            pid, ppid, pgid, sid = (message.number(number, bits=32) for number in range(1, 5))
            threads = tuple(message.numbers(5, bits=32))
        except WireError as error:
            raise ImageError(file, error.offset, error.problem) from error
        if not 0 < pid <= _MOST_PID:
            raise ImageError(file, start, f"no process can have the id {pid}")
        if pid in tasks:
            raise ImageError(file, start, f"process {pid} is there twice")
        if ppid and ppid not in tasks:
            raise ImageError(
                file, start, f"process {pid} has parent {ppid}, which is not before it"
            )
        tasks[pid] = Task(pid, ppid, pgid, sid, threads)
    if not tasks:
        raise ImageError(file, len(data), "there is no process in it")
    return tuple(tasks.values())


def parse_core(data: bytes, file: str) -> Core:
    """Read name and state of a task.

    Raises:
        ImageError: It is no core image, or one of a thread that is not its task's first.
    """
    for start, end in records_of(data, file, CORE_MAGIC):
        try:
            place = Message(data, start, end, (3,)).message(3)
            if place is None:
                raise ImageError(file, start, "it tells of a thread, not of a task")
            message = Message(data, *place, (1, 6))
            state, name = message.number(1, bits=32), message.text(6)
        except WireError as error:
            raise ImageError(file, error.offset, error.problem) from error
        return Core(name, state in (_TASK_DEAD, _TASK_ZOMBIE), state == _TASK_STOPPED)
    raise ImageError(file, len(data), "there is no record in it")


def parse_mm(data: bytes, file: str) -> tuple[Vma, ...]:
    """Read the mappings of a task.

    Returns:
        In ascending order and disjoint; guards, which lie within others, at the end.

    Raises:
        ImageError: It is no image of mappings, or they lie over each other.
    """
    vmas: list[Vma] = []
    guards: list[Vma] = []
    last = 0
    for start, end in records_of(data, file, MM_MAGIC):
        try:
            for place in Message(data, start, end, (14,)).messages(14):
                vma = _parse_vma(data, *place)
                problem = _problem_of(vma, last)
                if problem:
                    raise ImageError(file, place[0], problem)
                if vma.status & VMA_AREA_GUARD:
                    guards.append(vma)
                else:
                    vmas.append(vma)
                    last = vma.end
        except WireError as error:
            raise ImageError(file, error.offset, error.problem) from error
        return (*vmas, *guards)
    raise ImageError(file, len(data), "there is no record in it")


def _parse_vma(data: bytes, start: int, end: int) -> Vma:
    message = Message(data, start, end, range(1, 10))
    begin, behind, pgoff, shmid = (message.number(number) for number in range(1, 5))
    prot, flags, status = (message.number(number, bits=32) for number in range(5, 8))
    return Vma(begin, behind, pgoff, shmid, prot, flags, status, message.number(9, default=0))


def _problem_of(vma: Vma, last: int) -> str:
    """Say what is wrong with a mapping behind one that ends at ``last``; "" if nothing is."""
    text = f"mapping {vma.start:#x}-{vma.end:#x}"
    if vma.start % PAGE_SIZE or vma.end % PAGE_SIZE:
        return f"{text} does not lie at borders of pages"
    if vma.start >= vma.end:
        return f"{text} is empty"
    if vma.start < last and not vma.status & VMA_AREA_GUARD:
        return f"{text} lies over the one before, which ends at {last:#x}"
    return ""


def parse_pagemap(data: bytes, file: str) -> Pagemap:
    """Read which pages lie where.

    Raises:
        ImageError: It is no pagemap, or its runs lie over each other.
    """
    records = records_of(data, file, PAGEMAP_MAGIC)
    head = next(records, None)
    if head is None:
        raise ImageError(file, len(data), "there is no record in it")
    try:
        pages_id = Message(data, *head, (1,)).number(1, bits=32)
        return Pagemap(pages_id, tuple(_entries(data, file, records)))
    except WireError as error:
        raise ImageError(file, error.offset, error.problem) from error


def has_wide_counts(data: bytes, file: str) -> bool | None:
    """Say whether a pagemap counts pages as CRIU 4.2 and newer do; None if it counts none.

    Raises:
        ImageError: It is no pagemap.
    """
    records = records_of(data, file, PAGEMAP_MAGIC)
    next(records, None)  # the head
    for start, end in records:
        try:
            return 5 in numbers(data, start, end)
        except WireError as error:
            raise ImageError(file, error.offset, error.problem) from error
    return None


def _entries(data: bytes, file: str, records: Iterable[tuple[int, int]]) -> Iterator[PagemapEntry]:
    last = 0
    for start, end in records:
        found = numbers(data, start, end)
        if 1 not in found or not (2 in found or 5 in found):
            raise ImageError(file, start, "a run without an address or a number of pages")
        vaddr = found[1]
        pages = found[5] if 5 in found else found[2]
        flags = found.get(4)
        if found.get(3):
            flags = (flags or 0) | _PARENT
        elif flags is None:  # before CRIU 3 there was no such field
            flags = _PRESENT
        if flags >> 32:
            raise ImageError(file, start, f"a run with flags {flags:#x}, more than 32 bits hold")
        if vaddr % PAGE_SIZE:
            raise ImageError(file, start, f"a run at {vaddr:#x}, inside of a page")
        if not pages or vaddr + pages * PAGE_SIZE > _MOST_ADDRESS:
            raise ImageError(file, start, f"a run of {pages} pages at {vaddr:#x}")
        if vaddr < last:
            raise ImageError(
                file, start, f"a run at {vaddr:#x} lies over the one before, up to {last:#x}"
            )
        last = vaddr + pages * PAGE_SIZE
        yield PagemapEntry(vaddr, pages, flags)


def records_of(data: bytes, file: str, magic: int) -> Iterator[tuple[int, int]]:
    """Walk the records of an image.

    Args:
        data: The whole image.
        file: Its name, for errors.
        magic: What kind it has to be.

    Returns:
        Where each record begins and ends.

    Raises:
        ImageError: It is none, is of another kind, or is cut short.
    """
    _check_magic(data, file, 0, COMMON_MAGIC)
    _check_magic(data, file, 4, magic)
    return _records(data, file, 8)


def _check_magic(data: bytes, file: str, at: int, expected: int) -> None:
    if len(data) < at + 4:
        raise ImageError(file, len(data), "it is cut short: its magic numbers are missing")
    (found,) = _WORD.unpack_from(data, at)
    if found != expected:
        raise ImageError(
            file, at, f"{found:#010x} where {expected:#010x} begins an image of this kind"
        )


def _records(data: bytes, file: str, at: int) -> Iterator[tuple[int, int]]:
    total = len(data)
    while at < total:
        if at + 4 > total:
            raise ImageError(file, at, "it is cut short: no length of a record")
        (length,) = _WORD.unpack_from(data, at)
        start = at + 4
        if length > total - start:
            raise ImageError(
                file,
                at,
                f"it is cut short: a record of {length} bytes, where {total - start} are left",
            )
        at = start + length
        yield start, at


# --- writing ---------------------------------------------------------------------------


def write_image(magic: int, records: Iterable[bytes]) -> bytes:
    """Write an image: two magic numbers, then records."""
    head = _WORD.pack(COMMON_MAGIC) + _WORD.pack(magic)
    return head + b"".join(map(write_record, records))


def write_record(message: Buffer) -> bytes:
    """Write a record: its length, then the message."""
    return _WORD.pack(memoryview(message).nbytes) + message


def pagemap_head(pages_id: int) -> bytes:
    """Write what a pagemap image begins with; records of ``pagemap_record`` follow.

    Args:
        pages_id: The N of the ``pages-N.img`` beside it.
    """
    return write_image(PAGEMAP_MAGIC, [write_number(1, pages_id)])


def pagemap_record(entry: PagemapEntry, *, wide: bool) -> bytes:
    """Write one run of a pagemap.

    Args:
        entry: The run.
        wide: Whether as CRIU 4.2 and newer, which count in 64 bits in another field; CRIU 4.1
            and older read no such image, newer ones read both.

    Raises:
        ValueError: It is too long to be written for older ones.
    """
    if not wide and entry.pages >> 32:
        raise ValueError(f"a run of {entry.pages} pages is too long for CRIU 4.1 and older")
    message = (
        write_number(1, entry.vaddr)
        + write_number(2, 0 if wide else entry.pages)
        + write_number(4, entry.flags)
    )
    return write_record(message + write_number(5, entry.pages) if wide else message)


def write_pagemap(pagemap: Pagemap, *, wide: bool) -> bytes:
    """Write a pagemap image; see ``pagemap_record``."""
    records = (pagemap_record(entry, wide=wide) for entry in pagemap.entries)
    return pagemap_head(pagemap.pages_id) + b"".join(records)
