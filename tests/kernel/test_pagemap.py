"""The pagemap of real processes: categories, get and clear, and what is said when it fails."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from aiouffd.errors import NotSupported, ResolutionRefused, TargetGone
from aiouffd.kernel import abi, calls, pagemap
from aiouffd.kernel.pagemap import CHECK_WPASYNC, WP_MATCHING, PageRegion
from tests import targets
from tests.targets import MINOR, PAGE, WP, Target

WRITTEN = abi.PAGE_IS_WRITTEN
PRESENT = abi.PAGE_IS_PRESENT
GET_AND_CLEAR = WP_MATCHING | CHECK_WPASYNC


class Tracked:
    """A target whose writes are tracked asynchronously, and its pagemap."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.fd = pagemap.open_pagemap(target.pid)
        self.start, self.end = target.base, target.base + target.length

    def pages(self, *regions: PageRegion) -> list[tuple[int, int]]:
        """Regions as pages of the target."""
        return [
            ((one.start - self.start) // PAGE, (one.end - self.start) // PAGE) for one in regions
        ]

    def written(self) -> list[tuple[int, int]]:
        """Get and clear what was written."""
        found = pagemap.regions(
            self.fd, self.start, self.end, required=WRITTEN, flags=GET_AND_CLEAR
        )
        return self.pages(*found)


@pytest.fixture(params=["anon", "shmem", "shmem-private"])
def tracked(request: pytest.FixtureRequest) -> Iterator[Tracked]:
    """Eight pages, registered for asynchronous write-protection and all of them clean."""
    features = abi.UFFD_FEATURE_WP_ASYNC
    with Target(request.param, pages=8, features=features, register=WP) as target:
        one = Tracked(target)
        pagemap.protect(one.fd, one.start, one.end)
        yield one
        os.close(one.fd)


def test_what_is_written_is_found_once(tracked: Tracked) -> None:
    """Writes go on without a message, are found by the next scan, and not by the one after."""
    assert tracked.written() == []
    for page in (1, 2, 5):
        assert tracked.target.start_write(page, 1).result() == 1
    assert tracked.written() == [(1, 3), (5, 6)]
    assert tracked.written() == []
    tracked.target.start_write(2, 1).result()
    assert tracked.written() == [(2, 3)]
    assert calls.read_messages(tracked.target.uffd, [bytearray(32)]) == 0


def test_raw_regions_are_the_same(tracked: Tracked) -> None:
    """Many regions are left as the kernel wrote them; a full vector stops the walk early."""
    for page in (1, 2, 5):
        tracked.target.start_write(page, 1).result()
    raw, end = pagemap.scan_raw(tracked.fd, tracked.start, tracked.end, required=WRITTEN)
    found = pagemap.scan(tracked.fd, tracked.start, tracked.end, required=WRITTEN)
    assert list(abi.PAGE_REGION_STRUCT.iter_unpack(raw)) == found.regions
    assert end == found.walk_end == tracked.end
    raw, end = pagemap.scan_raw(
        tracked.fd, tracked.start, tracked.end, required=WRITTEN, max_regions=1
    )
    assert len(raw) == abi.PAGE_REGION_STRUCT.size
    assert end < tracked.end


def test_reading_is_not_writing(tracked: Tracked) -> None:
    """A page that was only read stays clean."""
    tracked.target.start_read(3).result()
    assert tracked.written() == []


def test_looking_does_not_clear(tracked: Tracked) -> None:
    """Without WP_MATCHING a scan changes nothing."""
    tracked.target.start_write(4, 1).result()
    for _ in range(2):
        found = pagemap.scan(tracked.fd, tracked.start, tracked.end, required=WRITTEN)
        assert tracked.pages(*found.regions) == [(4, 5)]
        assert found.walk_end == tracked.end
        assert found.regions[0].length == PAGE
        assert found.regions[0].categories == WRITTEN


def test_a_marker_looks_like_swap() -> None:
    """A protected page that was never there is SWAPPED and WPALLOWED."""
    with Target("anon", pages=2, features=abi.UFFD_FEATURE_WP_ASYNC, register=WP) as target:
        one = Tracked(target)
        try:
            pagemap.protect(one.fd, one.start, one.end)
            found = pagemap.scan(one.fd, one.start, one.end, report=0x1FF)
            assert found.regions == [
                PageRegion(one.start, one.end, abi.PAGE_IS_WPALLOWED | abi.PAGE_IS_SWAPPED)
            ]
        finally:
            os.close(one.fd)


@pytest.fixture
def plain() -> Iterator[Tracked]:
    """Eight pages of which 0, 2, 3 and 6 are there; no userfaultfd."""
    with Target("anon", pages=8, open_uffd=False) as target:
        for page in (0, 2, 3, 6):
            target.start_write(page, 1).result()
        one = Tracked(target)
        yield one
        os.close(one.fd)


def test_categories(plain: Tracked) -> None:
    """All of, any of, and the opposite of categories; regions tell apart what is reported."""
    fd, start, end = plain.fd, plain.start, plain.end
    there = pagemap.scan(fd, start, end, required=PRESENT)
    assert plain.pages(*there.regions) == [(0, 1), (2, 4), (6, 7)]
    either = pagemap.scan(fd, start, end, any_of=PRESENT | abi.PAGE_IS_SWAPPED)
    assert plain.pages(*either.regions) == [(0, 1), (2, 4), (6, 7)]
    absent = pagemap.scan(fd, start, end, required=PRESENT, inverted=PRESENT)
    assert plain.pages(*absent.regions) == [(1, 2), (4, 6), (7, 8)]
    everything = pagemap.scan(fd, start, end, report=PRESENT)
    assert [one.categories for one in everything.regions] == [PRESENT, 0, PRESENT, 0, PRESENT, 0]
    one_region = pagemap.scan(fd, start, end, report=0)
    assert plain.pages(*one_region.regions) == [(0, 8)]


def test_limits_stop_the_walk(plain: Tracked) -> None:
    """A full vector or enough pages end a scan early; walk_end says where to go on."""
    fd, start, end = plain.fd, plain.start, plain.end
    first = pagemap.scan(fd, start, end, required=PRESENT, max_regions=1)
    assert plain.pages(*first.regions) == [(0, 1)]
    assert start < first.walk_end < end
    two = pagemap.scan(fd, start, end, required=PRESENT, max_pages=2)
    assert plain.pages(*two.regions) == [(0, 1), (2, 3)]
    assert two.walk_end == start + 3 * PAGE
    assert pagemap.scan(fd, start, start) == ([], start)


@pytest.mark.parametrize("max_regions", [1, 2, 3, 512])
def test_a_walk_is_the_same_in_any_pieces(plain: Tracked, max_regions: int) -> None:
    """Where a scan ends for want of room does not show."""
    found = pagemap.regions(
        plain.fd, plain.start, plain.end, required=PRESENT, max_regions=max_regions
    )
    assert plain.pages(*found) == [(0, 1), (2, 4), (6, 7)]


def test_neighbours_are_one_region(tracked: Tracked) -> None:
    """Pages that were written one by one come out as one region."""
    for page in range(8):
        tracked.target.start_write(page, 1).result()
    assert tracked.written() == [(0, 8)]


def test_a_walk_needs_room() -> None:
    """A walk that could never get a region is refused at once."""
    with pytest.raises(ValueError, match="max_regions"):
        next(pagemap.regions(-1, 0, PAGE, max_regions=0))


def test_refusals_say_what_was_wrong(plain: Tracked) -> None:
    """Memory of another kind, unknown categories and flags, a start within a page."""
    fd, start, end = plain.fd, plain.start, plain.end
    with pytest.raises(ResolutionRefused, match="WP_ASYNC") as caught:
        pagemap.protect(fd, start, end)
    assert (caught.value.errno, caught.value.call) == (errno.EPERM, "PAGEMAP_SCAN")
    with pytest.raises(ResolutionRefused, match="unknown category") as caught:
        pagemap.scan(fd, start, end, required=1 << 40)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(ResolutionRefused) as caught:
        pagemap.scan(fd, start, end, flags=1 << 9)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(ResolutionRefused) as caught:
        pagemap.scan(fd, start + 1, end)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(ResolutionRefused, match="end lies before") as caught:
        pagemap.scan(fd, end, start)
    assert caught.value.errno == errno.EFAULT


def test_a_file_that_is_no_pagemap() -> None:
    """ENOTTY is what a kernel without PAGEMAP_SCAN says."""
    with (
        open("/proc/self/status", "rb") as file,
        pytest.raises(NotSupported, match=r"Linux 6\.7"),
    ):
        pagemap.scan(file.fileno(), 0, PAGE)


@pytest.mark.parametrize("silent", [False, True])
def test_a_target_that_is_gone(
    plain: Tracked, silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scan says that it is gone, also where the kernel finds nothing then; entries are none."""
    if silent:
        monkeypatch.setattr(calls, "pagemap_scan", lambda fd, argument: 0)
    plain.target.kill()
    plain.target.reap()
    for max_regions in (512, 0):
        with pytest.raises(TargetGone):
            pagemap.scan(plain.fd, plain.start, plain.end, max_regions=max_regions)
    assert len(pagemap.entries(plain.fd, plain.start, 8 * PAGE)) == 0
    with pytest.raises(FileNotFoundError):
        pagemap.open_pagemap(plain.target.pid)


def test_classic_entries(plain: Tracked) -> None:
    """One number per page, with the same answer about what is there."""
    found = pagemap.entries(plain.fd, plain.start, 8 * PAGE)
    assert [page for page, entry in enumerate(found) if entry & abi.PM_PRESENT] == [0, 2, 3, 6]
    assert not any(entry & (abi.PM_FILE | abi.PM_SWAP) for entry in found)
    assert len(pagemap.entries(plain.fd, plain.start, 0)) == 0


def test_classic_entries_of_a_large_range() -> None:
    """More than one read's worth comes back whole."""
    pages = (1 << 16) + 3
    with Target("shmem", pages=pages, register=MINOR) as target:
        os.pwrite(target.memfd, b"x", (pages - 1) * PAGE)
        calls.continue_(target.uffd, target.at(pages - 1), PAGE)
        fd = pagemap.open_pagemap(target.pid)
        try:
            found = pagemap.entries(fd, target.base, target.length)
        finally:
            os.close(fd)
        assert len(found) == pages
        assert [page for page, entry in enumerate(found) if entry & abi.PM_PRESENT] == [pages - 1]
        assert found[-1] & abi.PM_FILE


def test_ones_own_pagemap() -> None:
    """``self`` is this process; protection shows as bit 57."""
    fd = pagemap.open_pagemap()
    try:
        with mmap.mmap(-1, 2 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory[0] = 1
            start = targets.address_of(memory)
            first, second = pagemap.entries(fd, start, 2 * PAGE)
        assert first & abi.PM_PRESENT
        assert not second & (abi.PM_PRESENT | abi.PM_UFFD_WP)
    finally:
        os.close(fd)
    assert abi.PM_UFFD_WP == 1 << 57


@pytest.mark.root
def test_a_stranger_may_not_look() -> None:
    """Another user's process is refused, with the remedy."""
    program = (
        "import os, sys\n"
        "from aiouffd.errors import NotSupported\n"
        "from aiouffd.kernel import pagemap\n"
        "os.setuid(65534)\n"
        "try:\n"
        "    pagemap.open_pagemap(int(sys.argv[1]))\n"
        "except NotSupported as error:\n"
        "    print(error)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", program, str(os.getpid())],
        check=True,
        timeout=30,
        stdout=subprocess.PIPE,
    ).stdout
    assert b"CAP_SYS_PTRACE" in output
