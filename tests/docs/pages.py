"""Run what a page shows, as its reader would.

    python -m tests.docs.pages PAGE FOLDER      runs a page's commands in a folder

Knows: the blocks of a page, and what each kind promises.
Must not know: how the tests of this project run; which pages there are.

Laws of this file:

* A ``python`` block that has tests in it is a test file: pytest runs it, with the plugin
  installed.  All of its tests pass; or, if there is a ``sample`` block behind it, pytest prints
  these lines in this order, with others between them.

* ``bash`` blocks are commands.  Those of a page run in order, in one new folder; each must end
  with status 0 and say nothing on stderr.
* An ``output`` block behind one is what it prints.  A ``sample`` block is what it has printed
  once: numbers and the widths of columns differ from run to run, the words do not.
* A page of STORIES is run as a whole: what it says to save is saved, ``bash`` blocks run, and a
  ``sample`` behind one is part of what it prints, as above; how it ends is the sample's to say.
* A page that speaks of ``s3://`` has an S3 with a bucket named ``images``, in its environment.
* ``examples/`` is there, as in a checkout.
* What a page leaves in the background ends with the page, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from tests.testing.conftest import install

ROOT: Final = Path(__file__).resolve().parent.parent.parent
PAGES: Final = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

#: Pages whose reader saves files and runs commands, some of which fail on purpose.
STORIES: Final = [ROOT / "docs" / "tutorial-frozen-thread.md"]

BLOCK: Final = re.compile(
    r"^```(?P<language>python|py|pycon|bash)\n(?P<code>.*?)^```$"
    r"(?:\n+^```(?P<kind>output|sample)\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)

#: pytest-asyncio has each test start a loop of its own, and asks to say so.
_SETTINGS: Final = ("-o", "asyncio_default_fixture_loop_scope=function")

_SCENE: Final = re.compile(
    r"(?:Save (?:this|it) as `(?P<file>[^`]+)`:\n\n)?"
    r"^```(?P<language>python|c|bash|sample)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)

_NUMBER: Final = re.compile(r"0x[0-9a-f]+|\d+(?:[.,:]\d+)*")
_SPACE: Final = re.compile(r"[ \t]+")


def has_tests(code: str) -> bool:
    """Say whether a Python block is a file of tests rather than a program."""
    return re.search(r"^(async )?def test_", code, re.MULTILINE) is not None


def missing(code: str) -> str:
    """Name what a block imports, or has a plugin of, that this environment lacks."""
    names = re.findall(r"^ *(?:import|from) (\w+)|@pytest\.mark\.(anyio)", code, re.MULTILINE)
    return ", ".join(sorted({a or b for a, b in names if find_spec(a or b) is None}))


def run_tests(block: re.Match[str], folder: Path, seconds: float) -> None:
    """Run a block of tests, as pytest does it for a user who has the plugin installed.

    Args:
        block: A ``python`` block.
        folder: A new one.
        seconds: What it may take.

    Raises:
        AssertionError: The tests did not do what the page says.
    """
    inside = folder / "inside"
    inside.mkdir()
    (inside / "test_page.py").write_text(block["code"], encoding="utf-8")
    done = subprocess.run(
        # Warnings of its plugins about settings that this folder does not have are not ours.
        [*(sys.executable, "-m", "pytest", "--color=no", "-q", "-rA", "-W", "error"), *_SETTINGS],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        cwd=inside,
        env={**os.environ, "PYTHONPATH": install(folder / "site"), "COLUMNS": "100"},
        text=True,
        timeout=seconds,
    )
    if block["kind"] == "sample":
        _assert_shown(block["output"], done.stdout)
    else:
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        assert block["output"] is None, "what pytest prints differs: show it as a sample"


def _assert_shown(sample: str, printed: str) -> None:
    """Check that all lines of a sample were printed, in their order."""
    lines = iter(blurred(printed).splitlines())
    for line in blurred(sample).splitlines():
        assert line.strip() in map(str.strip, lines), f"not printed: {line}\n{printed}"


def run_story(page: Path, folder: Path, seconds: float) -> None:
    """Do what a page tells its reader to do, in its order.

    Args:
        page: One of STORIES.
        folder: A new one.
        seconds: What each block of commands may take.

    Raises:
        AssertionError: It did not come as the page says.
    """
    programs, inside = folder / "programs", folder / "folder"
    programs.mkdir()
    inside.mkdir()
    program = programs / "pytest"
    # pytest-asyncio is not among what such a page installs.
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m pytest -p no:asyncio "$@"\n')
    program.chmod(0o755)
    environment = {
        # Where it thinks that nobody looks, pytest cuts no line short.
        **{name: value for name, value in os.environ.items() if name != "CI"},
        "PYTHONPATH": install(folder / "site"),
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    printed = ""
    for scene in _SCENE.finditer(page.read_text(encoding="utf-8")):
        if scene["file"]:
            (inside / scene["file"]).write_text(scene["text"], encoding="utf-8")
        elif scene["language"] == "sample":
            _assert_shown(scene["text"], printed)
        else:
            assert scene["language"] == "bash", f"nothing is done with\n{scene['text']}"
            printed = subprocess.run(
                ["bash", "-c", scene["text"]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
                cwd=inside,
                env=environment,
                text=True,
                timeout=seconds,
            ).stdout


def has_commands(page: Path) -> bool:
    """Say whether a page has anything to run."""
    return "\n```bash\n" in page.read_text(encoding="utf-8")


def needs_criu(page: Path) -> bool:
    """Say whether a page's commands start CRIU, which is not in every system."""
    blocks = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return any(
        re.search(r"^ *criu ", block["code"], re.MULTILINE)
        for block in blocks
        if block["language"] == "bash"
    )


def needs_kvm(page: Path) -> bool:
    """Say whether a page's commands make a virtual machine, which takes rights and the hardware."""
    blocks = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return any(block["language"] == "bash" and "kvm" in block["code"] for block in blocks)


def needs_root(page: Path) -> bool:
    """Say whether a page's commands stop or fail system calls at memory that they touch."""
    return "python3 examples/races/changed_path.py" in page.read_text(encoding="utf-8")


def run_page(page: Path, folder: Path, seconds: float) -> None:
    """Run the commands of a page.

    Args:
        page: Markdown.
        folder: A new one; the commands run in ``folder/folder``.
        seconds: What each block may take.

    Raises:
        AssertionError: They did not do what the page says.
    """
    programs, inside = folder / "programs", folder / "folder"
    programs.mkdir()
    inside.mkdir()
    (inside / "examples").symlink_to(ROOT / "examples")
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
            "PYTHONPATH": install(folder / "site"),
            # Unset, pytest-asyncio warns, and warnings are errors here.
            "PYTEST_ADDOPTS": " ".join(_SETTINGS),
            "PATH": f"{programs}:{os.environ['PATH']}",
        }
        for block in BLOCK.finditer(text):
            if block["language"] == "bash":
                line = text.count("\n", 0, block.start()) + 1
                _run_block(f"{page.name}:{line}", block, inside, environment, seconds, stack)


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


def _run_block(
    where: str,
    block: re.Match[str],
    folder: Path,
    environment: dict[str, str],
    seconds: float,
    stack: contextlib.ExitStack,
) -> None:
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
        stack.callback(_end_group, shell.pid)
        try:
            printed, errors = shell.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _end_group(shell.pid)
            raise
    assert (shell.returncode, errors) == (0, ""), f"{where}: {shell.returncode}\n{errors}{printed}"
    if block["output"] is not None:
        same = blurred if block["kind"] == "sample" else str
        assert same(printed) == same(block["output"]), f"{where} printed\n{printed}"


def blurred(text: str) -> str:
    """Give what of a text is the same in each run: no numbers, no widths."""
    return _SPACE.sub(" ", _NUMBER.sub("0", text))


def _end_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    run_page(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
