"""The benchmarks run; no figure is judged here, for a test that judges times fails by chance."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import raw_stream, report
from benchmarks.figures import Figure, Settings, microseconds, table, verdict
from tests.suites import CRIU

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.root
@pytest.mark.once
@pytest.mark.limit(150)
@pytest.mark.parametrize("name", report.BENCHMARKS)
def test_it_runs(name: str) -> None:
    """Each benchmark runs through, with every case, and prints what programs can read."""
    if name == "bench_criu" and not any(foreign.is_there() for foreign in CRIU):
        pytest.skip("needs CRIU in build/suites: sudo make interop")
    command = [sys.executable, "-m", f"benchmarks.{name}", "--runs=1", "--faults=64", "--json"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["settings"]["runs"] == 1
    assert document["figures"]
    for figure in document["figures"]:
        assert figure["case"]
        assert math.isfinite(figure["ratio"])


@pytest.mark.parametrize("loop", raw_stream.loops())
def test_a_raw_stream_carries_all_its_bytes(loop: str) -> None:
    """Both sides start, agree on how much it was, and end; also with a last piece that is short."""
    assert raw_stream.raw_stream(loop, size=(4 << 20) + 17, rounds=1) > 0


def test_ratio_is_taken_within_a_round() -> None:
    """A round in which the machine was slow does not change the ratio."""
    figure = Figure.compare(
        "x", ours=[15, 150, 15], floor=[10, 100, 10], unit=microseconds, at_most=1.4
    )
    assert (figure.ratio, figure.low, figure.high) == (1.5, 1.5, 1.5)
    assert verdict(figure) == "missed by 7%"
    assert "1.50 (1.50-1.50)" in table([figure])


def test_a_remedy_is_shown_only_where_a_target_is_missed() -> None:
    """What it would take stands where a target is missed, and only there."""
    values = {"ours": [15.0], "floor": [10.0], "unit": microseconds, "remedy": "a faster machine"}
    missed = Figure.compare("x", at_most=1.4, **values)  # type: ignore[arg-type]
    met = Figure.compare("x", at_most=1.6, **values)  # type: ignore[arg-type]
    assert "a faster machine" in table([missed])
    assert "a faster machine" not in table([met])


def test_page_keeps_its_text() -> None:
    """Only what stands between the markers is rewritten, however often."""
    figure = Figure.absolute("x | y", [1.0], unit=microseconds)
    text = report.body(Settings(), {"bench_observer": [figure]})
    page = f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n"
    once = report.between_markers(page, text)
    assert once.startswith("above\n")
    assert once.endswith("below\n")
    assert "old" not in once
    assert r"x \| y" in once
    assert report.between_markers(once, text) == once
    with pytest.raises(ValueError, match="figures: made by"):
        report.between_markers("no markers", text)


def test_a_section_alone_is_rewritten() -> None:
    """A benchmark measured by itself takes its old figures' place, and leaves the others'."""
    old = {
        name: [Figure.absolute(f"old {name}", [1.0], unit=microseconds)]
        for name in ("bench_fault", "bench_observer")
    }
    new = Figure.absolute("new", [1.0], unit=microseconds)
    page = f"{report.BEGIN}\n{report.END}"
    page = report.between_markers(page, report.body(Settings(), old))
    once = report.with_sections(page, Settings(), {"bench_fault": [new]})
    assert "old bench_fault" not in once
    assert once.index("| new |") < once.index("old bench_observer")
    assert report.with_sections(once, Settings(), {"bench_fault": [new]}) == once
    added = report.with_sections(once, Settings(), {"bench_register": [new]})
    assert added.index("old bench_observer") < added.index(report.BENCHMARKS["bench_register"])


def test_the_docs_page_has_its_markers() -> None:
    """The page of the docs can be written to."""
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.between_markers(page, "text")
