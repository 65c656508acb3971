"""What is installed: the wheel has every module and runs alone, without one dependency."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout with the back end that pyproject.toml names."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        check=True,
        cwd=ROOT,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


def test_the_wheel_is_complete(wheel: Path) -> None:
    """Every module of the checkout, the entry points, the mark of typing, and the licence."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith("/METADATA"))
        entries = configparser.ConfigParser()
        entries.read_string(archive.read(metadata.replace("METADATA", "entry_points.txt")).decode())
        needs = [
            line
            for line in archive.read(metadata).decode().splitlines()
            if line.startswith("Requires-Dist:") and "extra ==" not in line
        ]
    modules = {
        str(path.relative_to(ROOT))
        for kind in ("*.py", "*.c")  # child programs of tests load what a C source makes
        for path in (ROOT / "aiouffd").rglob(kind)
    }
    assert modules | {"aiouffd/py.typed"} <= names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not needs, "the core has no dependency"
    assert dict(entries["console_scripts"]) == {"aiouffd": "aiouffd.cli:main"}
    assert dict(entries["pytest11"]) == {"aiouffd": "aiouffd.testing.pytest_plugin"}
    outside = {name for name in names if not name.startswith(("aiouffd/", "aiouffd-"))}
    assert not outside, "nothing but the package is installed"


def test_the_wheel_runs_alone(wheel: Path, tmp_path: Path) -> None:
    """``python -m aiouffd`` needs nothing but the wheel and the standard library."""
    program = (
        f"import runpy, sys; sys.path[:0] = [{str(wheel)!r}]; sys.argv[1:] = ['info'];"
        "runpy.run_module('aiouffd', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program],
        check=False,
        cwd=tmp_path,
        env={"PATH": os.defpath},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("aiouffd "), done.stderr
