"""Every fill of a Userfaultfd, and what its refusals say."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable

import pytest

from aiouffd.errors import (
    RangeGone,
    ResolutionRefused,
)
from aiouffd.events import RawFault
from aiouffd.kernel import abi
from aiouffd.uffd import Feature, Mode, Userfaultfd
from tests import targets
from tests.targets import HUGE, PAGE, Signal, Target, wait_until
from tests.uffd_memory import own, read_all, serving


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
