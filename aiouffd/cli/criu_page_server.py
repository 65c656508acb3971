"""``aiouffd criu page-server``: give a checkpoint's pages to CRIU, or receive a dump's memory.

Knows: options, signals, what is said to people and programs.
Must not know: connections, files; the server and the receiver do.

Laws of this file:

* Without ``--lazy-pages`` it receives, with it it gives, as CRIU's own command does.
* SIGTERM or SIGINT drains: no new peers; restores that read are served until they are through, a
  dump that has begun is received to its end.  A second one ends it at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ..errors import ClosedError, UffdError
from ..protocols.criu.image_folder import ImageFolder
from ..protocols.criu.page_receiver import PageReceiver
from ..protocols.criu.page_server import Left, PageServer
from ..sources.urls import shown
from ..threads import in_thread
from . import criu_options, statuses
from .arguments import seconds
from .orders import Orders
from .output import Lines
from .progress import counted

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

Tell: TypeAlias = Callable[[dict[str, Any], str], None]

_LOOPBACK: Final = "127.0.0.1"
_SIZES: Final = {"auto": None, "24": 24, "32": 32}

_EPILOG: Final = """\
examples:
  aiouffd criu page-server --lazy-pages -D /checkpoints/web --port 7001
      gives pages to any number of restores, at once and one after the other:
      criu lazy-pages --page-server --address 127.0.0.1 --port 7001 -D ...

  aiouffd criu page-server --lazy-pages --images s3://checkpoints/web --port 7001
      the same, from a checkpoint far away

  aiouffd criu page-server -D /checkpoints/web --port 7001
      receives the memory of one dump, then ends:
      criu dump --page-server --address HOST --port 7001 -t PID -D ...
      writes all other images; both together are the checkpoint

Without --tls whoever can connect can read the memory, or write it.  That is why it listens on
the loopback address unless --address names another one.

Where CRIU takes the memory of a dump for complete, it ends the process: here that is said when
everything is on the disk.  A dump that breaks off leaves nothing behind, and status 1.
"""


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "page-server",
        help="give a checkpoint's pages to criu lazy-pages, or receive those of criu dump",
        description="Speak the page-server protocol of CRIU 4: give the pages of a checkpoint"
        " (--lazy-pages), or receive the memory of a dump.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    criu_options.add_folder_options(parser)
    parser.add_argument(
        "--images",
        metavar="URL",
        help="with --lazy-pages: where the checkpoint's files of pages are, if not in --images-dir:"
        " a folder by its path or URL; where --images-dir has no images at all, the whole"
        " checkpoint",
    )
    parser.add_argument(
        "--lazy-pages", action="store_true", help="give pages; without it a dump is received"
    )
    parser.add_argument(
        "--prev-images-dir",
        metavar="DIR",
        help="without --lazy-pages: the checkpoint that the dump builds on, relative to"
        " --images-dir",
    )
    parser.add_argument(
        "--silence",
        type=seconds,
        metavar="SECONDS",
        help="without --lazy-pages: give a dump up whose dumper sends nothing for so long in the"
        " middle of a run of pages, or ten times as long between two (default: 60)",
    )
    criu_options.add_address_options(
        parser,
        address="where to listen (default: 127.0.0.1; CRIU's own listens everywhere)",
        port="which port (default: a free one)",
    )
    parser.add_argument(
        "--protocol",
        choices=_SIZES,
        default="auto",
        help="bytes of a header: 24 of CRIU up to 4.1, 32 from 4.2 on (default: auto, as each"
        " peer's first one shows)",
    )
    parser.add_argument(
        "--once", action="store_true", help="with --lazy-pages: end after the first client"
    )
    criu_options.add_tls_options(parser.add_argument_group("TLS"))
    criu_options.add_process_options(parser.add_argument_group("running"))
    return parser


def run(args: argparse.Namespace) -> int:
    """Serve or receive; give the exit status."""
    if args.lazy_pages and args.prev_images_dir:
        raise UffdError("--prev-images-dir is for receiving a dump, which --lazy-pages is not")
    if args.lazy_pages and args.silence:
        raise UffdError("--silence is for receiving a dump, which --lazy-pages is not")
    for given, name in ((args.images, "--images"), (args.once, "--once")):
        if given and not args.lazy_pages:
            raise UffdError(f"{name} is for giving pages: add --lazy-pages")

    async def serve(out: Lines, ready: Callable[[], None]) -> int:
        def tell(fields: dict[str, Any], text: str) -> None:
            line = json.dumps({"time": round(time.time(), 3)} | fields) if args.json else text
            out.put(line)

        return await (_give if args.lazy_pages else _receive)(args, tell, ready)

    return criu_options.run_server(args, serve)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Give what both kinds of server take."""
    return {
        "host": args.address or _LOOPBACK,
        "port": args.port,
        "ssl": criu_options.tls_server_context(args),
        # CRIU compares the other's certificate with its own --address, on either side.
        "client_name": "" if args.tls_no_cn_verify else args.address or "",
        "header_bytes": _SIZES[args.protocol],
    }


def _where(args: argparse.Namespace, port: int) -> tuple[dict[str, Any], str]:
    """Say where it listens, for programs and for people."""
    host = args.address or _LOOPBACK
    text = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    who = "TLS" if args.tls else "to whoever can connect"
    return {"address": host, "port": port, "tls": args.tls}, f"{text}, {who}"


@contextlib.asynccontextmanager
async def _obeying(
    drain: Callable[[], Coroutine[Any, Any, None]], stop: Callable[[], Coroutine[Any, Any, None]]
) -> AsyncIterator[None]:
    """Drain at the first SIGTERM or SIGINT, stop at the second, as long as the block runs."""
    orders = Orders()
    orders.take()

    async def at(order: asyncio.Event, what: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await order.wait()
        await what()

    tasks = [
        asyncio.create_task(at(orders.draining, drain)),
        asyncio.create_task(at(orders.stopping, stop)),
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


# --- giving ----------------------------------------------------------------------------


async def _give(args: argparse.Namespace, tell: Tell, ready: Callable[[], None]) -> int:
    served: asyncio.Queue[Left] = asyncio.Queue()
    async with (
        await criu_options.open_checkpoint(args) as checkpoint,
        PageServer(checkpoint, on_left=served.put_nowait, **_settings(args)) as server,
        _obeying(server.drain, server.aclose),
    ):
        await checkpoint.find_pages()
        location = checkpoint.location
        alive = [task for task in checkpoint.tasks if not task.dead]
        size = sum(checkpoint.memory(task.pid).lazy_bytes for task in alive)
        where, text = _where(args, server.port)
        ready()
        tell(
            {"event": "listening", "images": shown(location), "processes": len(alive)}
            | {"lazy_bytes": size, **where},
            f"giving {_mib(size)} of {counted(len(alive), 'process', 'processes')} of"
            f" {shown(location)} on {text}",
        )
        status = await _until_over(args, tell, server, served)
        await server.drain()
        while not served.empty():
            _tell_left(tell, served.get_nowait())
        tell(
            {"event": "stopped", "answered": server.answered}
            | {"answered_bytes": server.answered_bytes, "refused": server.refused},
            f"stopped: {server.answered} requests answered, {_mib(server.answered_bytes)},"
            f" {counted(server.refused, 'client', 'clients')} dropped",
        )
    return status


async def _until_over(
    args: argparse.Namespace, tell: Tell, server: PageServer, served: asyncio.Queue[Left]
) -> int:
    """Serve until a signal, or with ``--once`` the end of the first client; give the status."""

    async def watch() -> int:
        while True:
            left = await served.get()
            _tell_left(tell, left)
            if args.once:
                return statuses.FAILED if left.error else statuses.DONE

    watching = asyncio.create_task(watch())
    closing = asyncio.create_task(server.wait_closed())
    try:
        await asyncio.wait((watching, closing), return_when=asyncio.FIRST_COMPLETED)
        return watching.result() if watching.done() else statuses.DONE
    finally:
        watching.cancel()
        closing.cancel()
        await asyncio.wait((watching, closing))


def _tell_left(tell: Tell, left: Left) -> None:
    how = left.error or ("is through" if left.ended else "has left without saying so")
    tell(
        {"event": "client", "peer": left.peer, "answered": left.answered}
        | {"answered_bytes": left.answered_bytes, "ended": left.ended, "error": left.error},
        f"{left.peer} {how}: {left.answered} requests, {_mib(left.answered_bytes)}",
    )


# --- receiving -------------------------------------------------------------------------


async def _receive(args: argparse.Namespace, tell: Tell, ready: Callable[[], None]) -> int:
    folder = await in_thread(ImageFolder, args.images_dir)
    try:
        if args.prev_images_dir:
            await in_thread(folder.link_parent, args.prev_images_dir)
        async with (
            PageReceiver(folder, silence=args.silence or 60.0, **_settings(args)) as receiver,
            _obeying(receiver.finish, receiver.aclose),
        ):
            where, text = _where(args, receiver.port)
            ready()
            tell(
                {"event": "listening", "images": folder.path, **where},
                f"waiting for criu dump --page-server on {text}; its memory goes to {folder.path}",
            )
            try:
                await receiver.wait_received()
            except ClosedError:
                tell({"event": "stopped"}, "stopped: no dump was received")
                return statuses.FAILED
            figures = {
                "processes": folder.tasks,
                "shmems": folder.shmems,
                "stored_bytes": folder.stored_bytes,
                "sparse_bytes": folder.sparse_bytes,
                "parent_bytes": folder.parent_bytes,
            }
            tell(
                {"event": "received", "images": folder.path, **figures},
                f"received {_mib(folder.stored_bytes)} of"
                f" {counted(folder.tasks, 'process', 'processes')}"
                f" and {counted(folder.shmems, 'piece', 'pieces')} of shared memory,"
                f" {_mib(folder.sparse_bytes)} of it zeros;"
                f" {_mib(folder.parent_bytes)} are in the parent",
            )
            await receiver.drain()
    finally:
        await in_thread(folder.close)
    return statuses.DONE


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
