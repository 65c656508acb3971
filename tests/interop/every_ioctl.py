"""Issue every system call and ioctl of userfaultfd once, and print what was issued and answered.

One JSON object per line: the call's name, its arguments as numbers, and its result.  The test
beside this file runs it under strace and compares.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
from collections.abc import Callable

from aiouffd.kernel import abi, calls

PAGE = mmap.PAGESIZE
_alive: list[object] = []


def memory(pages: int, kind: int = mmap.MAP_PRIVATE) -> tuple[mmap.mmap, int]:
    """Map fresh memory for good; return it and its address."""
    mapping = mmap.mmap(-1, pages * PAGE, kind | mmap.MAP_ANONYMOUS)
    anchor = ctypes.c_char.from_buffer(mapping)
    _alive.extend((mapping, anchor))
    return mapping, ctypes.addressof(anchor)


def say(name: str, result: object, **arguments: int) -> None:
    print(json.dumps({"name": name, "arguments": arguments, "result": result}), flush=True)


def register(fd: int, start: int, pages: int, mode: int) -> None:
    ioctls = calls.register(fd, start, pages * PAGE, mode)
    say("UFFDIO_REGISTER", ioctls, start=start, len=pages * PAGE, mode=mode)


def fill(name: str, call: Callable[..., int], fd: int, start: int, *rest: int) -> None:
    keys = {
        "UFFDIO_COPY": ("dst", "src", "len", "mode"),
        "UFFDIO_MOVE": ("dst", "src", "len", "mode"),
    }.get(name, ("start", "len", "mode"))
    say(name, call(fd, start, *rest), **dict(zip(keys, (start, *rest), strict=True)))


def main() -> None:
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    device = calls.open_device(flags)
    say("USERFAULTFD_IOC_NEW", device, flags=flags)
    fd = calls.open_syscall(flags | abi.UFFD_USER_MODE_ONLY)
    say("userfaultfd", fd, flags=flags | abi.UFFD_USER_MODE_ONLY)

    asked = abi.UFFD_FEATURE_EVENT_REMAP | abi.UFFD_FEATURE_THREAD_ID
    features, ioctls = calls.api(fd, asked)
    say("UFFDIO_API", [features, ioctls], features=asked)

    _, here = memory(16)
    register(fd, here, 16, abi.UFFDIO_REGISTER_MODE_MISSING | abi.UFFDIO_REGISTER_MODE_WP)
    full, page = memory(2)
    full[:] = bytes([7]) * 2 * PAGE
    fill("UFFDIO_COPY", calls.copy, fd, here, page, 2 * PAGE, abi.UFFDIO_COPY_MODE_DONTWAKE)
    fill("UFFDIO_COPY", calls.copy, fd, here, page, PAGE, 0)  # it is there: EEXIST
    fill("UFFDIO_COPY", calls.copy, fd, here + 3 * PAGE, page, PAGE, abi.UFFDIO_COPY_MODE_WP)
    fill("UFFDIO_ZEROPAGE", calls.zeropage, fd, here + 4 * PAGE, PAGE, 0)
    fill("UFFDIO_ZEROPAGE", calls.zeropage, fd, here + 4 * PAGE, PAGE, 1)  # EEXIST
    protect = abi.UFFDIO_WRITEPROTECT_MODE_WP
    fill("UFFDIO_WRITEPROTECT", calls.writeprotect, fd, here, PAGE, protect)
    fill("UFFDIO_WRITEPROTECT", calls.writeprotect, fd, here, PAGE, 0)
    fill("UFFDIO_MOVE", calls.move, fd, here + 5 * PAGE, page + PAGE, PAGE, 0)
    fill("UFFDIO_POISON", calls.poison, fd, here + 6 * PAGE, PAGE, 0)
    calls.wake(fd, here, PAGE)
    say("UFFDIO_WAKE", 0, start=here, len=PAGE)
    calls.unregister(fd, here, 16 * PAGE)
    say("UFFDIO_UNREGISTER", 0, start=here, len=16 * PAGE)

    cached, shared = memory(2, mmap.MAP_SHARED)
    cached[:PAGE] = bytes([7]) * PAGE
    cached.madvise(mmap.MADV_DONTNEED)  # unmapped here, and still in the page cache
    register(fd, shared, 2, abi.UFFDIO_REGISTER_MODE_MINOR)
    fill("UFFDIO_CONTINUE", calls.continue_, fd, shared, PAGE, 0)
    fill("UFFDIO_CONTINUE", calls.continue_, fd, shared + PAGE, PAGE, 0)  # a hole: EFAULT
    os.close(fd)
    os.close(device)


if __name__ == "__main__":
    main()
