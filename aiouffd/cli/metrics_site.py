"""Metrics given on a TCP address, to whoever asks.

Knows: addresses, HTTP's side of it.
Must not know: which metrics.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

from ..control import METRICS_TYPE
from ..http_site import HttpSite, text_response

if TYPE_CHECKING:
    from aiohttp import web


@contextlib.asynccontextmanager
async def giving(give: Callable[[], Awaitable[bytes]], host: str, port: int) -> AsyncIterator[str]:
    """Answer scrapes as long as the block runs.

    Args:
        give: Gives the text of a scrape.
        host: Where.
        port: 0 takes a free one.

    Yields:
        The URL.

    Raises:
        ImportError: aiohttp is missing; the message names the extra.
        OSError: The address cannot be had.
    """

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
