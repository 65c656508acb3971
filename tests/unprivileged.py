"""Programs run as a user without rights.

Knows: a Python that such a user may run, and a copy of the package that they may read.
Must not know: what is run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

NOBODY = 65534


def _python() -> str:
    """Give a Python that any user may run: a virtual environment of root's is none."""
    for found in (getattr(sys, "_base_executable", ""), shutil.which("python3", path=os.defpath)):
        command = [found or "", "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        with contextlib.suppress(OSError):
            if subprocess.run(command, check=False, user=NOBODY, group=NOBODY).returncode == 0:
                return command[0]
    pytest.skip("no Python 3.11 that other users may run: apt install python3")


def run(script: str, *files: str | Path) -> str:
    """Run a Python script with this checkout's package as nobody; the test's user is root.

    Args:
        script: Its text.
        files: Copied to where nobody may read them; their new paths are ``sys.argv[1:]``.

    Returns:
        What it has printed; it ends with status 0, or the test fails.
    """
    python = _python()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        package = Path(__file__).resolve().parent.parent / "aiouffd"
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(package, Path(folder, "aiouffd"), ignore=ignore)
        temporary = Path(folder, "temporary")
        temporary.mkdir(mode=0o700)
        os.chown(temporary, NOBODY, NOBODY)
        done = subprocess.run(
            [python, "-c", script, *(shutil.copy(file, folder) for file in files)],
            check=False,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            cwd=folder,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": folder,
                "PYTHONDONTWRITEBYTECODE": "1",
                "TMPDIR": str(temporary),
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout
