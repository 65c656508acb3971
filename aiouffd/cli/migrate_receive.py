"""``aiouffd migrate receive``: waits for programs that other machines send, and starts them.

Knows: options, signals, what is said to people and programs.
Must not know: how a migration is carried out.

Laws of this file:

* Once a program has all of its memory it lives on by itself, whatever becomes of this command.
* The first SIGINT or SIGTERM refuses what has not been switched yet, and brings what runs here its
  memory; a second one ends a program that lacks some, and its source is told.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from ..errors import MigrationFailed, UffdError
from ..migration import report as reports
from ..migration.incoming import Incoming
from ..migration.listener import Listener
from ..migration.moving import Arriving, arriving
from ..migration.stages import Stage
from ..threads import in_thread
from . import statuses
from .arguments import count, host_and_port
from .diagnostics import logging_to
from .migrate_figures import summary
from .migrate_options import (
    add_client_options,
    add_deadline_option,
    add_output_options,
    add_trust_options,
    check_client_options,
    has_tls,
    server_context,
    where,
)
from .migrate_progress import Estimate, LiveLines, Tell
from .orders import Orders
from .output import Lines
from .picture import printable
from .progress import amount, counted

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_LOOK_S = 0.1  # between two looks at how it goes

_EPILOG = """\
examples:
  aiouffd migrate receive 10.0.0.7:7440 --tls-cert me.pem --tls-cacert ca.pem \\
      --client-name old-host.example -- worker --socket /run/worker.sock
  aiouffd migrate receive 10.0.0.7:7440 --plain --wait -- python3 worker.py

PROGRAM is started for each program that comes: it finds memory and state where
aiouffd.migration.program.arrive() looks for them.  It runs before all of its memory is here.
Once all is here it lives on by itself, and this command ends.

Until then the two need each other: if this command is killed, the program is killed, too, and
its source still has what had not come.

signals:
  SIGTERM, SIGINT  refuse what does not run here yet; bring what runs here its memory, then end.
                   A second one ends a program that lacks some

exit status:
  0  the program has all of its memory; with --wait, its own exit status
  1  it does not run here
  8  it ran here, and has ended without all of its memory
"""


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser = commands.add_parser(
        "receive",
        help="take a program that another machine sends",
        description="Wait for a program that `aiouffd migrate send` sends, and start it here.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("at", metavar="HOST:PORT", type=host_and_port, help="where to listen")
    parser.add_argument(
        "command_line", metavar="PROGRAM", nargs="+", help="after --: what to start for it"
    )
    much = parser.add_argument_group("how long")
    much.add_argument(
        "--times",
        type=count,
        default=1,
        metavar="N",
        help="take so many, one after the other, then end (default: 1)",
    )
    much.add_argument(
        "--wait",
        action="store_true",
        help="stay until the program ends, pass SIGTERM on, and end as it does",
    )
    add_deadline_option(much)
    add_client_options(add_trust_options(parser))
    add_output_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Receive; give the exit status."""
    tls = has_tls(args, args.at[0], doing="taking programs in on")
    check_client_options(args, tls=tls)
    if shutil.which(args.command_line[0]) is None:
        raise UffdError(f"there is no program {args.command_line[0]} here to start")
    if args.wait and args.times > 1:
        raise UffdError("--wait is for one program; leave out --times")
    with (
        Lines(sys.stdout) as out,
        LiveLines(sys.stderr) as diagnostics,
        logging_to(diagnostics, as_json=args.json, level=args.log_level),
    ):
        tell = Tell(out, diagnostics, as_json=args.json)
        return asyncio.run(_Receiving(args, tls, tell).run())


class _Receiving:
    """Programs that come, one after the other."""

    def __init__(self, args: argparse.Namespace, tls: bool, tell: Tell) -> None:
        self._args = args
        self._tls = tls
        self._tell = tell
        self._orders = Orders()
        self._incoming: Incoming | None = None  # the one under way, or the last
        self._began = 0.0
        self._estimate = Estimate()
        self._programs: list[subprocess.Popen[bytes]] = []  # that live on

    async def run(self) -> int:
        args = self._args
        host, port = args.at
        self._orders.take()
        async with contextlib.AsyncExitStack() as stack:
            listener = await stack.enter_async_context(
                Listener(
                    host,
                    port,
                    ssl=server_context(args) if self._tls else None,
                    plain=args.plain,
                    client_name=args.client_name or "",
                    deadline=args.deadline,
                )
            )
            at = {}
            if args.metrics is not None:
                from ..migration.prometheus import text_of
                from .metrics_site import giving

                give = text_of(self._report_now)
                at["metrics"] = await stack.enter_async_context(giving(give, *args.metrics))
            whom = args.client_name or ("whoever has a certificate" if self._tls else "anybody")
            place = where(host, listener.port)
            self._tell(
                "listening",
                f"waiting on {place} for programs of {whom},"
                f" {'TLS' if self._tls else 'not encrypted'}"
                + "".join(f"; {name} on {url}" for name, url in at.items()),
                address=host,
                port=listener.port,
                tls=self._tls,
                **at,
            )
            worst = statuses.DONE
            for number in range(args.times):
                incoming = await self._next(listener)
                if incoming is None:
                    self._tell(
                        "stopped",
                        f"stopped after {counted(number, 'program', 'programs')}",
                        programs=number,
                    )
                    worst = max(worst, statuses.DONE if number else statuses.FAILED)
                    break
                worst = max(worst, await self._take(incoming))
            if args.wait and self._programs:
                return await self._outlive(self._programs[0])
        for program in self._programs:
            if program.poll() is None:
                program.returncode = 0  # it lives on, and is not ours to wait for any more
        return worst

    async def _next(self, listener: Listener) -> Incoming | None:
        """Wait for a migration, or for the order to end."""
        coming = asyncio.ensure_future(listener.accept())
        order = asyncio.ensure_future(self._orders.draining.wait())
        try:
            await asyncio.wait((coming, order), return_when=asyncio.FIRST_COMPLETED)
            if order.done():
                return None
            return coming.result()
        finally:
            for task in (coming, order):
                task.cancel()
            await asyncio.wait((coming, order))

    async def _take(self, incoming: Incoming) -> int:
        """Take one program in; say how it ended."""
        self._incoming, self._began = incoming, time.time()
        self._estimate = Estimate()
        self._tell.begin()
        size = sum(each.length for each in incoming.extents)
        name = printable(incoming.name) or "a program"
        self._tell(
            "coming",
            f"{name} comes from {incoming.peer}: {amount(size)}"
            f" in {counted(len(incoming.extents), 'region', 'regions')}",
            name=incoming.name,
            peer=incoming.peer,
            memory_bytes=size,
            regions=len(incoming.extents),
        )
        try:
            async with self._obeyed(incoming), arriving(incoming, self._args.command_line) as here:
                await self._live(here, name)
            await incoming.aclose()  # the source says its last word
        except MigrationFailed as error:
            return self._failed(incoming, error)
        self._save(incoming, outcome=reports.MOVED)
        report = reports.of_destination(incoming, began=self._began, outcome=reports.MOVED)
        lines = [
            f"{name} (pid {here.process.pid}) has all of its memory and lives on by itself",
            *summary(report),
        ]
        self._tell("moved", "\n  ".join(lines), pid=here.process.pid, **report["figures"])
        return statuses.DONE

    async def _live(self, here: Arriving, name: str) -> None:
        await here.run()
        pid = here.process.pid
        self._tell("running", f"{name} (pid {pid}) runs here, its memory follows", pid=pid)
        await here.complete()
        self._programs.append(here.process)

    @contextlib.asynccontextmanager
    async def _obeyed(self, incoming: Incoming) -> AsyncIterator[None]:
        """Obey signals, and say how it goes, as long as the block runs."""
        tasks = [
            asyncio.ensure_future(self._obey(incoming)),
            asyncio.ensure_future(self._watch(incoming)),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _obey(self, incoming: Incoming) -> None:
        await self._orders.draining.wait()
        if incoming.stage not in {Stage.FOLLOWING, Stage.DONE}:
            incoming.note_failed("the destination was told to end")
            return
        self._tell(
            "draining",
            "the program runs here; this ends once it has all of its memory.  A second signal ends"
            " the program",
        )
        await self._orders.stopping.wait()
        incoming.note_failed("the destination was told to end")

    async def _watch(self, incoming: Incoming) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        while True:
            self._estimate.note(loop.time() - began, incoming.received_bytes)
            self._tell.progress(lambda: self._facts(incoming, loop.time() - began))
            await asyncio.sleep(_LOOK_S)

    def _facts(self, incoming: Incoming, seconds: float) -> dict[str, Any]:
        source, stalls = incoming.source, incoming.stalls
        runs = incoming.stage is Stage.FOLLOWING
        return {
            "stage": incoming.stage.value,
            "connected": incoming.is_connected,
            "seconds": round(seconds, 3),
            "round": source.get("round", 0),
            "dirty_rate": round(source.get("dirty_rate", 0.0)),
            "sent_bytes": incoming.received_bytes,
            "zero_bytes": incoming.zero_bytes,
            "left_bytes": incoming.left_bytes if runs else source.get("left_bytes", 0),
            "demand": stalls.network.count,
            "stall": round(sum(stalls.by_thread.values()), 6),
            "estimated_end": self._estimate.left(
                incoming.left_bytes, dirty_rate=0.0, rounds=0, downtime=0.0
            )
            if runs
            else None,
        }

    # --- how it ended --------------------------------------------------------------------

    def _failed(self, incoming: Incoming, error: MigrationFailed) -> int:
        text = str(error)
        if error.outcome == "lost" and error.stage == Stage.SWITCHING.value:
            text = f"{text}.  Its source stands still, with all of its memory"
        elif error.outcome == "lost":
            text = f"the program was ended, it lacked memory: {text}.  Its source still has that"
        else:
            text = f"the program does not run here: {text}"
        self._save(incoming, outcome=error.outcome, error=text)
        last = self._args.times == 1  # the error is said by whoever called us
        self._tell("failed", "" if last else text, outcome=error.outcome, error=text)
        status = statuses.LOST if error.outcome == "lost" else statuses.FAILED
        if last:
            raise statuses.CommandError(status, text) from error
        return status

    def _report_now(self) -> dict[str, Any] | None:
        incoming = self._incoming
        if incoming is None:
            return None
        return reports.of_destination(incoming, began=self._began)

    def _save(self, incoming: Incoming, *, outcome: str, error: str = "") -> None:
        """Write the report; that it cannot be written does not hide what has happened."""
        if self._args.report is None:
            return
        report = reports.of_destination(incoming, began=self._began, outcome=outcome, error=error)
        try:
            reports.save(report, self._args.report)
        except OSError as problem:
            text = f"the report cannot be written: {problem.filename}: {problem.strerror}"
            self._tell("warning", text, error=text)

    async def _outlive(self, program: subprocess.Popen[bytes]) -> int:
        """Wait for the program's end; what ends us ends it."""

        async def pass_on() -> None:
            await self._orders.draining.wait()
            program.send_signal(signal.SIGTERM)
            await self._orders.stopping.wait()
            program.kill()

        passing = asyncio.ensure_future(pass_on())
        try:
            status: int = await in_thread(program.wait)
        finally:
            passing.cancel()
            await asyncio.wait((passing,))
        self._tell("ended", "", status=status)
        return status if status >= 0 else 128 - status
