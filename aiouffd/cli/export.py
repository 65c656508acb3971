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
import json
import logging
import os
import signal
import ssl
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from ..export import Export
from ..sources import Source
from ..sources.file import FileSource
from .output import Lines, LinesHandler

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EPILOG: Final = """\
examples:
  aiouffd export memory.img
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
    parser.add_argument("image", metavar="IMAGE", help="the image")
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


def add_tls_options(group: argparse._ActionsContainer) -> None:
    """Add the files that make an export speak TLS."""
    group.add_argument("--export-cert", metavar="FILE", help="speak TLS, with this certificate")
    group.add_argument("--export-key", metavar="FILE", help="its key, if that is another file")
    group.add_argument(
        "--export-client-ca",
        metavar="FILE",
        help="let in only whom these authorities vouch for (needs --export-cert)",
    )


def host_and_port(text: str) -> tuple[str, int]:
    """Read HOST:PORT, [IPV6]:PORT or :PORT, which is the loopback address."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


def server_context(args: argparse.Namespace) -> ssl.SSLContext | None:
    """Make the TLS context that the options ask for; None if they ask for none.

    Raises:
        OSError: A file cannot be read, or is no certificate.
    """
    if not args.export_cert:
        if args.export_key or args.export_client_ca:
            raise OSError("--export-key and --export-client-ca are of no use without --export-cert")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=args.export_client_ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(args.export_cert, args.export_key)
    if args.export_client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def export_of(
    args: argparse.Namespace, image: str, source: Source, where: tuple[str, int]
) -> Export:
    """Make the export that the options ask for."""
    host, port = where
    return Export({image_name(image): source}, host, port, ssl=server_context(args))


def image_name(image: str) -> str:
    """Name an image as its readers do: by the last part of its path or URL."""
    return os.path.basename(image.partition("?")[0].rstrip("/")) or "image"


def describe(
    args: argparse.Namespace, export: Export, image: str, source: Source, host: str
) -> tuple[dict[str, Any], str]:
    """Say where an export is: for programs, and for people."""
    scheme = "aiouffds" if args.export_cert else "aiouffd"
    shown = f"[{host}]" if ":" in host else host
    url = f"{scheme}://{shown}:{export.port}/{image_name(image)}"
    fields = {"event": "exporting", "image": image, "size": source.size, "url": url}
    open_to = "" if args.export_client_ca else ", to whoever can connect"
    return fields, f"exporting {image} ({source.size} bytes) on {url}{open_to}"


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
    source = await asyncio.to_thread(FileSource, args.image)
    try:
        async with export_of(args, args.image, source, args.listen) as export:
            tell(*describe(args, export, args.image, source, args.listen[0]))
            await ending.wait()
            await export.drain()
        tell(
            {"event": "stopped", "answered": export.answered, "refused": export.refused},
            f"stopped: {export.answered} requests answered, {export.answered_bytes} bytes,"
            f" {export.refused} peers dropped",
        )
    finally:
        await source.aclose()
    return 0
