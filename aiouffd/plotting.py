"""Figures drawn into files with matplotlib (extra ``plot``).

Knows: matplotlib, names of files.
Must not know: what is drawn.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from .errors import UffdError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIXES: Final = (".png", ".svg")


def new_figure(output: str | os.PathLike[str], *, height: float = 5.0) -> Figure:
    """Begin a figure, to be saved under a name.

    Args:
        output: Where it will be saved: a .png or an .svg.
        height: In inches; it is 10 wide.

    Raises:
        ImportError: matplotlib is missing: ``pip install 'aiouffd[plot]'``.
        UffdError: The suffix is another.
    """
    if not os.fspath(output).endswith(_SUFFIXES):
        raise UffdError(f"{os.fspath(output)}: a plot is a .png or an .svg")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing takes matplotlib: pip install 'aiouffd[plot]'", name="matplotlib"
        ) from error
    figure = Figure(figsize=(10, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
