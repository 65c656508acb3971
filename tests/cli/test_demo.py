"""``aiouffd demo`` as a process: on a terminal, off it, and without any rights."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

import pytest

from aiouffd.cli import demo, main
from aiouffd.events import PageFault
from aiouffd.testing.sources import image
from tests.stand_in_vmm import PAGE, ROOT

LIMIT_S: Final = 60  # on a machine that runs many tests at once; alone it takes some seconds


def run_demo(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the command off any terminal."""
    return subprocess.run(
        [sys.executable, "-m", "aiouffd", "demo", *options],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=ROOT,
        check=False,
    )


def rows_of(output: str) -> dict[str, str]:
    """Read the table at the end."""
    rows = re.findall(r"^  (\S.*?)  +(\S.*)$", output, re.MULTILINE)
    return dict(rows)


def test_pythons_own_library_is_served() -> None:
    """Without options: real bytes of this machine, equal to the file's own, in plain text."""
    done = run_demo()
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    rows = rows_of(done.stdout)
    path = demo.find_python()
    assert rows["image"].startswith(path)
    with open(path, "rb") as file:
        assert rows["SHA-256"] == hashlib.file_digest(file, "sha256").hexdigest()
    assert rows["the file's own"] == "equal"
    assert int(rows["faults"].replace(",", "")) >= os.stat(path).st_size // PAGE
    assert rows.keys() >= {"first byte after", "pages per second", "answered within", "brought"}


@pytest.mark.parametrize("size", [1, PAGE, 100 * PAGE + 17])
def test_a_file_of_ones_own_is_served(tmp_path: Path, size: int) -> None:
    """Of any size, whole pages or not."""
    file = tmp_path / "own"
    file.write_bytes(image(size))
    done = run_demo("--image", os.fspath(file))
    assert done.returncode == 0, done.stderr
    assert rows_of(done.stdout)["SHA-256"] == hashlib.sha256(image(size)).hexdigest()


@pytest.mark.limit(90)
def test_a_large_sparse_file_is_served_in_part_and_in_time(tmp_path: Path) -> None:
    """More than memory would hold: its beginning, in chunks, holes without a read."""
    file = tmp_path / "large"
    file.touch()
    os.truncate(file, 3 << 30)
    with file.open("r+b") as out:
        out.write(image(1 << 20))
    done = run_demo("--image", os.fspath(file))
    assert done.returncode == 0, done.stderr
    assert "its first 256.0 MiB are served" in done.stdout
    rows = rows_of(done.stdout)
    assert rows["the file's own"] == "equal"
    assert int(rows["faults"].replace(",", "")) < 1 << 15


def test_a_map_is_drawn_on_a_terminal(tmp_path: Path) -> None:
    """While it runs, each frame over the last; the last one is full."""
    file = tmp_path / "own"
    file.write_bytes(image(300 * PAGE))
    parent, child = pty.openpty()
    output = b""
    with open(parent, "rb", buffering=0) as terminal:
        with subprocess.Popen(
            [sys.executable, "-m", "aiouffd", "demo", "--image", file],
            stdin=child,
            stdout=child,
            stderr=child,
            cwd=ROOT,
            env=os.environ | {"COLUMNS": "80", "LINES": "24", "PYTHONIOENCODING": "utf-8"},
        ) as process:
            os.close(child)
            with contextlib.suppress(OSError):  # EIO: the child's end is closed
                while piece := terminal.read(65536):
                    output += piece
        assert process.returncode == 0
    text = output.decode().replace("\r\n", "\n")
    frames = re.split("\x1b\\[[0-9]+F", text)
    assert len(frames) > 10
    assert any("·" in frame and "█" in frame for frame in frames[1:-1])
    assert "·" not in frames[-1].partition("300 of 300 pages")[0]
    assert rows_of(text)["the file's own"] == "equal"


@pytest.mark.root
def test_it_runs_without_any_rights() -> None:
    """Scenario 40: an ordinary user, where only user-mode faults are allowed, is told so."""
    python = shutil.which("python3", path="/usr/bin")
    if python is None:
        pytest.skip("needs an interpreter that others may run: apt install python3")
    version = subprocess.run([python, "--version"], capture_output=True, text=True, check=True)
    if version.stdout < "Python 3.11":
        pytest.skip(f"{python} is older than 3.11: apt install a newer python3")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        shutil.copytree(ROOT / "aiouffd", f"{directory}/aiouffd")
        done = subprocess.run(
            [python, "-m", "aiouffd", "demo"],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            cwd=directory,
            user=65534,
            group=65534,
            extra_groups=[],
            env={"PYTHONDONTWRITEBYTECODE": "1"},
            check=False,
        )
    assert done.returncode == 0, done.stderr
    with open("/proc/sys/vm/unprivileged_userfaultfd", encoding="ascii") as file:
        if file.read().strip() == "0" and not os.access("/dev/userfaultfd", os.R_OK):
            assert "unprivileged: serving user-mode faults only" in done.stdout
    assert rows_of(done.stdout)["the file's own"] == "equal"


@pytest.mark.parametrize(
    "name, reason", [("empty", "is empty"), ("none", "No such file"), (".", "no regular file")]
)
def test_what_cannot_be_served_is_one_line(
    tmp_path: Path, name: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The file is named and the exit status is 1."""
    (tmp_path / "empty").touch()
    assert main(["demo", "--image", os.fspath(tmp_path / name)]) == 1
    assert reason in capfd.readouterr().err


def test_cells_show_how_much_of_them_is_there() -> None:
    """Nothing, something, all; and chunks count whole."""
    page_map = demo.PageMap(40 * PAGE, 0, columns=5, rows=2, unicode=False)
    assert page_map.lines() == [".....", "....."]
    page_map.end(PageFault(0, 0, PAGE), "copy", 1)
    for page in range(4, 8):
        page_map.end(PageFault(0, page * PAGE, PAGE), "copy", 1)
    page_map.begin(PageFault(0, 39 * PAGE, PAGE))
    assert page_map.lines() == ["-#...", "....."]
    assert page_map.faults == 1
    chunked = demo.PageMap(39 * PAGE, 8 * PAGE, columns=10, rows=1, unicode=True)
    chunked.end(PageFault(0, 38 * PAGE, PAGE), "copy", 1)
    assert chunked.lines() == ["········██"]
