"""examples/live_snapshot.py, run as its first lines say."""

from __future__ import annotations

import re

from tests.examples.running import ROOT, run_example


def test_one_instant_and_many() -> None:
    """The plain copy is torn, the snapshot is not; a writer waits for milliseconds."""
    plain, snapshot, waits = run_example("live_snapshot.py")
    found = re.fullmatch(r"read while it runs: up to (\d+) pages of another instant", plain)
    assert found
    assert int(found[1]) > 0
    assert snapshot == "live snapshot: 0 pages of another instant"
    assert re.fullmatch(r"protected in [\d.]+ ms, the longest wait [\d.]+ ms", waits)


def test_it_fits_on_two_pages() -> None:
    """It stays under a hundred lines."""
    assert len((ROOT / "examples/live_snapshot.py").read_text().splitlines()) < 100
