"""The test harness: stopping threads, recording, exploring, starting at all, against C.

Knows: the cases and their targets.
Must not know: how a touch is timed.

Everything runs on one CPU: between two idle virtual CPUs the wake-up is all one would measure.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from .build import compile_c
from .contest import alone, loops
from .figures import (
    Figure,
    Sample,
    Settings,
    faults_per_second,
    interleave,
    main,
    microseconds,
    milliseconds,
)

#: Results of a contestant: a number for each round, by what was measured.
Results = Mapping[str, Mapping[str, list[float]]]

_IMPORT_NS = 10e6  # what the plugin's import may take
_FREEZES = {
    "freeze": "C thread",
    "freeze-asyncio": "C thread, waited for on asyncio",
    "freeze-uvloop": "C thread, waited for on uvloop",
    "freeze-python": "Python thread that holds the GIL",
    "freeze-trampoline": 'Python thread, backend="trampoline"',
}
_WALKS = {
    "walk": ("first touch of a page", "floor walk"),
    "every": ("each touch, every=True", "floor step"),
}
_ROUND_TRIP = (
    "One round trip: the thread touches, wait() returns, release() is called, the touch is made."
    " The floor is the same between three C threads: who touches, who decides, and in another"
    " process who serves (poll, read, UFFDIO_COPY)."
)


_STEP = (
    "Stepped over, a thread makes its touch and nothing else, and the page is taken away again."
    " The floor does that with ptrace in C."
)
_EXPLORING = (
    "Explored: two threads of C that increment a counter three times each, twelve touches an"
    " order, one page; each order begins with a reset of the counter."
)


def measure(settings: Settings) -> list[Figure]:
    """Take the median time of each."""
    cpu = str(max(settings.cpu, 0))
    freezes = str(max(20, settings.faults // 20))
    walk = str(settings.faults)
    steps = str(max(20, settings.faults // 10))
    orders = str(min(500, max(5, settings.faults // 64)))
    times = str(max(2, min(20, settings.faults // 32)))
    floor = str(compile_c("harness_floor.c"))
    touching = [sys.executable, "-m", "benchmarks.harness_touching"]
    starting = [sys.executable, "-m", "benchmarks.harness_starting"]
    commands = {
        "floor freeze": [floor, "freeze", cpu, freezes],
        "floor walk": [floor, "walk", cpu, walk],
        "floor step": [floor, "step", cpu, steps],
        "plain": [floor, "plain", cpu, walk],
        **{how: [*touching, how, cpu, freezes] for how in _freezes()},
        "walk": [*touching, "walk", cpu, walk],
        "every": [*touching, "every", cpu, steps],
        "explore": [*touching, "explore", cpu, orders],
        **{
            what: [*starting, what, cpu, times]
            for what in ("start", "kept", "interpreter", "import", "with", "without")
        },
    }
    contestants: dict[str, Callable[[], Sample]] = {
        name: alone(command, settings.seconds) for name, command in commands.items()
    }
    results = interleave(contestants, settings.runs)
    return [
        *_freezing(results),
        *_recording(results),
        *_exploring(results),
        *_starting(results),
    ]


def _freezes() -> list[str]:
    missing = {f"freeze-{loop}" for loop in ("asyncio", "uvloop")} - {
        f"freeze-{loop}" for loop in loops()
    }
    return [how for how in _FREEZES if how not in missing]


def _freezing(results: Results) -> list[Figure]:
    floor = results["floor freeze"]
    figures: list[Figure] = []
    for how in _freezes():
        for value, shown in (("p50_ns", "p50"), ("p99_ns", "p99")):
            figures.append(
                Figure.compare(
                    f"freeze to release, {_FREEZES[how]}, {shown}",
                    ours=results[how][value],
                    floor=floor[value],
                    unit=microseconds,
                    note="" if figures else _ROUND_TRIP,
                )
            )
    figures += [
        Figure.compare(
            f"... of which {half}, C thread, p50",
            ours=results["freeze"][value],
            floor=floor[value],
            unit=microseconds,
        )
        for value, half in (
            ("stop_ns", "from the touch until wait() returns"),
            ("go_ns", "from release() until the touch is made"),
        )
    ]
    figures.append(
        Figure.absolute(
            "the first freeze of a Python thread that holds the GIL",
            results["freeze-python"]["first_ns"],
            unit=milliseconds,
            note="The first one waits 15 ms for an answer that a held GIL does not let through;"
            " the thread is known then.",
        )
    )
    return figures


def _recording(results: Results) -> list[Figure]:
    figures = []
    for how, (case, floor) in _WALKS.items():
        for value, shown in (("p50_ns", "p50"), ("p99_ns", "p99")):
            figures.append(
                Figure.compare(
                    f"recorded {case}, {shown}",
                    ours=results[how][value],
                    floor=results[floor][value],
                    unit=microseconds,
                    note=_STEP if how == "every" and value == "p50_ns" else "",
                )
            )
    figures.append(
        Figure.compare(
            "first touch of a page served in C, to one of plain shared memory, p50",
            ours=results["floor walk"]["p50_ns"],
            floor=results["plain"]["p50_ns"],
            unit=microseconds,
        )
    )
    return figures


def _exploring(results: Results) -> list[Figure]:
    ours = results["explore"]
    return [
        Figure.absolute(
            "exploration, orders",
            ours["orders_per_second"],
            unit=faults_per_second,
            note=_EXPLORING,
        ),
        Figure.absolute("exploration, touches", ours["touches_per_second"], unit=faults_per_second),
        Figure.compare(
            "exploration, all that there is to a touch, mean, to a step in C, p50",
            ours=ours["touch_ns"],
            floor=results["floor step"]["p50_ns"],
            unit=microseconds,
        ),
    ]


def _starting(results: Results) -> list[Figure]:
    def less(what: str, value: str, than: str) -> list[float]:
        pairs = zip(results[what][value], results[than][value], strict=True)
        return [ours - floor for ours, floor in pairs]

    return [
        Figure.compare(
            "Harness(), to an empty interpreter's run",
            ours=results["start"]["open_ns"],
            floor=results["interpreter"]["open_ns"],
            unit=milliseconds,
        ),
        Figure.absolute("Harness.close()", results["start"]["close_ns"], unit=milliseconds),
        Figure.absolute(
            "Harness(), with the helper process of another one",
            results["kept"]["open_ns"],
            unit=milliseconds,
            note="The pytest plugin keeps the helper process from each test to the next.",
        ),
        Figure.absolute(
            "a test with the fixture uffd and a region, above one without",
            less("with", "test_ns", "without"),
            unit=milliseconds,
        ),
        Figure.absolute(
            "import of the plugin, where pytest is",
            results["import"]["import_ns"],
            unit=milliseconds,
            at_most=_IMPORT_NS,
        ),
    ]


if __name__ == "__main__":
    main("testing", measure)
