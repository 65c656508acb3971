"""Starts and stops what answers an operator around a server: control socket, metrics.

Knows: a server, and where it is to be asked.
Must not know: how to serve; options but for those that say where.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from .. import prometheus
from ..control import METRICS_TYPE, Control
from ..http_site import HttpSite, text_response
from ..server import Server
from ..sources.measured import Reads
from ..sources.shared import SharedImage
from ..status import Status
from .control_client import ask
from .statuses import CommandError

if TYPE_CHECKING:
    from aiohttp import web


@contextlib.asynccontextmanager
async def around(
    args: argparse.Namespace,
    server: Server,
    name: str,
    reads: Sequence[Reads],
    drain: Callable[[], object],
    shared: SharedImage | None,
) -> AsyncIterator[dict[str, str]]:
    """Offer what the options ask for; see ``operation.operating``."""
    where: dict[str, str] = {}
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
