"""``aiouffd image``: the jobs as a user runs them, their statuses, and how they are interrupted."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from aiouffd.cli import main
from aiouffd.testing.sources import PAGE


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def run(folder: Path, *arguments: str) -> Done:
    """Run ``aiouffd image`` in a folder, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            status = main(["image", *arguments])
        except SystemExit as error:
            status = int(str(error.code))
    return Done(status, out.getvalue(), err.getvalue())


def succeed(folder: Path, *arguments: str) -> str:
    """Run a job that must end well."""
    done = run(folder, *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two images of 64 pages: a hole, a page of zeros; three pages of the second differ."""
    data = bytearray(random.Random(1).randbytes(1000) * 300)[: 64 * PAGE]
    data[PAGE : 2 * PAGE] = bytes(PAGE)
    with open(tmp_path / "memory.img", "wb") as file:
        file.write(data[: 32 * PAGE])
        file.seek(40 * PAGE)
        file.write(data[40 * PAGE :])
    data[32 * PAGE : 40 * PAGE] = bytes(8 * PAGE)
    data[0:PAGE] = bytes(PAGE)  # became zeros
    data[PAGE] = data[50 * PAGE] = 7
    (tmp_path / "later.img").write_bytes(data)
    return tmp_path


def test_an_image_goes_there_and_back(images: Path) -> None:
    """Packed, checked, unpacked: the same bytes and holes; smaller meanwhile."""
    said = succeed(images, "pack", "memory.img", "memory.zst", "--level", "9", "--frame", "16K")
    assert re.fullmatch(r"memory.zst: 256.0 KiB, packed into [\d.]+ KiB\n", said)
    original = (images / "memory.img").read_bytes()
    digest = hashlib.sha256(original).hexdigest()
    assert succeed(images, "verify", "memory.zst") == f"{digest}  memory.zst\n"
    succeed(images, "unpack", "memory.zst", "back.img")
    assert (images / "back.img").read_bytes() == original
    blocks = [(images / name).stat().st_blocks for name in ("memory.img", "back.img")]
    assert blocks[0] == blocks[1]


@pytest.mark.parametrize("packed", [True, False])
def test_a_difference_over_its_base_is_the_later_image(images: Path, packed: bool) -> None:
    """Three pages are kept, a page that became zeros among them; the layers verify."""
    said = succeed(images, "diff", "memory.img", "later.img", "layer", *["--pack"] * packed)
    assert said.startswith("layer: 3 of 64 pages differ")
    over = ["memory.img", "--layer", "layer"]
    succeed(images, "verify", *over, "--against", "later.img")
    succeed(images, "unpack", *over, "again.img")
    assert (images / "again.img").read_bytes() == (images / "later.img").read_bytes()
    found = json.loads(succeed(images, "info", *over, "--json", "--scan"))
    assert (found["kind"], found["size"]) == ("layers", 64 * PAGE)
    assert [layer["url"] for layer in found["layers"]] == ["memory.img", "layer"]
    assert found["layers"][1]["data_bytes"] == 3 * PAGE
    assert found["layers"][1]["kind"] == ("compressed" if packed else "file")


def test_info_is_for_people_and_programs(images: Path) -> None:
    """The table has what the JSON has."""
    succeed(images, "pack", "--dig-holes", "later.img", "later.zst")
    found = json.loads(succeed(images, "info", "later.zst", "--json", "--scan"))
    assert found["size"] == 64 * PAGE
    assert found["data_bytes"] == 64 * PAGE - found["zero_bytes"] == 55 * PAGE
    assert found["stored_bytes"] == (images / "later.zst").stat().st_size
    assert found["ratio"] == found["size"] / found["stored_bytes"]
    assert (found["frame_bytes"], found["checksums"]) == (32 << 10, True)
    text = succeed(images, "info", "later.zst", "--scan")
    for value in (found["sha256"], found["identity"], f"{64 * PAGE:,} bytes (256.0 KiB)"):
        assert value in text
    assert "14.1%: 14.1% holes, 0.0% pages of zeros" in text
    text = succeed(images, "info", "memory.img", "--layer", "later.zst")
    assert text.count("identity") == 3
    assert "together (layers)" in text


def test_what_differs_is_status_1(images: Path) -> None:
    """The digest is printed, and what it should be; without one to compare, that is said."""
    done = run(images, "verify", "memory.img", "--against", "later.img")
    digests = [
        hashlib.sha256((images / name).read_bytes()).hexdigest()
        for name in ("memory.img", "later.img")
    ]
    assert (done.returncode, done.stdout) == (1, f"{digests[0]}  memory.img\n")
    assert f"later.img is {digests[1]}" in done.stderr
    succeed(images, "verify", "memory.img", "--digest", digests[0].upper())
    assert run(images, "verify", "memory.img", "--digest", digests[1]).returncode == 1
    done = run(images, "verify", "memory.img")
    assert (done.returncode, done.stdout) == (1, "")
    assert "carries no digest" in done.stderr


def test_a_corrupt_image_is_told(images: Path) -> None:
    """A byte that changed on the disk: no digest at all, and the frame by its number."""
    succeed(images, "pack", "memory.img", "memory.zst", "--frame", "4K")
    file = bytearray((images / "memory.zst").read_bytes())
    file[100] ^= 1
    (images / "memory.zst").write_bytes(file)
    for job in (["verify", "memory.zst"], ["unpack", "memory.zst", "back.img"]):
        done = run(images, *job)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.match("aiouffd: frame 0 of the image is corrupt", done.stderr)
    assert not (images / "back.img").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pack", "missing", "out"], "missing"),
        (["pack", "memory.img", "no/where"], "no/where"),
        (["pack", "memory.img", "/dev/null"], "no regular file"),
        (["pack", "memory.img", "out", "--level", "77"], "levels are"),
        (["pack", "memory.img", "out", "--frame", "1G"], "a frame holds"),
        (["pack", "gopher://x", "out"], "gopher"),
        (["diff", "later.img", "short.img", "out"], "cannot make an image shorter"),
    ],
)
def test_mistakes_are_one_line(images: Path, arguments: list[str], says: str) -> None:
    """Status 1, what is wrong, and no new file."""
    (images / "short.img").write_bytes(b"short")
    before = sorted(os.listdir(images))
    done = run(images, *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert says in done.stderr
    assert sorted(os.listdir(images)) == before


def test_a_wrong_digest_is_status_2(images: Path) -> None:
    """What is no SHA-256 is a mistake of the command line."""
    assert run(images, "verify", "memory.img", "--digest", "abc").returncode == 2
    assert run(images).returncode == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM in the middle: the status says so, and no file is left."""
    image = tmp_path / "memory.img"
    with open(image, "wb") as file:
        file.writelines(random.Random(seed).randbytes(1 << 20) for seed in range(64))
    command = ["pack", "memory.img", "memory.zst", "--level", "22", "--frame", "1M"]
    with subprocess.Popen(
        [sys.executable, "-m", "aiouffd", "image", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while len(os.listdir(tmp_path)) == 1 and process.poll() is None:
            os.sched_yield()  # until it has begun its file
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 143), said
    assert said == ""
    assert os.listdir(tmp_path) == ["memory.img"]
