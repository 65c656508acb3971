"""Draw a record into a file: time from left to right, pages from top to bottom.

Knows: records of touches, what a figure consists of.
Must not know: who recorded.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..plotting import new_figure
from .touch_log import TouchedPage, TouchLog
from .touches import OUTCOMES, Access, Touch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_POINTS: Final = 200_000  # more of them are one blot, and an SVG that nobody can open
_ALL_PAGES: Final = 24  # so many rows show what was not touched, too
_NAMED_ROWS: Final = 48  # with more rows only some are named
_MANY: Final = 1000  # touches: smaller markers from here on
#: Of the first threads; the others are grey, and red is for what stands out.
_COLORS: Final = ("blue", "orange", "green", "purple", "brown", "pink", "olive", "cyan")
_OTHERS: Final = "0.65"
_STANDS_OUT: Final = "tab:red"
_MARKERS: Final = {Access.READ: "o", Access.WRITE: "v"}
_OUTCOMES: Final = {"changed": "*", "failed": "x", "overdue": "X"}
_UNITS: Final = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1.0, "ns"))


@dataclass(frozen=True, slots=True)
class _Point:
    """A touch, where it is drawn."""

    start: float
    end: float
    height: float
    touch: Touch


def plot(record: TouchLog, output: str | os.PathLike[str]) -> None:
    """Draw each touch: who (colour), when, which page, read or write (marker), how long (bar).

    Args:
        record: What to draw.
        output: Where to, by its suffix: .png or .svg.

    Raises:
        ImportError: matplotlib is missing: ``pip install 'aiouffd[plot]'``.
        UffdError: The suffix is another.
    """
    touches = list(record)[:_MOST_POINTS]
    rows = _rows(record, touches)
    figure = new_figure(output, height=min(max(2.4 + 0.32 * len(rows), 3.2), 12.0))
    axes = figure.subplots()
    began_ns = record.began_ns
    scale, unit = _unit(max((x.time_ns + x.waited_ns - began_ns for x in touches), default=0))
    at = {page: row for row, page in enumerate(rows)}
    lane_of = {thread: min(lane, len(_COLORS)) for lane, thread in enumerate(record.threads())}
    lanes: list[list[_Point]] = [[] for _ in {*lane_of.values()}]
    for touch in touches:
        lane = lane_of[record.thread_of(touch)]
        start = (touch.time_ns - began_ns) / scale
        height = at[record.page_of(touch)] + ((lane + 0.5) / len(lanes) - 0.5) * 0.75
        lanes[lane].append(_Point(start, start + touch.waited_ns / scale, height, touch))
    names = [*map(str, record.threads())][: len(_COLORS)]
    colors = [f"tab:{each}" for each in _COLORS]
    for name, color, points in zip((*names, "others"), (*colors, _OTHERS), lanes, strict=False):
        _draw(axes, points, color, is_small=len(touches) > _MANY)
        axes.plot([], [], "s", color=color, label=name)
    _name_rows(axes, rows)
    if sum(layout.pages for layout in record.regions) > len(rows) > 0:
        axes.set_ylabel("pages, without those that were not touched")
    axes.set_xlim(*_limits([each for points in lanes for each in points]))
    axes.set_xlabel(f"{unit} since the record began")
    axes.set_title(_title(record, len(touches)), fontsize="medium", loc="left")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if touches:
        _explain(axes, touches)
    figure.savefig(output)


def _rows(record: TouchLog, touches: Iterable[Touch]) -> list[TouchedPage]:
    """List the pages to show, region by region in the order of their first touches.

    All of their pages, if these are few: what was not touched is worth seeing.
    """
    touched = {record.page_of(each) for each in touches}
    regions = list(dict.fromkeys(each.region for each in touches))
    layouts = [record.layouts[each] for each in regions if each in record.layouts]
    if sum(layout.pages for layout in layouts) <= _ALL_PAGES:
        touched |= {
            TouchedPage(layout.name, page, layout.page_names.get(page, ""))
            for layout in layouts
            for page in range(layout.pages)
        }
    return sorted(touched, key=lambda page: (regions.index(page.region), page.page))


def _unit(longest_ns: float) -> tuple[float, str]:
    for scale, unit in _UNITS:
        if longest_ns >= 2 * scale:
            return scale, unit
    return _UNITS[-1]


def _limits(points: Sequence[_Point]) -> tuple[float, float]:
    """Give the ends of the time shown: from the record's beginning, with room for markers."""
    first = min((0.0, *(each.start for each in points)))
    last = max((each.end for each in points), default=0.0)
    room = (last - first) * 0.02 or 0.5
    return first - room, last + room


def _draw(axes: Axes, points: Sequence[_Point], color: str, *, is_small: bool) -> None:
    """Draw the touches of a thread: bars for waits under markers for touches."""
    waits = [each for each in points if each.end > each.start]
    heights, starts, ends = ([getattr(x, of) for x in waits] for of in ("height", "start", "end"))
    axes.hlines(heights, starts, ends, color=color, linewidth=5, alpha=0.35, zorder=2)
    size, edge = (3.0, 0.7) if is_small else (7.0, 1.6)
    for access, marker in _MARKERS.items():
        those = [each for each in points if each.touch.access is access]
        axes.plot(
            [each.start for each in those],
            [each.height for each in those],
            marker,
            color=color,
            markersize=size,
            markerfacecolor="white" if access is Access.READ else color,
            markeredgewidth=edge,
            zorder=3 if color == _OTHERS else 4,
        )
    for outcome, marker in _OUTCOMES.items():
        those = [each for each in points if each.touch.outcome == outcome]
        axes.plot(
            [each.end for each in those],
            [each.height for each in those],
            marker,
            color=_STANDS_OUT,
            markersize=size + 2,
            markeredgewidth=edge,
            zorder=5,
        )


def _name_rows(axes: Axes, rows: Sequence[TouchedPage]) -> None:
    """Name pages at the left, and draw a line between regions."""
    step = -(-len(rows) // _NAMED_ROWS) or 1
    axes.set_yticks(range(0, len(rows), step), [str(each) for each in rows[::step]])
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)  # the first page on top
    if len(rows) <= _NAMED_ROWS:
        for row in range(0, len(rows), 2):
            axes.axhspan(row - 0.5, row + 0.5, color="0.96", zorder=0)
    for row, page in enumerate(rows[1:], start=1):
        if page.region != rows[row - 1].region:
            axes.axhline(row - 0.5, color="0.6", linewidth=0.8, zorder=1)


def _title(record: TouchLog, drawn: int) -> str:
    if not drawn:
        return "no touches"
    what = "touch" if record.every else "first touch"
    title = (
        f"{_count(len(record), what, 'es')} of {_count(len(record.pages()), 'page')}"
        f" by {_count(len(record.threads()), 'thread')}"
    )
    return title if drawn == len(record) else f"{title}; the first {drawn} are drawn"


def _count(number: int, thing: str, plural: str = "s") -> str:
    return f"{number} {thing}{'' if number == 1 else plural}"


def _explain(axes: Axes, touches: Collection[Touch]) -> None:
    """Say what is what, beside the drawing, as far as it is there."""
    accesses = {each.access for each in touches}
    for access, marker in _MARKERS.items():
        if access in accesses:
            fill = "white" if access is Access.READ else "0.3"
            axes.plot([], [], marker, color="0.3", markerfacecolor=fill, label=access.value)
    if any(each.waited_ns for each in touches):
        axes.plot([], [], color="0.3", linewidth=5, alpha=0.35, label="waited")
    for outcome in sorted({each.outcome for each in touches} & {*_OUTCOMES}):
        axes.plot([], [], _OUTCOMES[outcome], color=_STANDS_OUT, label=OUTCOMES[outcome])
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", frameon=False)
