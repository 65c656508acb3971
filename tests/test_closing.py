"""What cannot be settled is never closed."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest

from aiouffd.closing import settle
from aiouffd.errors import ResolutionRefused
from aiouffd.fds import OwnedFd
from aiouffd.handover import HandedRegion, Handover
from aiouffd.service import Service
from aiouffd.session import Session
from aiouffd.sources.buffer import BufferSource
from aiouffd.uffd import Userfaultfd
from tests.stand_in_vmm import PAGE


def unsettled_uffd() -> tuple[mmap.mmap, int, Userfaultfd]:
    """Register memory behind the end of its file: the kernel refuses to poison it."""
    with OwnedFd(os.memfd_create("short")) as file:
        os.ftruncate(file.fileno(), 4 * PAGE)
        memory = mmap.mmap(file.fileno(), 4 * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        uffd = Userfaultfd.open(allow_user_mode_only=True)
        uffd.register(start, 4 * PAGE)
        os.ftruncate(file.fileno(), PAGE)
    return memory, start, uffd


@pytest.mark.parametrize("how", ["aclose", "start", "settle"])
async def test_what_cannot_be_settled_stays_open(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody can be killed: the last descriptor is not closed, for that would make zeros."""
    memory, start, uffd = unsettled_uffd()
    number = uffd.fileno()
    handover = Handover(uffd.detach(), (HandedRegion(start, 4 * PAGE, 0, PAGE),))
    with memory, pytest.raises(ResolutionRefused):
        if how == "settle":
            await settle(handover, Service(), None)
        else:
            size = 4 * PAGE if how == "aclose" else PAGE  # too small: start() refuses it
            async with Session(handover, BufferSource(bytes(size))):
                pass
    assert handover.fd.closed
    assert f"descriptor {number} stays open" in caplog.text
    with Userfaultfd.adopt(number):  # it is one still, and ours to close
        pass
