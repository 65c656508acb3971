"""What a benchmark yields: figures against a floor, as a table or as JSON.

Knows: pairing of runs, medians, how a figure is shown.
Must not know: what is measured.

Every contestant runs once per round, and a ratio is taken within its round: a machine that
slows down for a second slows both sides.  The figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

#: What one run of one contestant measured, by name.
Sample = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much to measure, and where."""

    runs: int = 7  #: rounds; each contestant runs once in each
    faults: int = 20_000  #: faults per run
    cpu: int = -1  #: target and handler both run here
    seconds: float = 120.0  #: a run that takes longer has failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table."""

    case: str
    target: str  #: as the project states it, such as ``<= 1.5``; empty if it is for information
    ratio: float  #: ours to the floor's, median of the rounds (or the value, if there is no floor)
    low: float  #: the best and the worst round
    high: float
    ours: str  #: with its unit
    floor: str  #: with its unit; empty if there is none
    met: bool
    note: str = ""
    remedy: str = ""  #: what it would take, if the target is missed

    @classmethod
    def compare(
        cls,
        case: str,
        *,
        ours: Sequence[float],
        floor: Sequence[float],
        unit: Callable[[float], str],
        at_most: float | None = None,
        at_least: float | None = None,
        note: str = "",
        remedy: str = "",
    ) -> Figure:
        """Make the figure of two contestants that ran in the same rounds.

        Args:
            case: What was measured, in a few words.
            ours: One value per round.
            floor: One value per round, of what it is compared with.
            unit: Writes a value with its unit.
            at_most: The target, where less is better.
            at_least: The target, where more is better.
            note: Anything to add.
            remedy: What it would take, shown if the target is missed.
        """
        ratios = [a / b for a, b in zip(ours, floor, strict=True)]
        ratio = statistics.median(ratios)
        target = ""
        if at_most is not None:
            target = f"<= {at_most:g}"
        elif at_least is not None:
            target = f">= {at_least:g}"
        return cls(
            case=case,
            target=target,
            ratio=ratio,
            low=min(ratios),
            high=max(ratios),
            ours=unit(statistics.median(ours)),
            floor=unit(statistics.median(floor)),
            met=(at_most is None or ratio <= at_most) and (at_least is None or ratio >= at_least),
            note=note,
            remedy=remedy,
        )

    @classmethod
    def absolute(
        cls,
        case: str,
        values: Sequence[float],
        *,
        unit: Callable[[float], str],
        at_most: float | None = None,
        note: str = "",
        remedy: str = "",
    ) -> Figure:
        """Make a figure that has no floor: the ratio is the value itself.

        Args:
            case: What was measured, in a few words.
            values: One value per round.
            unit: Writes a value with its unit.
            at_most: The target.
            note: Anything to add.
            remedy: What it would take, shown if the target is missed.
        """
        value = statistics.median(values)
        return cls(
            case=case,
            target="" if at_most is None else f"<= {unit(at_most)}",
            ratio=value,
            low=min(values),
            high=max(values),
            ours=unit(value),
            floor="",
            met=at_most is None or value <= at_most,
            note=note,
            remedy=remedy,
        )


def microseconds(ns: float) -> str:
    """Write nanoseconds as microseconds."""
    return f"{ns / 1000:.2f} us"


def milliseconds(ns: float) -> str:
    """Write nanoseconds as milliseconds."""
    return f"{ns / 1e6:.2f} ms"


def nanoseconds(ns: float) -> str:
    """Write nanoseconds."""
    return f"{ns:.0f} ns"


def mebibytes(count: float) -> str:
    """Write bytes as MiB."""
    return f"{count / (1 << 20):.2f} MiB"


def faults_per_second(rate: float) -> str:
    """Write a rate of faults."""
    return f"{rate:,.0f}/s"


def bytes_per_second(rate: float) -> str:
    """Write a rate of bytes."""
    return f"{rate / (1 << 20):,.0f} MiB/s"


def interleave(
    contestants: Mapping[str, Callable[[], Sample]], runs: int
) -> dict[str, dict[str, list[float]]]:
    """Run every contestant once per round, round after round.

    Each round starts with another contestant, so that none always runs after the same one.

    Args:
        contestants: What to run, by name.
        runs: Number of rounds.

    Returns:
        By contestant and by measured value: one number per round, in the order of the rounds.
    """
    results: dict[str, dict[str, list[float]]] = {name: {} for name in contestants}
    names = list(contestants)
    for number in range(runs):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            for key, value in contestants[name]().items():
                results[name].setdefault(key, []).append(value)
    return results


def environment() -> dict[str, str]:
    """Say on what the figures were measured."""
    model = platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "kernel": platform.release(),
        "load": f"{os.getloadavg()[0]:.1f}",
        "machine": f"{model}, {os.cpu_count()} CPUs",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def shown_ratio(figure: Figure) -> str:
    """Write a figure's ratio and its spread, or nothing where there is no floor."""
    if not figure.floor:
        return ""
    return f"{figure.ratio:.2f} ({figure.low:.2f}-{figure.high:.2f})"


def verdict(figure: Figure) -> str:
    """Say whether the target is met, and by how much it is missed."""
    if not figure.target:
        return ""
    if figure.met:
        return "met"
    if not figure.floor:
        return "missed"
    limit = float(figure.target.split()[1])
    return f"missed by {abs(figure.ratio / limit - 1):.0%}"


def remarks(figure: Figure) -> list[str]:
    """List what there is to say about a figure: its note and, if it is missed, the remedy."""
    return [text for text in (figure.note, "" if figure.met else figure.remedy) if text]


def table(figures: Sequence[Figure]) -> str:
    """Lay figures out for a terminal."""
    rows = [("case", "target", "ratio (spread)", "ours", "floor", "")]
    rows += [(f.case, f.target, shown_ratio(f), f.ours, f.floor, verdict(f)) for f in figures]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    notes = [f"{f.case}: {text}" for f in figures for text in remarks(f)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *notes])


def document(name: str, settings: Settings, figures: Sequence[Figure]) -> str:
    """Lay figures out for a program."""
    return json.dumps(
        {
            "benchmark": name,
            "settings": asdict(settings),
            "environment": environment(),
            "figures": [asdict(figure) for figure in figures],
        },
        indent=1,
    )


def settings_parser(description: str) -> argparse.ArgumentParser:
    """Make the parser of the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--runs", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--faults", type=int, default=20_000, help="faults per run")
    parser.add_argument("--cpu", type=int, default=max(os.sched_getaffinity(0)), help="where")
    parser.add_argument("--json", action="store_true", help="print a JSON document")
    return parser


def main(
    name: str,
    measure: Callable[[Settings], Sequence[Figure]],
    argv: Sequence[str] | None = None,
) -> None:
    """Be the command line of one benchmark: a table, or JSON with ``--json``.

    Args:
        name: The benchmark's name.
        measure: Takes the figures.
        argv: Arguments, if not the command line's.
    """
    options = settings_parser(f"Measure {name}.").parse_args(argv)
    settings = Settings(runs=options.runs, faults=options.faults, cpu=options.cpu)
    figures = measure(settings)
    print(document(name, settings, figures) if options.json else table(figures))
    sys.stdout.flush()
