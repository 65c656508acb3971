"""A program whose memory somebody else serves: it hands its userfaultfd over, and writes it out.

    lazy_writer.py CONTROL_FD PAGES

Sends the address of its memory with the userfaultfd, waits for one byte, and writes the memory
to its standard output: the kernel reads it, on behalf of write(2).  Then it waits for another
byte, and ends.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import sys

from aiouffd import Feature, Userfaultfd


def main() -> None:
    length = int(sys.argv[2]) * mmap.PAGESIZE
    memory = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with (
        socket.socket(fileno=int(sys.argv[1])) as control,
        Userfaultfd.open(Feature.THREAD_ID) as uffd,
    ):
        socket.send_fds(control, [address.to_bytes(8, "little")], [uffd.fileno()])
        control.recv(1)
        left = memoryview(memory)
        while left:
            left = left[os.write(1, left) :]
        os.close(1)
        control.send(b"!")
        control.recv(1)


if __name__ == "__main__":
    main()
