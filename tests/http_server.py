"""A web server in this process that gives ranges of one image, and misbehaves when told to.

    async with ImageServer(data) as server:
        source = await HttpSource.open(server.url)
        server.next(server.stall)              the next request, and only that one

    python -m tests.http_server SIZE    prints its URL, and serves random bytes until SIGTERM

Knows: HTTP, on purpose also how to break it.
Must not know: aiouffd.
"""

from __future__ import annotations

import asyncio
import random
import signal
import ssl
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Self

from aiohttp import web

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ImageServer:
    """Serves ``/image`` on loopback.

    Attributes:
        data: What it serves; replace it as an image would be replaced.
        etag: Its ETag, as sent; "" for none.
        modified: Its Last-Modified, as sent; "" for none.
        obeys_conditions: False ignores If-Match and If-Unmodified-Since, as many servers do.
        requests: Headers of all requests so far.
        port: Where it listens; 0 is chosen by the system when it begins.
        url: Of the image.
    """

    def __init__(self, data: bytes, *, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.data = data
        self.port = port
        self.etag = '"one"'
        self.modified = "Sun, 01 Nov 2026 10:00:00 GMT"
        self.obeys_conditions = True
        self.requests: list[Mapping[str, str]] = []
        self.url = self.base = ""
        self._tls = tls
        self._script: deque[Answer] = deque()
        self._always: Answer = self.give
        self._closing = asyncio.Event()
        app = web.Application()
        app.router.add_get("/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)

    def next(self, *answers: Answer) -> None:
        """Answer the next requests so, one each."""
        self._script.extend(answers)

    def always(self, answer: Answer) -> None:
        """Answer all further requests so."""
        self._always = answer

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self._tls)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.base = f"http{'s' if self._tls else ''}://127.0.0.1:{self.port}"
        self.url = f"{self.base}/image"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing.set()
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request.headers)
        answer = self._script.popleft() if self._script else self._always
        return await answer(request)

    # --- a server as it should be ------------------------------------------------------

    def validators(self) -> dict[str, str]:
        """Give the headers that tell generations apart."""
        found = {"ETag": self.etag, "Last-Modified": self.modified}
        return {name: value for name, value in found.items() if value}

    def span(self, request: web.Request) -> tuple[int, int]:
        """Give the (start, end) of the range asked for."""
        start, _, last = request.headers["Range"].removeprefix("bytes=").partition("-")
        return int(start), min(int(last) + 1, len(self.data))

    async def give(self, request: web.Request) -> web.StreamResponse:
        """Give the range asked for, as a good server does."""
        if self.obeys_conditions:
            wanted = request.headers.get("If-Match", self.etag)
            since = request.headers.get("If-Unmodified-Since", self.modified)
            if wanted != self.etag or since != self.modified:
                return web.Response(status=412)
        if "Range" not in request.headers:
            return await self.everything(request)
        start, end = self.span(request)
        if start >= len(self.data):
            return web.Response(
                status=416,
                headers={"Content-Range": f"bytes */{len(self.data)}"} | self.validators(),
            )
        return self.part(start, end)

    def part(self, start: int, end: int, **changes: str) -> web.Response:
        """Make a 206, perhaps with other headers than are right (underscores are dashes)."""
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{len(self.data)}"}
        headers |= self.validators()
        headers |= {name.replace("_", "-"): value for name, value in changes.items()}
        return web.Response(status=206, body=self.data[start:end], headers=headers)

    # --- and as it should not ----------------------------------------------------------

    async def stall(self, request: web.Request) -> web.StreamResponse:
        """Say nothing, for as long as the server lives."""
        await self._closing.wait()
        return web.Response(status=503)

    async def stall_midway(self, request: web.Request) -> web.StreamResponse:
        """Give half of the body, and then nothing more."""
        response = await self._begin(request)
        start, end = self.span(request)
        await response.write(self.data[start : (start + end) // 2])
        await self._closing.wait()
        return response

    async def trickle(self, request: web.Request) -> web.StreamResponse:
        """Give a byte now and then."""
        response = await self._begin(request)
        start, end = self.span(request)
        for at in range(start, end):
            await response.write(self.data[at : at + 1])
            try:
                await asyncio.wait_for(self._closing.wait(), 0.02)
            except TimeoutError:
                continue
            break
        return response

    async def drop(self, request: web.Request) -> web.StreamResponse:
        """Close the connection without an answer."""
        self._abort(request)
        return web.Response()

    async def drop_midway(self, request: web.Request) -> web.StreamResponse:
        """Close the connection after half of the body."""
        response = await self._begin(request)
        start, end = self.span(request)
        await response.write(self.data[start : (start + end) // 2])
        assert request.transport is not None
        request.transport.close()
        return response

    async def too_short(self, request: web.Request) -> web.StreamResponse:
        """Declare and give one byte less."""
        start, end = self.span(request)
        size = len(self.data)
        return self.part(start, end - 1, Content_Range=f"bytes {start}-{end - 1}/{size}")

    async def too_long(self, request: web.Request) -> web.StreamResponse:
        """Declare and give more than was asked for."""
        start, end = self.span(request)
        response = self.part(start, end)
        response.body = self.data[start:end] + b"more"
        return response

    async def too_long_undeclared(self, request: web.Request) -> web.StreamResponse:
        """Give more than was asked for, without a Content-Length."""
        response = await self._begin(request, declare=False)
        start, end = self.span(request)
        await response.write(self.data[start:end] + b"more")
        await response.write_eof()
        return response

    async def undeclared(self, request: web.Request) -> web.StreamResponse:
        """Give what was asked for, rightly, without a Content-Length."""
        response = await self._begin(request, declare=False)
        start, end = self.span(request)
        await response.write(self.data[start:end])
        await response.write_eof()
        return response

    async def too_long_behind_its_end(self, request: web.Request) -> web.StreamResponse:
        """Give the right body, and then bytes that belong to no answer."""
        response = await self._begin(request)
        start, end = self.span(request)
        await response.write(self.data[start:end])
        assert request.transport is not None
        request.transport.write(b"HTTP/1.1 206 not asked for\r\n\r\n")
        return response

    async def everything(self, request: web.Request) -> web.StreamResponse:
        """Give the whole image, as a server without ranges."""
        return web.Response(body=self.data, headers=self.validators())

    async def other_range(self, request: web.Request) -> web.StreamResponse:
        """Give as many bytes from elsewhere, and say so."""
        start, end = self.span(request)
        return self.part(start + 1, end + 1)

    async def no_content_range(self, request: web.Request) -> web.StreamResponse:
        """Say 206, but not of what."""
        start, end = self.span(request)
        response = self.part(start, end)
        del response.headers["Content-Range"]
        return response

    async def no_validators(self, request: web.Request) -> web.StreamResponse:
        """Do not say which generation it is."""
        response = self.part(*self.span(request))
        for name in self.validators():
            del response.headers[name]
        return response

    async def compressed(self, request: web.Request) -> web.StreamResponse:
        """Compress the body though nobody asked for it."""
        return self.part(*self.span(request), Content_Encoding="gzip")

    async def garbage(self, request: web.Request) -> web.StreamResponse:
        """Answer with something that is not HTTP."""
        assert request.transport is not None
        request.transport.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        return await self.drop(request)

    def status(self, number: int, **headers: str) -> Answer:
        """Make an answer of a status and headers (underscores are dashes)."""

        async def answer(request: web.Request) -> web.StreamResponse:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return web.Response(status=number, headers=named)

        return answer

    async def _begin(self, request: web.Request, *, declare: bool = True) -> web.StreamResponse:
        start, end = self.span(request)
        response = web.StreamResponse(status=206, headers=self.part(start, end).headers)
        if declare:
            response.content_length = end - start
        else:
            response.headers.pop("Content-Length", None)
            response.enable_chunked_encoding()
        await response.prepare(request)
        return response

    def _abort(self, request: web.Request) -> None:
        assert request.transport is not None
        request.transport.abort()


async def _main(size: int) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with ImageServer(random.Random(0).randbytes(size)) as server:
        print(server.url, flush=True)
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1])))
