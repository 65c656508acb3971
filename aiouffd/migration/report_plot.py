"""Draw the timeline of a migration into a file.

Knows: the report of a migration, what a figure consists of.
Must not know: command lines.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..plotting import new_figure
from .report import ReportError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MIB: Final = 1 << 20
_LEAST_STEP: Final = 1 / 300  # of the whole time, over which a rate is taken
_THREADS: Final = 9  # with a colour of their own
_OTHERS: Final = "0.6"  # a grey
_STOOD: Final = "tab:red"


def plot(report: dict[str, Any], output: str | os.PathLike[str]) -> None:
    """Draw over one axis of time: dirty rate, bandwidth, demand faults, stall per thread.

    Args:
        report: As ``report.load`` gives it; of either side, but the source knows more.
        output: Where to, by its suffix: .png or .svg.

    Raises:
        ImportError: matplotlib is missing: ``pip install 'aiouffd[plot]'``.
        ReportError: The report is not what it should be.
        UffdError: The suffix is another.
    """
    figure = new_figure(output, height=8.0)
    try:
        source, there = report["source"], report["destination"]
        samples = source.get("samples") or []
        timeline = there.get("timeline") or {"step": 1.0, "faults": [], "stall": {}}
        runs = float(source.get("stopped_after", 0.0)) + float(source.get("downtime", 0.0))
        began = runs - float(timeline.get("ran_after", 0.0))
        axes = figure.subplots(3, 1, sharex=True)
        _traffic(axes[0], samples, source)
        _faults(axes[1], timeline, began)
        _stalls(axes[2], timeline, began)
        seconds = max(float(report["figures"]["seconds"]), runs) or 1.0
        for each in axes:
            _stages(each, source, report["figures"])
            each.set_xlim(0, seconds)
            each.set_ylim(bottom=0)
            each.grid(alpha=0.25)
            each.spines[["top", "right"]].set_visible(False)
        _name_stages(axes[0], source, seconds, bool(samples))
        axes[-1].set_xlabel("seconds since it began")
        figure.suptitle(_title(report))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(f"the report is not what it should be: {error!r}") from error
    figure.savefig(output)


def _title(report: dict[str, Any]) -> str:
    figures = report["figures"]
    name = report.get("name") or "a program"
    to = "to" if report.get("side") == "source" else "from"
    outcome = "" if report.get("outcome") == "moved" else f" ({report.get('outcome')})"
    return (
        f"{name} {to} {report.get('peer')}{outcome}: {figures['memory_bytes'] / _MIB:.0f} MiB"
        f" in {figures['seconds']:.2f} s, stood still for {figures['downtime'] * 1e3:.1f} ms,\n"
        f"sent {figures['sent_over_memory']:.2f} times its memory,"
        f" {figures['demand_faults']} demand faults (p50 {figures['demand_p50'] * 1e3:.2f} ms,"
        f" p99 {figures['demand_p99'] * 1e3:.2f} ms)"
    )


def _rounds(source: dict[str, Any]) -> Iterator[tuple[dict[str, Any], float, float]]:
    """Give each round with its beginning and its end: the last ends with the order to stop."""
    rounds = source.get("rounds") or []
    at = max(float(source.get("stopped_after") or 0.0) - sum(x["seconds"] for x in rounds), 0.0)
    for each in rounds:
        yield each, at, at + each["seconds"]
        at += each["seconds"]


def _traffic(axes: Axes, samples: Sequence[dict[str, Any]], source: dict[str, Any]) -> None:
    """Draw what was sent, and what the program wrote meanwhile."""
    times, rates = _rates(samples, "sent_bytes")
    axes.stairs([rate / _MIB for rate in rates], times or [0.0], fill=True, alpha=0.25)
    axes.stairs([rate / _MIB for rate in rates], times or [0.0], color="tab:blue", label="sent")
    rounds = list(_rounds(source))
    if rounds:
        dirty = [each["dirty_rate"] / _MIB for each, _, _ in rounds]
        edges = [rounds[0][1], *(end for _, _, end in rounds)]
        axes.stairs(dirty, edges, color="tab:orange", linewidth=1.8, label="written meanwhile")
    axes.set_ylabel("MiB/s")
    _explain(axes)


def _explain(axes: Axes) -> None:
    """Say what is what, beside the drawing: it would hide the end of a migration."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", frameon=False)


def _rates(samples: Sequence[dict[str, Any]], what: str) -> tuple[list[float], list[float]]:
    """Give the edges of steps, and how fast a figure grew in each."""
    if len(samples) < 2:
        return [], []
    least = (samples[-1]["seconds"] - samples[0]["seconds"]) * _LEAST_STEP
    edges, rates, last = [samples[0]["seconds"]], [], samples[0]
    for each in samples[1:]:
        passed = each["seconds"] - last["seconds"]
        if passed > max(least, 0.01):
            edges.append(each["seconds"])
            rates.append((each[what] - last[what]) / passed)
            last = each
    return edges, rates


def _edges(timeline: dict[str, Any], began: float) -> list[float]:
    step = float(timeline["step"])
    return [began + number * step for number in range(len(timeline["faults"]) + 1)]


def _faults(axes: Axes, timeline: dict[str, Any], began: float) -> None:
    """Draw the faults at the destination."""
    rates = [count / timeline["step"] for count in timeline["faults"]]
    axes.stairs(rates, _edges(timeline, began), fill=True, color="tab:green", alpha=0.8)
    axes.set_ylabel("demand faults/s")


def _stalls(axes: Axes, timeline: dict[str, Any], began: float) -> None:
    """Draw which share of its time each thread has waited, one on top of the other."""
    step, edges = timeline["step"], _edges(timeline, began)
    threads = sorted(timeline["stall"].items(), key=lambda item: -sum(item[1]))
    named = [each for each in threads if each[0] != "others"][:_THREADS]
    rest = [values for name, values in threads if name not in dict(named)]
    lines = [(f"thread {name}", values, f"C{at}") for at, (name, values) in enumerate(named)]
    if rest:
        lines.append(("others", [sum(each) for each in zip(*rest, strict=True)], _OTHERS))
    below = [0.0] * len(timeline["faults"])
    for label, values, color in lines:
        above = [low + value / step for low, value in zip(below, values, strict=True)]
        axes.stairs(above, edges, baseline=below, fill=True, color=color, label=label)
        below = above
    axes.set_ylabel("threads that wait")
    if lines:
        _explain(axes)


def _stages(axes: Axes, source: dict[str, Any], figures: dict[str, Any]) -> None:
    """Mark the rounds, and the time in which it stood still."""
    for _, start, _ in _rounds(source):
        axes.axvline(start, color="0.75", linewidth=0.8, zorder=0)
    stopped = source.get("stopped_after")
    if stopped:
        axes.axvspan(stopped, stopped + figures["downtime"], color=_STOOD, alpha=0.35, zorder=0)


def _name_stages(axes: Axes, source: dict[str, Any], seconds: float, is_known: bool) -> None:
    """Write above the first drawing what happened when, where there is room."""
    if not is_known:
        return
    stopped = float(source.get("stopped_after") or 0.0)
    runs = stopped + float(source.get("downtime") or 0.0)
    spans = [(f"round {each['number']}", start, end) for each, start, end in _rounds(source)]
    if runs < seconds and stopped:
        spans.append(("runs there", runs, seconds))
    for text, start, end in spans:
        if (end - start) / seconds > 0.012 * len(text):
            _write(axes, (start + end) / 2, 1.02, text, "0.3")
    if stopped:
        _write(axes, (stopped + runs) / 2, 1.09, "stands still", _STOOD)


def _write(axes: Axes, at: float, height: float, text: str, color: str) -> None:
    """Write above a drawing."""
    where = axes.get_xaxis_transform()
    axes.text(at, height, text, transform=where, ha="center", fontsize="small", color=color)
