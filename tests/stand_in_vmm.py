"""A stand-in for a VMM: a process that hands its memory over as Firecracker does, and obeys.

Two halves.  The child (``python -m tests.stand_in_vmm``) maps memory, registers it with a
userfaultfd, sends the hand-over, and carries out commands from its stdin, each in a thread of
its own, so that one that waits in a fault holds up no other.  StandInVmm, in the test, starts
it and speaks to it.

Touches go through memcpy by ctypes, which releases the GIL: a fault that waits with the GIL
held would stop the child's other threads.

Knows: the hand-over as a VMM sends it, with its releases and quirks.
Must not know: the server under test; the message is written anew here, not by its parser.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from aiouffd.errors import NotSupported
from aiouffd.uffd import Feature, Userfaultfd

PAGE: Final = mmap.PAGESIZE
HUGE: Final = 2 << 20
_MAP_HUGETLB: Final = 0x40000
ROOT: Final = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the stand-in behaves.

    Attributes:
        socket: Where the server listens.
        size: Bytes of memory, in pages.
        regions: Into how many regions the memory is cut; a page of nothing lies between.
        offset: Where the first region's bytes begin in the image.
        dialect: ``1.1``, ``1.7``, ``1.12`` or ``stratovirt``.
        late_fd: Send the descriptor with a byte of its own, behind the text.
        pieces: Send the text in so many pieces.
        memfd: Send a memfd along, as E2B does.
        blocking: Hand over a blocking userfaultfd, as some relatives do.
        events: Ask for EVENT_REMOVE.
        forks: Ask for EVENT_FORK, which takes CAP_SYS_PTRACE.
        touch_first: Touch the first page before the hand-over is sent, in a thread.
        huge: Map huge pages of 2 MiB.
        load: Touch all memory in kernel mode before the first command is taken.
    """

    socket: str
    size: int
    regions: int = 1
    offset: int = 0
    dialect: str = "1.12"
    late_fd: bool = False
    pieces: int = 1
    memfd: bool = False
    blocking: bool = False
    events: bool = True
    forks: bool = False
    touch_first: bool = False
    huge: bool = False
    load: bool = False


# --- the child -------------------------------------------------------------------------

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.memcpy.restype = ctypes.c_void_p
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Guest:
    """The memory of the child, addressed as the image is: regions one behind the other."""

    def __init__(self, options: Options) -> None:
        self.length = options.size // options.regions
        self.maps = [
            mmap.mmap(
                -1,
                self.length,
                flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_HUGETLB * options.huge,
            )
            for _ in range(options.regions)
        ]
        self.starts = [ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in self.maps]
        self.size = self.length * options.regions

    def at(self, offset: int) -> int:
        return self.starts[offset // self.length] + offset % self.length

    def read(self, offset: int, length: int = 1) -> bytes:
        data = ctypes.create_string_buffer(length)
        _libc.memcpy(data, self.at(offset), length)
        return data.raw

    def read_in_kernel_mode(self, offset: int, length: int = PAGE) -> bytes:
        """Let write(2) read the memory: a fault in kernel mode, EFAULT where it is poisoned."""
        reader, writer = os.pipe()
        try:
            view = memoryview(self.maps[offset // self.length])
            at = offset % self.length
            os.write(writer, view[at : at + length])
            return os.read(reader, length)
        finally:
            os.close(reader)
            os.close(writer)

    def write(self, offset: int, data: bytes) -> None:
        _libc.memcpy(self.at(offset), data, len(data))

    def remove(self, offset: int, length: int) -> None:
        """Give pages back, as a balloon does: sleeps until the event has been read."""
        if _libc.madvise(self.at(offset), length, mmap.MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise")

    def digest(self, seed: int | None = None) -> str:
        """Touch every page, in random order if there is a seed, then hash the memory."""
        pages = list(range(0, self.size, PAGE))
        if seed is not None:
            random.Random(seed).shuffle(pages)
        for offset in pages:
            self.read(offset)
        return hashlib.sha256(
            self.read(0, self.size) if len(self.maps) == 1 else self._all()
        ).hexdigest()

    def _all(self) -> bytes:
        return b"".join(
            self.read(number * self.length, self.length) for number in range(len(self.maps))
        )


def _describe(options: Options, guest: Guest) -> bytes:
    regions = []
    for number, start in enumerate(guest.starts):
        address = "base_hva" if options.dialect == "stratovirt" else "base_host_virt_addr"
        region = {
            address: start,
            "size": guest.length,
            "offset": options.offset + number * guest.length,
        }
        if options.dialect == "1.12":
            region["page_size"] = HUGE if options.huge else PAGE
        if options.dialect != "1.1":
            region["page_size_kib"] = HUGE if options.huge else PAGE  # bytes, in spite of its name
        regions.append(region)
    return json.dumps(regions).encode()


def _hand_over(options: Options, guest: Guest, uffd: int) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    server.connect(options.socket)
    text = _describe(options, guest)
    fds = [uffd]
    if options.memfd:
        fds.append(os.memfd_create("guest"))
    step = -(-len(text) // options.pieces)
    pieces = [text[at : at + step] for at in range(0, len(text), step)]
    if options.late_fd:
        pieces.append(b"\n")
    carrier = len(pieces) - 1 if options.late_fd else 0
    for number, piece in enumerate(pieces):
        socket.send_fds(server, [piece], fds if number == carrier else [])
    if options.dialect == "stratovirt" and server.recv(1) != b"\x01":
        raise ConnectionError("no acknowledgement came")
    return server


class _Commands:
    """What the child can be told to do, by name; each runs in a thread of its own."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def read(self, offset: int, length: int = 1) -> str:
        return self.guest.read(offset, length).hex()

    def read_in_kernel_mode(self, offset: int) -> str:
        return self.guest.read_in_kernel_mode(offset).hex()

    def write(self, offset: int, data: str) -> None:
        self.guest.write(offset, bytes.fromhex(data))

    def remove(self, offset: int, length: int) -> None:
        self.guest.remove(offset, length)

    def digest(self, seed: int | None = None) -> str:
        return self.guest.digest(seed)

    def fork(self, path: str) -> None:
        """Leave a child that waits for our end, then writes its memory's digest to a file."""
        parent = os.getpid()
        if os.fork():
            return
        try:
            while os.getppid() == parent:
                time.sleep(0.01)
            digest = hashlib.sha256(self.guest.read(0, self.guest.length)).hexdigest()
            with open(path + ".new", "w", encoding="ascii") as file:
                file.write(digest)
            os.rename(path + ".new", path)
        finally:
            os._exit(0)

    def exit(self, status: int = 0) -> None:
        os._exit(status)

    def exec(self) -> None:
        os.execv("/bin/sleep", ["sleep", "60"])


def _carry_out(call: Callable[..., object], number: int, arguments: list[Any]) -> None:
    try:
        answer: dict[str, object] = {"number": number, "result": call(*arguments)}
    except OSError as error:
        answer = {"number": number, "errno": error.errno}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def child(options: Options) -> None:
    """Be the VMM."""
    guest = Guest(options)
    features = Feature.EVENT_REMOVE if options.events else Feature(0)
    if options.forks:
        features |= Feature.EVENT_FORK
    try:
        uffd = Userfaultfd.open(features)
    except NotSupported:
        uffd = Userfaultfd.open(features, allow_user_mode_only=True)
    for start in guest.starts:
        uffd.register(start, guest.length)
    os.set_blocking(uffd.fileno(), options.blocking)
    if options.touch_first:
        threading.Thread(target=guest.read, args=(0,), daemon=True).start()
    server = _hand_over(options, guest, uffd.fileno())
    if options.load:
        for offset in range(0, guest.size, PAGE):
            guest.read_in_kernel_mode(offset)
    sys.stdout.write('{"number": 0, "result": "handed over"}\n')
    sys.stdout.flush()
    commands = _Commands(guest)
    for line in sys.stdin:
        name, number, arguments = json.loads(line)
        threading.Thread(
            target=_carry_out, args=(getattr(commands, name), number, arguments), daemon=True
        ).start()
    server.close()
    os._exit(0)  # threads may wait in faults; ours is not to wait for them


# --- the test's half -------------------------------------------------------------------


class StandInVmm:
    """A stand-in VMM that runs, seen from the test."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        """Use ``start`` instead."""
        self.process = process
        self._numbers = iter(range(1, 1 << 30))
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        loop = asyncio.get_running_loop()
        self.handed_over: asyncio.Future[dict[str, Any]] = loop.create_future()
        self._waiting[0] = self.handed_over
        self._reader = loop.create_task(self._read_answers())

    @classmethod
    @contextlib.asynccontextmanager
    async def start(
        cls, path: str | os.PathLike[str], size: int, *, wait: bool = True, **options: Any
    ) -> AsyncIterator[StandInVmm]:
        """Run a VMM, by default until its hand-over is sent; killed and reaped at the end."""
        chosen = Options(socket=os.fspath(path), size=size, **options)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.stand_in_vmm",
            json.dumps(asdict(chosen)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            limit=1 << 24,
        )
        vmm = cls(process)
        try:
            if wait:
                await vmm.handed_over
            yield vmm
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            await vmm._reader

    async def _read_answers(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            answer = json.loads(line)
            waiting = self._waiting.pop(answer["number"])
            if not waiting.done():
                waiting.set_result(answer)
        status = await self.process.wait()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ChildProcessError(f"the VMM ended with status {status}"))
                waiting.exception()  # nobody may have waited for it

    def tell(self, name: str, *arguments: object) -> asyncio.Future[dict[str, Any]]:
        """Give a command; its answer comes when it is done, which may take a fault."""
        number = next(self._numbers)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, number, arguments]).encode() + b"\n")
        self._waiting[number] = asyncio.get_running_loop().create_future()
        return self._waiting[number]

    async def ask(self, name: str, *arguments: object) -> Any:
        """Give a command and wait for what it gives; an OSError there is raised here."""
        async with asyncio.timeout(30):
            answer = await self.tell(name, *arguments)
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]))
        return answer.get("result")

    async def read(self, offset: int, length: int = 1) -> bytes:
        """Read its memory."""
        return bytes.fromhex(await self.ask("read", offset, length))

    async def status(self) -> int:
        """Wait for its end; minus the signal if one ended it."""
        async with asyncio.timeout(30):
            return await self.process.wait()

    def kill(self) -> None:
        """End it at once."""
        self.process.send_signal(signal.SIGKILL)


async def eventually(condition: Callable[[], object], what: str, limit: float = 20.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"not within {limit} s: {what}"
        await asyncio.sleep(0.005)


if __name__ == "__main__":
    child(Options(**json.loads(sys.argv[1])))
