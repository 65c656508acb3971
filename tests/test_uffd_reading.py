"""What a Userfaultfd reads, and how it learns that its target is gone."""

from __future__ import annotations

import errno
import mmap
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from aiouffd.errors import (
    LayoutChanging,
    TargetGone,
)
from aiouffd.events import Forked, RawFault, Remapped, Removed, Unmapped
from aiouffd.ranges import Range
from aiouffd.uffd import Feature, Userfaultfd
from tests import targets
from tests.targets import PAGE, Target, wait_until
from tests.uffd_memory import own, read_all, serving

# --- reading ---------------------------------------------------------------------------


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


def test_whose_memory_it_is() -> None:
    """Known of what was opened here and of what was adopted; a target's is not ours."""
    with Userfaultfd.open() as opened, Userfaultfd.adopt(opened.dup()) as adopted:
        assert opened.is_own_memory()
        assert adopted.is_own_memory()
    with Target(pages=1) as target, serving(target) as uffd:
        assert not uffd.is_own_memory()


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
