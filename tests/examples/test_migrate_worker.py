"""examples/migrate_worker.py, run as its first lines say."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests.examples.running import ROOT, run_example

pytestmark = pytest.mark.once


def test_nothing_is_lost_on_the_way(tmp_path: Path) -> None:
    """All memory moves, some of it behind the program, and every step is found in it."""
    report = tmp_path / "report"
    lines = run_example("migrate_worker.py", "--report", str(report))
    steps = next(line for line in lines if line.startswith("steps"))
    before, after = map(int, re.findall(r"\d+", steps))
    assert before > 0
    assert after >= 4 * 500
    assert lines[-1].startswith("proof")
    value = json.loads(report.read_text())
    assert value["outcome"] == "moved"
    assert value["figures"]["memory_bytes"] == 256 << 20
    assert value["figures"]["demand_faults"] > 0
    if not os.geteuid():
        assert lines[0] == "network   two namespaces, joined by a veth pair"
        assert not [name for name in os.listdir("/run/netns") if name.startswith("aiouffd-")]


def test_they_fit_on_two_pages() -> None:
    """Each file stays within 120 lines."""
    for name in ("migrate_worker.py", "worker.py"):
        assert len((ROOT / "examples" / name).read_text().splitlines()) <= 120
