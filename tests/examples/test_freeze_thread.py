"""examples/freeze_thread.py, run as its first lines say."""

from __future__ import annotations

from tests.examples.running import ROOT, run_example


def test_the_price_changes_while_the_till_stands_still() -> None:
    """The race is seen every time."""
    for _ in range(10):
        assert run_example("freeze_thread.py") == ["the receipt says 10, the till charges 20"]


def test_it_fits_on_a_page() -> None:
    """It stays under sixty lines."""
    assert len((ROOT / "examples/freeze_thread.py").read_text().splitlines()) < 60
