"""``aiouffd criu lazy-pages``: the daemon that ``criu restore --lazy-pages`` asks for memory.

Knows: options, when the daemon is through, how it looks to people and to programs.
Must not know: how to serve; the socket's bytes, the formats of images.

Laws of this file:

* Options that ``criu lazy-pages`` has mean here what they mean there; so does the exit status:
  0 when every process has all of its memory, or is gone.
* SIGTERM or SIGINT brings what is missing and lets the processes live on; a second one closes
  them by the policy, exit status 3.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ..failure import Action, FailurePolicy
from ..prefetch import Pace
from ..protection import PREFIX
from ..protocols.criu.checkpoint import Checkpoint
from ..protocols.criu.lazy_socket import NAME
from ..protocols.criu.restore import Restores
from ..reports import HandedOver, Refused, Report
from ..sd_notify import take_listen_fds
from ..server import LISTENER, Server
from ..service import Service
from ..service_manager import ServiceManager
from ..sources import Source
from ..sources.measured import MeasuredSource, Reads
from ..sources.urls import shown
from ..working_set import WorkingSet
from . import operation, statuses
from .arguments import chunk_bytes, count, seconds
from .criu_options import (
    add_folder_options,
    add_process_options,
    run_server,
    work_directory,
)
from .orders import Orders
from .report_fields import fields_of
from .store_options import add_store_options, not_stored, open_store

if TYPE_CHECKING:
    from ..fd_store import FdStore
    from .output import Lines

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_POLICIES: Final = {action.value: action for action in (Action.POISON, Action.KILL, Action.ZERO)}

#: Forked children served at once: a restored server may have any number, and none may be missing.
_MAX_CHILDREN: Final = 4096

_EPILOG: Final = """\
examples:
  aiouffd criu lazy-pages -D checkpoint &
  criu restore -D checkpoint --lazy-pages -d --shell-job

  aiouffd criu lazy-pages -D checkpoint --images s3://checkpoints/web
  aiouffd criu lazy-pages -D checkpoint --no-push --record 'hot-{part}.set'
  aiouffd criu lazy-pages -D checkpoint --no-push --replay 'hot-{part}.set'
  aiouffd keep -- aiouffd criu lazy-pages -D checkpoint --keep-serving

policies, for pages whose bytes cannot be had, and for what is missing after a second SIGTERM:
  poison  whoever touches the page gets SIGBUS (Linux 6.6)
  kill    the process gets SIGKILL
  zero    the page reads as zeros: silent data loss
"""


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser = commands.add_parser(
        "lazy-pages",
        help="serve the memory of what `criu restore --lazy-pages` restores",
        description="Serve the memory of processes that `criu restore --lazy-pages` restores:"
        " they run at once, and their pages come when they are touched, and in the background.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to serve")
    add_folder_options(what)
    what.add_argument(
        "--images",
        metavar="URL",
        help="where the checkpoint's files of pages are, if not in --images-dir: a folder by its"
        " path or URL; where --images-dir has no images at all, the whole checkpoint",
    )
    what.add_argument(
        "--restores",
        type=count,
        default=1,
        metavar="N",
        help="serve so many restores, at once or one after the other, then end (default: 1)",
    )
    what.add_argument(
        "--keep-serving", action="store_true", help="serve any number of restores, until SIGTERM"
    )
    push = parser.add_argument_group("before it is asked for")
    push.add_argument(
        "--no-push", action="store_true", help="bring no page in the background, ever"
    )
    push.add_argument(
        "--pace",
        choices=(Pace.FULL.value, Pace.SLOW.value),
        default=Pace.FULL.value,
        help="how fast to bring in the background what nobody has asked for (default: full)",
    )
    push.add_argument(
        "--record",
        metavar="FILE",
        help="write down which pages are asked for; {part} in the name gives each process a file"
        " of its own, by its pid in the images",
    )
    push.add_argument(
        "--record-window",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="how much of a process's life is recorded (default: 30)",
    )
    push.add_argument(
        "--replay",
        metavar="FILE",
        help="bring the pages of such a recording first; {part} in the name as for --record",
    )
    push.add_argument(
        "--any-image",
        action="store_true",
        help="replay though it is unknown whether the recording is of this checkpoint",
    )
    how = parser.add_argument_group("how to serve")
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
    how.add_argument(
        "--replace",
        action="store_true",
        help="take the socket over from a daemon that listens there",
    )
    how.add_argument(
        "--any-directory",
        action="store_true",
        help="allow the socket in a directory that others own or may write to",
    )
    add_process_options(parser.add_argument_group("the process"))
    add_store_options(parser)
    operation.add_control_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Serve until all is through; give the exit status."""

    async def serve(out: Lines, ready: Callable[[], None]) -> int:
        return await _Daemon(args, out, ready).run()

    return run_server(args, serve)


class _Daemon:
    """One run of the command."""

    def __init__(self, args: argparse.Namespace, out: Lines, ready: Callable[[], None]) -> None:
        self._args = args
        self._out = out
        self._ready = ready
        self._path = os.path.join(work_directory(args), NAME)
        self._orders = Orders()
        self._manager = ServiceManager()
        self._finished = 0  # restores
        self._failed = 0
        self._server: Server

    async def run(self) -> int:
        """Open everything, serve, close everything; give the exit status."""
        args = self._args
        taken = take_listen_fds()
        for _, fd in not_stored(taken):
            fd.close()
        with open_store(args, taken) or contextlib.nullcontext() as store:
            async with await self._open_checkpoint() as checkpoint:
                return await self._serve(checkpoint, store)

    async def _open_checkpoint(self) -> Checkpoint:
        args = self._args
        if args.images is None:
            return await Checkpoint.open(args.images_dir)
        if os.path.exists(os.path.join(args.images_dir, "inventory.img")):
            return await Checkpoint.open(args.images_dir, pages=args.images)
        return await Checkpoint.open(args.images)

    async def _serve(self, checkpoint: Checkpoint, store: FdStore | None) -> int:
        args, orders = self._args, self._orders
        accounts = [Reads("pages")] if operation.wanted(args) else []
        restores = Restores(checkpoint)
        server = self._server = Server(
            self._path,
            restores.receive,
            restores if not accounts else _Measured(restores, accounts[0]),
            service=self._service(checkpoint),
            handshake_timeout=None,
            replace=args.replace,
            any_directory=args.any_directory,
            senders=True,
            listen=not _is_draining(store),
            store=store,
            report=self._report,
        )
        name = shown(checkpoint.location)
        orders.take()
        async with (
            server,
            operation.operating(args, server, name, accounts, orders.drain) as where,
        ):
            tasks = sum(not task.dead for task in checkpoint.tasks)
            self._tell(
                {"event": "listening", "socket": server.path, "images": name, "tasks": tasks}
                | where,
                "; ".join(
                    [
                        f"serving {tasks} processes of {name} on {server.path}",
                        *(f"{what} on {place}" for what, place in where.items()),
                    ]
                ),
            )
            with self._manager as manager:
                manager.ready(f"serving {name}")
                self._ready()
                aborted = await self._run_until_told()
        self._tell(
            {
                "event": "stopped",
                "restores": self._finished,
                "failed_restores": self._failed,
                "served": server.served,
                "failed": server.failed,
            },
            f"stopped: {self._finished} restores, {server.served} processes served,"
            f" {server.failed} of them with failures",
        )
        if aborted:
            return statuses.CUT_SHORT
        return statuses.FAILED if self._failed or server.failed else statuses.DONE

    def _service(self, checkpoint: Checkpoint) -> Service:
        args = self._args
        policy = _POLICIES[args.policy]
        recorder = None
        if args.record is not None:
            from ..recording import Recorder

            recorder = Recorder(args.record, window=args.record_window)
        return Service(
            failure=FailurePolicy(then=policy),
            on_close=policy,
            deadline=args.deadline,
            chunk=args.chunk,
            max_children=_MAX_CHILDREN,
            replay=_replays(args.replay, checkpoint),
            any_image=args.any_image,
            hydrate=Pace.OFF if args.no_push else Pace(args.pace),
            recorder=recorder,
            let_go=not args.no_push,
        )

    # --- what happens ------------------------------------------------------------------

    def _tell(self, fields: dict[str, Any], text: str) -> None:
        if self._args.json:
            text = json.dumps({"time": round(time.time(), 3)} | fields)
        self._out.put(text)

    def _report(self, what: Report) -> None:
        self._tell(fields_of(what), str(what))
        self._manager.status(f"{len(self._server.sessions)} processes are served")
        if isinstance(what, HandedOver):
            self._finished += 1
        elif isinstance(what, Refused):
            self._failed += 1
        else:
            return
        if not self._args.keep_serving and self._finished + self._failed >= self._args.restores:
            self._orders.drain()

    async def _run_until_told(self) -> bool:
        """Serve to the end; give whether living processes were closed by a second signal."""
        server, orders = self._server, self._orders
        if server.draining:
            orders.drain()
        await orders.draining.wait()
        self._manager.stopping(f"{len(server.sessions)} processes live on")
        draining = asyncio.ensure_future(server.drain())
        second = asyncio.ensure_future(orders.stopping.wait())
        await asyncio.wait((draining, second), return_when=asyncio.FIRST_COMPLETED)
        second.cancel()
        if draining.done():
            await draining
            return False
        living = len(server.sessions)
        self._tell(
            {"event": "aborting", "sessions": living},
            f"aborting: {living} processes are closed by the policy",
        )
        await server.aclose()
        await draining
        return living > 0


class _Measured:
    """Restores whose reads are measured together."""

    def __init__(self, restores: Restores, reads: Reads) -> None:
        self._restores = restores
        self._reads = reads

    async def open_part(self, part: str) -> Source:
        return MeasuredSource(await self._restores.open_part(part), self._reads.name, self._reads)


def _replays(path: str | None, checkpoint: Checkpoint) -> dict[str, WorkingSet] | None:
    """Read the recording of each process; one that has none is brought nothing first."""
    if path is None:
        return None
    parts = [str(task.pid) for task in checkpoint.tasks if not task.dead]
    return {
        part: WorkingSet.load(name)
        for part in parts
        if os.path.exists(name := path.replace("{part}", part)) or "{part}" not in path
    }


def _is_draining(store: FdStore | None) -> bool:
    """Say whether a daemon before this one was through with its restores, and died."""
    return (
        store is not None
        and any(name.startswith(PREFIX) for name in store.taken)
        and not any(name.startswith(LISTENER) for name in store.taken)
    )
