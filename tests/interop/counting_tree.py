"""A tree of processes that counts: each number once, wherever it runs (started by tests).

counting_tree.py FOLDER SEED MIB,LAST [PORT]: four processes, one of them a grandchild, each with
a second thread and MIB of private memory, the last one with LAST.  The first thread of each
counts: into its own memory, into memory that all share, and as a line of FOLDER/log that says
which process counts, how far, and in which pid namespace.  The second thread reads private memory
again and again, which nobody changes, and counts how often.
As soon as FOLDER/stop is there each process compares all of
its memory and writes FOLDER/result-NAME; the first waits for the others and ends last.
A SIGCONT is noted in FOLDER/continued.  The first holds a connection to PORT, if that is given.

Knows: nothing of CRIU or aiouffd.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path

PAGE = 4096
SHARED = 512 << 10  # bytes that all see, behind a page of counters
_COUNT = struct.Struct("<Q")


def content(seed: str, page: int) -> bytes:
    return hashlib.sha256(f"{seed}/{page}".encode()).digest() * (PAGE // 32)


class Process:
    def __init__(self, folder: Path, name: int, seed: str, mib: int, board: mmap.mmap) -> None:
        self.folder, self.name, self.board = folder, name, board
        self.seed, self.pages = f"{seed}/{name}", mib * 256
        self.shared_seed = f"{seed}/shared"
        self.memory = mmap.mmap(-1, mib << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(self.pages):
            self.memory[page * PAGE : (page + 1) * PAGE] = content(self.seed, page)
        self.log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND)
        self.own = bytearray(64 * PAGE)  # counted in as well, one page after the other
        self.count = self.reads = 0
        self.wrong: list[str] = []
        self.stopping = False
        self.connection: socket.socket | None = None
        signal.signal(signal.SIGCONT, lambda *_: (folder / "continued").touch())
        self.thread = threading.Thread(target=self.read)
        self.thread.start()

    def read(self) -> None:
        choose = random.Random(self.seed)
        while not self.stopping:
            page = choose.randrange(self.pages)
            if self.memory[page * PAGE : (page + 1) * PAGE] != content(self.seed, page):
                self.wrong.append(f"page {page} of process {self.name}")
            self.reads += 1
            time.sleep(0.0005)

    def run(self) -> None:
        stop = self.folder / "stop"
        while not stop.exists():
            self.step()
            time.sleep(0.002)
        self.stopping = True
        self.thread.join()
        self.check()
        result = {"wrong": self.wrong[:10], "count": self.count, "reads": self.reads}
        (self.folder / f"result-{self.name}").write_text(json.dumps(result))

    def step(self) -> None:
        place = self.count % 64 * PAGE
        (before,) = _COUNT.unpack_from(self.own, place)
        if before != max(0, self.count - 63) * (self.count > 63):
            self.wrong.append(f"count {self.count} of process {self.name} found {before}")
        (shared,) = _COUNT.unpack_from(self.board, self.name * 8)
        if shared != self.count:
            self.wrong.append(f"count {self.count} of process {self.name} was shared as {shared}")
        self.count += 1
        _COUNT.pack_into(self.own, place, self.count)
        _COUNT.pack_into(self.board, self.name * 8, self.count)
        namespace = os.readlink("/proc/self/ns/pid")
        os.write(self.log, f"{self.name} {self.count} {namespace}\n".encode())

    def check(self) -> None:
        for page in range(self.pages):
            if self.memory[page * PAGE : (page + 1) * PAGE] != content(self.seed, page):
                self.wrong.append(f"page {page} of process {self.name}, at the end")
        for page in range(SHARED // PAGE):
            at = (page + 1) * PAGE
            if self.board[at : at + PAGE] != content(self.shared_seed, page):
                self.wrong.append(f"page {page} of what all share, seen by process {self.name}")


def main() -> None:
    folder, seed = Path(sys.argv[1]), sys.argv[2]
    mib, last = map(int, sys.argv[3].split(","))
    (folder / "log").touch()
    board = mmap.mmap(-1, PAGE + SHARED)  # shared
    for page in range(SHARED // PAGE):
        board[(page + 1) * PAGE : (page + 2) * PAGE] = content(f"{seed}/shared", page)
    name = 0
    children: list[int] = []
    for number in (1, 2):
        pid = os.fork()
        if pid == 0:
            name, children = number, []
            break
        children.append(pid)
    if name == 2:
        pid = os.fork()
        if pid == 0:
            name, children = 3, []
        else:
            children.append(pid)
    process = Process(folder, name, seed, last if name == 3 else mib, board)
    if name == 0 and len(sys.argv) > 4:
        process.connection = socket.create_connection(("127.0.0.1", int(sys.argv[4])))
    process.step()  # what comes first is there: all may be seen to run
    process.run()
    for pid in children:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
