"""``aiouffd export``: an image for other aiouffd servers to read, until SIGTERM.

Knows: options, signals, certificates as files.
Must not know: connections; the Export does.

Laws of this file:

* SIGTERM or SIGINT drains: no new peers, what was asked is answered, exit status 0.
* What is said about an export here is what ``aiouffd serve --export`` says too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import quote

from ..certificates import load_own, naming
from ..export import Export
from .arguments import host_and_port
from .image_options import Served, add_image_options, open_served
from .output import Lines, LinesHandler

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

Tell: TypeAlias = Callable[[dict[str, Any], str], None]

_EPILOG: Final = """\
examples:
  aiouffd export memory.img
  aiouffd export s3://images/memory.zst --cache 4G
  aiouffd export memory.img --listen 10.0.0.5:7433 \\
      --export-cert cert.pem --export-key key.pem --export-client-ca ca.pem

The other server names it by URL, aiouffd://10.0.0.5:7433/memory.img (aiouffds:// with TLS),
wherever an image is asked for.

Without --export-client-ca nobody is asked who they are: whoever can connect can read the whole
image.  That is why the default is the loopback address.
"""


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "export",
        help="let other aiouffd servers read an image over the network",
        description="Let other aiouffd servers read an image over TCP or TLS.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_image_options(parser)
    parser.add_argument(
        "--listen",
        type=host_and_port,
        default=("127.0.0.1", 0),
        metavar="HOST:PORT",
        help="where (default: 127.0.0.1, a free port)",
    )
    add_tls_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    return parser


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Add what lets another command export its image, too."""
    group = parser.add_argument_group("other servers")
    group.add_argument(
        "--export",
        type=host_and_port,
        metavar="HOST:PORT",
        help="let other aiouffd servers read the image there, as aiouffd://HOST:PORT/NAME",
    )
    add_tls_options(group)


def add_tls_options(group: argparse._ActionsContainer) -> None:
    """Add the files that make an export speak TLS."""
    group.add_argument("--export-cert", metavar="FILE", help="speak TLS, with this certificate")
    group.add_argument("--export-key", metavar="FILE", help="its key, if that is another file")
    group.add_argument(
        "--export-client-ca",
        metavar="FILE",
        help="let in only whom these authorities vouch for (needs --export-cert)",
    )


def server_context(args: argparse.Namespace) -> ssl.SSLContext | None:
    """Make the TLS context that the options ask for; None if they ask for none.

    Raises:
        OSError: A file cannot be read, or is no certificate.
    """
    if not args.export_cert:
        if args.export_key or args.export_client_ca:
            raise OSError("--export-key and --export-client-ca are of no use without --export-cert")
        return None
    with naming(args.export_client_ca, "no certificates of authorities in PEM"):
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=args.export_client_ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    load_own(context, args.export_cert, args.export_key)
    if args.export_client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def image_name(image: str) -> str:
    """Name an image as its readers do: by the last part of its path or URL."""
    return os.path.basename(image.partition("?")[0].rstrip("/")) or "image"


@contextlib.asynccontextmanager
async def exporting(
    args: argparse.Namespace, served: Served, where: tuple[str, int] | None, tell: Tell
) -> AsyncIterator[Export | None]:
    """Export an image as long as the block runs, and answer at its end what was asked.

    Args:
        args: With the options of ``add_tls_options``.
        served: The image.
        where: Host and port; None: nothing is exported.
        tell: Told where it is, for programs and for people.

    Raises:
        OSError: The address cannot be had, or a certificate.
    """
    context = server_context(args)
    if where is None:
        if context is not None:
            raise OSError("--export-cert is of no use without --export")
        yield None
        return
    host, port = where
    async with contextlib.AsyncExitStack() as stack:
        source = served.source
        if callable(source):
            source = await asyncio.to_thread(source)
            stack.push_async_callback(source.aclose)
        name = image_name(args.image)
        export = await stack.enter_async_context(Export({name: source}, host, port, ssl=context))
        shown = f"[{host}]" if ":" in host else host
        url = f"{'aiouffds' if context else 'aiouffd'}://{shown}:{export.port}/{quote(name)}"
        to_all = "" if args.export_client_ca else ", to whoever can connect"
        tell(
            {"event": "exporting", "image": served.name, "size": served.size, "url": url},
            f"exporting {served.name} ({served.size} bytes) on {url}{to_all}",
        )
        yield export
        await export.drain()


def run(args: argparse.Namespace) -> int:
    """Export until SIGTERM; give the exit status."""
    with Lines(sys.stdout) as out, Lines(sys.stderr) as diagnostics:
        handler = LinesHandler(diagnostics)
        handler.setFormatter(logging.Formatter("aiouffd: %(message)s"))
        logging.getLogger("aiouffd").addHandler(handler)
        try:
            return asyncio.run(_export(args, out))
        finally:
            logging.getLogger("aiouffd").removeHandler(handler)


async def _export(args: argparse.Namespace, out: Lines) -> int:
    def tell(fields: dict[str, Any], text: str) -> None:
        out.put(json.dumps({"time": round(time.time(), 3)} | fields) if args.json else text)

    loop = asyncio.get_running_loop()
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    async with open_served(args) as served, exporting(args, served, args.listen, tell) as export:
        await ending.wait()
    assert export is not None  # noqa: S101 - --listen has a default
    tell(
        {"event": "stopped", "answered": export.answered, "refused": export.refused},
        f"stopped: {export.answered} requests answered, {export.answered_bytes} bytes,"
        f" {export.refused} peers dropped",
    )
    return 0
