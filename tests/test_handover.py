"""Who handed something over, and that no stranger is ever taken for them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiouffd import handover
from aiouffd.errors import NotSupported, PeerError
from aiouffd.fds import OwnedFd
from aiouffd.handover import HandedRegion, Handover, pin_peer

UNKNOWN_OPTION = 9999  # to a kernel that has no SO_PEERPIDFD its number is just as unknown


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """Listen for a peer process."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fspath(tmp_path / "socket"))
        sock.listen()
        yield sock


@pytest.fixture
def child(listener: socket.socket) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that connects, then waits to be told to exit."""
    code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, listener.getsockname()], stdin=subprocess.PIPE
    ) as process:
        yield process
        process.kill()


@pytest.fixture
def peer_socket(listener: socket.socket, child: subprocess.Popen[bytes]) -> Iterator[socket.socket]:
    """Accept the child's connection."""
    sock, _ = listener.accept()
    with sock:
        yield sock


def end(child: subprocess.Popen[bytes]) -> None:
    """Let the child exit, and reap it."""
    child.communicate(b"\n", timeout=30)


def test_a_peer_is_pinned(peer_socket: socket.socket, child: subprocess.Popen[bytes]) -> None:
    """Pid, uid and gid are those of the process, and its pidfd fires when it exits."""
    with pin_peer(peer_socket) as peer:
        assert (peer.pid, peer.uid, peer.gid) == (child.pid, os.geteuid(), os.getegid())
        assert str(peer) == f"pid {child.pid} (uid {os.geteuid()})"
        assert not os.get_inheritable(peer.pidfd.fileno())
        assert not peer.exited()
        end(child)
        assert peer.exited()
        peer.kill()  # nobody is there any more, and nobody else is hit


def test_a_peer_can_be_killed(peer_socket: socket.socket, child: subprocess.Popen[bytes]) -> None:
    """The signal goes through the pidfd."""
    with pin_peer(peer_socket) as peer:
        peer.kill()
        assert child.wait(30) == -signal.SIGKILL


def test_a_peer_that_has_exited_is_refused(
    peer_socket: socket.socket, child: subprocess.Popen[bytes]
) -> None:
    """Nobody is there to be served."""
    end(child)
    with pytest.raises(PeerError, match="exited") as refused:
        pin_peer(peer_socket)
    assert refused.value.peer == f"pid {child.pid} (uid {os.geteuid()})"


def test_an_old_kernel_is_refused_unless_the_race_is_accepted(
    peer_socket: socket.socket, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without SO_PEERPIDFD a peer is pinned by its pid only when asked for."""
    monkeypatch.setattr(handover, "SO_PEERPIDFD", UNKNOWN_OPTION)
    with pytest.raises(NotSupported, match="allow_pid_race"):
        pin_peer(peer_socket)
    with pin_peer(peer_socket, allow_pid_race=True) as peer:
        assert peer.pid == child.pid
        assert not peer.exited()
    end(child)
    with pytest.raises(PeerError, match="has exited"):
        pin_peer(peer_socket, allow_pid_race=True)


def test_a_socket_without_a_peer_process_is_refused() -> None:
    """A socket that nobody connected has no one to pin."""
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(PeerError, match="cannot be pinned"):
        pin_peer(sock)


REUSE = textwrap.dedent(
    """
    # The peer connects and dies; its pid goes to a stranger, who must never be pinned.
    import os, signal, socket, sys
    from aiouffd import handover
    from aiouffd.errors import PeerError

    server = socket.socket(socket.AF_UNIX)
    server.bind(sys.argv[1])
    server.listen()
    peer = os.fork()
    if not peer:
        socket.socket(socket.AF_UNIX).connect(sys.argv[1])
        os._exit(0)
    sock, _ = server.accept()
    os.waitpid(peer, 0)
    with open("/proc/sys/kernel/ns_last_pid", "w") as file:
        file.write(str(peer - 1))
    stranger = os.fork()
    if not stranger:
        signal.pause()
    assert stranger == peer, (stranger, peer)
    try:
        handover.pin_peer(sock)
    except PeerError as error:
        print("refused:", error)
    else:
        print("a stranger was pinned")
    # The negative control: pid and pidfd_open do pin the stranger.
    handover.SO_PEERPIDFD = 9999
    with handover.pin_peer(sock, allow_pid_race=True) as pinned:
        print("the race pins", "the stranger" if not pinned.exited() else "nobody")
    os.kill(stranger, signal.SIGKILL)
    os.waitpid(stranger, 0)
    """
)


@pytest.mark.root
def test_a_reused_pid_never_names_a_stranger(tmp_path: Path) -> None:
    """Scenario 27: the peer exits and its pid is recycled; who has it now is not pinned."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("needs unshare: apt install util-linux")
    command = [unshare, "--pid", "--fork", "--mount-proc", sys.executable, "-c", REUSE]
    done = subprocess.run(
        [*command, os.fspath(tmp_path / "socket")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refused, race = done.stdout.splitlines()
    assert refused.startswith("refused:")
    assert "exited" in refused
    assert race == "the race pins the stranger"


def test_closing_a_hand_over_closes_all_of_it() -> None:
    """Every descriptor goes, once; those taken over stay."""
    fds = [OwnedFd(os.memfd_create("x")) for _ in range(3)]
    handed = Handover(fds[0], (HandedRegion(0x1000, 0x2000, 0, 4096),), (fds[1], fds[2]))
    assert str(handed.regions[0]) == "0x1000-0x3000"
    taken = OwnedFd(fds[1].detach())
    handed.close()
    handed.close()
    assert all(fd.closed for fd in fds)
    os.fstat(taken.fileno())
    taken.close()
