"""Copies and differences through both writers, against plain bytes: contents, holes, endings."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiouffd.errors import NotSupported, SourceError
from aiouffd.image import PAGE, ImageWriter, copying, packed
from aiouffd.image.copying import copy, diff, sha256
from aiouffd.image.packed import PackedWriter
from aiouffd.image.sparse import SparseWriter
from aiouffd.image.survey import survey
from aiouffd.sources import Source
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.compressed import CompressedSource
from aiouffd.sources.file import FileSource
from aiouffd.sources.layered import LayeredSource
from aiouffd.testing.sources import SourceContract, as_bytes
from tests.seekable import zstd

#: A page each: a hole, zeros that are data, some bytes, other bytes.
CONTENTS = {"-": b"", "0": bytes(PAGE), "a": b"a" * PAGE, "b": bytes(range(256)) * 16}


def write_image(path: Path, pages: str, short: int = 0) -> bytes:
    """Write a sparse file of such pages, the last of them some bytes short."""
    size = max(len(pages) * PAGE - short, 0)
    with open(path, "wb") as file:
        file.truncate(size)
        for number, page in enumerate(pages):
            file.seek(number * PAGE)
            file.write(CONTENTS[page])
        file.truncate(size)
    return path.read_bytes()


@contextlib.asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Source]:
    """Open an image, compressed or not."""
    source: Source = FileSource(path)
    if path.suffix == ".zst":
        source = await CompressedSource.open(source)
    try:
        yield source
    finally:
        await source.aclose()


def writer_for(path: Path, size: int, **settings: int) -> ImageWriter:
    """Choose a writer by the name."""
    if path.suffix == ".zst":
        return PackedWriter(path, size, level=1, threads=2, **settings)
    return SparseWriter(path, size)


async def copied(source: Path, target: Path, *, dig_holes: bool = False) -> None:
    """Copy an image."""
    async with opened(source) as image, writer_for(target, image.size) as writer:
        await copy(image, writer, dig_holes=dig_holes)


async def seen(path: Path) -> tuple[bytes, list[tuple[int, int]]]:
    """Read all of an image, and its extents."""
    async with opened(path) as source:
        data = as_bytes(await source.read(0, source.size)) if source.size else b""
        return data, list(source.extents())


PAGES = st.text("-0ab", max_size=40)
SHORT = st.sampled_from([0, 1, 100, PAGE - 1])


class TestPacked(SourceContract):
    """What was packed from a file is a source like any other."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Pack the bytes, with page-sized frames."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "image.zst")
            source = BufferSource(data)
            async with PackedWriter(path, len(data), frame_bytes=PAGE) as writer:
                await copy(source, writer, dig_holes=True)
            async with opened(path) as image:
                yield image


@given(PAGES, SHORT, st.booleans())
@settings(max_examples=40)
def test_packed_and_unpacked_is_the_same(pages: str, short: int, dig: bool) -> None:
    """Bytes and holes come back, whatever the size; with dug holes, no page of zeros is left."""

    async def go(folder: Path) -> None:
        original, archive, back = folder / "image", folder / "image.zst", folder / "back"
        data = write_image(original, pages, short)
        await copied(original, archive, dig_holes=dig)
        await copied(archive, back)
        expected = (data, (await seen(original))[1])
        if dig:
            held = [
                (number * PAGE, min(PAGE, len(data) - number * PAGE))
                for number, page in enumerate(pages)
                if page in "ab"
                and number * PAGE < len(data)
                and data[number * PAGE :][:PAGE].strip(b"\0")
            ]
            from aiouffd.sources import Extents

            expected = (data, list(Extents(held)))
        assert await seen(archive) == expected
        assert await seen(back) == expected
        if data:
            assert zstd.decompress(archive.read_bytes()) == data

    with tempfile.TemporaryDirectory() as name:
        asyncio.run(go(Path(name)))


@given(PAGES, SHORT, PAGES, SHORT, st.sampled_from(["layer", "layer.zst"]))
@settings(max_examples=60)
def test_a_base_under_a_difference_is_the_new_image(
    old: str, cut: int, new: str, short: int, name: str
) -> None:
    """Layered over the base, the difference gives the new image; and is no larger than need be."""

    async def go(folder: Path) -> None:
        base, image, layer = folder / "base", folder / "image", folder / name
        before = write_image(base, old, cut)
        after = write_image(image, new, short)
        async with opened(base) as below, opened(image) as above:
            with contextlib.ExitStack() as refused:
                if above.size < below.size:
                    refused.enter_context(pytest.raises(SourceError, match="shorter"))
                async with writer_for(layer, above.size) as writer:
                    await diff(below, above, writer)
            if above.size < below.size:
                assert sorted(os.listdir(folder)) == ["base", "image"]
                return
        _, extents = await seen(layer)
        before = before.ljust(len(after), b"\0")
        differ = {
            at for at in range(0, len(after), PAGE) if after[at:][:PAGE] != before[at:][:PAGE]
        }
        held = {at for offset, length in extents for at in range(offset, offset + length, PAGE)}
        assert held == differ
        async with opened(base) as below, opened(layer) as over:
            layered = LayeredSource(below, over)
            assert layered.size == len(after)
            assert not after or as_bytes(await layered.read(0, len(after))) == after

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(go(Path(folder)))


async def test_much_data_goes_through_several_batches(tmp_path: Path) -> None:
    """Megabytes, in frames that no piece ends with, and long holes between them."""
    choose = random.Random(1)
    path, archive = tmp_path / "image", tmp_path / "image.zst"
    with open(path, "wb") as file:
        file.truncate((40 << 20) + 123)
        for _ in range(30):
            file.seek(choose.randrange(0, 40 << 20) & -PAGE)
            file.write(choose.randbytes(choose.randint(1, 60) * PAGE))
    async with opened(path) as source:
        async with PackedWriter(archive, source.size, frame_bytes=10_000, threads=2) as writer:
            await copy(source, writer)
        digest = await sha256(source)
    assert await seen(archive) == await seen(path)
    assert digest == hashlib.sha256(path.read_bytes()).digest()
    async with opened(archive) as image:
        assert isinstance(image, CompressedSource)
        assert image.layout.note is not None
        assert image.layout.note.sha256 == digest
        assert max(image.table.starts) == image.size
        holes = [
            end - start
            for start, end in zip(image.table.starts, image.table.starts[1:], strict=False)
            if end - start > 10_000
        ]
        assert holes
        assert max(holes) <= 1 << 20
    assert zstd.decompress(archive.read_bytes()) == path.read_bytes()


async def test_watching_ends_at_the_end(tmp_path: Path) -> None:
    """Whoever watches sees numbers that rise to the size."""
    path = tmp_path / "image"
    data = write_image(path, "-ab0" * 600 + "-")
    told: list[tuple[int, int]] = []
    async with opened(path) as source:
        async with SparseWriter(tmp_path / "copy", source.size) as writer:
            await copy(source, writer, watch=lambda done, total: told.append((done, total)))
        assert told == sorted(told)
        assert told[-1] == (len(data), len(data))
        del told[:]
        await sha256(source, watch=lambda done, total: told.append((done, total)))
        assert told[-1] == (len(data), len(data))


# --- how a new file comes to stand, and how not ----------------------------------------


@pytest.mark.parametrize("name", ["new", "new.zst"])
@pytest.mark.parametrize("before", [None, b"before"])
async def test_what_does_not_finish_leaves_nothing(
    name: str, before: bytes | None, tmp_path: Path
) -> None:
    """A source that fails, and a cancellation, leave what was there before and nothing else."""
    target = tmp_path / name
    if before is not None:
        target.write_bytes(before)

    class Failing(BufferSource):
        def read_nowait(self, offset: int, length: int) -> memoryview:
            if offset >= copying.PIECE_BYTES:
                raise SourceError("no more")
            return memoryview(bytes(length))

    class Stuck(BufferSource):
        async def read(self, offset: int, length: int) -> memoryview:
            stuck.set()
            await asyncio.Event().wait()
            raise AssertionError

        def read_nowait(self, offset: int, length: int) -> None:  # type: ignore[override]
            return None

    stuck = asyncio.Event()
    data = bytes(8 << 20)
    with pytest.raises(SourceError, match="no more"):
        async with writer_for(target, len(data)) as writer:
            await copy(Failing(data), writer)

    async def be_stuck() -> None:
        async with writer_for(target, len(data)) as writer:
            await copy(Stuck(data), writer)

    task = asyncio.ensure_future(be_stuck())
    await stuck.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert os.listdir(tmp_path) == ([] if before is None else [name])
    assert before is None or target.read_bytes() == before


@pytest.mark.parametrize("name", ["new", "new.zst"])
def test_a_full_disk_leaves_nothing(name: str, tmp_path: Path) -> None:
    """A write that fails is an error with the file's name; no half file stays."""
    program = f"""
import asyncio, resource
from pathlib import Path
from aiouffd.image.copying import copy
from aiouffd.image.packed import PackedWriter
from aiouffd.image.sparse import SparseWriter
from aiouffd.sources.buffer import BufferSource
import random

async def go():
    data = random.Random(1).randbytes(4 << 20)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
    kind = PackedWriter if {name!r}.endswith(".zst") else SparseWriter
    async with kind({str(tmp_path / name)!r}, len(data)) as writer:
        await copy(BufferSource(data), writer)

try: asyncio.run(go())
except OSError as error: print(error.filename, error.strerror)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    assert done.stdout == f"{tmp_path / name} File too large\n"
    assert os.listdir(tmp_path) == []


async def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    """A device or a folder is refused; a symbolic link leads to the file that is replaced."""
    (tmp_path / "folder").mkdir()
    for target in (Path("/dev/null"), tmp_path / "folder"):
        with pytest.raises(OSError, match="no regular file"):
            SparseWriter(target, 1)
    with pytest.raises(FileNotFoundError) as raised:
        SparseWriter(tmp_path / "missing" / "file", 1)
    assert raised.value.filename == str(tmp_path / "missing" / "file")
    (tmp_path / "link").symlink_to("real")
    async with SparseWriter(tmp_path / "link", 5) as writer:
        await writer.put(0, b"bytes")
        await writer.finish()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"bytes"


async def test_holes_that_the_file_system_changed_are_told(tmp_path: Path) -> None:
    """Data that does not fill the units of the file system cannot have its holes kept."""
    async with SparseWriter(tmp_path / "exact", 8 * PAGE) as writer:
        await writer.put(PAGE, bytes(PAGE))
        await writer.finish()
    assert writer.exact
    async with SparseWriter(tmp_path / "inexact", 8 * PAGE) as writer:
        await writer.put(PAGE + 1, b"x")
        await writer.finish()
    assert not writer.exact
    with pytest.raises(NotSupported, match="no layer"):
        async with SparseWriter(tmp_path / "layer", 8 * PAGE, must_be_exact=True) as writer:
            await writer.put(PAGE + 1, b"x")
            await writer.finish()
    assert sorted(os.listdir(tmp_path)) == ["exact", "inexact"]


def test_frames_that_cannot_be_read_again_are_not_begun(tmp_path: Path) -> None:
    """Too many or too large frames, or no such level, are refused before anything is written."""
    with pytest.raises(ValueError, match="levels are"):
        PackedWriter(tmp_path / "x", 1, level=99)
    with pytest.raises(ValueError, match="-1 threads"):
        PackedWriter(tmp_path / "x", 1, threads=-1)
    for size, frame in ((1, 0), (1, 65 << 20), (1 << 40, PAGE)):
        with pytest.raises(ValueError, match="frame"):
            PackedWriter(tmp_path / "x", size, frame_bytes=frame)
    assert os.listdir(tmp_path) == []


async def test_a_survey_says_what_an_image_holds(tmp_path: Path) -> None:
    """Sizes, extents, zeros, frames; of a file, of a packed one, of any other source."""
    path, archive = tmp_path / "image", tmp_path / "image.zst"
    data = write_image(path, "a0-b" * 20, 10)
    await copied(path, archive)
    async with opened(path) as source:
        plain = await survey(source, scan=True)
    async with opened(archive) as source:
        tight = await survey(source, scan=True)
    assert (plain.kind, tight.kind) == ("file", "compressed")
    for one in (plain, tight):
        assert one.size == len(data)
        assert one.extents == 21
        assert one.data_bytes == 60 * PAGE - 10
        assert one.zero_bytes == 40 * PAGE
        assert one.identity
    assert plain.stored_bytes == path.stat().st_blocks * 512
    assert plain.frames is None
    assert tight.stored_bytes == archive.stat().st_size < PAGE
    assert (tight.frames, tight.frame_bytes, tight.checksums) == (10, packed.FRAME_BYTES, True)
    assert tight.sha256 == hashlib.sha256(data).hexdigest()
    other = await survey(BufferSource(data))
    assert (other.kind, other.stored_bytes, other.zero_bytes) == ("BufferSource", None, None)
