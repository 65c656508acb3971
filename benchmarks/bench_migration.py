"""Migrations by aiouffd beside QEMU's own: how long nothing runs, who waits how long, what is sent.

Knows: the cases and their targets.
Must not know: how a migration is made.

Both move the same amount of memory over loopback, between processes of this machine; the program
does what QEMU's guest does.  The downtime is from the order to stop until the side that ordered it
knows that the program runs: of QEMU, from its STOP to its RESUME.  A wait for a page is from the
fault's message to its copy being done, on both sides.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial

from . import qemu_migration
from .contest import loops
from .figures import (
    Figure,
    Sample,
    Settings,
    bytes_per_second,
    interleave,
    main,
    microseconds,
    milliseconds,
)
from .moving import MoveSettings, bulk, migrate
from .qemu_migration import QemuSettings
from .raw_stream import raw_stream_once

MEMORY_MIB = 256
SMALL_MIB = 16  # in a quick run
WRITES = 0.1
CAP = 100 << 20
BULK = 1 << 30
THROUGH = 16 << 20  # what the processor's cache may hold
NAMED = 1000  # faults from which on sizes are as named

DOWNTIME = 1.0
P50 = 1.5
BULK_AT_LEAST = 0.8
SENT = 1.3
CONVERGED = 0.1  # seconds that the last pass of pre-copy may take
PASSES = 10  # of pre-copy that does not converge
_NOT_IN = 8.0  # seconds for QEMU's

Results = Mapping[str, Mapping[str, list[float]]]


def measure(settings: Settings) -> list[Figure]:
    """Migrate again and again, in turns."""
    mib = MEMORY_MIB if settings.faults >= NAMED else SMALL_MIB
    figures = _bulk(settings, quick=settings.faults < NAMED)
    if reason := qemu_migration.missing():
        print(f"bench_migration: without QEMU there is only bulk: {reason}", file=sys.stderr)
        return figures
    for cap in (None, CAP):
        for mode in ("postcopy", "hybrid"):
            figures += _migrations(settings, mib, mode, cap)
    figures += _pre_copy(settings, mib)
    return figures


def _bulk(settings: Settings, *, quick: bool) -> list[Figure]:
    """Take the throughput of bulk."""
    size = THROUGH if quick else BULK

    def contestant(rate: Callable[[], float]) -> Callable[[], Sample]:
        return lambda: {"rate": rate()}

    contestants: dict[str, Callable[[], Sample]] = {}
    for loop in loops():
        raw = partial(raw_stream_once, loop, size=size)
        contestants[f"raw {loop}"] = contestant(raw)
        for name, through in (("cached", min(size, THROUGH)), ("new", size)):
            contestants[f"{name} {loop}"] = contestant(
                partial(bulk, loop, size=size, through=through)
            )
    results = interleave(contestants, settings.runs)
    figures = []
    for loop in loops():
        floor = results[f"raw {loop}"]["rate"]
        for name, case, at_least, remedy in (
            (
                "cached",
                f"bulk, {size >> 20} MiB out of {THROUGH >> 20} and into as many",
                BULK_AT_LEAST,
                (
                    "A raw stream sends the same bytes again and drops what comes. What is left is"
                    " the copy out of the memfd, and Python: a frame costs some 100 us a side."
                ),
            ),
            ("new", f"bulk, {size >> 20} MiB into memory never touched", None, ""),
        ):
            figures.append(
                Figure.compare(
                    f"{case}, against a raw stream, {loop}, rate",
                    ours=results[f"{name} {loop}"]["rate"],
                    floor=floor,
                    unit=bytes_per_second,
                    at_least=at_least,
                    remedy=remedy,
                )
            )
    return figures


def _migrations(
    settings: Settings, mib: int, mode: qemu_migration.Mode, cap: int | None
) -> list[Figure]:
    """Take one way to migrate, with one bandwidth."""
    ours = MoveSettings(memory_mib=mib, writes=WRITES, rounds=int(mode == "hybrid"), bandwidth=cap)
    theirs = QemuSettings(memory_mib=mib, writes=WRITES, mode=mode, bandwidth=cap)
    contestants: dict[str, Callable[[], Sample]] = {
        "ours": partial(migrate, ours),
        "QEMU": lambda: qemu_migration.run(theirs).as_sample(),
    }
    if mode == "postcopy":
        urgent = QemuSettings(memory_mib=mib, writes=WRITES, mode=mode, bandwidth=cap, preempt=True)
        contestants["preempt"] = lambda: qemu_migration.run(urgent).as_sample()
    results = interleave(contestants, settings.runs)
    case = f"{mode}, {mib} MiB, {WRITES:.0%} rewritten, "
    case += "no cap" if cap is None else f"{cap >> 20} MiB/s"
    figures = [
        _against(results, "QEMU", f"{case}: downtime", "stopped_ns", milliseconds, DOWNTIME),
        _against(results, "QEMU", f"{case}: total time", "total_ns", milliseconds, None),
    ]
    if mode == "postcopy":
        figures.append(
            _against(results, "QEMU", f"{case}: wait for a page, p50", "p50_ns", microseconds, P50)
        )
        figures.append(
            _against(
                results,
                "preempt",
                f"{case}: the same against QEMU's postcopy-preempt",
                "p50_ns",
                microseconds,
                None,
            )
        )
    else:
        figures.append(
            Figure.absolute(
                f"{case}: sent over memory",
                results["ours"]["sent_ratio"],
                unit=lambda ratio: f"{ratio:.2f}",
                at_most=SENT,
                note=f"QEMU: {sorted(results['QEMU']['sent_ratio'])[settings.runs // 2]:.2f}",
            )
        )
    return figures


def _against(
    results: Results,
    whom: str,
    case: str,
    name: str,
    unit: Callable[[float], str],
    at_most: float | None,
) -> Figure:
    """Compare one value; a round in which nobody waited has none, and is left out."""
    ours, theirs = results["ours"].get(name, []), results[whom].get(name, [])
    count = min(len(ours), len(theirs))
    if not count:
        return Figure.absolute(f"{case}: nobody waited", [0.0], unit=unit)
    return Figure.compare(case, ours=ours[:count], floor=theirs[:count], unit=unit, at_most=at_most)


def _pre_copy(settings: Settings, mib: int) -> list[Figure]:
    """See that pure pre-copy of the same program does not come to an end."""
    ours = migrate(
        MoveSettings(
            memory_mib=mib,
            writes=WRITES,
            rounds=PASSES,
            behind=0,
            downtime=CONVERGED / MEMORY_MIB * mib,
            bandwidth=CAP,
        )
    )
    theirs = qemu_migration.run(
        QemuSettings(
            memory_mib=mib,
            writes=WRITES,
            mode="precopy",
            bandwidth=CAP,
            downtime_limit_ms=max(1, int(CONVERGED * 1000 / MEMORY_MIB * mib)),
            seconds=_NOT_IN if settings.faults >= NAMED else 1.0,
        )
    )
    ends = ["comes to no end", "ends"]
    return [
        Figure.absolute(
            f"pre-copy alone, {mib} MiB, {WRITES:.0%} rewritten, {CAP >> 20} MiB/s: sent over"
            f" memory in {PASSES} passes",
            [ours["sent_ratio"]],
            unit=lambda ratio: f"{ratio:.2f}",
            note=f"ours {ends[int(ours['converged'])]}, QEMU's {ends[int(theirs.converged)]}"
            f" (sent {theirs.sent_ratio:.2f})",
        )
    ]


if __name__ == "__main__":
    main("bench_migration", measure)
