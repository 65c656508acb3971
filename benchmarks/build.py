"""Compile the C beside these scripts, once per change of its text.

Knows: the compiler's name and where its output goes.
Must not know: what the programs do.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent / "build" / "benchmarks"


def compile_c(name: str = "floor.c", folder: Path = HERE) -> Path:
    """Compile one C file into a program.

    Args:
        name: The file's name.
        folder: Where it is.

    Returns:
        The program; its name carries a hash of the source, so a stale one is never run.

    Raises:
        RuntimeError: There is no C compiler.
    """
    return _compile(folder / name, "", ())


def compile_library(name: str, folder: Path = HERE) -> Path:
    """Compile one C file into a library for ctypes; otherwise as ``compile_c``."""
    return _compile(folder / name, ".so", ("-shared", "-fPIC"))


def _compile(source: Path, suffix: str, options: Sequence[str]) -> Path:
    stamp = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    program = OUTPUT / f"{source.stem}-{stamp}{suffix}"
    if program.exists():
        return program
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("The C floor needs a C compiler: apt-get install gcc libc6-dev")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    partial = program.with_suffix(f".{os.getpid()}")  # two runs may build at once
    command = [compiler, "-O2", "-Wall", "-Wextra", "-pthread", *options]
    subprocess.run([*command, str(source), "-o", str(partial)], check=True)
    partial.rename(program)
    return program
