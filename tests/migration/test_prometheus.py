"""A migration's metrics: the report's figures, under documented names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aiouffd.migration.report import _document
from aiouffd.migration.stages import Stage

pytest.importorskip("prometheus_client", reason="needs it: pip install 'aiouffd[metrics]'")

from aiouffd.migration.prometheus import collect, text_of

DOCS = Path(__file__).resolve().parent.parent.parent / "docs/reference/migration-report.md"


def values(report: dict[str, Any] | None) -> dict[str, float]:
    """Give each series with its value."""
    return {
        sample.name + "".join(f"/{label}" for label in sample.labels.values()): sample.value
        for metric in collect(report)
        for sample in metric.samples
        if not sample.name.endswith("_info")
    }


def test_every_figure_is_a_metric() -> None:
    """Numbers as they are, those by thread with a label."""
    source = {"memory_bytes": 1, "sent_bytes": 2, "downtime": 0.5, "demand": 7}
    there = {"faults": 9, "demand_p50": 0.25, "stall_by_thread": {"70": 1.5}}
    report = _document(
        "source",
        source=source,
        destination=there,
        stage="following",
        left_bytes=3,
        dirty_rate=4.0,
        rounds=5,
    )
    found = values(report)
    names = {name.removeprefix("aiouffd_migration_"): value for name, value in found.items()}
    assert names.items() >= {
        ("memory_bytes", 1),
        ("sent_bytes_total", 2),
        ("downtime_seconds", 0.5),
        ("demands_total", 7),
        ("faults_total", 9),
        ("demand_fault_seconds/0.5", 0.25),
        ("stall_seconds_total/70", 1.5),
        ("left_bytes", 3),
        ("dirty_bytes_per_second", 4),
        ("rounds_total", 5),
        ("stage/following", 1),
        ("stage/done", 0),
    }
    numbers = [name for name in report["figures"] if name not in {"stall", "stall_by_thread"}]
    series = {name for name in names if not name.startswith(("stage/", "stall_seconds"))}
    assert len(series) == len(numbers)


def test_before_the_first_migration_they_are_zero() -> None:
    """They are there all the same."""
    found = values(None)
    assert set(found.values()) == {0}
    assert {f"aiouffd_migration_stage/{stage.value}" for stage in Stage} < found.keys()


def test_they_are_documented() -> None:
    """Each by its name."""
    text = DOCS.read_text(encoding="utf-8")
    for metric in collect(None):
        name = metric.name.removeprefix("aiouffd_migration_")
        name += "_total" if metric.type == "counter" else ""
        if metric.type != "info":
            assert f"`{name}" in text or f"`aiouffd_migration_{name}" in text, name


async def test_a_scrape_is_text() -> None:
    """With the figures of the process itself."""
    text = (await text_of(lambda: None)()).decode()
    assert "aiouffd_migration_faults_total 0.0" in text
    assert "process_open_fds" in text
