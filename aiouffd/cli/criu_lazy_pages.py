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
import gc
import json
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ..errors import UffdError
from ..failure import Action, FailurePolicy
from ..graduation import keep_trying
from ..prefetch import Pace
from ..protection import PREFIX
from ..protocols.criu.checkpoint import Checkpoint
from ..protocols.criu.lazy_socket import NAME
from ..protocols.criu.restore import Restores
from ..reports import HandedOver, Refused, Report, Started, TakenOver
from ..sd_notify import take_listen_fds
from ..server import LISTENER, Server
from ..service import Service
from ..service_manager import ServiceManager
from ..session import Session
from ..sources import Source
from ..sources.measured import MeasuredSource, Reads
from ..sources.urls import shown
from ..working_set import WorkingSet
from . import operation, statuses
from .arguments import chunk_bytes, count, seconds
from .criu_options import (
    add_address_options,
    add_folder_options,
    add_process_options,
    add_tls_options,
    open_checkpoint,
    run_server,
    tls_client_context,
    work_directory,
)
from .orders import Orders
from .progress import counted
from .report_fields import fields_of
from .restore_count import RestoreCount
from .store_options import add_store_options, not_stored, open_store

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from ..fd_store import FdStore
    from ..handover import Handover
    from ..protocols.criu.page_client import PageClient
    from ..protocols.criu.task_memory import TaskMemory
    from ..unix_socket import Connection
    from .output import Lines

    Handovers = AsyncGenerator[Handover, None]
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_POLICIES: Final = {action.value: action for action in (Action.POISON, Action.KILL, Action.ZERO)}

#: Forked children served at once: a restored server may have any number, and none may be missing.
_MAX_CHILDREN: Final = 4096

_CHUNK_NEAR: Final = 256 << 10  # bytes around a fault, of images on this machine
_CHUNK_FAR: Final = 64 << 10  # the same from elsewhere

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
        "--page-server",
        action="store_true",
        help="bring pages from a page server: `criu page-server --lazy-pages`, a live `criu dump"
        " --lazy-pages`, or `aiouffd criu page-server`",
    )
    add_address_options(
        what, address="where the page server is (default: 127.0.0.1)", port="its port"
    )
    what.add_argument(
        "--protocol",
        type=int,
        choices=(24, 32),
        help="the bytes of its headers: 24 up to CRIU 4.1, 32 from 4.2 on (default: as of the CRIU"
        " that has made the images)",
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
    add_tls_options(parser.add_argument_group("how to speak to the page server"))
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
        "--policy",
        choices=_POLICIES,
        help="see below (default: poison; kill if the pages come from a live dump, whose processes"
        " go on where they were when the line breaks)",
    )
    how.add_argument(
        "--chunk",
        type=chunk_bytes,
        metavar="BYTES",
        help="bring so much around each fault (default: 256K, or 64K from a page server; with"
        " --no-push one page)",
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

    operation.raise_descriptor_limit()  # a tree may be of any size
    gc.freeze()  # what was imported lives to the end: to look at it again and again takes time
    try:
        return run_server(args, serve)
    finally:
        gc.freeze()  # at the end, too


class _Daemon:
    """One run of the command."""

    def __init__(self, args: argparse.Namespace, out: Lines, ready: Callable[[], None]) -> None:
        self._args = args
        self._out = out
        self._ready = ready
        self._path = os.path.join(work_directory(args), NAME)
        self._orders = Orders()
        self._manager = ServiceManager()
        self._refused = 0
        self._through = asyncio.Event()  # with its restores
        self._completing: set[asyncio.Task[None]] = set()
        self._count: RestoreCount
        self._server: Server

    async def run(self) -> int:
        """Open everything, serve, close everything; give the exit status."""
        args = self._args
        taken = take_listen_fds()
        for _, fd in not_stored(taken):
            fd.close()
        async with contextlib.AsyncExitStack() as stack:
            store = open_store(args, taken)
            if store is not None:
                stack.enter_context(store)
            self._count = RestoreCount(store)
            stack.callback(self._count.close)
            self._refused = self._count.failed
            checkpoint = await stack.enter_async_context(await open_checkpoint(self._args))
            client = await self._connect(checkpoint)
            if client is None:
                await checkpoint.find_pages()
            else:
                await stack.enter_async_context(client)
            status = await self._serve(checkpoint, client, store)
            if client is not None and status == statuses.DONE:
                await client.finish()  # a live dump ends its processes then, not before
            self._count.forget()
            return status

    async def _connect(self, checkpoint: Checkpoint) -> PageClient | None:
        args = self._args
        context = tls_client_context(args)
        if not args.page_server:
            if args.address or args.port or context is not None:
                raise UffdError("--address, --port and --tls are those of a --page-server")
            return None
        from ..protocols.criu.page_client import PageClient, header_bytes_of

        if not args.port:
            raise UffdError("--page-server needs its --port")
        size = args.protocol or await header_bytes_of(checkpoint)
        return await PageClient.connect(
            args.address or "127.0.0.1",
            args.port,
            header_bytes=size,
            ssl=context,
            guard=_first_page(checkpoint),
        )

    async def _serve(
        self, checkpoint: Checkpoint, client: PageClient | None, store: FdStore | None
    ) -> int:
        args, orders = self._args, self._orders
        accounts = [Reads("pages")] if operation.wanted(args) else []
        restores = Restores(checkpoint, client)
        server = self._server = Server(
            self._path,
            self._counted(restores.receive),
            restores if not accounts else _Measured(restores, accounts[0]),
            service=self._service(checkpoint),
            handshake_timeout=None,
            replace=args.replace,
            any_directory=args.any_directory,
            senders=True,
            listen=not (self._is_through() or _is_draining(store)),
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
                        f"serving {_processes(tasks)} of {name} on {server.path}",
                        *(f"{what} on {place}" for what, place in where.items()),
                    ]
                ),
            )
            with self._manager as manager:
                manager.ready(f"serving {name}")
                self._ready()
                if client is None:
                    aborted = await self._run_until_told()
                else:
                    aborted = await self._run_while_there(client)
        self._tell(
            {
                "event": "stopped",
                "restores": self._count.finished,
                "failed_restores": self._count.failed + self._count.lost,
                "served": server.served,
                "failed": server.failed,
            },
            f"stopped: {counted(self._count.finished, 'restore', 'restores')},"
            f" {_processes(server.served)} served,"
            f" {server.failed} of them with failures",
        )
        if aborted:
            return statuses.CUT_SHORT
        return statuses.FAILED if self._refused or server.failed else statuses.DONE

    def _service(self, checkpoint: Checkpoint) -> Service:
        args = self._args
        policy = _POLICIES[args.policy or _default_policy(checkpoint)]
        recorder = None
        if args.record is not None:
            from ..recording import Recorder

            recorder = Recorder(args.record, window=args.record_window)
        return Service(
            failure=FailurePolicy(then=policy),
            on_close=policy,
            deadline=args.deadline,
            chunk=self._chunk(),
            max_children=_MAX_CHILDREN,
            replay=_replays(args.replay, checkpoint),
            any_image=args.any_image,
            hydrate=Pace.OFF if args.no_push else Pace(args.pace),
            recorder=recorder,
            let_go=not args.no_push,
        )

    def _chunk(self) -> int:
        """Say how much to bring around each fault: what comes anyway may as well come early."""
        args = self._args
        if args.chunk is not None or args.no_push:
            return args.chunk or 0
        return _CHUNK_FAR if args.page_server or args.images else _CHUNK_NEAR

    # --- what happens ------------------------------------------------------------------

    def _tell(self, fields: dict[str, Any], text: str) -> None:
        if self._args.json:
            text = json.dumps({"time": round(time.time(), 3)} | fields)
        self._out.put(text)

    def _report(self, what: Report) -> None:
        self._tell(fields_of(what), str(what))
        self._manager.status(f"serving {_processes(len(self._server.sessions))}")
        if isinstance(what, Started | TakenOver) and self._orders.draining.is_set():
            self._complete(what.session)
        elif isinstance(what, HandedOver):
            self._count.finish()
        elif isinstance(what, Refused):
            self._refused += 1
            if not what.part:
                self._count.fail()
        if self._is_through():
            self._through.set()

    def _is_through(self) -> bool:
        """Say whether there were as many restores as there are to be."""
        return not self._args.keep_serving and self._count.over >= self._args.restores

    def _counted(
        self, receive: Callable[[Connection], Handovers]
    ) -> Callable[[Connection], Handovers]:
        """Count the restores that are under way."""

        async def receive_and_count(connection: Connection) -> Handovers:
            begun = False
            async with contextlib.aclosing(receive(connection)) as received:
                try:
                    async for handover in received:
                        if not begun:
                            self._count.begin()
                            begun = True
                        yield handover
                finally:
                    if begun:
                        self._count.end()

        return receive_and_count

    async def _run_until_told(self) -> bool:
        """Serve to the end; give whether living processes were closed by a second signal."""
        server, orders = self._server, self._orders
        if server.draining:  # a daemon before this one was through, or told to end
            self._through.set()
        told = asyncio.ensure_future(orders.draining.wait())
        through = asyncio.ensure_future(self._through.wait())
        await asyncio.wait((told, through), return_when=asyncio.FIRST_COMPLETED)
        through.cancel()
        draining = asyncio.ensure_future(server.drain())
        await asyncio.wait((told, draining), return_when=asyncio.FIRST_COMPLETED)
        if told.done():
            self._complete_all()
        told.cancel()
        if not draining.done():
            second = asyncio.ensure_future(orders.stopping.wait())
            await asyncio.wait((draining, second), return_when=asyncio.FIRST_COMPLETED)
            second.cancel()
        living = 0 if draining.done() else len(server.sessions)
        if living:
            self._tell(
                {"event": "aborting", "sessions": living},
                f"aborting, closing {_processes(living)} by the policy",
            )
        if not draining.done():
            await server.aclose()
        await draining
        await asyncio.gather(*self._completing)
        return living > 0

    async def _run_while_there(self, client: PageClient) -> bool:
        """Serve as long as the page server is there: what it has, nobody else has."""
        running = asyncio.ensure_future(self._run_until_told())
        lost = asyncio.ensure_future(client.wait_lost())
        await asyncio.wait((running, lost), return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            living = len(self._server.sessions)
            self._count.fail()
            self._refused += 1
            self._tell(
                {"event": "lost", "reason": lost.result(), "sessions": living},
                f"{lost.result()}; closing {_processes(living)} by the policy",
            )
            self._through.set()
            await self._server.aclose()
        lost.cancel()
        return await running

    def _complete_all(self) -> None:
        """Bring what is missing, and let all processes live on; those that come later, too."""
        sessions = self._server.sessions
        self._manager.stopping(f"bringing the rest of {_processes(len(sessions))}")
        self._tell(
            {"event": "draining", "sessions": len(sessions)},
            f"draining: bringing the rest of {_processes(len(sessions))}",
        )
        for session in sessions:
            self._complete(session)

    def _complete(self, session: Session) -> None:
        if not session.service.let_go:  # else it does so by itself
            coro = keep_trying(session.complete, session.name)
            self._completing.add(asyncio.create_task(coro, name="aiouffd complete"))


def _processes(number: int) -> str:
    return counted(number, "process", "processes")


class _Measured:
    """Restores whose reads are measured together."""

    def __init__(self, restores: Restores, reads: Reads) -> None:
        self._restores = restores
        self._reads = reads

    async def open_part(self, part: str) -> Source:
        return MeasuredSource(await self._restores.open_part(part), self._reads.name, self._reads)


def _memories(checkpoint: Checkpoint) -> list[TaskMemory]:
    return [checkpoint.memory(task.pid) for task in checkpoint.tasks if not task.dead]


def _first_page(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Give a process and the address of a page of it that a page server has."""
    for memory in _memories(checkpoint):
        if memory.lazy_starts:
            return memory.pid, memory.address_of(memory.lazy_starts[0])
    return None


def _default_policy(checkpoint: Checkpoint) -> str:
    live = any(memory.live_bytes for memory in _memories(checkpoint))
    return Action.KILL.value if live else Action.POISON.value


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


def _has_sessions(store: FdStore | None) -> bool:
    """Say whether a daemon before this one has left processes to serve on."""
    return store is not None and any(name.startswith(PREFIX) for name in store.taken)


def _is_draining(store: FdStore | None) -> bool:
    """Say whether a daemon before this one was through with its restores, or drained, and died."""
    return (
        store is not None
        and _has_sessions(store)
        and not any(name.startswith(LISTENER) for name in store.taken)
    )
