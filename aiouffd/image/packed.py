"""A seekable zstd image, compressed by several threads.

Knows: how an image is cut into frames, and their order.
Must not know: where the data comes from.

Laws of this file:

* Frames are FRAME_BYTES of the image, at multiples of that.  Where a frame holds no data at all,
  a longer one of zeros stands, which costs some forty bytes: other tools find every byte of the
  image, ours never look into it.
* Batches are compressed at once and written in order; so many are under way, and no more.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from array import array
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeAlias

from ..sources import Extents
from ..sources.seek_table import MAX_FRAME_BYTES, MAX_FRAMES, Note, build, build_note
from ..threads import in_thread
from .new_file import NewFile

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ..sources.zstd_frames import FrameCompressor

#: Content of a frame, in bytes.  A fault in a frame of 16, 32, 64 KiB costs 30, 45, 77 us, and
#: the frames are read in order at 500, 690, 820 MiB/s; what they are compressed to is within 1 %.
FRAME_BYTES: Final = 32 << 10
#: zstd's own default.
LEVEL: Final = 3

_BATCH_BYTES: Final = 1 << 20
_HOLE_FRAME_BYTES: Final = 1 << 20  # what another tool decompresses to see one zero of a hole

#: Content of a frame; or how long it is, if there is nothing but zeros in it.
_Content: TypeAlias = "memoryview | int"
#: A compressed frame and the checksum of its content.
_Frame: TypeAlias = tuple[bytes, int]


class PackedWriter:
    """Writes a seekable zstd image."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: int,
        *,
        level: int = LEVEL,
        frame_bytes: int = FRAME_BYTES,
        threads: int = 0,
    ) -> None:
        """Begin an image.

        Args:
            path: Where it will stand.
            size: Length of its content, in bytes.
            level: Of compression; more is smaller, slower to make, and as quick to read.
            frame_bytes: Content of a frame, in bytes.
            threads: How many compress; 0 for as many as there are CPUs.

        Raises:
            ValueError: There would be more frames than can be read again, or larger ones; or
                there is no such level, or number of threads.
            ImportError: The zstd library is missing; the message says how to get it.
            OSError: The file cannot be made.
        """
        from ..sources.zstd_frames import LEVELS, FrameCompressor

        if not LEVELS[0] <= level <= LEVELS[1]:
            raise ValueError(f"levels are {LEVELS[0]} to {LEVELS[1]}, not {level}")
        if not 0 < frame_bytes <= MAX_FRAME_BYTES:
            raise ValueError(f"a frame holds 1 to {MAX_FRAME_BYTES} bytes, not {frame_bytes}")
        if threads < 0:
            raise ValueError(f"{threads} threads cannot compress")
        if size // frame_bytes + 2 > MAX_FRAMES:
            raise ValueError(f"{size} bytes are too many for frames of {frame_bytes}: make larger")
        self._size = size
        self._frame_bytes = frame_bytes
        self._compressor = FrameCompressor
        self._level = level
        self._compressors = threading.local()
        self._zeros: dict[int, _Frame] = {}
        self._extents = Extents([])
        self._at = 0  # the image is cut into contents up to here
        self._open: bytearray | None = None  # the frame at _at, if it has data already
        self._batch: list[_Content] = []
        self._batch_bytes = 0
        self._under_way: deque[tuple[list[_Content], asyncio.Future[list[_Frame]]]] = deque()
        self._digest = hashlib.sha256()
        self._written = 0
        self._columns = (array("I"), array("I"), array("I"))  # of the seek table
        self._file = NewFile(path)
        self._threads = threads or len(os.sched_getaffinity(0))
        self._executor = ThreadPoolExecutor(self._threads, thread_name_prefix="aiouffd-pack")

    # --- cutting ---------------------------------------------------------------------------

    async def put(self, offset: int, data: Buffer) -> None:
        """Add data; wait while too much is under way.

        Cancellation: leave the context then; the image cannot be gone on with.
        """
        view = memoryview(data).cast("B")
        self._extents.add(offset, len(view))
        while view:
            start = offset - offset % self._frame_bytes
            self._close_frame(start)
            length = min(self._frame_bytes, self._size - start)
            take = min(start + length - offset, len(view))
            if take == length:
                self._add(view[:take])
            else:
                if self._open is None:
                    self._open = bytearray(length)
                self._open[offset - start : offset - start + take] = view[:take]
            offset += take
            view = view[take:]
            while len(self._under_way) > self._threads + 1:
                await self._write_next()

    def _close_frame(self, start: int) -> None:
        """Be done with all frames before the one that begins there."""
        if self._open is not None and self._at < start:
            self._add(memoryview(self._open))
            self._open = None
        while self._at < start:
            self._add(min(_HOLE_FRAME_BYTES, start - self._at))

    def _add(self, content: _Content) -> None:
        length = content if isinstance(content, int) else len(content)
        self._at += length
        self._batch.append(content)
        self._batch_bytes += length
        if self._batch_bytes >= _BATCH_BYTES:
            self._submit()

    # --- compressing and writing -----------------------------------------------------------

    def _submit(self) -> None:
        if self._batch:
            batch, self._batch, self._batch_bytes = self._batch, [], 0
            loop = asyncio.get_running_loop()
            future = loop.run_in_executor(self._executor, self._compress, batch)
            self._under_way.append((batch, future))

    def _compress(self, batch: list[_Content]) -> list[_Frame]:
        try:
            compressor: FrameCompressor = self._compressors.of_thread
        except AttributeError:
            compressor = self._compressors.of_thread = self._compressor(self._level)
        frames: list[_Frame] = []
        for content in batch:
            if not isinstance(content, int):
                frames.append(compressor.compress(content))
                continue
            if content not in self._zeros:
                self._zeros[content] = compressor.compress(bytes(content))
            frames.append(self._zeros[content])
        return frames

    async def _write_next(self) -> None:
        batch, future = self._under_way.popleft()
        await in_thread(self._write, batch, await future)

    def _write(self, batch: list[_Content], frames: list[_Frame]) -> None:
        self._written = self._file.write(self._written, [b"".join(frame for frame, _ in frames)])
        for content, (frame, checksum) in zip(batch, frames, strict=True):
            data = bytes(content) if isinstance(content, int) else content
            self._digest.update(data)
            self._list(frame, len(data), checksum)

    def _list(self, frame: bytes, length: int, checksum: int) -> None:
        for column, value in zip(self._columns, (len(frame), length, checksum), strict=True):
            column.append(value)

    async def finish(self) -> None:
        """Write the end of the image, bring it to the disk and give it its name."""
        self._close_frame(self._size)
        self._submit()
        while self._under_way:
            await self._write_next()
        await in_thread(self._finish)

    def _finish(self) -> None:
        note = build_note(Note(self._digest.digest(), self._size, self._extents))
        self._list(note, 0, 0)
        self._file.write(self._written, [note, build(*self._columns)])
        self._file.commit()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for _, future in self._under_way:
            future.cancel()
        self._executor.shutdown(wait=True, cancel_futures=True)  # some ms: one batch per thread
        self._file.discard()
