"""What a service manager hears from a server, with the test as the service manager."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from aiouffd.fds import OwnedFd
from aiouffd.service_manager import ServiceManager, watchdog_seconds
from aiouffd.testing.sources import image
from aiouffd.unix_socket import Listener
from tests.cli.running_serve import SIZE, running
from tests.stand_in_vmm import ROOT, StandInVmm


class Manager:
    """The service manager's end of the notify socket."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.setblocking(False)
        self.heard: list[dict[str, str]] = []

    async def hear(self, name: str) -> dict[str, str]:
        """Give the next message that says something of this name."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(30):
            while True:
                text = (await loop.sock_recv(self.socket, 4096)).decode()
                fields = dict(line.split("=", 1) for line in text.splitlines())
                self.heard.append(fields)
                if name in fields:
                    return fields


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """A service manager; only who is told of its socket speaks to it."""
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    one = Manager(tmp_path / "notify")
    yield one
    one.socket.close()


@pytest.mark.child
async def test_a_server_is_ready_busy_and_stopping(tmp_path: Path, manager: Manager) -> None:
    """READY once it listens, STATUS as targets come and go, STOPPING when it drains."""
    async with running(tmp_path, NOTIFY_SOCKET=manager.path) as server:
        ready = await manager.hear("READY")
        assert ready == {"READY": "1", "STATUS": f"serving {tmp_path}/image"}
        async with StandInVmm.start(server.socket, SIZE):
            assert (await manager.hear("STATUS"))["STATUS"] == "1 sessions, 1 in all"
            server.process.terminate()
            stopping = await manager.hear("STOPPING")
            assert stopping == {"STOPPING": "1", "STATUS": "draining: 1 sessions live on"}
        assert (await manager.hear("STATUS"))["STATUS"] == "0 sessions, 1 in all"
        assert await server.end() == 0
    assert not any("WATCHDOG" in fields for fields in manager.heard)


@pytest.mark.child
async def test_a_server_that_is_ready_can_be_stopped(tmp_path: Path, manager: Manager) -> None:
    """From the moment on at which it says so: the signal drains, and is no sudden death."""
    async with running(tmp_path, NOTIFY_SOCKET=manager.path) as server:
        await manager.hear("READY")
        server.process.terminate()
        assert await server.end() == 0


@pytest.mark.child
async def test_a_loop_that_hangs_misses_its_pings(tmp_path: Path, manager: Manager) -> None:
    """Pings come from the loop while it runs, and stop when the process is stopped."""
    notify = manager.path
    async with running(tmp_path, NOTIFY_SOCKET=notify, WATCHDOG_USEC="100000") as server:
        for _ in range(3):
            assert await manager.hear("WATCHDOG") == {"WATCHDOG": "1"}
        server.process.send_signal(signal.SIGSTOP)
        while (await _state(server.process.pid)) != "T":
            await asyncio.sleep(0.001)
        while True:  # what was on the way
            try:
                manager.socket.recv(4096)
            except BlockingIOError:
                break
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await asyncio.get_running_loop().sock_recv(manager.socket, 4096)
        server.process.send_signal(signal.SIGCONT)
        await manager.hear("WATCHDOG")
        server.process.terminate()
        assert await server.end() == 0


async def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0]


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_for_us_or_not(environment: dict[str, str], seconds: float | None) -> None:
    """Only a time that was asked of this very process counts."""
    assert watchdog_seconds(environment) == seconds


async def test_without_a_service_manager_nobody_is_woken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No socket, no timer, though a watchdog's time stands in the environment."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "1000")
    with ServiceManager() as nobody:
        assert nobody._timer is None
        nobody.ready("serving")


async def test_a_deaf_service_manager_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server serves on."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    with caplog.at_level(logging.WARNING, "aiouffd"), ServiceManager() as deaf:
        deaf.ready("one\nline")
        deaf.stopping("two")
    assert [record.levelname for record in caplog.records] == ["WARNING"]


# --- socket activation -----------------------------------------------------------------


@contextlib.asynccontextmanager
async def activated(
    folder: Path, wanted: str, names: str, *, kind: int = socket.SOCK_STREAM, listen: bool = True
) -> AsyncIterator[tuple[asyncio.subprocess.Process, Path]]:
    """Start ``aiouffd serve --socket fd:NAME`` with a socket as descriptor 3."""
    (folder / "image").write_bytes(image(SIZE))
    path = folder / "made-by-the-manager"
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.bind(str(path))
        if listen:
            sock.listen()
        # A go-between puts the descriptor where it belongs, and its own number into LISTEN_PID.
        program = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3);"
            "os.environ['LISTEN_PID'] = str(os.getpid());"
            "os.execv(sys.executable, [sys.executable, '-m', 'aiouffd', 'serve', *sys.argv[2:]])"
        )
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program, str(sock.fileno())),
            *(str(folder / "image"), "--socket", f"fd:{wanted}", "--json"),
            cwd=ROOT,
            env=os.environ | {"LISTEN_FDS": "1", "LISTEN_FDNAMES": names},
            stdin=subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=[sock.fileno()],
        )
    try:
        yield process, path
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


@pytest.mark.child
async def test_a_passed_socket_is_served(tmp_path: Path) -> None:
    """By its name; targets may connect before the server runs, and its name outlives it."""
    async with activated(tmp_path, "vm", "vm") as (process, path):
        async with StandInVmm.start(path, SIZE) as guest:
            assert await guest.read(0, SIZE) == image(SIZE)
        process.terminate()
        async with asyncio.timeout(30):
            assert await process.wait() == 0
        assert path.exists()


@pytest.mark.child
@pytest.mark.parametrize(
    ("names", "kind", "listen", "message"),
    [
        ("web:vm2", socket.SOCK_STREAM, True, "passed no socket named vm (passed: web)"),
        ("vm", socket.SOCK_STREAM, False, "does not listen for Unix streams"),
        ("vm", socket.SOCK_DGRAM, False, "does not listen for Unix streams"),
    ],
)
async def test_a_wrong_socket_is_refused(
    tmp_path: Path, names: str, kind: int, listen: bool, message: str
) -> None:
    """Status 1, and which were passed."""
    async with activated(tmp_path, "vm", names, kind=kind, listen=listen) as (process, _):
        _, err = await process.communicate()
        assert process.returncode == 1
        assert message in err.decode()


def test_what_is_no_socket_is_not_adopted(tmp_path: Path) -> None:
    """It is closed, and said to be none."""
    fd = OwnedFd(os.open(tmp_path, os.O_RDONLY))
    with pytest.raises(ValueError, match="is no socket"):
        Listener.adopt(fd)
    assert fd.closed


def test_an_abstract_name_is_shown_as_one() -> None:
    """With an @, as everywhere."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"\0aiouffd-test-{os.getpid()}")
        sock.listen()
        with Listener.adopt(OwnedFd(os.dup(sock.fileno()))) as listener:
            assert listener.path == f"@aiouffd-test-{os.getpid()}"
            assert listener.accept() is None
