"""Images by name: a URL in, a source out; layers, a fallback and a cache around it.

Knows: schemes, and which module opens each; that a seekable zstd image is told by its end.
Must not know: what any scheme means; its module does.

A module is imported when an image asks for it, and so are the packages that it needs.

Law of this file: whatever goes wrong half-way, everything opened until then is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Sequence
from importlib import import_module
from typing import Final

from ..errors import SourceError, UffdError
from . import Source
from .file import FileSource
from .measured import MeasuredSource, Reads
from .zstd_marks import is_compressed, is_without_table

log: Final = logging.getLogger("aiouffd.sources")

#: Which module here opens a scheme, by its ``open_url``.
SCHEMES: Final = {
    "http": "http",
    "https": "http",
    "s3": "object_store",
    "gs": "object_store",
    "az": "object_store",
    "redis": "redis",
    "rediss": "redis",
    "valkey": "redis",
    "valkeys": "redis",
    "redis+cluster": "redis",
    "rediss+cluster": "redis",
    "valkey+cluster": "redis",
    "valkeys+cluster": "redis",
    "redis+unix": "redis",
    "valkey+unix": "redis",
    "aiouffd": "peer",
    "aiouffds": "peer",
}

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?")
_SMALLEST_CACHE: Final = 4096

#: Seconds for an image to answer before its fallback is asked: well within the time that a
#: fault may take.  Sources far away try again by themselves, as often as fits into it.
_FALL_OVER_AFTER: Final = 5.0


def path_of(url: str) -> str | None:
    """Give the path that a URL names on this machine; None if it is somewhere else.

    Args:
        url: A path as it is, ``file:PATH`` or ``file:///PATH``, or a URL of another scheme.

    Raises:
        SourceError: It is neither; the message says what is possible.
    """
    match = _SCHEME.match(url)
    scheme = match[1].lower() if match is not None else ""
    if "\0" in url or not url:
        raise SourceError(f"{url!r} names no image")
    if scheme == "file":
        return _file_path(url)
    if match is None or (scheme not in SCHEMES and not match[2]):
        return url  # a name may have a colon
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise SourceError(
            f"{shown(url)}: no image can be had from {scheme}://; a path, file: and {known} are"
            " possible"
        )
    if not match[2]:
        raise SourceError(f"{shown(url)}: write {scheme}://... (or ./{scheme}:... for a file)")
    return None


def _file_path(url: str) -> str:
    from urllib.parse import unquote, urlsplit

    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise SourceError(f"{url}: {error}") from error
    if parts.netloc not in ("", "localhost"):
        raise SourceError(f"{url}: a file lies on this machine; write file:///PATH")
    if parts.query or parts.fragment:
        raise SourceError(f"{url}: write %3F for a ? and %23 for a # in a file's name, or the path")
    path = unquote(parts.path)
    if not path or "\0" in path:
        raise SourceError(f"{url} names no file; write file:///PATH")
    return path


def shown(url: str) -> str:
    """Give a URL as it may be shown: without a password or token, and what follows a ``?``."""
    match = _SCHEME.match(url)
    if match is None or not match[2]:
        return url
    head, _, query = url.partition("?")
    head = re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", head)
    head = re.sub(r"://[^/@:]+@", "://***@", head)  # alone it may well be a token
    return f"{head}?***" if query else head


async def open_source(url: str) -> Source:
    """Open what a URL names; the content, if that is a seekable zstd image.

    Args:
        url: A path, ``file:``, ``http(s)://``, ``s3://``, ``gs://``, ``az://``,
            ``redis(s)://``, ``valkey(s)://``, or ``aiouffd(s)://`` for another server.

    Returns:
        The source, the caller's to close.

    Raises:
        SourceError: The URL makes no sense, or what it names cannot be served: it is not there,
            or is a zstd file that cannot be read at random.
        OSError: It cannot be opened.
        ImportError: A package is missing; the message says how to get it.

    Cancellation: nothing is left open.
    """
    path = path_of(url)
    if path is not None:
        source: Source = await _open_file(path)
    else:
        scheme = url.partition(":")[0].lower()
        module = import_module(f".{SCHEMES[scheme]}", __package__)
        try:
            source = await module.open_url(url)
        except ValueError as error:  # brackets that do not match, a host that is no name
            raise SourceError(f"{shown(url)}: {error}") from error
    async with _closed_on_error([source]):
        if await is_compressed(source):
            from .compressed import CompressedSource

            source = await CompressedSource.open(source)
        elif await is_without_table(source):
            raise SourceError(
                f"{shown(url)} is a zstd file without a seek table at its end: cut short, or not"
                " made to be read at random (zstd -d it, then aiouffd image pack)"
            )
    return source


async def open_image(
    url: str,
    *,
    layers: Sequence[str] = (),
    fallback: str | None = None,
    cache_bytes: int = 0,
    accounts: list[Reads] | None = None,
) -> Source:
    """Open an image with all that stands around it.

    Args:
        url: The image, or the base under the layers; see ``open_source``.
        layers: Sparse diffs over it, from the oldest to the newest.
        fallback: The same bytes as ``url`` from elsewhere, for when that fails or takes more
            than five seconds; if it cannot even be opened, the fallback stands alone.
        cache_bytes: How much of the image to keep in memory, in bytes; 0 is no cache.
        accounts: If something stands around the image, what is read from each part is
            measured, and its account put here: ``image``, ``layer 1``, ..., ``fallback``.

    Returns:
        The source, the caller's to close; closing it closes all that it is made of.

    Raises:
        SourceError: As ``open_source``; or the fallback is not the same image.
        ValueError: There is no room for a page in the cache.
        OSError: As ``open_source``.
        ImportError: As ``open_source``.

    Cancellation: nothing is left open.
    """
    if cache_bytes and cache_bytes < _SMALLEST_CACHE:
        raise ValueError(f"a cache of {cache_bytes} bytes cannot keep a page")
    for one in (url, *layers, *((fallback,) if fallback is not None else ())):
        path_of(one)  # nonsense is refused before anything is opened
    if not layers and fallback is None and not cache_bytes:
        accounts = None
    opened: list[Source] = []
    async with _closed_on_error(opened):
        image = await _open_base(url, fallback, opened, accounts)
        for number, layer in enumerate(layers, 1):  # each counts as opened at once
            opened.append(_measured(await open_source(layer), f"layer {number}", accounts))
        if layers:
            from .layered import LayeredSource

            image = LayeredSource(image, *opened[1:])
        if cache_bytes:
            from .cached import BLOCK_BYTES, CachedSource

            block = min(BLOCK_BYTES, 1 << (cache_bytes.bit_length() - 1))
            image = CachedSource(image, cache_bytes, block=block)
    return image


def _measured(source: Source, role: str, accounts: list[Reads] | None) -> Source:
    if accounts is None:
        return source
    accounts.append(Reads(role))
    return MeasuredSource(source, role, accounts[-1])


async def _open_base(
    url: str, fallback: str | None, opened: list[Source], accounts: list[Reads] | None
) -> Source:
    """Open an image and its fallback; one source is put on the list, which closes both."""
    try:
        first: Source | None = _measured(await open_source(url), "image", accounts)
    except (UffdError, OSError) as error:
        if fallback is None:
            raise
        log.warning("%s; the fallback stands alone", error)
        first = None
    if first is not None:
        opened.append(first)
    if fallback is None:
        return opened[0]
    opened.append(_measured(await open_source(fallback), "fallback", accounts))
    from .fallback import FallbackSource

    image = FallbackSource(*opened, retries=0, timeout=_FALL_OVER_AFTER)
    opened[:] = [image]
    return image


@contextlib.asynccontextmanager
async def _closed_on_error(opened: list[Source]) -> AsyncIterator[None]:
    """Close all sources of a list if the block fails."""
    try:
        yield
    except BaseException:
        for source in opened:
            with contextlib.suppress(UffdError, OSError):
                await source.aclose()
        raise


async def _open_file(path: str) -> FileSource:
    """Open a file in a thread: its holes are looked for, and that may take a disk's time."""
    opening = asyncio.ensure_future(asyncio.to_thread(FileSource, path))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        # A thread cannot be cancelled: what it opens is closed, wanted or not.
        with contextlib.suppress(UffdError, OSError):
            await (await opening).aclose()
        raise
