"""Options that both sides of a migration have: who is trusted, what is said of it, and where.

Knows: what they mean, and what goes together.
Must not know: migrations.

Law of this file: memory never goes over a network in the clear, and nobody is let in who did not
show who it is, unless that was asked for by name.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import UffdError
from .arguments import host_and_port, seconds
from .diagnostics import LEVELS

if TYPE_CHECKING:
    import ssl


def add_trust_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options that say who is trusted; give their group."""
    group = parser.add_argument_group("who is trusted")
    group.add_argument("--tls-cert", metavar="FILE", help="speak TLS, and show this certificate")
    group.add_argument("--tls-key", metavar="FILE", help="its key, if that is another file")
    group.add_argument(
        "--tls-cacert", metavar="FILE", help="the authorities that may vouch for the other side"
    )
    group.add_argument(
        "--plain",
        action="store_true",
        help="no TLS between machines either: who sees the network sees the memory, and can"
        " change it",
    )
    return group


def add_client_options(trust: argparse._ArgumentGroup) -> None:
    """Add the options that say whose programs are taken."""
    whose = trust.add_mutually_exclusive_group()
    whose.add_argument(
        "--client-name", metavar="NAME", help="the name that a source's certificate must be for"
    )
    whose.add_argument(
        "--any-client",
        action="store_true",
        help="whoever has a certificate of these authorities may bring a program",
    )


def check_client_options(args: argparse.Namespace, *, tls: bool) -> None:
    """See to it that with TLS somebody has been named, or nobody on purpose.

    Raises:
        UffdError: That is not so.
    """
    if tls and not (args.client_name or args.any_client):
        raise UffdError(
            "whose programs are taken?  Give --client-name, the name in the source's certificate,"
            " or --any-client"
        )
    if (args.client_name or args.any_client) and not tls:
        raise UffdError("--client-name and --any-client are of no use without --tls-cert")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add what both say of a migration, and to whom."""
    group = parser.add_argument_group("what is said of it")
    group.add_argument(
        "--report",
        metavar="FILE",
        help="write what it was as JSON, also if it fails; see `aiouffd migrate report`",
    )
    group.add_argument(
        "--metrics",
        metavar="HOST:PORT",
        type=host_and_port,
        help="give its figures as Prometheus metrics on this address, to whoever asks",
    )
    group.add_argument("--json", action="store_true", help="one JSON object per line, for programs")
    group.add_argument(
        "--log-level", choices=LEVELS, default="warning", help="on stderr (default: warning)"
    )


def add_deadline_option(parser: argparse._ActionsContainer) -> None:
    """Add ``--deadline``."""
    parser.add_argument(
        "--deadline",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long the line may be broken until the migration fails; threads that wait for"
        " memory wait on meanwhile (default: 30)",
    )


def has_tls(args: argparse.Namespace, host: str, *, doing: str) -> bool:
    """Say whether TLS is asked for.

    Args:
        args: With the options of ``add_trust_options``.
        host: Of the destination.
        doing: What is refused if neither TLS nor plain connections were asked for.

    Raises:
        OSError: There is no such host.
        UffdError: The options do not go together, or leave open who is trusted.
    """
    from ..migration.line import is_loopback

    named = (args.tls_cert, args.tls_key, args.tls_cacert)
    if any(named):
        if args.plain:
            raise UffdError("--plain is without TLS: leave it out, or the certificates")
        if not args.tls_cert or not args.tls_cacert:
            raise UffdError(
                "TLS takes --tls-cert, which shows who we are, and --tls-cacert, which says who"
                " may vouch for the other side"
            )
        return True
    try:
        is_near = args.plain or is_loopback(host)
    except OSError as error:
        raise OSError(error.errno, error.strerror, host) from error
    if not is_near:
        raise UffdError(
            f"{doing} {host} would let whoever sees the network read the memory, and change it:"
            " give --tls-cert, --tls-key and --tls-cacert, or ask for that with --plain"
        )
    return False


def client_context(args: argparse.Namespace) -> ssl.SSLContext:
    """Make the context of who sends.

    Raises:
        OSError: A file cannot be read, or is not what it should be.
    """
    from ..migration import tls

    return tls.client_context(args.tls_cert, args.tls_key, args.tls_cacert)


def server_context(args: argparse.Namespace) -> ssl.SSLContext:
    """Make the context of who receives.

    Raises:
        OSError: A file cannot be read, or is not what it should be.
    """
    from ..migration import tls

    return tls.server_context(args.tls_cert, args.tls_key, args.tls_cacert)


def where(host: str, port: int) -> str:
    """Write an address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
