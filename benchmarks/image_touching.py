"""The target of an image's run: maps an image's bytes, touches pages, says how long it took.

Knows: three ways to get at an image: a userfaultfd, a file of a mount, a file of this machine.
Must not know: who serves the bytes.

Every page touched is compared with the image's pattern: a wrong or empty page fails the run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import random
import socket
import struct
import time
from collections.abc import Sequence

PAGE = 4096
LAYOUT = struct.Struct("=2Q")
_STAMP = struct.Struct("=Q")


def pattern(size: int) -> bytes:
    """Make an image in which each page begins with its own number, and is not empty."""
    rest = bytes(range(1, 9)) * ((PAGE - _STAMP.size) // 8)
    return b"".join(_STAMP.pack(page + 1) + rest for page in range(size // PAGE))


def pages_of(size: int, count: int, seed: int) -> list[int]:
    """Choose pages: all in order if as many are asked for as there are, else scattered."""
    total = size // PAGE
    if count >= total:
        return list(range(total))
    return random.Random(seed).sample(range(total), count)


def map_for_userfaultfd(peer: socket.socket, size: int) -> mmap.mmap:
    """Map empty memory and hand a userfaultfd of this process over."""
    from aiouffd import Userfaultfd

    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with Userfaultfd.open() as uffd:
        socket.send_fds(peer, [LAYOUT.pack(address, size)], [uffd.fileno()])
    return memory


def map_file(path: str, size: int) -> mmap.mmap:
    """Map a file privately, as who only wants to read it does."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ)
    finally:
        os.close(fd)


def main(argv: Sequence[str] | None = None) -> None:
    """Wait for the server, touch, print JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--cpu", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--count", type=int, required=True, help="pages to touch")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--each", action="store_true", help="take the time of each page")
    parser.add_argument("--file", help="map this file; without it a userfaultfd is handed over")
    options = parser.parse_args(argv)
    os.sched_setaffinity(0, {options.cpu})
    peer = socket.socket(fileno=options.socket)
    memory = None if options.file else map_for_userfaultfd(peer, options.size)
    if not peer.recv(1):
        raise SystemExit("the server ended before it served")
    pages = pages_of(options.size, options.count, options.seed)
    start = time.perf_counter_ns()
    if memory is None:  # mapping a file is part of using it
        memory = map_file(options.file, options.size)
    wrong = 0
    stamp = _STAMP.unpack_from
    clock = time.perf_counter_ns if options.each else lambda: 0
    each = []
    for page in pages:
        before = clock()
        wrong += stamp(memory, page * PAGE)[0] != page + 1
        each.append(clock() - before)
    took_ns = time.perf_counter_ns() - start
    if wrong:
        raise SystemExit(f"{wrong} of {len(pages)} pages were wrong")
    sample = {"took_ns": took_ns, "page_ns": took_ns / len(pages)}
    if options.each:
        sample["p99_ns"] = sorted(each)[len(each) * 99 // 100]
    print(json.dumps(sample))


if __name__ == "__main__":
    main()
