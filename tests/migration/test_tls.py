"""TLS contexts of a migration: who is let in, and by whose word."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import pytest
import trustme

from aiouffd.migration.tls import client_context, server_context


class Files:
    """An authority, and a certificate of its making, as files."""

    def __init__(self, folder: Path, name: str) -> None:
        authority = trustme.CA()
        issued = authority.issue_cert(name)
        self.authorities = os.fspath(folder / f"{name}.ca")
        self.certificate = os.fspath(folder / f"{name}.pem")
        self.key = os.fspath(folder / f"{name}.key")
        authority.cert_pem.write_to_path(self.authorities)
        issued.private_key_pem.write_to_path(self.key)
        for part in issued.cert_chain_pems:
            part.write_to_path(self.certificate, append=True)

    def client(self) -> ssl.SSLContext:
        return client_context(self.certificate, self.key, self.authorities)

    def server(self) -> ssl.SSLContext:
        return server_context(self.certificate, self.key, self.authorities)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("ours"), "there.example")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("others"), "there.example")


def shake_hands(
    client: ssl.SSLContext, server: ssl.SSLContext, name: str = "there.example"
) -> ssl.SSLObject:
    """Let both sides speak until they agree; give the client's."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = (
        client.wrap_bio(down, up, server_hostname=name),
        server.wrap_bio(up, down, server_side=True),
    )
    for _ in range(10):
        for side in sides:
            try:
                side.do_handshake()
                side.read(1)  # of the client's certificate the server speaks after its handshake
            except ssl.SSLWantReadError:
                pass
    return sides[0]


def test_they_know_each_other(ours: Files) -> None:
    """By TLS 1.3, with certificates on both sides."""
    client = shake_hands(ours.client(), ours.server())
    assert client.version() == "TLSv1.3"
    assert client.getpeercert()


def test_another_name_is_refused(ours: Files) -> None:
    """Though the authority is right."""
    with pytest.raises(ssl.SSLCertVerificationError, match=r"not valid for 'else\.example'"):
        shake_hands(ours.client(), ours.server(), "else.example")


def test_another_authority_is_refused_by_either_side(ours: Files, others: Files) -> None:
    """Whatever name it vouches for."""
    destination = server_context(others.certificate, others.key, ours.authorities)
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        shake_hands(ours.client(), destination)
    source = client_context(others.certificate, others.key, ours.authorities)
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        shake_hands(source, ours.server())


def test_who_shows_no_certificate_is_refused(ours: Files) -> None:
    """As is who speaks an older TLS."""
    nobody = ssl.create_default_context(cafile=ours.authorities)
    with pytest.raises(ssl.SSLError, match=r"(?i)peer did not return a certificate"):
        shake_hands(nobody, ours.server())
    old = ours.client()
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol"):
        shake_hands(old, ours.server())


def test_what_is_wrong_with_a_file_is_said(ours: Files, others: Files, tmp_path: Path) -> None:
    """By its name."""
    missing = os.fspath(tmp_path / "missing")
    for certificate, key, authorities, named in (
        (missing, None, ours.authorities, missing),
        (ours.certificate, missing, ours.authorities, missing),
        (ours.certificate, ours.key, missing, missing),
        (ours.certificate, others.key, ours.authorities, f"{ours.certificate} and {others.key}"),
    ):
        with pytest.raises(OSError) as caught:
            server_context(certificate, key, authorities)
        assert caught.value.filename == named
