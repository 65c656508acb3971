"""``aiouffd migrate receive-tree``: a tree of processes taken in, that another machine sends.

Knows: options, signals, what is said to people and programs, what each end means to them.
Must not know: how a migration is carried out, CRIU.

Laws of this file:

* Before the processes run here, SIGINT or SIGTERM lets them run on where they were.  Later the
  first one is noted, for they run here; the second one kills them.
* If this is killed while memory is missing, they are killed: a keeper around it sees to that.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final

from ..errors import ClosedError, MigrationFailed
from ..fd_store import FdStore
from ..migration.listener import Listener
from ..migration.tree_arriving import ArrivingTree
from ..migration.tree_leaving import MOST_IMAGES
from ..protection import PREFIX
from . import operation, statuses
from .arguments import host_and_port
from .diagnostics import logging_to
from .migrate_options import (
    add_client_options,
    add_trust_options,
    check_client_options,
    client_context,
    has_tls,
    server_context,
    where,
)
from .migrate_progress import LiveLines, Tell
from .migrate_tree_options import Images, add_criu_options, add_output_options
from .orders import Orders
from .output import Lines
from .progress import amount, counted

if TYPE_CHECKING:
    import ssl

    from ..migration.incoming import Incoming

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_WORDS: Final = ("migrate", "receive-tree")
_OWN_FDS: Final = 64  # of the keeper; what it keeps is there twice for a moment
_STATUSES: Final = {"source": statuses.FAILED, "lost": statuses.LOST}

_EPILOG: Final = """\
examples:
  aiouffd migrate receive-tree 10.0.0.7:7441 --tls-cert me.pem --tls-cacert ca.pem \\
      --client-name old-host.example
  aiouffd migrate receive-tree 10.0.0.7:7441 --plain

The processes get the pids that they had, which must be free here (or --pid-namespace), and the
files that they had open, which must be here under the same names.  It takes root, and whoever
may send can run anything.

exit status:
  0  they run here, with all of their memory
  1  they do not run here, and run on where they were
  8  they ran here and were killed, as memory of theirs was missing
"""


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser = commands.add_parser(
        "receive-tree",
        help="take a process and all that descend from it, by CRIU",
        description="Wait for a tree of processes that `aiouffd migrate send-tree` sends, and have"
        " CRIU make it anew.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("at", metavar="HOST:PORT", type=host_and_port, help="where to wait")
    criu = add_criu_options(parser, "restore")
    criu.add_argument(
        "--pid-namespace",
        action="store_true",
        help="make them in a pid namespace of their own, where no pid is taken; CRIU stays as its"
        " first process",
    )
    add_client_options(add_trust_options(parser))
    add_output_options(parser)
    parser.add_argument("--kept", action="store_true", help=argparse.SUPPRESS)
    return parser


def run(args: argparse.Namespace) -> int:
    """Take one in; give the exit status."""
    tls = has_tls(args, args.at[0], doing="waiting for processes on")
    check_client_options(args, tls=tls)
    operation.raise_descriptor_limit()
    if not args.kept and tuple(sys.argv[1:3]) == _WORDS:  # the program is this command alone
        return _keep()
    if args.kept:
        os.setpgid(0, 0)  # what a terminal sends comes from the keeper, once
    with (
        Lines(sys.stdout) as out,
        LiveLines(sys.stderr) as diagnostics,
        logging_to(diagnostics, as_json=args.json, level=args.log_level),
    ):
        return asyncio.run(_Receiving(args, tls, Tell(out, diagnostics, as_json=args.json)).run())


def _keep() -> int:
    """Run ourselves under a keeper: who is killed cannot kill what it has left half-way."""
    from ..keeper import Keeper, Kept, Patience, kill_targets

    killed: list[str] = []

    async def kill(kept: Kept) -> set[str]:
        from ..takeover import fail_all_closed

        killed.extend(name for name in kept if name.startswith(PREFIX))
        left = await kill_targets(kept)  # forked children have no pidfd
        return await fail_all_closed({name: kept[name] for name in left})

    logging.getLogger("aiouffd.keeper").setLevel(logging.CRITICAL + 1)  # we say it ourselves
    command = [sys.executable, *sys.orig_argv[1:], "--kept"]
    most = (operation.descriptor_limit() - _OWN_FDS) // 2
    keeper = Keeper(command, fail_closed=kill, patience=Patience(tries=1), max_fds=most)
    status = asyncio.run(keeper.run())
    if killed:
        raise statuses.CommandError(
            statuses.LOST,
            "what brought the memory was killed, and so were the processes that lacked some of it",
        )
    return status


class _Receiving:
    """One tree that comes, as its receiver sees it."""

    def __init__(self, args: argparse.Namespace, tls: bool, tell: Tell) -> None:
        self._args = args
        self._tls = tls
        self._tell = tell
        self._orders = Orders()
        self._runs = False
        self._taken: Incoming | None = None

    async def run(self) -> int:
        args = self._args
        client = server = None
        if self._tls:
            server, client = server_context(args), client_context(args)
            # The source says where its memory is, by an address that no certificate needs to have:
            # whoever gives it shows the same name as whoever has brought the rest.
            client.check_hostname = not args.any_client
        self._orders.take()
        store = FdStore.from_environment() if args.kept else None
        with contextlib.nullcontext() if store is None else store:
            return await self._receive(server, client, store)

    async def _receive(
        self,
        server: ssl.SSLContext | None,
        client: ssl.SSLContext | None,
        store: FdStore | None,
    ) -> int:
        args = self._args
        async with Listener(
            *args.at,
            ssl=server,
            plain=args.plain,
            client_name=args.client_name or "",
            deadline=args.deadline,
            most_memory=0,
            most_state=MOST_IMAGES,
        ) as listener:
            at = where(args.at[0], listener.port)
            self._tell("listening", f"waiting for processes on {at}", at=at)
            incoming = await self._accept(listener)
            self._taken = incoming
            if incoming is None:
                self._tell("stopped", "stopped: nothing has come")
                return statuses.FAILED
            self._tell(
                "coming",
                f"{incoming.name} comes from {incoming.peer}",
                name=incoming.name,
                peer=incoming.peer,
            )
            images = Images(args)
            tree = ArrivingTree(
                incoming,
                images.path,
                criu=args.criu,
                options=args.criu_option,
                namespace=args.pid_namespace,
                ssl=client,
                server_hostname=args.client_name or "",
                store=store,
                deadline=args.deadline,
            )
            try:
                await self._obeying(self._take(incoming, tree))
            except (MigrationFailed, asyncio.CancelledError) as error:
                images.remove_images()
                raise self._failed(error) from error
            except BaseException:
                images.remove_images()
                raise
            images.remove()
        return statuses.DONE

    async def _accept(self, listener: Listener) -> Incoming | None:
        """Wait for one, or for the order to end."""
        coming = asyncio.ensure_future(listener.accept())
        order = asyncio.ensure_future(self._orders.draining.wait())
        try:
            await asyncio.wait((coming, order), return_when=asyncio.FIRST_COMPLETED)
            return coming.result() if coming.done() else None
        except ClosedError:
            return None
        finally:
            for task in (coming, order):
                task.cancel()
            await asyncio.wait((coming, order))

    async def _take(self, incoming: Incoming, tree: ArrivingTree) -> None:
        async with tree:
            await tree.run()
            self._runs = True
            self._tell(
                "running",
                f"{incoming.name} runs here: {counted(tree.processes, 'process', 'processes')};"
                f" {amount(tree.memory_bytes)} of memory follow",
                processes=tree.processes,
                memory_bytes=tree.memory_bytes,
            )
            await tree.complete()
        self._tell("moved", f"{incoming.name} has all of its memory, and lives on by itself")

    async def _obeying(self, work: Coroutine[Any, Any, None]) -> None:
        """Take it in, and obey signals meanwhile."""
        running = asyncio.ensure_future(work)

        async def obey() -> None:
            await self._orders.draining.wait()
            if self._runs:
                self._tell(
                    "draining",
                    "they run here, and this ends when they have all of their memory.  A second"
                    " signal kills them",
                )
                await self._orders.stopping.wait()
            running.cancel()

        obeying = asyncio.ensure_future(obey())
        try:
            await running
        finally:
            obeying.cancel()
            await asyncio.wait((obeying,))

    def _failed(self, error: BaseException) -> statuses.CommandError:
        """Say where the processes run now."""
        outcome = error.outcome if isinstance(error, MigrationFailed) else ""
        may_run = self._runs or (self._taken is not None and self._taken.may_run)
        outcome = outcome or ("lost" if may_run else "source")
        text = str(error) or ("they were killed" if may_run else "it was stopped")
        self._tell("failed", "", outcome=outcome, error=text)
        return statuses.CommandError(_STATUSES.get(outcome, statuses.FAILED), text)
