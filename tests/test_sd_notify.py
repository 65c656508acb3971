"""aiouffd.sd_notify: what is said to a service manager, and what it has started us with."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from aiouffd.sd_notify import notify, take_listen_fds

_TAKER = """
import os
from aiouffd.sd_notify import take_listen_fds
os.environ["LISTEN_PID"] = os.environ.get("PID", str(os.getpid()))
for name, fd in take_listen_fds():
    print(name, fd.fileno(), os.read(fd.fileno(), 9).decode(), os.get_inheritable(fd.fileno()))
    fd.close()
print(len(take_listen_fds()), sorted(name for name in os.environ if name.startswith("LISTEN")))
"""


def _start(fds: list[int], **environment: str) -> str:
    """Start a process as a service manager does; give what it has to say."""
    count = len(fds)
    high = [os.dup(fd) for fd in fds]

    reader, writer = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, fd, 3 + n) for n, fd in enumerate(high)]
    actions.append((os.POSIX_SPAWN_DUP2, writer, 1))
    assert min([*high, reader]) >= 3 + count, "descriptors in the way"
    environment = {**os.environ, "LISTEN_FDS": str(count), **environment}
    pid = os.posix_spawn(
        sys.executable, [sys.executable, "-c", _TAKER], environment, file_actions=actions
    )
    os.close(writer)
    with open(reader, encoding="utf-8") as lines:
        text = lines.read()
    assert os.waitpid(pid, 0)[1] == 0
    for fd in high:
        os.close(fd)
    return text


@pytest.mark.parametrize("abstract", [False, True])
def test_says_it_with_descriptors(tmp_path: Path, abstract: bool) -> None:
    """A datagram arrives as it was said, on a path and on an abstract name, with its fds."""
    path = f"@aiouffd-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path.replace("@", "\0", 1))
        reader, writer = os.pipe()
        assert notify("FDSTORE=1\nFDNAME=x", [reader], path=path)
        os.close(reader)
        data, fds, _, _ = socket.recv_fds(manager, 100, 3)
        assert data == b"FDSTORE=1\nFDNAME=x"
        os.write(writer, b"through")
        assert os.read(fds[0], 10) == b"through"
        for fd in (*fds, writer):
            os.close(fd)


def test_nobody_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a service manager nothing is said; one that is gone is an error."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")
    with pytest.raises(OSError):
        notify("READY=1", path="/nonexistent/notify")


def test_takes_what_it_was_started_with() -> None:
    """Descriptors come with their names, close-on-exec, once, and only to whom they were meant."""
    pipes = [os.pipe() for _ in range(2)]
    for n, (_, writer) in enumerate(pipes):
        os.write(writer, b"pipe %d" % n)
    ends = [reader for reader, _ in pipes]
    assert _start(ends, LISTEN_FDNAMES="a.socket:state", PID="1") == "0 []\n"
    assert _start(ends, LISTEN_FDNAMES="a.socket") == (
        "a.socket 3 pipe 0 False\nunknown 4 pipe 1 False\n0 []\n"
    )
    for pipe in pipes:
        for fd in pipe:
            os.close(fd)


@pytest.mark.parametrize("count", ["", "x", "-1", "0"])
def test_nothing_to_take(count: str) -> None:
    """What is no count brings nothing."""
    environment = {"LISTEN_FDS": count, "LISTEN_PID": str(os.getpid())}
    assert take_listen_fds(environment) == []
    assert environment == {}
