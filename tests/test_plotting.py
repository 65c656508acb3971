"""Figures that are to be saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiouffd.errors import UffdError
from aiouffd.plotting import new_figure

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'aiouffd[plot]'")


def test_a_suffix_says_what_is_drawn(tmp_path: Path) -> None:
    """Others are refused before anything is drawn."""
    for suffix in (".png", ".svg"):
        assert new_figure(tmp_path / f"x{suffix}", height=3).get_size_inches()[1] == 3
    with pytest.raises(UffdError, match=r"x\.gif: a plot is a \.png or an \.svg"):
        new_figure(tmp_path / "x.gif")
