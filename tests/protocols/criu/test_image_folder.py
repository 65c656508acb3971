"""A folder that a dump's memory is written to: whole or not at all, and as CRIU reads it."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.errors import ImageError, PeerError, UffdError
from aiouffd.protocols.criu import images
from aiouffd.protocols.criu.image_folder import ImageFolder, _zero_stretches
from aiouffd.protocols.criu.images import Pagemap, PagemapEntry
from aiouffd.protocols.criu.page_wire import LONG, SHORT, ImageId, ImageKind

PAGE = 4096
TASK = ImageId(ImageKind.TASK, 1000, 1000 << 8 | 1)
OTHER = ImageId(ImageKind.TASK, 1001, 1001 << 8 | 1)
SHMEM = ImageId(ImageKind.SHMEM, 77, 77 << 8 | 2)
DATA = random.Random(1).randbytes(16 * PAGE)


def visible(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def add(folder: ImageFolder, data: bytes, *cuts: int) -> None:
    """Add data in pieces."""
    edges = [0, *cuts, len(data)]
    folder.add_data([memoryview(data)[a:b] for a, b in itertools.pairwise(edges)])


@pytest.mark.parametrize("size", [SHORT, LONG])
def test_images_are_as_criu_writes_them(tmp_path: Path, size: int) -> None:
    """Pagemaps count as the dumper's CRIU does; pages are numbered as its page server does."""
    folder = ImageFolder(str(tmp_path / "new" / "folder"))
    assert folder.open(TASK) is False
    folder.add_run(0x1000, 2, 6, size)
    add(folder, DATA[: 2 * PAGE], 10, 5000)
    folder.add_run(0x8000, 3, 2, size)
    folder.add_run(0x10000, 1, 4, size)
    add(folder, DATA[2 * PAGE : 3 * PAGE])
    assert folder.open(SHMEM) is False
    folder.add_run(0, 4, 4, size)
    add(folder, DATA[4 * PAGE : 8 * PAGE])
    assert visible(Path(folder.path))[0].startswith(".")  # nothing bears a name yet
    folder.commit()
    names = ["pagemap-1000.img", "pagemap-shmem-77.img", "pages-65537.img", "pages-65538.img"]
    assert visible(Path(folder.path)) == names
    task = Pagemap(
        0x10001,
        (PagemapEntry(0x1000, 2, 6), PagemapEntry(0x8000, 3, 2), PagemapEntry(0x10000, 1, 4)),
    )
    shmem = Pagemap(0x10002, (PagemapEntry(0, 4, 4),))
    for name, pagemap in zip(names, (task, shmem), strict=False):
        written = (Path(folder.path) / name).read_bytes()
        assert written == images.write_pagemap(pagemap, wide=size == LONG)
        assert images.parse_pagemap(written, name) == pagemap
    assert (Path(folder.path) / "pages-65537.img").read_bytes() == DATA[: 3 * PAGE]
    assert (Path(folder.path) / "pages-65538.img").read_bytes() == DATA[4 * PAGE : 8 * PAGE]
    assert (folder.tasks, folder.shmems, folder.stored_bytes) == (1, 1, 7 * PAGE)
    folder.close()
    assert visible(Path(folder.path)) == names  # what was committed stays


def test_pages_of_zeros_take_no_room(tmp_path: Path) -> None:
    """They are holes of the file, at its end, too."""
    folder = ImageFolder(str(tmp_path))
    folder.open(TASK)
    folder.add_run(0x1000, 1024, 6, LONG)
    whole = bytearray(1024 * PAGE)
    whole[5 * PAGE : 6 * PAGE] = DATA[:PAGE]
    whole[9 * PAGE - 1] = 1
    add(folder, bytes(whole), 100, 3 * PAGE, 8 * PAGE + 5)
    folder.commit()
    folder.close()
    path = tmp_path / "pages-65537.img"
    assert path.read_bytes() == whole
    assert path.stat().st_size == 1024 * PAGE
    assert path.stat().st_blocks * 512 <= 8 * PAGE
    assert folder.sparse_bytes >= 1018 * PAGE


@given(
    st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=12),
    st.lists(st.integers(0, 12 * PAGE), max_size=6),
)
def test_zeros_are_found_however_the_bytes_are_cut(kinds: list[int], places: list[int]) -> None:
    """What is said to be zeros is, and whole pages of a piece are found."""
    content = (bytes(PAGE), DATA[:PAGE], bytes(PAGE - 1) + b"\1")
    data = b"".join(content[kind] for kind in kinds)
    edges = sorted({0, len(data), *(place for place in places if place < len(data))})
    for start, end in itertools.pairwise(edges):
        piece = memoryview(data)[start:end]
        found = _zero_stretches(piece, start)
        for low, high in found:
            assert not any(piece[low:high])
        pages = {
            at for low, high in found for at in range((start + low) // PAGE, (start + high) // PAGE)
        }
        first, last = -(-start // PAGE), end // PAGE
        assert pages == {at for at in range(first, last) if kinds[at] == 0}


def test_what_is_not_committed_leaves_nothing(tmp_path: Path) -> None:
    """And another dump may come."""
    folder = ImageFolder(str(tmp_path))
    for _ in range(2):
        folder.open(TASK)
        folder.add_run(0x1000, 2, 6, LONG)
        add(folder, DATA[: 2 * PAGE])
        folder.discard()
        assert visible(tmp_path) == []
        assert (folder.tasks, folder.stored_bytes) == (0, 0)
    folder.open(TASK)
    folder.close()
    assert visible(tmp_path) == []


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the file that did not fit."""
    folder = ImageFolder(str(tmp_path))
    folder.open(TASK)
    fd = os.open("/dev/full", os.O_WRONLY)
    os.dup2(fd, folder._images[0].pages_fd)
    os.close(fd)
    with pytest.raises(OSError) as caught:
        add(folder, DATA)
    assert caught.value.filename == "pages-65537.img"
    folder.close()
    assert visible(tmp_path) == []


def test_a_name_that_cannot_be_given_takes_the_others_back(tmp_path: Path) -> None:
    """All or nothing."""
    folder = ImageFolder(str(tmp_path))
    folder.open(TASK)
    folder.add_run(0x1000, 2, 2, LONG)
    (tmp_path / "pagemap-1000.img").mkdir()
    with pytest.raises(OSError):
        folder.commit()
    assert "pages-65537.img" not in visible(tmp_path)
    folder.close()
    assert visible(tmp_path) == ["pagemap-1000.img"]


def test_a_folder_with_the_memory_of_a_dump_is_refused(tmp_path: Path) -> None:
    """Two dumps are never mixed; two receivers neither; what a killed one left goes."""
    (tmp_path / "pagemap-shmem-5.img").touch()
    with pytest.raises(UffdError, match=r"holds the memory of a dump already \(pagemap-shmem-5"):
        ImageFolder(str(tmp_path))
    (tmp_path / "pagemap-shmem-5.img").unlink()
    (tmp_path / "inventory.img").touch()
    (tmp_path / ".aiouffd-receiving-1234").mkdir()
    (tmp_path / ".aiouffd-receiving-1234" / "pages-65537.img").touch()
    folder = ImageFolder(str(tmp_path))
    assert visible(tmp_path) == ["inventory.img"]
    with pytest.raises(UffdError, match="another dump is being received there"):
        ImageFolder(str(tmp_path))
    folder.close()
    ImageFolder(str(tmp_path)).close()


def make_parent(tmp_path: Path) -> Path:
    parent = tmp_path / "first"
    parent.mkdir()
    pagemap = Pagemap(1, (PagemapEntry(0x1000, 4, 6), PagemapEntry(0x5000, 2, 1)))
    (parent / "pagemap-1000.img").write_bytes(images.write_pagemap(pagemap, wide=True))
    return parent


def test_what_is_left_to_the_parent_is_there(tmp_path: Path) -> None:
    """In one run of its or in several."""
    make_parent(tmp_path)
    folder = ImageFolder(str(tmp_path / "second"))
    folder.link_parent("../first")
    folder.link_parent("../first")
    assert os.readlink(tmp_path / "second" / "parent") == "../first"
    assert (folder.parent_has(TASK), folder.parent_has(OTHER)) == (True, False)
    assert folder.open(TASK) is True
    folder.add_run(0x2000, 5, 1, LONG)
    assert folder.parent_bytes == 5 * PAGE
    with pytest.raises(PeerError, match=r"left the page at 0x7000 of pagemap-1000\.img"):
        folder.add_run(0x7000, 1, 1, LONG)
    assert folder.open(OTHER) is False
    with pytest.raises(PeerError, match="left the page at 0x2000"):
        folder.add_run(0x2000, 1, 1, LONG)
    folder.close()


@pytest.mark.parametrize("was_there", [False, True])
@pytest.mark.parametrize("committed", [False, True])
def test_a_parent_is_one_for_good_with_the_dump(
    tmp_path: Path, was_there: bool, committed: bool
) -> None:
    """What fails leaves the folder as it was."""
    make_parent(tmp_path)
    path = tmp_path / "second"
    if was_there:
        path.mkdir()
        (path / "parent").symlink_to("../first")
    folder = ImageFolder(str(path))
    folder.link_parent("../first")
    folder.open(TASK)
    folder.add_run(0x2000, 1, 1, LONG)
    if committed:
        folder.commit()
    folder.close()
    assert ("parent" in os.listdir(path)) == (was_there or committed)
    assert len(os.listdir(path)) == (3 if committed else was_there)


def test_a_parent_that_is_not_there_or_damaged(tmp_path: Path) -> None:
    """It is named."""
    parent = make_parent(tmp_path)
    folder = ImageFolder(str(tmp_path / "second"))
    with pytest.raises(OSError) as caught:
        folder.link_parent("../nothing")
    assert caught.value.filename.endswith("second/../nothing")
    folder.link_parent(str(parent))
    (parent / "pagemap-1000.img").write_bytes(b"x" * 40)
    with pytest.raises(ImageError, match=r"parent/pagemap-1000\.img at offset 0"):
        folder.open(TASK)
    folder.close()


def test_runs_that_make_no_sense_are_the_dumpers_fault(tmp_path: Path) -> None:
    """And are refused before they are written."""
    folder = ImageFolder(str(tmp_path))
    folder.open(TASK)
    folder.add_run(0x1000, 2, 2, LONG)
    with pytest.raises(PeerError, match="at 0x2000 behind one that ends at 0x3000"):
        folder.add_run(0x2000, 2, 2, LONG)
    with pytest.raises(PeerError, match="sent the memory of task 1000 twice"):
        folder.open(TASK)
    folder.close()


def test_many_runs(tmp_path: Path) -> None:
    """More than are kept in memory."""
    folder = ImageFolder(str(tmp_path))
    folder.open(TASK)
    for number in range(5000):
        folder.add_run(0x1000 + number * 2 * PAGE, 1, 2, SHORT)
    folder.commit()
    folder.close()
    data = (tmp_path / "pagemap-1000.img").read_bytes()
    assert len(images.parse_pagemap(data, "x").entries) == 5000
