"""Write protection across fork, zap and pins, as uffd-unit-tests.c checks it.

The kernel's pin tests use its own gup_test module (CONFIG_GUP_TEST).  Here the parent's long-term
pin is a buffer registered with io_uring, taken before the page is protected; fork then copies
the pinned page early.  The child's read-only pin, which makes it unshare, is process_vm_readv.
"""

from __future__ import annotations

import struct

import pytest

from aiouffd import Forked, Userfaultfd
from aiouffd.kernel import abi
from tests.conformance.support import (
    ALL,
    EVENT_FORK,
    MADV_DONTNEED,
    WP,
    WP_FEATURES,
    MakeMemory,
    pin_read_only,
    read_one,
    unit,
)
from tests.targets import MADV_PAGEOUT, Target, wait_until

_IORING_REGISTER_BUFFERS = 0
_PAGE = 3  # of the small kinds some page, of the huge ones the last


def fork(target: Target, uffd: Userfaultfd, *, events: bool) -> tuple[Target, Userfaultfd | None]:
    """Fork, and read the FORK event where there is one."""
    if not events:
        return target.fork_now(), None
    forking = target.start_fork()
    childs = Userfaultfd.adopt(read_one(uffd, Forked).fd)
    child = forking.result()
    assert isinstance(child, Target)
    child.ready.result()
    return child, childs


def childs_bit(
    target: Target, uffd: Userfaultfd, *, events: bool, pin: bool = False, unshare: bool = False
) -> bool:
    """Fork, and say whether the child's page carries the bit."""
    child, childs = fork(target, uffd, events=events)
    try:
        if pin:
            pin_long_term(child)
        if unshare:
            assert len(pin_read_only(child.pid, target.at(_PAGE))) == 8
        return child.is_wp(_PAGE)
    finally:
        if childs is not None:
            childs.close()
        child.close()


def zap(target: Target) -> None:
    """Take the page out of the page table so that its bit stays: in a swap entry or a marker."""
    if target.kind == "anon":
        wait_until(
            lambda: (
                target.start_madvise(MADV_PAGEOUT, _PAGE).result() == 0
                and target.pagemap(target.at(_PAGE))[0] & abi.PM_SWAP
            ),
            "the page is swapped out",
        )
    else:
        assert target.start_madvise(MADV_DONTNEED, _PAGE).result() == 0
    assert not target.is_present(_PAGE)


def pin_long_term(target: Target) -> None:
    """Pin the page for as long as the process lives, by a buffer registered with io_uring."""
    scratch = target.reserve(4096)
    assert target.call("mprotect", scratch, 4096, 3).result() == 0
    ring = target.call("io_uring_setup", 1, scratch).result()
    assert ring >= 0, "io_uring is needed for a long-term pin: sysctl kernel.io_uring_disabled=0"
    vector = struct.pack("=QQ", target.at(_PAGE), target.page_size)
    for at, word in zip((scratch, scratch + 8), struct.unpack("=QQ", vector), strict=True):
        target.start_poke64(at, word).result()
    register = target.call("io_uring_register", ring, _IORING_REGISTER_BUFFERS, scratch, 1)
    assert register.result() == 0


@unit(
    "wp-fork",
    "the parent's bit is kept, also zapped or swapped out; a child without EVENT_FORK has none; "
    "unprotect clears it and a new page has none",
)
@ALL
def test_wp_fork(kind: str, memory: MakeMemory, swap: None) -> None:
    """Without EVENT_FORK the bit never reaches a child, wherever the parent keeps it."""
    with memory(kind, features=WP_FEATURES, register=WP) as (target, uffd):
        target.start_fill(target.base, target.length, 1).result()
        uffd.writeprotect(target.at(_PAGE), target.page_size)
        assert target.is_wp(_PAGE)
        assert not target.is_wp(_PAGE - 1)
        assert not childs_bit(target, uffd, events=False)
        zap(target)
        assert target.is_wp(_PAGE)
        assert not childs_bit(target, uffd, events=False)
        uffd.unprotect(target.at(_PAGE), target.page_size)
        assert not target.is_wp(_PAGE)
        expected = 1 if kind in {"anon", "shmem", "hugetlb"} else 0
        assert target.start_read(_PAGE).result() == expected
        assert not target.is_wp(_PAGE)


@unit("wp-fork-with-event", "with EVENT_FORK the child keeps the bit, present and zapped")
@ALL
def test_wp_fork_with_event(kind: str, memory: MakeMemory, swap: None) -> None:
    """With EVENT_FORK the child has the parent's bit."""
    with memory(kind, features=WP_FEATURES | EVENT_FORK, register=WP) as (target, uffd):
        target.start_fill(target.base, target.length, 1).result()
        uffd.writeprotect(target.at(_PAGE), target.page_size)
        assert childs_bit(target, uffd, events=True)
        zap(target)
        assert target.is_wp(_PAGE)
        assert childs_bit(target, uffd, events=True)
        uffd.unprotect(target.at(_PAGE), target.page_size)
        assert not childs_bit(target, uffd, events=True)


@pytest.mark.parametrize(
    "events",
    [
        pytest.param(
            False,
            id="wp-fork-pin",
            marks=unit(
                "wp-fork-pin",
                "wp-fork with the page pinned before the fork (copied early), and pinned in the "
                "child (unshared)",
            ),
        ),
        pytest.param(
            True,
            id="wp-fork-pin-with-event",
            marks=unit("wp-fork-pin-with-event", "the same with EVENT_FORK: the bit is kept"),
        ),
    ],
)
@ALL
def test_wp_fork_pin(kind: str, events: bool, memory: MakeMemory) -> None:
    """A pin, which makes fork copy early and a child unshare, neither adds nor loses the bit."""
    features = WP_FEATURES | (EVENT_FORK if events else 0)
    with memory(kind, features=features, register=WP) as (target, uffd):
        target.start_fill(target.base, target.length, 1).result()
        # Pinned in the child: the page is shared with the parent until the pin unshares it.
        uffd.writeprotect(target.at(_PAGE), target.page_size)
        assert childs_bit(target, uffd, events=events, unshare=True) == events
        uffd.unprotect(target.at(_PAGE), target.page_size)
        if not events:  # a long-term pin for writing, which a protected child could not have
            assert not childs_bit(target, uffd, events=events, pin=True)
        # Pinned in the parent: fork copies the page at once.
        pin_long_term(target)
        uffd.writeprotect(target.at(_PAGE), target.page_size)
        assert target.is_wp(_PAGE)
        assert childs_bit(target, uffd, events=events) == events
        assert target.is_wp(_PAGE)
        uffd.unprotect(target.at(_PAGE), target.page_size)
        assert not target.is_wp(_PAGE)
        assert not childs_bit(target, uffd, events=events)


@unit(
    "wp-unpopulated",
    "a page never populated takes the bit; unprotect and DONTNEED drop it; the zero page keeps it",
)
def test_wp_unpopulated(memory: MakeMemory) -> None:
    """With WP_UNPOPULATED anonymous pages are protected before there is any page."""
    features = WP_FEATURES | abi.UFFD_FEATURE_WP_UNPOPULATED
    with memory("anon", features=features, register=WP) as (target, uffd):
        page, size = target.at(_PAGE), target.page_size
        uffd.writeprotect(page, size)
        assert target.is_wp(_PAGE)
        uffd.unprotect(page, size)
        assert not target.is_wp(_PAGE)
        # DONTNEED drops the marker
        uffd.writeprotect(page, size)
        assert target.start_madvise(MADV_DONTNEED, _PAGE).result() == 0
        assert not target.is_wp(_PAGE)
        # a page written where no marker is has no bit
        assert target.start_write(_PAGE, 1).result() == 1
        assert not target.is_wp(_PAGE)
        # reading over a marker maps the zero page and keeps the bit
        assert target.start_madvise(MADV_DONTNEED, _PAGE).result() == 0
        uffd.writeprotect(page, size)
        assert target.start_read(_PAGE).result() == 0
        assert target.is_present(_PAGE)
        assert target.is_wp(_PAGE)
        uffd.unprotect(page, size)
        assert not target.is_wp(_PAGE)
