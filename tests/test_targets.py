"""The test targets themselves: every command, in a process of its own."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import signal
import zlib
from pathlib import Path

import pytest

from aiouffd.kernel import abi, calls
from tests import targets
from tests.targets import MADV_PAGEOUT, MINOR, MISSING, PAGE, Process, Signal, Target, TargetDied


def fill(target: Target, page: int, byte: int) -> int:
    """Answer a missing page with one byte over and over."""
    with mmap.mmap(-1, target.page_size) as staged:
        staged[:] = bytes([byte]) * target.page_size
        view = memoryview(staged)
        try:
            return calls.copy(
                target.uffd, target.at(page), targets.address_of(view), target.page_size
            )
        finally:
            view.release()


@pytest.mark.parametrize("kind", targets.SMALL_KINDS)
def test_a_read_waits_until_the_page_is_filled(kind: str) -> None:
    """A read blocks in the fault, is counted by fdinfo, and answers the byte of the copy."""
    with Target(kind, pages=8) as target:
        touch = target.start_read(3)
        targets.wait_until(target.is_blocked, "the read blocks")
        assert not touch.done
        assert target.fdinfo()[:2] == (1, 1)
        assert fill(target, 3, 77) == PAGE
        assert touch.result() == 77
        assert target.fdinfo()[:2] == (0, 0)
        assert "um" in target.vm_flags(target.base)
        assert target.is_present(3)
        assert not target.is_present(4)


async def test_the_loop_serves_while_threads_wait() -> None:
    """Several threads wait at once, and each is awaited by itself."""
    async with Target("anon", pages=8, threads=4) as target:
        touches = [target.start_write(page, 10 + page, thread=page) for page in range(4)]
        for thread in range(4):
            await target.blocked(thread)
        for page in reversed(range(4)):
            fill(target, page, 1)
            assert await touches[page] == 10 + page


def test_a_signal_of_an_access_is_its_result() -> None:
    """SIGBUS of a poisoned page and SIGSEGV of an unmapped one are reported, not fatal."""
    with Target("anon", pages=4) as target:
        assert calls.poison(target.uffd, target.at(1), PAGE) == PAGE
        assert target.start_read(1).result() == Signal(signal.SIGBUS, 2, target.at(1))
        assert target.start_munmap(2, 2).result() == 0
        gone = target.start_write(2, 1).result()
        assert isinstance(gone, Signal)
        assert gone.number == signal.SIGSEGV
        fill(target, 0, 5)
        assert target.start_sweep(0, 3).result() == [0x0505050505050505, None, None]


def test_system_calls_answer_values_or_minus_errno() -> None:
    """A system call's answer is its value, or minus its errno."""
    with Target("anon", pages=4, register=0) as target:
        assert target.start_madvise(mmap.MADV_DONTNEED, 0, 4).result() == 0
        assert target.start_madvise(MADV_PAGEOUT, 0, 4).result() == 0
        assert target.call("madvise", 1, PAGE, 4).result() == -errno.EINVAL
        moved = target.start_mremap(0, 1).result()
        assert moved == target.at(0)
        number, fd = target.make_memfd("x", 0, PAGE)
        os.pwrite(fd, b"hello", 0)
        assert target.call("pread", number, target.at(1), 5, 0).result() == 5
        assert target.memory(target.at(1), 5) == b"hello"
        os.close(fd)
        with pytest.raises(ValueError, match="unknown"):
            target.call("nonsense").result()


def test_bulk_commands_read_and_write_ranges() -> None:
    """Numbering, filling, sweeping and check sums agree with what /proc shows."""
    with Target("anon", pages=16, register=0) as target:
        assert target.start_number(target.base, PAGE, 16).result() == 16
        assert target.start_sweep().result() == list(range(1, 17))
        storm = target.start_storm(seed=1, count=100).result()
        assert storm == (100, 0, 0, 0)
        target.start_fill(target.at(2), 2 * PAGE, 0).result()
        storm = target.start_storm(seed=1, count=1000).result()
        assert storm.right + storm.zero == 1000
        assert storm.zero > 0
        everything = target.memory(target.base, target.length)
        assert target.start_crc32(target.base, target.length).result() == zlib.crc32(everything)
        assert target.start_poke64(target.base, 2**63 + 5).result() == 2**63 + 5


@pytest.mark.parametrize("kind", ["shmem", "shmem-private"])
def test_the_memory_file_is_shared_with_the_test(kind: str) -> None:
    """The alias shows what the target's shared mapping maps; minor faults need it."""
    with Target(kind, pages=4, register=MINOR) as target, target.alias() as alias:
        alias[PAGE] = 9
        touch = target.start_read(1)
        targets.wait_until(target.is_blocked, "the read blocks in a minor fault")
        assert calls.continue_(target.uffd, target.at(1), PAGE) == PAGE
        assert touch.result() == 9
        target.start_write(1, 8).result()
        assert alias[PAGE] == (8 if kind == "shmem" else 9)


async def test_a_forked_child_takes_commands_too() -> None:
    """Parent and child have their own memory; a FORK event holds the fork until it is read."""
    async with Target("anon", pages=4, features=abi.UFFD_FEATURE_EVENT_FORK) as target:
        fill(target, 0, 3)
        forking = target.start_fork()
        await target.in_event()
        message = bytearray(32)
        await targets.until(lambda: calls.read_messages(target.uffd, [message]), "the FORK event")
        child_uffd = abi.UFFD_MSG_FORK.unpack(message)[1]
        child = await forking
        await child.ready
        try:
            assert await child.start_poke(target.at(0), 4) == 4
            assert await target.start_read(0) == 3
            touch = child.start_peek(target.at(1))
            await child.blocked()
            assert calls.zeropage(child_uffd, target.at(1), PAGE) == PAGE
            assert await touch == 0
        finally:
            os.close(child_uffd)
    assert child.pidfd < 0


def test_fork_without_events_needs_no_reader() -> None:
    """Without EVENT_FORK the child's memory is plain."""
    with Target("anon", pages=4) as target:
        child = target.fork_now()
        assert child.start_read(0).result() == 0
        assert child.pid != target.pid


async def test_exec_keeps_the_process_and_ends_its_memory() -> None:
    """After exec the same process listens again, and its old memory answers ESRCH."""
    async with Target("anon", pages=4) as target:
        touch = target.start_read(1, thread=1)
        await target.blocked(1)
        await target.start_exec()
        assert calls.zeropage(target.uffd, target.base, PAGE) == -errno.ESRCH
        assert await target.call("dup", 2) >= 0
        assert not touch.done


async def test_signals_reach_one_thread() -> None:
    """A signal to a thread is caught and counted there."""
    async with Target("anon", pages=4, register=0) as target:
        assert await target.send_signal(2, signal.SIGUSR1) == 0
        await targets.until(
            lambda: target.signals(2).result() == 1, "the signal is caught in thread 2"
        )
        sent = await target.tell(0, "pelt", 1, int(signal.SIGUSR1), 50, 0, convert=int)
        assert sent == 50
        assert await target.signals(0) == 0


def test_lockers_count_what_they_lock() -> None:
    """Two lockers over the same pages lose no count."""
    with Target("anon", pages=8, register=0) as target:
        target.tell(-1, "shadow", 0, 8, convert=int).result()
        lockers = [
            target.tell(t, "locker", target.base, PAGE, 8, t, 5000, convert=list) for t in (0, 1)
        ]
        assert [locker.result() for locker in lockers] == [[5000, 0], [5000, 0]]
        counters = target.start_words(target.base + 64, PAGE, 8).result()
        assert sum(word or 0 for word in counters) == 10000


async def test_the_end_of_a_target_fails_what_is_under_way() -> None:
    """A killed target fails its calls at once, and new ones too."""
    async with Target("anon", pages=4) as target:
        touch = target.start_read(0)
        await target.blocked()
        target.kill()
        with pytest.raises(TargetDied):
            await touch
        with pytest.raises(TargetDied):
            await target.start_read(0)
        assert target.reap() == -signal.SIGKILL
    with Process.start(threads=1) as process:
        process.exit(3)
        assert process.reap() == 3


async def test_a_wait_that_ends_too_late_says_what_the_threads_did() -> None:
    """The message of a missed deadline names each thread's state."""
    async with Target("anon", pages=4, threads=2) as target:
        touch = target.start_read(0)
        await target.blocked()
        with pytest.raises(targets.TargetLate, match="thread 0: state S in handle_userfault"):
            await touch.within(0.01)
        with pytest.raises(targets.TargetLate, match="thread 0: state S"):
            touch.result(0.01)
        with pytest.raises(targets.TargetLate, match="never"):
            await targets.until(lambda: False, "never", 0.01)
        waiting = asyncio.ensure_future(touch.within(5))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        fill(target, 0, 6)
        assert await touch == 6


def test_closing_leaves_no_descriptor_and_no_process() -> None:
    """A hundred targets, some with children, leave nothing behind."""
    Target("anon").close()
    before = len(os.listdir("/proc/self/fd"))
    for round_ in range(20):
        with Target("shmem", pages=2, threads=2, register=MISSING) as target:
            if round_ % 2:
                target.fork_now()
            pid = target.pid
        assert not Path(f"/proc/{pid}").exists()
    assert len(os.listdir("/proc/self/fd")) == before
