"""The list of a process's mappings: parsed, and read from real processes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest

from aiouffd.kernel import maps
from aiouffd.kernel.maps import Mapping
from tests.targets import PAGE, Target


def test_lines() -> None:
    """Private and shared, with and without a name, names with spaces."""
    lines = [
        b"55d0c0000000-55d0c0021000 rw-p 00000000 00:00 0                          [heap]",
        b"7f0000000000-7f0000004000 rw-s 00001000 00:01 4711          /memfd:a b (deleted)",
        b"7ffc00000000-7ffc00021000 r-xp 00000000 fe:1f 12 ",
    ]
    assert list(maps.parsed(lines)) == [
        Mapping(0x55D0C0000000, 0x55D0C0021000, False, 0, (0, 0), 0),
        Mapping(0x7F0000000000, 0x7F0000004000, True, 0x1000, (0, 1), 4711),
        Mapping(0x7FFC00000000, 0x7FFC00021000, False, 0, (0xFE, 0x1F), 12),
    ]


@pytest.mark.parametrize("kind", ["anon", "shmem", "shmem-private"])
def test_a_target(kind: str) -> None:
    """Its mapping is there, with its file; and nothing is when it has ended."""
    with Target(kind, pages=4, open_uffd=False) as target:
        fd = maps.open_maps(target.pid)
        try:
            one = next(one for one in maps.mappings(fd) if one.start <= target.base < one.end)
            assert one.end >= target.base + 4 * PAGE
            assert one.shared == (kind == "shmem")
            if kind != "anon":
                status = os.fstat(target.memfd)
                assert one.inode == status.st_ino
                assert one.device == (os.major(status.st_dev), os.minor(status.st_dev))
            # More than the kernel gives at once, none of them twice.
            for page in range(400):
                target.call("mmap", 0, PAGE, page % 2 * 2 + 1, 0x22, -1, 0).result()
            found = maps.mappings(fd)
            assert len(found) > 100
            assert all(a.end <= b.start for a, b in itertools.pairwise(found))
            target.kill()
            target.reap()
            assert maps.mappings(fd) == []
        finally:
            os.close(fd)
        with pytest.raises(FileNotFoundError):
            maps.open_maps(target.pid)


@pytest.mark.root
def test_a_stranger_may_not_look() -> None:
    """Another user's process is refused, with the remedy."""
    program = (
        "import os, sys\n"
        "from aiouffd.errors import NotSupported\n"
        "from aiouffd.kernel import maps\n"
        "os.setuid(65534)\n"
        "try:\n"
        "    maps.open_maps(int(sys.argv[1]))\n"
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
