"""The process whose memory ``aiouffd demo`` serves: maps it, hands it over, reads it.

Knows: its arguments and one JSON line of figures on stdout.
Must not know: where its bytes come from; that is the point.

Its memory is touched in user mode only, so that a userfaultfd for user-mode faults, which any
user may open, is enough.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import random
import socket
import sys
import time
from typing import TypedDict

from ..ranges import PAGE_SIZE, align_up
from ..uffd import Userfaultfd


class Figures(TypedDict):
    """What the target measured.

    ``first_byte_s`` runs from the hand-over to the first byte read; ``seconds`` is what
    ``pages`` took, the part that was read at full speed.
    """

    first_byte_s: float
    pages: int
    seconds: float
    sha256: str


def read_lazily(path: str, size: int, *, user_mode_only: bool, slow_s: float) -> Figures:
    """Map memory, hand it over, read it in random order, hash it in order.

    Args:
        path: Where the server listens.
        size: Bytes of the image.
        user_mode_only: Open a userfaultfd that needs no privilege.
        slow_s: Spread the first third of the reads over so many seconds, to be watched.
    """
    length = align_up(size)
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with Userfaultfd.open(user_mode_only=user_mode_only) as uffd:
        uffd.register(start, length)
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(path)
            region = {"base_host_virt_addr": start, "size": length, "offset": 0}
            text = json.dumps([region | {"page_size": PAGE_SIZE, "page_size_kib": PAGE_SIZE}])
            pages = list(range(0, length, PAGE_SIZE))
            random.shuffle(pages)
            began = time.perf_counter()
            socket.send_fds(server, [text.encode()], [uffd.fileno()])
            memory[pages[0]]
            first_byte_s = time.perf_counter() - began
            slow = pages[1 : len(pages) // 3] if slow_s else []
            for number, offset in enumerate(slow):
                memory[offset]
                due = began + slow_s * number / len(slow)
                time.sleep(max(0.0, due - time.perf_counter()))
            fast = pages[1 + len(slow) :]
            began = time.perf_counter()
            for offset in fast:
                memory[offset]
            seconds = time.perf_counter() - began
            with memoryview(memory) as view:
                digest = hashlib.sha256(view[:size]).hexdigest()
    return Figures(first_byte_s=first_byte_s, pages=len(fast), seconds=seconds, sha256=digest)


if __name__ == "__main__":
    print(json.dumps(read_lazily(**json.loads(sys.argv[1]))), flush=True)
