"""HttpSource against a server in this process that misbehaves on purpose.

Each misbehaviour ends in the right bytes or in a SourceError that says what happened; which of
the two is part of what is tested.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp import web

from aiouffd.errors import ClosedError, SourceError
from aiouffd.sources import Source, identity_of
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.compressed import CompressedSource
from aiouffd.sources.http import HttpSource, open_url
from aiouffd.sources.layered import LayeredSource
from aiouffd.testing.sources import PAGE, SourceContract, as_bytes, image
from tests.delaying_proxy import DelayingProxy
from tests.http_server import ImageServer
from tests.seekable import seekable
from tests.targets import TIME_SCALE

DATA = image(16 * PAGE)

#: Settings for a server that is meant to be slow to answer, or not to answer.
IMPATIENT: dict[str, Any] = {"request_timeout": 0.25 * TIME_SCALE, "backoff": 0.001}


class TestHttpSource(SourceContract):
    """A server as it should be."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Serve the bytes."""
        async with ImageServer(data) as server, opened(server) as source:
            yield source


class TestHttpSourceOfTroubles(SourceContract):
    """A server of which every other answer is a failure that passes."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Serve the bytes, badly."""
        async with ImageServer(data) as server:
            troubles = [server.status(503), server.drop, server.give]
            if data:
                troubles += [server.drop_midway, server.no_content_range, server.too_long]

            async def sometimes(request: web.Request) -> web.StreamResponse:
                number = len(server.requests)
                trouble = troubles[number // 2 % len(troubles)]
                return await (server.give if number % 2 else trouble)(request)

            server.always(sometimes)
            async with opened(server, retries=20, backoff=0.001) as source:
                yield source


@contextlib.asynccontextmanager
async def opened(server: ImageServer, url: str = "", **settings: Any) -> AsyncIterator[HttpSource]:
    """Open the server's image and close it again."""
    source = await HttpSource.open(url or server.url, **{"backoff": 0.001, **settings})
    try:
        yield source
    finally:
        await source.aclose()


@contextlib.asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[tuple[ImageServer, HttpSource]]:
    """Serve DATA and open it."""
    async with ImageServer(DATA) as server, opened(server, **settings) as source:
        yield server, source


async def check(source: HttpSource, page: int = 3) -> None:
    """Read a page, which is to be right."""
    assert as_bytes(await source.read(page * PAGE, PAGE)) == DATA[page * PAGE :][:PAGE]


# --- what passes by trying again -------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [
        "drop",
        "drop_midway",
        "too_short",
        "too_long",
        "too_long_undeclared",
        "too_long_behind_its_end",
        "undeclared",
        "everything",
        "other_range",
        "no_content_range",
        "no_validators",
        "garbage",
    ],
)
async def test_a_trouble_that_passes_ends_in_the_right_bytes(trouble: str) -> None:
    """Whatever one answer is, the read gives the bytes, and so do those after it."""
    async with serving() as (server, source):
        for _ in range(2):
            server.next(getattr(server, trouble))
            await check(source)
            await check(source, 5)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
async def test_not_now_is_asked_again(status: int) -> None:
    """A server that is overloaded or restarting is asked again, at the opening too."""
    async with ImageServer(DATA) as server:
        server.next(server.status(status), server.status(status))
        async with opened(server) as source:
            server.next(server.status(status))
            await check(source)


@pytest.mark.parametrize("trouble", ["stall", "stall_midway", "trickle"])
async def test_a_request_that_stalls_is_given_up_for_another(trouble: str) -> None:
    """One stalled connection costs the request's time limit, not the read."""
    async with serving(**IMPATIENT) as (server, source):
        server.next(getattr(server, trouble))
        await check(source)
        assert len(server.requests) == 3


async def test_retry_after_is_waited_for() -> None:
    """A server that asks for a second gets it."""
    async with serving() as (server, source):
        server.next(server.status(429, Retry_After="1"))
        loop = asyncio.get_running_loop()
        start = loop.time()
        await check(source)
        assert loop.time() - start >= 0.99


async def test_retry_after_beyond_the_time_limit_fails_at_once() -> None:
    """Nobody waits for an attempt that would come too late."""
    async with serving() as (server, source):
        server.next(server.status(503, Retry_After="3600"))
        with pytest.raises(SourceError, match=r"503.*3600.* exceeds 20 s"):
            await check(source)
        assert len(server.requests) == 2


# --- what does not pass ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("stall", "no whole answer within 0.1 s; the next attempt .* exceeds 0.4 s"),
        ("stall_midway", "no whole answer within 0.1 s; the next attempt .* exceeds 0.4 s"),
        ("trickle", "no whole answer within 0.1 s; the next attempt .* exceeds 0.4 s"),
        ("drop", "ServerDisconnected|ClientOSError"),
        ("drop_midway", "Payload|Disconnected"),
        ("too_short", "4095 bytes where 4096"),
        ("too_long", "4100 bytes where 4096"),
        ("too_long_undeclared", "more than 4096 bytes"),
        ("everything", "everything"),
        ("other_range", "asked for bytes=12288-16383, got bytes 12289-16384/65536"),
        ("no_content_range", "Content-Range: None"),
        ("no_validators", "which generation"),
        ("compressed", "gzip"),
        ("garbage", "no HTTP that can be understood"),
    ],
)
async def test_a_trouble_that_stays_is_a_clear_error(trouble: str, reason: str) -> None:
    """It ends, within the limit, with what was wrong; and the source works again afterwards."""
    settings: dict[str, Any] = {"backoff": 0.001, "retries": 2}
    if trouble in ("stall", "stall_midway", "trickle"):
        settings = {"request_timeout": 0.1, "timeout": 0.4, "backoff": 0.001}
    async with serving(**settings) as (server, source):
        server.always(getattr(server, trouble))
        with pytest.raises(SourceError, match=reason):
            await check(source)
        server.always(server.give)
        await check(source)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 416, 501])
async def test_a_refusal_is_not_asked_again(status: int) -> None:
    """What no retry can mend fails at once, at a read and at the opening."""
    async with serving() as (server, source):
        answer = server.status(status, **({"ETag": '"one"'} if status == 416 else {}))
        server.next(answer)
        with pytest.raises(SourceError, match=str(status)):
            await check(source)
        server.next(answer)
        with pytest.raises(SourceError, match=str(status)):
            await HttpSource.open(server.url)
        assert len(server.requests) == 3


async def test_no_server_is_an_error_after_the_retries() -> None:
    """Nobody listens: the error says so."""
    async with ImageServer(DATA) as server:
        url = server.url
    with pytest.raises(SourceError, match="Cannot connect"):
        await HttpSource.open(url, backoff=0.001)


@pytest.mark.parametrize("url", ["", "image", "ftp://host/image", "http://", "file:///image"])
async def test_other_urls_are_refused(url: str) -> None:
    """Only http and https name images on web servers."""
    with pytest.raises(SourceError, match="not an http or https URL"):
        await open_url(url)


async def test_a_server_without_ranges_is_refused_before_it_sends_everything() -> None:
    """The opening says why, and the body is never read."""
    sent = 0
    done = asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(headers={"Content-Length": str(1 << 40)})
        await response.prepare(request)
        try:
            while sent < 1 << 30:
                await response.write(bytes(1 << 16))
                sent += 1 << 16
        finally:
            done.set()
        return response

    async with ImageServer(DATA) as server:
        server.always(endless)
        with pytest.raises(SourceError, match="does not give ranges"):
            await HttpSource.open(server.url)
        await done.wait()
    assert sent < 64 << 20  # what fits into the buffers of two sockets, at most


async def test_a_server_without_validators_is_refused() -> None:
    """Without them a replaced image could not be told."""
    async with ImageServer(DATA) as server:
        server.etag = server.modified = ""
        with pytest.raises(SourceError, match="neither ETag nor Last-Modified"):
            await HttpSource.open(server.url)


# --- another generation ----------------------------------------------------------------


def _new_etag(server: ImageServer) -> None:
    server.etag = '"two"'


def _new_size(server: ImageServer) -> None:
    server.data += bytes(PAGE)
    server.etag = '"two"'


def _shorter(server: ImageServer) -> None:
    server.data = server.data[: 2 * PAGE]
    server.etag = '"two"'


def _shorter_same_etag(server: ImageServer) -> None:
    server.data = server.data[: 2 * PAGE]


def _weak(server: ImageServer) -> None:
    server.etag = 'W/"one"'


@pytest.mark.parametrize("obeys", [True, False])
@pytest.mark.parametrize("change", [_new_etag, _new_size, _shorter, _shorter_same_etag, _weak])
async def test_a_replaced_image_is_an_error_for_ever(
    change: Callable[[ImageServer], None], obeys: bool
) -> None:
    """Whether or not the server knows conditions; even after the old image is back."""
    async with serving() as (server, source):
        server.obeys_conditions = obeys
        await check(source)
        change(server)
        with pytest.raises(SourceError, match="changed while it was served"):
            await check(source)
        server.data, server.etag = DATA, '"one"'
        asked = len(server.requests)
        with pytest.raises(SourceError, match="changed while it was served"):
            await check(source)
        with pytest.raises(SourceError, match="changed while it was served"):
            source.read_nowait(0, PAGE)
        assert len(server.requests) == asked


async def test_a_replaced_image_that_is_sent_whole_is_told_by_its_etag() -> None:
    """A server that answers 200 to a range may mean that the image has changed."""
    async with serving() as (server, source):
        server.etag = '"two"'
        server.always(server.everything)
        with pytest.raises(SourceError, match=r"changed.*ETag went from \"one\" to \"two\""):
            await check(source)


async def test_no_read_of_the_old_image_ends_after_the_change_was_seen() -> None:
    """A read that was under way when another saw the change fails too."""
    async with serving() as (server, source):
        go_on = asyncio.Event()

        async def slow(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(status=206, headers=server.part(0, PAGE).headers)
            response.content_length = PAGE
            await response.prepare(request)
            await response.write(DATA[:100])
            await go_on.wait()
            await response.write(DATA[100:PAGE])
            return response

        server.next(slow)
        early = asyncio.ensure_future(source.read(0, PAGE))
        while len(server.requests) < 2:
            await asyncio.sleep(0.001)
        server.etag = '"two"'
        with pytest.raises(SourceError, match="changed"):
            await check(source)
        go_on.set()
        with pytest.raises(SourceError, match="changed"):
            await early


async def test_without_an_etag_the_time_is_pinned() -> None:
    """Last-Modified stands in for an ETag."""
    async with ImageServer(DATA) as server:
        server.etag = ""
        async with opened(server) as source:
            await check(source)
            assert "If-Unmodified-Since" in server.requests[-1]
            server.modified = "Sun, 01 Nov 2026 10:00:01 GMT"
            server.obeys_conditions = False
            with pytest.raises(SourceError, match="Last-Modified went from"):
                await check(source)


async def test_a_weak_etag_is_compared_with_the_time() -> None:
    """It is no condition for the server, but a change of either is a change."""
    async with ImageServer(DATA) as server:
        server.etag = 'W/"one"'
        async with opened(server) as source:
            await check(source)
            assert "If-Match" not in server.requests[-1]
            server.etag = 'W/"two"'
            with pytest.raises(SourceError, match="ETag went from"):
                await check(source)


async def test_the_identity_is_of_url_and_generation() -> None:
    """Same image, same word; another generation, another word."""
    async with ImageServer(DATA) as server:
        async with opened(server) as one, opened(server) as two:
            assert identity_of(one) == identity_of(two) != ""
        server.etag = '"two"'
        async with opened(server) as three:
            assert identity_of(three) != identity_of(one)


# --- redirects -------------------------------------------------------------------------


async def test_a_plain_image_is_no_layer_and_a_packed_one_is() -> None:
    """On a web server the holes of a plain one are zeros, which would hide what lies below."""
    base, over = image(4 * PAGE), bytes(PAGE) + image(PAGE) + bytes(2 * PAGE)
    async with ImageServer(over) as server, opened(server) as flat:
        with pytest.raises(SourceError, match="pack it"):
            LayeredSource(BufferSource(base), flat)
    for extents in (None, [(PAGE, PAGE)]):
        async with ImageServer(seekable(over, extents=extents)) as server, opened(server) as far:
            packed = await CompressedSource.open(far)
            if extents is None:  # another tool's file, which does not tell holes either
                with pytest.raises(SourceError, match="pack it"):
                    LayeredSource(BufferSource(base), packed)
                continue
            layered = LayeredSource(BufferSource(base), packed)
            expected = base[:PAGE] + image(PAGE) + base[2 * PAGE :]
            assert as_bytes(await layered.read(0, 4 * PAGE)) == expected


async def test_a_redirect_is_followed_once_and_remembered() -> None:
    """Reads go where the opening was sent to."""
    async with ImageServer(DATA) as server:
        server.next(server.status(302, Location="/elsewhere?signature=1"))
        async with opened(server) as source:
            for page in range(4):
                await check(source, page)
            assert len(server.requests) == 6


async def test_a_signed_url_that_expires_is_replaced_by_a_fresh_one() -> None:
    """When the remembered place refuses, the first URL is asked again where to go."""
    async with ImageServer(DATA) as server:
        signature = 1

        async def answer(request: web.Request) -> web.StreamResponse:
            if request.path == "/image":
                location = f"/elsewhere?signature={signature}"
                return web.Response(status=307, headers={"Location": location})
            if request.query["signature"] != str(signature):
                return web.Response(status=403)
            return await server.give(request)

        server.always(answer)
        async with opened(server) as source:
            await check(source)
            signature = 2
            await check(source)
            await check(source)
            assert len(server.requests) == 2 + 1 + 3 + 1


async def test_a_redirect_in_a_circle_ends() -> None:
    """After ten steps it is an error."""
    async with ImageServer(DATA) as server:
        server.always(server.status(302, Location="/image"))
        with pytest.raises(SourceError, match="redirects more than 10 times"):
            await HttpSource.open(server.url)
        assert len(server.requests) == 10


@pytest.mark.parametrize("location", ["", "ftp://host/x", "http://[", "mailto:a@b", "http://"])
async def test_a_redirect_to_nowhere_is_an_error(location: str) -> None:
    """Only http and https are followed; the place is not shown."""
    async with ImageServer(DATA) as server:
        headers = {"Location": location} if location else {}
        server.always(server.status(302, **headers))
        with pytest.raises(SourceError, match=r"redirects (to no http|more than)"):
            await HttpSource.open(server.url)


async def test_credentials_stay_with_the_first_host() -> None:
    """Neither token nor headers follow a redirect to another origin."""
    async with ImageServer(DATA) as there, ImageServer(DATA) as here:
        here.next(here.status(302, Location="/again"), here.status(302, Location=there.url))
        async with opened(here, token="secret", headers={"X-Key": "key"}) as source:
            await check(source)
        assert [request["Authorization"] for request in here.requests] == ["Bearer secret"] * 2
        assert all(request["X-Key"] == "key" for request in here.requests)
        assert len(there.requests) == 2
        assert not any({"Authorization", "X-Key"} & set(each) for each in there.requests)


async def test_a_user_and_password_come_from_the_url_or_from_netrc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As curl does: the URL first, else the file; a default entry is for nobody."""
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    async with ImageServer(DATA) as server:
        url = server.url.replace("://", "://us%40r:pa%3Ass@")
        async with opened(server, url) as source:
            assert "pa" not in source.name.removesuffix("/image")
        netrc.write_text("machine other login a password b\ndefault login c password d\n")
        async with opened(server):
            pass
        netrc.write_text("machine 127.0.0.1 login user password pass\n")
        async with opened(server):
            pass
        netrc.write_text("machine\n")
        async with opened(server):
            pass
        found = [request.get("Authorization") for request in server.requests]
        assert found == ["Basic dXNAcjpwYTpzcw==", None, "Basic dXNlcjpwYXNz", None]


@pytest.mark.parametrize("trouble", ["drop", "garbage", "too_long", "everything", "compressed"])
async def test_no_message_shows_what_is_secret(
    trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither error, its causes, nor log lines hold credentials or a signature."""
    caplog.set_level(logging.DEBUG)
    async with ImageServer(DATA) as server:
        url = server.url.replace("://", "://user:hunter2@") + "?sig=hunter2"
        server.next(server.status(302, Location="/place?sig=hunter2"))
        async with opened(server, url, token="hunter2", retries=1) as source:
            server.always(getattr(server, trouble))
            with pytest.raises(SourceError) as caught:
                await check(source)
    error: BaseException | None = caught.value
    while error is not None:
        assert "hunter2" not in f"{error} {error!r}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert "hunter2" not in caplog.text


async def test_a_proxy_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """http_proxy stands between; no_proxy takes it away."""
    async with ImageServer(DATA) as server, DelayingProxy("127.0.0.1", 1) as nobody:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{nobody.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        with pytest.raises(SourceError):
            await HttpSource.open(server.url, retries=0)
        asked = nobody.connections
        assert asked
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        async with opened(server):
            pass
        assert nobody.connections == asked


# --- connections -----------------------------------------------------------------------


async def test_no_more_requests_at_once_than_allowed() -> None:
    """Further reads wait for their turn."""
    async with serving(connections=3) as (server, source):
        at_once = most = 0

        async def count(request: web.Request) -> web.StreamResponse:
            nonlocal at_once, most
            at_once += 1
            most = max(most, at_once)
            await asyncio.sleep(0.002)
            at_once -= 1
            return await server.give(request)

        server.always(count)
        await asyncio.gather(*(check(source, page % 16) for page in range(32)))
        assert most == 3


async def test_cancelled_reads_leave_room_for_others() -> None:
    """However many are cancelled midway, the connections are there for those that stay."""
    async with serving(connections=2) as (server, source):
        server.always(server.stall_midway)
        for _ in range(5):
            reads = [asyncio.ensure_future(check(source)) for _ in range(4)]
            asked = len(server.requests)
            while len(server.requests) < asked + 2:
                await asyncio.sleep(0.001)
            for read in reads:
                read.cancel()
            done = await asyncio.gather(*reads, return_exceptions=True)
            assert all(isinstance(each, asyncio.CancelledError) for each in done)
        server.always(server.give)
        await asyncio.gather(*(check(source, page) for page in range(16)))


async def test_a_connection_is_used_again() -> None:
    """Reads one after another take one connection, also after a redirect."""
    async with (
        ImageServer(DATA) as server,
        DelayingProxy("127.0.0.1", int(server.base.rpartition(":")[2])) as proxy,
    ):
        url = f"http://127.0.0.1:{proxy.port}/image"
        server.next(server.status(302, Location="/elsewhere"))
        async with opened(server, url) as source:
            for page in range(16):
                await check(source, page)
            assert proxy.connections == 1
            proxy.cut()  # as a server does with connections that have been idle for long
            await check(source)


async def test_a_close_waits_for_reads_in_flight() -> None:
    """They get their bytes; later ones are refused."""
    async with serving() as (server, source):
        go_on = asyncio.Event()

        async def slow(request: web.Request) -> web.StreamResponse:
            await go_on.wait()
            return await server.give(request)

        server.next(slow)
        early = asyncio.ensure_future(check(source))
        while len(server.requests) < 2:
            await asyncio.sleep(0.001)
        closing = asyncio.ensure_future(source.aclose())
        await asyncio.sleep(0)
        with pytest.raises(ClosedError):
            await check(source)
        assert not closing.done()
        go_on.set()
        await early
        await closing


# --- TLS -------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving_tls(
    name: str = "127.0.0.1",
) -> AsyncIterator[tuple[ImageServer, ssl.SSLContext]]:
    """Serve DATA over TLS; give the server and a context that trusts it."""
    authority = trustme.CA()
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(server_side)
    client_side = ssl.create_default_context()
    authority.configure_trust(client_side)
    async with ImageServer(DATA, tls=server_side) as server:
        yield server, client_side


async def test_over_tls() -> None:
    """A certificate that is trusted serves like any other server."""
    async with serving_tls() as (server, trusting), opened(server, ssl=trusting) as source:
        answers = await asyncio.gather(*(source.read(page * PAGE, PAGE) for page in range(16)))
        assert b"".join(map(as_bytes, answers)) == DATA


async def test_a_certificate_that_is_not_trusted_is_refused_at_once() -> None:
    """No retry mends it, and nothing is read."""
    async with serving_tls() as (server, _):
        with pytest.raises(SourceError, match="cannot be trusted"):
            await HttpSource.open(server.url)
        assert not server.requests


async def test_a_certificate_for_another_name_is_refused() -> None:
    """The name is part of the trust."""
    async with serving_tls("elsewhere.example") as (server, trusting):
        with pytest.raises(SourceError, match="cannot be trusted"):
            await HttpSource.open(server.url, ssl=trusting)


async def test_no_redirect_leads_out_of_tls() -> None:
    """From https to http is refused."""
    async with ImageServer(DATA) as plain, serving_tls() as (server, trusting):
        server.next(server.status(302, Location=plain.url))
        with pytest.raises(SourceError, match="from https to http"):
            await HttpSource.open(server.url, ssl=trusting)
        assert not plain.requests
