"""What the kernel's own selftests leave out, and a fault handler depends on."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from aiouffd import (
    Forked,
    LayoutChanging,
    RangeGone,
    Remapped,
    Removed,
    ResolutionRefused,
    TargetGone,
    Unmapped,
    Userfaultfd,
)
from aiouffd.events import Message, RawFault
from aiouffd.kernel import abi, calls
from tests.conformance.support import (
    EVENT_FORK,
    EVENT_REMAP,
    EVENT_REMOVE,
    EVENT_UNMAP,
    MADV_DONTNEED,
    MINOR,
    MISSING,
    SMALL,
    WP,
    WP_FEATURES,
    MakeMemory,
    page_bytes,
    read_everything,
    read_one,
    selftest,
)
from tests.targets import (
    AGAIN,
    EXISTS,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    Call,
    Signal,
    Target,
    wait_until,
)


def gap(name: str, asserts: str, *, on: str = "anon") -> pytest.MarkDecorator:
    """A gap of the kernel's selftests."""
    return selftest("gaps", name, asserts, on=on)


def blocked(target: Target, thread: int = 0) -> None:
    wait_until(lambda: target.is_blocked(thread), f"thread {thread} blocks in a fault")


def take(uffd: Userfaultfd, count: int) -> list[Message]:
    """Read messages until there are as many."""
    messages: list[Message] = []

    def arrived() -> bool:
        messages.extend(uffd.read())
        return len(messages) >= count

    wait_until(arrived, f"{count} messages")
    return messages


# --- waiting and waking ----------------------------------------------------------------


def stays_asleep(target: Target, touch: Call[int | Signal]) -> bool:
    """Whether a thread still sleeps after it has had every chance to run."""
    end = time.monotonic() + 0.05
    while time.monotonic() < end:
        if touch.done or not target.is_blocked():
            return False
    return True


@gap("unregister wakes MISSING only", "WP and MINOR waiters sleep on until WAKE", on="shmem")
@pytest.mark.parametrize("mode", ["missing", "wp", "minor"])
def test_unregister_leaves_wp_and_minor_waiters_asleep(mode: str, memory: MakeMemory) -> None:
    """UFFDIO_UNREGISTER alone wakes only those who wait for a missing page."""
    modes = {"missing": MISSING, "wp": WP, "minor": MINOR}[mode]
    features = WP_FEATURES | abi.UFFD_FEATURE_MINOR_SHMEM
    with memory("shmem", features=features, register=modes) as (target, uffd):
        if mode == "minor":
            with target.alias() as alias:
                alias[0] = 1
        if mode == "wp":
            uffd.writeprotect(target.base, target.length)
        touch = target.start_write(0, 1)
        blocked(target)
        calls.unregister(uffd.fileno(), target.base, target.length)
        if mode == "missing":
            assert touch.result() == 1
            return
        assert stays_asleep(target, touch)
        assert uffd.info().total == 1
        uffd.wake(target.base, target.length)
        assert touch.result() == 1


@gap("unregister wakes MISSING only", "Userfaultfd.unregister wakes all of them")
def test_our_unregister_wakes_everybody(memory: MakeMemory) -> None:
    """Userfaultfd.unregister is followed by a wake."""
    with memory("anon", features=WP_FEATURES, register=WP) as (target, uffd):
        target.start_fill(target.base, target.length, 1).result()
        uffd.writeprotect(target.base, target.length)
        touch = target.start_write(0, 2)
        blocked(target)
        uffd.unregister(target.base, target.length)
        assert touch.result() == 2


@gap("duplicate messages", "a caught signal makes a user-mode fault come again, once each")
def test_a_signal_repeats_a_fault(memory: MakeMemory) -> None:
    """The signal's handler runs while the page is missing, and the access faults anew."""
    with memory("anon") as (target, uffd):
        touch = target.start_read(1)
        blocked(target)
        for count in range(1, 4):
            target.send_signal(0, signal.SIGUSR1).result()
            caught = count
            wait_until(
                lambda caught=caught: target.signals(0).result() == caught,  # type: ignore[misc]
                "the signal is caught",
            )
            blocked(target)
            # the fault before it, if nobody read it, is gone: one message is all there is
            assert [message.address for message in take(uffd, 1) if isinstance(message, RawFault)]
        assert read_everything(uffd) == []
        assert uffd.info().total == 1
        uffd.zeropage(target.at(1), target.page_size)
        assert touch.result() == 0


@gap("duplicate messages", "a pending signal makes a kernel-mode fault repeat until it is filled")
def test_a_pending_signal_repeats_a_kernel_fault_without_end(memory: MakeMemory) -> None:
    """A system call's fault spins, a fresh message each time; the signal waits for the page."""
    with memory("anon") as (target, uffd):
        file, fd = target.make_memfd("file", 0, target.page_size)
        os.close(fd)
        reading = target.call("pread", file, target.at(1), 1, 0)
        blocked(target)
        target.send_signal(0, signal.SIGUSR1).result()
        assert len(take(uffd, 20)) >= 20
        assert target.signals(0).result() == 0
        assert uffd.zeropage(target.at(1), target.page_size) == target.page_size
        assert reading.result() == 1
        wait_until(lambda: target.signals(0).result() == 1, "the signal is delivered at last")


@gap("duplicate messages", "each thread that waits for a page has its own message")
def test_every_thread_reports_the_same_page(memory: MakeMemory) -> None:
    """Three threads on one page are three messages, and one fill wakes them all."""
    features = abi.UFFD_FEATURE_THREAD_ID
    with memory("anon", features=features) as (target, uffd):
        touches = [target.start_read(1, thread) for thread in range(3)]
        faults = take(uffd, 3)
        assert {fault.thread_id for fault in faults if isinstance(fault, RawFault)} == set(
            target.thread_ids[:3]
        )
        uffd.copy(target.at(1), page_bytes(target, 1))
        assert [touch.result() for touch in touches] == [2, 2, 2]


@gap("wake without a page", "a woken thread that finds no page reports it again")
@SMALL
def test_a_wake_without_a_page_is_a_new_message(kind: str, memory: MakeMemory) -> None:
    """WAKE is the retry primitive: the fault that was read comes again."""
    with memory(kind) as (target, uffd):
        touch = target.start_read(1)
        first = take(uffd, 1)
        uffd.wake(target.at(1), target.page_size)
        assert take(uffd, 1) == first
        uffd.copy(target.at(1), page_bytes(target, 1))
        assert touch.result() == 2


# --- order and partial results ---------------------------------------------------------


@gap("faults before events", "one read gives every fault first, whatever came first")
def test_faults_are_read_before_older_events(memory: MakeMemory) -> None:
    """A REMOVE that waited first is read after a fault that came later."""
    with memory("anon", features=EVENT_REMOVE) as (target, uffd):
        removing = target.start_madvise(MADV_DONTNEED, 0, 1, thread=0)
        wait_until(lambda: target.state(0) == "D", "madvise waits for its event to be read")
        touch = target.start_read(5, thread=1)
        blocked(target, 1)
        first, second = uffd.read()
        assert isinstance(first, RawFault)
        assert first.address == target.at(5)
        assert second == Removed(type(second.range)(target.base, target.page_size))  # type: ignore[union-attr]
        assert removing.result() == 0
        wait_until(lambda: _zeropage(uffd, target, 5), "the fill after the event")
        assert touch.result() == 0


def _zeropage(uffd: Userfaultfd, target: Target, page: int) -> int:
    try:
        return uffd.zeropage(target.at(page), target.page_size)
    except LayoutChanging:
        return 0


@gap("partial EAGAIN", "pages before the present one are done and woken; the rest says EEXIST")
@pytest.mark.parametrize("present", range(4))
@SMALL
def test_a_hole_in_the_middle(kind: str, present: int, memory: MakeMemory) -> None:
    """A fill stops at a present page, with what it has done in the result field."""
    with memory(kind) as (target, uffd):
        size = target.page_size
        uffd.copy(target.at(present), page_bytes(target, present))
        done = uffd.zeropage(target.base, 4 * size)
        assert done == present * size
        assert calls.zeropage(uffd.fileno(), target.base + done, 4 * size - done) == EXISTS
        assert target.start_read(present).result() == present + 1


@gap("ENOENT across mappings", "a fill must lie in one mapping; nothing is done otherwise")
def test_a_fill_across_two_mappings_is_refused(memory: MakeMemory) -> None:
    """mprotect of a part splits the mapping, and a fill over the split is ENOENT."""
    with memory("anon") as (target, uffd):
        size = target.page_size
        assert target.call("mprotect", target.at(2), 2 * size, 1).result() == 0
        with pytest.raises(RangeGone) as refused:
            uffd.zeropage(target.base, 4 * size)
        assert refused.value.done == 0
        assert uffd.zeropage(target.base, 2 * size) == 2 * size
        assert uffd.zeropage(target.at(2), 2 * size) == 2 * size  # protection does not matter
        assert target.start_munmap(4, 1).result() == 0
        with pytest.raises(RangeGone):
            uffd.zeropage(target.at(4), size)


@gap(
    "hugetlb exhaustion",
    "an empty pool of huge pages answers EEXIST, not ENOMEM",
    on="hugetlb-private",
)
def test_an_empty_pool_says_that_the_page_is_there(memory: MakeMemory) -> None:
    """Private huge pages without reservation run out as EEXIST, and a waiter faults for ever."""
    with memory("hugetlb-private", 2, register=0) as (target, uffd):
        size, flags = target.page_size, 0x2 | 0x20 | 0x40000 | 0x4000  # + MAP_NORESERVE
        pages = 64
        base = target.call("mmap", 0, pages * size, 3, flags, -1, 0).result()
        assert base > 0
        uffd.register(base, pages * size)
        filled = 0
        while uffd.copy(base + filled, bytes(size)):
            filled += size
            assert filled < pages * size, "the pool never ran out"
        touch = target.start_peek(base + filled)
        assert len(take(uffd, 1)) == 1
        uffd.wake(base + filled, size)
        assert len(take(uffd, 1)) == 1  # and so on
        target.kill()
        assert target.reap() == -signal.SIGKILL
        with pytest.raises(Exception, match="ended"):
            touch.result()


# --- the end of a target ---------------------------------------------------------------


def check_gone(uffd: Userfaultfd, target: Target) -> None:
    size = target.page_size
    with pytest.raises(TargetGone):
        uffd.copy(target.base, bytes(size))
    calls_on_a_range: tuple[Callable[[int, int], object], ...] = (
        uffd.zeropage,
        uffd.continue_,
        uffd.poison,
        uffd.writeprotect,
        uffd.register,
        uffd.unregister,
    )
    for call in calls_on_a_range:
        with pytest.raises(TargetGone):
            call(target.base, size)
    with pytest.raises(ResolutionRefused) as refused:
        uffd.move(target.base, target.base + size, size)
    assert refused.value.errno == errno.EINVAL
    uffd.wake(target.base, size)
    assert uffd.read() == []


@gap("ESRCH", "a zombie's memory is gone: fills are ESRCH, WAKE is not, nothing is sent")
def test_a_zombie_has_no_memory(memory: MakeMemory) -> None:
    """Fills say ESRCH from the moment of death, reaped or not."""
    with memory("anon") as (target, uffd):
        target.start_read(0)
        take(uffd, 1)
        target.kill()
        wait_until(lambda: _gone(uffd, target), "the target is gone")
        check_gone(uffd, target)


@gap("ESRCH", "after exec the old memory is gone, with the same process alive")
def test_exec_ends_the_memory(memory: MakeMemory) -> None:
    """exec looks like an exit, except that the process lives on."""
    with memory("anon") as (target, uffd):
        target.start_exec().result()
        check_gone(uffd, target)
        assert target.call("dup", 2).result() >= 0


def _gone(uffd: Userfaultfd, target: Target) -> bool:
    return calls.zeropage(uffd.fileno(), target.base, target.page_size) == -errno.ESRCH


@gap("close fails open", "closing the last descriptor turns every missing page into zeros")
@SMALL
def test_closing_fails_open(kind: str, memory: MakeMemory) -> None:
    """Waiters go on, and read zeros where the handler's bytes should have been."""
    with memory(kind) as (target, uffd):
        touches = [target.start_read(page, page) for page in range(3)]
        take(uffd, 3)
        uffd.close()
        assert [touch.result() for touch in touches] == [0, 0, 0]
        assert target.start_read(9).result() == 0


@gap("close fails open", "a second descriptor elsewhere keeps the waiters waiting")
def test_a_second_holder_keeps_the_waiters(memory: MakeMemory) -> None:
    """With a duplicate held elsewhere the fault that was read is neither lost nor repeated."""
    with memory("anon") as (target, uffd):
        keeper = uffd.dup()
        touch = target.start_read(1)
        take(uffd, 1)
        uffd.close()
        with Userfaultfd.adopt(keeper) as adopted:
            assert adopted.read() == []
            assert adopted.info()[:2] == (0, 1)
            adopted.wake(target.base, target.length)
            assert len(take(adopted, 1)) == 1
            adopted.copy(target.at(1), page_bytes(target, 1))
            assert touch.result() == 2


# --- fork and registration -------------------------------------------------------------


@contextmanager
def descriptors_used_up() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@gap("EMFILE on FORK", "the read fails, the event stays, and a later read has it")
def test_a_fork_event_waits_for_a_free_descriptor(memory: MakeMemory) -> None:
    """Without a free descriptor the FORK event stays in the queue, and so does the parent."""
    with memory("anon", features=EVENT_FORK) as (target, uffd):
        forking = target.start_fork()
        wait_until(lambda: target.state(0) == "D", "fork waits for its event to be read")
        with descriptors_used_up():
            for _ in range(2):
                with pytest.raises(OSError) as refused:
                    uffd.read()
                assert refused.value.errno == errno.EMFILE
        assert not forking.done
        forked = read_one(uffd, Forked)
        with Userfaultfd.adopt(forked.fd) as childs:
            child = forking.result()
            child.ready.result()
            touch = child.start_peek(target.at(1))
            fault = take(childs, 1)[0]
            assert isinstance(fault, RawFault)
            assert childs.features == uffd.features
            childs.zeropage(target.at(1), target.page_size)
            assert touch.result() == 0


@gap("register matrix", "EBUSY and EINVAL of registration", on="shmem")
def test_what_registration_refuses(memory: MakeMemory) -> None:
    """Foreign ranges, unmapped ones and wrong arguments are refused by their errno."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    with memory("shmem") as (target, uffd):
        size = target.page_size
        _, second = target.open_uffd(0, flags)
        with Userfaultfd.adopt(second) as other:
            for call, number in (
                (lambda: other.register(target.base, size), errno.EBUSY),
                (lambda: uffd.register(target.base, 0), errno.EINVAL),
                (lambda: uffd.register(target.base + 1, size), errno.EINVAL),
                (lambda: uffd.register(target.base, size, 0), errno.EINVAL),
                (lambda: uffd.register(target.base, size, 1 << 7), errno.EINVAL),
                (lambda: other.unregister(target.base, size), errno.EINVAL),
                (lambda: uffd.wake(target.base, 0), errno.EINVAL),
            ):
                with pytest.raises(ResolutionRefused) as refused:
                    call()
                assert refused.value.errno == number, number
            # Another userfaultfd of the same memory fills, but wakes only its own waiters.
            touch = target.start_read(1)
            blocked(target)
            assert other.copy(target.at(1), page_bytes(target, 1)) == size
            assert stays_asleep(target, touch)
            uffd.wake(target.at(1), size)
            assert touch.result() == 2
        target.start_munmap(0, 4).result()
        with pytest.raises(ResolutionRefused) as refused:
            uffd.register(target.base, 4 * size)
        assert refused.value.errno == errno.EINVAL
        assert uffd.register(target.base, 8 * size)  # a hole is tolerated


@gap("register matrix", "other modes replace the old ones; a superset stays as it is")
def test_registering_again_replaces_the_modes(memory: MakeMemory) -> None:
    """MISSING, then WP: MISSING is gone; both, then one: both stay."""
    with memory("anon", features=WP_FEATURES) as (target, uffd):
        uffd.register(target.base, target.length, WP)
        assert target.vm_flags(target.base) & {"um", "uw", "ui"} == {"uw"}
        uffd.register(target.base, target.length, MISSING | WP)
        uffd.register(target.base, target.length, MISSING)
        assert target.vm_flags(target.base) & {"um", "uw", "ui"} == {"um", "uw"}


@gap("USER_MODE_ONLY", "kernel-mode access is EFAULT; user-mode faults are served")
def test_user_mode_only_refuses_kernel_faults(memory: MakeMemory) -> None:
    """A system call on a missing page fails, a load of the same page waits and is served."""
    with memory("anon", user_mode_only=True) as (target, uffd):
        file, fd = target.make_memfd("file", 0, target.page_size)
        os.close(fd)
        assert target.call("pread", file, target.at(1), 1, 0).result() == -errno.EFAULT
        assert target.call("pwrite", file, target.at(1), 1, 0).result() == -errno.EFAULT
        assert uffd.read() == []
        touch = target.start_read(1)
        assert len(take(uffd, 1)) == 1
        uffd.copy(target.at(1), page_bytes(target, 1))
        assert touch.result() == 2
        assert target.call("pwrite", file, target.at(1), 1, 0).result() == 1


# --- events ----------------------------------------------------------------------------


@gap("several events of one mremap", "UNMAP of the target, REMAP, UNMAP of the old range, in turn")
def test_a_moving_mremap_sends_several_events(memory: MakeMemory) -> None:
    """Fills are refused until the last of them is read."""
    features = EVENT_REMAP | EVENT_UNMAP
    with memory("anon", features=features) as (target, uffd):
        size = target.page_size
        flags = MREMAP_MAYMOVE | MREMAP_FIXED
        moving = target.start_mremap(0, 2, flags=flags, to=target.at(8))
        events: list[Message] = []

        def all_read() -> bool:
            wait_until(lambda: target.state(0) == "D" or moving.done, "mremap waits or is done")
            if not moving.done:
                assert calls.zeropage(uffd.fileno(), target.at(20), size) == AGAIN
            events.extend(uffd.read())
            return moving.done

        wait_until(all_read, "mremap is done")
        assert moving.result() == target.at(8)
        assert [type(event) for event in events] == [Unmapped, Remapped, Unmapped]
        clobbered, moved, old = events
        assert isinstance(clobbered, Unmapped)
        assert (clobbered.range.start, clobbered.range.length) == (target.at(8), 2 * size)
        assert moved == Remapped(target.base, target.at(8), 2 * size)
        assert isinstance(old, Unmapped)
        assert (old.range.start, old.range.length) == (target.base, 2 * size)
        wait_until(lambda: _zeropage(uffd, target, 20), "the fill after the last event")


@gap("MREMAP_DONTUNMAP", "REMAP alone; both ranges stay registered")
def test_mremap_dontunmap_keeps_both_registered(memory: MakeMemory) -> None:
    """The old range is empty and still traps; so does the new one."""
    with memory("anon", features=EVENT_REMAP | EVENT_UNMAP) as (target, uffd):
        size = target.page_size
        room = target.reserve(2 * size)
        # MAYMOVE|DONTUNMAP picks a place; FIXED would send an UNMAP of the room
        moving = target.start_mremap(0, 2, flags=MREMAP_MAYMOVE | MREMAP_DONTUNMAP)
        moved = read_one(uffd, Remapped)
        to = moving.result()
        assert moved == Remapped(target.base, to, 2 * size)
        assert room not in {to, target.base}
        assert "um" in target.vm_flags(target.base)
        assert "um" in target.vm_flags(to)
        for thread, address in enumerate((target.base, to)):
            touch = target.start_peek(address, thread)
            fault = take(uffd, 1)[0]
            assert isinstance(fault, RawFault)
            assert fault.address == address
            wait_until(
                lambda address=address: uffd.zeropage(address, size),  # type: ignore[misc]
                "the fill",
            )
            assert touch.result() == 0


@gap("ranges of events", "UNMAP has the whole call's range, REMOVE is clipped to each mapping")
def test_unmap_is_whole_and_remove_is_clipped(memory: MakeMemory) -> None:
    """One munmap over two registered pieces is one event, one madvise over them is two."""
    features = EVENT_REMOVE | EVENT_UNMAP
    with memory("anon", 16, features=features, register=0) as (target, uffd):
        size = target.page_size
        uffd.register(target.at(4), 2 * size)
        uffd.register(target.at(10), 2 * size)
        removing = target.start_madvise(MADV_DONTNEED, 0, 16)
        seen = []
        while not removing.done:
            seen += uffd.read()
        assert [
            (event.range.start, event.range.length) for event in seen if isinstance(event, Removed)
        ] == [(target.at(4), 2 * size), (target.at(10), 2 * size)]
        unmapping = target.start_munmap(0, 16)
        event = read_one(uffd, Unmapped)
        assert (event.range.start, event.range.length) == (target.base, 16 * size)
        assert unmapping.result() == 0


# --- true private mappings of shared memory --------------------------------------------


@gap(
    "true shmem-private",
    "fills of a private mapping are its own; the file stays as it is",
    on="shmem-private",
)
def test_fills_of_a_private_mapping_leave_the_file_alone(memory: MakeMemory) -> None:
    """COPY and ZEROPAGE put anonymous pages into a private mapping of a memory file."""
    with memory("shmem-private") as (target, uffd), target.alias() as alias:
        size = target.page_size
        touch = target.start_read(0)
        assert len(take(uffd, 1)) == 1
        assert uffd.copy(target.base, page_bytes(target, 0)) == size
        assert touch.result() == 1
        assert uffd.zeropage(target.at(1), size) == size
        assert target.start_write(1, 5).result() == 5
        assert alias[0] == alias[size] == 0
        # what the file has already is mapped without a fault, and written without a trace
        alias[2 * size] = 77
        assert target.start_read(2).result() == 77
        assert target.start_write(2, 78).result() == 78
        assert alias[2 * size] == 77
        assert uffd.copy(target.at(2), bytes(size)) == 0  # EEXIST
        assert read_everything(uffd) == []


@gap("true shmem-private", "MISSING and MINOR together: holes are missing, file pages are minor")
@pytest.mark.parametrize("kind", ["shmem", "shmem-private"])
def test_missing_and_minor_together(kind: str, memory: MakeMemory) -> None:
    """Each page's fault says whether the file has it."""
    features = abi.UFFD_FEATURE_MINOR_SHMEM
    with (
        memory(kind, features=features, register=MISSING | MINOR) as (target, uffd),
        target.alias() as alias,
    ):
        alias[target.page_size] = 9
        touches = [target.start_read(page, page) for page in range(2)]
        flags = {
            message.address: message.flags
            for message in take(uffd, 2)
            if isinstance(message, RawFault)
        }
        assert flags == {target.at(0): 0, target.at(1): abi.UFFD_PAGEFAULT_FLAG_MINOR}
        uffd.copy(target.at(0), page_bytes(target, 0))
        uffd.continue_(target.at(1), target.page_size)
        assert [touch.result() for touch in touches] == [1, 9]
