"""Draw the memory of the tasks of a checkpoint into a file.

Knows: pictures of memory, what a figure consists of.
Must not know: command lines.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from ...plotting import new_figure
from .survey import Kind, Picture

CELLS: Final = 512  #: of each picture, at most
MOST: Final = 12  #: pictures in a figure

_LABELS: Final = {
    Kind.LAZY: "may come lazily",
    Kind.LIVE: "only its page server has it",
    Kind.AT_ONCE: "must be there at once",
}


def plot(pictures: Sequence[tuple[str, Picture]], output: str | os.PathLike[str]) -> None:
    """Draw pictures, one below the other.

    Args:
        pictures: Each with its title; those beyond MOST are left out.
        output: Where to, by its suffix: .png or .svg.

    Raises:
        ImportError: matplotlib is missing: ``pip install 'aiouffd[plot]'``.
        UffdError: The suffix is another.
    """
    shown = pictures[:MOST]
    figure = new_figure(output, height=1.2 + 1.8 * max(len(shown), 1))
    axes = figure.subplots(max(len(shown), 1), 1, squeeze=False)
    for (title, picture), (area,) in zip(shown, axes, strict=False):
        mib = 1 << 20
        width = picture.cell_bytes / mib
        places = [number * width for number in range(len(picture.cells))]
        below = [0.0] * len(picture.cells)
        for kind, label in _LABELS.items():
            heights = [cell.shares[kind] for cell in picture.cells]
            if any(heights):
                area.bar(
                    places, heights, width, below, align="edge", label=label, color=f"C{kind:d}"
                )
            below = [low + height for low, height in zip(below, heights, strict=True)]
        area.set_title(title, loc="left", parse_math=False)
        area.set_xlim(0, max(picture.length / mib, width))
        area.set_ylim(0, 1)
        area.set_ylabel("share dumped")
        if any(below):
            area.legend(loc="upper right")
    axes[-1][0].set_xlabel("mappings that hold pages, end to end, MiB")
    figure.savefig(output)
