"""Run every benchmark and write the table of docs/figures.md.

Knows: the list of benchmarks, and the markers between which the table stands.
Must not know: how anything is measured.

``python -m benchmarks`` measures and writes; ``--check`` only measures and prints.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from .build import HERE
from .figures import (
    Figure,
    Settings,
    environment,
    remarks,
    settings_parser,
    shown_ratio,
    table,
    verdict,
)

PAGE = HERE.parent / "docs" / "figures.md"
BEGIN = "<!-- figures: made by python -m benchmarks -->"
END = "<!-- figures: end -->"

#: Module and heading, in the order of the page.
BENCHMARKS = {
    "bench_fault": "Fault to resume, one thread",
    "bench_threads": "Sixteen threads",
    "bench_many": "Many ranges, many userfaultfds",
    "bench_sessions": "Many sessions",
    "bench_register": "Registering 64 GiB",
    "bench_fill": "Bulk fill",
    "bench_prefetch": "Hydration, replay, and how much to bring around a fault",
    "bench_sources": "Compressed images",
    "bench_observer": "Watching",
    "bench_fuse": "The same image through FUSE, and as a plain mapping",
    "bench_remote": "Reads of remote images",
    "bench_network": "Reads from a peer and from Redis",
    "bench_lazy_memory": "Lazy memory inside one's own process",
    "bench_criu": "Processes restored lazily by CRIU",
    "bench_migration": "Migrations, beside QEMU's",
}

Measure = Callable[[Settings], Sequence[Figure]]


def benchmark(name: str) -> Measure:
    """Import a benchmark's ``measure``."""
    measure: Measure = importlib.import_module(f"benchmarks.{name}").measure
    return measure


def escape(text: str) -> str:
    """Make text safe inside a cell of a table."""
    return text.replace("|", r"\|").replace("<", "&lt;").replace(">", "&gt;")


def section(heading: str, command: str, figures: Sequence[Figure]) -> str:
    """Write one benchmark's figures as Markdown."""
    lines = [f"## {heading}", "", "```sh", command, "```", ""]
    lines += ["| case | target | ratio (spread) | ours | against | |", "|---|---|---|---|---|---|"]
    for f in figures:
        cells = (f.case, f.target, shown_ratio(f), f.ours, f.floor, verdict(f))
        lines.append("| " + " | ".join(escape(cell) for cell in cells) + " |")
    said = dict.fromkeys(text for f in figures for text in remarks(f))  # each once
    lines += [line for text in said for line in ("", text)]
    return "\n".join(lines)


def body(settings: Settings, measured: Mapping[str, Sequence[Figure]]) -> str:
    """Write everything between the markers."""
    about = environment()
    today = datetime.now(UTC).date()
    size = f"{settings.runs} rounds of {settings.faults:,} faults"
    machine = f"{about['machine']}, Linux {about['kernel']}, {about['python']}"
    words = [
        f"Measured on {today}: {machine}; {size}.",
        f"The load average at the end was {about['load']}: about 1 is this measurement's own.",
        "",
    ]
    options = f"--runs {settings.runs} --faults {settings.faults}"
    for name, figures in measured.items():
        command = f"python -m benchmarks.{name} {options}"
        words += [section(BENCHMARKS[name], command, figures), ""]
    return "\n".join(words)


def between_markers(page: str, text: str) -> str:
    """Put a text between the markers of a page.

    Raises:
        ValueError: The page lacks a marker.
    """
    before, found, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"The page needs the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything and write the page."""
    parser = settings_parser(main.__doc__ or "")
    parser.add_argument("--check", action="store_true", help="do not write the page")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    options = parser.parse_args(argv)
    settings = Settings(runs=options.runs, faults=options.faults, cpu=options.cpu)
    measured: dict[str, Sequence[Figure]] = {}
    for name in options.only:
        print(f"{BENCHMARKS[name]} ...", file=sys.stderr, flush=True)
        measured[name] = benchmark(name)(settings)
        if not options.json:
            print(table(measured[name]), "\n", flush=True)
    if options.json:
        figures = {name: [asdict(f) for f in found] for name, found in measured.items()}
        print(json.dumps({"environment": environment(), "figures": figures}, indent=1))
    if not options.check:
        page: Path = options.page
        page.write_text(
            between_markers(page.read_text(encoding="utf-8"), body(settings, measured)),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
