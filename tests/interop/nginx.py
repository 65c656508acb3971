"""Run nginx over a folder, plain and with TLS, on loopback.

Knows: its configuration, how to start and end it.
Must not know: aiouffd.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
from pathlib import Path

import trustme

from tests.interop.serving import LIMIT

_CONFIGURATION = """\
worker_processes 1; daemon off; master_process off;
pid {folder}/pid; error_log {folder}/errors;
events {{ worker_connections 1024; }}
http {{
  access_log off; root {folder}/www; sendfile on; keepalive_requests 1000000;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{ listen 127.0.0.1:{plain}; }}
  server {{
    listen 127.0.0.1:{tls} ssl;
    ssl_certificate {folder}/chain.pem; ssl_certificate_key {folder}/key.pem;
  }}
}}
"""


def free_ports(count: int) -> list[int]:
    """Give ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class Nginx:
    """A web server over ``www``.

    Attributes:
        www: The folder it serves.
        plain: Its port for http.
        tls: Its port for https.
        trust: What a client needs to trust it.
    """

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="aiouffd-nginx-"))
        folder.chmod(0o755)
        self._folder = folder
        self.www = folder / "www"
        self.www.mkdir()
        self.plain, self.tls = free_ports(2)
        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1")
        certificate.private_key_pem.write_to_path(folder / "key.pem")
        for blob in certificate.cert_chain_pems:
            blob.write_to_path(folder / "chain.pem", append=True)
        self.trust = ssl.create_default_context()
        authority.configure_trust(self.trust)
        (folder / "nginx.conf").write_text(
            _CONFIGURATION.format(folder=folder, plain=self.plain, tls=self.tls)
        )
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Run it until it listens."""
        path = self._folder
        # NGINX in the environment would mean sockets that another nginx hands on.
        environment = {name: value for name, value in os.environ.items() if name != "NGINX"}
        self._process = subprocess.Popen(
            ["nginx", "-c", path / "nginx.conf", "-p", path, "-e", path / "errors"],
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        async with asyncio.timeout(LIMIT):
            while not await self._listens():
                assert self._process.poll() is None, (path / "errors").read_text()
                await asyncio.sleep(0.01)

    async def _listens(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.plain)
        except ConnectionRefusedError:
            return False
        writer.close()
        await writer.wait_closed()
        return True

    async def stop(self) -> None:
        """Kill it: connections break."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(self._process.wait)
            self._process = None

    async def aclose(self) -> None:
        """End it, and leave nothing."""
        await self.stop()
        shutil.rmtree(self._folder)
