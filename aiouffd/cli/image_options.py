"""The options that name an image, and the sources that they open.

Knows: options, how errors are told.
Must not know: what is done with the image.

With ``--share`` the image is copied into memory once, sealed, and handed out to be mapped.
Else a plain file without layers, fallback or cache is opened by each session for itself, so that a
session keeps its generation though another file takes the name.  Everything else is opened
once, and all sessions share it.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

from .. import sharing
from ..errors import UffdError
from ..handover import Receive
from ..protocols import firecracker, shared
from ..session import Session
from ..source_opening import SourceOrOpener
from ..sources.file import FileSource
from ..sources.measured import Reads
from ..sources.shared import SharedImage
from ..sources.urls import open_image, shown
from .arguments import byte_count


@dataclass(frozen=True, slots=True)
class Served:
    """An image, opened.

    Attributes:
        name: The URL, as it may be shown.
        size: In bytes.
        source: For the server.
        receive: How peers hand over, for the server.
        image: The copy that all peers map, with ``--share``.
    """

    name: str
    size: int
    source: SourceOrOpener
    receive: Receive = firecracker.receive
    image: SharedImage | None = None


def add_image_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add IMAGE and what may stand around it; give the group, for what else there is."""
    parser.add_argument(
        "image",
        metavar="IMAGE",
        help="what holds the memory: a path, http(s)://, s3://, gs://, az://, redis(s)://,"
        " valkey(s):// or aiouffd(s)://; seekable zstd is recognised",
    )
    what = parser.add_argument_group("what to serve")
    what.add_argument(
        "--layer",
        metavar="URL",
        action="append",
        default=[],
        help="a sparse diff over the image; may be repeated, the newest last",
    )
    what.add_argument(
        "--fallback", metavar="URL", help="the same bytes from elsewhere, when IMAGE fails"
    )
    what.add_argument(
        "--cache",
        type=byte_count,
        default=0,
        metavar="BYTES",
        help="keep so much of the image in memory for all sessions, such as 1G",
    )
    return what


def add_share_option(group: argparse._ArgumentGroup) -> None:
    """Add what only those can be asked who serve processes of this machine."""
    group.add_argument(
        "--share",
        action="store_true",
        help="copy the image into memory once; peers map that copy, each with its own writes",
    )


async def sharing_report(
    image: SharedImage, sessions: Iterable[Session]
) -> tuple[dict[str, Any], str]:
    """Say what clones share at this moment, for programs and for people."""
    figures = await sharing.figures(image, sessions)
    mib = 1 << 20
    return {"event": "sharing", **figures.as_dict()}, (
        f"sharing: {figures.clones} clones map {figures.mapped_bytes / mib:.1f} MiB of one copy"
        f" of {figures.image_bytes / mib:.1f} MiB, which saves {figures.saved_bytes / mib:.1f} MiB;"
        f" {figures.private_bytes / mib:.1f} MiB are their own"
    )


@contextlib.asynccontextmanager
async def open_served(
    args: argparse.Namespace, accounts: list[Reads] | None = None
) -> AsyncIterator[Served]:
    """Open what the options name; closed behind the block.

    Args:
        args: Of the command.
        accounts: What is read from its parts is told here, see open_image.

    Raises:
        UffdError: It cannot be served, or a package is missing that it needs.
        OSError: It cannot be opened.
    """
    try:
        source = await open_image(
            args.image,
            layers=args.layer,
            fallback=args.fallback,
            cache_bytes=args.cache,
            accounts=accounts,
        )
    except (ImportError, ValueError) as error:
        raise UffdError(str(error)) from error
    try:
        size, name = source.size, shown(args.image)
        if getattr(args, "share", False):
            image = await SharedImage.fill(source)
            await source.aclose()
            source = image
            yield Served(name, size, image, shared.receiver(image), image)
        elif isinstance(source, FileSource):
            path = source.path
            await source.aclose()
            yield Served(name, size, lambda: FileSource(path))
        else:
            yield Served(name, size, source)
    finally:
        await source.aclose()
