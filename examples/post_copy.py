"""The smallest post-copy: a process hands its memory over, and the bytes follow on demand.

    python examples/post_copy.py

The destination runs at once: what it touches is fetched, the rest follows, the two part.
"""

import asyncio
import ctypes
import hashlib
import mmap
import os
import socket

import aiouffd

PAGE = aiouffd.PAGE_SIZE
LENGTH = 4096 * PAGE


def destination(connection: socket.socket) -> None:
    """Run on memory that is still elsewhere."""
    memory = mmap.mmap(-1, LENGTH, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with aiouffd.Userfaultfd.open(user_mode_only=True) as uffd:
        socket.send_fds(connection, [address.to_bytes(8, "little")], [uffd.fileno()])
    connection.recv(1)  # the source serves it now
    print("the last page first:", memory[LENGTH - 8 :], flush=True)
    connection.recv(1)  # everything has come
    print("all of it: ", hashlib.sha256(memory).hexdigest()[:16], flush=True)


async def source(state: bytes, connection: socket.socket) -> None:
    """Answer what is touched, push the rest, let go."""
    print("the source:", hashlib.sha256(state).hexdigest()[:16], flush=True)
    touched = asyncio.Event()

    async def pull(fault: aiouffd.PageFault) -> bytes:
        touched.set()
        return state[fault.offset : fault.offset + fault.length]

    address, fds, _, _ = socket.recv_fds(connection, 8, 1)
    uffd = aiouffd.Userfaultfd.adopt(fds[0])
    async with aiouffd.Pager(uffd) as pager:
        region = pager.register(int.from_bytes(address, "little"), LENGTH, pull)
        connection.send(b"!")
        await touched.wait()
        pushed = await region.fill(0, state)
        print(f"pulled {pager.counters.copied_bytes}, pushed {pushed} bytes", flush=True)
    connection.send(b"!")  # nothing was missing: closing has poisoned no page


ours, theirs = socket.socketpair()
with ours, theirs:
    if pid := os.fork():
        asyncio.run(source(os.urandom(LENGTH - 8) + b"the end.", ours))
        os.waitpid(pid, 0)
    else:
        destination(theirs)
