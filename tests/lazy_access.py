"""Every kind of access that Python code makes to a buffer, to be tried on lazy memory.

Knows: the kinds, as functions of an Area; that lazy memory must give what plain memory gives.
Must not know: how lazy memory works.

``CASES`` has each kind twice: touched in a worker thread with the loop in the main thread, and
the other way round.  Each gets lazy memory of its own, of which nothing is there.
"""

from __future__ import annotations

import array
import asyncio
import base64
import binascii
import bz2
import copy
import ctypes
import fcntl
import hashlib
import io
import lzma
import marshal
import mmap
import pickle
import random
import re
import socket
import sqlite3
import struct
import tempfile
import termios
import threading
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from aiouffd.events import PageFault
from aiouffd.lazy_memory import Holes, LazyMemory
from tests.lazy_harness import Case, NewLoop

PAGE = 4096
SIZE = 320 * PAGE  # above the megabyte from which on bytes.join gives up the GIL
HEAD = 2 * PAGE + 100  # two pages and a bit

_random = random.Random(1)
CONTENT = _random.randbytes(SIZE)
_PICKLED = pickle.dumps(list(range(1000)))
_MARSHALLED = marshal.dumps(list(range(1000)))

_libc = ctypes.CDLL(None, use_errno=True)
_pylibc = ctypes.PyDLL(None, use_errno=True)
for _lib in (_libc, _pylibc):
    _lib.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Area:
    """Memory in the forms in which code takes it: lazy, or plain to compare with."""

    def __init__(self, memory: mmap.mmap, view: memoryview) -> None:
        self.mm = memory
        self.mv = view
        self.chars = (ctypes.c_char * SIZE).from_buffer(memory)
        self.address = ctypes.addressof(self.chars)
        self.np = np.frombuffer(view, dtype="u1")

    def head(self) -> bytes:
        """The first pages, after a store."""
        return self.mv[: 4 * PAGE].tobytes()


def plain() -> Area:
    memory = mmap.mmap(-1, SIZE)
    memory[:] = CONTENT
    return Area(memory, memoryview(memory))


class LazyArea(Area):
    """An Area over lazy memory, which it may change while an access runs."""

    def __init__(self, memory: LazyMemory) -> None:
        mapping = memory._mapping
        assert mapping._memory is not None
        super().__init__(mapping._memory, memory.view)
        self.memory = memory
        self.ones = False


Access = Callable[[Area], Any]


def _after(store: Callable[[Area], object]) -> Access:
    """Make an access of a store: its result is what the memory holds then."""

    def access(area: Area) -> bytes:
        store(area)
        return area.head()

    return access


def _assign(what: str, where: Any, value: Any) -> Access:
    def store(area: Area) -> None:
        getattr(area, what)[where] = value

    return _after(store)


def _bytearray_from(area: Area) -> bytes:
    target = bytearray(HEAD)
    target[:] = area.mv[:HEAD]
    target.extend(area.mv[HEAD : HEAD + 50])
    return bytes(target)


def _bytearray_add(area: Area) -> bytes:
    target = bytearray(b"x")
    target += area.mv[:HEAD]
    return bytes(target + area.mv[HEAD : 2 * HEAD])


def _array_frombytes(area: Area) -> array.array[int]:
    target = array.array("H")
    target.frombytes(area.mv[:HEAD])
    return target


def _bytesio_write(area: Area) -> bytes:
    target = io.BytesIO()
    target.write(area.mv[:HEAD])
    return target.getvalue()


def _bytesio_readinto(area: Area) -> int:
    return io.BytesIO(b"q" * HEAD).readinto(area.mv[:HEAD])


def _pickle_in_band(area: Area) -> bytes:
    return pickle.dumps(pickle.PickleBuffer(area.mv[:HEAD]), protocol=5)


def _pickle_loads(area: Area) -> Any:
    area.mv[100 : 100 + len(_PICKLED)] = _PICKLED
    return pickle.loads(area.mv[100:])


def _marshal_loads(area: Area) -> Any:
    area.mv[100 : 100 + len(_MARSHALLED)] = _MARSHALLED
    return marshal.loads(area.mv[100:])


def _sqlite_bind(area: Area) -> Any:
    connection = sqlite3.connect(":memory:")
    try:
        return connection.execute("select hex(?)", (area.mv[:HEAD],)).fetchone()
    finally:
        connection.close()


def _compress(maker: Callable[[], Any]) -> Access:
    def access(area: Area) -> bytes:
        compressor = maker()
        data: bytes = compressor.compress(area.mv[:HEAD]) + compressor.flush()
        return data

    return access


def _memmove_out(area: Area) -> bytes:
    target = ctypes.create_string_buffer(HEAD)
    ctypes.memmove(target, area.address + PAGE // 2, HEAD)
    return target.raw


def _memcpy(lib: Any, area: Area) -> bytes:
    target = ctypes.create_string_buffer(HEAD)
    lib.memcpy(target, area.address + PAGE // 2, HEAD)
    return target.raw


def _small_buffered_write(area: Area) -> bytes:
    with tempfile.TemporaryFile() as file:
        file.write(area.mv[PAGE - 50 : PAGE + 50])
        file.flush()
        file.seek(0)
        return file.read()


def _small_buffered_readinto(area: Area) -> bytes:
    with tempfile.TemporaryFile() as file:
        file.write(b"r" * 1000)
        file.seek(0)
        file.readinto(area.mv[PAGE - 50 : PAGE + 50])
    return area.head()


def _small_ioctl(area: Area) -> bytes:
    # Up to 1024 bytes go through a buffer of Python's own.
    ours, other = socket.socketpair()
    with ours, other:
        other.sendall(b"five!")
        fcntl.ioctl(ours, termios.FIONREAD, area.mv[PAGE - 2 : PAGE + 2])
    return area.head()


def _mm_reader(method: str, *arguments: Any, at: int = PAGE - 50) -> Access:
    def access(area: Area) -> Any:
        area.mm.seek(at)
        return getattr(area.mm, method)(*arguments)

    return access


def _mm_writer(method: str, *arguments: Any) -> Access:
    return _after(_mm_reader(method, *arguments))


def _crossing_u64(area: Area) -> Any:
    return ctypes.c_uint64.from_address(area.address + PAGE - 4).value


def _crossing_store(area: Area) -> bytes:
    ctypes.c_uint64.from_address(area.address + PAGE - 4).value = 0x1122334455667788
    return area.head()


def _two_areas(area: Area) -> bytes:
    area.mv[0:HEAD] = area.mv[5 * PAGE : 5 * PAGE + HEAD]
    return area.head()


def _sha256(length: int, area: Area) -> bytes:
    return hashlib.sha256(area.mv[PAGE - 50 :][:length]).digest()


def _check(function: Callable[[memoryview], int], length: int, area: Area) -> int:
    return function(area.mv[PAGE - 50 :][:length])


def _blas(area: Area) -> float:
    """A matrix product of floats, in BLAS's own threads, on operands that are lazy."""
    area.np[: 512 * 512 * 4].view("f4")[:] = 1.0
    if not isinstance(area, LazyArea):
        return float(512**3)
    area.memory.evict(0, 512 * 512 * 4)
    area.ones = True  # from now on the handler answers with ones
    square = area.np[: 512 * 512 * 4].view("f4").reshape(512, 512)
    return float((square @ square).sum())


_NEEDLE = CONTENT[2 * PAGE - 3 : 2 * PAGE + 5]

#: Served: name to access.
SERVED: dict[str, Access] = {
    # mmap
    "mmap index": lambda a: a.mm[5000],
    "mmap slice": lambda a: a.mm[100:HEAD],
    "mmap extended slice": lambda a: a.mm[100 : 3 * PAGE : 1000],
    "mmap assign": _assign("mm", 5000, 7),
    "mmap assign slice": _assign("mm", slice(PAGE - 2, PAGE + 2), b"abcd"),
    "mmap read": _mm_reader("read", HEAD),
    "mmap read_byte": _mm_reader("read_byte"),
    "mmap readline": _mm_reader("readline"),
    "mmap find": _mm_reader("find", _NEEDLE),
    "mmap rfind": lambda a: a.mm.rfind(_NEEDLE, 0, 3 * PAGE),
    "mmap write": _mm_writer("write", b"w" * 100),
    "mmap write_byte": _mm_writer("write_byte", 9),
    "mmap move": _after(lambda a: a.mm.move(0, PAGE * 6 - 10, 100)),
    "mmap iterate": lambda a: [byte for byte, _ in zip(a.mm, range(5000), strict=False)],
    "mmap in": lambda a: CONTENT[5000:5001] in a.mm,
    # memoryview
    "view index": lambda a: a.mv[5000],
    "view slice of slice": lambda a: a.mv[PAGE:][5:9][1],
    "view assign": _assign("mv", 5000, 7),
    "view assign slice": _assign("mv", slice(PAGE - 2, PAGE + 2), b"abcd"),
    "view tobytes": lambda a: a.mv[:HEAD].tobytes(),
    "view tobytes strided": lambda a: a.mv[: 4 * PAGE : 999].tobytes(),
    "view tolist": lambda a: a.mv[:HEAD].tolist(),
    "view hex": lambda a: a.mv[:HEAD].hex(),
    "view equal": lambda a: a.mv[:HEAD] == CONTENT[:HEAD],
    "view hash": lambda a: hash(a.mv[:HEAD].toreadonly()),
    "view in": lambda a: CONTENT[5000] in a.mv,
    "view cast": lambda a: a.mv.cast("I")[2000],
    "view cast tolist": lambda a: a.mv[: 2 * PAGE].cast("d").cast("B").tolist(),
    "view iterate": lambda a: sum(a.mv[: PAGE + 10]),
    # bytes-like consumers
    "bytes": lambda a: bytes(a.mv[:HEAD]),
    "bytearray": lambda a: bytearray(a.mv[:HEAD]),
    "bytearray slice and extend": _bytearray_from,
    "bytearray add": _bytearray_add,
    "bytes join small": lambda a: b",".join([a.mv[:100], a.mv[PAGE : PAGE + 100]]),
    "bytes join large": lambda a: b"".join([a.mv, a.mv[:PAGE]]),
    "bytes add": lambda a: b"x" + a.mv[:HEAD],
    "bytes find": lambda a: CONTENT[:HEAD].find(a.mv[PAGE : PAGE + 50]),
    "bytes startswith": lambda a: CONTENT.startswith(bytes(a.mv[:10])),
    "str": lambda a: str(a.mv[:HEAD], "latin-1"),
    "int.from_bytes": lambda a: int.from_bytes(a.mv[PAGE - 4 : PAGE + 4], "little"),
    "struct unpack": lambda a: struct.unpack_from("<QI", a.mv, PAGE - 6),
    "struct iter_unpack": lambda a: list(struct.iter_unpack("<Q", a.mv[: 2 * PAGE])),
    "struct pack_into": _after(lambda a: struct.pack_into("<QQ", a.mv, PAGE - 6, 1, 2)),
    "array frombytes": _array_frombytes,
    "re search": lambda a: re.search(re.escape(_NEEDLE), a.mv).span(),  # type: ignore[union-attr]
    "re findall": lambda a: re.findall(rb"ab.", a.mv[: 8 * PAGE]),
    "pickle in band": _pickle_in_band,
    "pickle loads": _pickle_loads,
    "marshal dumps": lambda a: marshal.dumps(a.mv[:HEAD]),
    "marshal loads": _marshal_loads,
    "hexlify": lambda a: binascii.hexlify(a.mv[:HEAD]),
    "base64": lambda a: base64.b64encode(a.mv[:HEAD]),
    "BytesIO write": _bytesio_write,
    "BytesIO readinto": _after(_bytesio_readinto),
    "BytesIO of": lambda a: io.BytesIO(a.mv[:HEAD]).read(),
    "sqlite3 bind": _sqlite_bind,
    "copy.copy": lambda a: copy.copy(a.np[:HEAD]).tobytes(),
    # ctypes
    "ctypes index": lambda a: a.chars[5000],
    "ctypes slice": lambda a: a.chars[PAGE - 5 : PAGE + 5],
    "ctypes store": _assign("chars", 5000, b"z"),
    "ctypes raw": lambda a: (ctypes.c_char * HEAD).from_buffer(a.mm).raw,
    "ctypes value": lambda a: (ctypes.c_char * 300).from_buffer(a.mm, PAGE - 150).value,
    "ctypes from_buffer_copy": lambda a: (ctypes.c_char * HEAD).from_buffer_copy(a.mv).raw,
    "ctypes pointer": lambda a: ctypes.cast(a.address + 5000, ctypes.POINTER(ctypes.c_long))[0],
    "ctypes string_at": lambda a: ctypes.string_at(a.address + 50, HEAD),
    "ctypes memmove": _memmove_out,
    "ctypes memmove in": _after(lambda a: ctypes.memmove(a.address + PAGE - 5, b"0123456789", 10)),
    "ctypes memset": _after(lambda a: ctypes.memset(a.address + PAGE - 5, 3, 10)),
    "ctypes CDLL memcpy": partial(_memcpy, _libc),
    "ctypes PyDLL memcpy": partial(_memcpy, _pylibc),
    "ctypes across pages": _crossing_u64,
    "ctypes store across pages": _crossing_store,
    # hashes, checksums, compression
    **{f"sha256 {length}": partial(_sha256, length) for length in (100, 2047, 2048, 4096)},
    **{f"crc32 {length}": partial(_check, zlib.crc32, length) for length in (4096, 8192)},
    **{f"adler32 {length}": partial(_check, zlib.adler32, length) for length in (4096, 8192)},
    "blake2b update": lambda a: hashlib.blake2b(a.mv[:HEAD]).digest(),
    "zlib compress": lambda a: zlib.compress(a.mv[:HEAD]),
    "zlib compressobj": _compress(zlib.compressobj),
    "bz2 compress": _compress(bz2.BZ2Compressor),
    "lzma compress": _compress(lzma.LZMACompressor),
    # input and output that stays in a Python buffer
    "small buffered write": _small_buffered_write,
    "small buffered readinto": _small_buffered_readinto,
    "small ioctl": _small_ioctl,
    # NumPy
    "numpy scalar": lambda a: int(a.np[5000]),
    "numpy 500 elements": lambda a: a.np[PAGE - 250 :][:500].copy().tobytes(),
    "numpy 501 elements": lambda a: a.np[PAGE - 250 :][:501].copy().tobytes(),
    "numpy sum": lambda a: int(a.np.sum()),
    "numpy sum same type": lambda a: int(a.np.view("u8").sum()),
    "numpy max": lambda a: int(a.np[:HEAD].max()),
    "numpy min": lambda a: int(a.np[:HEAD].min()),
    "numpy any": lambda a: bool(a.np[:HEAD].any()),
    "numpy mean": lambda a: float(a.np[:HEAD].mean()),
    "numpy cumsum": lambda a: a.np[:HEAD].cumsum().tobytes(),
    "numpy nonzero": lambda a: a.np[:HEAD].nonzero()[0].tobytes(),
    "numpy tobytes": lambda a: a.np[:HEAD].tobytes(),
    "numpy tolist": lambda a: a.np[:HEAD].tolist(),
    "numpy fancy index": lambda a: a.np[[1, 5000, 9000]].tobytes(),
    "numpy repr": lambda a: repr(a.np),
    "numpy save": lambda a: np.save(io.BytesIO(), a.np[:HEAD]),
    "numpy astype": lambda a: a.np[:HEAD].astype("f8").tobytes(),
    "numpy fill": _after(lambda a: a.np[:HEAD].fill(3)),
    "numpy ufunc": lambda a: (a.np[:HEAD] + 1).tobytes(),
    "numpy ufunc in place": _after(lambda a: np.add(a.np[:HEAD], 1, out=a.np[:HEAD])),
    "numpy sort": lambda a: np.sort(a.np[:HEAD]).tobytes(),
    "numpy sort in place": _after(lambda a: a.np[:HEAD].sort()),
    "numpy dot": lambda a: float(a.np[:HEAD].astype("f4").dot(a.np[:HEAD].astype("f4"))),
    "numpy matrix product": lambda a: (
        a.np[: 256 * 1024].view("u4").reshape(256, 256) % 7 @ np.ones((256, 256), "u4")
    ).tobytes(),
    "numpy blas": _blas,
    "numpy where": lambda a: np.where(a.np[:HEAD] > 100, 1, 0).tobytes(),
    "numpy equal": lambda a: bool((a.np[:HEAD] == np.frombuffer(CONTENT[:HEAD], "u1")).all()),
    "numpy concatenate": lambda a: np.concatenate([a.np[:HEAD], a.np[HEAD : 2 * HEAD]]).tobytes(),
    "numpy take": lambda a: a.np.take([1, 5000, 9000]).tobytes(),
    "numpy argmax": lambda a: int(a.np[:HEAD].argmax()),
    "numpy array of view": lambda a: np.array(a.mv[:HEAD]).tobytes(),
    "numpy assign": _assign("np", slice(PAGE - 5, PAGE + 5), 8),
    # both ends lazy
    "copy within": _two_areas,
}


_ONES = np.ones(PAGE // 4, "f4").tobytes()


async def _with_lazy_area(work: Callable[[LazyArea], Any]) -> None:
    area: LazyArea | None = None

    async def fill(fault: PageFault) -> bytes:
        await asyncio.sleep(0)
        if area is not None and area.ones:
            return _ONES
        return CONTENT[fault.offset : fault.offset + fault.length]

    async with LazyMemory(SIZE, fill, deadline=5) as memory:
        area = LazyArea(memory)
        await asyncio.to_thread(work, area)
        assert memory.counters.faults > 0, "nothing faulted: this proves nothing"
        assert not memory.counters.failures


def _compare(name: str, area: LazyArea) -> None:
    expected = SERVED[name](plain())
    assert SERVED[name](area) == expected


def _in_worker(name: str, new_loop: NewLoop) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(_with_lazy_area(partial(_compare, name)))


class LoopThread:
    """A loop in a thread of its own, so that the main thread can be the one that touches."""

    def __init__(self, new_loop: NewLoop) -> None:
        self.loop = new_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)

    def __enter__(self) -> LoopThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def run(self, work: Any) -> Any:
        """Run a coroutine there and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()


def _in_main(name: str, new_loop: NewLoop) -> None:
    async def fill(fault: PageFault) -> bytes:
        await asyncio.sleep(0)
        if area.ones:
            return _ONES
        return CONTENT[fault.offset : fault.offset + fault.length]

    with LoopThread(new_loop) as other:
        memory = LazyMemory(SIZE, fill, deadline=5)
        other.run(memory.open())
        area = LazyArea(memory)
        try:
            _compare(name, area)
            assert memory.counters.faults > 0, "nothing faulted: this proves nothing"
        finally:
            other.run(memory.aclose(Holes.RAISE))


CASES: dict[str, Case] = {}
for _name in SERVED:
    CASES[f"{_name}, in a worker"] = partial(_in_worker, _name)
    CASES[f"{_name}, in the main thread"] = partial(_in_main, _name)
