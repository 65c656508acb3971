"""TaskSource: the lazily servable memory of a task, out of files and from a reader of pages."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.errors import ClosedError, SourceError
from aiouffd.protocols.criu.images import Pagemap, PagemapEntry, Vma
from aiouffd.protocols.criu.task_memory import Level, TaskMemory
from aiouffd.protocols.criu.task_source import READ_THROUGH, TaskSource
from aiouffd.sources import ReadsInto, ReadsIntoNowait, Source, identity_of
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.file import FileSource
from aiouffd.testing.sources import PAGE, SourceContract, as_bytes, image
from tests.protocols.criu.checkpoints import anonymous, of_file
from tests.sources.slow import SlowSource

LIVE, STORED, EAGER = 2, 6, 4
BASE = 0x7F00_0000_0000


class Reader:
    """A page server that has the memory of one task: pages by their addresses."""

    def __init__(self, pages: dict[int, bytes]) -> None:
        self.pages = pages
        self.asked: list[tuple[int, int, int]] = []

    async def read_pages(self, pid: int, address: int, pages: int) -> bytes:
        """Give them, after a turn of the loop."""
        self.asked.append((pid, address, pages))
        await asyncio.sleep(0)
        return b"".join(self.pages[address + PAGE * page] for page in range(pages))


class ReaderInto(Reader):
    """One that puts pages where they belong, too."""

    async def read_pages_into(self, pid: int, address: int, buffer: memoryview) -> None:
        """Put them there, after a turn of the loop."""
        buffer[:] = await self.read_pages(pid, address, len(buffer) // PAGE)


def memory_of(data: bytes, *, live: bool) -> tuple[TaskMemory, list[bytes], Reader]:
    """Cut bytes into mappings, two checkpoints and a page server, by turns.

    Every fourth page begins a new mapping; between mappings lie pages that are not lazy, which
    are in the file as well.  The last mapping ends where the data does, even within a page.
    """
    vmas: list[Vma] = []
    own, parent = bytearray(), bytearray()
    entries, parents = [], []
    served: dict[int, bytes] = {}
    address = BASE
    for number, at in enumerate(range(0, len(data), PAGE)):
        page = data[at : at + PAGE]
        if number % 4 == 0:
            vmas.append(of_file(address, 1))
            entries.append(PagemapEntry(address, 1, EAGER))
            own += b"\xee" * PAGE
            vmas.append(Vma(address + PAGE, address + PAGE, 0, 0, 3, 0x22, 0x201))
            address += PAGE
        vmas[-1] = Vma(vmas[-1].start, address + len(page), 0, 0, 3, 0x22, 0x201)
        whole = page + b"\xdd" * (PAGE - len(page))
        if number % 5 == 2:
            entries.append(PagemapEntry(address, 1, 3))
            parents.append(PagemapEntry(address, 1, EAGER))
            parent += whole
        elif live and number % 3 == 0:
            entries.append(PagemapEntry(address, 1, LIVE))
            served[address] = whole
        else:
            entries.append(PagemapEntry(address, 1, STORED))
            own += whole
        address += PAGE
    below = Level("parent/pagemap-7.img", Pagemap(1, tuple(parents)), 1, None)
    level = Level("pagemap-7.img", Pagemap(1, tuple(entries)), 0, below)
    memory = TaskMemory(7, vmas, [level, below], digest="d")
    return memory, [bytes(own), bytes(parent)], Reader(served)


class TestOverMemory(SourceContract):
    """Two files in memory."""

    make: Callable[[bytes], Source] = BufferSource
    live = False

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Cut the bytes into files."""
        memory, files, reader = memory_of(data, live=self.live)
        sources = [type(self).make(file) for file in files]
        source = TaskSource(memory, sources, reader)
        yield source
        await source.aclose()
        for one in sources:
            await one.aclose()


class TestWithAPageServer(TestOverMemory):
    """Two files, and pages that only a reader has."""

    live = True


class TestFromAPageServerAlone(SourceContract):
    """No files at all, though the checkpoint tells of some."""

    reader = Reader

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Give every page to the reader."""
        memory, _, _ = memory_of(data, live=True)
        left = memory.left_to_a_server()
        pages = {
            left.address_of(at): data[at : at + PAGE].ljust(PAGE, b"\xdd")
            for at in range(0, len(data), PAGE)
        }
        reader = self.reader(pages)
        assert left.lazy_bytes == left.live_bytes == memory.lazy_bytes
        source = TaskSource(left, (), reader)
        yield source
        await source.aclose()


class TestFromAPageServerInPlace(TestFromAPageServerAlone):
    """The same, and long reads go where they belong."""

    reader = ReaderInto


@pytest.mark.parametrize("make", [BufferSource, None])
async def test_what_is_at_hand_goes_into_a_buffer(
    tmp_path: Path, make: Callable[[bytes], Source] | None
) -> None:
    """Within a run straight from a file that can do that; else by a copy, zeros included."""
    data = image(9 * PAGE)
    memory, contents, reader = memory_of(data, live=False)
    files: list[Source] = []
    for number, content in enumerate(contents):
        path = tmp_path / str(number)
        path.write_bytes(content)
        files.append(FileSource(path) if make is None else make(content))
    source = TaskSource(memory, files, reader)
    assert isinstance(source, ReadsIntoNowait)
    expected = bytes(await source.read(0, source.size))
    for offset in range(0, source.size, 1000):
        for length in (1, PAGE, 3 * PAGE):
            buffer = bytearray(b"\xee" * min(length, source.size - offset))
            assert source.readinto_nowait(offset, memoryview(buffer))
            assert buffer == expected[offset : offset + len(buffer)]
    with pytest.raises(SourceError, match="outside"):
        source.readinto_nowait(source.size, memoryview(bytearray(1)))
    await source.aclose()
    with pytest.raises(ClosedError):
        source.readinto_nowait(0, memoryview(bytearray(1)))
    for file in files:
        await file.aclose()
    alone, contents, reader = memory_of(data, live=True)
    source = TaskSource(alone, [BufferSource(content) for content in contents], reader)
    assert not source.readinto_nowait(0, memoryview(bytearray(source.size)))
    await source.aclose()


async def test_pages_of_a_reader_go_where_they_belong() -> None:
    """Each run in one piece, and zeros between them, whatever the buffer held before."""
    entries = (PagemapEntry(BASE + PAGE, 2, LIVE), PagemapEntry(BASE + 5 * PAGE, 1, LIVE))
    level = Level("pagemap-7.img", Pagemap(1, entries), 0, None)
    memory = TaskMemory(7, [anonymous(BASE, 8)], [level])
    pages = {BASE + at * PAGE: image(8 * PAGE)[at * PAGE : (at + 1) * PAGE] for at in range(8)}
    reader = ReaderInto(pages)
    source = TaskSource(memory, [BufferSource(b"")], reader)
    buffer = bytearray(b"\xee" * (8 * PAGE))
    await source.readinto(0, memoryview(buffer))
    expected = [pages[BASE + at * PAGE] if at in (1, 2, 5) else bytes(PAGE) for at in range(8)]
    assert buffer == b"".join(expected)
    assert reader.asked == [(7, BASE + PAGE, 2), (7, BASE + 5 * PAGE, 1)]
    buffer = bytearray(PAGE)
    await source.readinto(2 * PAGE + 100, memoryview(buffer))  # within a page: by a copy
    assert buffer == b"".join(expected)[2 * PAGE + 100 : 3 * PAGE + 100]
    await source.aclose()


class TestOverSlowSources(TestOverMemory):
    """Two files that take their time."""

    make = staticmethod(lambda data: SlowSource(data, wait=False))


class TestOverFiles(SourceContract):
    """Two files on a disk, as it mostly is."""

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Write the files."""
        memory, files, reader = memory_of(data, live=False)
        sources = []
        for number, file in enumerate(files):
            path = self.folder / f"{number}-{len(data)}"
            path.write_bytes(file)
            sources.append(FileSource(path))
        source = TaskSource(memory, sources, reader)
        yield source
        await source.aclose()
        for one in sources:
            await one.aclose()


class Noting(BufferSource):
    """Bytes in memory; reads into buffers are written down."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reads: list[tuple[int, int]] = []

    async def readinto(self, offset: int, buffer: memoryview) -> None:
        """Read as a file does."""
        self.reads.append((offset, len(buffer)))
        await asyncio.sleep(0)
        buffer[:] = memoryview(await super().read(offset, len(buffer))).cast("B")


def scattered(
    runs: Sequence[tuple[int, int, int]], *, pages: int = 64
) -> tuple[TaskMemory, bytes, bytes]:
    """Make one mapping with some runs: (page, pages, flags), and eager ones in its front.

    Returns:
        The memory, its file, and what the memory reads as.
    """
    choose = random.Random(len(runs))
    expected = bytearray(pages * PAGE)
    file = bytearray()
    for page, count, flags in runs:
        data = choose.randbytes(count * PAGE)
        file += data
        if flags == STORED:
            expected[page * PAGE : (page + count) * PAGE] = data
    entries = tuple(PagemapEntry(BASE + page * PAGE, count, flags) for page, count, flags in runs)
    level = Level("pagemap-7.img", Pagemap(1, entries), 0, None)
    memory = TaskMemory(7, [anonymous(BASE, pages)], [level], digest="d")
    return memory, bytes(file), bytes(expected)


@st.composite
def layouts(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Draw runs in 64 pages."""
    runs, at = [], 0
    for gap, count, flags in draw(
        st.lists(
            st.tuples(st.integers(0, 5), st.integers(1, 5), st.sampled_from([STORED, EAGER])),
            max_size=20,
        )
    ):
        if at + gap + count > 64:
            break
        runs.append((at + gap, count, flags))
        at += gap + count
    return runs


@given(layouts(), st.integers(0, 64 * PAGE - 1), st.integers(1, 64 * PAGE), st.booleans())
def test_all_ways_to_read_give_the_same(
    runs: list[tuple[int, int, int]], offset: int, length: int, into: bool
) -> None:
    """Whatever the layout, each way gives the stored bytes of what is lazy, and zeros."""
    memory, file, expected = scattered(runs)
    length = min(length, len(expected) - offset)

    async def read_all() -> None:
        source = TaskSource(memory, [Noting(file) if into else BufferSource(file)])
        assert memory.size == source.size == len(expected)
        got = as_bytes(await source.read(offset, length))
        assert got == expected[offset : offset + length]
        at_hand = source.read_nowait(offset, length)
        assert at_hand is not None
        assert as_bytes(at_hand) == expected[offset : offset + length]
        buffer = bytearray(b"\xcc" * length)
        await source.readinto(offset, memoryview(buffer))
        assert buffer == expected[offset : offset + length]
        held = bytearray(len(expected))
        for start, count in source.extents():
            held[start : start + count] = b"\1" * count
        lazy = bytearray(len(expected))
        for page, count, flags in runs:
            if flags == STORED:
                lazy[page * PAGE : (page + count) * PAGE] = b"\1" * count * PAGE
        assert held == lazy

    asyncio.run(read_all())


async def test_a_long_read_over_many_runs_is_one_of_the_file() -> None:
    """Every other page is stored: they lie side by side in the file, and are read as that."""
    memory, file, expected = scattered([(page, 1, STORED) for page in range(1, 64, 2)])
    under = Noting(file)
    source = TaskSource(memory, [under])
    assert isinstance(source, ReadsInto)
    buffer = bytearray(b"\xcc" * len(expected))
    await source.readinto(0, memoryview(buffer))
    assert under.reads == [(0, len(file))]
    assert buffer == expected


async def test_a_read_of_one_run_is_the_answer_of_its_file() -> None:
    """What lies in one run is not copied."""
    memory, file, _ = scattered([(3, 5, STORED)])
    whole = SlowSource(file, wait=False)
    source = TaskSource(memory, [whole])
    await source.read(4 * PAGE, 2 * PAGE)
    assert whole.reads == [(PAGE, 2 * PAGE)]


async def test_far_apart_in_the_file_is_read_apart() -> None:
    """Eager pages between lazy ones are read along up to a measure, and then left out."""
    most = READ_THROUGH // PAGE
    for between, reads in ((most, 1), (most + 1, 2)):
        memory, file, expected = scattered(
            [(0, 1, STORED), (1, between, EAGER), (1 + between, 1, STORED)]
        )
        slow = SlowSource(file, wait=False)
        source = TaskSource(memory, [slow])
        assert as_bytes(await source.read(0, len(expected))) == expected
        assert len(slow.reads) == reads


async def test_what_no_file_has_comes_from_the_reader() -> None:
    """The reader is asked for whole pages by their addresses, one run in one go."""
    pages = {BASE + page * PAGE: image(PAGE, seed=page) for page in range(2, 6)}
    level = Level("pagemap-7.img", Pagemap(1, (PagemapEntry(BASE + 2 * PAGE, 4, LIVE),)), 0, None)
    memory = TaskMemory(7, [anonymous(BASE, 8)], [level])
    reader = Reader(pages)
    source = TaskSource(memory, [BufferSource(b"")], reader)
    assert memory.live_bytes == memory.lazy_bytes == 4 * PAGE
    assert source.read_nowait(3 * PAGE, PAGE) is None
    assert as_bytes(source.read_nowait(0, PAGE) or b"") == bytes(PAGE)
    assert as_bytes(await source.read(3 * PAGE + 10, 100)) == pages[BASE + 3 * PAGE][10:110]
    assert reader.asked == [(7, BASE + 3 * PAGE, 1)]
    reader.asked.clear()
    whole = bytes(2 * PAGE) + b"".join(pages.values()) + bytes(2 * PAGE)
    assert as_bytes(await source.read(0, 8 * PAGE)) == whole
    assert reader.asked == [(7, BASE + 2 * PAGE, 4)]
    buffer = bytearray(b"\xcc" * 8 * PAGE)
    await source.readinto(0, memoryview(buffer))
    assert buffer == whole


async def test_what_is_not_at_hand_is_not_waited_for() -> None:
    """None of a read over several runs is given if one of them would have to be waited for."""
    memory, file, expected = scattered([(1, 1, STORED), (3, 1, STORED)])
    for under in (BufferSource(file), SlowSource(file)):
        source = TaskSource(memory, [under])
        at_hand = source.read_nowait(0, 4 * PAGE)
        if isinstance(under, SlowSource):
            assert at_hand is None
        else:
            assert as_bytes(at_hand or b"") == expected[: 4 * PAGE]
    entries = (PagemapEntry(BASE, 1, LIVE), PagemapEntry(BASE + 2 * PAGE, 1, STORED))
    level = Level("pagemap-7.img", Pagemap(1, entries), 0, None)
    memory = TaskMemory(7, [anonymous(BASE, 8)], [level])
    source = TaskSource(memory, [BufferSource(bytes(PAGE))], Reader({}))
    assert source.read_nowait(0, 8 * PAGE) is None
    assert source.read_nowait(PAGE, 7 * PAGE) == bytes(7 * PAGE)


async def test_what_no_file_has_needs_a_reader() -> None:
    """Without one it is refused before anything is served."""
    level = Level("pagemap-7.img", Pagemap(1, (PagemapEntry(BASE, 4, LIVE),)), 0, None)
    memory = TaskMemory(7, [anonymous(BASE, 8)], [level])
    with pytest.raises(SourceError, match=r"process 7: 16384 bytes .* --lazy-pages"):
        TaskSource(memory, [BufferSource(b"")])


async def test_a_reader_that_gives_less_is_found_out() -> None:
    """A short answer is an error, not a page with a wrong end."""

    class Short(Reader):
        async def read_pages(self, pid: int, address: int, pages: int) -> bytes:
            return bytes(pages * PAGE - 1)

    level = Level("pagemap-7.img", Pagemap(1, (PagemapEntry(BASE, 4, LIVE),)), 0, None)
    memory = TaskMemory(7, [anonymous(BASE, 8)], [level])
    source = TaskSource(memory, [BufferSource(b"")], Short({}))
    with pytest.raises(SourceError, match="process 7: 4095 bytes came for 1 pages"):
        await source.read(0, PAGE)


async def test_a_file_that_is_too_short_is_refused() -> None:
    """It is said before a fault finds it out."""
    memory, file, _ = scattered([(3, 5, STORED)])
    with pytest.raises(SourceError, match=r"pages-1.img has 20479 bytes of 20480"):
        TaskSource(memory, [BufferSource(file[:-1])])


async def test_an_error_of_one_file_ends_the_other_reads() -> None:
    """The error comes out as it was, and nothing is still being read."""
    memory, files, reader = memory_of(image(16 * PAGE), live=False)
    own, parent = SlowSource(files[0]), SlowSource(files[1], wait=False)
    parent.error = SourceError("broken")
    source = TaskSource(memory, [own, parent], reader)
    with pytest.raises(SourceError, match="broken"):
        await source.read(0, 16 * PAGE)
    assert own.cancelled >= 1
    await source.aclose()


async def test_closing_leaves_the_files_open() -> None:
    """They belong to the checkpoint, and serve its other tasks."""
    memory, file, _ = scattered([(3, 5, STORED)])
    under = SlowSource(file, wait=False)
    source = TaskSource(memory, [under])
    await source.aclose()
    assert not under.closed
    with pytest.raises(ClosedError, match="the memory of process 7 is closed"):
        source.read_nowait(0, PAGE)
    with pytest.raises(ClosedError):
        await source.readinto(0, memoryview(bytearray(PAGE)))


async def test_the_identity_says_which_dump_it_is() -> None:
    """It is the dump's own if that has one, else the files take part; or it is unknown."""
    _, file, _ = scattered([(3, 5, STORED)])
    level = Level("pagemap-7.img", Pagemap(1, (PagemapEntry(BASE, 5, STORED),)), 0, None)

    class Nameless(BufferSource):
        identity = ""

    for digest, unique, under, known in (
        ("d", True, Nameless(file), "criu:d"),
        ("d", False, BufferSource(file), f"criu:d-{identity_of(BufferSource(file))}"),
        ("d", False, Nameless(file), ""),
        ("", True, BufferSource(file), ""),
    ):
        memory = TaskMemory(7, [anonymous(BASE, 8)], [level], digest=digest, unique=unique)
        assert identity_of(TaskSource(memory, [under])) == known


async def test_a_page_is_found_quickly_among_a_hundred_thousand_runs() -> None:
    """Reading the last is not slower than reading the first: nothing is walked through."""
    entries = tuple(PagemapEntry(BASE + 2 * PAGE * run, 1, STORED) for run in range(100_000))
    level = Level("pagemap-7.img", Pagemap(1, entries), 0, None)
    memory = TaskMemory(7, [anonymous(BASE, 200_000)], [level])
    path = f"/proc/self/fd/{os.memfd_create('pages')}"
    fd = int(path.rpartition("/")[2])
    os.truncate(fd, 100_000 * PAGE)
    under = FileSource(path)
    os.close(fd)
    source = TaskSource(memory, [under])
    steps = 0

    class Counting(int):
        def __lt__(self, other: int) -> bool:
            nonlocal steps
            steps += 1
            return int(self) < other

    assert source.read_nowait(Counting(2 * PAGE * 99_999), PAGE) == bytes(PAGE)
    assert 0 < steps <= 20
    await source.aclose()
    await under.aclose()
