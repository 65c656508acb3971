"""examples/systemd: units that systemd itself finds nothing wrong with."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = sorted((Path(__file__).resolve().parents[2] / "examples" / "systemd").glob("aiouffd.*"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_accepts_the_unit(unit: Path) -> None:
    """Every line is known, and says something that systemd understands."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here: apt install systemd")
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)],
        capture_output=True,
        check=False,
        text=True,
        timeout=30,
    )
    said = [line for line in done.stderr.splitlines() if not _is_newer(line)]
    assert (done.returncode, said) == (0, [])


def _is_newer(line: str) -> bool:
    """Whether it is only that this systemd is older than 254."""
    return "Unknown key 'FileDescriptorStorePreserve'" in line


def test_the_unit_keeps_what_a_crash_needs() -> None:
    """Without the fd store or a restart a crash of the server would be the end of its targets."""
    text = UNITS[0].read_text(encoding="utf-8")
    for line in (
        "Type=notify",
        "FileDescriptorStoreMax=",
        "FileDescriptorStorePreserve=yes",
        "Restart=on-failure",
    ):
        assert f"\n{line}" in text
