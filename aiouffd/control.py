"""The control API: a server's state and a few orders, as JSON over HTTP on a Unix socket.

Knows: the paths of the API, and what each answers.
Must not know: how figures are collected (``status``), what a command line does with them.

Laws of this file:

* Who may ask is decided by the socket's rights (0600, in a directory of the server's own) and
  once more by the uid that the kernel names.
* An order that was begun goes on though its client goes away, and belongs to this object.
* Nothing here holds up serving: what takes long is drawn in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import socket
from collections.abc import Awaitable, Callable, Collection, Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from . import http_site
from .errors import UffdError
from .failure import Action
from .handover import peer_credentials
from .http_site import HttpSite, Refusal, json_response, text_response
from .session import Session
from .snapshot import Snapshot, take_snapshot
from .status import MAX_CELLS, Status, summary
from .unix_socket import Listener

if TYPE_CHECKING:
    from aiohttp import web

#: Of the text that Prometheus reads.
METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_T = TypeVar("_T")

_CELLS: Final = 64
_LONGEST_S: Final = 86_400.0
_ACTIONS: Final = {one.value: one for one in (Action.POISON, Action.KILL, Action.ZERO, Action.HANG)}


class Control:
    """Answers HTTP requests about a server on a Unix socket.

    ::

        async with Server(...) as server, Control(Status(server), path):
            await server.wait_closed()

    Attributes:
        path: Where it listens.

    Sharing: the loop's thread.
    """

    def __init__(
        self,
        status: Status,
        path: str | os.PathLike[str],
        *,
        drain: Callable[[], object] | None = None,
        metrics: Callable[[], Awaitable[bytes]] | None = None,
        uids: Collection[int] | None = None,
        replace: bool = False,
        any_directory: bool = False,
    ) -> None:
        """Prepare; nothing listens before ``async with``.

        Args:
            status: What is told.
            path: The socket's name.
            drain: Called to begin a drain; by default the server's own ``drain`` is run.
            metrics: Gives the text of ``/metrics``.
            uids: Who may ask; None is the server's own user, and root.
            replace: Take the name over from a server that still listens there.
            any_directory: See Listener.bind.
        """
        self.path: Final = os.fspath(path)
        self._status = status
        self._begin_drain = drain if drain is not None else self._drain_server
        self._metrics = metrics
        self._uids = frozenset((os.geteuid(), 0) if uids is None else uids)
        self._replace = replace
        self._any_directory = any_directory
        self._listener: Listener | None = None
        self._site = HttpSite(self._routes(), check=self._check)
        self._orders: dict[tuple[str, str], asyncio.Task[Any]] = {}

    async def __aenter__(self) -> Self:
        """Begin to listen.

        Raises:
            ImportError: aiohttp is missing; the message names the extra.
            OSError: The socket cannot be made, see Listener.bind.
        """
        http_site.require()
        self._listener = Listener.bind(
            self.path, replace=self._replace, any_directory=self._any_directory
        )
        try:
            await self._site.start(self._listener.fileno())
        except BaseException:
            self._listener.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop listening, let answers under way end, cancel the orders."""
        if self._listener is not None:
            self._listener.close()
        await self._site.aclose()
        orders = tuple(self._orders.values())
        for task in orders:
            task.cancel()
        if orders:
            await asyncio.wait(orders)

    def _check(self, request: web.Request) -> None:
        """Refuse a user who may not ask."""
        transport = request.transport
        connection = None if transport is None else transport.get_extra_info("socket")
        if connection is None or connection.fileno() < 0:
            raise Refusal(400, "the connection is gone")
        # A duplicate: what uvloop gives has no getsockopt.
        with socket.socket(fileno=os.dup(connection.fileno())) as sock:
            _, uid, _ = peer_credentials(sock)
        if uid not in self._uids:
            raise Refusal(
                403,
                f"uid {uid} may not use this control socket",
                "Ask as the server's own user, or as root.",
            )

    # --- answers -----------------------------------------------------------------------

    def _routes(self) -> list[http_site.Route]:
        return [
            ("GET", "/v1/health", self._health),
            ("GET", "/v1/stats", self._stats),
            ("GET", "/v1/sessions", self._sessions),
            ("GET", "/v1/sessions/{id}", self._session),
            ("POST", "/v1/sessions/{id}/complete", self._complete),
            ("POST", "/v1/sessions/{id}/snapshot", self._snapshot),
            ("POST", "/v1/sessions/{id}/close", self._close),
            ("POST", "/v1/drain", self._drain),
            ("GET", "/metrics", self._give_metrics),
        ]

    async def _health(self, request: web.Request) -> web.Response:  # noqa: ARG002 - aiohttp's
        return json_response(self._status.health())

    async def _stats(self, request: web.Request) -> web.Response:  # noqa: ARG002 - aiohttp's
        return json_response(await self._status.stats())

    async def _sessions(self, request: web.Request) -> web.Response:  # noqa: ARG002 - aiohttp's
        return json_response(await self._status.sessions())

    async def _session(self, request: web.Request) -> web.Response:
        cells = request.query.get("cells", str(_CELLS))
        if not cells.isdecimal() or not 1 <= int(cells) <= MAX_CELLS:
            raise Refusal(400, f"cells={cells}", f"A number from 1 to {MAX_CELLS}.")
        answer = await self._status.session(self._find(request), int(cells))
        if answer is None:
            raise _no_session(request)
        return json_response(answer)

    async def _give_metrics(self, request: web.Request) -> web.Response:  # noqa: ARG002 - aiohttp's
        if self._metrics is None:
            raise Refusal(
                501,
                "this server gives no metrics",
                "They need prometheus-client: pip install 'aiouffd[metrics]'",
            )
        return text_response(await self._metrics(), METRICS_TYPE)

    # --- orders ------------------------------------------------------------------------

    async def _complete(self, request: web.Request) -> web.Response:
        wait = _wait(request)
        session = self._find(request)
        done = await self._order("complete", session, session.complete, wait)
        return json_response(summary(session), 202 if done is None else 200)

    async def _close(self, request: web.Request) -> web.Response:
        wait, name = _wait(request), request.query.get("action")
        if name is not None and name not in _ACTIONS:
            raise Refusal(400, f"action={name}", f"One of {', '.join(_ACTIONS)}.")
        session = self._find(request)
        action = None if name is None else _ACTIONS[name]

        async def close() -> None:
            await session.aclose(action)

        done = await self._order("close", session, close, wait)
        return json_response(summary(session), 202 if done is None else 200)

    async def _snapshot(self, request: web.Request) -> web.Response:
        wait, path = _wait(request), request.query.get("path", "")
        if not os.path.isabs(path) or "\0" in path:
            raise Refusal(400, f"path={path}", "Where the server is to write it, from / on.")
        whole, stop = _flag(request, "whole"), _flag(request, "stop")
        session = self._find(request)

        async def take() -> Snapshot:
            if os.path.lexists(path):  # it may be the image that is served
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
            return await take_snapshot(session, path, whole=whole, stop=stop)

        taken = await self._order(f"snapshot to {path}", session, take, wait)
        if taken is None:
            return json_response(summary(session), 202)
        return json_response(dataclasses.asdict(taken.result()))

    async def _order(
        self,
        what: str,
        session: Session,
        begin: Callable[[], Coroutine[Any, Any, _T]],
        wait: float | None,
    ) -> asyncio.Task[_T] | None:
        """Begin something, or find it begun, and wait for it.

        Returns:
            What is done; None if it goes on.
        """
        key = (what, session.id)
        task = self._orders.get(key)
        if task is None:
            task = self._orders[key] = asyncio.create_task(begin(), name=f"aiouffd {what}")
            task.add_done_callback(lambda ended: self._forget(key, ended))
        done, _ = await asyncio.wait((task,), timeout=wait)
        if not done:
            return None
        if task.cancelled():
            raise Refusal(503, f"{what} was cut off: the server is closing")
        error = task.exception()
        if isinstance(error, (UffdError, OSError, ValueError)):
            raise Refusal(409, f"{what}: {error}", "The session goes on as it was; see its state.")
        if error is not None:
            raise error
        return task

    def _forget(self, key: tuple[str, str], task: asyncio.Task[Any]) -> None:
        self._orders.pop(key, None)
        if not task.cancelled():
            task.exception()  # told to who waits; nobody may

    async def _drain(self, request: web.Request) -> web.Response:
        wait, server = _wait(request), self._status.server
        self._begin_drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await server.wait_closed()
                return json_response({"draining": False, "living": 0})
        return json_response({"draining": True, "living": len(server.sessions)}, 202)

    def _drain_server(self) -> None:
        key = ("drain", "")
        if key not in self._orders:
            task = self._orders[key] = asyncio.create_task(
                self._status.server.drain(), name="aiouffd drain"
            )
            task.add_done_callback(lambda ended: self._forget(key, ended))

    def _find(self, request: web.Request) -> Session:
        session = self._status.find(request.match_info["id"])
        if session is None:
            raise _no_session(request)
        return session


def _no_session(request: web.Request) -> Refusal:
    return Refusal(
        404,
        f"no session {request.match_info['id']} lives here",
        "GET /v1/sessions lists those that live; one that has ended is in the sums only.",
    )


def _flag(request: web.Request, name: str) -> bool:
    text = request.query.get(name, "0")
    if text not in {"0", "1"}:
        raise Refusal(400, f"{name}={text}", "0 or 1.")
    return text == "1"


def _wait(request: web.Request) -> float | None:
    """Give the seconds that the client wants to wait; None is as long as it takes."""
    text = request.query.get("wait")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= _LONGEST_S:
        raise Refusal(400, f"wait={text}", f"Seconds, from 0 to {_LONGEST_S:g}.")
    return seconds
