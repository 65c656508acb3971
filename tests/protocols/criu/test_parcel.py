"""Parcels: what of a checkpoint goes where it is restored, and what is refused there."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from aiouffd.errors import PeerError, SourceError
from aiouffd.protocols.criu import parcel
from aiouffd.protocols.criu.checkpoint import STRIPPED, Checkpoint
from tests.protocols.criu.checkpoints import PAGE, Made, Memory, anonymous, lone_task
from tests.protocols.criu.test_strip import entries, held, mixed

MAGIC = b"aiouffd checkpoint 1\n"


async def packed(folder: Path) -> bytes:
    """Pack a checkpoint."""
    async with await Checkpoint.open(folder) as checkpoint:
        return parcel.pack(checkpoint, {"port": 7})


def made(head: object, body: bytes = b"") -> bytes:
    """A parcel with any list."""
    text = json.dumps(head).encode()
    return MAGIC + struct.pack("<I", len(text)) + text + body


async def test_what_is_read_at_once_travels(tmp_path: Path) -> None:
    """Images and shared memory in full, of pages what is not lazy, at its offset; no logs."""
    folder, out = mixed(tmp_path / "c"), tmp_path / "out"
    out.mkdir()
    assert parcel.unpack(await packed(folder), str(out)) == {"port": 7}
    images = {path.name for path in folder.iterdir() if path.name.endswith(".img")}
    assert {path.name for path in out.iterdir()} == images | {STRIPPED}
    for name in images - {"pages-1.img"}:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    before, after = (folder / "pages-1.img").read_bytes(), (out / "pages-1.img").read_bytes()
    assert len(after) == len(before)
    assert held(out / "pages-1.img") == [(20 * PAGE, 2 * PAGE), (32 * PAGE, 5 * PAGE)]
    for start, length in held(out / "pages-1.img"):
        assert after[start : start + length] == before[start : start + length]
    assert all(path.stat().st_mode & 0o077 == 0 for path in out.iterdir())


async def test_nothing_is_written_over(tmp_path: Path) -> None:
    """A file or a link that is there already is no place for an image."""
    folder, out = mixed(tmp_path / "c"), tmp_path / "out"
    out.mkdir()
    os.symlink("/dev/null", out / "files.img")
    with pytest.raises(FileExistsError):
        parcel.unpack(await packed(folder), str(out))


async def test_a_checkpoint_with_a_parent_does_not_travel(tmp_path: Path) -> None:
    """Its pages lie in two folders."""
    base = 0x7F00_0000_0000
    vmas = [anonymous(base, 4)]
    first = Memory(vmas, entries((0, 4, 6)), bytes(4 * PAGE))
    second = Memory(vmas, entries((0, 2, 1), (2, 2, 6)), bytes(2 * PAGE))
    Made({10: first}, [lone_task(10)]).write(tmp_path / "a")
    Made({10: second}, [lone_task(10)]).write(tmp_path / "b", parent="../a")
    with pytest.raises(SourceError, match="leans on a parent"):
        await packed(tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../evil.img", "named"),
        ("/etc/evil.img", "named"),
        (".img", "named"),
        ("a/b.img", "named"),
        ("evil", "named"),
        ("evil.img\n", "named"),
        ("evil\0.img", "named"),
        (7, "named"),
    ],
)
def test_names_are_plain(tmp_path: Path, name: object, said: str) -> None:
    """Nothing is written outside of the folder, or under another kind of name."""
    with pytest.raises(PeerError, match=said):
        parcel.unpack(made({"notes": {}, "files": [[name, 0, []]]}), str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("files", "body"),
    [
        pytest.param([["a.img", 4, [[0, 4]]]], b"abc", id="shorter"),
        pytest.param([["a.img", 4, [[0, 4]]]], b"abcde", id="longer"),
        pytest.param([["a.img", 4, [[2, 4]]]], b"abcd", id="beyond the end"),
        pytest.param([["a.img", 8, [[0, 4], [2, 2]]]], b"abcdef", id="overlapping"),
        pytest.param([["a.img", 8, [[-4, 4]]]], b"abcd", id="negative place"),
        pytest.param([["a.img", 8, [[0, -4], [0, 4]]]], b"", id="negative length"),
        pytest.param([["a.img", 1 << 60, []]], b"", id="huge"),
        pytest.param([["a.img", True, []]], b"", id="no number"),
        pytest.param([["a.img", 0, []], ["a.img", 0, []]], b"", id="twice"),
        pytest.param([["a.img", 0]], b"", id="without pieces"),
        pytest.param([["a.img", 0, [[0]]]], b"", id="half a piece"),
        pytest.param(7, b"", id="no list"),
    ],
)
def test_numbers_are_checked(tmp_path: Path, files: Any, body: bytes) -> None:
    """Whatever the list says, nothing is written unless all of it fits together."""
    with pytest.raises(PeerError):
        parcel.unpack(made({"notes": {}, "files": files}, body), str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"aiouffd checkpoint 2\n",
        MAGIC,
        MAGIC + b"\5\0\0\0[",
        MAGIC + struct.pack("<I", 1 << 17) + b"[" * (1 << 17),
        made([]),
    ],
    ids=range(6),
)
def test_what_is_no_parcel(tmp_path: Path, data: bytes) -> None:
    """It is said so, and nothing else happens."""
    with pytest.raises(PeerError, match="checkpoint"):
        parcel.unpack(data, str(tmp_path))
    assert not list(tmp_path.iterdir())
