"""Stop a thread at an address, change something behind its back, let it go.

    python examples/freeze_thread.py

A till checks a price, prints it on a page that is missing, and then charges.  While its thread
stands at that page the price changes: a race that takes luck to see is seen every time.
"""

import asyncio
import ctypes
import mmap
import os
import socket

import aiouffd

PAGE = aiouffd.PAGE_SIZE


def till(price: mmap.mmap, connection: socket.socket) -> None:
    """The code under test: it looks at the price twice, with a receipt in between."""
    receipt = mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(receipt))
    with aiouffd.Userfaultfd.open(user_mode_only=True) as uffd:
        socket.send_fds(connection, [address.to_bytes(8, "little")], [uffd.fileno()])
        connection.recv(1)  # somebody serves the receipt's page now
        receipt[0] = price[0]  # the thread stops here
        print(f"the receipt says {receipt[0]}, the till charges {price[0]}", flush=True)


async def race(price: mmap.mmap, connection: socket.socket, pid: int) -> None:
    """Freeze the till, raise the price, let it go."""
    frozen, go_on = asyncio.Event(), asyncio.Event()

    async def freeze(_fault: aiouffd.PageFault) -> aiouffd.Resolution:
        frozen.set()
        await go_on.wait()
        return aiouffd.Zero()

    address, fds, _, _ = socket.recv_fds(connection, 8, 1)
    uffd = aiouffd.Userfaultfd.adopt(fds[0])
    with aiouffd.OwnedFd(os.pidfd_open(pid)) as pidfd:
        async with aiouffd.Pager(uffd, target=pidfd.fileno()) as pager:
            pager.register(int.from_bytes(address, "little"), PAGE, freeze)
            connection.send(b"!")
            await frozen.wait()
            price[0] = 20
            go_on.set()
            await pager.wait_closed()  # the till's process has ended


price, (ours, theirs) = mmap.mmap(-1, PAGE), socket.socketpair()  # shared with the child
price[0] = 10
with ours, theirs:
    if pid := os.fork():
        asyncio.run(race(price, ours, pid))
        os.waitpid(pid, 0)
    else:
        till(price, theirs)
