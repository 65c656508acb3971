"""Clones: processes that map a shared image privately, driven page by page.

Knows: how a target gets the memory file, maps it and registers it for minor faults.
Must not know: how the image was made, what a test is about.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

from aiouffd.fds import OwnedFd
from aiouffd.handover import HandedRegion, Handover, Peer
from aiouffd.kernel import abi, calls
from aiouffd.service import Service
from aiouffd.session import Session
from aiouffd.sources.shared import SharedImage
from aiouffd.uffd import Mode
from tests.targets import MINOR, PAGE, Target


class Clone(Target):
    """A target whose memory is a private mapping of an image; ``file`` is its number there."""

    def __init__(self, image: SharedImage, *, features: int = 0, threads: int = 2) -> None:
        super().__init__("anon", 1, features=abi.UFFD_FEATURE_MINOR_SHMEM | features, register=0)
        try:
            path = f"/proc/{os.getpid()}/fd/{image.fileno()}"
            self.file = self.tell(0, "open", path, convert=int).result()
            self.pages = -(-image.size // PAGE)
            self.base = self.map(self.length, self.file)
            calls.register(self.uffd, self.base, self.length, MINOR)
        except BaseException:
            self.close()
            raise

    def smaps(self) -> dict[str, int]:
        """Give what the kernel accounts for the mapping, in bytes."""
        wanted = f"{self.base:x}-"
        found: dict[str, int] = {}
        with open(f"/proc/{self.pid}/smaps", encoding="ascii", errors="replace") as file:
            inside = False
            for line in file:
                name, _, rest = line.partition(":")
                if " " in name:
                    inside = name.startswith(wanted)
                elif inside and rest.endswith("kB\n"):
                    found[name] = int(rest.split()[0]) << 10
        return found


@contextlib.asynccontextmanager
async def cloned(
    image: SharedImage, *, chunk: int = 0, features: int = 0
) -> AsyncIterator[tuple[Clone, Session]]:
    """Run a clone and the session that serves it."""
    with Clone(image, features=features) as clone:
        region = HandedRegion(clone.base, clone.length, 0, PAGE, Mode.MINOR)
        handover = Handover(OwnedFd(clone.take_uffd()), (region,))
        pidfd = OwnedFd(os.pidfd_open(clone.pid))
        with Peer(clone.pid, os.geteuid(), os.getegid(), pidfd) as peer:
            async with Session(handover, image, peer=peer, service=Service(chunk=chunk)) as session:
                yield clone, session
