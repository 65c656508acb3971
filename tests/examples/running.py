"""Run an example as a reader would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent.parent


def run_example(name: str, *arguments: str) -> list[str]:
    """Run ``examples/name`` and give the lines it prints; warnings and errors fail.

    Args:
        name: Of the file.
        arguments: For it.
    """
    run = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / name, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": os.fspath(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    assert not run.stderr
    return run.stdout.splitlines()
