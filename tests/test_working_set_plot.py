"""Plots of working sets: files that are what their suffix says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aiouffd.cli import main
from aiouffd.working_set import GRANULE, Header, WorkingSet, combine, pack_record

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'aiouffd[plot]'")
HEADER = Header(identity="image-1", image_size=2048 * GRANULE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    records = b"".join(pack_record(page * GRANULE, 1000 * page, 1) for page in range(0, 2048, 5))
    path = tmp_path / "set"
    path.write_bytes(HEADER.encode() + records)
    return path


@pytest.mark.leaky("matplotlib keeps the fonts open that it has used")
@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG\r\n"), ("svg", b"<?xml version")])
def test_a_plot_is_drawn(path: Path, suffix: str, magic: bytes) -> None:
    """By the command, for a recorded set and a combined one."""
    combine([WorkingSet.load(path)]).save(path.with_name("all"))
    sizes = []
    for name in ("set", "all"):
        output = path.with_name(f"{name}.{suffix}")
        assert main(["working-set", "show", str(path.with_name(name)), "--plot", str(output)]) == 0
        data = output.read_bytes()
        assert data.startswith(magic)
        sizes.append(len(data))
    assert sizes[0] > sizes[1]  # the recorded one has a second drawing: what came when


def test_another_suffix_is_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, status 1."""
    assert main(["working-set", "show", str(path), "--plot", str(path) + ".gif"]) == 1
    assert "a plot is a .png or an .svg" in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(path: Path) -> None:
    """And everything else of the command works."""
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from aiouffd.cli import main\n"
        f"assert main(['working-set', 'show', {str(path)!r}]) == 0\n"
        f"sys.exit(main(['working-set', 'show', {str(path)!r}, '--plot', 'x.png']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).resolve().parent.parent,
    )
    assert done.returncode == 1
    assert "pip install 'aiouffd[plot]'" in done.stderr
