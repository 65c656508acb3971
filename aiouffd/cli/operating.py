"""Starts and stops what answers an operator around a server: control socket, metrics.

Knows: a server, and where it is to be asked.
Must not know: how to serve; options but for those that say where.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from .. import prometheus
from ..control import Control
from ..server import Server
from ..sources.measured import Reads
from ..sources.shared import SharedImage
from ..status import Status
from .control_client import ask
from .metrics_site import giving
from .statuses import CommandError


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
            give = prometheus.text_of(status)
            where["metrics"] = await stack.enter_async_context(giving(give, *args.metrics))
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
