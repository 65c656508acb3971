"""Userfaultfd: opened, adopted, and each of its methods asked of the running kernel."""

from __future__ import annotations

import errno
import mmap
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aiouffd.errors import (
    ClosedError,
    LayoutChanging,
    NotSupported,
    RangeGone,
    ResolutionRefused,
    TargetGone,
)
from aiouffd.events import Forked, RawFault, Remapped, Removed, Unmapped
from aiouffd.fds import OwnedFd
from aiouffd.kernel import abi, calls, gates
from aiouffd.ranges import Range
from aiouffd.uffd import Feature, Mode, Userfaultfd
from tests import targets
from tests.targets import HUGE, PAGE, Signal, Target, wait_until

PAGES = 8


class Own:
    """Memory of this very process: filled first, read then, it never faults."""

    def __init__(self, uffd: Userfaultfd, memory: mmap.mmap) -> None:
        self.uffd = uffd
        self.memory = memory
        self.base = targets.address_of(memory)

    def at(self, page: int) -> int:
        return self.base + page * PAGE

    def __getitem__(self, page: int) -> bytes:
        return self.memory[page * PAGE : (page + 1) * PAGE]


@contextmanager
def own(features: int = 0, modes: int = Mode.MISSING) -> Iterator[Own]:
    """Anonymous memory of this process, registered with a userfaultfd of its own."""
    with (
        mmap.mmap(-1, PAGES * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory,
        Userfaultfd.open(features) as uffd,
    ):
        mine = Own(uffd, memory)
        uffd.register(mine.base, PAGES * PAGE, modes)
        yield mine


@contextmanager
def serving(target: Target) -> Iterator[Userfaultfd]:
    """The target's userfaultfd, adopted."""
    with Userfaultfd.adopt(target.take_uffd()) as uffd:
        yield uffd


# --- opening ---------------------------------------------------------------------------


def test_open_shakes_hands() -> None:
    """It is non-blocking, close-on-exec, initialised, and says what was enabled."""
    wanted = Feature.EVENT_REMOVE | Feature.THREAD_ID
    with Userfaultfd.open(wanted) as uffd:
        fd = uffd.fileno()
        assert not os.get_blocking(fd)
        assert not os.get_inheritable(fd)
        assert uffd.info() == calls.FdInfo(0, 0, wanted, True)
        assert uffd.features == wanted
        assert repr(uffd) == f"<Userfaultfd fd={fd} features={wanted!r}>"
    assert repr(uffd) == "<Userfaultfd closed>"


def test_open_for_user_mode_faults_only() -> None:
    """System calls on missing pages fail then, which needs no right to allow."""
    with Userfaultfd.open(user_mode_only=True) as uffd:
        assert uffd.info().initialised


def test_features_that_another_brings_along() -> None:
    """WP_ASYNC implies WP_UNPOPULATED: both are said, as after adopting."""
    with Userfaultfd.open(Feature.WP_ASYNC) as uffd:
        assert uffd.features == uffd.info().features == Feature.WP_ASYNC | Feature.WP_UNPOPULATED


@pytest.mark.root
def test_a_refused_feature_leaves_no_descriptor() -> None:
    """The error names it; the leak check of every test looks for the rest."""
    with pytest.raises(NotSupported, match="bit 40"):
        Userfaultfd.open(1 << 40)


def test_features_of_newer_kernels_are_kept() -> None:
    """Bits without a name are shown by their value and survive."""
    features = Feature(abi.UFFD_FEATURE_MOVE | 1 << 40)
    assert int(features) == abi.UFFD_FEATURE_MOVE | 1 << 40
    assert Feature.MOVE in features
    assert int(Mode(1 | 1 << 9)) == 1 | 1 << 9
    assert {feature.name: int(feature) for feature in Feature} == abi.FEATURES
    assert {mode.name: int(mode) for mode in Mode} == abi.REGISTER_MODES


# --- adopting --------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [int, OwnedFd])
def test_adopt(wrap: Callable[[int], int | OwnedFd]) -> None:
    """Features are read from the kernel; a blocking descriptor is made non-blocking."""
    fd = gates.open_userfaultfd()
    calls.api(fd, Feature.EVENT_REMAP)
    os.set_blocking(fd, True)
    with Userfaultfd.adopt(wrap(fd)) as uffd:
        assert uffd.fileno() == fd
        assert uffd.features == Feature.EVENT_REMAP
        assert not os.get_blocking(fd)
    assert not os.path.exists(f"/proc/self/fd/{fd}")


def test_adopt_refuses_what_is_no_userfaultfd() -> None:
    """A pipe from a mistaken peer is closed, and named as what it is."""
    read_end, write_end = os.pipe()
    os.close(write_end)
    with pytest.raises(ValueError, match=f"file descriptor {read_end} is no userfaultfd"):
        Userfaultfd.adopt(read_end)
    assert not os.path.exists(f"/proc/self/fd/{read_end}")


def test_adopt_refuses_one_without_a_handshake() -> None:
    """Polled, it would report an error for ever."""
    fd = gates.open_userfaultfd()
    with pytest.raises(ValueError, match="has not seen UFFDIO_API"):
        Userfaultfd.adopt(OwnedFd(fd))
    assert not os.path.exists(f"/proc/self/fd/{fd}")


def test_adopt_refuses_a_closed_one() -> None:
    """There is nothing to take over."""
    owned = OwnedFd(os.open(os.devnull, os.O_RDONLY))
    owned.close()
    with pytest.raises(ClosedError):
        Userfaultfd.adopt(owned)


# --- the descriptor --------------------------------------------------------------------


def test_a_closed_one_refuses_everything() -> None:
    """Closing twice is no mistake; using it after is ClosedError."""
    uffd = Userfaultfd.open()
    uffd.close()
    uffd.close()
    assert uffd.closed
    uses: list[Callable[[], object]] = [
        uffd.fileno,
        uffd.dup,
        uffd.detach,
        uffd.info,
        uffd.read,
        uffd.target_alive,
        lambda: uffd.register(0x10000, PAGE),
        lambda: uffd.unregister(0x10000, PAGE),
        lambda: uffd.wake(0x10000, PAGE),
        lambda: uffd.copy(0x10000, bytes(PAGE)),
        lambda: uffd.zeropage(0x10000, PAGE),
        lambda: uffd.continue_(0x10000, PAGE),
        lambda: uffd.poison(0x10000, PAGE),
        lambda: uffd.move(0x10000, 0x20000, PAGE),
        lambda: uffd.writeprotect(0x10000, PAGE),
        lambda: uffd.unprotect(0x10000, PAGE),
    ]
    for use in uses:
        with pytest.raises(ClosedError):
            use()


def test_a_number_closed_by_others_is_told_as_closed() -> None:
    """EBADF of a fill means that somebody closed the number under us."""
    uffd = Userfaultfd.open()
    with uffd.detach() as owned:
        number = owned.fileno()
        again = Userfaultfd(OwnedFd(owned.detach()), 0)
        os.close(number)
    with pytest.raises(ClosedError, match="this userfaultfd was closed"):
        again.zeropage(0x10000, PAGE)
    again._fd.detach()


def test_dup_and_detach() -> None:
    """A second descriptor keeps the userfaultfd open; detaching hands the first on."""
    uffd = Userfaultfd.open(Feature.THREAD_ID)
    with uffd.dup() as second, uffd.detach() as first:
        assert uffd.closed
        assert first.fileno() != second.fileno()
        assert calls.fdinfo(second.fileno()).features == Feature.THREAD_ID


def test_one_reader_for_life() -> None:
    """A second would steal the first one's faults."""
    with Userfaultfd.open() as uffd:
        uffd.claim_reader()
        with pytest.raises(RuntimeError, match="has a reader already"):
            uffd.claim_reader()


# --- ranges ----------------------------------------------------------------------------


def test_register_gives_the_ioctls() -> None:
    """And refuses what is aligned wrongly, or nothing, with the range in the error."""
    with own() as mine:
        uffd = mine.uffd
        mask = uffd.register(mine.base, PAGE, Mode.MISSING | Mode.WP)
        assert mask & abi.IOCTL_BITS["WRITEPROTECT"]
        for start, length, modes in (
            (mine.base + 1, PAGE, Mode.MISSING),
            (mine.base, 0, Mode.MISSING),
            (mine.base, PAGE, 0),
            (mine.base, PAGE, Mode.MINOR),  # of anonymous memory
            (0x10000, PAGE, Mode.MISSING),  # nothing is mapped there
        ):
            with pytest.raises(ResolutionRefused, match="UFFDIO_REGISTER") as caught:
                uffd.register(start, length, modes)
            assert (caught.value.errno, caught.value.start) == (errno.EINVAL, start)


def test_two_userfaultfds_do_not_share_a_range() -> None:
    """The second is refused, also for giving the first one's range back."""
    with own() as mine, Userfaultfd.open() as other:
        with pytest.raises(ResolutionRefused) as caught:
            other.register(mine.base, PAGE)
        assert caught.value.errno == errno.EBUSY
        with pytest.raises(ResolutionRefused, match="UFFDIO_UNREGISTER") as caught:
            other.unregister(mine.base, PAGE)
        assert caught.value.errno == errno.EINVAL


def test_unregister_gives_memory_back() -> None:
    """Missing pages read zero from then on; here, without a fault."""
    with own() as mine:
        mine.uffd.copy(mine.at(0), b"x" * PAGE)
        mine.uffd.unregister(mine.base, PAGES * PAGE)
        assert mine[0] == b"x" * PAGE
        assert mine[1] == bytes(PAGE)
        with pytest.raises(RangeGone):
            mine.uffd.zeropage(mine.at(2), PAGE)


@pytest.mark.parametrize(
    "kind, modes", [("anon", Mode.MISSING), ("anon", Mode.WP), ("shmem", Mode.MINOR)]
)
def test_unregister_wakes_all_who_wait(kind: str, modes: Mode) -> None:
    """Those of write-protect and minor faults too, whom the kernel leaves asleep."""
    features = Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED
    with Target(kind, 1, features=features, register=modes) as target, serving(target) as uffd:
        if modes is Mode.WP:
            uffd.writeprotect(target.base, PAGE)
        if modes is Mode.MINOR:
            with target.alias() as alias:
                alias[0] = 7
        touch = target.start_write(0, 5)
        wait_until(target.is_blocked, "the target waits")
        uffd.unregister(target.base, PAGE)
        assert touch.result() == 5


def test_wake_lets_the_thread_fault_again() -> None:
    """Nothing was filled: the same fault comes again.  A misaligned wake is refused."""
    with Target(pages=1) as target, serving(target) as uffd:
        touch = target.start_read(0)
        messages = read_all(uffd, 1)
        uffd.wake(target.base, PAGE)
        assert read_all(uffd, 1) == messages
        with pytest.raises(ResolutionRefused, match="UFFDIO_WAKE") as caught:
            uffd.wake(target.base + 1, PAGE)
        assert caught.value.errno == errno.EINVAL
        uffd.zeropage(target.base, PAGE)
        assert touch.result() == 0


# --- fills -----------------------------------------------------------------------------


def test_copy() -> None:
    """Bytes arrive; a page that is there stops it, is kept, and is no error."""
    with own() as mine:
        copy = mine.uffd.copy
        assert copy(mine.at(2), b"c" * PAGE) == PAGE
        assert copy(mine.at(0), bytearray(b"a" * PAGE) + b"b" * PAGE + b"x" * PAGE) == 2 * PAGE
        assert copy(mine.at(2), memoryview(b"y" * PAGE)) == 0
        assert (mine[0][:1], mine[1][:1], mine[2][:1]) == (b"a", b"b", b"c")


def test_zeropage() -> None:
    """Zeros, without a byte of ours."""
    with own() as mine:
        assert mine.uffd.zeropage(mine.base, 2 * PAGE) == 2 * PAGE
        assert mine.uffd.zeropage(mine.base, PAGE) == 0
        assert mine[0] == mine[1] == bytes(PAGE)


def test_move() -> None:
    """Pages change their place; holes move only if they may."""
    with own() as mine, mmap.mmap(-1, 2 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as other:
        other[0] = 7
        source = targets.address_of(other)
        move = mine.uffd.move
        assert move(mine.at(0), source, PAGE) == PAGE
        assert other[0] == 0
        assert mine[0][0] == 7
        with pytest.raises(RangeGone) as caught:
            move(mine.at(1), source + PAGE, PAGE)
        assert caught.value.call == "UFFDIO_MOVE"
        assert move(mine.at(1), source + PAGE, PAGE, allow_holes=True, wake=False) == PAGE
        assert move(mine.at(0), source, PAGE) == 0


def test_writeprotect_and_unprotect() -> None:
    """What may not be written faults; the bit is in the page tables."""
    with Target(pages=2, register=Mode.MISSING | Mode.WP) as target, serving(target) as uffd:
        uffd.copy(target.at(0), bytes(PAGE), protect=True)
        uffd.copy(target.at(1), bytes(PAGE))
        assert (target.is_wp(0), target.is_wp(1)) == (True, False)
        uffd.writeprotect(target.base, 2 * PAGE)
        assert target.is_wp(1)
        write = target.start_write(1, 9)
        (fault,) = read_all(uffd, 1)
        assert isinstance(fault, RawFault)
        assert fault.flags & abi.UFFD_PAGEFAULT_FLAG_WP
        uffd.unprotect(target.at(1), PAGE, wake=False)
        assert not target.is_wp(1)
        assert not write.done
        uffd.unprotect(target.at(1), PAGE)
        assert write.result() == 9
        for call in (uffd.writeprotect, uffd.unprotect):
            with pytest.raises(RangeGone, match="UFFDIO_WRITEPROTECT"):
                call(0x10000, PAGE)


@pytest.mark.parametrize("protect", [False, True])
def test_continue(protect: bool) -> None:
    """The page of the page cache is mapped; without one it is EFAULT."""
    modes = Mode.MISSING | Mode.MINOR | Mode.WP
    with (
        Target("shmem", 2, features=Feature.WP_HUGETLBFS_SHMEM, register=modes) as target,
        target.alias() as alias,
        serving(target) as uffd,
    ):
        alias[0] = 7
        read = target.start_read(0)
        wait_until(target.is_blocked, "the target waits")
        assert uffd.continue_(target.base, PAGE, wake=False, protect=protect) == PAGE
        assert uffd.continue_(target.base, PAGE) == 0
        assert not read.done  # neither of the two has woken it
        uffd.wake(target.base, PAGE)
        assert read.result() == 7
        assert target.is_wp(0) == protect
        with pytest.raises(ResolutionRefused) as caught:
            uffd.continue_(target.at(1), PAGE)
        assert caught.value.errno == errno.EFAULT


def test_poison() -> None:
    """Who touches the page gets SIGBUS, also who waits for it already."""
    with Target(pages=1) as target, serving(target) as uffd:
        read = target.start_read(0)
        wait_until(target.is_blocked, "the target waits")
        assert uffd.poison(target.base, PAGE) == PAGE
        assert uffd.poison(target.base, PAGE) == 0
        assert isinstance(read.result(), Signal)


FILLS: dict[str, Callable[[Userfaultfd, int, bool], int]] = {
    "copy": lambda uffd, start, wake: uffd.copy(start, bytes(PAGE), wake=wake),
    "zeropage": lambda uffd, start, wake: uffd.zeropage(start, PAGE, wake=wake),
    "poison": lambda uffd, start, wake: uffd.poison(start, PAGE, wake=wake),
}


@pytest.mark.parametrize("name", FILLS)
def test_fills_wake_unless_told_not_to(name: str) -> None:
    """Several ranges may be filled, and woken once."""
    with Target(pages=2) as target, serving(target) as uffd:
        sleeper, other = target.start_read(0, thread=0), target.start_read(1, thread=1)
        for thread in (0, 1):
            wait_until(lambda thread=thread: target.is_blocked(thread), "it waits")  # type: ignore[misc]
        assert FILLS[name](uffd, target.at(0), False) == PAGE
        assert FILLS[name](uffd, target.at(1), True) == PAGE
        other.result()
        assert target.is_blocked(0)
        uffd.wake(target.at(0), PAGE)
        sleeper.result()


@pytest.mark.parametrize(
    "start, length", [(0x10000, PAGE), (0x10000, 0), (0x10001, PAGE), (0x10000, PAGE + 1)]
)
@pytest.mark.parametrize("method", ["zeropage", "poison", "continue_"])
def test_refused_fills_say_what_and_where(method: str, start: int, length: int) -> None:
    """The class by the errno, the range and the call as attributes."""
    with own() as mine, pytest.raises(ResolutionRefused) as caught:
        getattr(mine.uffd, method)(start, length)
    error = caught.value
    assert isinstance(error, RangeGone) == (error.errno == errno.ENOENT)
    assert (error.start, error.length, error.done) == (start, length, 0)
    assert error.call == f"UFFDIO_{method.rstrip('_').upper()}"


def test_copy_of_no_bytes_is_refused_by_the_kernel() -> None:
    """Nothing is nothing to copy."""
    with own() as mine, pytest.raises(ResolutionRefused) as caught:
        mine.uffd.copy(mine.base, b"")
    assert caught.value.errno == errno.EINVAL


def test_copy_refuses_what_has_no_bytes() -> None:
    """Text and strided views are not copied from."""
    with own() as mine:
        with pytest.raises(TypeError):
            mine.uffd.copy(mine.base, "text")  # type: ignore[arg-type]
        with pytest.raises(BufferError):
            mine.uffd.copy(mine.base, memoryview(bytes(2 * PAGE))[::2])


@pytest.mark.root
def test_huge_pages(huge_pages: Callable[[int], None]) -> None:
    """Whole huge pages, and no ZEROPAGE."""
    huge_pages(2)
    with Target("hugetlb", pages=2) as target, serving(target) as uffd:
        assert uffd.copy(target.base, b"h" * HUGE) == HUGE
        assert target.memory(target.base, 1) == b"h"
        for call in (uffd.zeropage, uffd.poison):
            with pytest.raises(ResolutionRefused) as caught:
                call(target.at(1), HUGE if call == uffd.zeropage else PAGE)
            assert caught.value.errno == errno.EINVAL


# --- reading ---------------------------------------------------------------------------


def read_all(uffd: Userfaultfd, count: int) -> list[object]:
    """Read until so many messages have come."""
    messages: list[object] = []

    def enough() -> bool:
        messages.extend(uffd.read())
        return len(messages) >= count

    wait_until(enough, f"{count} messages")
    assert len(messages) == count
    return messages


def test_nothing_to_read() -> None:
    """Reading never waits."""
    with Userfaultfd.open() as uffd:
        assert uffd.read() == []


def test_read_gives_faults_and_counts() -> None:
    """As many as are pending, in one batch; the kernel counts those that nobody resolved."""
    with Target(pages=4, features=Feature.THREAD_ID) as target, serving(target) as uffd:
        touches = [target.start_read(page, thread=page) for page in range(4)]
        wait_until(lambda: uffd.info().pending == 4, "four faults")
        faults = uffd.read()
        assert sorted(faults, key=lambda fault: fault[1]) == [  # type: ignore[index]
            RawFault(0, target.at(page), target.thread_ids[page]) for page in range(4)
        ]
        assert uffd.info()[:2] == (0, 4)
        uffd.zeropage(target.base, 4 * PAGE)
        assert [touch.result() for touch in touches] == [0] * 4


def test_read_gives_events() -> None:
    """Remap, remove and unmap, each when it happened."""
    features = Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP
    with Target(pages=4, features=features) as target, serving(target) as uffd:
        remove = target.start_madvise(mmap.MADV_DONTNEED, 1, 2)
        assert read_all(uffd, 1) == [Removed(Range(target.at(1), 2 * PAGE))]
        assert remove.result() == 0
        move = target.start_mremap(0, 4, flags=1 | 2, to=(to := target.reserve(4 * PAGE)))
        assert read_all(uffd, 2) == [
            Remapped(target.base, to, 4 * PAGE),
            Unmapped(Range(target.base, 4 * PAGE)),
        ]
        assert move.result() == to


@pytest.mark.root
def test_a_forked_childs_userfaultfd_is_adopted() -> None:
    """It comes with the parent's features, and serves the child's memory."""
    with Target(pages=1, features=Feature.EVENT_FORK) as target, serving(target) as uffd:
        fork = target.start_fork()
        (event,) = read_all(uffd, 1)
        assert isinstance(event, Forked)
        with Userfaultfd.adopt(event.fd) as child_uffd:
            child = fork.result()
            child.ready.result()
            assert child_uffd.features == Feature.EVENT_FORK
            touch = child.start_peek(target.base)
            read_all(child_uffd, 1)
            assert child_uffd.copy(target.base, b"\7" * PAGE) == PAGE
            assert touch.result() == 7
            assert not target.is_present(0)


def test_fills_are_refused_while_the_layout_changes() -> None:
    """Until the event is read every fill is LayoutChanging; nothing was done."""
    with Target(pages=2, features=Feature.EVENT_REMOVE) as target, serving(target) as uffd:
        remove = target.start_madvise(mmap.MADV_DONTNEED, 1)
        wait_until(lambda: target.state(0) == "D", "the target waits for its event to be read")
        fills: list[Callable[[], object]] = [
            lambda: uffd.copy(target.base, bytes(PAGE)),
            lambda: uffd.zeropage(target.base, PAGE),
            lambda: uffd.poison(target.base, PAGE),
            lambda: uffd.writeprotect(target.base, PAGE),
        ]
        for fill in fills:
            with pytest.raises(LayoutChanging) as caught:
                fill()
            assert caught.value.errno == errno.EAGAIN
        assert uffd.target_alive()
        assert uffd.read() == [Removed(Range(target.at(1), PAGE))]
        assert remove.result() == 0
        assert uffd.zeropage(target.base, PAGE) == PAGE


# --- the target's end ------------------------------------------------------------------


def test_own_memory_is_alive() -> None:
    """As long as this process is; asking fills nothing."""
    with own() as mine:
        assert mine.uffd.target_alive()


def test_asking_where_something_is_registered_changes_nothing() -> None:
    """Even a target that has memory at the lowest address keeps it as it is."""
    with Target(pages=1) as target, serving(target) as uffd:
        lowest, flags = 0x10000, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | targets.MAP_FIXED
        rights = mmap.PROT_READ | mmap.PROT_WRITE
        assert target.call("mmap", lowest, PAGE, rights, flags, -1, 0).result() == lowest
        uffd.register(lowest, PAGE)
        assert uffd.target_alive()
        assert target.pagemap(lowest) == [0]


def exits(target: Target) -> None:
    target.exit()
    target.reap()


def stays_a_zombie(target: Target) -> None:
    target.kill()
    stat = Path(f"/proc/{target.pid}/stat")
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z", "a zombie")


def calls_exec(target: Target) -> None:
    target.start_exec().result()


@pytest.mark.parametrize("end", [exits, stays_a_zombie, calls_exec])
def test_a_target_that_is_gone(end: Callable[[Target], None]) -> None:
    """Nothing is said to the reader; every call that needs the memory says TargetGone."""
    with Target(pages=2, keep_uffd=False) as target, serving(target) as uffd:
        assert uffd.target_alive()
        end(target)
        wait_until(lambda: not uffd.target_alive(), "the kernel to let the memory go")
        uses: list[Callable[[], object]] = [
            lambda: uffd.copy(target.base, bytes(PAGE)),
            lambda: uffd.zeropage(target.base, PAGE),
            lambda: uffd.continue_(target.base, PAGE),
            lambda: uffd.poison(target.base, PAGE),
            lambda: uffd.writeprotect(target.base, PAGE),
            lambda: uffd.unprotect(target.base, PAGE),
            lambda: uffd.register(target.base, PAGE),
            lambda: uffd.unregister(target.base, PAGE),
        ]
        for use in uses:
            with pytest.raises(TargetGone) as caught:
                use()
            assert caught.value.errno == errno.ESRCH
            assert re.search("the target process is gone", str(caught.value))
        uffd.wake(target.base, PAGE)
        assert uffd.read() == []
