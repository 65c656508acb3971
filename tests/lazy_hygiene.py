"""Living with signals, locks, threads, forks and other users of SIGBUS.

Knows: what a process does besides touching lazy memory.
Must not know: how a fault is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import io
import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from aiouffd import sigbus
from aiouffd.errors import ClosedError, DeadlineExceeded, HandlerError
from aiouffd.events import PageFault
from aiouffd.lazy_memory import Holes, LazyMemory
from aiouffd.resolutions import Unprotect
from tests.lazy_access import CONTENT, PAGE, LoopThread
from tests.lazy_harness import Case, NewLoop

SIZE = 64 * PAGE


async def fill(fault: PageFault) -> bytes:
    """Give the content after a turn of the loop."""
    await asyncio.sleep(0)
    return CONTENT[fault.offset : fault.offset + fault.length]


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until something that another thread does is done; 5 seconds at most."""
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        await asyncio.sleep(0.001)


@contextlib.contextmanager
def served_elsewhere(
    new_loop: NewLoop, handler: Any, **options: Any
) -> Iterator[tuple[LazyMemory, LoopThread]]:
    """Lazy memory whose loop runs in another thread; this one may touch it."""
    memory = LazyMemory(SIZE, handler, **{"deadline": 5, **options})
    with LoopThread(new_loop) as other:
        other.run(memory.open())
        try:
            yield memory, other
        finally:
            other.run(memory.aclose(Holes.RAISE))


# --- signals ---------------------------------------------------------------------------


def _ctrl_c(new_loop: NewLoop) -> None:
    asked: list[int] = []

    async def slow(fault: PageFault) -> bytes:
        asked.append(fault.offset)
        if len(asked) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(3600)
        return b"z" * fault.length

    with served_elsewhere(new_loop, slow, deadline=60) as (memory, _):
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            memory[0]
        assert time.monotonic() - started < 30
        assert not memory.present(0, 1), "zeros were left behind"
        assert memory[PAGE] == ord("z"), "other pages go on"


def _ctrl_c_in_an_inline_handler(new_loop: NewLoop) -> None:
    asked: list[int] = []

    def inline(fault: PageFault) -> bytes:
        asked.append(fault.offset)
        if len(asked) == 1:
            signal.raise_signal(signal.SIGINT)
        return b"z" * fault.length

    with served_elsewhere(new_loop, inline) as (memory, _):
        with pytest.raises(KeyboardInterrupt):
            memory[0]
        assert not memory.present(0, 1), "zeros were left behind"
        assert memory[0] == ord("z")


def _nobody_who_waited_reads_a_placeholder(new_loop: NewLoop) -> None:
    """A page comes while another thread's failed access still needs zeros in its place."""
    asked: list[int] = []
    read: list[object] = []

    async def steps(fault: PageFault) -> bytes:
        asked.append(fault.offset)
        placeholders = memory._serving.faults._placeholders
        if asked == [0]:
            await until(lambda: memory.counters.joined == 1)
            os.kill(os.getpid(), signal.SIGINT)
            await until(lambda: bool(placeholders))
        elif fault.offset == PAGE:  # the interrupted access has gone on to here
            await until(lambda: any(one.waiters for one in list(placeholders.values())))
        return CONTENT[fault.offset : fault.offset + fault.length]

    def read_too() -> None:
        while not asked:
            time.sleep(0.001)
        read.append(memory[5])

    with served_elsewhere(new_loop, steps) as (memory, _):
        other = threading.Thread(target=read_too)
        other.start()
        with pytest.raises(KeyboardInterrupt):
            bytes(memory.view[: 2 * PAGE])
        other.join()
        assert read == [CONTENT[5]]
        assert asked == [0, PAGE, 0]


def _signal_handler_touches_another_page(new_loop: NewLoop) -> None:
    seen: list[int | bytes] = []

    async def kick(fault: PageFault) -> bytes:
        if fault.offset == 0:
            os.kill(os.getpid(), signal.SIGUSR2)
            # The main thread faults again, from within its wait.
            await until(lambda: bool(seen))
        return await fill(fault)

    with served_elsewhere(new_loop, kick) as (memory, _):
        signal.signal(signal.SIGUSR2, lambda *_: seen.append(memory[5 * PAGE]))
        assert memory[0] == CONTENT[0]
        assert seen == [CONTENT[5 * PAGE]]


def _signal_handler_touches_the_same_page(new_loop: NewLoop) -> None:
    seen: list[int | bytes] = []
    entered = threading.Event()

    def touch(*_: object) -> None:
        entered.set()
        seen.append(memory[0])

    async def kick(fault: PageFault) -> bytes:
        os.kill(os.getpid(), signal.SIGUSR2)
        await until(entered.is_set)
        return await fill(fault)

    with served_elsewhere(new_loop, kick) as (memory, _):
        signal.signal(signal.SIGUSR2, touch)
        assert memory[0] == CONTENT[0]
        assert seen == [CONTENT[0]]


def _eviction_stress(new_loop: NewLoop) -> None:
    """Threads read while pages are evicted and a timer signal fires; every byte is checked."""
    ticks: list[int] = []
    ended = threading.Event()
    wrong: list[object] = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        view = memory.view
        copy = bytearray(PAGE * 2)
        while not ended.is_set():
            at = rng.randrange(SIZE - 2 * PAGE)
            kind = rng.randrange(4)
            if kind == 0:
                ok = view[at] == CONTENT[at]
            elif kind == 1:
                ok = bytes(view[at : at + 5000]) == CONTENT[at : at + 5000]
            elif kind == 2:
                copy[:] = view[at : at + 2 * PAGE]
                ok = copy == CONTENT[at : at + 2 * PAGE]
            else:
                ok = view[at : at + 100].hex() == CONTENT[at : at + 100].hex()
            if not ok:
                wrong.append((kind, at))
                return

    with served_elsewhere(new_loop, fill) as (memory, _):
        signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        rng = random.Random(5)
        sys.setswitchinterval(0.0005)  # or each fault waits for every busy thread's turn
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            at = rng.randrange(64)
            memory.evict(at * PAGE, PAGE)
            assert memory[at * PAGE] == CONTENT[at * PAGE]
        ended.set()
        for thread in threads:
            thread.join()
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert not wrong
        assert ticks
        assert memory.counters.faults > 10
        assert memory.counters.failures == 0


# --- locks that the handler wants too -----------------------------------------------------


async def _lock_around_the_access() -> None:
    lock = threading.Lock()

    async def wants_lock(fault: PageFault) -> bytes:
        with lock:
            return b"x" * fault.length

    def touch() -> None:
        with lock, pytest.raises(DeadlineExceeded):
            memory[0]

    async with LazyMemory(SIZE, wants_lock, deadline=0.2) as memory:
        await asyncio.to_thread(touch)
        assert await asyncio.to_thread(lambda: memory[0]) == ord("x")


async def _same_buffered_writer() -> None:
    with open(os.devnull, "wb") as file:

        async def writes(fault: PageFault) -> bytes:
            file.write(b"note")
            return b"x" * fault.length

        def touch() -> None:
            with pytest.raises(DeadlineExceeded):
                file.write(view[:100])

        async with LazyMemory(SIZE, writes, deadline=0.2) as memory:
            view = memory.view
            await asyncio.to_thread(touch)


async def _same_log() -> None:
    class Lazy:
        def __str__(self) -> str:
            return str(memory[0])

    stream = io.StringIO()
    log = logging.getLogger("shared")
    log.propagate = False
    log.addHandler(logging.StreamHandler(stream))

    async def logs(fault: PageFault) -> bytes:
        log.warning("served")
        return b"x" * fault.length

    def touch() -> None:
        log.warning("read %s", Lazy())

    logging.raiseExceptions = False  # logging would print the DeadlineExceeded
    async with LazyMemory(SIZE, logs, deadline=0.2) as memory:
        await asyncio.to_thread(touch)
        assert memory.counters.failures >= 1


async def _same_sqlite_connection() -> None:
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    with contextlib.closing(connection):
        connection.create_function("lazy", 0, lambda: memory[0])

        async def asks(fault: PageFault) -> bytes:
            connection.execute("select 1")
            return b"x" * fault.length

        def touch() -> None:
            with contextlib.suppress(sqlite3.Error):  # what sqlite makes of our exception
                connection.execute("select lazy()").fetchall()

        async with LazyMemory(SIZE, asks, deadline=0.2) as memory:
            await asyncio.to_thread(touch)
            assert memory.counters.failures >= 1


async def _join_on_the_loop() -> None:
    raised: list[BaseException] = []

    def touch() -> None:
        try:
            value = memory[0]
            raised.append(AssertionError(value))
        except DeadlineExceeded as error:
            raised.append(error)

    async with LazyMemory(SIZE, fill, deadline=0.2) as memory:
        thread = threading.Thread(target=touch)
        thread.start()
        thread.join()  # the loop waits for who waits for the loop
        assert isinstance(raised[0], DeadlineExceeded)


# --- once per page ------------------------------------------------------------------------


async def _twenty_threads_on_one_page(kind: str) -> None:
    calls: list[int] = []

    async def slow(fault: PageFault) -> bytes:
        calls.append(fault.offset)
        await until(lambda: memory.counters.joined == 19)
        return b"x" * fault.length

    def inline(fault: PageFault) -> bytes:
        calls.append(fault.offset)
        end = time.monotonic() + 5
        while memory.counters.joined < 19 and time.monotonic() < end:
            time.sleep(0.001)
        return b"x" * fault.length

    results: list[object] = []
    async with LazyMemory(SIZE, slow if kind == "coroutine" else inline, deadline=5) as memory:
        threads = [threading.Thread(target=lambda: results.append(memory[7])) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        assert results == [ord("x")] * 20
        assert calls == [0]


# --- who else wants SIGBUS -------------------------------------------------------------------


async def _repaired(disturb: Callable[[], object]) -> None:
    async with LazyMemory(SIZE, fill, deadline=5) as first:
        assert sigbus.installed()
        disturb()
        assert disturb is _enable_faulthandler or not sigbus.installed()
        async with LazyMemory(SIZE, fill, deadline=5) as second:
            assert sigbus.installed()
            assert await asyncio.to_thread(lambda: (first[0], second[PAGE])) == (
                CONTENT[0],
                CONTENT[PAGE],
            )
    assert not sigbus.targets()
    assert not sigbus.installed()
    signal.signal(signal.SIGBUS, signal.SIG_DFL)
    faulthandler.disable()
    faulthandler.enable()


def _enable_faulthandler() -> None:
    faulthandler.enable()


def _faulthandler_anew() -> None:
    faulthandler.disable()
    faulthandler.enable()


async def _close_and_resize_are_refused() -> None:
    async with LazyMemory(SIZE, fill, deadline=5) as memory:
        mapping = memory._mapping._memory
        assert mapping is not None
        with pytest.raises(BufferError):
            mapping.close()
        with pytest.raises(BufferError):
            mapping.resize(PAGE)


# --- forks ---------------------------------------------------------------------------------


async def _fork() -> None:
    async with LazyMemory(SIZE, fill, deadline=5) as memory:
        await memory.ensure(0, PAGE)
        child = os.fork()
        if child == 0:
            faulthandler.disable()
            memory.view[0]  # present in the parent, and not mapped here
            os._exit(7)
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGSEGV
        child = os.fork()
        if child == 0:
            memory.close()  # and the parent's loop keeps its readers
            os._exit(12 if sigbus.targets() else 11)
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        assert os.waitstatus_to_exitcode(status) == 11
        assert await asyncio.to_thread(lambda: memory[PAGE]) == CONTENT[PAGE]


async def _subprocess_during_a_fault() -> None:
    started: list[int] = []

    async def spawns(fault: PageFault) -> bytes:
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", "raise SystemExit(3)")
        started.append(await child.wait())
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", "pass"], check=True, preexec_fn=os.getpid
        )
        started.append(done.returncode)
        return b"x" * fault.length

    async with LazyMemory(SIZE, spawns, deadline=9) as memory:
        assert await asyncio.to_thread(lambda: memory[0]) == ord("x")
        assert started == [3, 0]


# --- kinds of memory ---------------------------------------------------------------------------


async def _read_and_write(*, shared: bool) -> None:
    def touch() -> None:
        assert memory[10] == CONTENT[10]
        memory[10] = 1
        memory[PAGE + 10] = 2
        memory[2 * PAGE - 2 : 2 * PAGE + 2] = b"abcd"
        assert memory[: 3 * PAGE] == bytes(expected[: 3 * PAGE])

    expected = bytearray(CONTENT)
    expected[10], expected[PAGE + 10] = 1, 2
    expected[2 * PAGE - 2 : 2 * PAGE + 2] = b"abcd"
    async with LazyMemory(SIZE, fill, shared=shared, deadline=5) as memory:
        await asyncio.to_thread(touch)
        assert memory.present(0, 3 * PAGE)
        assert not memory.present(0, 4 * PAGE)
        assert memory.evict(0, PAGE) == PAGE
        assert await asyncio.to_thread(lambda: memory[10]) == CONTENT[10]


async def _write_protected(*, shared: bool) -> None:
    kinds: list[tuple[str, bool, int]] = []

    async def watch(fault: PageFault) -> bytes | Unprotect:
        kinds.append((fault.kind, fault.write, fault.offset // PAGE))
        return Unprotect() if fault.wp else await fill(fault)

    def touch() -> None:
        assert memory[0] == CONTENT[0]
        assert kinds == [("missing", False, 0)]
        memory[1] = 9  # present and protected
        assert kinds[1:] == [("wp", True, 0)]
        memory[2] = 9  # unprotected by now
        memory[PAGE] = 9  # missing, filled protected, then protected
        assert kinds[2:] == [("missing", True, 1), ("wp", True, 1)]
        memory.protect(0, PAGE)
        memory[3] = 9
        assert kinds[4:] == [("wp", True, 0)]
        assert memory[0:4] == bytes([CONTENT[0], 9, 9, 9])

    async with LazyMemory(SIZE, watch, shared=shared, write_protect=True, deadline=5) as memory:
        await asyncio.to_thread(touch)


async def _write_refused() -> None:
    """A store that the handler refuses raises; it has landed, and the page is protected again."""

    async def refuses(fault: PageFault) -> bytes:
        if fault.wp:
            raise PermissionError
        return await fill(fault)

    def touch() -> None:
        assert memory[0] == CONTENT[0]
        for value in (1, 2):
            with pytest.raises(HandlerError) as failure:
                memory[0] = value
            assert isinstance(failure.value.__cause__, PermissionError)
            assert memory[0] == value

    async with LazyMemory(SIZE, refuses, write_protect=True, deadline=5) as memory:
        await asyncio.to_thread(touch)


async def _source_lets_writes_pass() -> None:
    class Source:
        def read_nowait(self, offset: int, length: int) -> bytes | None:
            return CONTENT[offset : offset + length] if offset else None

        async def read(self, offset: int, length: int) -> bytes:
            return CONTENT[offset : offset + length]

    def touch() -> None:
        assert memory[0] == CONTENT[0]
        memory[0] = 1
        memory[PAGE] = 2
        assert (memory[0], memory[PAGE]) == (1, 2)

    async with LazyMemory(SIZE, Source(), write_protect=True, deadline=5) as memory:
        await asyncio.to_thread(touch)
        assert memory.counters.inline >= 1


async def _large_pages_and_odd_length() -> None:
    length = 3 * 65536 + 1000
    lengths: list[int] = []

    async def by_block(fault: PageFault) -> bytes:
        lengths.append(fault.length)
        await asyncio.sleep(0)
        return CONTENT[fault.offset : min(fault.offset + fault.length, length)]

    async with LazyMemory(length, by_block, page_size=65536, deadline=5) as memory:
        assert await asyncio.to_thread(lambda: bytes(memory.view)) == CONTENT[:length]
        assert lengths == [65536] * 4
        assert len(memory) == length
        assert memory.evict() == memory._mapping.end - memory._mapping.start


def _read_present(new_loop: NewLoop) -> None:
    with served_elsewhere(new_loop, fill) as (memory, other):
        assert memory.read_present(0, 100) == b"", "a miss"
        assert memory[PAGE] == CONTENT[PAGE]
        other.run(_ensured(memory, PAGE, 2 * PAGE))
        assert memory.read_present(PAGE + 5, 100) == CONTENT[PAGE + 5 : PAGE + 105], "a hit"
        assert memory.read_present(2 * PAGE, 4 * PAGE) == CONTENT[2 * PAGE : 3 * PAGE], "short"
        assert memory.counters.faults == 1


async def _ensured(memory: LazyMemory, offset: int, length: int) -> None:
    await memory.ensure(offset, length)


def _other_loop(new_loop: NewLoop) -> None:
    """Memory that one loop serves may be opened, ensured and closed from another."""

    async def here() -> None:
        async with LazyMemory(SIZE, fill, loop=other.loop, deadline=5) as memory:
            view = memory.view
            assert view[0] == CONTENT[0], "this loop's thread may touch it"
            async with memory.ensure(PAGE, PAGE) as part:
                assert part == CONTENT[PAGE : 2 * PAGE]

    with LoopThread(new_loop) as other, asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(here())


# --- closing ------------------------------------------------------------------------------------


async def _touch_after_closing() -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    async with LazyMemory(SIZE, fill, deadline=5) as memory:
        view = memory.view
        await memory.ensure(0, PAGE)
    with pytest.raises(ClosedError):
        view[PAGE]
    with pytest.raises(ClosedError):
        memory[0]
    assert view[0] == CONTENT[0], "what is there stays"
    assert sigbus.targets()
    view.release()
    gc.collect()  # the failures' tracebacks
    assert not sigbus.targets(), "nothing is left once the last view is gone"
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def _closed_and_filled() -> None:
    memory = LazyMemory(SIZE, fill, deadline=5)
    await memory.open()
    view = memory.view
    await memory.aclose(Holes.FILL)
    assert not sigbus.targets()
    assert bytes(view) == CONTENT[:SIZE]


async def _handlers_are_cancelled() -> None:
    ended: list[str] = []

    async def never(fault: PageFault) -> bytes:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append("ended")
        return b""

    def touch() -> None:
        with pytest.raises(ClosedError):
            view[0]

    memory = LazyMemory(SIZE, never, deadline=20)
    await memory.open()
    view = memory.view
    touching = asyncio.create_task(asyncio.to_thread(touch))
    await until(lambda: bool(memory._serving.tasks))
    with pytest.raises(BufferError):
        await memory.aclose()
    assert not ended, "a refused close changes nothing"
    await memory.aclose(Holes.RAISE)
    assert ended == ["ended"]
    await touching


def _run(work: Callable[[], Any], new_loop: NewLoop) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(work())


_SCENARIOS: dict[str, Callable[[], Any]] = {
    "lock around the access": _lock_around_the_access,
    "same buffered writer": _same_buffered_writer,
    "same log": _same_log,
    "same sqlite connection": _same_sqlite_connection,
    "thread joined on the loop": _join_on_the_loop,
    "twenty threads on one page": partial(_twenty_threads_on_one_page, "coroutine"),
    "twenty threads on one page, inline": partial(_twenty_threads_on_one_page, "inline"),
    "faulthandler enabled again": partial(_repaired, _enable_faulthandler),
    "faulthandler disabled": partial(_repaired, faulthandler.disable),
    "faulthandler disabled and enabled": partial(_repaired, _faulthandler_anew),
    "signal.signal": partial(_repaired, partial(signal.signal, signal.SIGBUS, signal.SIG_DFL)),
    "close and resize are refused": _close_and_resize_are_refused,
    "fork": _fork,
    "subprocess during a fault": _subprocess_during_a_fault,
    "private: read and write": partial(_read_and_write, shared=False),
    "shared: read and write": partial(_read_and_write, shared=True),
    "private: write-protected": partial(_write_protected, shared=False),
    "shared: write-protected": partial(_write_protected, shared=True),
    "write refused": _write_refused,
    "source lets writes pass": _source_lets_writes_pass,
    "large pages and odd length": _large_pages_and_odd_length,
    "touch after closing": _touch_after_closing,
    "closed and filled": _closed_and_filled,
    "handlers are cancelled": _handlers_are_cancelled,
}

CASES: dict[str, Case] = {name: partial(_run, work) for name, work in _SCENARIOS.items()}
CASES.update(
    {
        "Ctrl-C": _ctrl_c,
        "Ctrl-C in an inline handler": _ctrl_c_in_an_inline_handler,
        "nobody who waited reads a placeholder": _nobody_who_waited_reads_a_placeholder,
        "signal handler touches another page": _signal_handler_touches_another_page,
        "signal handler touches the same page": _signal_handler_touches_the_same_page,
        "eviction stress": _eviction_stress,
        "read_present": _read_present,
        "another loop": _other_loop,
    }
)
