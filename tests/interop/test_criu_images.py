"""Real checkpoints read by us, and checkpoints that we made restored by stock CRIU."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from aiouffd.protocols.criu.checkpoint import Checkpoint
from aiouffd.protocols.criu.images import (
    PageFlag,
    Pagemap,
    PagemapEntry,
    has_wide_counts,
    parse_pagemap,
    parse_pstree,
    write_pagemap,
)
from aiouffd.ranges import PAGE_SIZE
from tests.interop.criu import OURS, Stage

pytestmark = [pytest.mark.child, pytest.mark.root]

_REGISTERED = re.compile(r" (\d+): lazy-pages: register: (\w+), len (\w+)")
_LAZY = re.compile(r" +(\d+): nr_lazy: +(\d+)")


@pytest.fixture(params=["pages", "tree"])
def images(request: pytest.FixtureRequest, stage: Stage, seed: int) -> Path:
    """A checkpoint of one process with threads, or of three with a zombie."""
    target = stage.pages(32, seed=seed) if request.param == "pages" else stage.tree(seed=seed)
    return stage.dump(target)


def go(images: Path, seed: int, changes: str = "40 1") -> str:
    """What the target of a checkpoint is to do; a tree with so many changes to its memory."""
    return (
        f"random {seed} 1"
        if len(parse_pstree((images / "pstree.img").read_bytes())) == 1
        else f"{seed} {changes}"
    )


async def check_against_restore(images: Path, log: str) -> None:
    """Compare what we read with what CRIU did: what it registered, and what it left out."""
    registered: dict[int, set[tuple[int, int]]] = {}
    for pid, start, length in _REGISTERED.findall(log):
        registered.setdefault(int(pid), set()).add((int(start, 16), int(length, 16)))
    left = {int(pid): int(pages) for pid, pages in _LAZY.findall(log)}
    async with await Checkpoint.open(images) as checkpoint:
        living = {task.pid for task in checkpoint.tasks if not task.dead}
        assert set(registered) == set(left) == living
        for pid in living:
            memory = checkpoint.memory(pid)
            assert {(one.start, one.length) for one in memory.regions} == registered[pid]
            assert memory.lazy_bytes == left[pid] * PAGE_SIZE


@pytest.mark.parametrize("daemon", ["stock", "ours"])
async def test_restored_from_what_strip_leaves(
    stage: Stage, images: Path, daemon: str, seed: int
) -> None:
    """The daemon has the whole checkpoint, the restore the stripped one; all memory is right."""
    out, work = stage.folder / "out", stage.images("work")
    stage.start("strip", *OURS, "strip", images, out).wait()
    used = sum(path.stat().st_blocks * 512 for path in out.glob("pages-*.img"))
    assert used < sum(path.stat().st_size for path in images.glob("pages-*.img")) / 2
    running = stage.daemon(daemon, images, work=work)
    changes = stage.changes(daemon, 40, 1)
    restored = stage.restore(out, work=work, go=go(images, seed, changes)).wait()
    result = restored.result()
    assert result["right"], result
    running.wait()
    await check_against_restore(out, restored.running.text())


def test_shown_as_it_is(stage: Stage, images: Path) -> None:
    """Every process is there, and nothing is wrong with it."""
    shown = stage.start("show", *OURS, "show", images, "--json")
    shown.wait()
    found = json.loads(shown.text())
    tasks = parse_pstree((images / "pstree.img").read_bytes())
    assert [one["pid"] for one in found["processes"]] == [task.pid for task in tasks]
    assert found["problems"] == []
    stored = sum(one.get("dumped_bytes", 0) for one in found["processes"])
    assert stored == sum(path.stat().st_size for path in images.glob("pages-*.img"))


def leave_to_parent(images: Path, parent: Path) -> int:
    """Make an incremental checkpoint of a whole one: every third page moves to a parent.

    The kernels that the tests run on need not track changes, so CRIU itself may not make one.

    Returns:
        How many pages there are in the parent.
    """
    moved = 0
    for path in images.glob("pagemap-[0-9]*.img"):
        data = path.read_bytes()
        wide = bool(has_wide_counts(data, path.name))
        pagemap = parse_pagemap(data, path.name)
        pages = (images / f"pages-{pagemap.pages_id}.img").read_bytes()
        mine, others = bytearray(), bytearray()
        entries: list[PagemapEntry] = []
        parents: list[PagemapEntry] = []
        at = 0
        for vaddr, count, flags in pagemap.entries:
            for number in range(count):
                address = vaddr + number * PAGE_SIZE
                page = pages[at : at + PAGE_SIZE]
                at += PAGE_SIZE
                if (address // PAGE_SIZE) % 3 == 0:
                    entries.append(PagemapEntry(address, 1, int(PageFlag.PARENT)))
                    parents.append(PagemapEntry(address, 1, int(PageFlag.PRESENT)))
                    others += page
                else:
                    entries.append(PagemapEntry(address, 1, flags))
                    mine += page
        for folder, runs, bytes_ in ((images, entries, mine), (parent, parents, others)):
            made = Pagemap(pagemap.pages_id, tuple(runs))
            (folder / path.name).write_bytes(write_pagemap(made, wide=wide))
            (folder / f"pages-{pagemap.pages_id}.img").write_bytes(bytes_)
        moved += len(parents)
    (parent / "inventory.img").write_bytes((images / "inventory.img").read_bytes())
    os.symlink(f"../{parent.name}", images / "parent")
    return moved


@pytest.mark.parametrize("daemon", ["stock", "ours"])
async def test_incremental_checkpoints(stage: Stage, images: Path, daemon: str, seed: int) -> None:
    """Stock CRIU restores what we wrote, with a parent, and what strip makes of it."""
    assert leave_to_parent(images, stage.images("before")) > 1000
    result = stage.restore(images, go=go(images, seed), lazy=False).wait().result()
    assert result["right"], result
    out, work = stage.folder / "out", stage.images("work")
    stage.start("strip", *OURS, "strip", images, out).wait()
    assert (out / "parent").is_dir()
    running = stage.daemon(daemon, images, work=work)
    changes = stage.changes(daemon, 40, 1)
    restored = stage.restore(out, work=work, go=go(images, seed, changes)).wait()
    result = restored.result()
    assert result["right"], result
    running.wait()
    await check_against_restore(images, restored.running.text())
