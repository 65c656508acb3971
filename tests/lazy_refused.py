"""Accesses that the kernel makes for a program: refused on missing pages, served after ``ensure``.

Knows: the system calls that take a buffer, as functions of an Area.
Must not know: how lazy memory works.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import tempfile
import termios
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from aiouffd.events import PageFault
from aiouffd.lazy_memory import LazyMemory
from tests.lazy_access import CONTENT, PAGE, SIZE, Access, Area, LazyArea, plain
from tests.lazy_harness import Case, NewLoop

MADV_POPULATE_READ = 22  # since Linux 5.14; the mmap module does not name them
MADV_POPULATE_WRITE = 23

START = PAGE - 100
LENGTH = 3 * PAGE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _part(area: Area) -> memoryview:
    return area.mv[START : START + LENGTH]


def _file_out(write: Callable[[Any, memoryview], object]) -> Access:
    """Let ``write`` put the part into a file, and give the file's bytes."""

    def access(area: Area) -> bytes:
        with tempfile.TemporaryFile(buffering=0) as file:
            write(file, _part(area))
            file.seek(0)
            data: bytes = file.read()
            return data

    return access


def _file_in(read: Callable[[Any, memoryview], object]) -> Access:
    """Let ``read`` take a file's bytes into the part, and give the memory's."""

    def access(area: Area) -> bytes:
        with tempfile.TemporaryFile(buffering=0) as file:
            file.write(b"i" * LENGTH)
            file.seek(0)
            read(file, _part(area))
        return area.mv[: START + LENGTH + 10].tobytes()

    return access


@contextlib.contextmanager
def _pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with contextlib.ExitStack() as both:
        for one in (pair := socket.socketpair()):
            one.settimeout(5)
            both.enter_context(one)
        yield pair


def _socket_out(send: Callable[[socket.socket, memoryview], object]) -> Access:
    def access(area: Area) -> bytes:
        with _pair() as (ours, other):
            send(ours, _part(area))
            return other.recv(LENGTH, socket.MSG_WAITALL)

    return access


def _socket_in(receive: Callable[[socket.socket, memoryview], object]) -> Access:
    def access(area: Area) -> bytes:
        with _pair() as (ours, other):
            other.sendall(b"r" * LENGTH)
            receive(ours, _part(area))
        return area.mv[: START + LENGTH + 10].tobytes()

    return access


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _populate(area: Area) -> bytes:
    _checked(_libc.madvise(area.address, 4 * PAGE, MADV_POPULATE_READ))
    return area.head()


def _vm_readv(area: Area) -> bytes:
    target = ctypes.create_string_buffer(LENGTH)
    local = _IoVec(ctypes.addressof(target), LENGTH)
    remote = _IoVec(area.address + START, LENGTH)
    _checked(
        _libc.process_vm_readv(
            os.getpid(),
            ctypes.byref(local),
            ctypes.c_ulong(1),
            ctypes.byref(remote),
            ctypes.c_ulong(1),
            ctypes.c_ulong(0),
        )
    )
    return target.raw


def _ioctl(area: Area) -> int:
    # A buffer above 1024 bytes is handed to the kernel as it is.
    part = area.mv[PAGE : PAGE + 2048]
    with _pair() as (ours, other):
        other.sendall(b"five!")
        fcntl.ioctl(ours, termios.FIONREAD, part)
    return array.array("i", part[:4].tobytes())[0]


def _tofile(area: Area) -> bytes:
    with tempfile.TemporaryFile(buffering=0) as file:
        area.np[START : START + LENGTH].tofile(file)
        file.seek(0)
        return bytes(file.read())


def _buffered_write(area: Area) -> bytes:
    with tempfile.TemporaryFile(buffering=4096) as file:
        file.write(_part(area))
        file.seek(0)
        return bytes(file.read())


def _buffered_readinto(area: Area) -> bytes:
    with tempfile.TemporaryFile(buffering=4096) as file:
        file.write(b"i" * LENGTH)
        file.seek(0)
        file.readinto(_part(area))  # type: ignore[attr-defined]  # BufferedRandom
    return area.mv[: START + LENGTH + 10].tobytes()


REFUSED: dict[str, Access] = {
    "os.write": _file_out(lambda f, m: os.write(f.fileno(), m)),
    "os.writev": _file_out(lambda f, m: os.writev(f.fileno(), [m])),
    "os.pwrite": _file_out(lambda f, m: os.pwrite(f.fileno(), m, 0)),
    "os.pwritev": _file_out(lambda f, m: os.pwritev(f.fileno(), [m], 0)),
    "FileIO.write": _file_out(lambda f, m: f.write(m)),
    "os.readv": _file_in(lambda f, m: os.readv(f.fileno(), [m])),
    "os.preadv": _file_in(lambda f, m: os.preadv(f.fileno(), [m], 0)),
    "FileIO.readinto": _file_in(lambda f, m: f.readinto(m)),
    "buffered write": _buffered_write,
    "buffered readinto": _buffered_readinto,
    "socket.send": _socket_out(lambda s, m: s.send(m)),
    "socket.sendall": _socket_out(lambda s, m: s.sendall(m)),
    "socket.sendmsg": _socket_out(lambda s, m: s.sendmsg([m])),
    "socket.recv_into": _socket_in(lambda s, m: s.recv_into(m)),
    "socket.recvfrom_into": _socket_in(lambda s, m: s.recvfrom_into(m)),
    "socket.recvmsg_into": _socket_in(lambda s, m: s.recvmsg_into([m])),
    "mmap.madvise populate read": lambda a: a.mm.madvise(MADV_POPULATE_READ, 0, 4 * PAGE),
    "mmap.madvise populate write": lambda a: a.mm.madvise(MADV_POPULATE_WRITE, 0, 4 * PAGE),
    "CDLL madvise populate": _populate,
    "CDLL process_vm_readv": _vm_readv,
    "fcntl.ioctl": _ioctl,
    "ndarray.tofile": _tofile,
}


def _refused(area: LazyArea, access: Access) -> None:
    with pytest.raises(OSError) as refusal:
        access(area)
    # NumPy says only how many bytes it wrote.
    assert refusal.value.errno == errno.EFAULT or access is _tofile


async def _refused_then_served(name: str) -> None:
    async def fill(fault: PageFault) -> bytes:
        await asyncio.sleep(0)
        return CONTENT[fault.offset : fault.offset + fault.length]

    access = REFUSED[name]
    async with LazyMemory(SIZE, fill, deadline=5) as memory:
        area = LazyArea(memory)
        await asyncio.to_thread(_refused, area, access)
        async with memory.ensure(0, 8 * PAGE):
            assert await asyncio.to_thread(access, area) == access(plain())


def _case(name: str, new_loop: NewLoop) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(_refused_then_served(name))


# --- on the loop's own thread ----------------------------------------------------------


async def _fill(fault: PageFault) -> bytes:
    return CONTENT[fault.offset : fault.offset + fault.length]


async def _sock_sendall() -> None:
    async with LazyMemory(SIZE, _fill, deadline=5) as memory:
        loop = asyncio.get_running_loop()
        with _pair() as (ours, other):
            ours.setblocking(False)
            with pytest.raises(OSError) as refusal:
                await loop.sock_sendall(ours, memory.view[: 2 * PAGE])
            assert refusal.value.errno == errno.EFAULT
            async with memory.ensure(0, 2 * PAGE) as view:
                await loop.sock_sendall(ours, view)
            assert other.recv(2 * PAGE, socket.MSG_WAITALL) == CONTENT[: 2 * PAGE]


async def _stream_writer(*, ensured: bool) -> None:
    got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def collect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read(-1)
        writer.close()
        got.set_result(data)

    with tempfile.TemporaryDirectory() as folder:
        server = await asyncio.start_unix_server(collect, f"{folder}/s")
        async with server, LazyMemory(SIZE, _fill, deadline=5) as memory:
            _, writer = await asyncio.open_unix_connection(f"{folder}/s")
            if ensured:
                async with memory.ensure(0, 2 * PAGE) as view:
                    writer.write(view)
                    await writer.drain()
                    writer.close()
                    assert await got == CONTENT[: 2 * PAGE]
            else:
                asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
                with contextlib.suppress(OSError):
                    writer.write(memory.view[: 2 * PAGE])
                    await writer.drain()
                    writer.close()
                    await writer.wait_closed()
                assert await got == b"", "the connection is lost, as documented"
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def _run(work: Callable[[], Any], new_loop: NewLoop) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(work())


CASES: dict[str, Case] = {name: partial(_case, name) for name in REFUSED}
CASES["loop.sock_sendall"] = partial(_run, _sock_sendall)
CASES["StreamWriter.write"] = partial(_run, partial(_stream_writer, ensured=False))
CASES["StreamWriter.write, ensured"] = partial(_run, partial(_stream_writer, ensured=True))
