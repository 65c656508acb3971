"""The memory of a running process at one instant, though it never stops.

    python examples/live_snapshot.py

A process counts: four threads in turn write the next number to the next of many pages.  At any
instant the pages hold the last numbers, all of them, so a copy shows if it is of one instant.
Read page by page while the threads write it is not.  A live snapshot is.
"""

import asyncio
import ctypes
import itertools
import mmap
import os
import socket
import struct
import tempfile
import threading
import time
from pathlib import Path

import aiouffd
from aiouffd.live_snapshot import FEATURES, Stretch, take_live_snapshot

PAGE = aiouffd.PAGE_SIZE
PAGES = 4096
LENGTH = PAGES * PAGE
TURN = 100  # numbers, until it is the next thread's turn


def count(memory: mmap.mmap, turns: list[threading.Lock], me: int) -> None:
    """Write every fourth hundred of the numbers, each to its page."""
    for first in itertools.count(me * TURN, len(turns) * TURN):
        turns[me].acquire()
        for number in range(first, first + TURN):
            struct.pack_into("<Q", memory, number % PAGES * PAGE, number)
        turns[(me + 1) % len(turns)].release()


def program(connection: socket.socket) -> None:
    """Count, and never stop for anybody."""
    memory = mmap.mmap(-1, LENGTH, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    turns = [threading.Lock() for _ in range(4)]
    for turn in turns[1:]:
        turn.acquire()
    for me in range(4):
        threading.Thread(target=count, args=(memory, turns, me), daemon=True).start()
    uffd = aiouffd.Userfaultfd.open(FEATURES)
    socket.send_fds(connection, [address.to_bytes(8, "little")], [uffd.fileno()])
    uffd.close()
    connection.recv(1)
    os._exit(0)


def torn(image: bytes) -> int:
    """Count the pages that are of another instant than the page with the highest number."""
    numbers = [number for (number,) in struct.iter_unpack(f"<Q{PAGE - 8}x", image)]
    last = max(numbers)
    return sum(number != last - (last - page) % PAGES for page, number in enumerate(numbers))


def plain_copies(pid: int, start: int) -> list[bytes]:
    """Read the memory while it runs."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        while not any(os.pread(memory.fileno(), 8, start)):
            time.sleep(0.001)  # the first page is written when all others have been
        return [os.pread(memory.fileno(), LENGTH, start) for _ in range(10)]


def look(pid: int, connection: socket.socket) -> None:
    """Compare copies that are read in passing with one of an instant."""
    address, fds, _, _ = socket.recv_fds(connection, 8, 1)
    start = int.from_bytes(address, "little")
    worst = max(map(torn, plain_copies(pid, start)))
    print(f"read while it runs: up to {worst} pages of another instant")
    with aiouffd.Userfaultfd.adopt(fds[0]) as uffd, tempfile.NamedTemporaryFile() as file:
        taken = asyncio.run(take_live_snapshot(uffd, [Stretch(start, LENGTH)], file.name, pid=pid))
        image = Path(file.name).read_bytes()
    print(f"live snapshot: {torn(image)} pages of another instant")
    waits = taken.protect_seconds * 1e3, taken.longest_wait_seconds * 1e3
    print("protected in {:.2f} ms, the longest wait {:.2f} ms".format(*waits))


ours, theirs = socket.socketpair()
with ours, theirs:
    if pid := os.fork():
        try:
            look(pid, ours)
        finally:
            ours.send(b"!")
            os.waitpid(pid, 0)
    else:
        program(theirs)
