"""A source over an image on a web server, read by ranged GETs (extra ``http``: aiohttp).

Knows: one URL, the generation of the image that stood there at opening, time limits, retries.
Must not know: page faults; what the image is for.

Laws of this file:

* Never bytes of two generations.  Each answer's length and validators are compared with those
  at opening (``http_answers`` says what they prove), and the server itself is asked to refuse
  another generation.  Once the image was replaced, every later read raises SourceError.
* A read gives exactly the bytes asked for: status 206, the right Content-Range, that many
  bytes, no content encoding.  Whatever else comes is asked for again or raised, never used;
  an answer with the whole image is refused before its body is read.
* Nothing waits for ever: a request has ``request_timeout`` seconds to its last byte, a read
  ``timeout`` with all its retries.  Between retries it waits, longer each time and partly by
  chance, or as long as the server asks (Retry-After) where that fits.
* Redirects are followed at opening and the place they lead to is remembered.  When that place
  fails in any way, the next attempt begins at the first URL again: a signed URL that has
  expired is replaced by a fresh one.
* Credentials (URL, netrc, token, headers) go to the first URL's scheme, host and port only,
  never to where it redirects.  Messages hold neither them nor a URL's query.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from ssl import SSLContext
from typing import TYPE_CHECKING, Final, Self, TypeVar

from ..errors import SourceError
from . import check_read
from .http_answers import REDIRECTS, ContentRange, Generation, may_help_later, retry_after
from .http_places import Place
from .reads import ReadsUnderWay

try:
    import aiohttp
except ImportError as error:
    raise ImportError(
        "images on web servers are read with aiohttp: pip install 'aiouffd[http]'"
    ) from error

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")

_HOPS: Final = 10
_LONGEST_PAUSE: Final = 5.0  # seconds between retries


async def open_url(url: str) -> HttpSource:
    """Open an ``http://`` or ``https://`` URL with default settings."""
    return await HttpSource.open(url)


class _TryAgain(Exception):
    """An attempt failed in a way that another may not; ``after`` seconds, if the server said."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class HttpSource:
    """The bytes behind a URL as they were when it was opened.

    ::

        source = await HttpSource.open("https://images.example/vm.img")

    Attributes:
        name: The URL without credentials and query, for messages.

    Sharing: the loop it was opened on.
    """

    #: It is no layer: holes that the image had when it was put there are zeros now.
    holes_known: Final = False

    def __init__(
        self,
        session: aiohttp.ClientSession,
        first: Place,
        *,
        timeout: float,
        request_timeout: float,
        retries: int,
        backoff: float,
        connections: int,
    ) -> None:
        """Prepare; ``open`` is the way to make one."""
        self.name = str(first.url.with_query(None))
        self._session = session
        self._first = self._place = first
        self._timeout = timeout
        self._request_timeout = request_timeout
        self._retries = retries
        self._backoff = backoff
        self._slots = asyncio.Semaphore(connections)
        self._reads = ReadsUnderWay(f"the source over {self.name}")
        self._generation = Generation(0, "", "")
        self._condition: dict[str, str] = {}
        self._identity = ""
        self._changed = ""

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        token: str | None = None,
        ssl: SSLContext | None = None,
        timeout: float = 20.0,
        request_timeout: float = 8.0,
        retries: int = 8,
        backoff: float = 0.1,
        connections: int = 32,
    ) -> Self:
        """Find an image, its length and its generation by a request for its first byte.

        A user and password come from the URL (``https://user:password@host/``), else from
        ``~/.netrc`` (or the file that NETRC names) if it has an entry for the host.  Proxies
        come from the usual variables (https_proxy, no_proxy).

        Args:
            url: An http or https URL.
            headers: Sent with each request to the URL's own host.
            token: Sent as ``Authorization: Bearer``.
            ssl: How to verify the server; None trusts what the system trusts.
            timeout: Seconds a read may take in all, retries included.
            request_timeout: Seconds one request may take, to its last byte.
            retries: Attempts after the first.
            backoff: Longest wait before the first retry, in seconds; it doubles.
            connections: Requests at once; further reads wait for a turn.

        Raises:
            SourceError: Not an http or https URL, nothing there, no access, no ranges, or
                nothing that tells one generation of the image from the next.
        """
        try:
            first = await asyncio.to_thread(Place.first, url, headers or {}, token)
        except ValueError as error:
            raise SourceError(str(error)) from None
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60, ssl=ssl or True),
            cookie_jar=aiohttp.DummyCookieJar(),
            # a compressed body has other offsets; what comes encoded all the same is refused
            headers={"Accept-Encoding": "identity"},
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(),  # ours are around each request
        )
        try:
            source = cls(
                session,
                first,
                timeout=timeout,
                request_timeout=request_timeout,
                retries=retries,
                backoff=backoff,
                connections=connections,
            )
            source._generation = await source._persist(source._probe, "its length")
            source._condition = source._generation.condition
            source._identity = source._generation.identity(source.name)
        except BaseException:
            await session.close()
            raise
        return source

    @property
    def size(self) -> int:
        """Length of the image, in bytes."""
        return self._generation.size

    @property
    def identity(self) -> str:
        """A digest of the URL and of the generation that is pinned: its ETag and length."""
        return self._identity

    def extents(self) -> Iterator[tuple[int, int]]:
        """Give one extent: HTTP knows no holes."""
        if self.size:
            yield 0, self.size

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """Give None: nothing is at hand."""
        self._check(offset, length)
        return None

    async def read(self, offset: int, length: int) -> Buffer:
        """Ask the server for the bytes, again if need be.

        Raises:
            SourceError: The image was replaced, or no attempt brought the bytes in time.
            ClosedError: The source is closed.

        Cancellation: the request's connection is closed; others are not touched.
        """
        self._check(offset, length)
        with self._reads:
            return await self._persist(
                lambda: self._fetch(offset, length), f"{length} bytes at offset {offset}"
            )

    async def aclose(self) -> None:
        """Wait for reads in flight, which end by their time limit, and close all connections.

        Cancellation: reads go on and nothing is closed; call again.
        """
        await self._reads.end()
        await self._session.close()

    def _check(self, offset: int, length: int) -> None:
        self._reads.check()
        check_read(offset, length, self.size)
        if self._changed:
            raise self._replaced()

    # --- persistence -------------------------------------------------------------------

    async def _persist(self, attempt: Callable[[], Awaitable[T]], what: str) -> T:
        """Make attempts until one succeeds, or the retries or the time are used up."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._timeout
        reason = ""
        for failed in range(1, self._retries + 2):
            wait = 0.0
            try:
                return await self._attempt(attempt, end)
            except _TryAgain as error:
                reason, wait = str(error), error.after
            except TimeoutError:
                reason = f"no whole answer within {self._request_timeout:g} s"
            except aiohttp.ClientConnectorCertificateError as error:
                raise SourceError(f"{self.name} cannot be trusted: {error}") from error
            except (aiohttp.ClientError, OSError) as error:
                reason = _reason(error)
            self._place = self._first
            wait = max(wait, _pause(failed, self._backoff))
            if loop.time() + wait >= end:
                reason += f"; the next attempt ({wait:.1f} s) exceeds {self._timeout:g} s"
                break
            if failed <= self._retries:
                await asyncio.sleep(wait)
        # No cause: some of aiohttp's errors show the whole URL, with what signs it.
        raise SourceError(f"{self.name}: {what} cannot be had: {reason}")

    async def _attempt(self, attempt: Callable[[], Awaitable[T]], end: float) -> T:
        """Wait for a turn, and then for as long as one request may take."""
        if self._slots.locked():
            async with asyncio.timeout_at(end):
                await self._slots.acquire()
        else:
            await self._slots.acquire()  # at once: one timer less for each read
        try:
            limit = asyncio.get_running_loop().time() + self._request_timeout
            async with asyncio.timeout_at(min(limit, end)):
                return await attempt()
        finally:
            self._slots.release()

    def _replaced(self) -> SourceError:
        return SourceError(
            f"{self.name} was changed while it was served: {self._changed};"
            " give a new image a new name"
        )

    def _compare(self, size: int, headers: Mapping[str, str]) -> None:
        """Raise for good if an answer is of another generation."""
        now = Generation.of(size, headers)
        self._changed = self._changed or self._generation.difference(now)
        if self._changed:  # by this answer, or by one that came while this one was under way
            raise self._replaced()
        if not self._generation.is_shown_by(now):
            raise _TryAgain("an answer does not say which generation it is of (ETag)")

    # --- one attempt -------------------------------------------------------------------

    async def _probe(self) -> Generation:
        """Find length and generation by asking for the first byte."""
        remembered = self._place is not self._first
        response = await self._ask({"Range": "bytes=0-0"})
        with contextlib.closing(response):
            status, headers = response.status, response.headers
            found = ContentRange.parse(headers.get("Content-Range"))
            if (status == 416 and found is not None and found.size == 0) or (
                status == 200 and response.content_length == 0
            ):
                return Generation.of(0, headers)
            if status == 200:
                raise SourceError(
                    f"{self.name} cannot be served: its server does not give ranges"
                    " (it answers a request for one byte with everything)"
                )
            if status != 206:
                raise self._refusal(response, remembered=remembered)
            if found is None or found.start != 0:
                raise _TryAgain(f"no usable Content-Range: {headers.get('Content-Range')!r}")
            generation = Generation.of(found.size, headers)
            if not generation.known:
                raise SourceError(
                    f"{self.name} cannot be served: its server says neither ETag nor"
                    " Last-Modified, so that a replaced image could not be told"
                )
            await self._body(response, found.length)
        return generation

    async def _fetch(self, offset: int, length: int) -> bytes:
        wanted = f"bytes={offset}-{offset + length - 1}"
        remembered = self._place is not self._first
        response = await self._ask({"Range": wanted, **self._condition})
        with contextlib.closing(response):  # which does nothing if its body was read to the end
            status, headers = response.status, response.headers
            if status == 206:
                found = ContentRange.parse(headers.get("Content-Range"))
                if found is None:
                    raise _TryAgain(f"no usable Content-Range: {headers.get('Content-Range')!r}")
                self._compare(found.size, headers)
                if (found.start, found.length) != (offset, length):
                    raise _TryAgain(f"asked for {wanted}, got {headers['Content-Range']}")
                data = await self._body(response, length)
                if self._changed:  # while this answer was under way
                    raise self._replaced()
                return data
            if status == 412:
                self._changed = self._changed or "its server refuses the one that was opened (412)"
                raise self._replaced()
            if status == 416:
                found = ContentRange.parse(headers.get("Content-Range"))
                self._compare(self.size if found is None else found.size, headers)
            if status == 200:
                length_now = response.content_length
                self._compare(self.size if length_now is None else length_now, headers)
                raise _TryAgain("a request for a range was answered with everything (200)")
            raise self._refusal(response, remembered=remembered)

    def _refusal(self, response: aiohttp.ClientResponse, *, remembered: bool) -> Exception:
        """Make the error for a status that is no answer."""
        status = response.status
        reason = f"the server answers {status} {response.reason or ''}".rstrip()
        if may_help_later(status):
            return _TryAgain(reason, retry_after(response.headers.get("Retry-After")))
        if remembered:  # a signed URL that has expired: the first URL leads to a fresh one
            return _TryAgain(reason)
        hint = "; check user and password or token" if status in (401, 403, 407) else ""
        return SourceError(f"{self.name} cannot be read: {reason}{hint}")

    async def _ask(self, headers: dict[str, str]) -> aiohttp.ClientResponse:
        """Send a request, follow redirects, and give the answer before its body is read."""
        place = self._place
        for _ in range(_HOPS):
            response = await self._session.get(
                place.url,
                headers={**place.headers, **headers},
                proxy=place.proxy,
                allow_redirects=False,
            )
            if response.status not in REDIRECTS:
                self._place = place
                return response
            response.close()
            place = self._redirected(place, response)
        raise SourceError(f"{self.name} redirects more than {_HOPS} times, in a loop?")

    def _redirected(self, place: Place, response: aiohttp.ClientResponse) -> Place:
        try:
            return place.redirected(response.headers.get("Location", ""), self._first)
        except ValueError as error:
            raise SourceError(f"{self.name} cannot be read: {error}") from None

    async def _body(self, response: aiohttp.ClientResponse, length: int) -> bytes:
        """Read an answer's body, which is to be so long; more than that is not read."""
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise SourceError(
                f"{self.name} cannot be read: its server encodes the answers ({encoding})"
                " though asked not to; switch that off for images"
            )
        declared = response.content_length
        if declared == length:
            data = await response.read()
        elif declared is not None:
            raise _TryAgain(f"an answer of {declared} bytes where {length} were asked for")
        else:
            pieces = bytearray()
            async for piece in response.content.iter_any():
                pieces += piece
                if len(pieces) > length:
                    raise _TryAgain(f"an answer of more than {length} bytes")
            data = bytes(pieces)
        if len(data) != length:
            raise _TryAgain(f"an answer of {len(data)} bytes where {length} were asked for")
        return data


def _pause(failed: int, first: float) -> float:
    """Give the seconds to wait after so many failures: doubling, and half of it by chance.

    Without the chance, all readers that one outage has stopped would come back as one.
    """
    full = min(first * 2.0 ** min(failed - 1, 60), _LONGEST_PAUSE)
    return full * random.uniform(0.5, 1.0)  # noqa: S311 - no secret


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientResponseError):
        return f"no HTTP that can be understood ({error.message})"
    if isinstance(error, aiohttp.InvalidURL):
        return "no valid URL"
    return f"{type(error).__name__}: {error}"
