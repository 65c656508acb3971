"""Minor faults, of pages that only the page cache has, as uffd-unit-tests.c checks them."""

from __future__ import annotations

import mmap

import pytest

from aiouffd import Continue, PageFault, Pager, Resolution, Unprotect
from aiouffd.kernel import abi
from tests.conformance.support import MINOR, WP, WP_FEATURES, MakeMemory, smaps_kib, unit
from tests.targets import HUGE, MADV_COLLAPSE, PAGE

FEATURES = abi.UFFD_FEATURE_MINOR_SHMEM | abi.UFFD_FEATURE_MINOR_HUGETLBFS


class Flipper:
    """Flip every bit of a page once, through the alias, then map it."""

    def __init__(self, alias: mmap.mmap, *, protect: bool = False) -> None:
        self.alias = alias
        self.protect = protect
        self.kinds: list[str] = []
        self.flipped: set[int] = set()

    async def __call__(self, fault: PageFault) -> Resolution:
        self.kinds.append(fault.kind)
        if fault.wp:
            return Unprotect()
        if fault.offset not in self.flipped:
            self.flipped.add(fault.offset)
            piece = slice(fault.offset, fault.offset + fault.length)
            self.alias[piece] = self.alias[piece].translate(bytes(range(255, -1, -1)))
        return Continue(protect=self.protect)


# A private mapping has minor faults too, though upstream's "private" shmem is shared.
MINOR_KINDS = pytest.mark.parametrize("kind", ["shmem", "shmem-private", "hugetlb"])


@unit(
    "minor",
    "one MINOR fault per page, changed before CONTINUE; a second CONTINUE is EEXIST; none is "
    "missing",
)
@MINOR_KINDS
async def test_minor(kind: str, memory: MakeMemory) -> None:
    """Reading pages of the page cache raises one minor fault each; the handler may change them."""
    with (
        memory(kind, features=FEATURES, register=MINOR) as (target, uffd),
        target.alias() as alias,
    ):
        for page in range(target.pages):
            alias[page * target.page_size] = page
        flipper = Flipper(alias)
        async with Pager(uffd, target=target.pidfd) as pager:
            pager.register(
                target.base,
                target.length,
                flipper,
                modes=MINOR,
                page_size=target.page_size,
                registered=True,
            )
            for page in range(target.pages):
                assert await target.start_read(page) == 255 - page
                assert uffd.continue_(target.at(page), target.page_size) == 0  # EEXIST
        assert flipper.kinds == ["minor"] * target.pages


@unit("minor-wp", "the same with CONTINUE's write-protect mode: the first write faults once more")
@MINOR_KINDS
async def test_minor_wp(kind: str, memory: MakeMemory) -> None:
    """A page continued with protection is read at will, and trapped at its first write."""
    with (
        memory(kind, features=FEATURES | WP_FEATURES, register=MINOR | WP) as (target, uffd),
        target.alias() as alias,
    ):
        for page in range(target.pages):
            alias[page * target.page_size] = page
        flipper = Flipper(alias, protect=True)
        async with Pager(uffd, target=target.pidfd) as pager:
            pager.register(
                target.base,
                target.length,
                flipper,
                modes=MINOR | WP,
                page_size=target.page_size,
                registered=True,
            )
            for page in range(target.pages):
                assert await target.start_read(page) == 255 - page
                assert target.is_wp(page)
            assert flipper.kinds == ["minor"] * target.pages
            for page in range(target.pages):
                assert await target.start_write(page, page) == page
                assert not target.is_wp(page)
        assert flipper.kinds == ["minor"] * target.pages + ["wp"] * target.pages


@unit(
    "minor-collapse",
    "the same, then MADV_COLLAPSE: one huge mapping with the right contents",
    on="shmem",
)
async def test_minor_collapse(memory: MakeMemory) -> None:
    """Pages that were continued one by one collapse into a huge page with their contents."""
    pages = HUGE // PAGE
    with (
        memory("shmem", pages, features=FEATURES, register=0, align=HUGE) as (target, uffd),
        target.alias() as alias,
    ):
        for page in range(pages):
            alias[page * PAGE : page * PAGE + 8] = (page + 1).to_bytes(8, "little")
        flipper = Flipper(alias)
        async with Pager(uffd, target=target.pidfd) as pager:
            pager.register(target.base, target.length, flipper, modes=MINOR)
            before = await target.start_sweep()
            assert before == [(page + 1) ^ 0xFFFF_FFFF_FFFF_FFFF for page in range(pages)]
            # Registered memory is left alone by collapse, so through a mapping that is not.
            twin = target.map(target.length, target.memfd_there, align=HUGE)
            collapsed = await target.call("madvise", twin, target.length, MADV_COLLAPSE)
            assert collapsed == 0
            assert await target.start_words(twin, PAGE, pages) == before
            assert smaps_kib(target, "ShmemPmdMapped", twin) == HUGE // 1024
            # The collapse has emptied the registered mapping's page table: minor faults again.
            assert await target.start_sweep() == before
        assert set(flipper.kinds) == {"minor"}
