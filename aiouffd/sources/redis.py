"""A source over an image in Redis or Valkey, a single server or a cluster (extra ``redis``).

Knows: how an image lies in keys.
Must not know: connections (``redis_client`` does); what the image is for.

An image lies in one of two ways:

* As **one string value**: ranges of it are read with GETRANGE.
* In **chunks**, as ``store_image`` writes it.  ``KEY`` is a hash: ``aiouffd`` (1, the layout),
  ``size``, ``chunk`` (bytes), ``version`` (random) and ``present``, a bitmap of the chunks that
  are not all zeros, most significant bit first.  Chunk number N lies at ``KEY:VERSION:N``; a
  cluster spreads them, unless KEY has a ``{tag}``.

Laws of this file:

* Chunks of two versions are never mixed: the version is part of their names, so that there is
  nothing to check.  A source reads the version it was opened with; when another was stored,
  the old chunks stay for a while (see ``store_image``), and then reads raise SourceError.
* A chunk that is not there is zeros only if the bitmap says so.  If it should be there it was
  evicted, expired or deleted, and this and every later read raises SourceError.
* A string value has no version.  Its length is asked for with every read, in the same round
  trip; a value replaced by one of the same length is not seen.
* Lengths are compared: a read gives all its bytes or raises.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from ..errors import SourceError
from . import Extents, Source, check_read
from .reads import ReadsUnderWay
from .redis_client import Command, Commands, Place

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Bytes per chunk that ``store_image`` makes: a fault's page is cut out of one by the server.
CHUNK: Final = 64 << 10
_CHUNKS: Final = (4096, 64 << 20)  # smallest and largest
_PIECE: Final = 1 << 20  # of a string value, per command
_STORED_AT_ONCE: Final = 4 << 20  # bytes
_LAYOUT: Final = b"1"


class _Layout(NamedTuple):
    """What the hash of a chunked image says."""

    size: int
    chunk: int
    version: bytes
    present: bytes

    @classmethod
    def parse(cls, fields: dict[bytes, bytes]) -> Self:
        """Read it.

        Raises:
            ValueError: It is no image of ours, or its parts do not fit together.
        """
        if fields.get(b"aiouffd") != _LAYOUT:
            raise ValueError("the hash there is no image that store_image wrote")
        size, chunk = int(fields.get(b"size", b"")), int(fields.get(b"chunk", b""))
        if size < 0 or not _CHUNKS[0] <= chunk <= _CHUNKS[1] or chunk & chunk - 1:
            raise ValueError(f"an image of {size} bytes in chunks of {chunk} cannot be")
        present = fields.get(b"present", b"")
        if len(present) != (_count(size, chunk) + 7) // 8:
            raise ValueError(f"its bitmap has {len(present)} bytes, which does not fit its size")
        return cls(size, chunk, fields.get(b"version", b""), present)

    def holds(self, number: int) -> bool:
        """Say whether a chunk is not all zeros."""
        return bool(self.present[number >> 3] & 0x80 >> (number & 7))

    def extents(self) -> Iterator[tuple[int, int]]:
        """Give the stretches that are not all zeros; neighbours are not joined."""
        for at, byte in enumerate(self.present):
            for bit in range(8) if byte else ():
                offset = (8 * at + bit) * self.chunk
                if byte & 0x80 >> bit and offset < self.size:
                    yield offset, min(self.chunk, self.size - offset)

    def key(self, key: bytes, number: int) -> bytes:
        """Name a chunk."""
        return b"%b:%b:%d" % (key, self.version, number)


def _count(size: int, chunk: int) -> int:
    return -(-size // chunk)


class RedisSource:
    """An image in Redis or Valkey.

    ::

        source = await RedisSource.open("redis://cache1:6379/0/images/vm1")
    """

    #: It is no layer: a chunk has zeros where the image had holes, and holes where it had zeros.
    holes_known: Final = False

    def __init__(self, place: Place, commands: Commands, layout: _Layout | int) -> None:
        """Hold what ``open`` has found; that is the way in."""
        self._place = place
        self._commands = commands
        self._layout = layout if isinstance(layout, _Layout) else None
        self._size = layout.size if isinstance(layout, _Layout) else layout
        self._extents = Extents(
            self._layout.extents() if self._layout else [(0, self._size)] if self._size else []
        )
        self._reads = ReadsUnderWay(f"the source over {place.shown}")
        self._gone: str | None = None

    @classmethod
    async def open(cls, url: str) -> Self:
        """Find out how the image lies there.

        Args:
            url: ``redis://[USER:PASSWORD@]HOST[:PORT]/DB/KEY``; ``redis+cluster://`` with any of
                the cluster's nodes, ``HOST:PORT,HOST:PORT/KEY``; or
                ``redis+unix://[USER:PASSWORD@]/PATH/OF/SOCKET?key=KEY&db=DB``.  ``rediss`` is
                TLS, with the files ``ca``, ``cert`` and ``cert_key`` in the query; ``valkey`` and
                ``valkeys`` are the same.  ``timeout``: seconds that a read may take, retries and
                reconnects included (10).

        Raises:
            SourceError: The URL makes no sense, the server does not answer, or there is no
                image.
        """
        place = Place.parse(url)
        commands = Commands(place)
        try:
            return cls(place, commands, await _find(place, commands))
        except BaseException:
            await commands.aclose()
            raise

    @property
    def size(self) -> int:
        """Length of the image, in bytes."""
        return self._size

    @property
    def identity(self) -> str:
        """The stored version; "" of a string value, which has none."""
        return f"redis:{self._layout.version.decode()}" if self._layout else ""

    def extents(self) -> Iterator[tuple[int, int]]:
        """Give the chunks that are not all zeros; a string value is one extent."""
        return iter(self._extents)

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """Give zeros that are known to be zeros; nothing else is at hand."""
        self._check(offset, length)
        return None if self._extents.holds(offset, length) else bytes(length)

    async def read(self, offset: int, length: int) -> Buffer:
        """Ask for all parts at once.

        Raises:
            SourceError: No answer in time, or the image is not there as it was.
            ClosedError: The source is closed.

        Cancellation: the answers are thrown away.
        """
        self._check(offset, length)
        with self._reads:
            if self._layout is None:
                return await self._read_value(offset, length)
            return await self._read_chunks(self._layout, offset, length)

    async def aclose(self) -> None:
        """Let reads in flight end, then close the connections.

        Cancellation: call again.
        """
        await self._reads.end()
        await self._commands.aclose()

    def _check(self, offset: int, length: int) -> None:
        self._reads.check()
        check_read(offset, length, self._size)
        if self._gone is not None:
            raise SourceError(self._gone)

    def _fail(self, why: str) -> SourceError:
        self._gone = self._gone or f"{self._place.shown} was changed while it was served: {why}"
        return SourceError(self._gone)

    async def _read_value(self, offset: int, length: int) -> Buffer:
        key = self._place.key
        starts = range(offset, offset + length, _PIECE)
        lengths = [min(_PIECE, offset + length - at) for at in starts]
        asked: list[tuple[Command, int]] = [
            (("GETRANGE", key, at, at + each - 1), each)
            for at, each in zip(starts, lengths, strict=True)
        ]
        # Last, so that it is asked after the bytes were read.
        *parts, size = await self._commands.send([*asked, (("STRLEN", key), 0)])
        if size != self._size or [len(part) for part in parts] != lengths:
            raise self._fail(f"the value was replaced: it had {self._size} bytes, now {size}")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _read_chunks(self, layout: _Layout, offset: int, length: int) -> Buffer:
        key, chunk = self._place.key, layout.chunk
        asked: list[tuple[Command, int]] = []
        lengths: list[int] = []
        parts: list[bytes | None] = []  # None: comes from the server
        end = offset + length
        while offset < end:
            number, first = divmod(offset, chunk)
            size = min(chunk - first, end - offset)
            offset += size
            if not layout.holds(number):
                parts.append(bytes(size))
                continue
            parts.append(None)
            lengths.append(size)
            name = layout.key(key, number)
            if size == chunk:
                asked.append((("GET", name), size))
            else:
                asked.append((("GETRANGE", name, first, first + size - 1), size))
        got = await self._commands.send(asked) if asked else []
        for each, size in zip(got, lengths, strict=True):
            if each is None or len(each) != size:
                raise self._fail(
                    f"chunks of version {layout.version.decode()} are gone:"
                    " replaced, evicted, expired or deleted"
                )
        if len(parts) == len(got) == 1:  # as for nearly every fault
            only: bytes = got[0]
            return only
        coming = iter(got)
        return b"".join(next(coming) if part is None else part for part in parts)


async def _find(place: Place, commands: Commands) -> _Layout | int:
    """Find out how an image lies at its key."""
    kind = await commands.first("TYPE", place.key)
    if kind in {b"string", "string"}:
        (size,) = await commands.send([(("STRLEN", place.key), 0)])
        return int(size)
    if kind in {b"hash", "hash"}:
        return await _read_layout(place, commands)
    what = "nothing" if kind in {b"none", "none"} else f"a {kind!r}"
    raise SourceError(f"{place.shown}: there is {what}, no image")


async def _read_layout(place: Place, commands: Commands) -> _Layout:
    names = (b"aiouffd", b"size", b"chunk", b"version", b"present")
    (values,) = await commands.send([(("HMGET", place.key, *names), 0)])
    try:
        found = zip(names, values, strict=True)
        return _Layout.parse({name: value for name, value in found if value is not None})
    except ValueError as error:
        raise SourceError(f"{place.shown}: {error}") from error


async def open_url(url: str) -> RedisSource:
    """Open an image; see ``RedisSource.open``."""
    return await RedisSource.open(url)


async def store_image(
    source: Source,
    url: str,
    *,
    chunk: int = CHUNK,
    grace: float = 3600.0,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Store an image in chunks; who reads the one that was there before reads it on.

    Nobody sees the new image before all of it is there.  Chunks that are all zeros are left out,
    so it must be a whole image: in a layer, zeros hide what lies below.

    Args:
        source: Where the bytes come from.
        url: Where they go, as for ``RedisSource.open``.
        chunk: Bytes per chunk: a power of two from 4 KiB to 64 MiB.
        grace: Seconds that the chunks of the image that was there before stay.
        progress: Told (bytes looked at, bytes in all) now and then.

    Returns:
        The new image's identity.

    Raises:
        SourceError: The bytes cannot be had, or the server does not take them (its memory may
            be full).  What was written is deleted then, as far as the server lets us.
        ValueError: The chunk is none.

    Cancellation: what was written is deleted.
    """
    if not _CHUNKS[0] <= chunk <= _CHUNKS[1] or chunk & chunk - 1:
        raise ValueError(f"a chunk is a power of two from 4 KiB to 64 MiB, not {chunk}")
    place = Place.parse(url)
    commands = Commands(place)
    layout = _Layout(source.size, chunk, secrets.token_hex(8).encode(), b"")
    present = bytearray((_count(source.size, chunk) + 7) // 8)
    try:
        if await commands.first("TYPE", place.key) in {b"string", "string"}:
            raise SourceError(f"{place.shown}: a string value is there; delete it first")
        try:
            await _store_chunks(source, place, commands, layout, present, progress)
            old = await _old_layout(place, commands)
            fields: Command = (b"aiouffd", _LAYOUT, b"size", layout.size, b"chunk", layout.chunk)
            fields += (b"version", layout.version, b"present", bytes(present))
            await commands.send([(("HSET", place.key, *fields), len(present))])
        except BaseException:
            with contextlib.suppress(SourceError):
                await _expire(place, commands, layout._replace(present=bytes(present)), 0)
            raise
        if old is not None:
            await _expire(place, commands, old, grace)
    finally:
        await commands.aclose()
    return f"redis:{layout.version.decode()}"


async def _store_chunks(
    source: Source,
    place: Place,
    commands: Commands,
    layout: _Layout,
    present: bytearray,
    progress: Callable[[int, int], None] | None,
) -> None:
    size, chunk = layout.size, layout.chunk
    waiting: list[tuple[Command, int]] = []
    last = -1
    for offset, length in source.extents():
        for number in range(max(offset // chunk, last + 1), _count(offset + length, chunk)):
            last = number
            start = number * chunk
            data: Buffer | None = source.read_nowait(start, min(chunk, size - start))
            if data is None:
                data = await source.read(start, min(chunk, size - start))
            content = bytes(memoryview(data))
            if not content.strip(b"\0"):
                continue
            present[number >> 3] |= 0x80 >> (number & 7)
            waiting.append((("SET", layout.key(place.key, number), content), len(content)))
            if len(waiting) * chunk >= _STORED_AT_ONCE:
                await commands.send(waiting)
                waiting.clear()
                if progress is not None:
                    progress(start + len(content), size)
    if waiting:
        await commands.send(waiting)
    if progress is not None:
        progress(size, size)


async def _old_layout(place: Place, commands: Commands) -> _Layout | None:
    """Give the image that is there now; None if there is none that we know."""
    try:
        return await _read_layout(place, commands)
    except SourceError:
        return None


async def _expire(place: Place, commands: Commands, layout: _Layout, seconds: float) -> None:
    """Delete an image's chunks, at once or in a while."""
    waiting: list[tuple[Command, int]] = []
    for offset, _ in layout.extents():
        key = layout.key(place.key, offset // layout.chunk)
        waiting.append((("EXPIRE", key, int(seconds)) if seconds > 0 else ("UNLINK", key), 0))
        if len(waiting) == 4096:
            await commands.send(waiting)
            waiting.clear()
    if waiting:
        await commands.send(waiting)
