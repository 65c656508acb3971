"""The control API over its socket, with real sessions; every answer is held to openapi.json."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from aiouffd.control import Control
from aiouffd.errors import SourceError
from aiouffd.failure import Action, FailurePolicy
from aiouffd.protocols import firecracker
from aiouffd.server import Server
from aiouffd.service import Service
from aiouffd.sources import Source
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.file import FileSource
from aiouffd.sources.measured import MeasuredSource, Reads
from aiouffd.status import Status
from aiouffd.testing.sources import image
from tests.control_asking import OPENAPI, ask
from tests.stand_in_vmm import PAGE, StandInVmm, eventually

SIZE: Final = 64 * PAGE


class Held:
    """The image, of which the last quarter waits to be let go, or fails."""

    def __init__(self) -> None:
        self.data = image(SIZE)
        self.size = SIZE
        self.gate = asyncio.Event()
        self.broken = False

    def extents(self) -> Iterator[tuple[int, int]]:
        yield 0, SIZE

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        return self.data[offset : offset + length] if offset < SIZE * 3 // 4 else None

    async def read(self, offset: int, length: int) -> bytes:
        if offset >= SIZE * 3 // 4:
            await self.gate.wait()
        if self.broken:
            raise SourceError("the store is gone")
        return self.data[offset : offset + length]

    async def aclose(self) -> None:
        pass


@contextlib.asynccontextmanager
async def controlled(
    folder: Path, source: Source | None = None, **options: Any
) -> AsyncIterator[tuple[Server, Path]]:
    """Run a server and its control socket."""
    reads = Reads("image")
    measured = MeasuredSource(source or BufferSource(image(SIZE)), "image", reads)
    service = options.pop("service", Service())
    server = Server(
        folder / "socket",
        firecracker.receive,
        measured,
        service=service,
        report=lambda _: None,
    )
    path = folder / "control"
    async with server:
        status = Status(server, reads=[reads], image="the image")
        async with Control(status, path, **options):
            yield server, path


@contextlib.asynccontextmanager
async def guest_of(server: Server, **options: Any) -> AsyncIterator[StandInVmm]:
    """Run a VMM until it is served."""
    before = server.served
    async with StandInVmm.start(server.path, SIZE, **options) as guest:
        await eventually(lambda: server.served > before, "it is served")
        yield guest


async def test_it_tells_what_there_is(tmp_path: Path) -> None:
    """Health, sums, the table of sessions, and one session with a map of its pages."""
    held = Held()
    async with controlled(tmp_path, held) as (server, path):
        status, health = await ask(path, "GET", "/v1/health")
        assert (status, health["status"], health["pid"]) == (200, "serving", os.getpid())
        assert health["image"] == "the image"
        assert await ask(path, "GET", "/v1/sessions") == (200, {"sessions": []})
        async with guest_of(server, regions=2) as guest:
            assert await guest.read(0, 4 * PAGE) == image(SIZE)[: 4 * PAGE]
            await guest.ask("remove", PAGE, 2 * PAGE)
            waiting = guest.tell("read", 63 * PAGE)
            (session,) = server.sessions
            await eventually(lambda: session.in_flight == 1, "a fault waits")
            _, table = await ask(path, "GET", "/v1/sessions")
            (row,) = table["sessions"]
            assert row["peer"]["pid"] == guest.process.pid
            assert (row["id"], row["state"], row["in_flight"]) == ("1", "serving", 1)
            _, one = await ask(path, "GET", "/v1/sessions/1?cells=8")
            first, second = (region["map"] for region in one["regions"])
            assert (first["filled"], second["filled"]) == ([2] + [0] * 7, [0] * 8)
            assert first["removed"] == [2] + [0] * 7
            assert first["absent"] == [0] + [4] * 7
            assert second["in_flight"] == [0] * 7 + [1]
            assert one["counters"]["faults"] == one["counters"]["ended"] + one["in_flight"] == 5
            held.gate.set()
            await waiting
        await eventually(lambda: not server.sessions, "its end is seen")
        _, stats = await ask(path, "GET", "/v1/stats")
        assert (stats["served"], stats["living"], stats["sessions"]) == (1, 0, {"target_gone": 1})
        assert stats["counters"]["ended"] == stats["latency"]["count"] == 5
        assert stats["outcomes"] == {"copy": 5}
        assert stats["sharing"] is None
        (source,) = stats["sources"]
        assert (source["at_hand"], source["waited"], source["bytes"]) == (4, 1, 5 * PAGE)


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "/v1/sessions/7", 404),
        ("POST", "/v1/sessions/7/close", 404),
        ("POST", "/v1/sessions/7/complete", 404),
        ("POST", "/v1/sessions/7/snapshot?path=/nowhere/at/all", 404),
        ("POST", "/v1/sessions/7/snapshot", 400),
        ("POST", "/v1/sessions/7/snapshot?path=relative", 400),
        ("POST", "/v1/sessions/7/snapshot?path=/nowhere/at/all&whole=yes", 400),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/health", 405),
        ("GET", "/v1/sessions/7?cells=0", 400),
        ("GET", "/v1/sessions/7?cells=many", 400),
        ("POST", "/v1/sessions/7/close?action=raise", 400),
        ("POST", "/v1/sessions/7/close?wait=nan", 400),
        ("POST", "/v1/drain?wait=-1", 400),
        ("GET", "/metrics", 501),
    ],
)
async def test_what_cannot_be_is_said_in_json(
    tmp_path: Path, method: str, target: str, status: int
) -> None:
    """An error and a hint, for every mistake."""
    async with controlled(tmp_path) as (_, path):
        answered, body = await ask(path, method, target)
        assert answered == status, body
        assert body["error"]


async def test_a_session_is_closed_when_told(tmp_path: Path) -> None:
    """By the action asked for; what cannot be waited for goes on by itself."""
    async with controlled(tmp_path) as (server, path):
        async with guest_of(server) as guest:
            assert await guest.read(0) == image(SIZE)[:1]
            answered, body = await ask(path, "POST", "/v1/sessions/1/close?action=zero")
            assert (answered, body["state"]) == (200, "failed")
            assert "zero" in body["outcome"]
            assert await guest.read(PAGE, 1) == b"\0"
        async with guest_of(server) as guest:
            answered, _ = await ask(path, "POST", "/v1/sessions/2/close?action=kill&wait=0")
            assert answered in {200, 202}
            assert await guest.status() == -9
        await eventually(lambda: not server.sessions, "both have ended")


async def test_a_session_is_completed_once_for_all_who_ask(tmp_path: Path) -> None:
    """202 while it goes on, 200 when it is done; the target has every byte and no server."""
    held = Held()
    async with controlled(tmp_path, held) as (server, path):
        async with guest_of(server) as guest:
            answered, body = await ask(path, "POST", "/v1/sessions/1/complete?wait=0")
            assert (answered, body["state"]) == (202, "serving")
            waiting = [
                asyncio.ensure_future(ask(path, "POST", "/v1/sessions/1/complete"))
                for _ in range(2)
            ]
            answered, _ = await ask(path, "POST", "/v1/sessions/1/complete?wait=0.01")
            assert answered == 202
            held.gate.set()
            for one in waiting:
                answered, body = await one
                assert (answered, body["state"]) == (200, "detached")
            await eventually(lambda: not server.sessions, "it has ended")
            assert await guest.read(0, SIZE) == image(SIZE)
        assert (await ask(path, "GET", "/v1/stats"))[1]["sessions"] == {"detached": 1}


async def test_a_snapshot_is_taken_while_it_is_served(tmp_path: Path) -> None:
    """A layer with what was written and given back, without what never came; then all of it."""
    held = Held()
    target = f"/v1/sessions/1/snapshot?stop=1&path={tmp_path}/"
    expected = bytearray(image(SIZE))
    expected[PAGE : PAGE + 2] = b"\xaa\xbb"
    expected[2 * PAGE : 3 * PAGE] = bytes(PAGE)
    async with controlled(tmp_path, held) as (server, path), guest_of(server) as guest:
        await guest.ask("write", PAGE, "aabb")
        await guest.ask("remove", 2 * PAGE, PAGE)
        answered, taken = await ask(path, "POST", target + "layer")
        assert (answered, taken["written_bytes"], taken["zero_bytes"]) == (200, PAGE, PAGE)
        layer = FileSource(tmp_path / "layer")
        assert list(layer.extents()) == [(PAGE, 2 * PAGE)]
        assert await layer.read(PAGE, 2 * PAGE) == expected[PAGE : 3 * PAGE]
        await layer.aclose()
        layer_inode = os.stat(tmp_path / "layer").st_ino
        answered, body = await ask(path, "POST", target + "whole&whole=1&wait=0")
        assert (answered, body["state"]) == (202, "serving")
        held.gate.set()
        await eventually((tmp_path / "whole").exists, "it is written")
        assert (tmp_path / "whole").read_bytes() == expected
        assert stat.S_IMODE(os.stat(tmp_path / "whole").st_mode) == 0o600
        for name in ("no/such/folder", "layer"):  # nothing is overwritten: it may be the image
            answered, body = await ask(path, "POST", target + name)
            assert answered == 409, body
        assert os.stat(tmp_path / "layer").st_ino == layer_inode
        assert await guest.read(0, SIZE) == expected


async def test_what_cannot_be_completed_is_served_on(tmp_path: Path) -> None:
    """409 and why; when the store is back, so is the order."""
    held = Held()
    held.broken = True
    held.gate.set()
    async with controlled(tmp_path, held) as (server, path), guest_of(server) as guest:
        answered, body = await ask(path, "POST", "/v1/sessions/1/complete")
        assert answered == 409, body
        assert "the store is gone" in body["error"]
        assert (await ask(path, "GET", "/v1/sessions/1"))[1]["state"] == "serving"
        held.broken = False
        answered, body = await ask(path, "POST", "/v1/sessions/1/complete")
        assert (answered, body["state"]) == (200, "detached")
        assert await guest.read(0, SIZE) == image(SIZE)


async def test_a_drain_refuses_and_waits(tmp_path: Path) -> None:
    """202 as long as somebody is served; the one who waits hears of the end."""
    async with controlled(tmp_path) as (server, path):
        async with guest_of(server) as guest:
            answered, body = await ask(path, "POST", "/v1/drain?wait=0")
            assert (answered, body) == (202, {"draining": True, "living": 1})
            assert (await ask(path, "GET", "/v1/health"))[1]["status"] == "draining"
            assert not Path(server.path).exists()
            waiting = asyncio.ensure_future(ask(path, "POST", "/v1/drain"))
            assert await guest.read(0, SIZE) == image(SIZE)
        assert await waiting == (200, {"draining": False, "living": 0})
        await server.wait_closed()


async def test_only_the_owner_may_ask(tmp_path: Path) -> None:
    """The socket is 0600, and the uid that the kernel names is looked at too."""
    async with controlled(tmp_path, uids=[12345]) as (_, path):
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        answered, body = await ask(path, "GET", "/v1/health")
        assert (answered, body["error"]) == (
            403,
            f"uid {os.geteuid()} may not use this control socket",
        )
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match="socket's directory"):
        async with controlled(tmp_path, any_directory=False):
            pass
    tmp_path.chmod(0o700)


async def test_it_ends_though_clients_hang_on(tmp_path: Path) -> None:
    """An idle connection and one that waits for ever do not hold up the end."""
    loop = asyncio.get_running_loop()
    source = BufferSource(image(SIZE))
    server = Server(tmp_path / "socket", firecracker.receive, source, report=lambda _: None)
    path = tmp_path / "control"
    with socket.socket(socket.AF_UNIX) as idle, socket.socket(socket.AF_UNIX) as waiting:
        async with server, guest_of(server):  # somebody lives, so that the drain goes on
            async with asyncio.timeout(20):  # aiohttp by itself takes a minute
                async with Control(Status(server), path):
                    for sock, what in ((idle, "GET /v1/health"), (waiting, "POST /v1/drain")):
                        sock.setblocking(False)
                        await loop.sock_connect(sock, str(path))
                        request = f"{what} HTTP/1.1\r\nHost: x\r\n\r\n"
                        await loop.sock_sendall(sock, request.encode())
                    assert b"200 OK" in await loop.sock_recv(idle, 4096)
                    await eventually(lambda: server.draining, "the drain is asked for")
            assert len(server.sessions) == 1


async def test_faults_that_fail_are_counted_by_policy(tmp_path: Path) -> None:
    """The action, the class of the error, and the session's own error."""
    held = Held()
    held.broken = True
    held.gate.set()
    policy = FailurePolicy(retries=0, then=Action.ZERO)
    async with controlled(tmp_path, held, service=Service(failure=policy)) as (server, path):
        async with guest_of(server) as guest:
            assert await guest.read(63 * PAGE) == b"\0"
            _, one = await ask(path, "GET", "/v1/sessions/1")
            assert "the store is gone" in one["error"]
            assert one["errors"] == {"SourceError": 1}
        await eventually(lambda: not server.sessions, "its end is seen")
        _, stats = await ask(path, "GET", "/v1/stats")
        assert (stats["failures"], stats["failed"]) == ({"zero": 1}, 1)


async def test_without_aiohttp_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is left listening."""
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(ImportError, match=r"pip install 'aiouffd\[web\]'"):
        async with controlled(tmp_path):
            pass
    assert not (tmp_path / "control").exists()


def test_every_path_of_the_description_is_routed() -> None:
    """What is described is there, and what is there is described."""
    control = Control(None, "nowhere")  # type: ignore[arg-type]  # nothing is asked of it
    routed = {(method.lower(), path) for method, path, _ in control._routes()}
    described = {(method, path) for path, methods in OPENAPI["paths"].items() for method in methods}
    assert routed == described
