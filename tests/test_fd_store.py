"""aiouffd.fd_store: what is said to systemd, byte for byte, and what comes back."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiouffd.errors import StoreError
from aiouffd.fd_store import MAX_NAME_BYTES, FdStore
from aiouffd.fds import OwnedFd


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The service manager's end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(10)
        yield sock


def _heard(manager: socket.socket) -> tuple[bytes, int]:
    data, fds, _, _ = socket.recv_fds(manager, 1000, 10)
    for fd in fds:
        os.close(fd)
    return data, len(fds)


def test_says_what_systemd_expects(manager: socket.socket) -> None:
    """A group goes in one message; its name is all that is needed to take it out."""
    one, two = os.pipe()
    with FdStore(manager.getsockname(), 5) as store:
        with OwnedFd(one) as owned, OwnedFd(two):
            store.put("aiouffd-1", [owned, two])
            assert len(store) == 2
        assert _heard(manager) == (b"FDSTORE=1\nFDNAME=aiouffd-1\nFDPOLL=0", 2)
        store.remove("never there")
        store.remove("aiouffd-1")
        assert _heard(manager) == (b"FDSTOREREMOVE=1\nFDNAME=aiouffd-1", 0)
        assert len(store) == 0
        assert store, "one that is empty is still one"


def test_the_limit_is_kept_here(manager: socket.socket) -> None:
    """What systemd would close without a word is refused; what it gave back counts."""
    pipe = [OwnedFd(fd) for fd in os.pipe()]
    with FdStore(manager.getsockname(), 3, [("old", fd) for fd in pipe]) as store:
        assert len(store) == 2
        store.put("one more", [0])
        with pytest.raises(StoreError, match="full"):
            store.put("too many", [0])
        store.remove("old")
        store.put("now", [0, 1])
    assert all(fd.closed for fd in pipe)
    for _ in range(3):
        _heard(manager)


def test_names_fit_into_the_environment(manager: socket.socket) -> None:
    """What could not be given back by name is refused: the next process would not start."""
    with FdStore(manager.getsockname(), 1 << 20) as store:
        name = "x" * 255
        group = [0] * 10
        while (len(store) + len(group)) * (len(name) + 1) <= MAX_NAME_BYTES:
            store.put(name, group)
            _heard(manager)
        with pytest.raises(StoreError, match="names"):
            store.put(name, group)
        names = ":".join([name] * len(store))
        subprocess.run(["true"], env={"LISTEN_FDNAMES": names}, check=True)
        with pytest.raises(OSError, match="too long"):
            subprocess.run(["true"], env={"LISTEN_FDNAMES": names + ":" + name * 35}, check=True)
        store.remove(name)
        store.put(name, group)


def test_barrier(manager: socket.socket) -> None:
    """The barrier falls when the manager has closed what came with it, and not before."""
    with FdStore(manager.getsockname(), 3) as store:
        assert not store.barrier(0.01)
        assert _heard(manager) == (b"BARRIER=1", 1)
        reader = threading.Thread(target=_heard, args=(manager,))
        reader.start()
        assert store.barrier()
        reader.join()


def test_nobody_reads(manager: socket.socket) -> None:
    """A manager that is gone is an error, not a silence."""
    with FdStore(manager.getsockname(), 3) as store:
        manager.close()
        with pytest.raises(StoreError, match="does not answer"):
            store.put("x", [0])
        assert not store.answers()


@pytest.mark.parametrize(
    "environment",
    [{}, {"NOTIFY_SOCKET": "/x"}, {"FDSTORE": "4"}, {"NOTIFY_SOCKET": "/x", "FDSTORE": "0"}],
)
def test_there_is_no_store(environment: dict[str, str]) -> None:
    """Without a notify socket and a limit above zero there is no store."""
    assert FdStore.from_environment((), environment) is None


def test_there_should_be_one(manager: socket.socket) -> None:
    """With both there is; if it does not listen that is an error."""
    path = manager.getsockname()
    with FdStore.from_environment((), {"NOTIFY_SOCKET": path, "FDSTORE": "9"}) as store:  # type: ignore[union-attr]
        assert store.limit == 9
        assert store.taken == {}
    with pytest.raises(OSError):
        FdStore.from_environment((), {"NOTIFY_SOCKET": path + "x", "FDSTORE": "9"})
