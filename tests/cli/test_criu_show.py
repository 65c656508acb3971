"""``aiouffd criu show``: a tree, pictures, JSON, plots; and what is wrong."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from aiouffd.cli import main
from aiouffd.protocols.criu.images import PagemapEntry, Task
from tests.protocols.criu.checkpoints import PAGE, Made, Memory, anonymous, lone_task, of_file

pytestmark = pytest.mark.once

BASE = 0x7F00_0000_0000

TASKS = [
    lone_task(10, name="init"),
    Task(11, 10, 10, 10, (11, 15), "wor\x1bker", stopped=True),
    lone_task(12, 11, name="gone", dead=True),
    lone_task(13, 10, name="other"),
]


def memory(flags: int = 6) -> Memory:
    """Half of one mapping lazily, and a page of a file's that is not."""
    return Memory(
        [anonymous(BASE, 256), of_file(BASE + 256 * PAGE, 256)],
        [PagemapEntry(BASE, 128, flags), PagemapEntry(BASE + 256 * PAGE, 1, 4)],
        bytes((129 if flags & 4 else 1) * PAGE),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of four processes."""
    memories = {10: memory(), 11: memory(), 13: memory(2)}
    return Made(memories, TASKS).write(tmp_path / "c")


def test_a_tree_and_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who descends from whom, how much of each is lazy, and where it lies."""
    assert main(["criu", "show", str(folder)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    figures = "      2.0 MiB    516.0 KiB    512.0 KiB  99.2%"
    assert lines[:10] == [
        f"{folder}: 4 processes, 1 of them dead",
        "  6.0 MiB mapped, 1.5 MiB dumped, 1.5 MiB of it lazily (99.2%)",
        "  512.0 KiB is in no file: only the page server of the dump has it",
        "",
        "process           threads       mapped       dumped       lazily",
        "10 init                 1      2.0 MiB    516.0 KiB    512.0 KiB  99.2%",
        "├─ 11 wor\\x1bker        2      2.0 MiB    516.0 KiB    512.0 KiB  99.2%  stopped",
        "│  └─ 12 gone     dead: its parent has not waited for it",
        f"└─ 13 other             1{figures}  512.0 KiB at its page server",
        "",
    ]
    picture = lines[10:20]
    assert picture[0] == "10 init: mappings that hold pages, end to end"
    rows = [line.partition("|")[2].rstrip("|") for line in picture[1:9]]
    assert rows[:4] == ["█" * 64, "█" * 64, " " * 64, " " * 64]
    assert rows[4] == "x" + " " * 63
    assert picture[5].startswith("0x7f0000100000 |")
    assert picture[9].endswith("a cell is 4.0 KiB: ░ up to 1/4, ▒ 1/2, ▓ 3/4, █ all, x not lazily")
    assert lines[-1].endswith("x not lazily, ~ at its page server")
    assert lines[-9].endswith(f"|{'~' * 64}|")


def test_one_process(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--pid draws one; what cannot be drawn is said."""
    assert main(["criu", "show", str(folder), "--pid", "13"]) == 0
    out = capsys.readouterr().out
    assert "13 other: mappings" in out
    assert "10 init: mappings" not in out
    assert main(["criu", "show", str(folder), "--pid", "12"]) == 1
    assert "process 12 of" in capsys.readouterr().err
    assert main(["criu", "show", str(folder), "--pid", "14"]) == 1
    assert "there is no process 14 in" in capsys.readouterr().err


def test_many_processes_are_not_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five pictures are more than one wants to see."""
    tasks = [lone_task(10), *(lone_task(pid, 10) for pid in range(11, 15))]
    made = Made({task.pid: memory() for task in tasks}, tasks)
    assert main(["criu", "show", str(made.write(tmp_path / "c"))]) == 0
    out = capsys.readouterr().out
    assert out.endswith("--pid PID draws the memory of one of 5 processes.\n")
    assert "end to end" not in out


def test_a_deep_tree_stays_on_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From some depth on processes are not set in further."""
    tasks = [lone_task(10), *(lone_task(pid, pid - 1) for pid in range(11, 400))]
    made = Made({task.pid: Memory([], []) for task in tasks}, tasks)
    assert main(["criu", "show", str(made.write(tmp_path / "c"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 140


def test_a_terminal_without_blocks_gets_letters(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ASCII says the same."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["criu", "show", str(folder)]) == 0
    text = raw.getvalue().decode("ascii")
    assert "|- 11 wor" in text
    assert "|  `- 12 gone" in text
    assert f"|{'#' * 64}|" in text


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it, for programs."""
    assert main(["criu", "show", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["location"], found["run_id"], found["problems"]) == (str(folder), "a-run", [])
    first, second, dead, last = found["processes"]
    assert first == {
        "pid": 10,
        "ppid": 0,
        "pgid": 10,
        "sid": 10,
        "name": "init",
        "state": "alive",
        "threads": [10],
        "mappings": 2,
        "runs": 2,
        "mapped_bytes": 512 * PAGE,
        "registered_bytes": 256 * PAGE,
        "dumped_bytes": 129 * PAGE,
        "lazy_bytes": 128 * PAGE,
        "lazy_share": 128 / 129,
        "live_bytes": 0,
        "parent_bytes": 0,
        "files": [{"name": "pages-1.img", "length": 129 * PAGE}],
    }
    assert (second["state"], second["threads"]) == ("stopped", [11, 15])
    assert dead == {
        "pid": 12,
        "ppid": 11,
        "pgid": 12,
        "sid": 12,
        "name": "gone",
        "state": "dead",
        "threads": [],
    }
    assert last["live_bytes"] == 128 * PAGE


def test_files_of_pages_that_are_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rest is shown all the same; the status says that something is wrong."""
    (folder / "pages-1.img").write_bytes(b"short")
    (folder / "pages-2.img").unlink()
    assert main(["criu", "show", str(folder)]) == 1
    shown = capsys.readouterr()
    assert "4 processes" in shown.out
    size = f"{129 * PAGE} bytes"
    assert shown.err.splitlines() == [
        f"aiouffd: pages-1.img at offset 5: it is cut short: the pagemap beside it tells of {size}",
        "aiouffd: pages-2.img: No such file or directory",
    ]
    assert main(["criu", "show", str(folder), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [(one["file"], one["offset"]) for one in problems] == [
        ("pages-1.img", 5),
        ("pages-2.img", None),
    ]


def test_pages_elsewhere(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--pages says where."""
    far = tmp_path / "far"
    far.mkdir()
    for path in folder.glob("pages-*.img"):
        path.rename(far / path.name)
    assert main(["criu", "show", str(folder), "--pages", str(far)]) == 0
    assert capsys.readouterr().err == ""


def test_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, status 1."""
    assert main(["criu", "show", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"aiouffd: inventory.img: there is none in {tmp_path}: no checkpoint, or not a whole one\n"
    )


@pytest.mark.leaky("matplotlib keeps the fonts open that it has used")
@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG\r\n"), ("svg", b"<?xml version")])
def test_a_plot_is_drawn(folder: Path, suffix: str, magic: bytes) -> None:
    """One picture per process, or just that of one."""
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'aiouffd[plot]'")
    sizes = []
    for name, more in (("all", []), ("one", ["--pid", "10"])):
        output = folder / f"{name}.{suffix}"
        assert main(["criu", "show", str(folder), "--plot", str(output), *more]) == 0
        data = output.read_bytes()
        assert data.startswith(magic)
        sizes.append(len(data))
    assert sizes[0] > sizes[1]


def test_without_matplotlib_the_extra_is_named(folder: Path) -> None:
    """And everything else of the command works."""
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from aiouffd.cli import main\n"
        f"assert main(['criu', 'show', {str(folder)!r}]) == 0\n"
        f"sys.exit(main(['criu', 'show', {str(folder)!r}, '--plot', 'x.png']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 1
    assert "pip install 'aiouffd[plot]'" in done.stderr
