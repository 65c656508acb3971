"""``aiouffd migrate report``: figures and pictures of what a migration was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aiouffd.cli import main
from aiouffd.migration import report as reports
from tests.stand_in_vmm import ROOT

SOURCE: dict[str, Any] = {
    "memory_bytes": 256 << 20,
    "sent_bytes": 300 << 20,
    "sent_over_memory": 300 / 256,
    "zero_bytes": 1 << 20,
    "page_bytes": 299 << 20,
    "again_bytes": 1 << 20,
    "demand": 120,
    "demand_bytes": 120 << 12,
    "stopped_after": 3.0,
    "downtime": 0.0123,
    "seconds": 4.0,
    "connections": 2,
    "disconnected": 0.25,
    "rounds": [
        {
            "number": number,
            "seconds": 1.0,
            "sent_bytes": 100 << 20,
            "dirty_bytes": 40 << 20,
            "dirty_rate": float(40 << 20),
        }
        for number in (1, 2)
    ],
    "samples": [
        {
            "seconds": at * 0.05,
            "stage": "copying",
            "sent_bytes": at * (3 << 20),
            "page_bytes": at * (3 << 20),
            "zero_bytes": 0,
            "left_bytes": 0,
            "dirty_rate": 0.0,
            "demand": 0,
        }
        for at in range(80)
    ],
}
DESTINATION: dict[str, Any] = {
    "faults": 120,
    "failures": 0,
    "p50": 0.0001,
    "p99": 0.001,
    "longest": 0.01,
    "demand_faults": 110,
    "demand_p50": 0.000567,
    "demand_p99": 0.0123,
    "demand_longest": 0.0234,
    "stall": 0.5,
    "stall_by_thread": {"70": 0.3, "71": 0.2},
    "timeline": {
        "step": 0.1,
        "ran_after": 0.002,
        "faults": [12] * 10,
        "stall": {"70": [0.03] * 10, "71": [0.02] * 10, "others": [0.001] * 10},
    },
}


def document(**other: Any) -> dict[str, Any]:
    made = reports._document(
        "source",
        source=SOURCE,
        destination=DESTINATION,
        stage="done",
        left_bytes=0,
        dirty_rate=float(40 << 20),
        rounds=2,
    )
    about = {"name": "worker", "peer": "10.0.0.7:7440", "outcome": "moved", "error": ""}
    return made | about | other


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "report.json"
    reports.save(document(), path)
    return path


def test_people_get_a_table(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What has become of it, what it has cost, and each round."""
    assert main(["migrate", "report", str(file)]) == 0
    assert capsys.readouterr().out == (
        "program        worker, to 10.0.0.7:7440\n"
        "outcome        it has moved\n"
        "stood still    12.3 ms\n"
        "in all         4.00 s, 2 rounds before the switch\n"
        "sent           300.0 MiB for 256.0 MiB of memory, 1.17 times as much;"
        " 1.0 MiB were zeros\n"
        "demand faults  110, half of them within 567 us, 99 % within 12.3 ms\n"
        "stall          500.0 ms in all: thread 70 300.0 ms, thread 71 200.0 ms\n"
        "line           broke 1 time, 250.0 ms without one, 1.0 MiB sent again\n"
        "\n"
        "round       took        sent       dirty    dirty rate\n"
        "    1     1.00 s   100.0 MiB    40.0 MiB    40.0 MiB/s\n"
        "    2     1.00 s   100.0 MiB    40.0 MiB    40.0 MiB/s\n"
    )


def test_a_failure_is_said_and_harms_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the other side has said is text, whatever it sends."""
    file = tmp_path / "report"
    reports.save(document(outcome="unknown", error="\x1b[2J gone", name="\x07"), file)
    assert main(["migrate", "report", str(file)]) == 0
    out = capsys.readouterr().out
    assert "where it runs is not known" in out
    assert "\x1b" not in out
    assert "\x07" not in out


def test_programs_get_the_figures(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without what they came from, which is in the file."""
    assert main(["migrate", "report", str(file), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["outcome"] == "moved"
    assert value["figures"]["downtime"] == 0.0123
    assert value["figures"]["stall_by_thread"] == {"70": 0.3, "71": 0.2}
    assert "source" not in value


@pytest.mark.leaky("matplotlib keeps the fonts open that it has used")
@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG\r\n"), ("svg", b"<?xml version")])
def test_a_picture_is_drawn(file: Path, suffix: str, magic: bytes) -> None:
    """Of a whole report, and of one of which next to nothing is known."""
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'aiouffd[plot]'")
    full, empty = file.with_name(f"full.{suffix}"), file.with_name(f"empty.{suffix}")
    assert main(["migrate", "report", str(file), "--output", str(full)]) == 0
    value = document(outcome="source")
    value["source"], value["destination"] = {}, {}
    value["figures"] |= {"seconds": 0.0}
    reports.save(value, file)
    assert main(["migrate", "report", str(file), "--output", str(empty)]) == 0
    assert full.read_bytes().startswith(magic)
    assert empty.read_bytes().startswith(magic)
    assert full.stat().st_size > empty.stat().st_size
    if suffix == "svg":  # text is drawn as paths there, which say what they are in comments
        text = full.read_text()
        for word in ("stands still", "round 1", "runs there", "thread 70", "others", "sent"):
            assert f"<!-- {word} -->" in text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "is no report of a migration"),
        ("[]", "is no report of a migration"),
        ('{"version": 1}', "is no report of a migration"),
        ('{"version": 9, "figures": {}}', "version 9"),
        ('{"version": 1, "figures": {"downtime": "x"}}', "is not what it should be"),
    ],
)
def test_another_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, text: str
) -> None:
    """In one line."""
    file = tmp_path / "other"
    file.write_text(content)
    assert main(["migrate", "report", str(file)]) == 1
    assert text in capsys.readouterr().err


@pytest.mark.leaky("matplotlib keeps the fonts open that it has used")
def test_a_damaged_report_is_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the picture, too."""
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'aiouffd[plot]'")
    value = document()
    value["source"] = {"samples": [{}, {}]}
    reports.save(value, file)
    output = file.with_name("picture.png")
    assert main(["migrate", "report", str(file), "--output", str(output)]) == 1
    assert "not what it should be" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.once
def test_without_matplotlib_the_extra_is_named(file: Path) -> None:
    """And everything else of the command works."""
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from aiouffd.cli import main\n"
        f"assert main(['migrate', 'report', {str(file)!r}]) == 0\n"
        f"sys.exit(main(['migrate', 'report', {str(file)!r}, '--output', 'x.png']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert "pip install 'aiouffd[plot]'" in done.stderr
