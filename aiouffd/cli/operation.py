"""What an operator sees of a running ``aiouffd serve``: control socket, metrics, service manager.

Knows: the options for these, and how to start and stop them around a server.
Must not know: how to serve.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final

from .. import prometheus
from ..control import METRICS_TYPE, Control
from ..errors import UffdError
from ..fds import OwnedFd
from ..http_site import HttpSite, text_response
from ..server import Server
from ..source_opening import SourceOrOpener
from ..sources.measured import MeasuredSource, Reads
from ..sources.shared import SharedImage
from ..status import Status
from ..unix_socket import Listener
from .arguments import host_and_port
from .control_client import VARIABLE, ask
from .diagnostics import LEVELS
from .statuses import CommandError

if TYPE_CHECKING:
    from aiohttp import web

#: ``--socket fd:NAME``: a socket of this name came from the service manager.
PASSED: Final = "fd:"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_control_options(parser)
    parser.add_argument(
        "--log-level", choices=LEVELS, default="warning", help="on stderr (default: warning)"
    )


def add_control_options(parser: argparse.ArgumentParser) -> None:
    """Add those without --log-level, for who has another option for that."""
    group = parser.add_argument_group("how to be operated")
    group.add_argument(
        "--control",
        metavar="PATH",
        nargs="?",
        const="",
        default=os.environ.get(VARIABLE),
        help="answer aiouffd sessions, top, complete and drain on this socket"
        f" (default: ${VARIABLE}; without PATH: the serving socket's path and .control)",
    )
    group.add_argument(
        "--metrics",
        metavar="HOST:PORT",
        type=host_and_port,
        help="give Prometheus metrics on this TCP address, to whoever asks",
    )


def wanted(args: argparse.Namespace) -> bool:
    """Say whether anybody can ask for figures."""
    return args.control is not None or args.metrics is not None


def measured(source: SourceOrOpener, accounts: Sequence[Reads]) -> SourceOrOpener:
    """Measure what sessions read, on the first account; without accounts it is not measured."""
    if not accounts:
        return source
    reads = accounts[0]
    if callable(source):
        opener = source
        return lambda: MeasuredSource(opener(), reads.name, reads)
    return MeasuredSource(source, reads.name, reads)


@contextlib.asynccontextmanager
async def operating(
    args: argparse.Namespace,
    server: Server,
    name: str,
    reads: Sequence[Reads],
    drain: Callable[[], object],
    *,
    shared: SharedImage | None = None,
) -> AsyncIterator[dict[str, str]]:
    """Offer what the options ask for, as long as the block runs.

    Args:
        args: With our options, and ``replace``, ``any_directory``.
        server: That listens.
        name: What it serves, for people.
        reads: Accounts of its sources.
        drain: Begins a drain.
        shared: The copy of the image that clones share, if they do.

    Yields:
        Where what can be reached, for the line that says so.
    """
    where = {}
    async with contextlib.AsyncExitStack() as stack:
        status = Status(server, reads=reads, image=name, shared=shared)
        if args.control is not None:
            path = args.control or f"{server.path}.control"

            def control(*, replace: bool) -> Control:
                return Control(
                    status,
                    path,
                    drain=drain,
                    metrics=_metrics_if_there(status),
                    replace=replace,
                    any_directory=args.any_directory,
                )

            try:
                await stack.enter_async_context(control(replace=args.replace))
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not await _is_draining(path):
                    raise
                await stack.enter_async_context(control(replace=True))
            where["control"] = path
        if args.metrics is not None:
            where["metrics"] = await stack.enter_async_context(_listening(status, *args.metrics))
        yield where


async def _is_draining(path: str) -> bool:
    """Say whether the server that answers on a control socket takes nobody any more.

    It has given up its serving socket to the next one, and so it does this.
    """
    try:
        _, health = await asyncio.to_thread(ask, path, "GET", "health")
    except CommandError:
        return False
    return bool(health["status"] == "draining")


def _metrics_if_there(status: Status) -> Callable[[], Awaitable[bytes]] | None:
    """Give the text of a scrape; None without prometheus-client, which ``/metrics`` then says."""
    try:
        return prometheus.text_of(status)
    except ImportError:
        return None


@contextlib.asynccontextmanager
async def _listening(status: Status, host: str, port: int) -> AsyncIterator[str]:
    """Give metrics on a TCP address."""
    give = prometheus.text_of(status)

    async def answer(request: web.Request) -> web.Response:  # noqa: ARG001 - aiohttp's
        return text_response(await give(), METRICS_TYPE)

    site = HttpSite([("GET", "/metrics", answer)])
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as sock:
        await site.start(sock.fileno())
        try:
            name = f"[{host}]" if family == socket.AF_INET6 else host
            yield f"http://{name}:{sock.getsockname()[1]}/metrics"
        finally:
            await site.aclose()


def passed_listener(name: str, passed: Sequence[tuple[str, OwnedFd]]) -> Listener:
    """Choose the socket to listen on among what the service manager passed.

    Args:
        name: ``fd:NAME``.
        passed: From ``take_listen_fds``; the others are closed.

    Raises:
        UffdError: None has this name, or it is no listening Unix socket.
    """
    wanted = name.removeprefix(PASSED)
    found = None
    for each, fd in passed:
        if each == wanted and found is None:
            found = fd
        else:
            fd.close()
    if found is None:
        names = ", ".join(each for each, _ in passed) or "none at all"
        raise UffdError(
            f"the service manager passed no socket named {wanted} (passed: {names});"
            " see FileDescriptorName= of its socket unit"
        )
    try:
        return Listener.adopt(found)
    except ValueError as error:
        raise UffdError(f"what the service manager passed as {wanted}: {error}") from error
