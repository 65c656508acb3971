"""CompressedSource: the contract in three shapes, other tools' files, corruption, flights."""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aiouffd.errors import ClosedError, SourceError
from aiouffd.sources import ReadsInto, Source, identity_of
from aiouffd.sources import compressed as module
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.compressed import CompressedSource, is_compressed
from aiouffd.sources.seek_table import build
from aiouffd.testing.sources import PAGE, SourceContract, as_bytes, image
from tests.seekable import FRAME, seekable, zstd

if TYPE_CHECKING:
    from typing_extensions import Buffer


ROOT = Path(__file__).resolve().parents[2]


class _Far(BufferSource):
    """A buffer of which nothing is at hand; reads wait until they are let go."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reads: list[tuple[int, int]] = []
        self.go = asyncio.Event()
        self.go.set()

    def read_nowait(self, offset: int, length: int) -> Buffer | None:  # type: ignore[override]
        super().read_nowait(offset, length)  # refuse what is outside, or after closing
        return None

    async def read(self, offset: int, length: int) -> Buffer:
        self.reads.append((offset, length))
        await self.go.wait()
        return super().read_nowait(offset, length)


@contextlib.asynccontextmanager
async def opened(source: Source, **settings: int) -> AsyncIterator[CompressedSource]:
    """Open an image and close it again."""
    compressed = await CompressedSource.open(source, **settings)
    try:
        yield compressed
    finally:
        await compressed.aclose()


class TestAtHand(SourceContract):
    """The compressed bytes are in memory: small reads are decompressed at once."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Pack the bytes in frames of other lengths than pages."""
        async with opened(BufferSource(seekable(data, frame=3 * PAGE + 5))) as source:
            yield source


class TestFarAway(SourceContract):
    """The compressed bytes must be waited for; there is a note, too."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Pack the bytes with their extents."""
        extents = [(0, len(data))] if data else []
        async with opened(_Far(seekable(data, extents=extents)), cache_bytes=1) as source:
            yield source


class TestInThreads(SourceContract):
    """Each frame is too large to be decompressed on the loop."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Pack the bytes, and set the bound at nothing."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "INLINE_BYTES", 0)
            patch.setattr(module, "RUN_BYTES", 5 * PAGE)
            async with opened(BufferSource(seekable(data, frame=PAGE))) as source:
                yield source


def mixed(size: int, seed: int) -> bytes:
    """Make bytes that compress, some of them well."""
    choose = random.Random(seed)
    words = [choose.randbytes(choose.randint(1, 40)) for _ in range(200)]
    parts = []
    while size > 0:
        part = choose.choice(words) * choose.randint(1, 100)
        parts.append(part[:size])
        size -= len(part)
    return b"".join(parts)


# --- extents, identity, recognition ----------------------------------------------------


async def test_holes_are_kept_and_read_without_the_source_below() -> None:
    """Extents are those of the note; a read in a hole reads nothing."""
    data = bytearray(4 * FRAME)
    data[PAGE : 2 * PAGE] = image(PAGE)
    extents = [(PAGE, PAGE), (2 * FRAME, PAGE)]  # the second one is zeros, and data
    below = _Far(seekable(bytes(data), extents=extents))
    async with opened(below) as source:
        below.reads.clear()
        assert list(source.extents()) == extents
        assert source.read_nowait(0, PAGE) == bytes(PAGE)
        assert await source.read(3 * FRAME, FRAME) == bytes(FRAME)
        assert below.reads == []
        assert as_bytes(await source.read(0, len(data))) == data
        assert sum(length for _, length in below.reads) < FRAME // 2  # only two frames of four


async def test_identity_is_that_of_the_content_and_its_extents() -> None:
    """Copies are the same image; other bytes, or other extents, are another."""
    data = mixed(3 * FRAME, 1)
    other = data[:-1] + bytes([data[-1] ^ 1])
    whole = [(0, len(data))]
    files = [
        seekable(data),
        seekable(other),
        seekable(data, extents=whole),
        seekable(data, extents=[(0, FRAME), (2 * FRAME, FRAME)]),
        seekable(data, checksums=False, extents=whole),
        seekable(other, checksums=False, extents=whole),
    ]
    names = []
    for file in files * 2:
        async with opened(BufferSource(file)) as source:
            names.append(identity_of(source))
    assert names[: len(files)] == names[len(files) :]
    assert len(set(names)) == len(files)
    assert all(name.startswith("zstd:") for name in names)


async def test_without_checksums_the_file_below_is_who_the_image_is() -> None:
    """A table of sizes alone says nothing about the bytes."""

    class Named(BufferSource):
        identity = "inode 7"

    class Nameless(BufferSource):
        identity = ""

    file = seekable(mixed(FRAME, 1), checksums=False)
    async with opened(Nameless(file)) as source:
        assert source.identity == ""
    async with opened(Named(file)) as source:
        assert source.identity


async def test_an_image_is_known_by_its_tail() -> None:
    """Plain bytes, short files and nothing at all are no images."""
    assert await is_compressed(BufferSource(seekable(b"x")))
    assert await is_compressed(BufferSource(seekable(b"")))
    for other in (b"", b"x", image(PAGE), zstd.compress(b"x")):
        assert not await is_compressed(BufferSource(other))
        with pytest.raises(SourceError, match="no seekable zstd"):
            await CompressedSource.open(BufferSource(other))


async def test_a_long_table_and_a_long_note_are_read_whole() -> None:
    """Thousands of frames and scattered extents, more than the first look at the tail brings."""
    data = b"".join(image(5, seed=number) + bytes(27) for number in range(4500))
    extents = [(at, 5) for at in range(0, len(data), 32)]
    file = seekable(data, frame=16, extents=extents)
    async with opened(_Far(file)) as source:
        assert len(source.table) == 9001
        assert list(source.extents()) == extents
        assert as_bytes(await source.read(100, 5000)) == data[100:5100]


# --- other tools -----------------------------------------------------------------------


@pytest.mark.parametrize("frame", [1000, FRAME, 1 << 20])
async def test_files_of_pyzstd_are_read(frame: int) -> None:
    """What its SeekableZstdFile writes is served as one extent."""
    pyzstd = pytest.importorskip("pyzstd", reason="pip install pyzstd")
    data = mixed(300_000, frame)
    file = io.BytesIO()
    with pyzstd.SeekableZstdFile(file, "w", max_frame_content_size=frame) as writer:
        writer.write(data)
    async with opened(BufferSource(file.getvalue())) as source:
        assert source.size == len(data)
        assert list(source.extents()) == [(0, len(data))]
        assert as_bytes(await source.read(0, len(data))) == data
        assert as_bytes(await source.read(123_456, PAGE)) == data[123_456:][:PAGE]


@pytest.mark.parametrize("noted", [True, False])
def test_our_files_are_read_by_pyzstd_and_zstd(noted: bool, tmp_path: Path) -> None:
    """Seeking in one, streaming the whole through the library and through the command."""
    data = mixed(300_000, 5)
    file = seekable(data, extents=[(0, len(data))] if noted else None)
    assert zstd.decompress(file) == data
    if shutil.which("zstd"):
        path = tmp_path / "image.zst"
        path.write_bytes(file)
        done = subprocess.run(["zstd", "-dc", path], capture_output=True, check=True, timeout=60)
        assert done.stdout == data
    pyzstd = pytest.importorskip("pyzstd", reason="pip install pyzstd")
    with pyzstd.SeekableZstdFile(io.BytesIO(file)) as reader:
        assert reader.seek(123_456) == 123_456
        assert reader.read(PAGE) == data[123_456:][:PAGE]
        reader.seek(0)
        assert reader.read() == data


async def test_frames_without_own_checksum_are_checked_by_the_table() -> None:
    """A table with checksums over frames without: a wrong byte is an error."""
    data = mixed(FRAME, 1)
    ours = seekable(data)
    async with opened(BufferSource(ours)) as source:
        assert source.table.checksums is not None
        checksum = source.table.checksums[0]
    bare = zstd.compress(data)
    for right in (True, False):
        table = build([len(bare)], [len(data)], [checksum if right else checksum ^ 1])
        async with opened(BufferSource(bare + table)) as source:
            if right:
                assert await source.read(0, FRAME) == data
            else:
                with pytest.raises(SourceError, match="frame 0 of the image is corrupt"):
                    await source.read(0, FRAME)


async def test_skippable_frames_between_others_are_passed_by() -> None:
    """Frames that hold nothing may stand anywhere."""
    parts = [zstd.compress(b"a" * 100), b"\x50\x2a\x4d\x18\x03\0\0\0abc", zstd.compress(b"b" * 100)]
    file = b"".join(parts) + build(list(map(len, parts)), [100, 0, 100], None)
    for source in (BufferSource(file), _Far(file)):
        async with opened(source) as image:
            assert as_bytes(await image.read(50, 100)) == b"a" * 50 + b"b" * 50
            assert as_bytes(await image.read(100, 1)) == b"b"


# --- corruption ------------------------------------------------------------------------


@pytest.mark.parametrize("far", [True, False])
@pytest.mark.parametrize("length", [PAGE, 8 * FRAME])
async def test_a_corrupt_frame_is_an_error_for_those_who_want_it(far: bool, length: int) -> None:
    """The error names the frame, and its neighbours are served, from the same run too."""
    data = image(8 * FRAME)
    file = bytearray(seekable(data))
    file[3 * FRAME + 100 + 3 * 20] ^= 0xFF  # within frame 3: random bytes do not compress
    source = _Far(bytes(file)) if far else BufferSource(bytes(file))
    async with opened(source) as compressed:
        for number in (2, 4):
            read = asyncio.ensure_future(compressed.read(number * FRAME, PAGE))
            with pytest.raises(SourceError, match=r"frame 3 of the image is corrupt \(its bytes"):
                if length == PAGE:
                    await compressed.read(3 * FRAME, PAGE)
                else:
                    await compressed.read(0, length)
            assert as_bytes(await read) == data[number * FRAME :][:PAGE]
        with pytest.raises(SourceError, match="frame 3"):
            await compressed.read(3 * FRAME, PAGE)


async def test_who_joined_a_run_with_a_corrupt_frame_gets_the_others() -> None:
    """A reader of a good frame is not failed by somebody else's bad one."""
    data = image(8 * FRAME)
    file = bytearray(seekable(data))
    file[3 * FRAME + 200] ^= 0xFF
    below = _Far(bytes(file))
    async with opened(below) as source:
        below.go.clear()
        below.reads.clear()
        large = asyncio.ensure_future(source.read(0, len(data)))
        await asyncio.sleep(0)
        small = asyncio.ensure_future(source.read(FRAME, PAGE))
        await asyncio.sleep(0)
        below.go.set()
        assert as_bytes(await small) == data[FRAME:][:PAGE]
        with pytest.raises(SourceError, match="frame 3"):
            await large
        assert len(below.reads) == 1


async def test_a_frame_of_absurd_length_is_not_read() -> None:
    """A table that gives one small frame the whole file is refused when it is read."""
    file = bytes(100_000) + build([100_000], [10], None)
    below = _Far(file)
    async with opened(below) as source:
        below.reads.clear()
        with pytest.raises(SourceError, match="seek table is wrong"):
            await source.read(0, 1)
        assert below.reads == []


# --- flights and the cache -------------------------------------------------------------


async def test_many_who_want_one_frame_cause_one_read() -> None:
    """Readers of the same frame share a flight; cancelling one harms no other."""
    data = mixed(4 * FRAME, 1)
    below = _Far(seekable(data))
    async with opened(below) as source:
        below.reads.clear()
        below.go.clear()
        reads = [asyncio.ensure_future(source.read(at * PAGE, PAGE)) for at in range(8)]
        await asyncio.sleep(0)
        reads[0].cancel()
        await asyncio.sleep(0)
        below.go.set()
        for number, read in enumerate(reads[1:], start=1):
            assert as_bytes(await read) == data[number * PAGE :][:PAGE]
        assert reads[0].cancelled()
        assert len(below.reads) == 1


async def test_when_all_are_cancelled_the_read_below_is_too() -> None:
    """Nobody waits for what nobody wants, and the next read begins anew."""
    data = mixed(4 * FRAME, 1)
    below = _Far(seekable(data))
    async with opened(below) as source:
        below.reads.clear()
        below.go.clear()
        reads = [asyncio.ensure_future(source.read(0, PAGE)) for _ in range(3)]
        await asyncio.sleep(0)
        for read in reads:
            read.cancel()
        await asyncio.wait(reads)
        again = asyncio.ensure_future(source.read(0, PAGE))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(below.reads) == 2
        below.go.set()
        assert as_bytes(await again) == data[:PAGE]


async def test_pages_of_a_frame_cost_one_decompression(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight faults in a row in one frame decompress it once, and far ones push it out."""
    data = mixed(64 * FRAME, 1)
    done: list[int] = []
    real = CompressedSource._unpack

    def counting(self: CompressedSource, number: int, packed: memoryview) -> bytes | SourceError:
        done.append(number)
        return real(self, number, packed)

    monkeypatch.setattr(CompressedSource, "_unpack", counting)
    async with opened(BufferSource(seekable(data)), cache_bytes=4 * FRAME) as source:
        for at in range(0, 2 * FRAME, PAGE):
            assert source.read_nowait(at, PAGE) == data[at : at + PAGE]
        assert done == [0, 1]
        for number in range(10, 14):
            source.read_nowait(number * FRAME, PAGE)
        assert source._held == 4 * FRAME
        source.read_nowait(0, PAGE)
        assert done == [0, 1, 10, 11, 12, 13, 0]
        await source.read(0, len(data))  # everything at once leaves what is kept
        del done[:]
        source.read_nowait(0, PAGE)
        assert done == []


async def test_much_is_decompressed_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so much is done in the loop's thread."""
    data = mixed(32 * FRAME, 1)
    threads: dict[int, set[bool]] = {}
    real = CompressedSource._unpack
    loop_thread = threading.get_ident()
    length = 0

    def watching(self: CompressedSource, number: int, packed: memoryview) -> bytes | SourceError:
        threads.setdefault(length, set()).add(threading.get_ident() == loop_thread)
        return real(self, number, packed)

    monkeypatch.setattr(CompressedSource, "_unpack", watching)
    async with opened(BufferSource(seekable(data)), cache_bytes=1) as source:
        little = module.INLINE_BYTES
        for offset, length in (
            (0, PAGE),
            (0, little),
            (little, little + FRAME),
            (little, 20 * FRAME),
        ):
            got = await source.read(offset, length)
            assert as_bytes(got) == data[offset : offset + length]
            small = length <= little
            assert threads[length] == {small}
            assert (source.read_nowait(offset, length) is not None) == small


@pytest.mark.parametrize("far", [True, False])
async def test_reading_into_a_buffer_is_reading(far: bool, seed: int) -> None:
    """Any stretch ends in the buffer as it is read: frames kept, holes, runs, edges of frames."""
    data = bytearray(mixed(150 * FRAME, 1))
    data[20 * FRAME : 60 * FRAME] = bytes(40 * FRAME)
    extents = [(0, 20 * FRAME), (60 * FRAME, 90 * FRAME)]
    file = seekable(bytes(data), extents=extents)
    choose = random.Random(seed)
    async with opened(_Far(file) if far else BufferSource(file)) as source:
        assert isinstance(source, ReadsInto)
        stretches = [(0, len(data)), (30 * FRAME, FRAME), (FRAME + 1, 10), (0, FRAME)]
        for _ in range(20):
            at = choose.randrange(len(data))
            stretches.append((at, choose.randint(1, len(data) - at)))
            await source.read(choose.randrange(len(data)), 1)  # some frames are kept
        for at, length in stretches:
            buffer = bytearray(b"x" * (length + 2))
            await source.readinto(at, memoryview(buffer)[1:-1])
            assert buffer == b"x" + data[at : at + length] + b"x"
        with pytest.raises(SourceError, match="outside"):
            await source.readinto(len(data), memoryview(bytearray(1)))
    with pytest.raises(ClosedError):
        await source.readinto(0, memoryview(bytearray(1)))


async def test_reading_a_corrupt_frame_into_a_buffer_is_an_error() -> None:
    """The frame is named; and a close waits for such a read."""
    data = image(8 * FRAME)
    file = bytearray(seekable(data))
    file[3 * FRAME + 200] ^= 0xFF
    below = _Far(bytes(file))
    source = await CompressedSource.open(below)
    with pytest.raises(SourceError, match="frame 3"):
        await source.readinto(0, memoryview(bytearray(len(data))))
    below.go.clear()
    buffer = bytearray(2 * FRAME)
    below.reads.clear()
    read = asyncio.ensure_future(source.readinto(0, memoryview(buffer)))
    while not below.reads:
        await asyncio.sleep(0)
    close = asyncio.ensure_future(source.aclose())
    await asyncio.sleep(0)
    below.go.set()
    await read
    await close
    assert buffer == data[: 2 * FRAME]


async def test_large_answers_stay_as_they_are() -> None:
    """Answers that are kept keep their bytes, however many come after them."""
    data = image(32 * FRAME)
    async with opened(BufferSource(seekable(data))) as source:
        length = module.INLINE_BYTES + FRAME
        kept = [(at, await source.read(at, length)) for at in range(0, 24 * FRAME, FRAME + 1)]
        for at, answer in kept:
            assert as_bytes(answer) == data[at : at + length]


def test_a_child_has_threads_of_its_own() -> None:
    """After a fork, large reads go on in parent and child."""
    program = """
import asyncio, os, sys
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.compressed import CompressedSource
from tests.seekable import seekable
data = os.urandom(1 << 20)
async def read():
    source = await CompressedSource.open(BufferSource(seekable(data)))
    assert bytes(await source.read(0, len(data))) == data
    await source.aclose()
asyncio.run(read())
pid = os.fork()
asyncio.run(read())
if pid:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, check=True, timeout=60
    )


async def test_closing_waits_for_what_is_under_way() -> None:
    """A read that began before the end gets its bytes."""
    data = mixed(4 * FRAME, 1)
    below = _Far(seekable(data))
    source = await CompressedSource.open(below)
    below.go.clear()
    read = asyncio.ensure_future(source.read(0, PAGE))
    await asyncio.sleep(0)
    close = asyncio.ensure_future(source.aclose())
    await asyncio.sleep(0)
    assert not close.done()
    below.go.set()
    assert as_bytes(await read) == data[:PAGE]
    await close


async def test_any_thread_may_ask_what_is_at_hand() -> None:
    """Several threads, one cache: every answer is right."""
    data = mixed(16 * FRAME, 1)
    wrong: list[int] = []
    async with opened(BufferSource(seekable(data)), cache_bytes=3 * FRAME) as source:

        def ask(seed: int) -> None:
            choose = random.Random(seed)
            for _ in range(300):
                at = choose.randrange(len(data) - PAGE)
                if source.read_nowait(at, PAGE) != data[at : at + PAGE]:
                    wrong.append(at)

        await asyncio.gather(*(asyncio.to_thread(ask, seed) for seed in range(4)))
        assert source._held == sum(map(len, source._cached.values())) <= 3 * FRAME
    assert not wrong
