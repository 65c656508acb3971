"""The pages of the documentation that start CRIU do what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, needs_criu
from tests.suites import Foreign

pytestmark = [pytest.mark.child, pytest.mark.root, pytest.mark.usefixtures("big_pipes")]

#: A new pid namespace has all pids free, loses no process by its end, and its first one, a shell,
#: waits for what others have left.
NAMESPACE = (
    "unshare",
    "--fork",
    "--pid",
    "--mount-proc",
    "--kill-child",
    "sh",
    "-c",
    '"$@"; exit $?',
    "sh",
)


@pytest.mark.parametrize("page", [page for page in PAGES if needs_criu(page)], ids=str)
def test_commands_run(page: Path, criu: Foreign, tmp_path: Path, time_scale: float) -> None:
    """With each version of CRIU."""
    programs = tmp_path / "criu"
    programs.mkdir()
    (programs / "criu").write_text(f'#!/bin/sh\nexec {criu.command} "$@"\n')
    (programs / "criu").chmod(0o755)

    def run(folder: Path) -> subprocess.CompletedProcess[str]:
        folder.mkdir()
        command = (sys.executable, "-m", "tests.docs.pages", page, folder, 60 * time_scale)
        return subprocess.run(
            [*NAMESPACE, *map(str, command)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
            text=True,
            timeout=300 * time_scale,
        )

    done = run(tmp_path / "page")
    if " 0 bytes of it lazily" in done.stdout:  # as the page says: dump it again (at_page_start)
        done = run(tmp_path / "again")
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
