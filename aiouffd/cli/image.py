"""``aiouffd image``: images packed, unpacked, compared, looked at, checked.

Knows: options, what is said about an image, statuses.
Must not know: how it is done.

Laws of this file:

* Nothing half-done stays: Ctrl-C, SIGTERM and errors leave no file behind.
* Results go to stdout, progress and warnings to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import string
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..errors import UffdError
from ..image import PAGE, ImageWriter
from ..image.copying import copy, diff, sha256
from ..image.packed import FRAME_BYTES, LEVEL, PackedWriter
from ..image.sparse import SparseWriter
from ..image.survey import Survey, survey
from ..sources import Source
from ..sources.compressed import CompressedSource
from ..sources.layered import LayeredSource
from ..sources.urls import open_source, shown
from .arguments import byte_count, seconds_or_none
from .jobs import run_job
from .progress import Progress, amount

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EPILOG: Final = """\
examples:
  aiouffd image pack --dig-holes memory.img memory.zst
  aiouffd image diff memory.img later.img later.diff
  aiouffd image info memory.zst --layer later.diff
  aiouffd image verify memory.zst --against memory.img
  aiouffd image unpack memory.zst --layer later.diff later-again.img
  aiouffd image push memory.zst redis://cache:6379/0/images/vm1

An image is named by a path or by a URL, as for `aiouffd serve`; seekable zstd is recognised.
`aiouffd image COMMAND --help` explains a command.
"""


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add the command and its own commands."""
    parser = subparsers.add_parser(
        "image",
        help="pack, unpack, compare and check images",
        description="Make compressed images and sparse layers, and see what images hold.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="job", metavar="COMMAND", required=True)

    pack = _command(commands, "pack", _pack, "make a seekable zstd image")
    pack.add_argument("source", metavar="SOURCE", help="the image")
    pack.add_argument("out", metavar="OUT", help="the file to make")
    _add_layers(pack)
    pack.add_argument(
        "--dig-holes",
        action="store_true",
        help="make holes of pages of zeros; for whole images, never for a layer: there a page of"
        " zeros hides what lies below",
    )
    _add_packing(pack)

    unpack = _command(commands, "unpack", _unpack, "make a plain file with holes")
    unpack.add_argument("source", metavar="IN", help="the image")
    unpack.add_argument("out", metavar="OUT", help="the file to make")
    _add_layers(unpack)

    compare = _command(
        commands, "diff", _diff, "make a layer that holds the pages in which two images differ"
    )
    compare.add_argument("source", metavar="BASE", help="what the layer will lie over")
    compare.add_argument("new", metavar="NEW", help="what comes out then")
    compare.add_argument("out", metavar="OUT", help="the file to make: sparse, or packed")
    _add_layers(compare)
    compare.add_argument("--pack", action="store_true", help="compress the layer")
    _add_packing(compare)

    push = _command(commands, "push", _push, "store an image in Redis or Valkey")
    push.add_argument("source", metavar="SOURCE", help="the image")
    push.add_argument("out", metavar="URL", help="where: redis://HOST:PORT/DB/KEY")
    _add_layers(push)
    push.add_argument(
        "--chunk",
        type=byte_count,
        default=64 << 10,
        metavar="BYTES",
        help="per key, a power of two (default: 64K)",
    )
    push.add_argument(
        "--grace",
        type=seconds_or_none,
        default=3600.0,
        metavar="SECONDS",
        help="who reads the image that was there before may go on so long (default: 3600)",
    )

    info = _command(commands, "info", _info, "say what an image holds")
    info.add_argument("source", metavar="IMAGE", help="the image")
    _add_layers(info)
    info.add_argument("--scan", action="store_true", help="read it all, to count its zeros")
    info.add_argument("--json", action="store_true", help="print JSON for programs")

    verify = _command(
        commands, "verify", _verify, "read an image and compare its digest; status 1 if it differs"
    )
    verify.add_argument("source", metavar="IMAGE", help="the image")
    _add_layers(verify)
    other = verify.add_mutually_exclusive_group()
    other.add_argument("--against", metavar="URL", help="an image that is to be the same")
    other.add_argument(
        "--digest", metavar="HEX", type=_digest, help="the SHA-256 of the whole plain image"
    )
    return parser


def _command(
    commands: Subparsers,
    name: str,
    job: Callable[[argparse.Namespace], Any],
    summary: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
    parser.set_defaults(run_job=job)
    parser.add_argument(
        "--progress", action="store_true", help="say how far it has come even if stderr is a file"
    )
    return parser


def _add_layers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layer",
        metavar="URL",
        action="append",
        default=[],
        help=f"a layer over {'BASE' if parser.prog.endswith('diff') else 'the image'};"
        " may be repeated, the newest last",
    )


def _add_packing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to compress")
    group.add_argument("--level", type=int, default=LEVEL, help=f"zstd's level (default: {LEVEL})")
    group.add_argument(
        "--frame",
        type=byte_count,
        default=FRAME_BYTES,
        metavar="BYTES",
        help="what a fault decompresses (default: 32K); more is smaller and slower to serve",
    )
    group.add_argument(
        "--threads", type=int, default=0, metavar="N", help="(default: one for each CPU)"
    )


def _digest(text: str) -> str:
    if len(text) != 64 or not set(text) <= set(string.hexdigits):
        raise argparse.ArgumentTypeError(f"{text} is no SHA-256: 64 hexadecimal digits")
    return text.lower()


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    return run_job(args.run_job(args))


# --- what all jobs need ----------------------------------------------------------------


@contextlib.contextmanager
def _said() -> Iterator[None]:
    """Let a missing package, or a setting that makes no sense, be one line on stderr."""
    try:
        yield
    except (ImportError, ValueError) as error:
        raise UffdError(str(error)) from error


@contextlib.asynccontextmanager
async def _opened(url: str, layers: Sequence[str] = ()) -> AsyncIterator[list[Source]]:
    """Open an image and its layers: a list that begins with what all of them give together."""
    async with contextlib.AsyncExitStack() as stack:
        parts: list[Source] = []
        for one in (url, *layers):
            with _said():
                parts.append(await open_source(one))
            stack.push_async_callback(parts[-1].aclose)
        yield [LayeredSource(*parts) if layers else parts[0], *parts]


@contextlib.contextmanager
def _progress(args: argparse.Namespace, doing: str) -> Iterator[Progress]:
    progress = Progress(doing, wanted=args.progress)
    try:
        yield progress
    finally:
        progress.end()


def _packed(args: argparse.Namespace, size: int) -> PackedWriter:
    with _said():
        return PackedWriter(
            args.out, size, level=args.level, frame_bytes=args.frame, threads=args.threads
        )


def _stored(path: str) -> str:
    status = os.stat(path)
    return amount(min(status.st_size, status.st_blocks * 512))


# --- the jobs --------------------------------------------------------------------------


async def _pack(args: argparse.Namespace) -> int:
    async with _opened(args.source, args.layer) as (image, *_):
        with _progress(args, "packing") as progress:
            async with _packed(args, image.size) as writer:
                await copy(image, writer, dig_holes=args.dig_holes, watch=progress)
        print(f"{args.out}: {amount(image.size)}, packed into {_stored(args.out)}")
    return 0


async def _unpack(args: argparse.Namespace) -> int:
    async with _opened(args.source, args.layer) as (image, *_):
        with _progress(args, "unpacking") as progress:
            async with SparseWriter(args.out, image.size) as writer:
                await copy(image, writer, watch=progress)
        if not writer.exact:
            print(
                f"aiouffd: {args.out}: its file system keeps other holes than the image has;"
                " it is right as an image, but no layer over another",
                file=sys.stderr,
            )
        print(f"{args.out}: {amount(image.size)}, of which {_stored(args.out)} on the disk")
    return 0


async def _diff(args: argparse.Namespace) -> int:
    async with _opened(args.source, args.layer) as (base, *_), _opened(args.new) as (new, *_):
        with _progress(args, "comparing") as progress:
            layer: ImageWriter
            if args.pack:
                layer = _packed(args, new.size)
            else:
                layer = SparseWriter(args.out, new.size, must_be_exact=True)
            async with layer as writer:
                differ = await diff(base, new, writer, watch=progress)
        pages, of = -(-differ // PAGE), -(-new.size // PAGE)
        print(f"{args.out}: {pages:,} of {of:,} pages differ; stored in {_stored(args.out)}")
    return 0


async def _push(args: argparse.Namespace) -> int:
    with _said():
        from ..sources.redis import store_image
    async with _opened(args.source, args.layer) as (image, *_):
        with _progress(args, "storing") as progress, _said():
            identity = await store_image(
                image, args.out, chunk=args.chunk, grace=args.grace, progress=progress
            )
        print(f"{shown(args.out)}: {amount(image.size)}, stored as {identity}")
    return 0


async def _info(args: argparse.Namespace) -> int:
    urls = [args.source, *args.layer]
    async with _opened(args.source, args.layer) as (image, *parts):
        with _progress(args, "reading") as progress:
            whole = await survey(image, scan=args.scan, watch=progress)
        layers = [await survey(part) for part in parts] if args.layer else []
    if args.json:
        found = _as_json(args.source, whole)
        if layers:
            found["layers"] = [_as_json(url, one) for url, one in zip(urls, layers, strict=True)]
        print(json.dumps(found, indent=2))
        return 0
    blocks = [_block(shown(url), one) for url, one in zip(urls, layers, strict=False)]
    title = "together" if layers else shown(args.source)
    print("\n\n".join([*blocks, _block(title, whole)]))
    return 0


async def _verify(args: argparse.Namespace) -> int:
    async with _opened(args.source, args.layer) as (image, *_):
        expected, who = args.digest, "the digest that was given"
        if args.against is None and expected is None:
            note = image.layout.note if isinstance(image, CompressedSource) else None
            if note is None:
                raise UffdError(
                    f"{shown(args.source)} carries no digest: say --digest HEX or --against URL"
                )
            expected, who = note.sha256.hex(), "the digest that it carries"
        with _progress(args, "reading") as progress:
            found = (await sha256(image, watch=progress)).hex()
    if args.against is not None:
        async with _opened(args.against) as (other, *_):
            with _progress(args, "reading the other") as progress:
                expected = (await sha256(other, watch=progress)).hex()
        who = shown(args.against)
    print(f"{found}  {shown(args.source)}")
    if found != expected:
        print(f"aiouffd: it differs: {who} is {expected}", file=sys.stderr)
        return 1
    return 0


# --- what is said ----------------------------------------------------------------------


def _as_json(url: str, one: Survey) -> dict[str, object]:
    ratio = one.size / one.stored_bytes if one.stored_bytes else None
    return {"url": shown(url), **dataclasses.asdict(one), "ratio": ratio}


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0.0%"


def _block(title: str, one: Survey) -> str:
    """Lay an image out for people."""
    rows = [("size", f"{one.size:,} bytes ({amount(one.size)})")]
    if one.stored_bytes is not None:
        ratio = f", ratio {one.size / one.stored_bytes:.2f}" if one.stored_bytes else ""
        rows.append(("stored", f"{one.stored_bytes:,} bytes ({amount(one.stored_bytes)}){ratio}"))
    held = f"{one.data_bytes:,} bytes ({amount(one.data_bytes)}) in {one.extents:,} extents"
    rows.append(("data", held))
    holes = one.size - one.data_bytes
    if one.zero_bytes is None:
        rows.append(("zeros", f"{_share(holes, one.size)} holes; --scan counts zeros in the data"))
    else:
        zeros, in_data = one.zero_bytes, one.zero_bytes - holes
        text = f"{_share(zeros, one.size)}: {_share(holes, one.size)} holes"
        rows.append(("zeros", f"{text}, {_share(in_data, one.size)} pages of zeros in the data"))
    if one.frames is not None and one.frame_bytes is not None:
        checked = "checked by checksums" if one.checksums else "without checksums"
        rows.append(("frames", f"{one.frames:,} of up to {amount(one.frame_bytes)}, {checked}"))
    if one.sha256:
        rows.append(("sha256", one.sha256))
    rows.append(("identity", one.identity or "unknown"))
    return "\n".join([f"{title} ({one.kind})", *(f"  {name:10}{text}" for name, text in rows)])
