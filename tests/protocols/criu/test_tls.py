"""TLS as CRIU has it: who is let in, and by which files."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path

import pytest
import trustme

from aiouffd.protocols.criu.tls import TlsFiles, client_context, server_context
from tests.serving import within


def files_of(authority: trustme.CA, folder: Path, name: str, who: str = "127.0.0.1") -> TlsFiles:
    """Issue a certificate and write all files that a side needs."""
    issued = authority.issue_cert(who)
    ca, cert, key = (str(folder / f"{name}-{kind}.pem") for kind in ("ca", "cert", "key"))
    authority.cert_pem.write_to_path(ca)
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    return TlsFiles(cacert=ca, cert=cert, key=key)


async def exchange(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> bytes:
    """Let the server say hello over TLS."""

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0, ssl=server) as listening:
        port = listening.sockets[0].getsockname()[1]
        reader, writer = await within(
            asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname=name)
        )
        try:
            return await within(reader.read(5))
        finally:
            writer.transport.abort()


async def test_both_sides_show_certificates_of_one_authority(tmp_path: Path) -> None:
    """And the name in the server's is checked."""
    authority = trustme.CA()
    client = client_context(files_of(authority, tmp_path, "client", "who@example.org"))
    server = server_context(files_of(authority, tmp_path, "server"))
    assert server.num_tickets == 0
    assert await exchange(client, server, "127.0.0.1") == b"hello"
    with pytest.raises(ssl.SSLCertVerificationError):
        await exchange(client, server, "elsewhere.example.org")
    unchecked = client_context(
        files_of(authority, tmp_path, "other", "who@example.org"), check_name=False
    )
    assert await exchange(unchecked, server, "elsewhere.example.org") == b"hello"


async def test_strangers_are_refused_on_either_side(tmp_path: Path) -> None:
    """A client without our authority's word learns nothing; nor does one trust another's server."""
    ours, other = trustme.CA(), trustme.CA()
    server_files = files_of(ours, tmp_path, "server")
    stranger = files_of(other, tmp_path, "stranger")
    server = server_context(server_files)
    with pytest.raises(ssl.SSLCertVerificationError):
        await exchange(client_context(stranger), server, "127.0.0.1")
    pretender = TlsFiles(cacert=server_files.cacert, cert=stranger.cert, key=stranger.key)
    heard = b""
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        heard = await exchange(client_context(pretender), server, "127.0.0.1")
    assert heard == b""


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    """CRIU's own where none is given."""
    with pytest.raises(OSError) as caught:
        server_context(TlsFiles(cert=str(tmp_path / "none.pem"), key=str(tmp_path / "none.pem")))
    assert caught.value.filename == str(tmp_path / "none.pem")
    files = files_of(trustme.CA(), tmp_path, "any")
    with pytest.raises(OSError) as caught:
        client_context(
            TlsFiles(cacert=files.cacert, cacrl=files.key, cert=files.cert, key=files.key)
        )
    assert caught.value.filename == files.key
