"""``aiouffd migrate send-tree``: a process and all that descend from it, sent to another machine.

Knows: options, signals, what is said to people and programs, what each end means to them.
Must not know: how a migration is carried out, CRIU.

Laws of this file:

* The first SIGINT or SIGTERM lets the processes run on here, if they may still; else they go on
  there, which is said, and a second one gives the migration up.
* Whatever happens, the last line says where the processes run, and what to do if nobody knows; so
  does the exit status.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import sys
from typing import TYPE_CHECKING, Final

from ..errors import MigrationFailed, UffdError
from ..migration.outgoing import Outgoing, Plan
from ..migration.stages import Stage
from ..migration.tree_leaving import LeavingTree
from . import statuses
from .arguments import count, host_and_port
from .diagnostics import logging_to
from .migrate_options import (
    add_trust_options,
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
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_STATUSES: Final = {
    "source": statuses.FAILED,
    "unknown": statuses.STANDS_STILL,
    "lost": statuses.LOST,
}

_EPILOG: Final = """\
examples:
  aiouffd migrate send-tree 4711 10.0.0.7:7441 --tls-cert me.pem --tls-cacert ca.pem
  aiouffd migrate send-tree 4711 10.0.0.7:7441 --plain --criu-option=--tcp-established

CRIU stops the processes and writes them into files.  All but their memory goes to the other
machine, where `aiouffd migrate receive-tree` has CRIU make them anew; their memory follows while
they run there, what they touch first.  Both sides take root.

signals:
  SIGTERM, SIGINT  before they run there: they run on here.  Later they go on there; a second one
                   gives up, and they stand still here

exit status:
  0  they run there with all of their memory, and are gone here
  1  they run on here
  7  they stand still here, and whether they run there is not known
  8  they ran there and were killed; here they stand still as of the switch
"""


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser = commands.add_parser(
        "send-tree",
        help="send a process and all that descend from it, by CRIU",
        description="Send a process and all that descend from it to where `aiouffd migrate"
        " receive-tree` waits for them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pid", metavar="PID", type=count, help="of the first process")
    parser.add_argument("to", metavar="HOST:PORT", type=host_and_port, help="where they go")
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        help="our own, where the other machine gets the memory (default: the one that HOST is"
        " reached from)",
    )
    parser.add_argument(
        "--port", metavar="PORT", type=count, default=0, help="the same (default: a free one)"
    )
    criu = add_criu_options(parser, "dump")
    criu.add_argument(
        "--keep", action="store_true", help="keep the images, a checkpoint as of the switch"
    )
    trust = add_trust_options(parser)
    trust.add_argument(
        "--server-name",
        default="",
        metavar="NAME",
        help="the name that the other side's certificate must be for (default: HOST)",
    )
    add_output_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Send them; give the exit status."""
    tls = has_tls(args, args.to[0], doing="sending processes to")
    if args.server_name and not tls:
        raise UffdError("--server-name is a name in a certificate: it takes --tls-cert")
    with (
        Lines(sys.stdout) as out,
        LiveLines(sys.stderr) as diagnostics,
        logging_to(diagnostics, as_json=args.json, level=args.log_level),
    ):
        return asyncio.run(_Sending(args, tls, Tell(out, diagnostics, as_json=args.json)).run())


class _Sending:
    """One tree on its way, as its sender sees it."""

    def __init__(self, args: argparse.Namespace, tls: bool, tell: Tell) -> None:
        self._args = args
        self._tls = tls
        self._tell = tell
        self._to = where(*args.to)
        self._stage = Stage.OFFERED

    async def run(self) -> int:
        args = self._args
        client = client_context(args) if self._tls else None
        images = Images(args)
        kept = False
        tree: LeavingTree | None = None
        try:
            async with LeavingTree(
                args.pid,
                images.path,
                criu=args.criu,
                options=args.criu_option,
                host=args.address or _address_towards(*args.to),
                port=args.port,
                ssl=server_context(args) if self._tls else None,
                plain=args.plain,
                # Who gets the memory is who has got the rest.
                client_name=(args.server_name or args.to[0]) if self._tls else "",
            ) as tree:
                outgoing = Outgoing(
                    [],
                    *args.to,
                    plan=Plan(rounds=0, deadline=args.deadline),
                    ssl=client,
                    server_hostname=args.server_name,
                    name=tree.name,
                    on_progress=lambda outgoing: self._note(outgoing, tree),
                )
                self._tell(
                    "sending",
                    f"sending {tree.name} to {self._to}",
                    pid=args.pid,
                    name=tree.name,
                    to=self._to,
                )
                try:
                    await self._obeying(outgoing, tree)
                    kept = args.keep
                except (MigrationFailed, asyncio.CancelledError) as error:
                    kept = tree.has_left
                    raise self._failed(error, tree) from error
                number = len(tree.pids)
                await tree.end()
                self._tell_moved(outgoing, tree, number)
        except BaseException:
            if not (kept or (tree is not None and tree.has_left)):
                images.remove_images()
            raise
        if not kept:
            images.remove()
        return statuses.DONE

    def _note(self, outgoing: Outgoing, tree: LeavingTree) -> None:
        """Say that another stage has begun."""
        before, self._stage = self._stage, outgoing.stage
        if self._stage is Stage.FOLLOWING is not before:
            downtime = outgoing.figures.downtime
            self._tell(
                "running",
                f"it runs there, {downtime:.3f} s after it was stopped here;"
                f" {amount(tree.memory_bytes)} of memory follow",
                downtime=round(downtime, 6),
                image_bytes=tree.image_bytes,
                memory_bytes=tree.memory_bytes,
            )

    async def _obeying(self, outgoing: Outgoing, tree: LeavingTree) -> None:
        """Move them, and obey signals meanwhile."""
        orders = Orders()
        orders.take()
        running = asyncio.ensure_future(outgoing.run(tree))

        async def obey() -> None:
            await orders.draining.wait()
            if outgoing.cancel():
                return
            self._tell(
                "draining",
                "too late: they go on there, and this ends when all of their memory is there.  A"
                " second signal gives up",
            )
            await orders.stopping.wait()
            running.cancel()

        obeying = asyncio.ensure_future(obey())
        try:
            await running
        finally:
            obeying.cancel()
            await asyncio.wait((obeying,))

    def _tell_moved(self, outgoing: Outgoing, tree: LeavingTree, number: int) -> None:
        figures = outgoing.figures
        self._tell(
            "moved",
            f"moved {tree.name} to {self._to}: {counted(number, 'process', 'processes')},"
            f" {amount(tree.image_bytes)} before they ran there,"
            f" {amount(tree.memory_bytes)} of memory behind;"
            f" they stood still for {figures.downtime:.3f} s, {figures.seconds:.3f} s in all",
            processes=number,
            image_bytes=tree.image_bytes,
            memory_bytes=tree.memory_bytes,
            downtime=round(figures.downtime, 6),
            seconds=round(figures.seconds, 6),
        )

    def _failed(self, error: BaseException, tree: LeavingTree) -> UffdError:
        """Say where the processes run now."""
        outcome = error.outcome if isinstance(error, MigrationFailed) else "unknown"
        text = str(error) or "it was given up"
        if not tree.has_left:
            outcome = "source"
            if "runs on here" not in text:
                text = f"{tree.name} runs on here: {text}"
        else:
            pids = " ".join(map(str, tree.pids))
            text = (
                f"{text}.  What is here of {tree.name} stands still, and its images are in"
                f" {tree.folder}.  If it does not run there any more: `kill -CONT {pids}` lets it"
                f" go on as of the switch; else `kill -KILL {pids}`"
            )
        self._tell("failed", "", outcome=outcome, pids=tree.pids, error=text)
        return statuses.CommandError(_STATUSES.get(outcome, statuses.FAILED), text)


def _address_towards(host: str, port: int) -> str:
    """Give the address of this machine that another one is reached from.

    Raises:
        OSError: It cannot be reached, or has no such name.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    problem: OSError | None = None
    for family, kind, protocol, _, address in found:
        with contextlib.closing(socket.socket(family, kind, protocol)) as probe:
            try:
                probe.connect(address)  # nothing is sent
            except OSError as error:
                problem = error
                continue
            return str(probe.getsockname()[0])
    raise problem or OSError(f"{host} has no address")
