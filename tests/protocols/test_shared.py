"""Sharing an image: the parsers alone, then servers and clients that are real processes."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from aiouffd.errors import PeerError
from aiouffd.fds import OwnedFd
from aiouffd.handover import HandedRegion
from aiouffd.protocols import firecracker, shared
from aiouffd.protocols.shared import Invitation, InvitationParser, attach, describe, invitation
from aiouffd.reports import Ended, Refused, Report
from aiouffd.server import Server
from aiouffd.sharing import figures
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.shared import SharedImage
from aiouffd.sources.zero import ZeroSource
from aiouffd.testing.sources import PAGE, image
from aiouffd.uffd import Userfaultfd
from tests.attached import Attached
from tests.stand_in_vmm import HUGE, StandInVmm, eventually

SIZE: Final = 64 * PAGE + 100
WHOLE: Final = image(SIZE) + bytes(PAGE - 100)


# --- without any process ---------------------------------------------------------------


@pytest.fixture
def file() -> Iterator[OwnedFd]:
    """Give a descriptor to send along."""
    with OwnedFd(os.memfd_create("image")) as fd:
        yield fd


@pytest.mark.parametrize("with_byte", range(8))
def test_an_invitation_is_complete_with_its_last_byte(file: OwnedFd, with_byte: int) -> None:
    """Fed byte by byte, the descriptor with any of them."""
    parser = InvitationParser()
    data, found = invitation(SIZE), None
    for at in range(8):
        assert found is None
        found = parser.feed(data[at : at + 1], [file] if at == with_byte else ())
    assert found == Invitation(SIZE, file)
    parser.close()
    assert not file.closed


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([(9, 1)], "sent 9 bytes"),
        ([(8, 0)], "no memory file"),
        ([(4, 1), (4, 1)], "2 descriptors"),
    ],
)
def test_another_message_is_refused(pieces: list[tuple[int, int]], message: str) -> None:
    """Too many bytes, no descriptor, or two; all are closed."""
    parser = InvitationParser()
    fds: list[OwnedFd] = []
    with pytest.raises(PeerError, match=message):
        for length, count in pieces:
            mine = [OwnedFd(os.dup(0)) for _ in range(count)]
            fds += mine
            parser.feed(bytes(length), mine)
    parser.close()
    assert all(fd.closed for fd in fds)


def test_regions_are_said_as_firecracker_says_them() -> None:
    """Its parser reads them back."""
    regions = (
        HandedRegion(0x7000_0000, 8 * PAGE, 0, PAGE),
        HandedRegion(0x9000_0000, PAGE, 8, PAGE),
    )
    assert [one["offset"] for one in json.loads(describe(regions))] == [0, 8]
    with OwnedFd(os.dup(0)) as fd:
        message = firecracker.Parser().feed(describe(regions[:1]), [fd])
        assert message is not None
        assert message.regions == regions[:1]


# --- with a server ---------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(path: Path, reports: list[Report]) -> AsyncIterator[tuple[Server, SharedImage]]:
    """Serve a shared image."""
    copy = await SharedImage.fill(BufferSource(image(SIZE)))
    try:
        receive = shared.receiver(copy)
        async with Server(path, receive, copy, report=reports.append) as server:
            yield server, copy
    finally:
        await copy.aclose()


async def test_clones_attach_and_share(tmp_path: Path) -> None:
    """Two processes map the image, each writes for itself, and the figures know them both."""
    reports: list[Report] = []
    path = tmp_path / "socket"
    async with (
        serving(path, reports) as (server, copy),
        Attached.start(path, len(WHOLE)) as one,
        Attached.start(path, len(WHOLE)) as two,
    ):
        assert await one.ask("write 5 200") == "written"
        expected = bytearray(WHOLE)
        expected[5] = 200
        assert await two.ask("digest") == hashlib.sha256(WHOLE).hexdigest()
        assert await one.ask("digest") == hashlib.sha256(expected).hexdigest()
        found = await figures(copy, server.sessions)
        assert (found.clones, found.private_bytes) == (2, PAGE)
        assert found.saved_bytes == len(WHOLE) - PAGE
        sessions = tuple(server.sessions)
        assert {session.handover.dialect for session in sessions} == {"shared memory"}
        assert {session.figures().faults for session in sessions} == {
            64
        }  # all but the one asked about
    assert not [report for report in reports if isinstance(report, Refused)]
    assert len([report for report in reports if isinstance(report, Ended)]) == 2


async def test_a_clone_outlives_its_server(tmp_path: Path) -> None:
    """Nothing is lost with the server: what was not asked for yet reads right as well."""
    path = tmp_path / "socket"
    async with serving(path, []) as (server, _), Attached.start(path, len(WHOLE)) as clone:
        await server.aclose()
        assert await clone.ask("digest") == hashlib.sha256(WHOLE).hexdigest()


@pytest.mark.parametrize("huge", [False, True])
async def test_a_client_that_does_not_share_is_served_by_copies(
    tmp_path: Path, huge: bool, huge_pages: Callable[[int], None]
) -> None:
    """Anonymous memory gets the image's bytes; closing it poisons what is missing, as ever."""
    path = tmp_path / "socket"
    size = HUGE if huge else 64 * PAGE
    if huge:
        huge_pages(1)
    copy = await SharedImage.fill(BufferSource(image(size)))
    async with (
        Server(path, shared.receiver(copy), copy) as server,
        StandInVmm.start(path, size, huge=huge) as guest,
    ):
        await eventually(lambda: server.sessions, "it is served")
        (session,) = server.sessions
        assert session.handover.dialect == "firecracker 1.12"
        assert (await figures(copy, [session])).clones == 0
        if huge:
            assert await guest.read(0, size) == image(size)
        else:
            assert await guest.read(0, PAGE) == image(size)[:PAGE]
            await session.aclose()
            guest.tell("read", PAGE)
            assert await guest.status() == -signal.SIGBUS
    await copy.aclose()


async def test_an_image_of_holes_is_shared_too(tmp_path: Path) -> None:
    """The page that is asked about need not be there."""
    path = tmp_path / "socket"
    copy = await SharedImage.fill(ZeroSource(4 * PAGE))
    async with (
        Server(path, shared.receiver(copy), copy) as server,
        Attached.start(path, 4 * PAGE) as clone,
    ):
        (session,) = server.sessions
        assert session.handover.backed
        assert await clone.ask("digest") == hashlib.sha256(bytes(4 * PAGE)).hexdigest()
    await copy.aclose()


async def test_regions_outside_of_the_image_are_refused(tmp_path: Path) -> None:
    """Whoever maps more than there is."""
    reports: list[Report] = []
    path = tmp_path / "socket"
    with mmap.mmap(-1, 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        text = describe([HandedRegion(start, 2 * PAGE, 64 * PAGE, PAGE)])
        async with serving(path, reports):
            with (
                socket.socket(socket.AF_UNIX) as client,
                Userfaultfd.open(allow_user_mode_only=True) as uffd,
            ):
                client.connect(os.fspath(path))
                socket.send_fds(client, [text], [uffd.fileno()])
                await eventually(lambda: reports, "the refusal is reported")
                (refused,) = reports
                assert isinstance(refused, Refused)
                assert "but the image at" in refused.reason


class Imposter:
    """Listens, says something, and hangs up."""

    def __init__(self, path: Path, says: bytes, fds: int) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(os.fspath(path))
        self.listener.listen()
        self.says, self.fds = says, fds
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        peer, _ = self.listener.accept()
        with peer, OwnedFd(os.memfd_create("image")) as file:
            os.ftruncate(file.fileno(), PAGE)
            if self.says:
                socket.send_fds(peer, [self.says], [file.fileno()] * self.fds)
            peer.shutdown(socket.SHUT_WR)
            peer.recv(1 << 16)

    def close(self) -> None:
        self.thread.join(10)
        self.listener.close()


@pytest.mark.parametrize(
    ("says", "fds", "message"),
    [
        (b"", 0, "without an image"),
        (b"1234", 1, "without an image"),
        (bytes(8), 0, "no memory file"),
        (invitation(0), 1, "empty"),
        (invitation(PAGE), 1, "refused to serve us"),
    ],
)
async def test_what_is_no_server_of_an_image_is_said(
    tmp_path: Path, says: bytes, fds: int, message: str
) -> None:
    """Attaching fails with what was wrong, and leaves nothing."""
    imposter = Imposter(tmp_path / "socket", says, fds)
    try:
        with pytest.raises(PeerError, match=message):
            await asyncio.to_thread(attach, tmp_path / "socket")
    finally:
        await asyncio.to_thread(imposter.close)
