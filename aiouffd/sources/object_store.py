"""A source over an object in S3, Google Cloud Storage or Azure (extra ``s3``: obstore).

Knows: one object of one store, the generation of it that stood there at opening, time limits.
Must not know: page faults; how requests are signed and credentials found, obstore does.

Laws of this file:

* Never bytes of two generations.  Each get asks the store to refuse any but the ETag at
  opening, and what it says of itself is compared all the same.  Once the object was replaced,
  every later read raises SourceError.
* A read gives exactly the bytes asked for: obstore answers a range that leaves the object
  with less, silently, so range and length of every answer are compared.
* Nothing waits for ever: a request has ``request_timeout`` seconds, a read ``timeout`` with
  all its retries.  obstore retries by itself, with backoff.
* One get per read.  Neighbouring pages are worth joining (64 of them over loopback: 1.5 ms in
  one request, 13 ms in 64), but that is the business of those who know them to be neighbours:
  a chunk, a cache, a prefetch.
* No message shows what a URL was signed with.

Cancelling a read closes its connection: a new one costs the next read a handshake.  obstore
has threads of its own and does not survive a fork: open sources in the process that reads.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, cast
from urllib.parse import unquote, urlsplit

from ..errors import SourceError
from . import check_read
from .reads import ReadsUnderWay

try:
    import obstore
    from obstore.exceptions import BaseError, PreconditionError
    from obstore.store import LocalStore, from_url
except ImportError as error:
    raise ImportError(
        "images in object stores are read with obstore: pip install 'aiouffd[s3]'"
    ) from error

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ObjectStore, RetryConfig
    from typing_extensions import Buffer

T = TypeVar("T")

#: Where an S3 that is not Amazon's may be named.
_ENDPOINTS: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


async def open_url(url: str) -> ObjectStoreSource:
    """Open ``s3://bucket/key``, ``gs://bucket/key`` or ``az://container/key``."""
    return await ObjectStoreSource.open(url)


class ObjectStoreSource:
    """The bytes of an object as they were when it was opened.

    ::

        source = await ObjectStoreSource.open("s3://images/vm.img")

    Attributes:
        name: The object's URL, for messages.

    Sharing: the loop it was opened on, in the process it was opened in.
    """

    #: It is no layer: holes that the image had when it was put there are zeros now.
    holes_known: Final = False

    def __init__(self, store: ObjectStore, path: str, name: str, timeout: float) -> None:
        """Prepare; ``open`` and ``over`` are the ways to make one."""
        self.name = name
        self._store = store
        self._path = path
        self._timeout = timeout
        self._reads = ReadsUnderWay(f"the source over {name}")
        self._size = 0
        self._generation: tuple[object, ...] = ()
        self._etag: str | None = None
        self._changed = ""

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        options: Mapping[str, Any] | None = None,
        timeout: float = 20.0,
        request_timeout: float = 8.0,
        retries: int = 8,
    ) -> Self:
        """Find an object, its length and its generation.

        Credentials, region and endpoint come from the usual variables: AWS_ACCESS_KEY_ID,
        AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL (an http
        endpoint is taken at its word), AWS_SKIP_SIGNATURE for public buckets;
        GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_NAME and _KEY.  Without them a
        cloud machine's own role is asked for.  Profiles in ~/.aws are not read.

        Args:
            url: ``s3://bucket/key``, ``gs://bucket/key``, ``az://container/key``, or
                ``file:///path`` for a directory that stands in for a store.
            options: Settings of the store by obstore's names, such as ``endpoint``; they go
                before the environment.
            timeout: Seconds a read may take in all, retries included.
            request_timeout: Seconds one request may take, to its last byte.
            retries: Requests after the first that fails.

        Raises:
            SourceError: The URL names no object, nothing is there, there is no access, or an
                option is unknown.
        """
        store, path = _store_of(url, options or {}, timeout, request_timeout, retries)
        return await cls.over(store, path, name=_without_query(url), timeout=timeout)

    @classmethod
    async def over(
        cls, store: ObjectStore, path: str, *, name: str = "", timeout: float = 20.0
    ) -> Self:
        """Find an object in a store of obstore's that was made elsewhere.

        Give that store a ``timeout`` among its ``client_options`` and a ``retry_config``
        that suit: ``timeout`` here only ends what those do not.

        Args:
            store: Any store of obstore's.
            path: The object's key.
            name: What to call it in messages.
            timeout: Seconds a read may take in all.

        Raises:
            SourceError: As ``open``.
        """
        source = cls(store, path, name or path, timeout)
        await source._find()
        return source

    @property
    def size(self) -> int:
        """Length of the object, in bytes."""
        return self._size

    @property
    def identity(self) -> str:
        """A digest of the object's name and of the generation that is pinned."""
        text = f"{self.name}\n{self._generation}"
        return "object:" + hashlib.sha256(text.encode()).hexdigest()

    def extents(self) -> Iterator[tuple[int, int]]:
        """Give one extent: object stores know no holes."""
        if self._size:
            yield 0, self._size

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """Give None: nothing is at hand."""
        self._check(offset, length)
        return None

    async def read(self, offset: int, length: int) -> Buffer:
        """Get the bytes from the store.

        Raises:
            SourceError: The object was replaced, or the bytes did not come in time.
            ClosedError: The source is closed.

        Cancellation: the request's connection is closed; others are not touched.
        """
        self._check(offset, length)
        with self._reads:
            return await self._ask(
                lambda: self._fetch(offset, length), f"{length} bytes at offset {offset}"
            )

    async def aclose(self) -> None:
        """Wait for reads in flight, which end by their time limit, and let go of the store.

        Cancellation: reads go on; call again.
        """
        await self._reads.end()
        del self._store  # obstore closes its connections with the last reference
        self._store = cast("ObjectStore", None)

    def _check(self, offset: int, length: int) -> None:
        self._reads.check()
        check_read(offset, length, self._size)
        if self._changed:
            raise self._replaced()

    async def _find(self) -> None:
        meta = await self._ask(lambda: obstore.head_async(self._store, self._path), "its length")
        self._size = meta["size"]
        self._generation = _generation(meta)
        etag = meta["e_tag"]
        # A weak ETag is compared, but no condition: it may be equal where bytes differ.
        self._etag = etag if etag is not None and not etag.startswith("W/") else None

    async def _fetch(self, offset: int, length: int) -> Buffer:
        options: GetOptions = {"range": (offset, offset + length)}
        if self._etag is not None:
            options["if_match"] = self._etag
        result = await obstore.get_async(self._store, self._path, options=options)
        now = _generation(result.meta)
        if now != self._generation:
            self._changed = self._changed or _difference(self._generation, now)
        elif result.range == (offset, offset + length):
            data = await result.bytes_async()
            if not self._changed:  # while this answer was under way
                if len(data) == length:
                    return data
                raise SourceError(f"{self.name} gave {len(data)} bytes where {length} were asked")
        else:
            raise SourceError(
                f"{self.name} gave the range {result.range}"
                f" where {(offset, offset + length)} was asked for"
            )
        raise self._replaced()

    async def _ask(self, request: Callable[[], Awaitable[T]], what: str) -> T:
        """Make a request within the time limit; whatever goes wrong is a SourceError."""
        try:
            async with asyncio.timeout(self._timeout):
                return await request()
        except TimeoutError:
            reason = f"not within {self._timeout:g} s"
        except PreconditionError:
            self._changed = self._changed or "its store refuses the one that was opened"
            raise self._replaced() from None
        except FileNotFoundError:
            reason = "no such object or bucket"
        except (BaseError, OSError, ValueError) as error:
            # Not as a cause: its text may hold the whole URL, with what signs it.
            reason = _first_line(error)
        raise SourceError(f"{self.name}: {what} cannot be had: {reason}")

    def _replaced(self) -> SourceError:
        return SourceError(
            f"{self.name} was changed while it was served: {self._changed};"
            " give a new image a new name"
        )


def _store_of(
    url: str, options: Mapping[str, Any], timeout: float, request_timeout: float, retries: int
) -> tuple[ObjectStore, str]:
    """Make the store that a URL's last part lies in."""
    parts = urlsplit(url)
    folder, _, key = parts.path.rpartition("/")
    if not key or not parts.scheme:
        raise SourceError(f"{_without_query(url)} names no object; write s3://bucket/key")
    if parts.query or parts.fragment:
        raise SourceError(
            f"{_without_query(url)}: nothing may follow the key; write %3F for a ? and %23 for a #"
        )
    container = f"{parts.scheme}://{parts.netloc}{folder}"
    if parts.scheme == "file":
        if options:
            raise SourceError("a directory has no options")
        return LocalStore(unquote(folder) or "/"), unquote(key)
    client: dict[str, Any] = {"timeout": timedelta(seconds=request_timeout)}
    endpoints = [value for name, value in options.items() if "endpoint" in name or "url" in name]
    if parts.scheme in ("s3", "s3a"):
        endpoints += [os.environ.get(name, "") for name in _ENDPOINTS]
    if any(str(endpoint).startswith("http://") for endpoint in endpoints):
        client["allow_http"] = True  # who names such an endpoint means it
    retry: RetryConfig = {
        "max_retries": retries,
        "retry_timeout": timedelta(seconds=timeout),
        "backoff": {
            "init_backoff": timedelta(seconds=0.1),
            "max_backoff": timedelta(seconds=5),
            "base": 2,
        },
    }
    try:
        store = from_url(
            container, client_options=cast("Any", client), retry_config=retry, **options
        )
    except (BaseError, ValueError) as error:
        raise SourceError(f"{_without_query(url)}: {_first_line(error)}") from None
    return store, unquote(key)


def _generation(meta: ObjectMeta) -> tuple[object, ...]:
    """Take what tells one generation of an object from another; the time only without an ETag."""
    etag = meta["e_tag"]
    weak = etag is None or etag.startswith("W/")
    modified = meta["last_modified"].isoformat() if weak else None
    return meta["size"], etag, modified, meta["version"]


def _difference(before: tuple[object, ...], now: tuple[object, ...]) -> str:
    names = ("size", "ETag", "time", "version")
    changes = zip(names, before, now, strict=True)
    return ", ".join(f"its {name} went from {a} to {b}" for name, a, b in changes if a != b)


def _without_query(text: str) -> str:
    return re.sub(r"\?[^\s\"')]*", "", re.sub(r"://[^/@\s]*@", "://", text))


def _first_line(error: Exception) -> str:
    return _without_query(str(error).partition("\n")[0]) or type(error).__name__
