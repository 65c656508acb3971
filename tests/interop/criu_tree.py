"""A tree of Python processes that a checkpoint holds: what they do once they are told to go on.

    python criu_tree.py FOLDER PROCESSES MIB SEED

Each process holds regions of private anonymous memory, objects on its heap and a thread; the root
has a zombie for a child besides.  Once FOLDER/go is there (it says "SEED OPERATIONS DEPTH"), each
does random things to its regions: reads, writes, MADV_DONTNEED, mremap (moves of a part, growth,
shrinking), munmap of a part, and forks, whose children go on likewise, DEPTH levels deep.  A model
(With no OPERATIONS nothing is changed at all.)  A model
knows what every page must hold; at the end every process compares every page with it, and the
objects of its heap with their hashes.  The root leaves FOLDER/result: whether all was right, the
first wrong pages with process, address and bytes, and how often each thing was done.

Knows: memory, mremap and fork.
Must not know: CRIU, aiouffd.  It keeps no file open, so that a checkpoint can go anywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import hashlib
import json
import mmap
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

PAGE = mmap.PAGESIZE
REGION = 64  # pages
ZOMBIE_STATUS = 7
SHOWN = 5  # wrong pages that are described, for each process

_MAYMOVE, _FIXED = 1, 2
_NONE, _READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

_libc = ctypes.CDLL(None, use_errno=True)
for _name in ("mmap", "mremap"):
    _function = getattr(_libc, _name)
    _function.restype = ctypes.c_size_t
_libc.mmap.argtypes = [ctypes.c_size_t] * 2 + [ctypes.c_int] * 3 + [ctypes.c_long]
_libc.mremap.argtypes = [ctypes.c_size_t] * 3 + [ctypes.c_int, ctypes.c_size_t]
_libc.munmap.argtypes = [ctypes.c_size_t] * 2
_libc.madvise.argtypes = [ctypes.c_size_t] * 2 + [ctypes.c_int]


def _address(result: int) -> int:
    if result == ctypes.c_size_t(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _zero(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def new_memory(pages: int, protection: int = _READ_WRITE) -> int:
    return _address(_libc.mmap(0, pages * PAGE, protection, _PRIVATE, -1, 0))


@dataclass
class Region:
    """Memory of this process, and what each of its pages must hold; None is zeros."""

    address: int
    expected: list[bytes | None]

    def at(self, page: int) -> int:
        return self.address + page * PAGE

    def part(self, first: int, last: int) -> Region:
        return Region(self.at(first), self.expected[first:last])


@dataclass
class Memory:
    """All regions of a process, and what may be done to them."""

    choose: random.Random
    regions: list[Region] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def check(self, region: Region, page: int) -> None:
        address, want = region.at(page), region.expected[page] or bytes(PAGE)
        got = ctypes.string_at(address, PAGE)
        if got != want and len(self.wrong) < SHOWN:
            at = next(i for i in range(PAGE) if got[i] != want[i])
            self.wrong.append(
                f"process {os.getpid()}, address {address + at:#x}: {got[at : at + 8].hex()} "
                f"instead of {want[at : at + 8].hex()} after {dict(self.done)}"
            )

    def check_all(self) -> None:
        for region in self.regions:
            for page in range(len(region.expected)):
                self.check(region, page)

    def step(self) -> None:
        """Do one thing, to a part of one region."""
        if not self.regions:
            self.regions.append(Region(new_memory(REGION), [None] * REGION))
        index = self.choose.randrange(len(self.regions))
        region = self.regions[index]
        first = self.choose.randrange(len(region.expected))
        last = self.choose.randint(first + 1, min(len(region.expected), first + REGION))
        name = self.choose.choices(
            ("read", "write", "discard", "move", "grow", "shrink", "unmap"),
            (6, 4, 3, 4, 2, 1, 1),
        )[0]
        try:
            rest = getattr(self, name)(region, first, last)
        except OSError as error:
            # mremap of what a server has cut into several mappings; nothing has changed then.
            if error.errno != errno.EFAULT:
                raise
            self.done["refused"] += 1
            return
        self.done[name] += 1
        self.regions[index : index + 1] = [each for each in rest if each.expected]

    def read(self, region: Region, first: int, last: int) -> list[Region]:
        for page in range(first, min(last, first + 4)):
            self.check(region, page)
        return [region]

    def write(self, region: Region, first: int, last: int) -> list[Region]:
        data = self.choose.randbytes(PAGE)
        ctypes.memmove(region.at(first), data, PAGE)
        region.expected[first] = data
        return [region]

    def discard(self, region: Region, first: int, last: int) -> list[Region]:
        _zero(_libc.madvise(region.at(first), (last - first) * PAGE, mmap.MADV_DONTNEED))
        region.expected[first:last] = [None] * (last - first)
        return [region]

    def move(self, region: Region, first: int, last: int) -> list[Region]:
        length = (last - first) * PAGE
        room = new_memory(last - first, _NONE)
        flags = _MAYMOVE | _FIXED
        to = _address(_libc.mremap(region.at(first), length, length, flags, room))
        moved = Region(to, region.expected[first:last])
        return [region.part(0, first), moved, region.part(last, len(region.expected))]

    def grow(self, region: Region, first: int, last: int) -> list[Region]:
        old, more = len(region.expected), self.choose.randint(1, 8)
        size = (old + more) * PAGE
        to = _address(_libc.mremap(region.address, old * PAGE, size, _MAYMOVE, 0))
        return [Region(to, region.expected + [None] * more)]

    def shrink(self, region: Region, first: int, last: int) -> list[Region]:
        old, kept = len(region.expected) * PAGE, max(1, last - (last - first) // 4) * PAGE
        _address(_libc.mremap(region.address, old, kept, 0, 0))
        return [region.part(0, kept // PAGE)]

    def unmap(self, region: Region, first: int, last: int) -> list[Region]:
        last = min(last, first + 8)  # a little at a time, or soon nothing is left
        _zero(_libc.munmap(region.at(first), (last - first) * PAGE))
        return [region.part(0, first), region.part(last, len(region.expected))]


def content(seed: str) -> bytes:
    return random.Random(seed).randbytes(REGION * PAGE)


@dataclass
class Process:
    """One process of the tree, before and after."""

    folder: Path
    name: str
    seed: str
    regions: int

    def prepare(self) -> None:
        """Fill memory, as a program does that has run for a while."""
        self.addresses = [new_memory(REGION) for _ in range(self.regions)]
        for number, address in enumerate(self.addresses):
            ctypes.memmove(address, content(f"{self.seed}/{self.name}/{number}"), REGION * PAGE)
        self.resized = mmap.mmap(-1, REGION * PAGE, flags=_PRIVATE)
        self.resized.write(content(f"{self.seed}/{self.name}/resized"))
        choose = random.Random(f"{self.seed}/{self.name}/heap")
        self.objects = [choose.randbytes(choose.randint(1, 2000)) for _ in range(500)]
        self.objects.append(choose.randbytes(300_000))
        self.digest = self.heap()
        self.thread_result = ""
        self.still = mmap.mmap(-1, REGION * PAGE, flags=_PRIVATE)
        self.still.write(content(f"{self.seed}/{self.name}/still"))
        self.thread = threading.Thread(target=self.read_beside)
        self.thread.start()

    def heap(self) -> str:
        digest = hashlib.sha256()
        for each in self.objects:
            digest.update(each)
        return digest.hexdigest()

    def told(self) -> list[int] | None:
        with contextlib.suppress(FileNotFoundError):
            numbers = [int(word) for word in (self.folder / "go").read_text().split()]
            return numbers if len(numbers) == 3 else None
        return None

    def wait(self) -> tuple[int, int, int]:
        while (numbers := self.told()) is None:
            time.sleep(0.002)
        return numbers[0], numbers[1], numbers[2]

    def read_beside(self) -> None:
        """Read memory that nobody changes, in a thread of its own."""
        try:
            seed, _, _ = self.wait()
            want = content(f"{self.seed}/{self.name}/still")
            order = list(range(REGION))
            random.Random(seed).shuffle(order)
            for page in order:
                place = slice(page * PAGE, (page + 1) * PAGE)
                if self.still[place] != want[place]:
                    raise AssertionError(f"page {page} of the thread's region is wrong")
        except BaseException:
            self.thread_result = traceback.format_exc()
            raise

    def go_on(self) -> dict[str, object]:
        """Do what is to be done, and give what came of it."""
        seed, operations, depth = self.wait()
        memory = Memory(random.Random(f"{seed}/{self.name}"))
        for number, address in enumerate(self.addresses):
            data = content(f"{self.seed}/{self.name}/{number}")
            pages = [data[i : i + PAGE] for i in range(0, len(data), PAGE)]
            memory.regions.append(Region(address, list(pages)))
        children = act(memory, self.folder, operations, depth)
        if operations:
            self.check_resized(memory)
        memory.check_all()
        if self.heap() != self.digest:
            memory.wrong.append(f"process {os.getpid()}: the objects of the heap have changed")
        self.thread.join()
        if self.thread_result:
            memory.wrong.append(f"process {os.getpid()}: {self.thread_result}")
        return collect(memory, self.folder, children)

    def check_resized(self, memory: Memory) -> None:
        """Let mmap.resize move memory, and compare it."""
        want = content(f"{self.seed}/{self.name}/resized")
        self.resized.resize(4 * REGION * PAGE)
        memory.done["resize"] += 1
        self.resized.madvise(mmap.MADV_DONTNEED, 8 * PAGE, 8 * PAGE)
        want = want[: 8 * PAGE] + bytes(8 * PAGE) + want[16 * PAGE :] + bytes(3 * REGION * PAGE)
        got = self.resized[:]
        if got != want:
            at = next(i for i in range(len(want)) if got[i] != want[i])
            memory.wrong.append(f"process {os.getpid()}: byte {at} of what mmap.resize moved")


def act(memory: Memory, folder: Path, operations: int, depth: int) -> list[int]:
    """Do random things; give the processes that were forked meanwhile."""
    children = []
    forks = set(memory.choose.sample(range(operations), min(2, operations) if depth else 0))
    for number in range(operations):
        if number in forks:
            seed = memory.choose.randrange(2**32)
            pid = os.fork()
            if pid == 0:
                be_child(memory, folder, seed, operations - number, depth - 1)
            children.append(pid)
            memory.done["fork"] += 1
        memory.step()
    return children


def be_child(memory: Memory, folder: Path, seed: int, operations: int, depth: int) -> None:
    """Go on as a forked child: the memory is the parent's, what happens to it is its own."""

    crashed = open(folder / f"failed-{os.getpid()}", "w")  # noqa: SIM115
    faulthandler.enable(crashed)

    def work() -> dict[str, object]:
        own = Memory(random.Random(seed), memory.regions, Counter(), [])
        children = act(own, folder, operations, depth)
        own.check_all()
        return collect(own, folder, children)

    leave(folder, work)


def collect(memory: Memory, folder: Path, children: list[int]) -> dict[str, object]:
    """Wait for children, and give their results and one's own as one."""
    wrong, done, processes = list(memory.wrong), Counter(memory.done), 1
    for pid in children:
        _, status = os.waitpid(pid, 0)
        part = folder / f"part-{pid}"
        if status != 0 or not part.exists():
            said = folder / f"failed-{pid}"
            text = said.read_text() if said.exists() else ""
            wrong.append(f"process {pid} ended with wait status {status:#x}\n{text}")
            continue
        result = json.loads(part.read_text())
        wrong += result["wrong"]
        done += Counter(result["done"])
        processes += result["processes"]
    return {"wrong": wrong, "done": done, "processes": processes}


def leave(folder: Path, work: object) -> None:
    """Run a child's work, leave its result, end."""
    status = 1
    try:
        assert callable(work)
        result = work()
        (folder / f"part-{os.getpid()}").write_text(json.dumps(result))
        status = 0
    except BaseException:
        (folder / f"failed-{os.getpid()}").write_text(traceback.format_exc())
    finally:
        os._exit(status)


def main() -> None:
    folder, processes = Path(sys.argv[1]), int(sys.argv[2])
    regions, seed = int(sys.argv[3]) * (1 << 20) // (REGION * PAGE), sys.argv[4]
    zombie = os.fork()
    if zombie == 0:
        os._exit(ZOMBIE_STATUS)
    os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)  # ended, and nobody has asked how
    pids = []
    for number in range(1, processes):
        pid = os.fork()
        if pid == 0:
            child = Process(folder, f"child {number}", seed, regions)
            child.prepare()
            (folder / f"ready-{os.getpid()}").touch()
            leave(folder, child.go_on)
        pids.append(pid)
    root = Process(folder, "root", seed, regions)
    root.prepare()
    while not all((folder / f"ready-{pid}").exists() for pid in pids):
        time.sleep(0.002)
    (folder / "ready").write_text(f"{len(pids) + 1}\n")
    try:
        result = root.go_on()
        rest = collect(Memory(random.Random()), folder, pids)
        wrong = [*result["wrong"], *rest["wrong"]]  # type: ignore[misc]
        _, status = os.waitpid(zombie, 0)
        if os.waitstatus_to_exitcode(status) != ZOMBIE_STATUS:
            wrong.append(f"the zombie's status is {status:#x}")
        done = Counter(result["done"]) + Counter(rest["done"])  # type: ignore[call-overload]
        number = result["processes"] + rest["processes"] - 1  # type: ignore[operator]
        text = {"right": not wrong, "wrong": wrong[:10], "done": done, "processes": number}
    except BaseException:
        text = {"right": False, "wrong": [traceback.format_exc()]}
    (folder / "partial").write_text(json.dumps(text))
    (folder / "partial").rename(folder / "result")
    while True:
        time.sleep(1000)


if __name__ == "__main__":
    main()
