"""examples/child_program.py, run as its first lines say."""

from __future__ import annotations

from tests.examples.running import ROOT, run_example

STANDS = "consumer has read the length and stands before the text"


def test_the_record_changes_while_the_program_stands() -> None:
    """Half of one record and half of another is printed every time, and never by the repair."""
    for _ in range(3):
        assert run_example("child_program.py") == [
            STANDS,
            "it prints: Bob pays 2",
            STANDS,
            "the careful one: Bob pays 2000",
        ]


def test_it_fits_on_a_page() -> None:
    """It stays under sixty lines."""
    assert len((ROOT / "examples/child_program.py").read_text().splitlines()) < 60
