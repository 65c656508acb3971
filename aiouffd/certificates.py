"""Certificates as files, for TLS on either side, and names in a peer's certificate.

Knows: the ssl module, PEM files, what a certificate says of its owner.
Must not know: connections, options.

Law of this file: what is wrong with a file is an OSError that names it; OpenSSL does not.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import ssl
from collections.abc import Iterator, Mapping
from typing import Any


@contextlib.contextmanager
def naming(files: str | None, not_there: str) -> Iterator[None]:
    """Say which files an error is about.

    Args:
        files: Their names.
        not_there: What is not in them if they can be read: ``no certificate in PEM``.
    """
    try:
        yield
    except ssl.SSLError as error:
        raise OSError(error.errno, f"{not_there} ({error.reason})", files) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, files) from error


def load_authorities(context: ssl.SSLContext, file: str) -> None:
    """Trust the authorities in a file.

    Raises:
        OSError: It cannot be read, or has none.
    """
    with naming(file, "no certificates of authorities in PEM"):
        context.load_verify_locations(file)


def load_revoked(context: ssl.SSLContext, file: str) -> None:
    """Refuse the certificates that a revocation list names.

    Raises:
        OSError: It cannot be read, or is no such list.
    """
    with naming(file, "no list of revoked certificates in PEM"):
        context.load_verify_locations(file)
    context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF


def load_own(context: ssl.SSLContext, certificate: str, key: str | None) -> None:
    """Show a certificate to peers.

    Args:
        context: Of either side.
        certificate: The file.
        key: The file with its key, if that is another one.

    Raises:
        OSError: A file cannot be read, or the two do not belong together.
    """
    for file in (certificate, key):  # OpenSSL does not say which of the two is not there
        if file is not None:
            with naming(file, ""):
                os.close(os.open(file, os.O_RDONLY | os.O_CLOEXEC))
    files = " and ".join(one for one in (certificate, key) if one)
    with naming(files, "no certificate and its key in PEM"):
        context.load_cert_chain(certificate, key)


def is_for(certificate: Mapping[str, Any], name: str) -> bool:
    """Say whether a peer's certificate, which was verified, is for a name or an address.

    Python checks the name of a server itself; of a client it cannot.

    Args:
        certificate: As ``SSLSocket.getpeercert`` gives it.
        name: A host's name, or an IP address.
    """
    alternatives = certificate.get("subjectAltName", ())
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        pass
    else:
        given = (value for kind, value in alternatives if kind == "IP Address")
        return any(_is_address(value, address) for value in given)
    names = [value for kind, value in alternatives if kind == "DNS"]
    if not names:  # as older certificates have it
        subject = (pair for part in certificate.get("subject", ()) for pair in part)
        names = [value for kind, value in subject if kind == "commonName"]
    return any(_is_name(pattern, name) for pattern in names)


def _is_address(value: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    try:
        return ipaddress.ip_address(value.strip()) == address
    except ValueError:
        return False


def _is_name(pattern: str, name: str) -> bool:
    """Compare names; a star stands for the whole first part of one, and only for that."""
    pattern, name = pattern.lower().rstrip("."), name.lower().rstrip(".")
    if not pattern or "*" not in pattern:
        return bool(pattern) and pattern == name
    first, _, rest = pattern.partition(".")
    return first == "*" and "." in rest and "*" not in rest and name.partition(".")[2] == rest
