"""A path that changes between our checks and the kernel's copy of it: a guest that gets out.

    python examples/races/changed_path.py

sandbox.c has the bug and its repair.
"""

import os
import tempfile
from pathlib import Path

from aiouffd.testing import Harness, Running, Touch
from compiled import library

c = library("sandbox.c")


def opens(opening: Running[int], file: Path) -> bool:
    """Say whether a call gives a descriptor of a file; close it."""
    if (fd := opening.result()) < 0:
        return False
    try:
        return os.path.samestat(os.fstat(fd), file.stat())
    finally:
        os.close(fd)


def tried(opener: str, folder: Path) -> list[tuple[Touch, bool]]:
    """Open a file for the guest, again and again, and change the path at one access each time.

    Returns:
        Each access, and whether the guest then got what it may not read.
    """
    allowed, secret = (bytes(folder / name) + b"\0" for name in ("guest/notes", "secret"))
    found = []
    with Harness() as uffd:
        if unseen := [limit for limit in uffd.limits if "System calls" in limit]:
            raise SystemExit(unseen[0])
        region = uffd.region(1, contents=allowed, name="path")
        call, guest = getattr(c, opener), bytes(folder / "guest")
        with uffd.record(every=True) as record:
            opening = uffd.start(call, guest, region.pointer())
            assert opens(opening, folder / "guest/notes")
        for nth in range(1, len(record) + 1):
            region.poke(0, allowed)
            with region.page(0).freeze(access="read", nth=nth) as freeze:
                opening = uffd.start(call, guest, region.pointer())
                frozen = freeze.wait()
                region.poke(0, secret)
                frozen.release()
                found.append((frozen.touch, opens(opening, folder / "secret")))
    return found


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "guest").mkdir()
    (folder / "guest/notes").touch()
    (folder / "secret").touch()
    for opener in ("sandbox_open", "sandbox_open_repaired"):
        found = tried(opener, folder)
        ours = [got_out for touch, got_out in found if touch.system_call is None]
        kernels = [got_out for touch, got_out in found if touch.system_call is not None]
        print(
            f"{opener}: the guest gets out at {sum(ours)} of our {len(ours)} accesses"
            f" and at {sum(kernels)} of the kernel's {len(kernels)}"
        )
