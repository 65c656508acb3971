"""Run every benchmark and write the table of docs/figures.md.

Knows: the list of benchmarks, and the markers between which the table stands.
Must not know: how anything is measured.

``python -m benchmarks`` measures and writes; ``--check`` only measures and prints;
``--only bench_fault`` leaves the other benchmarks' figures as they are.
"""

from __future__ import annotations

import importlib
import json
import re
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
    "bench_testing": "The test harness",
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


def circumstances(settings: Settings) -> str:
    """Say when and on what was measured."""
    about = environment()
    today = datetime.now(UTC).date()
    size = f"{settings.runs} rounds of {settings.faults:,} faults"
    machine = f"{about['machine']}, Linux {about['kernel']}, {about['python']}"
    return (
        f"Measured on {today}: {machine}; {size}.\n"
        f"The load average at the end was {about['load']}: about 1 is this measurement's own.\n"
    )


def sections(settings: Settings, measured: Mapping[str, Sequence[Figure]]) -> dict[str, str]:
    """Write each benchmark's figures, by its heading."""
    options = f"--runs {settings.runs} --faults {settings.faults}"
    return {
        BENCHMARKS[name]: section(
            BENCHMARKS[name], f"python -m benchmarks.{name} {options}", figures
        )
        for name, figures in measured.items()
    }


def body(settings: Settings, measured: Mapping[str, Sequence[Figure]]) -> str:
    """Write everything between the markers."""
    written = sections(settings, measured).values()
    return "\n".join([circumstances(settings), *(f"{each}\n" for each in written)])


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


def with_sections(page: str, settings: Settings, measured: Mapping[str, Sequence[Figure]]) -> str:
    """Put some benchmarks' figures in the place of their old ones, or behind the others.

    Raises:
        ValueError: The page lacks a marker.
    """
    _, found, rest = page.partition(BEGIN)
    inside, ended, _ = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"The page needs the lines {BEGIN!r} and {END!r}")
    first, *others = re.split(r"^(?=## )", inside.strip(), flags=re.MULTILINE)
    parts = {part.splitlines()[0].removeprefix("## "): part.rstrip() for part in others}
    for heading, text in sections(settings, measured).items():
        parts[heading] = f"{text}\n\n{circumstances(settings)}".rstrip()
    return between_markers(page, "\n\n".join([first.rstrip(), *parts.values()]).lstrip() + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything and write the page."""
    parser = settings_parser(main.__doc__ or "")
    parser.add_argument("--check", action="store_true", help="do not write the page")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    parser.add_argument(
        "--only", nargs="+", choices=BENCHMARKS, help="write the sections of these alone"
    )
    options = parser.parse_args(argv)
    settings = Settings(runs=options.runs, faults=options.faults, cpu=options.cpu)
    measured: dict[str, Sequence[Figure]] = {}
    for name in options.only or BENCHMARKS:
        print(f"{BENCHMARKS[name]} ...", file=sys.stderr, flush=True)
        measured[name] = benchmark(name)(settings)
        if not options.json:
            print(table(measured[name]), "\n", flush=True)
    if options.json:
        figures = {name: [asdict(f) for f in found] for name, found in measured.items()}
        print(json.dumps({"environment": environment(), "figures": figures}, indent=1))
    if not options.check:
        page: Path = options.page
        old = page.read_text(encoding="utf-8")
        if options.only:
            new = with_sections(old, settings, measured)
        else:
            new = between_markers(old, body(settings, measured))
        page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
