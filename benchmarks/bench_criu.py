"""Processes that CRIU restores lazily: our daemon against ``criu lazy-pages``, same checkpoint.

Knows: the cases, and what is compared in each.
Must not know: how a restore is made.

The restored program checks every word of the pages that it touches, in one thread: what is
measured is the time until that is done.  The page server of "remote" is on this machine, too; the
network has no delay, so what counts is who waits for whom.  With push off, the stock daemon never
hears that the restore has finished, and so serves faults only, as ours does with ``--no-push``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from tests.interop.criu import Stage

from .criu_serving import Parts, available, checkpoint, restore
from .figures import Figure, Sample, Settings, interleave, main, microseconds, milliseconds

#: What is measured with 20,000 faults asked for; fewer make it smaller.
SIZES = (200, 1024)  # MiB
AS_NAMED = 20_000
SMOKE = 1_000  # fewer faults than that only show that it runs
LARGE = 512  # MiB: from here on, fewer rounds
PATIENCE = 5  # stock takes minutes for 1 GiB from a page server, touched at random

MODES = {
    "sequential": "sequential 7 1 1",
    "random": "random 7 1 1",
    "10 % scattered": "random 7 0.1 1",
}

LOCAL = 0.8
REMOTE = 0.5
SCATTERED = round(1 / 3, 3)
RECORDED = 0.2
CPU = 2.0
P50 = 1.6

Results = Mapping[str, Mapping[str, list[float]]]


def measure(settings: Settings) -> list[Figure]:
    """Restore again and again, in turns."""
    criu = available()
    if criu is None:
        print("bench_criu: needs CRIU in build/suites and root: sudo make interop", file=sys.stderr)
        return []
    figures: list[Figure] = []
    for size in SIZES if settings.faults >= SMOKE else SIZES[:1]:
        mib = max(1, int(size * min(1, settings.faults / AS_NAMED)))
        runs = settings.runs if size < LARGE else max(1, settings.runs * 3 // 7)
        with checkpoint(criu, mib) as (stage, images):
            takes = _Takes(stage, images, settings, runs, f"{mib} MiB")
            figures += takes.local()
            figures += takes.remote()
            if size < LARGE:
                figures += takes.scattered_with_a_recorded_set()
                figures += takes.several_threads()
                figures += takes.push_off()
    return figures


class _Takes:
    """What is measured on one checkpoint."""

    def __init__(
        self, stage: Stage, images: Path, settings: Settings, runs: int, size: str
    ) -> None:
        self.stage, self.images, self.settings = stage, images, settings
        self.runs, self.size = runs, size

    def local(self) -> list[Figure]:
        """Images on this machine."""
        figures = []
        for mode, go in MODES.items():
            contestants = {
                "stock": self._contestant(Parts(daemon="stock"), go),
                "ours": self._contestant(Parts(daemon="ours"), go),
            }
            results = interleave(contestants, self.runs)
            case = f"{self.size} here, {mode}"
            figures.append(_times(case, results, "ours", at_most=LOCAL))
            if mode == "random":
                figures.append(_whole(case, results, "ours"))
                figures += _processor(case, results, "ours")
        return figures

    def remote(self) -> list[Figure]:
        """Pages from a page server."""
        figures = []
        for mode, go in MODES.items():
            contestants = {
                "stock": self._contestant(Parts(daemon="stock", server="stock"), go),
                "ours": self._contestant(Parts(daemon="ours", server="stock"), go),
                "both": self._contestant(Parts(daemon="ours", server="ours"), go),
            }
            results = interleave(contestants, self.runs)
            case = f"{self.size} from a page server, {mode}"
            limit = SCATTERED if mode.startswith("10 %") else REMOTE
            figures.append(_times(case, results, "ours", at_most=limit))
            figures.append(_times(f"{case}, server ours too", results, "both"))
            if mode == "random":
                figures.append(_whole(case, results, "ours"))
                figures += _processor(case, results, "ours")
        return figures

    def scattered_with_a_recorded_set(self) -> list[Figure]:
        """The pages that an earlier run touched, brought before they are asked for."""
        mode = "10 % scattered"
        recorded = self.stage.folder / "recorded.ws"
        recording = Parts(daemon="ours", server="stock", push=False, record=recorded)
        self._contestant(recording, MODES[mode], drain=False)()
        replaying = Parts(daemon="ours", server="stock", replay=recorded)
        contestants = {
            "stock": self._contestant(Parts(daemon="stock", server="stock"), MODES[mode]),
            "ours": self._contestant(replaying, MODES[mode]),
        }
        results = interleave(contestants, self.runs)
        case = f"{self.size} from a page server, {mode}, set recorded before"
        return [_times(case, results, "ours", at_most=RECORDED)]

    def several_threads(self) -> list[Figure]:
        """Four threads, each at other places."""
        go = "random 7 1 4"
        contestants = {
            "stock": self._contestant(Parts(daemon="stock"), go),
            "ours": self._contestant(Parts(daemon="ours"), go),
        }
        results = interleave(contestants, max(1, self.runs // 2))
        case = f"{self.size} here, random, four threads"
        note = "The stock daemon searches a list that random faults cut ever smaller."
        return [_times(case, results, "ours", at_most=LOCAL, note=note)]

    def push_off(self) -> list[Figure]:
        """From a fault to the next instruction, when nothing but faults is served."""
        figures = []
        for mode in ("sequential", "random"):
            contestants = {
                "stock": self._contestant(
                    Parts(daemon="stock", push=False), MODES[mode], drain=False
                ),
                "ours": self._contestant(
                    Parts(daemon="ours", push=False), MODES[mode], drain=False
                ),
            }
            results = interleave(contestants, max(1, self.runs // 2))
            figures.append(
                Figure.compare(
                    f"{self.size} here, {mode}, push off: fault to resume, p50",
                    ours=results["ours"]["p50_ns"],
                    floor=results["stock"]["p50_ns"],
                    unit=microseconds,
                    at_most=P50,
                )
            )
        return figures

    def _contestant(self, parts: Parts, go: str, *, drain: bool = True) -> Callable[[], Sample]:
        return partial(
            restore,
            self.stage,
            self.images,
            parts,
            go=go,
            seconds=PATIENCE * self.settings.seconds,
            drain=drain,
        )


def _times(
    case: str, results: Results, who: str, *, at_most: float | None = None, note: str = ""
) -> Figure:
    return Figure.compare(
        f"{case}: all checked",
        ours=results[who]["took_ns"],
        floor=results["stock"]["took_ns"],
        unit=milliseconds,
        at_most=at_most,
        note=note,
    )


def _whole(case: str, results: Results, who: str) -> Figure:
    return Figure.compare(
        f"{case}: the same, with criu restore itself",
        ours=results[who]["whole_ns"],
        floor=results["stock"]["whole_ns"],
        unit=milliseconds,
    )


def _processor(case: str, results: Results, who: str) -> list[Figure]:
    names = {"cpu_ns": "processor time of the daemon", "serving_cpu_ns": "since it was ready"}
    return [
        Figure.compare(
            f"{case}: {text}",
            ours=results[who][name],
            floor=results["stock"][name],
            unit=milliseconds,
            at_most=CPU if name == "cpu_ns" else None,
        )
        for name, text in names.items()
    ]


if __name__ == "__main__":
    main("criu", measure)
