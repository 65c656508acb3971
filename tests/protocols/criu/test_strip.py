"""Copies of checkpoints without what can be brought later."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from aiouffd.errors import ImageError, SourceError
from aiouffd.protocols.criu import images
from aiouffd.protocols.criu.checkpoint import Checkpoint
from aiouffd.protocols.criu.images import Pagemap, PagemapEntry
from aiouffd.protocols.criu.strip import Stripped, strip
from aiouffd.sources import identity_of
from aiouffd.sources.file import data_extents
from aiouffd.testing.sources import as_bytes, image
from tests.protocols.criu.checkpoints import PAGE, Made, Memory, anonymous, lone_task, of_file

BASE = 0x7F00_0000_0000
PARENT, LAZY, EAGER, STORED = 1, 2, 4, 6


def entries(*runs: tuple[int, int, int]) -> list[PagemapEntry]:
    """Runs by (page, pages, flags)."""
    return [PagemapEntry(BASE + page * PAGE, count, flags) for page, count, flags in runs]


def mixed(folder: Path) -> Path:
    """A checkpoint with lazy and other pages, shared memory, a log, and other things."""
    memory = Memory(
        [anonymous(BASE, 64), of_file(BASE + 64 * PAGE, 8)],
        entries((0, 20, STORED), (20, 2, EAGER), (40, 10, STORED), (64, 5, EAGER)),
        image(37 * PAGE),
    )
    tasks = [lone_task(10), lone_task(11, 10, dead=True)]
    Made({10: memory}, tasks).write(folder)
    shared = Pagemap(7, tuple(entries((0, 3, EAGER))))
    (folder / "pagemap-shmem-99.img").write_bytes(images.write_pagemap(shared, wide=False))
    (folder / "pages-7.img").write_bytes(image(3 * PAGE, seed=7))
    (folder / "files.img").write_bytes(b"files")
    (folder / "dump.log").write_bytes(b"log")
    os.mkfifo(folder / "lazy-pages.socket")
    os.symlink("../gone", folder / "parent")
    return folder


def held(path: Path) -> list[tuple[int, int]]:
    """Where a file has data."""
    with open(path, "rb") as file:
        return list(data_extents(file.fileno(), path.stat().st_size))


async def stripped(folder: Path, out: Path, pages: str | None = None) -> Stripped:
    """Strip a checkpoint, and see how far it says it has come."""
    steps: list[tuple[int, int]] = []
    async with await Checkpoint.open(folder, pages=pages) as checkpoint:
        done = await strip(checkpoint, out, watch=lambda *step: steps.append(step))
    assert steps == sorted(steps)
    assert not steps or steps[-1][0] == steps[-1][1] == done.kept_bytes
    assert [path.name for path in out.parent.iterdir() if ".part" in path.name] == []
    return done


async def test_what_is_not_lazy_is_kept_where_it_was(tmp_path: Path) -> None:
    """Files of pages keep length and offsets; shared memory is kept in full; logs are not."""
    folder, out = mixed(tmp_path / "c"), tmp_path / "out"
    done = await stripped(folder, out)
    assert (done.kept_bytes, done.left_bytes) == (10 * PAGE, 30 * PAGE)
    small = [
        "core-10.img",
        "core-11.img",
        "files.img",
        "inventory.img",
        "mm-10.img",
        "pagemap-10.img",
        "pagemap-shmem-99.img",
        "pstree.img",
    ]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*small, "pages-1.img", "pages-7.img", "stripped"]
    )
    for name in (*small, "pages-7.img"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert done.other_bytes == sum((folder / name).stat().st_size for name in small)
    whole, part = (folder / "pages-1.img").read_bytes(), (out / "pages-1.img").read_bytes()
    assert len(part) == len(whole)
    assert held(out / "pages-1.img") == [(20 * PAGE, 2 * PAGE), (32 * PAGE, 5 * PAGE)]
    for start, length in held(out / "pages-1.img"):
        assert part[start : start + length] == whole[start : start + length]
    for path in (out, *out.iterdir()):
        assert path.stat().st_mode & 0o077 == 0
    async with (
        await Checkpoint.open(out, pages=str(folder)) as copy,
        await Checkpoint.open(folder) as before,
    ):
        one, other = await copy.source(10), await before.source(10)
        assert identity_of(one) == identity_of(other)
        assert as_bytes(await one.read(0, one.size)) == as_bytes(await other.read(0, other.size))
        for source in (one, other):
            await source.aclose()


async def test_holes_are_never_taken_for_pages(tmp_path: Path) -> None:
    """A copy says that it has no pages of its own: it is not served without the whole ones."""
    folder, out = mixed(tmp_path / "c"), tmp_path / "out"
    await stripped(folder, out)
    async with await Checkpoint.open(out) as copy:
        with pytest.raises(ImageError, match=r"^pages-1\.img: .*out is a stripped copy.*--images"):
            await copy.source(10)
        with pytest.raises(ImageError, match="stripped copy"):
            await copy.find_pages()
    async with await Checkpoint.open(out, pages=str(folder)) as copy:
        await copy.find_pages()


async def test_a_file_of_pages_is_one_pagemaps(tmp_path: Path) -> None:
    """What the first of two needs would be lost in the copy of the second."""
    folder = mixed(tmp_path / "c")
    pagemap = images.parse_pagemap((folder / "pagemap-10.img").read_bytes(), "x")
    shared = Pagemap(pagemap.pages_id, tuple(entries((0, 3, EAGER))))
    (folder / "pagemap-shmem-99.img").write_bytes(images.write_pagemap(shared, wide=False))
    async with await Checkpoint.open(folder) as checkpoint:
        with pytest.raises(ImageError, match=r"pagemap-shmem-99.img: pages-\d+.img is another"):
            await strip(checkpoint, tmp_path / "out")
    assert os.listdir(tmp_path) == ["c"]


async def test_parents_become_folders_within(tmp_path: Path) -> None:
    """Of a parent only what the restore reads is there: no lazy page, no other process."""
    vmas = [anonymous(BASE, 64)]
    other = Memory(vmas, entries((0, 4, EAGER)), image(4 * PAGE, seed=4))
    old = Memory(vmas, entries((0, 30, EAGER)), image(30 * PAGE, seed=1))
    Made({10: old, 12: other}, [lone_task(10), lone_task(12, 10)]).write(tmp_path / "1")
    middle = Memory(vmas, entries((0, 10, PARENT), (10, 10, EAGER)), image(10 * PAGE, seed=2))
    Made({10: middle}, [lone_task(10)]).write(tmp_path / "2", "../1")
    new = Memory(
        vmas,
        entries((0, 5, PARENT), (5, 2, STORED), (8, 4, PARENT | LAZY), (12, 3, PARENT)),
        image(2 * PAGE, seed=3),
    )
    folder = Made({10: new}, [lone_task(10)]).write(tmp_path / "3", "../2")
    out = tmp_path / "out"
    done = await stripped(folder, out)
    assert (done.kept_bytes, done.left_bytes) == (8 * PAGE, 6 * PAGE)
    assert held(out / "pages-1.img") == []
    assert held(out / "parent/pages-1.img") == [(2 * PAGE, 3 * PAGE)]
    assert held(out / "parent/parent/pages-1.img") == [(0, 5 * PAGE)]
    parents = ["inventory.img", "pagemap-10.img", "pages-1.img", "stripped"]
    assert sorted(path.name for path in (out / "parent/parent").iterdir()) == parents
    assert not (out / "parent").is_symlink()
    async with await Checkpoint.open(out) as copy, await Checkpoint.open(folder) as before:
        assert list(copy.memory(10).runs) == list(before.memory(10).runs)


async def test_shared_memory_of_parents(tmp_path: Path) -> None:
    """It leans on parents by itself, and all of it is kept."""
    before = mixed(tmp_path / "before")
    (before / "parent").unlink()
    folder = mixed(tmp_path / "c")
    shared = Pagemap(7, tuple(entries((0, 2, PARENT), (2, 1, EAGER))))
    (folder / "pagemap-shmem-99.img").write_bytes(images.write_pagemap(shared, wide=False))
    (folder / "pages-7.img").write_bytes(image(PAGE, seed=8))
    out = tmp_path / "out"
    with pytest.raises(ImageError, match=r"^parent: pages lie in the parent"):
        await stripped(folder, out)
    assert not out.exists()
    (folder / "parent").unlink()
    os.symlink("../before", folder / "parent")
    await stripped(folder, out)
    assert sorted(path.name for path in (out / "parent").iterdir()) == [
        "inventory.img",
        "pagemap-shmem-99.img",
        "pages-7.img",
        "stripped",
    ]
    for name in ("pages-7.img", "parent/pages-7.img"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


async def test_pages_may_lie_elsewhere(tmp_path: Path) -> None:
    """What is needed at once is fetched from there."""
    folder, far = mixed(tmp_path / "c"), tmp_path / "far"
    here = await stripped(folder, tmp_path / "out")
    far.mkdir()
    for path in folder.glob("pages-*.img"):
        path.rename(far / path.name)
    assert await stripped(folder, tmp_path / "again", f"file://{far}") == here
    for name in ("pages-1.img", "pages-7.img"):
        assert held(tmp_path / "again" / name) == held(tmp_path / "out" / name)


async def test_stripping_twice_changes_nothing(tmp_path: Path) -> None:
    """What is stripped can be stripped."""
    first = await stripped(mixed(tmp_path / "c"), tmp_path / "1")
    assert await stripped(tmp_path / "1", tmp_path / "2") == first
    assert held(tmp_path / "2/pages-1.img") == held(tmp_path / "1/pages-1.img")


async def test_only_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    """What is there stays as it is."""
    folder, out = mixed(tmp_path / "c"), tmp_path / "out"
    out.mkdir()
    await stripped(folder, out)
    names = sorted(os.listdir(out))
    with pytest.raises(OSError, match="It is there, and not empty") as caught:
        await stripped(folder, out)
    assert caught.value.filename == str(out)
    assert sorted(os.listdir(out)) == names
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(OSError, match="Something else is in its place"):
        await stripped(folder, file)
    assert file.read_text() == "precious"
    with pytest.raises(FileNotFoundError) as missing:
        await stripped(folder, tmp_path / "no" / "where")
    assert missing.value.filename == str(tmp_path / "no")


async def test_nothing_half_done_stays(tmp_path: Path) -> None:
    """Neither after an error nor after being cancelled."""
    folder, out = mixed(tmp_path / "c"), tmp_path / "out"
    os.truncate(folder / "pages-7.img", PAGE)
    with pytest.raises(ImageError, match=r"pages-7\.img at offset 4096: it is cut short"):
        await stripped(folder, out)
    assert sorted(os.listdir(tmp_path)) == ["c"]
    (folder / "pages-7.img").write_bytes(image(3 * PAGE))
    began = asyncio.Event()
    async with await Checkpoint.open(folder) as checkpoint:
        task = asyncio.ensure_future(strip(checkpoint, out, watch=lambda done, total: began.set()))
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert sorted(os.listdir(tmp_path)) == ["c"]


async def test_small_images_lie_here(tmp_path: Path) -> None:
    """A folder far away cannot be listed."""
    folder = mixed(tmp_path / "c")
    async with await Checkpoint.open(folder) as checkpoint:
        checkpoint.chain.folders[0].path = None
        with pytest.raises(SourceError, match="is stripped from a folder of this machine"):
            await strip(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(folder)
