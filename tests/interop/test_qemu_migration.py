"""QEMU's own migration, with which ours is compared: the measure is measured."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from benchmarks.contest import RunFailed
from benchmarks.guest import READY, firmware
from benchmarks.qemu_migration import QemuFigures, QemuSettings, missing, qemu, run

pytestmark = [
    pytest.mark.root,
    pytest.mark.once,
    pytest.mark.skipif(missing() != "", reason=f"{missing()}; or sudo make interop"),
]

SMALL = QemuSettings(memory_mib=64, writes=0.1, bandwidth=128 << 20)


def test_after_the_switch_pages_are_asked_for_and_timed() -> None:
    """Post-copy: each page that was asked for has a wait, and memory is sent about once."""
    figures = run(SMALL)
    assert figures.converged
    assert 0 < figures.requests <= figures.faults
    assert 0 < len(figures.latencies_us) <= figures.faults
    assert figures.latencies_us == tuple(sorted(figures.latencies_us))
    p50, p99 = figures.p50_us, figures.p99_us
    assert p50 is not None
    assert p99 is not None
    assert 0 < p50 <= p99 <= figures.total_ms * 1000
    assert figures.stopped_us > 0
    assert 0.9 < figures.sent_ratio < 2  # at the switch, some pages are on their way already


def test_pages_have_a_line_of_their_own() -> None:
    """The same with postcopy-preempt."""
    figures = run(dataclasses.replace(SMALL, preempt=True, scattered=False))
    assert figures.converged
    assert figures.latencies_us


def test_one_pass_comes_before_the_switch() -> None:
    """Hybrid: what was written meanwhile is sent again."""
    figures = run(dataclasses.replace(SMALL, mode="hybrid"))
    assert figures.converged
    assert figures.passes > 2
    assert figures.sent_ratio > 1


def test_before_the_switch_everything_is_sent() -> None:
    """Pre-copy: nobody asks for anything."""
    figures = run(dataclasses.replace(SMALL, mode="precopy", writes=0.0))
    assert figures.converged
    assert (figures.requests, figures.latencies_us) == (0, ())
    assert (figures.p50_us, figures.p99_us) == (None, None)


def test_what_does_not_converge_is_called_off() -> None:
    """Pre-copy of a guest that writes faster than the line: it goes on where it was."""
    slow = dataclasses.replace(
        SMALL, mode="precopy", writes=1.0, bandwidth=16 << 20, downtime_limit_ms=1, seconds=0.5
    )
    figures = run(slow)
    assert not figures.converged
    assert figures.passes > 0
    assert 0 < figures.sent_ratio < 1


def test_a_guest_with_damaged_memory_says_so(tmp_path: Path) -> None:
    """A guest that is told of more memory than it has finds pages that are not what they were."""
    (tmp_path / "guest.rom").write_bytes(firmware(64 << 20))
    with qemu(QemuSettings(memory_mib=32), tmp_path, "guest") as guest:
        with pytest.raises(RunFailed, match="damaged"):
            guest.until(lambda: guest.rounds() > 0, "the guest has checked its memory")
        assert guest.serial.read_bytes().startswith(READY)


def test_a_qemu_that_fails_is_no_figure() -> None:
    """The error says what QEMU said."""
    with pytest.raises(RunFailed, match="invalid accelerator"):
        run(dataclasses.replace(SMALL, accel="nothing"))


def test_figures_are_plain_numbers() -> None:
    """A ratio and quantiles, of what is known; by hand."""
    waits = list(range(1, 201))
    random.shuffle(waits)
    figures = QemuFigures(
        converged=True,
        downtime_ms=1,
        stopped_us=1,
        total_ms=1,
        sent=3,
        memory=2,
        passes=1,
        requests=200,
        blocked_ms=1,
        faults=200,
        latencies_us=tuple(sorted(waits)),
    )
    assert (figures.sent_ratio, figures.p50_us, figures.p99_us) == (1.5, 100, 198)
    sample = figures.as_sample()
    assert (sample["stopped_ns"], sample["total_ns"], sample["p99_ns"]) == (1e3, 1e6, 198e3)
    assert "p50_ns" not in dataclasses.replace(figures, latencies_us=()).as_sample()
    with pytest.raises(RunFailed, match="did not converge"):
        dataclasses.replace(figures, converged=False).as_sample()
