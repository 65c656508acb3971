"""ZEROPAGE, POISON and fills while the address space changes, as uffd-unit-tests.c checks them."""

from __future__ import annotations

import errno
import fcntl
import signal
import struct

import pytest

from aiouffd import (
    Copy,
    LayoutChanging,
    PageFault,
    Pager,
    Poison,
    Removed,
    Resolution,
    ResolutionRefused,
    Zero,
)
from aiouffd.kernel import abi
from tests.conformance.support import (
    ALL,
    EVENT_REMOVE,
    MADV_REMOVE,
    MINOR,
    MISSING,
    WP,
    MakeMemory,
    read_one,
    unit,
)
from tests.targets import Signal


@unit(
    "zeropage",
    "fills one page; again is EEXIST; the page reads zero; hugetlb refuses with EINVAL",
)
@ALL
def test_zeropage(kind: str, memory: MakeMemory) -> None:
    """ZEROPAGE makes a page of zeros once, where the range's mask has it."""
    with memory(kind) as (target, uffd):
        has_zeropage = bool(target.ioctls & abi.IOCTL_BITS["ZEROPAGE"])
        assert has_zeropage == (not kind.startswith("hugetlb"))
        if not has_zeropage:
            with pytest.raises(ResolutionRefused) as refused:
                uffd.zeropage(target.base, target.page_size)
            assert refused.value.errno == errno.EINVAL
            assert refused.value.done == 0
            return
        assert uffd.zeropage(target.base, target.page_size) == target.page_size
        assert uffd.zeropage(target.base, target.page_size) == 0  # EEXIST
        assert target.start_words(target.base, 8, 512).result() == [0] * 512


@unit("zeropage", "through the pager: Zero answers a fault on every kind, hugetlb by a copy")
@ALL
async def test_zeropage_by_a_handler(kind: str, memory: MakeMemory) -> None:
    """A handler's Zero is a page of zeros on every kind of memory."""

    async def zero(fault: PageFault) -> Resolution:
        return Zero()

    with memory(kind) as (target, uffd):
        async with Pager(uffd, target=target.pidfd) as pager:
            pager.register(
                target.base, target.length, zero, page_size=target.page_size, registered=True
            )
            assert await target.start_sweep() == [0] * target.pages
            assert pager.counters.faults == target.pages


@unit("poison", "of all pages half are copied and half poisoned: just those are SIGBUS")
@ALL
async def test_poison(kind: str, memory: MakeMemory) -> None:
    """Poisoned pages, and no others, answer SIGBUS, again and again."""

    async def serve(fault: PageFault) -> Resolution:
        if fault.offset // fault.length % 2:
            return Copy(bytes(fault.length))
        return Poison()

    with memory(kind, 4) as (target, uffd):
        async with Pager(uffd, target=target.pidfd) as pager:
            pager.register(
                target.base, target.length, serve, page_size=target.page_size, registered=True
            )
            for _ in range(2):
                seen = [await target.start_read(page) for page in range(4)]
                assert seen[1::2] == [0, 0]
                for page in (0, 2):
                    touched = seen[page]
                    assert isinstance(touched, Signal)
                    assert touched.number == signal.SIGBUS
                    assert touched.address == target.at(page)


@unit(
    "mmap-changing",
    "while a thread hangs in madvise(MADV_REMOVE) every fill is EAGAIN with -EAGAIN as result",
    on="shmem",
)
def test_mmap_changing(memory: MakeMemory) -> None:
    """Nothing is filled while an event is unread; after it everything goes on."""
    features = EVENT_REMOVE | abi.UFFD_FEATURE_MINOR_SHMEM
    with memory("shmem", features=features, register=MISSING | MINOR | WP) as (target, uffd):
        removing = target.start_madvise(MADV_REMOVE, 0, 1)
        while target.state(0) != "D":
            assert not removing.done
        size, other = target.page_size, target.at(1)
        for refused in (
            lambda: uffd.copy(other, bytes(size)),
            lambda: uffd.zeropage(other, size),
            lambda: uffd.continue_(other, size),
            lambda: uffd.poison(other, size),
            lambda: uffd.writeprotect(other, size),
        ):
            with pytest.raises(LayoutChanging):
                refused()
        # MOVE's caller must be in the target, except for this very answer.
        with pytest.raises(LayoutChanging):
            uffd.move(other, target.at(2), size)
        # The kernel looks before it reads the arguments: they may all be zero.
        for request, layout in (
            (abi.UFFDIO_COPY, abi.UFFDIO_COPY_STRUCT),
            (abi.UFFDIO_MOVE, abi.UFFDIO_MOVE_STRUCT),
            (abi.UFFDIO_ZEROPAGE, abi.UFFDIO_ZEROPAGE_STRUCT),
            (abi.UFFDIO_CONTINUE, abi.UFFDIO_CONTINUE_STRUCT),
            (abi.UFFDIO_POISON, abi.UFFDIO_POISON_STRUCT),
        ):
            argument = bytearray(layout.size)
            with pytest.raises(OSError) as again:
                fcntl.ioctl(uffd.fileno(), request, argument)
            assert again.value.errno == errno.EAGAIN
            assert struct.unpack_from("=q", argument, layout.size - 8)[0] == -errno.EAGAIN
        event = read_one(uffd, Removed)
        assert (event.range.start, event.range.length) == (target.base, size)
        assert removing.result() == 0
