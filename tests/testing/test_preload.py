"""Building the library of child programs, and telling which programs load it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from aiouffd import NotSupported
from aiouffd.testing import preload


@pytest.fixture
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is built yet: an empty folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"aiouffd-{os.geteuid()}"


def build() -> str:
    return preload.library.__wrapped__()


@pytest.fixture
def compiler() -> str:
    """A C compiler."""
    found = shutil.which("cc") or shutil.which("gcc")
    if found is None:
        pytest.skip("no C compiler: apt install gcc")
    return found


def test_the_library_is_built_once(
    anew: Path, compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process finds what the first has built, in a folder that others cannot write."""
    log = tmp_path / "log"
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\necho run >> {log}\nexec {compiler} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CC", f"{wrapper} -pipe")
    built = build()
    assert build() == built
    assert log.read_text() == "run\n"
    assert os.listdir(anew) == [os.path.basename(built)]
    assert not stat.S_IMODE(os.stat(anew).st_mode) & 0o022


def test_without_a_compiler(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is named, with the way to get it."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(NotSupported, match=r"no C compiler.*apt install gcc"):
        build()


@pytest.mark.parametrize("command", ["false", "/nonexistent/cc", "sh -c 'echo oh no >&2; exit 1'"])
def test_a_compiler_that_fails(anew: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """What it says is shown, and nothing half-built is left."""
    monkeypatch.setenv("CC", command)
    with pytest.raises(NotSupported, match="cannot build the library") as caught:
        build()
    assert "oh no" in str(caught.value) or "oh no" not in command
    assert os.listdir(anew) == []


@pytest.mark.parametrize("how", ["link", "writable"])
def test_a_folder_of_somebody_else_is_refused(anew: Path, tmp_path: Path, how: str) -> None:
    """No library is loaded from where others could have put it."""
    if how == "link":
        anew.symlink_to(tmp_path)
    else:
        anew.mkdir()
        anew.chmod(0o777)
    with pytest.raises(NotSupported, match="only this user can write"):
        build()


def test_ordinary_programs_load_it() -> None:
    """A dynamically linked program may, and so may what is no ELF file or cannot be read."""
    assert preload.why_not(sys.executable) is None
    assert preload.why_not(__file__) is None
    assert preload.why_not("/nonexistent") is None


def test_a_static_program_does_not(compiler: str, tmp_path: Path) -> None:
    """A program without a dynamic loader is told from others, position-independent or not."""
    source = tmp_path / "static.c"
    source.write_text("int main(void) { return 0; }")
    for flag in ("-static", "-static-pie"):
        program = tmp_path / f"static{flag}"
        done = subprocess.run([compiler, flag, "-o", program, source], check=False)
        if done.returncode:
            pytest.skip("no static C library: apt install libc6-dev")
        assert "statically" in (preload.why_not(str(program)) or "")


def test_a_program_of_another_machine_does_not(tmp_path: Path) -> None:
    """A program for another processor cannot load what is built for this one."""
    program = tmp_path / "other"
    head = bytearray(Path(sys.executable).read_bytes()[:4096])
    head[18:20] = (0xF3).to_bytes(2, "little")  # EM_RISCV
    program.write_bytes(head)
    assert "another processor" in (preload.why_not(str(program)) or "")
