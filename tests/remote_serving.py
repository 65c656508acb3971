"""Memory of a real process, served from an image that lies somewhere else: tests to inherit.

The same tests run against servers in this process (tests/sources/test_remote_serving.py) and
against programs that nobody here wrote (tests/interop).

Knows: what an image is served from must survive: a restart, a replaced image.
Must not know: which server it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import signal
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from pathlib import Path
from typing import ClassVar

import pytest

from aiouffd.handover import pin_peer
from aiouffd.protocols import firecracker
from aiouffd.service import Service
from aiouffd.session import Session
from aiouffd.sources import Source
from aiouffd.testing.sources import image
from aiouffd.unix_socket import Listener
from tests.stand_in_vmm import PAGE, StandInVmm, eventually


class Place(ABC):
    """Where an image lies."""

    @abstractmethod
    async def put(self, data: bytes) -> None:
        """Store an image, in place of what is there."""

    @abstractmethod
    async def open(self) -> Source:
        """Open the image as a source."""

    @abstractmethod
    async def stop(self) -> None:
        """End the service, at once: connections break."""

    @abstractmethod
    async def start(self) -> None:
        """Begin the service again, at the same address, with the same image."""


@contextlib.asynccontextmanager
async def serving(
    place: Place, path: Path, size: int, chunk: int
) -> AsyncIterator[tuple[StandInVmm, Session]]:
    """Run a process whose memory a session serves from the image."""
    source = await place.open()
    assert source.size == size
    try:
        with Listener.bind(path) as listener:
            async with StandInVmm.start(path, size) as vmm:
                connection = listener.accept()
                assert connection is not None
                with pin_peer(connection.socket) as peer:
                    with connection:
                        handover = await firecracker.receive(connection)
                    service = Service(chunk=chunk)
                    async with Session(handover, source, peer=peer, service=service) as session:
                        yield vmm, session
                        with contextlib.suppress(ProcessLookupError):
                            vmm.kill()
                        await vmm.status()
    finally:
        await source.aclose()


@pytest.mark.root
class RemoteServing(ABC):
    """What every place for images is held to."""

    size: ClassVar[int] = 512 * PAGE
    chunk: ClassVar[int] = 0

    @abstractmethod
    def place(self) -> contextlib.AbstractAsyncContextManager[Place]:
        """Give a place with an image of ``image(size)``."""

    async def test_every_byte_is_the_images(self, tmp_path: Path, seed: int) -> None:
        """A process that touches all of its memory, in any order, finds the image there."""
        async with (
            self.place() as place,
            serving(place, tmp_path / "socket", self.size, self.chunk) as (vmm, session),
        ):
            digest = await vmm.ask("digest", seed)
            assert digest == hashlib.sha256(image(self.size)).hexdigest()
            assert session.figures().copied_bytes + session.figures().filled_bytes >= self.size
            assert session.error is None

    async def test_a_restart_in_the_middle_is_survived(self, tmp_path: Path, seed: int) -> None:
        """Faults that come while the service is down wait, and get the right bytes."""
        async with (
            self.place() as place,
            serving(place, tmp_path / "socket", self.size, self.chunk) as (vmm, session),
        ):
            digest = asyncio.ensure_future(vmm.ask("digest", seed))
            half = self.size // max(self.chunk, PAGE) // 2
            await eventually(lambda: session.figures().faults >= half, "half of the faults")
            await place.stop()
            waiting = session.figures().faults
            await eventually(lambda: session.pager.in_flight > 0, f"a fault after {waiting}")
            assert not digest.done()
            await place.start()
            assert await digest == hashlib.sha256(image(self.size)).hexdigest()
            assert session.error is None

    async def test_a_replaced_image_fails_closed(self, tmp_path: Path) -> None:
        """What was there stays; what was not is SIGBUS, never a byte of the new image."""
        async with (
            self.place() as place,
            serving(place, tmp_path / "socket", self.size, self.chunk) as (vmm, session),
        ):
            old, far = image(self.size), self.size - PAGE
            assert await vmm.read(0, PAGE) == old[:PAGE]
            await place.put(image(self.size, seed=1))
            assert await vmm.read(0, PAGE) == old[:PAGE]
            touch = vmm.tell("read", far, PAGE)
            assert await vmm.status() == -signal.SIGBUS
            with pytest.raises(ChildProcessError):
                await touch
            assert "changed while it was served" in str(session.error)
