"""Freeze worker processes that a C library forks, and choose which one answers first.

    sudo python examples/inherited_mapping.py

The library (inherited_mapping.c) has two workers add up the halves of a buffer that they
inherit, and takes the first answer for the first half's.  The first worker nearly always is the
first to answer; here it is not.
"""

import ctypes
import os
import select
import shutil
import subprocess
import tempfile
from pathlib import Path

from aiouffd.testing import Frozen, Harness

SOURCE = Path(__file__).with_suffix(".c")


def finish(worker: Frozen) -> None:
    """Let a worker go on, and wait until it has answered and ended."""
    pidfd = os.pidfd_open(worker.process)
    worker.release()
    select.select([pidfd], [], [])
    os.close(pidfd)


def run(library: ctypes.CDLL, *, careful: bool) -> int:
    """Have the second worker answer first; give what the library says."""
    with Harness() as uffd:
        if unwatched := [limit for limit in uffd.limits if "fork" in limit]:
            raise SystemExit(unwatched[0])
        region = uffd.region(2, name="buffer")
        half = region.page_size
        region.poke(0, b"\3" * half + b"\1" * half)
        with region.page(0).freeze() as at_first, region.page(1).freeze() as at_second:
            running = uffd.start(library.difference, region.pointer(), half, int(careful))
            first, second = at_first.wait(), at_second.wait()
            finish(second)
            finish(first)
            result: int = running.result()
            return result // half


compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
if compiler is None:
    raise SystemExit("no C compiler: install one (apt install gcc), or set CC")
with tempfile.TemporaryDirectory() as folder:
    built = os.path.join(folder, "library.so")
    flags = ["-O2", "-Wall", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", built, SOURCE], check=True)
    library = ctypes.CDLL(built)
    library.difference.restype = ctypes.c_long
    library.difference.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    print("3 - 1 =", run(library, careful=False))
    print("the careful one: 3 - 1 =", run(library, careful=True))
