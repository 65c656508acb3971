"""examples/lazy_array.py, as its reader runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_lazy_array() -> None:
    """It reads its 64 GiB here and there, and says that next to nothing of it was fetched."""
    done = subprocess.run(
        [sys.executable, "examples/lazy_array.py"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("8,589,934,592 elements")
    assert "first sum 332,833,500" in first
    # 512 samples, the last element and one more, and the megabyte that was ensured
    assert second.startswith("3,072 KiB of 64 GiB fetched"), second
