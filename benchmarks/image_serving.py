"""The server of an image's run: a pager, a FUSE file system, or nobody at all.

Knows: how to serve one image file in each way, with a delay before each read if asked for.
Must not know: what the target does with the bytes.

The FUSE file system is what a Python user would write today with pyfuse3: one file, each read a
coroutine, the kernel's own read-ahead and page cache in front of it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .image_touching import LAYOUT, pages_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

FILE_NAME = "image"


class Delayed:
    """A source whose every read takes a while, as one behind a network does."""

    def __init__(self, inner: Any, seconds: float) -> None:
        self._inner = inner
        self._seconds = seconds
        self.size: int = inner.size

    def read_nowait(self, offset: int, length: int) -> Buffer | None:  # noqa: ARG002 - Source's
        return None

    async def read(self, offset: int, length: int) -> Buffer:
        await asyncio.sleep(self._seconds)
        data: Buffer = await self._inner.read(offset, length)
        return data

    def extents(self) -> Iterator[tuple[int, int]]:
        extents: Iterator[tuple[int, int]] = self._inner.extents()
        return extents

    async def aclose(self) -> None:
        await self._inner.aclose()


async def end_of(peer: socket.socket) -> None:
    """Wait until the target has closed its end of the socket, at its exit."""
    peer.setblocking(False)
    with contextlib.suppress(ConnectionResetError):
        while await asyncio.get_running_loop().sock_recv(peer, 64):
            pass


async def serve_faults(peer: socket.socket, options: argparse.Namespace) -> None:
    """Serve by a pager."""
    import aiouffd
    from aiouffd.handlers import from_source
    from aiouffd.prefetch import Prefetch
    from aiouffd.sources.file import FileSource

    layout, fds, _, _ = socket.recv_fds(peer, LAYOUT.size, 1)
    start, length = LAYOUT.unpack(layout)
    source: Any
    if options.image.endswith(".zst"):
        from aiouffd.sources.urls import open_image

        source = await open_image(options.image)
    else:
        source = FileSource(options.image)
    if options.delay:
        source = Delayed(source, options.delay)
    async with aiouffd.Pager(aiouffd.Userfaultfd.adopt(fds[0])) as pager:
        pager.register(start, length, from_source(source, chunk=options.chunk))
        prefetch, pages = Prefetch(pager, source), replayed_pages(source, options)
        peer.sendall(b"g")
        replay = asyncio.ensure_future(prefetch.replay(pages, any_image=True))
        await end_of(peer)
        replay.cancel()
        await asyncio.wait([replay])
    await source.aclose()


def replayed_pages(source: Any, options: argparse.Namespace) -> Any:
    """Make the set of the pages that a target of that seed touches."""
    from aiouffd.working_set import Header, WorkingSet

    pages = WorkingSet(Header(identity="", image_size=source.size))
    if options.replay:
        for page in pages_of(source.size, options.replay, options.seed):
            pages.add(page)
    return pages


async def serve_fuse(peer: socket.socket, options: argparse.Namespace) -> None:
    """Serve by a FUSE file system."""
    import pyfuse3
    import pyfuse3.asyncio

    pyfuse3.asyncio.enable()
    fd = os.open(options.image, os.O_RDONLY | os.O_CLOEXEC)
    size = os.fstat(fd).st_size
    inode = pyfuse3.ROOT_INODE + 1

    class OneFile(pyfuse3.Operations):  # type: ignore[misc]  # it may be missing
        async def getattr(self, number: int, ctx: Any = None) -> Any:  # noqa: ARG002 - pyfuse3's
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = number
            entry.st_mode = stat.S_IFREG | 0o444 if number == inode else stat.S_IFDIR | 0o555
            entry.st_size = size if number == inode else 0
            entry.attr_timeout = entry.entry_timeout = 3600
            return entry

        async def lookup(
            self,
            parent: int,  # noqa: ARG002 - pyfuse3's
            name: bytes,
            ctx: Any = None,
        ) -> Any:
            if name != FILE_NAME.encode():
                raise pyfuse3.FUSEError(errno.ENOENT)
            return await self.getattr(inode, ctx)

        async def open(self, number: int, flags: int, ctx: Any) -> Any:  # noqa: ARG002 - pyfuse3's
            return pyfuse3.FileInfo(fh=number, keep_cache=True)

        async def read(self, handle: int, offset: int, length: int) -> bytes:  # noqa: ARG002
            if options.delay:
                await asyncio.sleep(options.delay)
            return os.pread(fd, length, offset)

    pyfuse3.init(OneFile(), options.mount, {*pyfuse3.default_options, "fsname=aiouffd-bench"})
    main = asyncio.ensure_future(pyfuse3.main())
    peer.sendall(b"g")
    await end_of(peer)
    # pyfuse3 on asyncio does not survive its own terminate() or close() (seen with 3.5.0): the
    # file system is unmounted from outside, and nothing of the interpreter's end is run.
    unmount = await asyncio.create_subprocess_exec("umount", "--lazy", options.mount)
    status = await unmount.wait()
    main.cancel()
    os._exit(status)


async def serve_nothing(peer: socket.socket, options: argparse.Namespace) -> None:  # noqa: ARG001
    """Let the target map the file itself."""
    peer.sendall(b"g")
    await end_of(peer)


KINDS = {"faults": serve_faults, "fuse": serve_fuse, "nothing": serve_nothing}


def main(argv: Sequence[str] | None = None) -> None:
    """Serve one target and end with it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--cpu", type=int, required=True)
    parser.add_argument("--image", default="")
    parser.add_argument("--mount", default="", help="where the FUSE file system is mounted")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each read")
    parser.add_argument("--chunk", type=int, default=0, help="bytes around each fault")
    parser.add_argument("--replay", type=int, default=0, help="bring so many pages ahead")
    parser.add_argument("--seed", type=int, default=1, help="which ones, as the target's")
    options = parser.parse_args(argv)
    os.sched_setaffinity(0, {options.cpu})
    peer = socket.socket(fileno=options.socket)
    asyncio.run(KINDS[options.kind](peer, options))


if __name__ == "__main__":
    main()
