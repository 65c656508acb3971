"""TLS between the two sides of a migration: each shows a certificate, each checks the other's.

Knows: what a context of either side has to insist on.
Must not know: connections, options.

Law of this file: only authorities that were named are trusted, not those of the system: whoever
has a certificate for a web page could take a program in, or bring one.

Names are checked besides: the destination's by the context (``server_hostname``), the source's by
``listener.Listener(client_name=...)``.
"""

from __future__ import annotations

import ssl

from ..certificates import load_authorities, load_own


def client_context(certificate: str, key: str | None, authorities: str) -> ssl.SSLContext:
    """Make the context of the source, which connects.

    Args:
        certificate: Ours: a file, PEM.
        key: The file with its key; None: it is in the same.
        authorities: The file with those that may vouch for the destination.

    Raises:
        OSError: A file cannot be read, or is not what it should be.
    """
    return _load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certificate, key, authorities)


def server_context(certificate: str, key: str | None, authorities: str) -> ssl.SSLContext:
    """Make the context of the destination, which listens.

    Args:
        certificate: Ours: a file, PEM.
        key: The file with its key; None: it is in the same.
        authorities: The file with those that may vouch for a source.

    Raises:
        OSError: A file cannot be read, or is not what it should be.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    return _load(context, certificate, key, authorities)


def _load(
    context: ssl.SSLContext, certificate: str, key: str | None, authorities: str
) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    load_authorities(context, authorities)
    load_own(context, certificate, key)
    return context
