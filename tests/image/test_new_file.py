"""Files that are complete under their name, or not there at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from aiouffd.image.new_file import NewFile


def test_only_its_owner_reads_a_new_image(tmp_path: Path) -> None:
    """The memory of a process may hold secrets: who else may read it is the owner's to say."""
    before = os.umask(0)
    try:
        NewFile(tmp_path / "image").commit()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "image").stat().st_mode) == 0o600
