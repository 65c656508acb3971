"""A migration's figures for people, as lines of a terminal.

Knows: the report of a migration, how amounts and times are written.
Must not know: files, how it was carried out.
"""

from __future__ import annotations

from typing import Any, Final

from .picture import printable
from .progress import amount, counted

_THREADS: Final = 8  # that are named

#: What has become of the program, by outcome.
_OUTCOMES: Final = {
    "moved": "it has moved",
    "cancelled": "cancelled; it runs on where it was",
    "source": "failed; it runs on where it was",
    "unknown": "failed half-way; where it runs is not known",
    "lost": "failed after it had moved; what it did since is gone",
    "": "under way",
}


def duration(seconds: float) -> str:
    """Write a time for people: ``12.3 ms``, ``4.56 s``."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def summary(report: dict[str, Any]) -> list[str]:
    """Give what a migration has cost, a line each."""
    figures = report["figures"]
    faults = f"{figures['demand_faults']}"
    if figures["demand_faults"]:
        faults += f", half of them within {duration(figures['demand_p50'])}"
        faults += f", 99 % within {duration(figures['demand_p99'])}"
    rounds = counted(figures["rounds"], "round", "rounds")
    sent = f"{amount(figures['sent_bytes'])} for {amount(figures['memory_bytes'])} of memory"
    sent += f", {figures['sent_over_memory']:.2f} times as much"
    facts = {
        "stood still": duration(figures["downtime"]),
        "in all": f"{duration(figures['seconds'])}, {rounds} before the switch",
        "sent": f"{sent}; {amount(figures['zero_bytes'])} were zeros",
        "demand faults": faults,
        "stall": _stall(figures),
    }
    if figures["connections"] > 1:
        broke = counted(figures["connections"] - 1, "time", "times")
        again = f"{duration(figures['disconnected'])} without one"
        facts["line"] = f"broke {broke}, {again}, {amount(figures['again_bytes'])} sent again"
    return [f"{name:<14} {text}" for name, text in facts.items()]


def _stall(figures: dict[str, Any]) -> str:
    threads = sorted(figures["stall_by_thread"].items(), key=lambda item: -item[1])
    named = [f"thread {name} {duration(stall)}" for name, stall in threads[:_THREADS]]
    if len(threads) > _THREADS:
        named.append(f"{len(threads) - _THREADS} others")
    return f"{duration(figures['stall'])} in all" + (f": {', '.join(named)}" if named else "")


def table(report: dict[str, Any]) -> list[str]:
    """Give all that is of use to people: what has become of it, the figures, the rounds."""
    to = "to" if report.get("side") == "source" else "from"
    name = printable(str(report.get("name", ""))) or "a program"
    lines = [
        f"program        {name}, {to} {printable(str(report.get('peer', '')))}",
        f"outcome        {_OUTCOMES.get(str(report.get('outcome')), 'not known')}",
    ]
    if report.get("error"):
        lines.append(f"error          {printable(str(report['error']))}")
    lines += summary(report)
    rounds = report.get("source", {}).get("rounds") or []
    if rounds:
        lines += ["", f"{'round':>5}  {'took':>9}  {'sent':>10}  {'dirty':>10}  {'dirty rate':>12}"]
        lines += [
            f"{each['number']:>5}  {duration(each['seconds']):>9}"
            f"  {amount(each['sent_bytes']):>10}  {amount(each['dirty_bytes']):>10}"
            f"  {amount(each['dirty_rate']) + '/s':>12}"
            for each in rounds
        ]
    return lines
