"""Run a Ceph of one node, all in memory, with its S3 gateway, on loopback.

Knows: keys, maps, daemons, and how to end each by the number of its process.
Must not know: aiouffd.

A cluster takes some 15 s to begin and half a gigabyte.  Without ``tcp_nodelay`` each answer of
the gateway would take 44 ms: Nagle's algorithm waits for acknowledgements that are delayed.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Final

from tests.interop.nginx import free_ports
from tests.interop.serving import LIMIT

#: What Debian's packages bring.
PROGRAMS: Final = ("ceph", "ceph-mon", "ceph-mgr", "ceph-osd", "radosgw", "radosgw-admin")

KEY: Final = "AKTEST"
SECRET: Final = "SKTEST"

_CONFIGURATION = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]
mon initial members = a
public network = 127.0.0.0/8
public addr = 127.0.0.1
cluster addr = 127.0.0.1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
mon allow pool size one = true
osd objectstore = memstore
memstore device bytes = 2147483648
run dir = {folder}/run
admin socket = {folder}/run/$name.$pid.asok
log file = {folder}/run/$name.log
mon data = {folder}/mon
mgr data = {folder}/mgr
osd data = {folder}/osd
rgw data = {folder}/rgw
keyring = {folder}/keyring
rgw frontends = beast endpoint=127.0.0.1:{gateway} tcp_nodelay=1
"""


class Ceph:
    """A cluster of one monitor, one manager, one store and one gateway.

    Attributes:
        endpoint: The gateway's URL.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="aiouffd-ceph-", dir="/tmp"))
        v1, v2, self._gateway = free_ports(3)
        self.endpoint = f"http://127.0.0.1:{self._gateway}"
        for name in ("run", "mon", "mgr", "osd", "rgw"):
            (self._folder / name).mkdir()
        self._fsid = str(uuid.uuid4())
        self._monitor = f"[v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]"
        (self._folder / "ceph.conf").write_text(
            _CONFIGURATION.format(
                fsid=self._fsid, v1=v1, v2=v2, folder=self._folder, gateway=self._gateway
            )
        )

    def start(self) -> None:
        """Make the cluster and run it until the gateway answers."""
        folder, keyring = self._folder, self._folder / "keyring"
        tool = ("ceph-authtool", keyring, "--gen-key", "-n")
        self._run(*tool, "mon.", "--cap", "mon", "allow *", "--create-keyring")
        self._key("client.admin", mon="allow *", osd="allow *", mgr="allow *")
        self._key("mgr.x", mon="allow profile mgr", osd="allow *")
        allowed = {"mgr": "allow profile osd", "osd": "allow *"}
        self._key("osd.0", mon="allow profile osd", **allowed)
        self._key("client.rgw", mon="allow rw", osd="allow rwx", mgr="allow rw")
        made = ("monmaptool", "--create", "--clobber", "--fsid", self._fsid)
        self._run(*made, "--addv", "a", self._monitor, folder / "monmap")
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", folder / "monmap")
        self._run("ceph-mon", "-i", "a")
        self._run("ceph-mgr", "-i", "x")
        store = str(uuid.uuid4())
        self._run("ceph", "osd", "new", store, "0")
        self._run("ceph", "auth", "import", "-i", keyring)
        monmap = ("--monmap", folder / "monmap")
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", store, *monmap)
        place = ("host=local", "root=default")
        self._run("ceph", "osd", "crush", "add", "osd.0", "1.0", *place)
        self._run("ceph-osd", "-i", "0")
        self.start_gateway()
        user = ("--uid=t", "--display-name=t", f"--access-key={KEY}", f"--secret-key={SECRET}")
        self._run("radosgw-admin", "user", "create", *user)

    def start_gateway(self) -> None:
        """Run the gateway until it answers."""
        self._run("radosgw", "-n", "client.rgw")
        end = time.monotonic() + 2 * LIMIT
        while not self._answers():
            assert time.monotonic() < end, self.logs()
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.endpoint, timeout=LIMIT).close()
        except urllib.error.HTTPError as answer:
            answer.close()  # to know us it need not like us
        except OSError:
            return False
        return True

    def kill_gateway(self) -> None:
        """End the gateway at once, with whatever it is answering."""
        for pid in self._pids("client.rgw"):
            _end(pid, signal.SIGKILL)

    def close(self) -> None:
        """End all that was started, and leave nothing."""
        for pid in self._pids(""):
            _end(pid, signal.SIGKILL)
        shutil.rmtree(self._folder)

    def logs(self) -> str:
        """Give the ends of all logs."""
        logs = sorted((self._folder / "run").glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in logs)

    def _key(self, name: str, **allowed: str) -> None:
        capabilities = [part for who, what in allowed.items() for part in ("--cap", who, what)]
        keyring = self._folder / "keyring"
        self._run("ceph-authtool", keyring, "--gen-key", "-n", name, *capabilities)

    def _pids(self, daemon: str) -> list[int]:
        """Find our daemons by their sockets; a number that is another process by now is none."""
        found = []
        for path in (self._folder / "run").glob(f"{daemon}*.asok"):
            pid = int(path.name.rsplit(".", 2)[1])
            with contextlib.suppress(FileNotFoundError):
                if str(self._folder).encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(pid)
        return found

    def _run(self, *command: str | os.PathLike[str]) -> None:
        arguments = f"--conf {self._folder}/ceph.conf --keyring {self._folder}/keyring"
        done = subprocess.run(
            command,
            env={**os.environ, "CEPH_ARGS": arguments},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=4 * LIMIT,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr.decode()}\n{self.logs()}"


def _end(pid: int, number: int) -> None:
    """End a process that is nobody's child here, and wait until it has."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(pidfd, number)
            ready, _, _ = select.select([pidfd], [], [], LIMIT)
            assert ready, "a daemon survived its signal"
        finally:
            os.close(pidfd)
