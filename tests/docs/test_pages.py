"""What the pages show is run.

A ``python`` block is a whole program: it must end well, and print the ``output`` block behind it,
if there is one.  A ``py`` block is a fragment: it must compile.  ``pycon`` blocks are doctests.
``bash`` blocks are commands: those of a page run in order, in one new folder, and print their
``output`` blocks; what cannot be run is a ``console`` or ``sh`` block.  A page that speaks of
``s3://`` has an S3 with a bucket named ``images``, in its environment.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"^```(?P<language>python|py|pycon|bash)\n(?P<code>.*?)^```$"
    r"(?:\n+^```output\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)


def _blocks(language: str) -> list[object]:
    return [
        pytest.param(
            block, id=f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, block.start()) + 1}"
        )
        for page in PAGES
        for text in [page.read_text(encoding="utf-8")]
        for block in _BLOCK.finditer(text)
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
def test_programs_run(block: re.Match[str], time_scale: float) -> None:
    """A program on a page does what the page says."""
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


@contextlib.contextmanager
def _s3() -> Iterator[dict[str, str]]:
    """Run an S3; give the variables by which clients find it."""
    command = [sys.executable, "-m", "tests.s3_server"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            lines = iter(server.stdout.readline, "\n")
            words = [shlex.split(line)[1].partition("=") for line in lines]
            yield {name: value for name, _, value in words}
        finally:
            server.terminate()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "\n```bash\n" in page.read_text(encoding="utf-8")], ids=str
)
def test_commands_run(page: Path, tmp_path: Path, time_scale: float) -> None:
    """The commands of a page, one after the other, do what the page says."""
    programs, folder = tmp_path / "programs", tmp_path / "folder"
    programs.mkdir()
    folder.mkdir()
    for name, module in (("aiouffd", "-m aiouffd"), ("python3", "")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -W error {module} "$@"\n')
        program.chmod(0o755)
    text = page.read_text(encoding="utf-8")
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(_s3()) if "s3://" in text else {}
        environment = {
            **os.environ,
            **found,
            "PYTHONPATH": str(ROOT),
            "PATH": f"{programs}:{os.environ['PATH']}",
        }
        _run_commands(text, folder, environment, time_scale, stack)


def _run_commands(
    text: str,
    folder: Path,
    environment: dict[str, str],
    time_scale: float,
    stack: contextlib.ExitStack,
) -> None:
    for block in _BLOCK.finditer(text):
        if block["language"] != "bash":
            continue
        with subprocess.Popen(
            ["bash", "-e", "-c", block["code"]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=environment,
            text=True,
            start_new_session=True,
        ) as shell:
            # What a page leaves in the background ends with the page, however that ends.
            stack.callback(_end_group, shell.pid)
            try:
                printed, errors = shell.communicate(timeout=30 * time_scale)
            except subprocess.TimeoutExpired:
                _end_group(shell.pid)
                raise
        assert (shell.returncode, errors) == (0, ""), errors
        assert block["output"] is None or printed == block["output"]


def _end_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def test_the_tutorials_program_serves_a_fault(time_scale: float) -> None:
    """The tutorial's program prints what the tutorial says."""
    program = Path(__file__).with_name("first_fault.py")
    expected = program.with_suffix(".out").read_text(encoding="utf-8")
    assert run(program, time_scale) == expected
