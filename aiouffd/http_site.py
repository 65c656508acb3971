"""A small HTTP server over one listening socket: JSON errors, and a close that ends.

Knows: aiohttp.
Must not know: what is served.

Laws of this file:

* Every error is ``{"error": what, "hint": what to do}``, an unknown path included.
* Closing ends within seconds: idle connections are closed at once, answers under way have a
  moment.  (aiohttp by itself waits a minute for whoever keeps a connection open.)

aiohttp (extra ``web``) is imported when a site starts, so that importing this costs nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from aiohttp import web
    from aiohttp.typedefs import Middleware

    Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
    #: Method, path (``{name}`` is a part that varies), and who answers.
    Route: TypeAlias = tuple[str, str, Handler]

log: Final = logging.getLogger("aiouffd.control")

_CLOSING_S: Final = 1.0  # for answers under way, twice
_BODY_BYTES: Final = 1 << 16


class Refusal(Exception):
    """An answer that says no.

    Attributes:
        status: Of HTTP.
        hint: What to do.
    """

    def __init__(self, status: int, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.hint = hint


class HttpSite:
    """Answers requests on one listening socket.

    Sharing: the loop's thread.
    """

    def __init__(
        self, routes: Sequence[Route], *, check: Callable[[web.Request], None] | None = None
    ) -> None:
        """Prepare.

        Args:
            routes: What is answered.
            check: Called before each request; may raise Refusal.
        """
        self._routes = routes
        self._check = check
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None

    async def start(self, listening: int) -> None:
        """Begin to answer.

        Args:
            listening: A listening socket, Unix or TCP; stays the caller's.

        Raises:
            ImportError: aiohttp is missing; the message names the extra.
        """
        require()
        from aiohttp import web

        app = web.Application(middlewares=[self._middleware()], client_max_size=_BODY_BYTES)
        for method, path, handler in self._routes:
            app.router.add_route(method, path, handler)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_CLOSING_S)
        await self._runner.setup()
        assert self._runner.server is not None  # noqa: S101 - made by setup
        loop = asyncio.get_running_loop()
        sock = socket.socket(fileno=os.dup(listening))
        sock.setblocking(False)
        unix = sock.family == socket.AF_UNIX
        make = loop.create_unix_server if unix else loop.create_server
        try:
            self._server = await make(self._runner.server, sock=sock)
        except BaseException:
            sock.close()
            await self._runner.cleanup()
            raise

    async def aclose(self) -> None:
        """Refuse new connections, let answers under way end, close; a second call does nothing."""
        server, self._server = self._server, None
        if server is not None and self._runner is not None:
            server.close()
            await self._runner.cleanup()

    def _middleware(self) -> Middleware:
        from aiohttp import web

        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            try:
                if self._check is not None:
                    self._check(request)
                return await handler(request)
            except Refusal as no:
                return error_response(no.status, str(no), no.hint)
            except web.HTTPException as no:
                hint = "docs/reference/openapi.json lists what can be asked."
                return error_response(no.status, f"{request.method} {request.path}: {no}", hint)
            except Exception as error:
                log.exception("%s %s failed", request.method, request.path)
                return error_response(500, f"{type(error).__name__}: {error}", "See the log.")

        return middleware


def error_response(status: int, error: str, hint: str) -> web.Response:
    """Make an answer that says no."""
    from aiohttp import web

    return web.json_response({"error": error, "hint": hint}, status=status)


def json_response(data: object, status: int = 200) -> web.Response:
    """Make an answer of plain data."""
    from aiohttp import web

    return web.json_response(data, status=status)


def text_response(body: bytes, content_type: str) -> web.Response:
    """Make an answer of bytes; the content type is taken as it is, parameters included."""
    from aiohttp import web

    return web.Response(body=body, headers={"Content-Type": content_type})


def require() -> None:
    """Find out early whether aiohttp is there.

    Raises:
        ImportError: It is missing; the message names the extra.
    """
    try:
        import aiohttp  # noqa: F401 - whether it is there
    except ImportError as error:
        raise ImportError(
            "the control API and the metrics listener need aiohttp: pip install 'aiouffd[web]'"
        ) from error
