"""Connections that carry descriptors, and where a server's socket lies."""

from __future__ import annotations

import array
import asyncio
import errno
import os
import select
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from aiouffd.errors import ClosedError, PeerError
from aiouffd.fds import OwnedFd
from aiouffd.kernel import calls
from aiouffd.unix_socket import MAX_FDS, Connection, Listener
from tests.targets import DEADLINE

Pair = tuple[Connection, Connection]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """Connect two ends."""
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with Connection(one) as left, Connection(two) as right:
        yield left, right


@pytest.fixture
def memfd() -> Iterator[OwnedFd]:
    """Open a descriptor to send."""
    with OwnedFd(os.memfd_create("sent")) as fd:
        yield fd


# --- connections -----------------------------------------------------------------------


async def test_bytes_and_descriptors_arrive_together(pair: Pair, memfd: OwnedFd) -> None:
    """A descriptor comes with the read that covers its byte, close-on-exec and our own."""
    left, right = pair
    await left.send(b"hello", [memfd])
    data, fds = await right.receive()
    assert data == b"hello"
    assert len(fds) == 1
    with fds[0] as fd:
        assert fd.fileno() != memfd.fileno()
        assert os.path.samestat(os.fstat(fd.fileno()), os.fstat(memfd.fileno()))
        assert not os.get_inheritable(fd.fileno())


async def test_no_read_goes_past_bytes_that_carried_a_descriptor(
    pair: Pair, memfd: OwnedFd
) -> None:
    """Two messages with descriptors take two reads, however much is asked for."""
    left, right = pair
    await left.send(b"one", [memfd])
    await left.send(b"two", [memfd])
    for expected in (b"one", b"two"):
        data, fds = await right.receive()
        assert data == expected
        assert len(fds) == 1
        fds[0].close()


async def test_a_receive_waits_without_holding_the_loop(pair: Pair) -> None:
    """What comes later wakes the one who waits."""
    left, right = pair
    receiving = asyncio.ensure_future(right.receive())
    await asyncio.sleep(0)
    assert not receiving.done()
    await left.send(b"x")
    assert await receiving == (b"x", [])


async def test_the_end_of_the_stream_is_no_bytes(pair: Pair) -> None:
    """After the peer has closed, every receive gives nothing."""
    left, right = pair
    left.close()
    assert await right.receive() == (b"", [])
    assert await right.receive() == (b"", [])


async def test_a_peer_that_left_bytes_unread_is_the_end_as_well(pair: Pair) -> None:
    """A reset is no error here: nothing more will come."""
    left, right = pair
    await right.send(b"never read")
    left.close()
    assert await right.receive() == (b"", [])


async def test_a_send_larger_than_the_socket_waits_for_the_reader(
    pair: Pair, memfd: OwnedFd
) -> None:
    """Megabytes arrive whole, with the descriptor once, at the start."""
    left, right = pair
    sending = asyncio.ensure_future(left.send(bytes(4 << 20), [memfd]))
    received, carried = 0, []
    while received < 4 << 20:
        data, fds = await right.receive()
        received += len(data)
        carried.append(len(fds))
        for fd in fds:
            fd.close()
    await sending
    assert carried[0] == 1
    assert not any(carried[1:])


async def test_descriptors_need_a_byte(pair: Pair, memfd: OwnedFd) -> None:
    """Descriptors without a byte would never arrive."""
    with pytest.raises(ValueError, match="travel with a byte"):
        await pair[0].send(b"", [memfd])


async def test_too_many_descriptors_are_refused_and_closed(pair: Pair, memfd: OwnedFd) -> None:
    """More than MAX_FDS in one message: none of them stays open (the leak check looks)."""
    left, right = pair
    await left.send(b"x", [memfd] * (MAX_FDS + 1))
    with pytest.raises(PeerError, match="more than 16 descriptors"):
        await right.receive()
    await left.send(b"x", [memfd] * MAX_FDS)
    _, fds = await right.receive()
    assert len(fds) == MAX_FDS
    for fd in fds:
        fd.close()


async def test_other_ancillary_data_holds_no_descriptor(pair: Pair) -> None:
    """Credentials that a peer sends along are not taken for descriptors."""
    left, right = pair
    right.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    credentials = array.array("i", [os.getpid(), os.getuid(), os.getgid()])
    left.socket.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)])
    assert await right.receive() == (b"x", [])


async def test_closing_wakes_who_waits(pair: Pair) -> None:
    """A pending receive and a pending send both end in ClosedError; so do later ones."""
    left, _ = pair
    receiving = asyncio.ensure_future(left.receive())
    sending = asyncio.ensure_future(left.send(bytes(4 << 20)))
    await asyncio.sleep(0)
    left.close()
    left.close()
    for task in (receiving, sending):
        with pytest.raises(ClosedError):
            await task
    with pytest.raises((ClosedError, OSError)):
        await left.receive()


async def test_a_cancelled_receive_loses_nothing(pair: Pair) -> None:
    """What comes afterwards is there for the next receive."""
    left, right = pair
    receiving = asyncio.ensure_future(right.receive())
    await asyncio.sleep(0)
    receiving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await receiving
    await left.send(b"x")
    assert await right.receive() == (b"x", [])


async def test_a_second_reader_is_refused(pair: Pair) -> None:
    """Two tasks would steal each other's bytes."""
    _, right = pair
    receiving = asyncio.ensure_future(right.receive())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="reader"):
        await right.receive()
    receiving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await receiving


# --- who has sent it -------------------------------------------------------------------

SENDER = """
import os, socket, sys
socket.send_fds(socket.socket(fileno=int(sys.argv[1])), [b"child"], [0])
os.read(0, 1)
"""


def _start_sender(sock: socket.socket) -> subprocess.Popen[bytes]:
    """Let a process of its own send a text with a descriptor, and live until its stdin ends."""
    command = [sys.executable, "-c", SENDER, str(sock.fileno())]
    return subprocess.Popen(command, pass_fds=[sock.fileno()], stdin=subprocess.PIPE)


@pytest.fixture
async def passing(tmp_path: Path) -> AsyncIterator[tuple[socket.socket, Connection]]:
    """Connect a plain socket to a listener that passes senders on."""
    with Listener.bind(tmp_path / "socket") as listener:
        if not listener.pass_senders():
            pytest.skip("SO_PASSPIDFD is missing: that is Linux 6.5")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(os.fspath(tmp_path / "socket"))
            connection = listener.accept()
            assert connection is not None
            with connection:
                yield client, connection


async def test_each_sender_is_known(passing: tuple[socket.socket, Connection]) -> None:
    """Who has sent a message is held by a pidfd, whoever has connected; no read joins two."""
    client, connection = passing
    with _start_sender(client) as child:
        assert select.select([connection.socket], [], [], DEADLINE)[0]
        client.send(b"parent")
        for text, pid, count in ((b"child", child.pid, 1), (b"parent", os.getpid(), 0)):
            data, fds, sender = await connection.receive_from()
            assert (data, len(fds)) == (text, count)
            for fd in fds:
                fd.close()
            assert sender is not None
            with sender:
                assert calls.pid_of(sender.fileno()) == pid
                assert not os.get_inheritable(sender.fileno())
        child.communicate(timeout=DEADLINE)


async def test_a_sender_that_is_gone_is_nobody(
    passing: tuple[socket.socket, Connection],
) -> None:
    """What a process has sent before it was reaped comes all the same, with its descriptors."""
    client, connection = passing
    with _start_sender(client) as child:
        child.communicate(timeout=DEADLINE)
    data, fds, sender = await connection.receive_from()
    assert data == b"child"
    assert len(fds) == 1
    fds[0].close()
    if sender is not None:  # Linux 6.15 and later give a pidfd that says that it has exited
        with sender:
            assert calls.pid_of(sender.fileno()) == -1


async def test_a_sender_that_nobody_asked_for_is_let_go(
    passing: tuple[socket.socket, Connection],
) -> None:
    """A plain receive leaves no pidfd behind."""
    client, connection = passing
    before = set(os.listdir("/proc/self/fd"))
    client.send(b"x")
    assert await connection.receive() == (b"x", [])
    assert set(os.listdir("/proc/self/fd")) == before


async def test_no_sender_comes_without_being_asked_for(pair: Pair) -> None:
    """Where the listener does not pass them there are none."""
    left, right = pair
    await left.send(b"x")
    assert await right.receive_from() == (b"x", [], None)


# --- listeners -------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Name a socket in a directory of our own."""
    return tmp_path / "socket"


async def test_a_socket_is_private_from_its_birth(path: Path) -> None:
    """It is 0600, nothing else lies beside it, and it is gone after the close."""
    with Listener.bind(path):
        status = path.lstat()
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert os.listdir(path.parent) == ["socket"]
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
async def test_the_rights_are_what_was_asked_for(path: Path, mode: int) -> None:
    """Whatever the umask."""
    before = os.umask(0o077)
    try:
        with Listener.bind(path, mode=mode):
            assert stat.S_IMODE(path.lstat().st_mode) == mode
    finally:
        os.umask(before)


async def test_who_connects_is_accepted(path: Path) -> None:
    """Accepting never waits; a connection carries bytes at once."""
    with Listener.bind(path) as listener:
        assert listener.accept() is None
        with await Connection.open(path) as client:
            server = listener.accept()
            assert server is not None
            with server:
                await client.send(b"x")
                assert await server.receive() == (b"x", [])


async def test_a_full_queue_is_waited_for(path: Path) -> None:
    """More clients than the kernel holds connect as soon as there is room."""
    with Listener.bind(path, backlog=1) as listener:
        clients = [asyncio.ensure_future(Connection.open(path)) for _ in range(8)]
        served = 0
        while served < 8:
            await asyncio.sleep(0)
            connection = listener.accept()
            if connection is not None:
                with connection:
                    await connection.send(b"x")
                served += 1
        for client in await asyncio.gather(*clients):
            with client:
                assert await client.receive() == (b"x", [])


async def test_a_missing_directory_is_made(tmp_path: Path) -> None:
    """It is ours alone."""
    with Listener.bind(tmp_path / "run" / "socket"):
        assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700


async def test_a_long_path_is_no_problem(tmp_path: Path) -> None:
    """The 108 bytes of a socket address do not limit where the server's socket lies."""
    directory = tmp_path / ("x" * 200)
    with Listener.bind(directory / "socket"):
        assert stat.S_ISSOCK((directory / "socket").lstat().st_mode)


async def test_a_dead_servers_socket_is_replaced(path: Path) -> None:
    """A name that nobody listens on any more stands in nobody's way."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    with Listener.bind(path), await Connection.open(path):
        pass


async def test_a_living_servers_name_is_taken_only_when_asked(path: Path) -> None:
    """A second server is refused, unless it says that it takes over; the first cannot undo it."""
    with Listener.bind(path) as first:
        with pytest.raises(OSError) as refused:
            Listener.bind(path)
        assert refused.value.errno == errno.EADDRINUSE
        assert first.accept() is None  # nor does it take the second for a peer
        with Listener.bind(path, replace=True) as second:
            first.close()
            with await Connection.open(path):
                accepted = second.accept()
                assert accepted is not None
                accepted.close()
    assert not path.exists()


async def test_a_file_that_is_no_socket_stays(path: Path) -> None:
    """A mistyped path destroys nothing."""
    path.write_text("precious")
    for replace in (False, True):
        with pytest.raises(FileExistsError):
            Listener.bind(path, replace=replace)
    assert path.read_text() == "precious"


async def test_a_name_that_is_gone_is_not_missed(path: Path) -> None:
    """Somebody else has removed it: closing is as quiet as ever, and may be done twice."""
    listener = Listener.bind(path)
    path.unlink()
    listener.close()
    listener.close()
    with pytest.raises(ClosedError):
        listener.fileno()


async def test_a_directory_that_others_write_to_is_refused(tmp_path: Path) -> None:
    """Somebody else could put a socket of their own in its place."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(PermissionError, match="others may write"):
        Listener.bind(shared / "socket")
    shared.chmod(0o1777)  # sticky: nobody can remove another's name
    Listener.bind(shared / "socket").close()
    shared.chmod(0o777)
    Listener.bind(shared / "socket", any_directory=True).close()


@pytest.mark.root
async def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """Its owner could put a socket of their own in its place."""
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    os.chown(foreign, 12345, 12345)
    with pytest.raises(PermissionError, match="belongs to uid 12345"):
        Listener.bind(foreign / "socket")
    Listener.bind(foreign / "socket", any_directory=True).close()
