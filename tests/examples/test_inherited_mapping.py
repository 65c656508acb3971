"""examples/inherited_mapping.py, run as its first lines say."""

from __future__ import annotations

import pytest

from tests.examples.running import ROOT, run_example


@pytest.mark.root
def test_the_second_worker_answers_first() -> None:
    """The workers' order is what the example says, every time."""
    for _ in range(3):
        assert run_example("inherited_mapping.py") == [
            "3 - 1 = -2",
            "the careful one: 3 - 1 = 2",
        ]


def test_it_fits_on_a_page() -> None:
    """It stays under sixty lines."""
    assert len((ROOT / "examples/inherited_mapping.py").read_text().splitlines()) < 60
