"""A hundred sessions in one process: the latency of a fault, what one costs, what an idle one does.

Knows: the cases and their targets.
Must not know: how a run is made.

The compared runs touch the same addresses in the same order; only who serves them differs: a
hundred sessions, each with its own userfaultfd, or one.  A hundred threads fault *at once*; or
one does: going *round*, each fault is another session's than the last, which is the worst order;
in *blocks*, a session's memory is touched to its end.  All share one CPU with those who fault.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

from .contest import floor_command, loops, run, target_command
from .figures import (
    Figure,
    Sample,
    Settings,
    faults_per_second,
    interleave,
    main,
    mebibytes,
    microseconds,
)

SESSIONS = 100
AT_MOST = 1.3
AT_LEAST = 0.77
#: What is said of a case, threads that fault at once, and whether each goes in blocks.
CASES = {
    "at once": (f"{SESSIONS} threads at once", SESSIONS, False),
    "round": ("one thread going round", 1, False),
    "blocks": ("one thread in blocks", 1, True),
}
BYTES_AT_MOST = 1 << 20
IDLE = (
    "A target that is quiet is asked after 1, 2, 4, 8 ... seconds whether it has called exec, which"
    " nothing tells; counted between the first question and the second, with a pidfd of each."
)
TURNS = "Each session has one fault served before any has a second one."
REMEDY = (
    "What it would take: each fault asks the epoll (one call more than reading again), and its"
    " session's objects have left the caches since its last one."
)


def serving(settings: Settings, *options: str) -> list[str]:
    """Make the command of a server of sessions."""
    module = "benchmarks.session_serving"
    return [sys.executable, "-m", module, "--socket=SOCKET", f"--cpu={settings.cpu}", *options]


def contestant(
    settings: Settings, server: list[str], *, uffds: int, threads: int, blocks: bool
) -> Callable[[], Sample]:
    """Make a run of a target against a server; what both of them measured."""
    target = target_command(settings, ranges=SESSIONS, uffds=uffds, threads=threads, blocks=blocks)

    def both() -> Sample:
        seen, cost = run(target, server, settings.seconds)
        return {**seen, **cost}

    return both


def measure(settings: Settings) -> list[Figure]:
    """Take the median latency of a fault against that of one session, memory and wake-ups."""
    settings = replace(settings, faults=max(settings.faults, 16 * SESSIONS))
    contestants = {}
    for case, (_, threads, blocks) in CASES.items():
        for whole in (False, True):
            options = ["--whole"] if whole else []
            uffds = 1 if whole else SESSIONS
            for loop in loops():
                idle = ["--idle"] if case == "round" and not whole else []
                server = serving(settings, f"--loop={loop}", *options, *idle)
                contestants[f"{loop} {case} {whole}"] = contestant(
                    settings, server, uffds=uffds, threads=threads, blocks=blocks
                )
            floor = floor_command(settings, whole=whole)
            contestants[f"floor {case} {whole}"] = contestant(
                settings, floor, uffds=uffds, threads=threads, blocks=blocks
            )
    results = interleave(contestants, settings.runs)
    figures = []
    for who in (*loops(), "floor"):
        for case, (text, _, _) in CASES.items():
            figures.append(
                Figure.compare(
                    f"{SESSIONS} sessions, {text}, {'C alone' if who == 'floor' else who},"
                    " p50 to that of one",
                    ours=results[f"{who} {case} False"]["p50_ns"],
                    floor=results[f"{who} {case} True"]["p50_ns"],
                    at_most=None if who == "floor" else AT_MOST,
                    unit=microseconds,
                    remedy=REMEDY,
                )
            )
    for who in loops():
        ours, one = results[f"{who} at once False"], results[f"{who} at once True"]
        figures.append(
            Figure.compare(
                f"{SESSIONS} sessions, {SESSIONS} threads at once, {who}, p99 to that of one",
                ours=ours["p99_ns"],
                floor=one["p99_ns"],
                unit=microseconds,
                note=TURNS,
            )
        )
        figures.append(
            Figure.compare(
                f"{SESSIONS} sessions, {SESSIONS} threads at once, {who}, rate to that of one",
                ours=ours["per_second"],
                floor=one["per_second"],
                at_least=AT_LEAST,
                unit=faults_per_second,
            )
        )
    for loop in loops():
        cost = results[f"{loop} round False"]
        figures.append(
            Figure.absolute(
                f"memory per session, {loop}",
                cost["bytes_per_session"],
                unit=mebibytes,
                at_most=BYTES_AT_MOST,
            )
        )
        figures.append(
            Figure.absolute(
                f"descriptors per session, {loop}",
                cost["descriptors_per_session"],
                unit=lambda count: f"{count:.1f}",
                note="And, of a server's session, the connection and its own source's file.",
            )
        )
        figures.append(
            Figure.absolute(
                f"wake-ups of {SESSIONS} idle sessions together, {loop}",
                cost["idle_wake_ups"],
                unit=lambda count: f"{count:.0f}",
                at_most=0,
                note=IDLE,
            )
        )
    return figures


if __name__ == "__main__":
    main("sessions", measure)
