"""``aiouffd serve``: a lazy-memory server over an image file, until SIGTERM.

Knows: options, signals, how reports look to people and to programs.
Must not know: how to serve; the server does.

Laws of this file:

* SIGTERM or SIGINT drains: no new peers, the living are served to their end, exit status 0.
  A second one closes what lives by the policy, exit status 3.
* One line per session start, milestone and end, and per refusal, on stdout; diagnostics go to
  stderr.
* Output never holds up serving: a thread writes it.  A reader that is slow loses lines, one
  that goes away ends the output, not the server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ..failure import Action, FailurePolicy
from ..fd_store import FdStore
from ..reports import Report
from ..sd_notify import take_listen_fds
from ..server import Server
from ..service import Service
from ..service_manager import ServiceManager
from ..sources.measured import Reads
from ..sources.shared import SharedImage
from ..unix_socket import Listener
from . import operation, statuses
from .arguments import chunk_bytes, count, rights, seconds, user
from .diagnostics import logging_to
from .export import add_export_options, exporting
from .image_options import (
    Served,
    add_image_options,
    add_share_option,
    open_served,
    sharing_report,
)
from .orders import Orders
from .output import Lines
from .prefetch_options import add_prefetch_options, prefetch_settings
from .report_fields import fields_of
from .store_options import add_store_options, not_stored, open_store

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_POLICIES: Final = {
    action.value: action for action in (Action.POISON, Action.KILL, Action.ZERO, Action.HANG)
}

_EPILOG: Final = """\
examples:
  aiouffd serve memory.img --socket /run/aiouffd/vm.sock
  aiouffd serve memory.img --socket /run/aiouffd/vm.sock --uid 1000 --mode 666 --json
  aiouffd serve s3://snapshots/base --layer monday.diff --cache 1G --socket vm.sock
  aiouffd serve memory.img --share --chunk 64K --socket clones.sock

Firecracker: PUT /snapshot/load with "mem_backend": {"backend_type": "Uffd",
"backend_path": "/run/aiouffd/vm.sock"}.

policies, for pages whose bytes cannot be had, and for what is missing after a second SIGTERM:
  poison  whoever touches the page gets SIGBUS (Linux 6.6)
  kill    the peer gets SIGKILL
  zero    the page reads as zeros: silent data loss
  hang    whoever touches the page waits, for another server or for ever
"""


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "serve",
        help="serve the memory of other processes from an image",
        description="Serve the memory of processes that hand it over as Firecracker does.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_share_option(add_image_options(parser))
    parser.add_argument(
        "--socket",
        metavar="PATH",
        required=True,
        help="where to listen; fd:NAME is a socket from the service manager",
    )
    who = parser.add_argument_group("who may connect")
    who.add_argument(
        "--uid", type=user, action="append", help="this user; may be repeated (default: our own)"
    )
    who.add_argument(
        "--mode", type=rights, default=0o600, help="rights of the socket, octal (default: 600)"
    )
    who.add_argument(
        "--any-directory",
        action="store_true",
        help="allow the socket in a directory that others own or may write to",
    )
    who.add_argument(
        "--replace", action="store_true", help="take the path over from a server that listens there"
    )
    who.add_argument(
        "--allow-pid-race",
        action="store_true",
        help="before Linux 6.5: pin peers by pid, which may hit a stranger",
    )
    how = parser.add_argument_group("how to serve")
    how.add_argument(
        "--max-sessions",
        type=count,
        metavar="N",
        help="refuse peers while so many are served (default: no limit)",
    )
    how.add_argument(
        "--handshake-timeout",
        type=seconds,
        default=10.0,
        metavar="SECONDS",
        help="from connection to hand-over (default: 10)",
    )
    how.add_argument(
        "--deadline",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="what a fault may take before the policy acts (default: 30)",
    )
    how.add_argument(
        "--policy", choices=_POLICIES, default="poison", help="see below (default: poison)"
    )
    how.add_argument(
        "--chunk",
        type=chunk_bytes,
        default=0,
        metavar="BYTES",
        help="bring so much around each fault, such as 64K (default: one page)",
    )
    add_export_options(parser)
    add_store_options(parser)
    add_prefetch_options(parser)
    operation.add_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    return parser


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM; give the exit status."""
    operation.raise_descriptor_limit()
    taken = take_listen_fds()
    store = open_store(args, taken)
    path: str | Listener = args.socket
    if args.socket.startswith(operation.PASSED):
        path = operation.passed_listener(args.socket, not_stored(taken))
    else:
        for _, fd in not_stored(taken):
            fd.close()
    with (
        store or contextlib.nullcontext(),
        Lines(sys.stdout) as out,
        Lines(sys.stderr) as diagnostics,
        logging_to(diagnostics, as_json=args.json, level=args.log_level),
    ):
        return asyncio.run(_open_and_serve(args, path, out, store))


async def _open_and_serve(
    args: argparse.Namespace, path: str | Listener, out: Lines, store: FdStore | None
) -> int:
    accounts = [Reads("served")] if operation.wanted(args) else []
    async with open_served(args, accounts or None) as served:
        return await _serve(args, path, out, served, store, accounts)


async def _serve(
    args: argparse.Namespace,
    path: str | Listener,
    out: Lines,
    served: Served,
    store: FdStore | None,
    accounts: list[Reads],
) -> int:
    def tell(fields: dict[str, Any], text: str) -> None:
        line = json.dumps({"time": round(time.time(), 3)} | fields) if args.json else text
        out.put(line)

    def report(what: Report) -> None:
        tell(fields_of(what), str(what))
        manager.status(f"{len(server.sessions)} sessions, {server.served} in all")

    manager = ServiceManager()
    orders = Orders()
    policy = _POLICIES[args.policy]
    server = Server(
        path,
        served.receive,
        operation.measured(served.source, accounts),
        service=Service(
            failure=FailurePolicy(then=policy),
            on_close=policy,
            deadline=args.deadline,
            chunk=args.chunk,
            **prefetch_settings(args),
        ),
        max_sessions=args.max_sessions,
        uids=args.uid,
        handshake_timeout=args.handshake_timeout,
        allow_pid_race=args.allow_pid_race,
        mode=args.mode,
        replace=args.replace,
        any_directory=args.any_directory,
        store=store,
        report=report,
    )
    orders.take()  # a signal from now on is no sudden death: peers may come any moment
    async with (
        exporting(args, served, args.export, tell),
        server,
        operation.operating(
            args, server, served.name, accounts, orders.drain, shared=served.image
        ) as where,
    ):
        name, size = served.name, served.size
        text = f"serving {name} ({size} bytes) on {server.path}"
        tell(
            {"event": "listening", "socket": server.path, "image": name, "size": size} | where,
            "; ".join([text, *(f"{what} on {place}" for what, place in where.items())]),
        )
        with manager:
            manager.ready(f"serving {name}")
            aborted = await _run_until_told(server, orders, tell, manager, served.image)
    tell(
        {
            "event": "stopped",
            "served": server.served,
            "failed": server.failed,
            "refused": server.refused,
        },
        f"stopped: {server.served} sessions served, {server.failed} of them with failures,"
        f" {server.refused} peers refused",
    )
    return statuses.CUT_SHORT if aborted else statuses.DONE


async def _run_until_told(
    server: Server,
    orders: Orders,
    tell: Callable[[dict[str, Any], str], None],
    manager: ServiceManager,
    image: SharedImage | None,
) -> bool:
    """Serve; give whether living sessions were closed by a second signal."""
    await orders.draining.wait()
    if image is not None:
        tell(*await sharing_report(image, server.sessions))
    living = len(server.sessions)
    manager.stopping(f"draining: {living} sessions live on")
    tell(
        {"event": "draining", "sessions": living},
        f"draining: no new peers, {living} sessions live on",
    )
    draining = asyncio.ensure_future(server.drain())
    second = asyncio.ensure_future(orders.stopping.wait())
    await asyncio.wait((draining, second), return_when=asyncio.FIRST_COMPLETED)
    second.cancel()
    if draining.done():
        await draining
        return False
    living = len(server.sessions)
    tell(
        {"event": "aborting", "sessions": living},
        f"aborting: {living} sessions are closed by the policy",
    )
    await server.aclose()
    await draining
    return living > 0
