"""One run of what a test suite pays for the harness: starting it, the plugin, the fixture.

Knows: how to take the time of a start, of an import, and of each test of a pytest run.
Must not know: what it is compared with.

    python -m benchmarks.harness_starting start|kept|interpreter|import|with|without CPU TIMES
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from .build import HERE

Sample = dict[str, float]
now = time.perf_counter_ns

TESTS = """
import pytest

@pytest.mark.parametrize("number", range({times}))
def test_it(number{fixture}):
    {body}
"""
#: How long each test takes, from its setup to its teardown.
CLOCK = """
import json, time, pytest

took = []

@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    before = time.perf_counter_ns()
    yield
    took.append(time.perf_counter_ns() - before)

def pytest_sessionfinish():
    with open("took.json", "w") as file:
        json.dump(took, file)
"""


def start(times: int) -> Sample:
    """Open and close a harness again and again."""
    from aiouffd.testing import Harness

    opening, closing = [], []
    for _ in range(times):
        before = now()
        harness = Harness()
        opened = now()
        harness.close()
        opening.append(opened - before)
        closing.append(now() - opened)
    return {"open_ns": statistics.median(opening), "close_ns": statistics.median(closing)}


def kept(times: int) -> Sample:
    """Open and close a harness again and again, with one helper process for all."""
    from aiouffd.testing import Harness
    from aiouffd.testing.helper import keeping

    with keeping():
        Harness().close()
        return start(times)


def interpreter(times: int) -> Sample:
    """Start an interpreter that ends at once."""
    took = []
    for _ in range(times):
        before = now()
        subprocess.run([sys.executable, "-S", "-E", "-c", ""], check=True)
        took.append(now() - before)
    return {"open_ns": statistics.median(took)}


def import_plugin(_: int) -> Sample:
    """Import the plugin where pytest is."""
    import pytest  # noqa: F401 - whoever has the plugin has it loaded

    before = now()
    import aiouffd.testing.pytest_plugin  # noqa: F401 - its import is what is measured

    return {"import_ns": now() - before}


def fixture(times: int, *, used: bool) -> Sample:
    """Run tests, each with a harness of its own and a region, or without."""
    what = (", uffd", "uffd.region()") if used else ("", "pass")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = TESTS.format(times=times, fixture=what[0], body=what[1])
        (folder / "test_it.py").write_text(text, encoding="utf-8")
        (folder / "conftest.py").write_text(CLOCK, encoding="utf-8")
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "aiouffd.testing.pytest_plugin"],
            cwd=folder,
            env=dict(os.environ, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", PYTHONPATH=str(HERE.parent)),
            stdout=sys.stderr,
            check=True,
        )
        took = json.loads((folder / "took.json").read_text(encoding="utf-8"))
    return {"test_ns": statistics.median(took)}


WHAT: dict[str, Callable[[int], Sample]] = {
    "start": start,
    "kept": kept,
    "interpreter": interpreter,
    "import": import_plugin,
    "with": lambda times: fixture(times, used=True),
    "without": lambda times: fixture(times, used=False),
}


def main(what: str, cpu: int, times: int) -> None:
    """Run and print."""
    os.sched_setaffinity(0, {cpu})
    print(json.dumps(WHAT[what](times)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
