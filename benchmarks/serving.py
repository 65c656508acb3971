"""The handler process of a run, written in Python: the whole pager, or as little as possible.

Knows: how to take userfaultfds from the target's socket, and the kinds of handlers measured.
Must not know: who measures; the target does.

``raw`` is a reader on the loop with the kernel calls and nothing else: what the pager costs is
the pager's figure less this one's.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import mmap
import os
import resource
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

from aiouffd.kernel import abi, calls

PAGE = 4096
MARK = 0x5A
_LAYOUT = struct.Struct("=6Q")


class Target(NamedTuple):
    """What the target handed over."""

    socket: socket.socket
    start: int
    length: int
    ranges: int
    range_length: int
    stride: int
    uffds: list[int]

    def registrations(self, whole: bool) -> list[tuple[int, int, int]]:
        """List what to register: descriptor, start, length."""
        if whole:
            return [(self.uffds[0], self.start, self.length)]
        count = len(self.uffds)
        return [
            (self.uffds[i % count], self.start + i * self.stride, self.range_length)
            for i in range(self.ranges)
        ]

    def go(self) -> None:
        """Let the target touch its memory."""
        self.socket.sendall(b"g")


def receive(fd: int) -> Target:
    """Take the layout and the userfaultfds."""
    peer = socket.socket(fileno=fd)
    layout = peer.recv(_LAYOUT.size, socket.MSG_WAITALL)
    start, length, ranges, range_length, stride, count = _LAYOUT.unpack(layout)
    uffds: list[int] = []
    while len(uffds) < count:
        _, received, _, _ = socket.recv_fds(peer, 200, 253)
        uffds += received
    return Target(peer, start, length, ranges, range_length, stride, uffds)


# --- as little as possible -------------------------------------------------------------


def drain(uffd: int, source: int) -> Callable[[], None]:
    """Make a reader that answers each message by a copy, until there is none."""
    buffer = bytearray(64 * abi.UFFD_MSG_SIZE)
    buffers = [buffer]
    read, copy, unpack = calls.read_messages, calls.copy, abi.UFFD_MSG_PAGEFAULT.unpack_from

    def reader() -> None:
        for _ in range(64):
            size = read(uffd, buffers)
            if not size:
                return
            for offset in range(0, size, 32):
                event, _, address, _ = unpack(buffer, offset)
                if event == abi.UFFD_EVENT_PAGEFAULT:
                    copy(uffd, address & -PAGE, source, PAGE)

    return reader


async def serve_raw(target: Target, options: argparse.Namespace) -> None:
    """Serve by a reader on the loop and nothing else."""
    loop = asyncio.get_running_loop()
    page = mmap.mmap(-1, PAGE)
    page.write(bytes([MARK]) * PAGE)
    source = ctypes.addressof(ctypes.c_char.from_buffer(page))
    for uffd, start, length in target.registrations(options.whole):
        calls.register(uffd, start, length, abi.UFFDIO_REGISTER_MODE_MISSING)
    for uffd in target.uffds:
        loop.add_reader(uffd, drain(uffd, source))
    target.go()
    await end_of(target)
    for uffd in target.uffds:
        loop.remove_reader(uffd)


# --- the whole pager -------------------------------------------------------------------

# Imports inside functions: the raw handler also runs where the pager cannot be imported, and
# its process holds nothing of it.

Serve = Callable[[Any], Awaitable[Any]]


def handler_of(kind: str) -> Serve:
    """Make a coroutine handler as a user would write it."""
    import aiouffd

    page = bytes([MARK]) * PAGE

    async def at_once(_fault: aiouffd.PageFault) -> aiouffd.Resolution:
        return aiouffd.Copy(page)

    async def buffer(_fault: aiouffd.PageFault) -> bytes:
        return page

    async def suspends(_fault: aiouffd.PageFault) -> aiouffd.Resolution:
        await asyncio.sleep(0)
        return aiouffd.Copy(page)

    kinds: dict[str, Serve] = {"pager": at_once, "buffer": buffer, "suspend": suspends}
    return kinds[kind]


async def serve_pager(target: Target, options: argparse.Namespace) -> None:
    """Serve by one pager for every userfaultfd."""
    import aiouffd

    handler = handler_of(options.kind)
    observers = [aiouffd.Metrics()] if options.observed else []
    async with AsyncExitStack() as stack:
        pagers = {
            fd: await stack.enter_async_context(
                aiouffd.Pager(aiouffd.Userfaultfd.adopt(fd), observers=observers)
            )
            for fd in target.uffds
        }
        for fd, start, length in target.registrations(options.whole):
            pagers[fd].register(start, length, handler, offset=start - target.start)
        target.go()
        # A pager that fails ends this process, and with it the run: better than a long silence.
        ends = [asyncio.ensure_future(pager.wait_closed()) for pager in pagers.values()]
        ends.append(asyncio.ensure_future(end_of(target)))
        done, running = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in running:
            task.cancel()
        for task in done:
            task.result()


# --- without faults --------------------------------------------------------------------


async def register(target: Target, _options: argparse.Namespace) -> None:
    """Register one range and print how long it took and how much memory it needed."""
    import aiouffd

    handler = handler_of("pager")
    async with aiouffd.Pager(aiouffd.Userfaultfd.adopt(target.uffds[0])) as pager:
        gc.collect()
        before, peak_before = resident(), peak()
        start = time.perf_counter_ns()
        pager.register(target.start, target.length, handler)
        took_ns = time.perf_counter_ns() - start
        sample = {
            "took_ns": took_ns,
            "resident_bytes": resident() - before,
            "peak_bytes": peak() - peak_before,
        }
        target.go()
        target.socket.sendall(b"x")
        await end_of(target)
    print(json.dumps(sample))


async def fill(target: Target, _options: argparse.Namespace) -> None:
    """Fill one range and print how long it took."""
    import aiouffd

    data = bytes([MARK]) * target.length
    async with aiouffd.Pager(aiouffd.Userfaultfd.adopt(target.uffds[0])) as pager:
        region = pager.register(target.start, target.length, handler_of("pager"))
        target.go()
        start = time.perf_counter_ns()
        filled = await region.fill(0, data)
        took_ns = time.perf_counter_ns() - start
        if filled != target.length:
            raise SystemExit(f"filled {filled} of {target.length} bytes")
        target.socket.sendall(b"f")
        await end_of(target)
    print(json.dumps({"bytes": filled, "seconds": took_ns / 1e9}))


def warm(path: str) -> None:
    """Let the page cache have a file."""
    with open(path, "rb") as file:
        while file.read(1 << 20):
            pass


async def hydrate(target: Target, options: argparse.Namespace) -> None:
    """Fill one range from a file that the page cache has, and print how long it took."""
    import aiouffd
    from aiouffd.prefetch import Prefetch
    from aiouffd.sources.urls import open_image

    if not options.one_cpu:
        # The file's reads run beside the fills: in threads, for which there is another processor.
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    warm(options.image)
    source = await open_image(options.image)
    async with aiouffd.Pager(aiouffd.Userfaultfd.adopt(target.uffds[0])) as pager:
        pager.register(target.start, target.length, handler_of("pager"))
        target.go()
        prefetch = Prefetch(pager, source)
        start, cpu_start = time.perf_counter_ns(), time.process_time_ns()
        await prefetch.fill_all()
        took_ns, cpu_ns = time.perf_counter_ns() - start, time.process_time_ns() - cpu_start
        filled = prefetch.figures.hydrated_bytes
        if filled != target.length:
            raise SystemExit(f"filled {filled} of {target.length} bytes")
        target.socket.sendall(b"x" if options.one_cpu else b"f")
        await end_of(target)
    await source.aclose()
    print(json.dumps({"bytes": filled, "seconds": took_ns / 1e9, "cpu_seconds": cpu_ns / 1e9}))


def resident() -> int:
    """Say how many bytes of memory this process holds."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def peak() -> int:
    """Say how many bytes this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- the process -----------------------------------------------------------------------


async def end_of(target: Target) -> None:
    """Wait until the target has closed its end of the socket, at its exit."""
    target.socket.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        while await loop.sock_recv(target.socket, 64):
            pass
    except ConnectionResetError:
        pass


KINDS: dict[str, Callable[[Target, argparse.Namespace], Coroutine[Any, Any, None]]] = {
    "raw": serve_raw,
    "pager": serve_pager,
    "buffer": serve_pager,
    "suspend": serve_pager,
    "register": register,
    "fill": fill,
    "hydrate": hydrate,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Serve one target and end with it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--cpu", type=int, required=True)
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio")
    parser.add_argument("--image", default="", help="the file that hydrate reads")
    parser.add_argument("--one-cpu", action="store_true", help="hydrate on one processor")
    parser.add_argument("--whole", action="store_true", help="all ranges as one")
    parser.add_argument("--observed", action="store_true", help="with Metrics")
    options = parser.parse_args(argv)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.sched_setaffinity(0, {options.cpu})
    target = receive(options.socket)
    work = KINDS[options.kind](target, options)
    if options.loop == "uvloop":
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(work)
    else:
        asyncio.run(work)


if __name__ == "__main__":
    main()
