"""Draw a working set into a file.

Knows: records of a set, what a figure consists of.
Must not know: command lines.
"""

from __future__ import annotations

import os
from array import array
from typing import Final

from .plotting import new_figure
from .working_set import Records, WorkingSet

_CELLS: Final = 512
_MOST_POINTS: Final = 200_000  # more of them are one blot, and an SVG that nobody can open


def plot(path: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Draw where in the image a set lies and, if it was recorded, what was asked for when.

    Args:
        path: The set.
        output: Where to, by its suffix: .png or .svg.

    Raises:
        ImportError: matplotlib is missing: ``pip install 'aiouffd[plot]'``.
        WorkingSetError: It is no set.
        UffdError: The suffix is another.
    """
    figure = new_figure(output)
    one = WorkingSet.load(path)
    mib = 1 << 20
    densities = one.densities(_CELLS)
    size = one.header.image_size / mib
    timed = not one.header.combined
    axes = figure.subplots(2 if timed else 1, 1, sharex=True, squeeze=False)
    density = axes[0][0]
    width = size / len(densities)
    density.bar(
        [number * width for number in range(len(densities))], densities, width, align="edge"
    )
    density.set_ylim(0, 1)
    density.set_ylabel("share of the memory")
    density.set_title(
        f"{os.path.basename(os.fspath(path))}: {one.length / mib:.1f} MiB,"
        f" {one.share:.1%} of the image"
    )
    if timed:
        offsets, seconds = array("d"), array("d")
        with open(path, "rb") as file:
            for number, record in enumerate(Records(file)):
                if number == _MOST_POINTS:
                    break
                offsets.append(record.offset / mib)
                seconds.append(record.seconds)
        axes[1][0].plot(offsets, seconds, ",")
        axes[1][0].set_ylabel("asked for after, seconds")
    axes[-1][0].set_xlim(0, size)
    axes[-1][0].set_xlabel("offset in the image, MiB")
    figure.savefig(output)
