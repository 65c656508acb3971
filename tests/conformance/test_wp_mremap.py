"""mremap of write-protected folios without EVENT_REMAP, as uffd-wp-mremap.c checks it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aiouffd.kernel import abi
from tests.conformance.support import WP, WP_FEATURES, MakeMemory, selftest, smaps_kib, thp_sizes
from tests.targets import (
    HUGE,
    MADV_PAGEOUT,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PAGE,
    SMALL_KINDS,
    Target,
    wait_until,
)

_MADV_HUGEPAGE = 14

FEATURES = WP_FEATURES | abi.UFFD_FEATURE_WP_UNPOPULATED

mremap_selftest = selftest(
    "uffd-wp-mremap.c",
    "uffd-wp-mremap",
    "every PTE of a folio has the bit, also swapped out; after mremap none has it",
)


def entries(target: Target, address: int, length: int) -> list[int]:
    return target.pagemap(address, length // PAGE)


def is_one_folio(target: Target, address: int, size: int, field: str) -> bool:
    """Whether the pages lie side by side in memory, as those of one folio do."""
    if size == HUGE and smaps_kib(target, field, address) * 1024 >= size:
        return True
    frames = [entry & (1 << 55) - 1 for entry in entries(target, address, size)]
    first = frames[0]
    return first % (size // PAGE) == 0 and frames == list(range(first, first + len(frames)))


def check_bits_lost(target: Target, uffd_wp: Callable[[], None], size: int, *, out: bool) -> None:
    """Protect, swap out if asked to, move; the bits were there and are gone."""
    base = target.base
    uffd_wp()
    if out:

        def swapped_out() -> bool:
            target.call("madvise", base, size, MADV_PAGEOUT).result()
            gone = abi.PM_SWAP if target.kind != "shmem" else 0
            return all(
                entry & gone == gone and not entry & abi.PM_PRESENT
                for entry in entries(target, base, size)
            )

        wait_until(swapped_out, "MADV_PAGEOUT takes the folio out")
    assert all(entry & abi.PM_UFFD_WP for entry in entries(target, base, size))
    room = -(-target.reserve(2 * size) // size) * size
    flags = MREMAP_MAYMOVE | MREMAP_FIXED
    assert target.call("mremap", base, size, size, flags, room).result() == room
    assert not any(entry & abi.PM_UFFD_WP for entry in entries(target, room, size))
    assert target.start_peek(room).result() == 7
    assert not any(entry & abi.PM_UFFD_WP for entry in entries(target, room, size))


@mremap_selftest
@pytest.mark.parametrize("out", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("kind", SMALL_KINDS)
def test_mremap_of_a_base_page(kind: str, out: bool, memory: MakeMemory, swap: None) -> None:
    """A small page loses its bit in a move, from the page table or from swap."""
    with memory(kind, 1, features=FEATURES, register=WP) as (target, uffd):
        target.start_fill(target.base, PAGE, 7).result()
        check_bits_lost(target, lambda: uffd.writeprotect(target.base, PAGE), PAGE, out=out)


@mremap_selftest
@pytest.mark.parametrize("out", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("kind", ["anon", "shmem"])
@pytest.mark.parametrize("size", thp_sizes(), ids=lambda size: f"{size // 1024}kB")
def test_mremap_of_a_transparent_huge_page(
    size: int,
    kind: str,
    out: bool,
    memory: MakeMemory,
    swap: None,
    allow_thp: Callable[[int, bool], None],
) -> None:
    """A transparent huge page of any size loses the bits of all its pages in a move."""
    allow_thp(size, kind == "shmem")
    settings = {"features": FEATURES, "register": 0, "align": size}
    with memory(kind, size // PAGE, **settings) as (target, uffd):
        assert target.start_madvise(_MADV_HUGEPAGE, 0, target.pages).result() == 0
        target.start_fill(target.base, size, 7).result()
        field = "ShmemPmdMapped" if kind == "shmem" else "AnonHugePages"
        assert is_one_folio(target, target.base, size, field)
        uffd.register(target.base, size, WP)
        check_bits_lost(target, lambda: uffd.writeprotect(target.base, size), size, out=out)


@mremap_selftest
@pytest.mark.parametrize("kind", ["hugetlb", "hugetlb-private"])
def test_mremap_of_a_hugetlb_page(kind: str, memory: MakeMemory) -> None:
    """A hugetlb page loses its bit in a move."""
    with memory(kind, 1, features=FEATURES, register=WP) as (target, uffd):
        target.start_fill(target.base, HUGE, 7).result()
        check_bits_lost(target, lambda: uffd.writeprotect(target.base, HUGE), HUGE, out=False)
