"""Memory files and huge pages: what the kernel takes for present, and pools that run dry."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiouffd import (
    Action,
    Continue,
    Copy,
    FailurePolicy,
    Feature,
    Mode,
    PageFault,
    Pager,
    Resolution,
    ResolutionRefused,
    StuckPage,
    Userfaultfd,
)
from tests.serving import Gate, Record, from_image, image, serving
from tests.targets import DEADLINE, HUGE, PAGE, Signal, Target, until

MINOR = Feature.MINOR_SHMEM
PUNCH = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_SHARED, _PRIVATE = mmap.MAP_SHARED, mmap.MAP_PRIVATE
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


# --- 15: huge folios of shared memory --------------------------------------------------


@pytest.fixture
def huge_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs that always allocates huge pages."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a tmpfs: sudo make test")
    where = tmp_path / "huge"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "huge=always,size=16m", "none", str(where)]
    subprocess.run(mount, check=True, timeout=30)
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True, timeout=30)


@pytest.mark.parametrize(
    "modes", [Mode.MISSING, Mode.MISSING | Mode.MINOR], ids=["missing", "both"]
)
async def test_a_huge_folio_makes_its_neighbours_present(modes: Mode, huge_tmpfs: Path) -> None:
    """One page written beside MISSING makes 511 others read zero; with MINOR they are asked for."""
    path = huge_tmpfs / "memory"
    populated: set[int] = set()
    with Target("shmem", 1, features=MINOR, register=0) as target:
        with path.open("w+b") as file:
            file.truncate(HUGE)
            view = mmap.mmap(file.fileno(), HUGE)
        there = target.tell(0, "open", path, convert=int).result()
        base = target.map(HUGE, there, align=HUGE)

        def populate(page: int) -> None:
            if page not in populated:
                populated.add(page)
                view[page * PAGE : (page + 1) * PAGE] = image(page * PAGE)

        async def serve(fault: PageFault) -> Resolution:
            if fault.missing:
                populated.add(fault.offset // PAGE)
                return Copy(image(fault.offset))
            populate(fault.offset // PAGE)
            return Continue()

        uffd = Userfaultfd.adopt(target.take_uffd())
        with view:
            async with Pager(uffd, target=target.pidfd) as pager:
                pager.register(base, HUGE, serve, modes=modes)
                populate(3)
                words = await target.start_words(base, PAGE, 16)
                if modes & Mode.MINOR:
                    assert words == list(range(1, 17))
                    assert pager.counters.faults == 16
                else:  # the control: why MISSING alone will not do on such a file
                    assert words == [4 if page == 3 else 0 for page in range(16)]
                    assert pager.counters.faults == 0


# --- 16: holes behind minor faults -----------------------------------------------------


async def test_a_hole_in_a_minor_file_reads_zero_and_grows_the_file() -> None:
    """With MINOR alone a hole raises nothing, reads zero and takes memory; CONTINUE says EFAULT."""

    async def map_it(fault: PageFault) -> Resolution:
        return Continue()

    async with serving(map_it, "shmem-private", 16, features=MINOR, modes=Mode.MINOR) as served:
        target, uffd = served.target, served.uffd
        with target.alias() as alias:
            alias[2 * PAGE] = 3
        blocks = os.fstat(target.memfd).st_blocks
        assert await target.start_read(2) == 3
        assert served.pager.counters.faults == 1
        with pytest.raises(ResolutionRefused) as refused:
            uffd.continue_(target.at(7), PAGE)
        assert refused.value.errno == errno.EFAULT
        assert await target.start_read(7) == 0
        assert served.pager.counters.faults == 1
        assert os.fstat(target.memfd).st_blocks == blocks + PAGE // 512


async def test_a_page_that_left_the_file_meanwhile_is_no_failure() -> None:
    """EFAULT of a CONTINUE whose page was punched out lets the thread go on, with zeros."""

    async def map_it(fault: PageFault) -> Resolution:
        return Continue()

    gate = Gate(map_it)
    async with serving(gate, "shmem-private", features=MINOR, modes=Mode.MINOR) as served:
        target = served.target
        with target.alias() as alias:
            alias[2 * PAGE] = 3
        touch = target.start_read(2)
        await until(lambda: gate.faults, "the handler is asked")
        hole = ("fallocate", target.memfd_there, PUNCH, 2 * PAGE, PAGE)
        assert await target.call(*hole, thread=1) == 0
        gate.let_go()
        assert await touch == 0
        assert served.pager.counters.failures == 0


# --- 17: sealed backing ----------------------------------------------------------------


async def test_a_sealed_backing_is_private_to_nobody_and_served_to_all() -> None:
    """A sealed file cannot be written, cut, grown or punched; private mappings are served."""

    async def map_it(fault: PageFault) -> Resolution:
        return Continue()

    with Target("shmem-private", 4, features=MINOR, register=0) as target:
        with target.alias() as alias:
            for page in range(4):
                alias[page * PAGE : (page + 1) * PAGE] = image(page * PAGE)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        # The target's private mapping does not stand in the way of a write seal.
        fcntl.fcntl(target.memfd, fcntl.F_ADD_SEALS, seals)
        file, refused = target.memfd_there, -errno.EPERM
        flags = (0, 4 * PAGE, _READ_WRITE, _SHARED, file, 0)
        assert await target.call("mmap", *flags) == refused
        assert await target.call("pwrite", file, target.base, 1, 0) in {refused, -errno.EFAULT}
        assert await target.call("ftruncate", file, PAGE) == refused
        assert await target.call("ftruncate", file, 8 * PAGE) == refused
        assert await target.call("fallocate", file, PUNCH, 0, PAGE) == refused

        uffd = Userfaultfd.adopt(target.take_uffd())
        async with Pager(uffd, target=target.pidfd) as pager:
            readable = (0, 4 * PAGE, mmap.PROT_READ, _SHARED, file, 0)
            shared = await target.call("mmap", *readable)
            with pytest.raises(ResolutionRefused) as refusal:
                pager.register(shared, 4 * PAGE, map_it, modes=Mode.MINOR)
            assert refusal.value.errno == errno.EPERM
            pager.register(target.base, target.length, map_it, modes=Mode.MINOR)
            assert await target.start_sweep() == [1, 2, 3, 4]
            assert pager.counters.faults == 4
            assert await target.start_write(1, 99) == 99
            assert await target.start_words(shared, PAGE, 4) == [1, 2, 3, 4]


# --- 37b: the pool of huge pages is empty ----------------------------------------------


async def test_an_empty_pool_of_huge_pages_fails_that_page_alone(huge_pages: object) -> None:
    """EEXIST without end on one page is found out; the policy ends it, others go on."""
    assert callable(huge_pages)
    huge_pages(2)
    record = Record()
    failure = FailurePolicy(then=Action.POISON)
    with Target("anon", 8, features=0, register=0, threads=2) as target:
        flags = _PRIVATE | mmap.MAP_ANONYMOUS | 0x40000 | 0x4000  # MAP_HUGETLB | MAP_NORESERVE
        pages = 64
        base = await target.call("mmap", 0, pages * HUGE, _READ_WRITE, flags, -1, 0)
        assert base > 0
        uffd = Userfaultfd.adopt(target.take_uffd())
        async with Pager(uffd, target=target.pidfd, failure=failure, observers=[record]) as pager:
            pager.register(base, pages * HUGE, from_image, page_size=HUGE)
            pager.register(target.base, target.length, from_image)
            page = 0
            async with asyncio.timeout(3 * DEADLINE):
                while await target.start_peek(base + page * HUGE) == page + 1:
                    page += 1
            assert page < pages
            dry = await target.start_peek(base + page * HUGE)
            assert isinstance(dry, Signal)
            assert isinstance(record.failures[0], StuckPage)
            assert await target.start_peek(base) == 1
            assert await target.start_sweep() == list(range(1, 9))
