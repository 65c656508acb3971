"""What the conformance tests share: memory of every kind, swap, huge page sizes.

``@selftest(FILE, NAME, ASSERTS)`` ties a test to the kernel selftest that it re-tells; the table
in ``docs/conformance.md`` is made from these marks and a run (``tests/conformance/table.py``).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aiouffd import Userfaultfd
from tests.conformance.support import THP, MakeMemory
from tests.targets import Target


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "selftest(file, name, asserts): the kernel selftest that this test re-tells"
    )


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> MakeMemory:
    """Start a target with memory of a kind, and adopt its userfaultfd.

    ``with memory("shmem", features=..., register=...) as (target, uffd)``; 32 small pages or
    4 huge ones, and as many huge pages again for what fork and copy-on-write take.
    """

    @contextlib.contextmanager
    def make(kind: str, pages: int = 0, **settings: Any) -> Iterator[tuple[Target, Userfaultfd]]:
        huge = kind.startswith("hugetlb")
        pages = pages or (4 if huge else 32)
        if huge:
            request.getfixturevalue("huge_pages")(2 * pages + 2)
        with (
            Target(kind, pages, **settings) as target,
            Userfaultfd.adopt(target.take_uffd()) as uffd,
        ):
            yield target, uffd

    return make


@pytest.fixture
def swap(tmp_path: Path) -> Iterator[None]:
    """64 MiB of swap space for this test, so that MADV_PAGEOUT takes private pages away."""
    if os.geteuid() != 0:
        pytest.skip("needs root to add swap space: sudo make test")
    if shutil.which("mkswap") is None:
        pytest.skip("needs mkswap and swapon: apt install util-linux mount")
    with open("/proc/swaps", encoding="ascii") as swaps:
        fcntl.flock(swaps, fcntl.LOCK_EX)
        path = tmp_path / "swap"
        path.write_bytes(b"")
        path.chmod(0o600)
        with path.open("r+b") as file:
            for _ in range(64):
                file.write(bytes(1024 * 1024))
        subprocess.run(["mkswap", path], check=True, capture_output=True, timeout=30)
        try:
            subprocess.run(["swapon", path], check=True, capture_output=True, timeout=30)
        except subprocess.CalledProcessError as error:
            why = error.stderr.decode().strip()
            pytest.skip(f"needs a file system that can hold swap (set TMPDIR): {why}")
        try:
            yield
        finally:
            subprocess.run(["swapoff", path], check=True, timeout=30)
            path.unlink()


@pytest.fixture
def allow_thp() -> Iterator[Callable[[int, bool], None]]:
    """Let MADV_HUGEPAGE give huge pages of one size only, ``allow_thp(size, shared)``."""
    if not os.access(THP / "enabled", os.W_OK):
        pytest.skip(f"needs to write {THP}: sudo make test")
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context((THP / "enabled").open())
        fcntl.flock(lock, fcntl.LOCK_EX)

        def put(path: Path, text: str) -> None:
            if not path.exists():
                return
            before = path.read_text().partition("[")[2].partition("]")[0]
            path.write_text(text)
            stack.callback(path.write_text, before)

        def allow(size: int, shared: bool) -> None:
            name = "shmem_enabled" if shared else "enabled"
            for folder in THP.glob("hugepages-*"):
                this = folder.name == f"hugepages-{size // 1024}kB"
                put(folder / name, ("advise" if shared else "madvise") if this else "never")

        yield allow
