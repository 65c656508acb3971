"""Plots of checkpoints: what is in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiouffd.errors import UffdError
from aiouffd.protocols.criu.plot import MOST, plot
from aiouffd.protocols.criu.survey import Cell, Picture

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'aiouffd[plot]'")

PICTURE = Picture(
    4096, 3 * 4096, (Cell(0, (1, 0, 0)), Cell(4096, (0, 0.5, 0)), Cell(8192, (0, 0, 0)))
)


@pytest.mark.leaky("matplotlib keeps the fonts open that it has used")
def test_titles_and_kinds_are_written(tmp_path: Path) -> None:
    """Titles as they are, kinds that are there, not more pictures than can be seen."""
    pytest.importorskip("matplotlib").rcParams["svg.fonttype"] = "none"  # text stays text
    output = tmp_path / "x.svg"
    plot([(f"${number} é$", PICTURE) for number in range(MOST + 1)], output)
    text = output.read_text(encoding="utf-8")
    assert "$0 é$" in text
    assert f"${MOST - 1} é$" in text
    assert f"${MOST} é$" not in text
    assert "may come lazily" in text
    assert "only its page server has it" in text
    assert "must be there at once" not in text
    plot([], tmp_path / "nothing.png")


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    """Before anything is drawn."""
    with pytest.raises(UffdError, match=r"a plot is a \.png or an \.svg"):
        plot([("x", PICTURE)], tmp_path / "x.pdf")
