"""The tutorial's program: docs/tutorial.md shows it, and a test runs it."""

import asyncio
import ctypes
import mmap
import os
import socket

import aiouffd

PAGE = aiouffd.PAGE_SIZE
LENGTH = 16 * PAGE


def target(connection: socket.socket) -> None:
    memory = mmap.mmap(-1, LENGTH, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with aiouffd.Userfaultfd.open(user_mode_only=True) as uffd:
        socket.send_fds(connection, [address.to_bytes(8, "little")], [uffd.fileno()])
        connection.recv(1)  # somebody serves the memory now
        print("the child reads", memory[3 * PAGE : 3 * PAGE + 12], flush=True)


async def fill(fault: aiouffd.PageFault) -> bytes:
    print(f"a fault at offset {fault.offset:#x}", flush=True)
    return b"Hello, page!".ljust(fault.length, b"\0")


async def serve(connection: socket.socket, pid: int) -> None:
    address, fds, _, _ = socket.recv_fds(connection, 8, 1)
    uffd = aiouffd.Userfaultfd.adopt(fds[0])
    async with aiouffd.Pager(uffd, target=os.pidfd_open(pid)) as pager:
        pager.register(int.from_bytes(address, "little"), LENGTH, fill)
        connection.send(b"!")
        await pager.wait_closed()  # the child has ended


ours, theirs = socket.socketpair()
with ours, theirs:
    if pid := os.fork():
        asyncio.run(serve(ours, pid))
        os.waitpid(pid, 0)
    else:
        target(theirs)
