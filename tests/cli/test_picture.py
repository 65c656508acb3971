"""Pictures in a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from aiouffd.cli.picture import CELLS, can_show, printable, rows, scale, shade_of, shades


@pytest.mark.parametrize(
    "encoding, expected", [("utf-8", " ░▒▓█"), ("ascii", " .:*#"), ("latin-1", " .:*#")]
)
def test_shades_are_what_the_terminal_has(
    monkeypatch: pytest.MonkeyPatch, encoding: str, expected: str
) -> None:
    """Blocks, or letters where there are none."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert shades() == expected
    assert can_show("é") == (encoding != "ascii")


@pytest.mark.parametrize(
    "density, shade",
    [
        (0, "0"),
        (0.001, "1"),
        (0.249, "1"),
        (0.25, "2"),
        (0.5, "3"),
        (0.75, "4"),
        (1, "4"),
        (9, "4"),
    ],
)
def test_the_darker_the_more(density: float, shade: str) -> None:
    """The least of something is not nothing."""
    assert shade_of(density, "01234") == shade


def test_rows_have_labels() -> None:
    """As many as there are rows; the last one may be shorter."""
    assert list(rows(["#"] * (CELLS + 2), ["0", "64"])) == [
        f"{'0':>14} |{'#' * CELLS}|",
        f"{'64':>14} |##|",
    ]
    assert scale("01234") == "1 up to 1/4, 2 1/2, 3 3/4, 4 all"


def test_text_of_files_is_harmless() -> None:
    """Control characters are spelled out."""
    assert printable("a\x1b[2J\u202eé\n") == r"a\x1b[2J\u202eé\n"
