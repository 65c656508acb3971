"""``aiouffd migrate send``: a running program, sent to another machine.

Knows: options, signals, what is said to people and programs, what each end means to them.
Must not know: how a migration is carried out.

Laws of this file:

* The first SIGINT or SIGTERM lets the program run on here, if it may still be; else the migration
  goes on, which is said, and a second one gives it up.
* Whatever happens, the last line says where the program runs, and what to do if nobody knows; so
  does the exit status.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import ssl
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from ..errors import MigrationFailed, PeerError, UffdError
from ..migration import packing
from ..migration import report as reports
from ..migration.channel import ToldError
from ..migration.moving import Leaving
from ..migration.outgoing import Cancelled, Outgoing, Plan
from ..migration.stages import Stage
from . import statuses
from .arguments import byte_count, count, host_and_port, seconds_or_none
from .diagnostics import logging_to
from .migrate_figures import summary
from .migrate_options import (
    add_deadline_option,
    add_output_options,
    add_trust_options,
    client_context,
    has_tls,
    where,
)
from .migrate_progress import Estimate, LiveLines, Tell
from .orders import Orders
from .output import Lines
from .progress import amount, counted

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DEFAULT: Final = Plan()
_STATUSES: Final = {
    "source": statuses.FAILED,
    "unknown": statuses.STANDS_STILL,
    "lost": statuses.LOST,
}

_EPILOG: Final = """\
examples:
  aiouffd migrate send /run/worker.sock 10.0.0.7:7440 --tls-cert me.pem --tls-cacert ca.pem
  aiouffd migrate send /run/worker.sock 10.0.0.7:7440 --plain --report move.json

The program runs on here while its memory is copied, in rounds of what it has written meanwhile.
Then it stands still for a moment and goes on there; what is left follows, what it touches first.
That is the default; the same numbers give the other two:
  --rounds 0   post-copy: it goes on there at once, and all of its memory follows
  --behind 0   pre-copy: nothing follows; if it writes faster than it can be sent it stays here

signals:
  SIGTERM, SIGINT  before it stands still: it runs on here.  Later it goes on there; a second one
                   gives up, and the program stands still here with all of its memory

exit status:
  0  it runs there with all of its memory
  1  it runs on here
  7  it stands still here, and whether it runs there is not known: `aiouffd migrate restart`
  8  it ran there and has failed; its memory as of the switch is here
"""


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser = commands.add_parser(
        "send",
        help="send a running program to another machine",
        description="Send a running program to where `aiouffd migrate receive` waits for it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("socket", metavar="SOCKET", help="where the program can be told to move")
    parser.add_argument("to", metavar="HOST:PORT", type=host_and_port, help="where it goes")
    plan = parser.add_argument_group("how it goes")
    plan.add_argument(
        "--rounds",
        type=_number,
        metavar="N",
        help="passes over its memory while it runs here, at most; 0 is post-copy"
        f" (default: {_DEFAULT.rounds})",
    )
    plan.add_argument(
        "--downtime",
        type=seconds_or_none,
        default=_DEFAULT.downtime,
        metavar="SECONDS",
        help="switch as soon as what is left can be sent in this time; it is sent first then"
        " (default: %(default)s)",
    )
    plan.add_argument(
        "--behind",
        type=byte_count,
        metavar="BYTES",
        help="so much may follow after the switch, 0 is pre-copy; if more is left after the last"
        " round it runs on here (default: any amount)",
    )
    plan.add_argument(
        "--bandwidth",
        type=_some_bytes,
        metavar="BYTES",
        help="per second, at most; what is waited for is not held up (default: no limit)",
    )
    add_deadline_option(plan)
    plan.add_argument(
        "--checksums", action="store_true", help="check all that is sent; TLS does that anyway"
    )
    plan.add_argument(
        "--compress",
        choices=("zstd", "lz4"),
        help="send less, if the other side can; for lines slower than a processor",
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


def _number(text: str) -> int:
    return 0 if text == "0" else count(text)


def _some_bytes(text: str) -> int:
    value = byte_count(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text} is no number of bytes from 1 on, such as 100M")
    return value


def run(args: argparse.Namespace) -> int:
    """Send it; give the exit status."""
    tls = has_tls(args, args.to[0], doing="sending a program to")
    if args.server_name and not tls:
        raise UffdError("--server-name is a name in a certificate: it takes --tls-cert")
    if args.compress:
        packing.codec(args.compress)  # says what is missing
    with (
        Lines(sys.stdout) as out,
        LiveLines(sys.stderr) as diagnostics,
        logging_to(diagnostics, as_json=args.json, level=args.log_level),
    ):
        tell = Tell(out, diagnostics, as_json=args.json)
        return asyncio.run(_Sending(args, tls, tell).run())


class _Sending:
    """One program on its way, as its sender sees it."""

    def __init__(self, args: argparse.Namespace, tls: bool, tell: Tell) -> None:
        self._args = args
        self._tls = tls
        self._tell = tell
        self._to = where(*args.to)
        self._name = ""
        self._plan = _DEFAULT
        self._outgoing: Outgoing | None = None
        self._estimate = Estimate()
        self._began = time.time()
        self._gave_up = False

    async def run(self) -> int:
        args = self._args
        context = client_context(args) if self._tls else None
        try:
            leaving = await Leaving.open(args.socket)
        except ConnectionRefusedError as error:
            raise ConnectionRefusedError(
                error.errno, "the program that has made it is gone", args.socket
            ) from error
        except OSError as error:
            raise OSError(error.errno, error.strerror, args.socket) from error
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(leaving)
            if leaving.stage != "running":
                raise UffdError(
                    "the program stands still: its move has failed half-way.  See `aiouffd migrate"
                    " restart --help`"
                )
            self._name = leaving.name
            self._plan = self._planned(leaving)
            outgoing = self._outgoing = Outgoing(
                leaving.memory,
                *args.to,
                tracker=leaving.tracker if self._plan.rounds else None,
                plan=self._plan,
                ssl=context,
                server_hostname=args.server_name,
                name=leaving.name,
                on_progress=self._progress,
            )
            at = {}
            if args.metrics is not None:
                from ..migration.prometheus import text_of
                from .metrics_site import giving

                give = text_of(lambda: self._report(short=True))
                at["metrics"] = await stack.enter_async_context(giving(give, *args.metrics))
            self._tell(
                "sending",
                f"sending {leaving.name or 'a program'} (pid {leaving.peer.pid}):"
                f" {amount(outgoing.figures.memory_bytes)}"
                f" in {counted(len(leaving.memory), 'region', 'regions')} to {self._to},"
                f" {'TLS' if self._tls else 'not encrypted'}"
                + "".join(f"; {name} on {place}" for name, place in at.items()),
                name=leaving.name,
                pid=leaving.peer.pid,
                to=self._to,
                tls=self._tls,
                memory_bytes=outgoing.figures.memory_bytes,
                regions=len(leaving.memory),
                **at,
            )
            return await self._move(leaving, outgoing)

    def _planned(self, leaving: Leaving) -> Plan:
        """Make the plan that the options ask for, as far as this program allows."""
        args = self._args
        rounds = _DEFAULT.rounds if args.rounds is None else args.rounds
        if rounds and leaving.tracker is None:
            if args.rounds is not None or args.behind is not None:
                raise UffdError(
                    f"what the program writes cannot be seen: {leaving.untracked}  Without that"
                    " there is post-copy only: --rounds 0, without --behind"
                )
            self._tell(
                "untracked",
                f"what the program writes cannot be seen, so all of its memory follows after the"
                f" switch: {leaving.untracked}",
                why=leaving.untracked,
            )
            rounds = 0
        return Plan(
            rounds=rounds,
            downtime=args.downtime,
            behind=args.behind,
            bandwidth=args.bandwidth,
            deadline=args.deadline,
            checksums=args.checksums,
            compress=args.compress or "",
        )

    async def _move(self, leaving: Leaving, outgoing: Outgoing) -> int:
        """Let it move under the eyes of whoever sends signals; say how it ended."""
        moving = asyncio.ensure_future(outgoing.run(leaving))
        obeying = asyncio.ensure_future(self._obey(outgoing, moving))
        try:
            await moving
        except asyncio.CancelledError:
            if not self._gave_up:
                raise
            return self._given_up(outgoing)
        except (MigrationFailed, UffdError, OSError) as error:
            return self._failed(error)
        finally:
            obeying.cancel()
            await asyncio.wait((obeying,))
        try:
            await leaving.end()
        except PeerError as error:
            text = f"the program here could not be told to end: {error}"
            self._tell("warning", text, error=text)
        self._save(outcome=reports.MOVED)
        report = self._report(outcome=reports.MOVED)
        lines = [f"moved {self._name or 'the program'} to {self._to}", *summary(report)]
        self._tell("moved", "\n  ".join(lines), **report["figures"])
        return statuses.DONE

    async def _obey(self, outgoing: Outgoing, moving: asyncio.Future[None]) -> None:
        orders = Orders()
        orders.take()
        await orders.draining.wait()
        if outgoing.cancel():
            self._tell("cancelling", "cancelling: the program runs on here")
        else:
            self._tell(
                "too_late",
                "too late to cancel: the program goes on there, and its memory follows; a second"
                " signal gives up",
            )
        await orders.stopping.wait()
        self._gave_up = True
        moving.cancel()

    # --- how it ended --------------------------------------------------------------------

    def _given_up(self, outgoing: Outgoing) -> int:
        """It was broken off by a second signal."""
        if outgoing.stage is Stage.CANCELLED:
            return self._failed(Cancelled("it was cancelled", outcome="source"))
        return self._failed(
            MigrationFailed("it was given up", stage=outgoing.stage.value, outcome="unknown")
        )

    def _failed(self, error: UffdError | OSError) -> int:
        outcome = error.outcome if isinstance(error, MigrationFailed) else "source"
        told = reports.CANCELLED if isinstance(error, Cancelled) else outcome
        text = self._sentence(error)
        if outcome == "unknown":
            text += (
                f"  If it does not run at {self._to}, and only then: aiouffd migrate restart"
                f" {self._args.socket}"
            )
        elif outcome == "lost":
            text += f"  To go back to that: aiouffd migrate restart {self._args.socket}"
        self._save(outcome=told, error=text)
        if told == reports.CANCELLED:
            self._tell("cancelled", "cancelled: the program runs on here")
            return statuses.INTERRUPTED
        self._tell("failed", "", outcome=outcome, error=text)
        raise statuses.CommandError(_STATUSES.get(outcome, statuses.FAILED), text) from error

    def _sentence(self, error: UffdError | OSError) -> str:
        """Say what was wrong so that one can do something about it."""
        cause = error.__cause__
        if isinstance(cause, ConnectionError) and isinstance(cause.__cause__, OSError):
            cause = cause.__cause__  # what dialling came to
        if (
            not isinstance(error, MigrationFailed)
            or not isinstance(cause, OSError | ToldError)
            or str(error).startswith("it could not be told")
        ):
            return str(error)
        here = "the program runs on here" if error.outcome == "source" else str(error).split(":")[0]
        return f"{here}: {_trouble(cause, self._to, error.stage)}"

    def _report(self, *, outcome: str = "", error: str = "", short: bool = False) -> dict[str, Any]:
        assert self._outgoing is not None  # noqa: S101 - there is one before anybody can ask
        return reports.of_source(
            self._outgoing,
            plan=self._plan,
            peer=self._to,
            began=self._began,
            name=self._name,
            outcome=outcome,
            error=error,
            short=short,
        )

    def _save(self, *, outcome: str, error: str = "") -> None:
        """Write the report; that it cannot be written does not hide what has happened."""
        if self._args.report is None:
            return
        try:
            reports.save(self._report(outcome=outcome, error=error), self._args.report)
        except OSError as problem:
            text = f"the report cannot be written: {problem.filename}: {problem.strerror}"
            self._tell("warning", text, error=text)

    # --- how it goes ---------------------------------------------------------------------

    def _progress(self, outgoing: Outgoing) -> None:
        figures = outgoing.figures
        sample = figures.samples[-1]
        self._estimate.note(sample.seconds, sample.page_bytes + sample.zero_bytes)
        self._tell.progress(lambda: self._facts(outgoing))

    def _facts(self, outgoing: Outgoing) -> dict[str, Any]:
        figures, there = outgoing.figures, outgoing.destination
        copying = outgoing.stage is Stage.COPYING
        return {
            "stage": outgoing.stage.value,
            "connected": outgoing.is_connected,
            "seconds": round(figures.samples[-1].seconds, 3),
            "round": outgoing.rounds,
            "dirty_rate": round(outgoing.dirty_rate),
            "sent_bytes": figures.sent_bytes,
            "zero_bytes": figures.zero_bytes,
            "left_bytes": outgoing.left_bytes,
            "demand": figures.demand,
            "stall": round(float(there.get("stall") or 0.0), 6),
            "estimated_end": self._estimate.left(
                outgoing.left_bytes,
                dirty_rate=outgoing.dirty_rate,
                rounds=self._plan.rounds - outgoing.rounds + 1 if copying else 0,
                downtime=self._plan.downtime,
            ),
        }


def _trouble(cause: OSError | ToldError, to: str, stage: str) -> str:
    """Say what is wrong with the other side, or the way there."""
    if isinstance(cause, ToldError):
        return f"{to} says: {str(cause).partition(': ')[2]}"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"{to} does not show that it is who it should be: {cause.verify_message}  (--tls-cacert"
            " names who may vouch for it, --server-name the name in its certificate)"
        )
    if isinstance(cause, ssl.SSLError):
        return f"{to} and we do not come together over TLS: {cause.reason or cause}"
    if isinstance(cause, socket.gaierror):
        return f"there is no such address: {to} ({cause.strerror})"
    if isinstance(cause, ConnectionRefusedError):
        return f"nobody listens at {to}: is `aiouffd migrate receive` running there?"
    if isinstance(cause, TimeoutError):
        return f"{to} does not answer"
    if isinstance(cause, ConnectionError) and stage == Stage.OFFERED.value:
        return (
            f"{to} has closed the connection before it took the program; it says there why (TLS on"
            " one side only, or a certificate for another name?)"
        )
    return f"{to}: {cause.strerror or cause}"
