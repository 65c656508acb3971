"""TLS as CRIU has it: certificates on both sides, and the names in them checked by both.

Knows: what CRIU's TLS options mean, and where it looks for files that are not named.
Must not know: connections, the bytes on them.

Laws of this file:

* Both sides show a certificate, and both check the other's against authorities and, if they
  have been told an address of their own, against that: CRIU compares with its ``--address`` on
  either side.
* A server sends no session tickets: a dumper that waits for its first answer takes them for it
  and fails.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from typing import Final

from ...certificates import load_authorities, load_own, load_revoked

_AUTHORITIES: Final = "/etc/pki/CA/cacert.pem"
_REVOKED: Final = "/etc/pki/CA/cacrl.pem"
_CERTIFICATE: Final = "/etc/pki/criu/cert.pem"
_KEY: Final = "/etc/pki/criu/private/key.pem"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """What CRIU's options name.

    Attributes:
        cacert: The authorities that are trusted; None is the system's and CRIU's own file.
        cacrl: What is revoked; None is CRIU's own file if there is one.
        cert: Our certificate; None is CRIU's own file.
        key: Its key; None is CRIU's own file.
    """

    cacert: str | None = None
    cacrl: str | None = None
    cert: str | None = None
    key: str | None = None


def client_context(files: TlsFiles, *, check_name: bool = True) -> ssl.SSLContext:
    """Make the context of who connects.

    Args:
        files: Certificates.
        check_name: Whether the server's certificate must be for the name that is dialled.

    Raises:
        OSError: A file cannot be read, or is not what it should be.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = check_name
    _load(context, files)
    return context


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """Make the context of who is connected to.

    The names in clients' certificates are for the server to check, with ``certificates.is_for``.

    Raises:
        OSError: A file cannot be read, or is not what it should be.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0
    _load(context, files)
    return context


def _load(context: ssl.SSLContext, files: TlsFiles) -> None:
    # Not create_default_context: from Python 3.13 it is stricter than CRIU's GnuTLS, and refuses
    # certificates that the openssl command makes.
    if files.cacert is not None:
        load_authorities(context, files.cacert)
    else:
        context.set_default_verify_paths()
        if os.path.exists(_AUTHORITIES):
            load_authorities(context, _AUTHORITIES)
    if files.cacrl is not None or os.path.exists(_REVOKED):
        load_revoked(context, files.cacrl or _REVOKED)
    load_own(context, files.cert or _CERTIFICATE, files.key or _KEY)
