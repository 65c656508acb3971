"""Checkpoint: folders of images, here and far away, with parents; what is damaged is named."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import obstore
import pytest
from aiohttp import web
from obstore.store import MemoryStore

from aiouffd.errors import ClosedError, ImageError, SourceError
from aiouffd.image.copying import copy
from aiouffd.image.packed import PackedWriter
from aiouffd.protocols.criu import checkpoint as checkpoint_module
from aiouffd.protocols.criu.checkpoint import Checkpoint, name_in
from aiouffd.protocols.criu.images import Inventory, PagemapEntry, Task
from aiouffd.protocols.criu.task_memory import LIVE, ZEROS, PagesFile, Run
from aiouffd.sources import identity_of
from aiouffd.sources.file import FileSource
from aiouffd.testing.sources import as_bytes, image
from tests.protocols.criu.checkpoints import PAGE, Made, Memory, anonymous, lone_task, of_file
from tests.s3_server import S3Server

BASE = 0x7F00_0000_0000
PARENT, LAZY, EAGER, STORED = 1, 2, 4, 6


@pytest.fixture(scope="session", autouse=True)
def _obstore_threads() -> None:
    """obstore's threads keep descriptors for the process's life: let them begin before a test."""
    obstore.put(MemoryStore(), "x", b"x")


def plain(pages: bytes, *, first: int = 2, mapped: int = 16) -> Memory:
    """One mapping, in which stored pages begin at a page."""
    entry = PagemapEntry(BASE + first * PAGE, len(pages) // PAGE, STORED)
    return Memory([anonymous(BASE, mapped)], [entry], pages)


async def whole(checkpoint: Checkpoint, pid: int = 1000) -> bytes:
    """Read all of a task's lazily servable memory."""
    source = await checkpoint.source(pid)
    try:
        return as_bytes(await source.read(0, source.size))
    finally:
        await source.aclose()


@contextlib.asynccontextmanager
async def on_a_web_server(folder: Path) -> AsyncIterator[str]:
    """Let a folder be fetched; gives its URL."""
    application = web.Application()
    application.router.add_static("/files", folder)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        yield f"http://127.0.0.1:{port}/files"
    finally:
        await runner.cleanup()


async def test_a_tree_of_tasks(tmp_path: Path) -> None:
    """Tasks, their names and states; each has memory of its own, the dead have none."""
    tasks = [
        lone_task(10, name="init"),
        Task(11, 10, 10, 10, (11, 13), "worker", stopped=True),
        lone_task(12, 11, name="gone", dead=True),
    ]
    pages = {10: image(3 * PAGE, seed=1), 11: image(2 * PAGE, seed=2)}
    made = Made({pid: plain(data) for pid, data in pages.items()}, tasks)
    async with await Checkpoint.open(made.write(tmp_path / "c")) as checkpoint:
        assert checkpoint.inventory == Inventory(2, "a-run")
        assert checkpoint.tasks == tuple(tasks)
        for pid, data in pages.items():
            memory = checkpoint.memory(pid)
            assert (memory.pid, memory.size, memory.lazy_bytes) == (pid, 16 * PAGE, len(data))
            expected = bytes(2 * PAGE) + data
            assert await whole(checkpoint, pid) == expected.ljust(16 * PAGE, b"\0")
        with pytest.raises(SourceError, match=r"process 12 of .* is dead, and has no memory"):
            checkpoint.memory(12)
        with pytest.raises(SourceError, match="there is no process 99 in "):
            await checkpoint.source(99)
    assert str(checkpoint.location).endswith("/c")


async def test_runs_and_regions(tmp_path: Path) -> None:
    """Runs are cut at the borders of mappings; offsets count registered mappings alone."""
    memory = Memory(
        [
            anonymous(BASE, 4),
            anonymous(BASE + 4 * PAGE, 4),
            of_file(BASE + 8 * PAGE, 2),
            anonymous(BASE + 20 * PAGE, 4),
        ],
        [
            PagemapEntry(BASE + 2 * PAGE, 5, STORED),  # in two mappings
            PagemapEntry(BASE + 7 * PAGE, 1, EAGER),
            PagemapEntry(BASE + 8 * PAGE, 2, EAGER),
            PagemapEntry(BASE + 20 * PAGE, 1, LAZY),
            PagemapEntry(BASE + 21 * PAGE, 1, 0),
            PagemapEntry(BASE + 22 * PAGE, 1, STORED),
        ],
        image(9 * PAGE),
    )
    async with await Checkpoint.open(Made({1000: memory}).write(tmp_path / "c")) as checkpoint:
        found = checkpoint.memory(1000)
        assert [(one.start, one.length, one.offset) for one in found.regions] == [
            (BASE, 4 * PAGE, 0),
            (BASE + 4 * PAGE, 4 * PAGE, 4 * PAGE),
            (BASE + 20 * PAGE, 4 * PAGE, 8 * PAGE),
        ]
        assert found.files == (PagesFile(0, "pages-1.img", 9 * PAGE),)
        runs = [
            Run(BASE + 2 * PAGE, 2 * PAGE, True, 0, 0),
            Run(BASE + 4 * PAGE, 3 * PAGE, True, 0, 2 * PAGE),
            Run(BASE + 7 * PAGE, PAGE, False, 0, 5 * PAGE),
            Run(BASE + 8 * PAGE, 2 * PAGE, False, 0, 6 * PAGE),
            Run(BASE + 20 * PAGE, PAGE, True, LIVE, BASE + 20 * PAGE),
            Run(BASE + 21 * PAGE, PAGE, False, ZEROS, 0),
            Run(BASE + 22 * PAGE, PAGE, True, 0, 8 * PAGE),
        ]
        assert list(found.runs) == runs
        for run in runs:
            assert found.run_at(run.address) == found.run_at(run.address + run.length - 1) == run
        assert found.run_at(BASE + PAGE) is found.run_at(BASE + 10 * PAGE) is None
        assert found.run_at(0) is None
        assert (found.lazy_bytes, found.live_bytes) == (7 * PAGE, PAGE)
        for address, offset in (
            (BASE, 0),
            (BASE + 8 * PAGE - 1, 8 * PAGE - 1),
            (BASE + 20 * PAGE, 8 * PAGE),
            (BASE + 24 * PAGE - 1, 12 * PAGE - 1),
        ):
            assert found.offset_of(address) == offset
            assert found.address_of(offset) == address
        for outside in (0, BASE - 1, BASE + 8 * PAGE, BASE + 24 * PAGE):
            with pytest.raises(ValueError, match="lies in no mapping that is restored lazily"):
                found.offset_of(outside)
        for outside in (-1, 12 * PAGE):
            with pytest.raises(ValueError, match="lies outside of 49152 bytes"):
                found.address_of(outside)


# --- parents ---------------------------------------------------------------------------


def chain(folder: Path) -> tuple[Path, bytes]:
    """Write three checkpoints, each with the one before as its parent.

    Returns:
        The last, and what its memory reads as.
    """
    old, middle, new = image(8 * PAGE, seed=1), image(3 * PAGE, seed=2), image(2 * PAGE, seed=3)
    vmas = [anonymous(BASE, 8)]

    def entries(*runs: tuple[int, int, int]) -> list[PagemapEntry]:
        return [PagemapEntry(BASE + page * PAGE, count, flags) for page, count, flags in runs]

    Made({1000: Memory(vmas, entries((0, 5, EAGER), (5, 3, EAGER)), old)}).write(folder / "1")
    # Two runs of the parent, and one of its own that lies in the middle of what was one.
    second = entries((0, 2, PARENT), (2, 3, STORED), (5, 3, PARENT))
    Made({1000: Memory(vmas, second, middle)}).write(folder / "2", "../1")
    # What is left to the parent is half there and half in its own parent.
    third = entries((0, 1, STORED), (1, 6, PARENT | LAZY), (7, 1, STORED))
    Made({1000: Memory(vmas, third, new)}).write(folder / "3", "../2")
    expected = new[:PAGE] + old[PAGE : 2 * PAGE] + middle + old[5 * PAGE : 7 * PAGE] + new[PAGE:]
    return folder / "3", expected


async def test_pages_of_parents(tmp_path: Path) -> None:
    """A run that is left to the parent is split where the parent's runs are, and so on."""
    last, expected = chain(tmp_path)
    async with await Checkpoint.open(last) as checkpoint:
        memory = checkpoint.memory(1000)
        assert [str(file) for file in memory.files] == [
            "pages-1.img",
            "parent/pages-1.img",
            "parent/parent/pages-1.img",
        ]
        assert [(run.file, run.length // PAGE) for run in memory.runs] == [
            (0, 1),
            (2, 1),
            (1, 3),
            (2, 2),
            (0, 1),
        ]
        assert await whole(checkpoint) == expected


async def test_parents_that_are_not_needed_need_not_be_there(tmp_path: Path) -> None:
    """CRIU leaves the link even if all pages were written anew."""
    data = image(PAGE)
    folder = Made({1000: plain(data)}).write(tmp_path / "c", "../gone")
    async with await Checkpoint.open(folder) as checkpoint:
        assert len(checkpoint.memory(1000).files) == 1


async def test_parents_that_are_missing(tmp_path: Path) -> None:
    """Without a link, with one that leads nowhere, or with a parent that lacks the pages."""
    memory = Memory([anonymous(BASE, 4)], [PagemapEntry(BASE, 4, PARENT)])
    folder = Made({1000: memory}).write(tmp_path / "c")
    with pytest.raises(ImageError, match=r"^parent: pages lie in the parent .* no link to it"):
        await Checkpoint.open(folder)
    os.symlink("../before", folder / "parent")
    with pytest.raises(ImageError, match=r"^parent: pages lie in the parent .* where the link"):
        await Checkpoint.open(folder)
    before = tmp_path / "before"
    before.mkdir()
    with pytest.raises(ImageError, match=r"^parent/pagemap-1000.img: there is none in .*before"):
        await Checkpoint.open(folder)
    short = Memory([], [PagemapEntry(BASE, 3, EAGER)], bytes(3 * PAGE))
    Made({1000: short}).write(before)
    with pytest.raises(
        ImageError,
        match=r"^parent/pagemap-1000.img: the page at 0x7f0000003000 is not in it, though"
        " pagemap-1000.img says so",
    ):
        await Checkpoint.open(folder)
    left = Memory([], [PagemapEntry(BASE, 4, LAZY)])
    Made({1000: left}).write(before)
    with pytest.raises(ImageError, match="was left to a page server, which has gone"):
        await Checkpoint.open(folder)


@pytest.mark.parametrize("length", [1, 3])
async def test_parents_in_a_circle(tmp_path: Path, length: int) -> None:
    """Links that lead back are found out."""
    memory = Memory([anonymous(BASE, 4)], [PagemapEntry(BASE, 4, PARENT)])
    for number in range(length):
        Made({1000: memory}).write(tmp_path / str(number), f"../{(number + 1) % length}")
    with pytest.raises(ImageError, match=r"parent: the parents go in a circle"):
        await Checkpoint.open(tmp_path / "0")


async def test_too_many_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a circle cannot be seen, as under a URL, there is an end all the same."""
    last, _ = chain(tmp_path)
    monkeypatch.setattr(checkpoint_module, "_MOST_PARENTS", 1)
    with pytest.raises(ImageError, match=r"^parent/parent: there are more than 1 parents"):
        await Checkpoint.open(last)


async def test_zeros_of_parents(tmp_path: Path) -> None:
    """A run without any flag is zeros, in a parent too."""
    vmas = [anonymous(BASE, 4)]
    data = image(PAGE)
    runs = [PagemapEntry(BASE, 2, 0), PagemapEntry(BASE + 2 * PAGE, 1, EAGER)]
    Made({1000: Memory(vmas, runs, data)}).write(tmp_path / "1")
    left = Memory(vmas, [PagemapEntry(BASE, 3, PARENT | LAZY)])
    last = Made({1000: left}).write(tmp_path / "2", "../1")
    async with await Checkpoint.open(last) as checkpoint:
        assert [run.file for run in checkpoint.memory(1000).runs] == [ZEROS, 1]
        assert checkpoint.memory(1000).lazy_bytes == PAGE
        assert await whole(checkpoint) == bytes(2 * PAGE) + data + bytes(PAGE)


# --- elsewhere -------------------------------------------------------------------------


async def test_under_a_url(tmp_path: Path) -> None:
    """A folder of a web server is one as well; parents lie in it, as ``parent``."""
    last, expected = chain(tmp_path)
    nested = tmp_path / "copy"
    shutil.copytree(last, nested)  # links are followed: each parent becomes a folder
    async with (
        on_a_web_server(tmp_path) as url,
        await Checkpoint.open(f"{url}/copy/") as checkpoint,
        await Checkpoint.open(last) as here,
    ):
        assert await whole(checkpoint) == expected
        there, same = await checkpoint.source(1000), await here.source(1000)
        assert identity_of(there) == identity_of(same) != ""
        for source in (there, same):
            await source.aclose()


async def test_what_is_missing_under_a_url(tmp_path: Path) -> None:
    """The error names the image, and what the server said."""
    folder = Made({1000: plain(image(3 * PAGE))}).write(tmp_path / "c")
    async with on_a_web_server(tmp_path) as url:
        with pytest.raises(ImageError, match=r"^inventory\.img: .*404"):
            await Checkpoint.open(f"{url}/nothing")
        (folder / "pages-1.img").unlink()
        async with await Checkpoint.open(f"{url}/c") as checkpoint:
            with pytest.raises(ImageError, match=r"^pages-1\.img: .*404"):
                await checkpoint.source(1000)
        os.truncate(folder / "mm-1000.img", 2 << 30)
        with pytest.raises(ImageError, match=r"^mm-1000\.img: 2147483648 bytes are no small image"):
            await Checkpoint.open(f"{url}/c")


async def test_pages_elsewhere_and_packed(tmp_path: Path) -> None:
    """The small images here, the pages far away and compressed; parents' within them."""
    last, expected = chain(tmp_path)
    far = tmp_path / "far"
    for folder, place in (("3", "."), ("2", "parent"), ("1", "parent/parent")):
        (far / place).mkdir(parents=True, exist_ok=True)
        pages = FileSource(tmp_path / folder / "pages-1.img")
        async with PackedWriter(far / place / "pages-1.img", pages.size) as writer:
            await copy(pages, writer)
        await pages.aclose()
        (tmp_path / folder / "pages-1.img").unlink()
    for location in (str(far), f"file://{far}"):
        async with await Checkpoint.open(last, pages=location) as checkpoint:
            assert await whole(checkpoint) == expected
    async with (
        on_a_web_server(far) as url,
        await Checkpoint.open(last, pages=url) as checkpoint,
    ):
        assert await whole(checkpoint) == expected
    async with await Checkpoint.open(last) as checkpoint:
        with pytest.raises(ImageError, match=r"^pages-1\.img: "):
            await checkpoint.source(1000)


async def test_in_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages alone, or all of it with the parents, under a key of a bucket."""
    last, expected = chain(tmp_path)
    nested = tmp_path / "copy"
    shutil.copytree(last, nested)
    async with S3Server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        for path in nested.rglob("*.img"):
            server.objects[f"images/dumps/web/{path.relative_to(nested)}"] = path.read_bytes()
        async with await Checkpoint.open("s3://images/dumps/web") as checkpoint:
            assert await whole(checkpoint) == expected
        for path in tmp_path.rglob("pages-*.img"):
            path.unlink()
        async with await Checkpoint.open(last, pages="s3://images/dumps/web") as checkpoint:
            assert await whole(checkpoint) == expected


@pytest.mark.parametrize(
    "location, name",
    [
        ("/a/b", "/a/b/x.img"),
        ("a", "a/x.img"),
        ("s3://bucket", "s3://bucket/x.img"),
        ("s3://bucket/a/", "s3://bucket/a/x.img"),
        ("https://host/a?token=b/c", "https://host/a/x.img?token=b/c"),
        ("file:///a%20b/", "file:///a%20b/x.img"),
    ],
)
def test_names_in_folders(location: str, name: str) -> None:
    """A token stays at the end."""
    assert name_in(location, "x.img") == name


# --- damage ----------------------------------------------------------------------------

SMALL = ("inventory.img", "pstree.img", "core-1000.img", "mm-1000.img", "pagemap-1000.img")


@pytest.mark.parametrize("name", SMALL)
async def test_images_that_are_missing_or_damaged(tmp_path: Path, name: str) -> None:
    """Each is named when the checkpoint is opened."""
    folder = Made({1000: plain(image(3 * PAGE))}).write(tmp_path / "c")
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ImageError, match=rf"^{name} at offset \d+: .*cut short"):
        await Checkpoint.open(folder)
    path.unlink()
    with pytest.raises(ImageError, match=rf"^{name}: there is none in .*/c: no checkpoint"):
        await Checkpoint.open(folder)
    os.mkfifo(path)
    with pytest.raises(ImageError, match=rf"^{name}: it is no regular file"):
        await Checkpoint.open(folder)
    path.unlink()
    path.touch()
    os.truncate(path, 2 << 30)
    with pytest.raises(ImageError, match=rf"^{name}: 2147483648 bytes are no small image"):
        await Checkpoint.open(folder)


async def test_files_of_pages_that_are_missing_or_cut_short(tmp_path: Path) -> None:
    """They are named when somebody wants to read them, and may be put right then."""
    data = image(3 * PAGE)
    folder = Made({1000: plain(data)}).write(tmp_path / "c")
    path = folder / "pages-1.img"
    async with await Checkpoint.open(folder) as checkpoint:
        path.write_bytes(data[:-1])
        with pytest.raises(
            ImageError, match=r"^pages-1.img at offset 12287: it is cut short: .* 12288 bytes"
        ):
            await checkpoint.source(1000)
        path.unlink()
        with pytest.raises(ImageError, match=r"^pages-1.img: No such file"):
            await checkpoint.source(1000)
        with pytest.raises(ImageError, match=r"^pages-1.img: No such file"):
            await checkpoint.find_pages()
        path.write_bytes(data)
        await checkpoint.find_pages()
        assert data in await whole(checkpoint)


async def test_a_place_that_makes_no_sense(tmp_path: Path) -> None:
    """It is said as for any image."""
    with pytest.raises(SourceError, match="no image can be had from gopher://"):
        await Checkpoint.open("gopher://host/c")
    with pytest.raises(ImageError, match=r"^inventory.img: Not a directory"):
        (tmp_path / "file").touch()
        await Checkpoint.open(tmp_path / "file")


# --- lives -----------------------------------------------------------------------------


async def test_files_are_opened_once_for_all(tmp_path: Path) -> None:
    """Any number of sources of a task share a descriptor; closing the checkpoint closes it."""
    folder = Made({1000: plain(image(3 * PAGE))}).write(tmp_path / "c")
    checkpoint = await Checkpoint.open(folder)
    before = len(os.listdir("/proc/self/fd"))
    sources = await asyncio.gather(*(checkpoint.source(1000) for _ in range(20)))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    answers = await asyncio.gather(*(source.read(2 * PAGE, PAGE) for source in sources))
    assert set(map(as_bytes, answers)) == {image(3 * PAGE)[:PAGE]}
    for source in sources:
        await source.aclose()
    await checkpoint.aclose()
    await checkpoint.aclose()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ClosedError, match=r"the checkpoint .* is closed"):
        await checkpoint.source(1000)


async def test_who_gives_up_leaves_the_file_to_the_others(tmp_path: Path) -> None:
    """Opening goes on for who still waits, and what nobody wants any more is closed."""
    folder = Made({1000: plain(image(3 * PAGE))}).write(tmp_path / "c")
    async with await Checkpoint.open(folder) as checkpoint:
        one, other = (asyncio.ensure_future(checkpoint.source(1000)) for _ in range(2))
        await asyncio.sleep(0)
        one.cancel()
        await (await other).aclose()
        assert one.cancelled()
    async with await Checkpoint.open(folder) as checkpoint:
        one = asyncio.ensure_future(checkpoint.source(1000))
        await asyncio.sleep(0)
        one.cancel()


@pytest.mark.parametrize("run_id", ["a-run", ""])
async def test_identities(tmp_path: Path, run_id: str) -> None:
    """Tasks and dumps differ; a copy does not, if the dump has a name of its own."""

    async def identity(folder: Path, pid: int) -> str:
        async with await Checkpoint.open(folder) as checkpoint:
            source = await checkpoint.source(pid)
            await source.aclose()
            return identity_of(source)

    def write(name: str, run_id: str) -> Path:
        memories = {10: plain(image(PAGE)), 11: plain(image(PAGE))}
        tasks = [lone_task(10), lone_task(11, 10)]
        return Made(memories, tasks, run_id).write(tmp_path / name)

    first = write("1", run_id)
    shutil.copytree(first, tmp_path / "copy")
    names = [
        await identity(first, 10),
        await identity(first, 11),
        await identity(write("2", "another"), 10),
    ]
    assert len(set(names)) == 3
    assert all(name.startswith("criu:") for name in names)
    assert (await identity(tmp_path / "copy", 10) == names[0]) == bool(run_id)
