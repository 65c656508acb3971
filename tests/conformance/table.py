"""Make ``docs/conformance.md`` from a run of the conformance tests.

usage: python -m tests.conformance.table [--names]

Runs the tests of this folder on every loop there is, and writes for each kernel selftest on which
memory it held.  With ``--names`` nothing is run: it prints the names that the table should have.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "conformance.md"

_KINDS = ("none", "anon", "shmem", "shmem-private", "hugetlb", "hugetlb-private")

_FILES = {
    "uffd-unit-tests.c": "Unit tests",
    "uffd-stress.c": "Stress",
    "uffd-wp-mremap.c": "Moving write-protected folios",
    "gaps": "What the kernel's selftests leave out",
}

_INTRODUCTION = """\
# Conformance

The kernel has selftests for userfaultfd (`tools/testing/selftests/mm`).
Each of them is told again here, in our own words and through aiouffd's public API, with a real
process of its own doing the faulting.
`shmem-private` is a private mapping of a memory file, which the kernel's own suite does not have:
its allocator always maps shared.
"""

_FOOT = """\
## How some of them differ from the kernel's

- `wp-fork-pin` needs no `CONFIG_GUP_TEST`: the long-term pin of the parent is a buffer registered
  with io_uring, the read-only pin of the child is `process_vm_readv`.
- `wp-fork` and `uffd-wp-mremap` add 64 MiB of swap for the time of the test, so that
  `MADV_PAGEOUT` takes private pages away for certain.
- Huge page sizes are allowed one at a time, and set back afterwards; huge pages of the pool are
  reserved per test and given back.
  Huge pages of 1 GiB are not tried.
- `uffd-stress` has its two areas in one target and the handler in another process; it is scaled
  to a second for each kind of memory.
- Tests of read/write-protect (RWP) wait for a kernel that has it.
"""


@dataclass
class Row:
    asserts: dict[str, None] = field(default_factory=dict)
    outcomes: dict[str, set[str]] = field(default_factory=dict)


class Recorder:
    """A pytest plugin that keeps what the marks say and how the tests ended."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Row] = {}
        self._of: dict[str, tuple[tuple[str, str], str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            mark = item.get_closest_marker("selftest")
            if mark is None or not isinstance(item, pytest.Function):
                continue
            file, name, asserts = mark.args
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            kind = str(parameters.get("kind", mark.kwargs.get("on", "anon")))
            key = (file, name)
            self.rows.setdefault(key, Row()).asserts[asserts] = None
            self._of[item.nodeid] = (key, kind)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid not in self._of or (report.when != "call" and report.passed):
            return
        key, kind = self._of[report.nodeid]
        outcome = report.outcome
        if report.skipped and isinstance(report.longrepr, tuple):
            outcome = f"skipped ({report.longrepr[2].removeprefix('Skipped: ')})"  # type: ignore[assignment]
        self.rows[key].outcomes.setdefault(kind, set()).add(outcome)


def run(*arguments: str) -> Recorder:
    recorder = Recorder()
    status = pytest.main(
        ["-q", "-p", "no:cacheprovider", str(HERE), *arguments], plugins=[recorder]
    )
    if status not in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}:
        sys.exit(int(status))
    return recorder


def memory_of(row: Row) -> str:
    """On which kinds of memory a row held, and what else happened."""
    texts = []
    for kind in _KINDS:
        outcomes = row.outcomes.get(kind)
        if not outcomes:
            continue
        bad = sorted(outcomes - {"passed"})
        texts.append(kind + (f" **{', '.join(bad)}**" if bad else ""))
    return "no memory" if texts == ["none"] else ", ".join(texts)


def page(rows: dict[tuple[str, str], Row]) -> Iterable[str]:
    yield _INTRODUCTION
    yield (
        f"This page is written by `python -m tests.conformance.table`; the run was on Linux "
        f"{platform.release().partition('-')[0]}, {platform.machine()}, "
        f"Python {platform.python_version()}, on every event loop that the suite runs on.\n"
    )
    for file, title in _FILES.items():
        yield f"## {title}" + (f" (`{file}`)" if file.endswith(".c") else "") + "\n"
        yield "| test | held on | what is asserted |"
        yield "| --- | --- | --- |"
        for (of, name), row in rows.items():
            if of == file:
                yield f"| {name} | {memory_of(row)} | {'; '.join(row.asserts)} |"
        yield ""
    yield _FOOT.rstrip()


def names(rows: Iterable[tuple[str, str]]) -> list[str]:
    return sorted(f"{file}: {name}" for file, name in rows)


def names_on_page() -> list[str]:
    """The names that the table has now."""
    found, file = [], ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            file = next((name for name, title in _FILES.items() if line[3:].startswith(title)), "")
        elif line.startswith("| ") and not line.startswith(("| test |", "| --- |")):
            found.append((file, line.split("|")[1].strip()))
    return names(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/conformance.md from a run.")
    parser.add_argument("--names", action="store_true", help="print the names, run nothing")
    if parser.parse_args().names:
        rows = run("--collect-only", "-qq").rows
        print("\n".join(["names:", *names(rows)]))
        return
    recorder = run()
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(page(recorder.rows)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
