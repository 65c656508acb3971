"""What the pages show is run.

A ``python`` block is a whole program: it must end well, and print the ``output`` block behind it,
if there is one; or it is a file of tests, see tests/docs/pages.py.  A ``py`` block is a fragment:
it must compile.  ``pycon`` blocks are doctests.  ``bash`` blocks are commands, see
tests/docs/pages.py; what cannot be run is a ``console`` or ``sh`` block.  Pages that start CRIU
are run by tests/interop.
"""

from __future__ import annotations

import ast
import doctest
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvm_guest import why_not
from tests.docs.pages import (
    BLOCK,
    PAGES,
    ROOT,
    STORIES,
    blurred,
    has_commands,
    has_tests,
    missing,
    needs_criu,
    needs_kvm,
    needs_root,
    run_page,
    run_story,
    run_tests,
)

pytestmark = pytest.mark.once


def _blocks(language: str) -> list[object]:
    return [
        pytest.param(
            block, id=f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, block.start()) + 1}"
        )
        for page in PAGES
        if page not in STORIES
        for text in [page.read_text(encoding="utf-8")]
        for block in BLOCK.finditer(text)
        if block["language"] == language
    ]


def run(program: str | Path, time_scale: float) -> str:
    """Run a program as a user would, with warnings as errors, and return what it printed."""
    arguments = [program] if isinstance(program, Path) else ["-c", program]
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        timeout=30 * time_scale,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.mark.parametrize("block", _blocks("python"))
def test_programs_run(block: re.Match[str], tmp_path: Path, time_scale: float) -> None:
    """A program on a page, or a file of tests, does what the page says."""
    if lacking := missing(block["code"]):
        pytest.skip(f"needs {lacking}")
    if has_tests(block["code"]):
        run_tests(block, tmp_path, 60 * time_scale)
        return
    printed = run(block["code"], time_scale)
    assert block["output"] is None or printed == block["output"]


@pytest.mark.parametrize("block", _blocks("py"))
def test_fragments_compile(block: re.Match[str]) -> None:
    """A fragment on a page is Python."""
    compile(block["code"], "fragment", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("block", _blocks("pycon"))
def test_sessions_hold(block: re.Match[str]) -> None:
    """What an interactive session on a page shows is what one gets."""
    runner = doctest.DocTestRunner()
    session = doctest.DocTestParser().get_doctest(block["code"], {}, "session", None, 0)
    failures: list[str] = []
    runner.run(session, out=failures.append)
    assert not failures, "".join(failures)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if has_commands(page) and not needs_criu(page) and page not in STORIES],
    ids=str,
)
def test_commands_run(page: Path, tmp_path: Path, time_scale: float) -> None:
    """The commands of a page, one after the other, do what the page says."""
    if needs_kvm(page) and (why_not() or os.geteuid() != 0):
        pytest.skip(f"needs root, and KVM on x86-64: {why_not() or 'sudo make test'}")
    if needs_root(page) and os.geteuid() != 0:
        pytest.skip("needs root: sudo make test")
    run_page(page, tmp_path, 30 * time_scale)


@pytest.mark.parametrize("page", STORIES, ids=str)
def test_stories_come_true(page: Path, tmp_path: Path, time_scale: float) -> None:
    """Who saves and runs what a page says sees what it shows."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc: apt install gcc")
    run_story(page, tmp_path, 60 * time_scale)


def test_samples_differ_in_numbers_only() -> None:
    """What a page shows of one run is recognised in another, and nothing else is."""
    shown = "3 processes     12.5 MiB at 0x7f00\n"
    assert blurred(shown) == blurred("14 processes 2,048 MiB at 0xab12\n")
    assert blurred(shown) != blurred("3 processes  12.5 KiB at 0x7f00\n")


def test_the_tutorials_program_serves_a_fault(time_scale: float) -> None:
    """The tutorial's program prints what the tutorial says."""
    program = Path(__file__).with_name("first_fault.py")
    expected = program.with_suffix(".out").read_text(encoding="utf-8")
    assert run(program, time_scale) == expected
