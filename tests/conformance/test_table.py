"""The table in the docs names what is tested."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conformance.table import names_on_page


def test_the_table_has_every_name() -> None:
    """Every selftest that is re-told stands in docs/conformance.md, and nothing else does."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.conformance.table", "--names"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    expected = ran.stdout.partition("\nnames:\n")[2].splitlines()
    assert expected
    assert names_on_page() == expected, "run: python -m tests.conformance.table"
