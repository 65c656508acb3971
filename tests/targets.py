"""Real child processes whose memory is served: they fault, so that the tests need not.

Knows: how to build ``target.c``, drive it over its control socket and look at it in /proc.
Must not know: Pager, handlers; only ``aiouffd.kernel`` is used, to register and to read fdinfo.

A Target owns one mapping of a stated kind and one userfaultfd over it.  Whatever may fault is
*started* in one of its threads and answered later: ``touch = target.start_read(3)`` returns at
once, ``await touch`` gives the byte, or a Signal where the access ended in SIGBUS or SIGSEGV.
Without a loop ``touch.result()`` waits.  Every wait has a deadline and says, when it passes,
what each thread of the target was doing.  Leaving the ``with`` kills and reaps the process and
closes every descriptor.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import errno
import functools
import mmap
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, Self, TypeVar, cast

import pytest

from aiouffd.kernel import abi, calls

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

T = TypeVar("T")

PAGE: Final = mmap.PAGESIZE
HUGE: Final = 2 * 1024 * 1024

#: How long anything here may take, in seconds.
TIME_SCALE: Final = float(os.environ.get("AIOUFFD_TIME_SCALE", "1"))
DEADLINE: Final = 10.0 * TIME_SCALE

MISSING: Final = abi.UFFDIO_REGISTER_MODE_MISSING
WP: Final = abi.UFFDIO_REGISTER_MODE_WP
MINOR: Final = abi.UFFDIO_REGISTER_MODE_MINOR

#: Kinds of memory: ``shmem-private`` is a private mapping of a memfd.
KINDS: Final = ("anon", "shmem", "shmem-private", "hugetlb", "hugetlb-private")
SMALL_KINDS: Final = ("anon", "shmem", "shmem-private")

# linux/mman.h, where the mmap module has no name for it
MAP_FIXED: Final = 0x10
MAP_HUGETLB: Final = 0x40000
MFD_HUGETLB: Final = 4
MADV_PAGEOUT: Final = 21
MADV_COLLAPSE: Final = 25
MREMAP_MAYMOVE: Final = 1
MREMAP_FIXED: Final = 2
MREMAP_DONTUNMAP: Final = 4
_NO_ACCESS: Final = 0
_READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE


class Signal(NamedTuple):
    """How an access ended that a signal stopped."""

    number: int
    code: int
    address: int


class TargetDied(Exception):
    """The target ended before it answered."""


class TargetLate(AssertionError):
    """The target did not do something within the deadline."""


@functools.cache
def executable() -> str:
    """Compile ``target.c``, once per test session.

    Returns:
        The path of the program.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for tests/target.c: install one (apt install gcc) or set CC")
    folder = tempfile.mkdtemp(prefix="aiouffd-target-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program = str(Path(folder, "target"))
    source = str(Path(__file__).with_name("target.c"))
    subprocess.run(
        [compiler, "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror", "-o", program, source],
        check=True,
        timeout=120,
    )
    return program


def wait_until(condition: Callable[[], object], what: str, deadline: float = DEADLINE) -> None:
    """Poll until ``condition()`` is true; for tests without a loop."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            raise TargetLate(f"not within {deadline:g} s: {what}")
        time.sleep(0.0005)


async def until(condition: Callable[[], object], what: str, deadline: float = DEADLINE) -> None:
    """Poll until ``condition()`` is true, letting the loop run."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            raise TargetLate(f"not within {deadline:g} s: {what}")
        await asyncio.sleep(0.0005)


class Call(Generic[T]):
    """Something that a thread of the target was told to do.  Await it, or ask for result()."""

    def __init__(self, process: Process, text: str, convert: Callable[[Any], T]) -> None:
        self._process = process
        self._text = text
        self._convert = convert
        self._future: asyncio.Future[None] | None = None
        self._answer: Any = None
        self._error: Exception | None = None
        self._done = False

    @property
    def done(self) -> bool:
        """Whether the answer is there; looks at the socket first."""
        if not self._done:
            self._process._pump()
        return self._done

    def result(self, deadline: float = DEADLINE) -> T:
        """Wait without a loop.

        Raises:
            TargetDied: The process ended.
            TargetLate: The deadline passed.
        """
        end = time.monotonic() + deadline
        while not self.done:
            left = end - time.monotonic()
            if left <= 0:
                raise self._late(deadline)
            select.select([self._process._socket], [], [], left)
        return self._value()

    def __await__(self) -> Generator[Any, None, T]:
        return self.within(DEADLINE).__await__()

    async def within(self, deadline: float) -> T:
        """Wait at most ``deadline`` seconds; a cancelled wait loses nothing."""
        if not self.done:
            self._process._watch()
            self._future = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(deadline):
                    await self._future
            except TimeoutError:
                raise self._late(deadline) from None
        return self._value()

    def _late(self, deadline: float) -> TargetLate:
        return TargetLate(
            f"no answer to {self._text!r} within {deadline:g} s\n{self._process.describe()}"
        )

    def _value(self) -> T:
        if self._error is not None:
            raise self._error
        return self._convert(self._answer)

    def _finish(self, answer: Any, error: Exception | None = None) -> None:
        self._answer, self._error, self._done = answer, error, True
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    def __repr__(self) -> str:
        return f"<Call {self._text!r} {'done' if self._done else 'under way'}>"


def _spawn(threads: int) -> tuple[socket.socket, int, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            popen = subprocess.Popen(
                [executable(), str(theirs.fileno()), str(threads)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        except BaseException:
            ours.close()
            raise
    return ours, popen.pid, popen


class Process:
    """One running ``target.c``, commanded by address.

    Attributes:
        pid: Its process id.
        pidfd: A pidfd of it, owned here.
        thread_ids: The kernel's id of each of its threads.
    """

    def __init__(
        self, control: socket.socket, pid: int, popen: subprocess.Popen[bytes] | None = None
    ) -> None:
        self._socket = control
        self._socket.setblocking(False)
        self._calls: dict[int, Call[Any]] = {}
        self._next = 1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._gone = False
        self._descendants: list[Process] = []
        self._popen = popen
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.thread_ids: tuple[int, ...] = ()
        self.ready = self._expect(0, "start", self._on_ready)

    @classmethod
    def start(cls, threads: int = 4) -> Process:
        """Start one, and wait until it listens."""
        process = Process(*_spawn(threads))
        try:
            process.ready.result()
        except BaseException:
            process.close()
            raise
        return process

    def _on_ready(self, answer: list[int]) -> None:
        self.thread_ids = tuple(answer[1:])

    # --- commands ----------------------------------------------------------------------

    def tell(self, thread: int, *words: object, convert: Callable[[Any], T]) -> Call[T]:
        """Send a command to a thread (-1: the control thread) and return at once."""
        number, self._next = self._next, self._next + 1
        text = f"{number} {thread} " + " ".join(str(word) for word in words)
        call = self._expect(number, text, convert)
        if self._gone:
            call._finish(None, TargetDied(f"process {self.pid} has ended"))
            return call
        try:
            self._socket.send(text.encode())
        except OSError as error:
            call._finish(None, TargetDied(f"process {self.pid} has ended: {error}"))
        return call

    def start_peek(self, address: int, thread: int = 0) -> Call[int | Signal]:
        """Read a byte."""
        return self.tell(thread, "peek", address, convert=_value_or_signal)

    def start_poke(self, address: int, value: int, thread: int = 0) -> Call[int | Signal]:
        """Write a byte; the answer is the byte."""
        return self.tell(thread, "poke", address, value, convert=_value_or_signal)

    def start_poke64(self, address: int, value: int, thread: int = 0) -> Call[int | Signal]:
        """Write a u64; the answer is the u64."""
        return self.tell(thread, "poke64", address, value, convert=_value_or_signal)

    def start_fill(self, address: int, length: int, byte: int, thread: int = 0) -> Call[Any]:
        """Set ``length`` bytes to ``byte``."""
        return self.tell(thread, "fill", address, length, byte, convert=_value_or_signal)

    def start_number(
        self, address: int, step: int, count: int, first: int = 1, thread: int = 0
    ) -> Call[int | Signal]:
        """Write the u64 ``first + i`` at ``address + i * step``, ``count`` times."""
        return self.tell(thread, "number", address, step, count, first, convert=_value_or_signal)

    def start_crc32(self, address: int, length: int, thread: int = 0) -> Call[int | Signal]:
        """Read a range to its end; the answer is its zlib.crc32."""
        return self.tell(thread, "crc32", address, length, convert=_value_or_signal)

    def start_words(
        self, address: int, step: int, count: int, thread: int = 0
    ) -> Call[list[int | None]]:
        """Read the u64 at each step; None where a signal stopped the access."""
        return self.tell(thread, "words", address, step, count, convert=_as_is)

    def call(self, name: str, *arguments: int, thread: int = 0) -> Call[int]:
        """Make a system call (of the table in target.c); the answer is its value or -errno."""
        numbers = [number & 0xFFFF_FFFF_FFFF_FFFF for number in arguments]
        return self.tell(thread, "call", name, *numbers, convert=_value)

    def make_memfd(self, name: str, flags: int, length: int, thread: int = 0) -> tuple[int, int]:
        """Make a memfd in the target.

        Returns:
            Its number there, and a descriptor of it here that the caller closes.
        """
        return self.tell(thread, "memfd", name, flags, length, convert=_value_and_fd).result()

    def open_uffd(self, features: int, flags: int, *, keep: bool = False) -> tuple[int, int]:
        """Open a userfaultfd of the target's memory and shake hands.

        Returns:
            Its number there (-1 unless kept), and a descriptor of it here.
        """
        call = self.tell(0, "uffd", features, flags, int(keep), convert=_value_and_fd)
        return call.result()

    def stop(self, value: int = 1) -> Call[int]:
        """End storms, lockers and pelting (1), churning (2), all (3); 0 lets new ones run."""
        return self.tell(-1, "stop", value, convert=_value)

    def send_signal(self, thread: int, number: int) -> Call[int]:
        """Send a signal to one thread, by the control thread."""
        return self.tell(-1, "signal", thread, number, convert=_value)

    def signals(self, thread: int) -> Call[int]:
        """Count the signals that a thread has caught (USR1, USR2, PROF, ALRM, CHLD)."""
        return self.tell(-1, "signals", thread, convert=_value)

    def start_exec(self, thread: int = 0) -> Call[None]:
        """Replace the program by itself; the answer comes from the new one."""
        return self.tell(thread, "exec", convert=self._on_ready)

    def start_fork(self, thread: int = 0) -> Call[Process]:
        """Fork.  The answer is the child, commanded like its parent; await its ``ready``."""
        return self.tell(thread, "fork", convert=self._on_fork)

    def _on_fork(self, answer: Any) -> Process:
        pid, fd = answer if isinstance(answer, tuple) else (answer, -1)
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid), "fork")
        child = self._make_child(socket.socket(fileno=fd), pid)
        self._descendants.append(child)
        return child

    def _make_child(self, control: socket.socket, pid: int) -> Process:
        return Process(control, pid)

    # --- observations ------------------------------------------------------------------

    def wchan(self, thread: int) -> str:
        """Name the kernel function that a thread sleeps in."""
        return Path(f"/proc/{self.pid}/task/{self.thread_ids[thread]}/wchan").read_text()

    def state(self, thread: int) -> str:
        """Give a thread's state letter: R, S (also in a fault), D (in an event), Z, T."""
        stat = Path(f"/proc/{self.pid}/task/{self.thread_ids[thread]}/stat").read_text()
        return stat.rpartition(")")[2].split()[0]

    def is_blocked(self, thread: int = 0) -> bool:
        """Say whether a thread waits in a page fault."""
        return self.wchan(thread) == "handle_userfault"

    async def blocked(self, thread: int = 0) -> None:
        """Wait until a thread waits in a page fault."""
        await until(lambda: self.is_blocked(thread), f"thread {thread} blocks in a fault")

    async def in_event(self, thread: int = 0) -> None:
        """Wait until a thread waits for one of its events to be read."""
        await until(lambda: self.state(thread) == "D", f"thread {thread} blocks in an event")

    def pagemap(self, address: int, pages: int = 1) -> list[int]:
        """Read the pagemap entries of small pages."""
        with open(f"/proc/{self.pid}/pagemap", "rb", buffering=0) as file:
            data = os.pread(file.fileno(), 8 * pages, address // PAGE * 8)
        return list(memoryview(data).cast("Q"))

    def vm_flags(self, address: int) -> set[str]:
        """Read the VmFlags of the mapping that holds an address."""
        inside = False
        for line in Path(f"/proc/{self.pid}/smaps").read_text().splitlines():
            if line[0].isdigit() or line[0] in "abcdef":
                low, _, high = line.split()[0].partition("-")
                inside = int(low, 16) <= address < int(high, 16)
            elif inside and line.startswith("VmFlags:"):
                return set(line.split()[1:])
        return set()

    def memory(self, address: int, length: int) -> bytes:
        """Read its memory from here.  Waits like any access, so only what is there."""
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as file:
            return os.pread(file.fileno(), length, address)

    def describe(self) -> str:
        """Say what every thread is doing, for the message of a failed wait."""
        lines = []
        for number in range(len(self.thread_ids)):
            try:
                where = f"state {self.state(number)} in {self.wchan(number) or '-'}"
            except OSError as error:
                where = str(error)
            lines.append(f"  thread {number}: {where}")
        return "\n".join([f"target {self.pid}:", *lines])

    # --- the socket --------------------------------------------------------------------

    def _expect(self, number: int, text: str, convert: Callable[[Any], T]) -> Call[T]:
        call = Call(self, text, convert)
        self._calls[number] = call
        return call

    def _watch(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._socket.fileno(), self._pump)

    def _pump(self) -> None:
        while not self._gone:
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, 256 * 1024, 1)
            except BlockingIOError:
                return
            except OSError:
                data, fds = b"", []
            if not data:
                self._end()
                return
            number, word, *rest = data.decode().split()
            call = self._calls.pop(int(number))
            if word == "unknown":
                call._finish(None, ValueError(f"{call!r}: {data.decode()}"))
            elif word == "words":
                call._finish([None if text == "x" else int(text, 16) for text in rest])
            elif word == "signal":
                call._finish(Signal(*map(int, rest)))
            elif word in ("values", "ready"):
                call._finish(list(map(int, rest)))
            else:
                call._finish((int(rest[0]), fds[0]) if fds else int(rest[0]))

    def _end(self) -> None:
        self._gone = True
        self._unwatch()
        for call in self._calls.values():
            call._finish(None, TargetDied(f"process {self.pid} ended before {call!r}"))
        self._calls.clear()

    def _unwatch(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None and not loop.is_closed():
            loop.remove_reader(self._socket.fileno())

    # --- the end -----------------------------------------------------------------------

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal; it stays a zombie until reaped or closed."""
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            pass

    def reap(self) -> int:
        """Wait for its end and take its exit status."""
        if self._popen is None:  # a forked child: its parent's kernel reaps it
            select.select([self.pidfd], [], [], DEADLINE)
            return 0
        return self._popen.wait(DEADLINE)

    def exit(self, status: int = 0) -> None:
        """Let it end of its own will, its threads wherever they are."""
        self.tell(-1, "exit", status, convert=_as_is)

    def close(self) -> None:
        """Kill and reap it and its children; close what is held of them."""
        if self.pidfd < 0:
            return
        for child in self._descendants:
            child.close()
        self.kill()
        self.reap()
        self._end()
        self._socket.close()
        pidfd, self.pidfd = self.pidfd, -1
        os.close(pidfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Target(Process):
    """A process with one mapping and a userfaultfd over it, commanded by page.

    Attributes:
        kind: One of KINDS.
        base: The mapping's first address in the target.
        pages: How many pages it has.
        page_size: The size of one, in bytes.
        uffd: The userfaultfd's number here, or -1; closed with the target unless taken.
        memfd: The memory file here, or -1 for anonymous memory.
        ioctls: The mask that UFFDIO_REGISTER answered, or 0.
    """

    kind: str
    base: int
    pages: int
    page_size: int
    uffd: int
    memfd: int
    memfd_there: int
    uffd_there: int
    ioctls: int

    def __init__(
        self,
        kind: str = "anon",
        pages: int = 64,
        *,
        features: int = 0,
        register: int = MISSING,
        threads: int = 4,
        user_mode_only: bool = False,
        keep_uffd: bool = False,
        open_uffd: bool = True,
        align: int = 0,
    ) -> None:
        """Start the process, map the memory, open and register the userfaultfd.

        Args:
            kind: One of KINDS.
            pages: How many pages of the kind's size.
            features: What UFFDIO_API enables.
            register: The modes of the whole mapping; 0 leaves it unregistered.
            threads: How many threads take commands.
            user_mode_only: Open it with UFFD_USER_MODE_ONLY.
            keep_uffd: Let the target keep its own descriptor too.
            open_uffd: Set to False for no userfaultfd at all.
            align: Align the mapping's start to this many bytes.
        """
        super().__init__(*_spawn(threads))
        self.kind, self.pages = kind, pages
        self.page_size = HUGE if kind.startswith("hugetlb") else PAGE
        self.uffd = self.memfd = self.memfd_there = self.uffd_there = -1
        self.ioctls = 0
        try:
            self.ready.result()
            if kind in ("shmem", "shmem-private", "hugetlb"):
                flags = MFD_HUGETLB if kind == "hugetlb" else 0
                self.memfd_there, self.memfd = self.make_memfd("target", flags, self.length)
            self.base = self.map(self.length, self.memfd_there, align=align)
            if open_uffd:
                flags = os.O_CLOEXEC | os.O_NONBLOCK
                if user_mode_only:
                    flags |= abi.UFFD_USER_MODE_ONLY
                self.uffd_there, self.uffd = self.open_uffd(features, flags, keep=keep_uffd)
            if open_uffd and register:
                self.ioctls = calls.register(self.uffd, self.base, self.length, register)
        except BaseException:
            self.close()
            raise

    def map(self, length: int, memfd: int = -1, offset: int = 0, *, align: int = 0) -> int:
        """Map more memory of the target's kind, and return its address."""
        flags = mmap.MAP_SHARED if self.kind in {"shmem", "hugetlb"} else mmap.MAP_PRIVATE
        if memfd < 0:
            flags |= mmap.MAP_ANONYMOUS
        if self.kind == "hugetlb-private":
            flags |= MAP_HUGETLB
        at = 0
        if align:
            at = -(-self.reserve(length + align) // align) * align
            flags |= MAP_FIXED
        address = self.call("mmap", at, length, _READ_WRITE, flags, memfd, offset).result()
        if -4096 < address < 0:
            raise OSError(-address, os.strerror(-address), f"mmap of {self.kind} memory")
        return address

    def reserve(self, length: int) -> int:
        """Keep a piece of address space free of everything else, for mremap to move into."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = self.call("mmap", 0, length, _NO_ACCESS, flags, -1, 0).result()
        if -4096 < address < 0:
            raise OSError(-address, os.strerror(-address), "mmap of address space")
        return address

    @property
    def length(self) -> int:
        """The mapping's length, in bytes."""
        return self.pages * self.page_size

    def at(self, page: int) -> int:
        """Give the address of a page."""
        return self.base + page * self.page_size

    def start_read(self, page: int, thread: int = 0) -> Call[int | Signal]:
        """Read the first byte of a page."""
        return self.start_peek(self.at(page), thread)

    def start_write(self, page: int, value: int, thread: int = 0) -> Call[int | Signal]:
        """Write the first byte of a page."""
        return self.start_poke(self.at(page), value, thread)

    def start_sweep(
        self, first: int = 0, count: int | None = None, thread: int = 0
    ) -> Call[list[int | None]]:
        """Read the u64 at the start of each page."""
        count = self.pages - first if count is None else count
        return self.start_words(self.at(first), self.page_size, count, thread)

    def start_storm(self, seed: int, count: int, thread: int = 0) -> Call[Storm]:
        """Read ``count`` random pages, whose first u64 should be the page's number plus one."""
        return self.tell(
            thread,
            "storm",
            self.base,
            self.page_size,
            self.pages,
            seed,
            count,
            convert=lambda answer: Storm(*answer),
        )

    def start_count(self, thread: int = 0) -> Call[int]:
        """Count with other threads that do, until ``stop(1)``: n goes to page n % pages.

        The answer is how many of the numbers were this thread's.
        """
        where = (self.base, self.page_size, self.pages)
        return self.tell(thread, "count", *where, convert=_value)

    def start_churn(self, advice: int, seed: int, thread: int, *, pause_us: int = 0) -> Call[int]:
        """Call madvise on random single pages until ``stop(2)``; the answer is how often."""
        where = (self.base, self.page_size, self.pages)
        return self.tell(thread, "churn", *where, advice, seed, pause_us, convert=_value)

    def start_madvise(
        self, advice: int, page: int = 0, pages: int = 1, thread: int = 0
    ) -> Call[int]:
        """Call madvise on pages."""
        return self.call("madvise", self.at(page), pages * self.page_size, advice, thread=thread)

    def start_munmap(self, page: int = 0, pages: int = 1, thread: int = 0) -> Call[int]:
        """Unmap pages."""
        return self.call("munmap", self.at(page), pages * self.page_size, thread=thread)

    def start_mremap(
        self,
        page: int,
        pages: int,
        new_pages: int | None = None,
        flags: int = MREMAP_MAYMOVE,
        to: int = 0,
        thread: int = 0,
    ) -> Call[int]:
        """Move, grow or shrink pages; the answer is their new address."""
        size = self.page_size
        new = (pages if new_pages is None else new_pages) * size
        return self.call("mremap", self.at(page), pages * size, new, flags, to, thread=thread)

    async def fork(self, thread: int = 0) -> Target:
        """Fork, and wait until the child listens.  Somebody must read a FORK event meanwhile."""
        child = await self.start_fork(thread)
        await child.ready
        return cast("Target", child)

    def fork_now(self, thread: int = 0) -> Target:
        """Fork without a loop; for userfaultfds without EVENT_FORK."""
        child = self.start_fork(thread).result()
        child.ready.result()
        return cast("Target", child)

    def _make_child(self, control: socket.socket, pid: int) -> Process:
        child = Target.__new__(Target)
        Process.__init__(child, control, pid)
        child.kind, child.base = self.kind, self.base
        child.pages, child.page_size = self.pages, self.page_size
        child.memfd_there, child.uffd_there = self.memfd_there, -1
        child.uffd = child.memfd = -1
        child.ioctls = 0
        return child

    def take_uffd(self) -> int:
        """Give the userfaultfd away: whoever takes it closes it."""
        fd, self.uffd = self.uffd, -1
        return fd

    def fdinfo(self) -> calls.FdInfo:
        """Read the userfaultfd's pending and total counts."""
        return calls.fdinfo(self.uffd)

    def alias(self) -> mmap.mmap:
        """Map the memory file here, shared and unregistered; the caller closes it."""
        return mmap.mmap(self.memfd, self.length, mmap.MAP_SHARED, _READ_WRITE)

    def is_wp(self, page: int) -> bool:
        """Say whether a page (or its marker, or swap entry) is write-protected."""
        return bool(self.pagemap(self.at(page))[0] & abi.PM_UFFD_WP)

    def is_present(self, page: int) -> bool:
        """Say whether a page is in memory and mapped."""
        return bool(self.pagemap(self.at(page))[0] & abi.PM_PRESENT)

    def close(self) -> None:
        """End the process and close the userfaultfd and the memory file."""
        super().close()
        for name in ("uffd", "memfd"):
            fd = getattr(self, name, -1)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)


class Storm(NamedTuple):
    """What the reads of a storm found."""

    right: int
    zero: int
    wrong: int
    stopped: int


def _as_is(answer: Any) -> Any:
    return answer


def _value(answer: Any) -> int:
    return int(answer)


def _value_or_signal(answer: Any) -> int | Signal:
    return answer if isinstance(answer, Signal) else int(answer)


def _value_and_fd(answer: Any) -> tuple[int, int]:
    if isinstance(answer, tuple):
        return int(answer[0]), int(answer[1])
    raise OSError(-int(answer), os.strerror(-int(answer)))


def free_huge_pages() -> int:
    """Count the free 2 MiB pages of the machine's pool."""
    path = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    return int(path.read_text()) if path.exists() else 0


#: EAGAIN and EEXIST as the fills of ``aiouffd.kernel.calls`` answer them.
AGAIN: Final = -errno.EAGAIN
EXISTS: Final = -errno.EEXIST


def address_of(buffer: WriteableBuffer) -> int:
    """Give the address of a writable buffer's first byte; the buffer must outlive its use."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
