"""Answers of handlers checked, resolutions performed on real memory, long ranges walked."""

from __future__ import annotations

import array
import ctypes
import errno
import mmap
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.errors import HandlerError
from aiouffd.events import PageFault
from aiouffd.kernel import abi, calls
from aiouffd.performer import Walk, outcome_of, perform, resolution_of, span_of
from aiouffd.ranges import PAGE_SIZE, Range
from aiouffd.resolutions import (
    Answer,
    Continue,
    Copy,
    Move,
    Poison,
    Resolution,
    Unprotect,
    Wake,
    Zero,
)
from aiouffd.uffd import Userfaultfd
from tests import targets
from tests.targets import HUGE, MINOR, MISSING, PAGE, WP, Target

AT = 0x7000_0000
FAULT = PageFault(AT, 0, PAGE_SIZE)
EEXIST, ENOENT, EAGAIN = -errno.EEXIST, -errno.ENOENT, -errno.EAGAIN

# --- answers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "resolution, outcome",
    [
        (Copy(b""), "copy"),
        (Zero(), "zero"),
        (Continue(), "continue"),
        (Move(0), "move"),
        (Unprotect(), "unprotect"),
        (Poison(), "poison"),
        (Wake(), "wake"),
    ],
)
def test_outcomes_have_names(resolution: Resolution, outcome: str) -> None:
    """Observers are told a word for each."""
    assert outcome_of(resolution) == outcome


BUFFERS: list[Callable[[], object]] = [
    lambda: bytes(PAGE_SIZE),
    lambda: bytearray(PAGE_SIZE),
    lambda: memoryview(bytes(2 * PAGE_SIZE))[PAGE_SIZE:],
    lambda: mmap.mmap(-1, PAGE_SIZE),
    lambda: array.array("d", bytes(PAGE_SIZE)),
    ctypes.c_uint32 * (PAGE_SIZE // 4),
    lambda: np.zeros((64, PAGE_SIZE // 64), "u1"),
    lambda: np.zeros(PAGE_SIZE // 4, ">u4"),
    lambda: np.zeros(PAGE_SIZE // 16, [("a", "u1", 16)]),
]


@pytest.mark.parametrize("make", BUFFERS)
def test_a_buffer_means_copy(make: Callable[[], bytes]) -> None:
    """Whatever its items are: bytes in one piece."""
    data = make()
    resolution = resolution_of(data, FAULT)
    assert isinstance(resolution, Copy)
    assert resolution.data is data
    assert span_of(resolution, FAULT) == Range(AT, PAGE_SIZE)


def test_none_means_wake() -> None:
    """The handler has made the page itself."""
    assert resolution_of(None, FAULT) == resolution_of(Wake(), FAULT) == Wake()
    assert span_of(Wake(), FAULT) == Range(AT, PAGE_SIZE)


@pytest.mark.parametrize("kind", [Zero, Continue, Unprotect, Poison])
def test_without_a_length_it_is_one_page(kind: type[Zero]) -> None:
    """The faulting page, unless said otherwise."""
    assert span_of(kind(), FAULT) == Range(AT, PAGE_SIZE)
    longer = kind(3 * PAGE_SIZE, AT - PAGE_SIZE)
    assert resolution_of(longer, FAULT) is longer
    assert span_of(longer, FAULT) == Range(AT - PAGE_SIZE, 3 * PAGE_SIZE)


def released() -> memoryview:
    view = memoryview(bytes(PAGE_SIZE))
    view.release()
    return view


def closed() -> mmap.mmap:
    memory = mmap.mmap(-1, PAGE_SIZE)
    memory.close()
    return memory


UNUSABLE: list[tuple[object, str]] = [
    ("text", "returned str"),
    (7, "returned int"),
    (Copy("text"), "returned str"),  # type: ignore[arg-type]
    (Copy(Zero()), "returned Zero"),  # type: ignore[arg-type]
    (Copy, "returned type"),
    (b"", "with 0 bytes"),
    (b"x", "whole pages of 4096 bytes"),
    (bytes(PAGE_SIZE + 1), "whole pages"),
    (memoryview(bytes(2 * PAGE_SIZE))[::2], "in one piece"),
    (np.zeros((64, 64), "u1", order="F"), "in one piece"),
    (released(), "unusable buffer"),
    (closed(), "unusable buffer"),
    (Copy(bytes(PAGE_SIZE), AT + 1), "whole pages"),
    (Copy(bytes(PAGE_SIZE), AT + PAGE_SIZE), "leaves the faulting page out"),
    (Copy(bytes(PAGE_SIZE), AT - PAGE_SIZE), "leaves the faulting page out"),
    (Zero(0), "whole pages"),
    (Zero(-PAGE_SIZE), "whole pages"),
    (Zero(1 << 64), "whole pages"),
    (Zero(1 << 64, -PAGE_SIZE), "negative"),
    (Zero(1.5), "unsupported operand"),  # type: ignore[arg-type]
    (Poison("x"), "unsupported operand"),  # type: ignore[arg-type]
    (Zero(PAGE_SIZE, "x"), "operand"),  # type: ignore[arg-type]
    (Move(1), "no whole pages"),
    (Move(-PAGE_SIZE), "no whole pages"),
    (Move(1 << 64), "no whole pages"),
    (Move("x"), "operand"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("answer, message", UNUSABLE)
def test_what_no_kernel_could_do_is_the_handlers_error(answer: Answer, message: str) -> None:
    """It goes into the failure policy, and never into the reader as another exception."""
    with pytest.raises(HandlerError, match=message) as caught:
        resolution_of(answer, FAULT)
    assert caught.value.address == AT


@given(
    st.one_of(st.none(), st.integers(-4, 8).map(lambda n: n * 512)),
    st.one_of(st.none(), st.integers(-8, 8).map(lambda n: AT + n * 512)),
)
def test_a_span_is_whole_pages_around_the_fault(length: int | None, address: int | None) -> None:
    """Whatever a handler says: that, or an error."""
    fault = PageFault(AT, 0, 1024)
    try:
        span = span_of(Zero(length, address), fault)
    except HandlerError:
        start, end = address or AT, (address or AT) + (1024 if length is None else length)
        assert start % 1024 or end % 1024 or not start <= AT < end
    else:
        assert span.start % 1024 == span.length % 1024 == 0
        assert AT in span


# --- on real memory --------------------------------------------------------------------


@pytest.fixture
def target() -> Iterator[Target]:
    """Eight pages of anonymous memory, registered for missing pages and for writes."""
    with Target("anon", pages=8, register=MISSING | WP) as target:
        yield target


@pytest.mark.parametrize("make", BUFFERS)
def test_copy_from_any_buffer(target: Target, make: Callable[[], bytes]) -> None:
    """The bytes arrive, as they lie in memory."""
    data = make()
    # A writable view of its bytes, where it has one.
    raw = bytes(data)
    if not memoryview(data).readonly:
        raw = bytes(n % 251 for n in range(PAGE))
        ctypes.memmove(targets.address_of(data), raw, PAGE)
    page = target.at(1)
    assert perform(target.uffd, Copy(data), page, page, PAGE, PAGE) == PAGE
    assert target.memory(page, PAGE) == raw


def test_a_part_of_a_copy_takes_its_own_bytes(target: Target) -> None:
    """The part that lies at an address gets what the whole has for that address."""
    data = b"".join(bytes([n]) * PAGE for n in range(4))
    for whole in (data, bytearray(data)):
        base = target.at(4 if whole is data else 0)
        done = perform(target.uffd, Copy(whole), base, base + PAGE, 2 * PAGE, PAGE)
        assert done == 2 * PAGE
        assert target.memory(base + PAGE, 2 * PAGE) == data[PAGE : 3 * PAGE]
        assert not target.is_present((base - target.base) // PAGE)


@pytest.mark.parametrize("protect", [False, True])
def test_copy_leaves_pages_protected_on_demand(target: Target, protect: bool) -> None:
    """With ``protect`` the first write to the page faults."""
    page = target.at(0)
    assert perform(target.uffd, Copy(bytes(PAGE), None, protect), page, page, PAGE, PAGE) == PAGE
    assert target.is_wp(0) == protect


def test_unprotect(target: Target) -> None:
    """The protection is gone, the page stays."""
    page = target.at(0)
    perform(target.uffd, Copy(b"x" * PAGE, None, True), page, page, PAGE, PAGE)
    assert perform(target.uffd, Unprotect(), page, page, PAGE, PAGE) == PAGE
    assert not target.is_wp(0)
    assert target.memory(page, 1) == b"x"


def test_zero_poison_and_wake(target: Target) -> None:
    """Zeros are there, poison is seen, a wake changes nothing."""
    zero, lost, none = target.at(0), target.at(1), target.at(2)
    assert perform(target.uffd, Zero(), zero, zero, PAGE, PAGE) == PAGE
    assert perform(target.uffd, Zero(), zero, zero, PAGE, PAGE) == EEXIST
    assert perform(target.uffd, Poison(), lost, lost, PAGE, PAGE) == PAGE
    assert perform(target.uffd, Wake(), none, none, PAGE, PAGE) == PAGE
    assert target.memory(zero, PAGE) == bytes(PAGE)
    assert isinstance(target.start_read(1).result(), targets.Signal)
    assert not target.is_present(2)


@pytest.mark.parametrize("protect", [False, True])
def test_continue_maps_what_the_page_cache_has(protect: bool) -> None:
    """The answer to a minor fault."""
    features = abi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    with Target("shmem", pages=2, features=features, register=MISSING | MINOR | WP) as target:
        with target.alias() as alias:
            alias[:PAGE] = b"x" * PAGE
        page = target.at(0)
        fd, resolution = target.uffd, Continue(None, None, protect)
        assert perform(fd, resolution, page, page, PAGE, PAGE) == PAGE
        assert perform(fd, resolution, page, page, PAGE, PAGE) == EEXIST
        assert target.is_wp(0) == protect


@pytest.mark.root
def test_zeros_on_huge_pages_are_copied(huge_pages: Callable[[int], None]) -> None:
    """hugetlb memory has no ZEROPAGE."""
    huge_pages(2)
    with Target("hugetlb", pages=2) as target:
        base = target.base
        assert perform(target.uffd, Zero(2 * HUGE), base, base, HUGE, HUGE) == HUGE
        assert perform(target.uffd, Zero(2 * HUGE), base, base + HUGE, HUGE, HUGE) == HUGE
        assert target.memory(base, PAGE) == bytes(PAGE)
        assert target.memory(base + 2 * HUGE - PAGE, PAGE) == bytes(PAGE)


def test_move_takes_the_part_that_belongs_there() -> None:
    """As a copy does; holes only if they are allowed."""
    with mmap.mmap(-1, 8 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for page in (0, 1):
            memory[page * PAGE] = 10 + page
        source = targets.address_of(memory)
        base = source + 4 * PAGE
        with Userfaultfd.open() as uffd:
            uffd.register(base, 4 * PAGE)
            fd = uffd.fileno()
            assert perform(fd, Move(source), base, base + PAGE, PAGE, PAGE) == PAGE
            hole = perform(fd, Move(source), base, base + 2 * PAGE, PAGE, PAGE)
            assert hole == ENOENT
            holes = Move(source, None, None, True)
            assert perform(fd, holes, base, base + 2 * PAGE, PAGE, PAGE) == PAGE
            uffd.unregister(base, 4 * PAGE)
        assert (memory[0], memory[PAGE], memory[5 * PAGE]) == (10, 0, 11)


# --- walks -----------------------------------------------------------------------------


class Memory:
    """Answers like a kernel with some pages there and some not mapped; counts what it is asked.

    The real kernel is asked the same by test_a_walk_on_real_memory.
    """

    def __init__(self, present: set[int], unmapped: set[int]) -> None:
        self.present, self.unmapped = present, unmapped
        self.filled: list[int] = []
        self.woken: list[int] = []
        self.lengths: list[int] = []

    def fill(self, start: int, length: int) -> int:
        self.lengths.append(length)
        pages = range(start // PAGE, (start + length) // PAGE)
        if self.unmapped & set(pages):
            return ENOENT  # the whole piece must lie in one mapping
        for page in pages:
            if page in self.present:
                return page * PAGE - start or EEXIST
            self.present.add(page)
            self.filled.append(page)
        return length

    def wake(self, start: int, length: int) -> None:
        assert length == PAGE
        self.woken.append(start // PAGE)


pages = st.sets(st.integers(0, 30))


@given(pages, pages, st.integers(1, 12), st.integers(0, 30), st.integers(0, 30))
def test_a_walk_fills_what_is_missing(
    present: set[int], unmapped: set[int], piece: int, first: int, count: int
) -> None:
    """Once each, in order; present pages are woken, holes stepped over."""
    memory = Memory(present - unmapped, unmapped)
    wanted = range(first, first + count)
    expected = [p for p in wanted if p not in memory.present | unmapped]
    there = memory.present & set(wanted)
    walk = Walk(Range(first * PAGE, count * PAGE), PAGE, piece * PAGE)
    steps = 0
    while walk:
        before = walk.at
        done = walk.step(memory.fill, memory.wake)
        assert done > 0 or done in {EEXIST, ENOENT}
        assert walk.at >= before
        steps += 1
        assert steps < 200
    assert walk.at == walk.end == (first + count) * PAGE
    assert memory.filled == expected
    assert set(memory.woken) <= there
    assert walk.done == len(expected) * PAGE
    assert all(length <= piece * PAGE for length in memory.lengths)


@pytest.mark.parametrize("number", [EAGAIN, -errno.ESRCH, -errno.ENOMEM])
def test_a_walk_stays_where_the_kernel_refused(number: int) -> None:
    """Step again later, or give up: nothing was done and nothing is skipped."""
    memory = Memory(set(), set())
    walk = Walk(Range(PAGE, 4 * PAGE), PAGE, 2 * PAGE)
    assert walk.step(memory.fill, memory.wake) == 2 * PAGE
    assert walk.step(lambda start, length: number, memory.wake) == number
    assert (walk.at, walk.done) == (3 * PAGE, 2 * PAGE)
    assert walk.step(memory.fill, memory.wake) == 2 * PAGE
    assert not walk


def test_a_piece_is_never_less_than_a_page() -> None:
    """A huge page is one ioctl, however small the pieces should be."""
    lengths: list[int] = []

    def fill(start: int, length: int) -> int:
        lengths.append(length)
        return length

    walk = Walk(Range(0, 2 * HUGE), HUGE, PAGE)
    while walk:
        walk.step(fill, lambda start, length: None)
    assert lengths == [HUGE, HUGE]


def test_pieces_grow_again_behind_a_hole() -> None:
    """A narrow place costs small steps only around itself."""
    memory = Memory(set(), {3})
    walk = Walk(Range(0, 64 * PAGE), PAGE, 16 * PAGE)
    while walk:
        walk.step(memory.fill, memory.wake)
    assert memory.lengths[-1] > PAGE
    assert len(memory.lengths) < 20


def test_a_walk_on_real_memory(target: Target) -> None:
    """Present pages and holes in the mapping, asked of the kernel itself."""
    for page in (2, 3):
        assert calls.zeropage(target.uffd, target.at(page), PAGE) == PAGE
    assert target.start_munmap(5, 1).result() == 0
    woken: list[int] = []
    walk = Walk(Range(target.base, 8 * PAGE), PAGE)

    def fill(start: int, length: int) -> int:
        return perform(target.uffd, Poison(), target.base, start, length, PAGE)

    while walk:
        done = walk.step(fill, lambda start, length: woken.append((start - target.base) // PAGE))
        assert done > 0 or done in {EEXIST, ENOENT}
    assert walk.done == 5 * PAGE
    assert woken == [2, 3]
