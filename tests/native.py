"""C code of tests, built once per session.

Knows: the compiler.
Must not know: what the code does.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


@functools.cache
def build(source: Path, *, library: bool = True, sanitizer: str = "") -> Path:
    """Compile a C file, once per test session.

    Args:
        source: The file.
        library: A shared library; else a program.
        sanitizer: ``address`` or ``thread``: have it look on.

    Returns:
        The path of what was built.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip(f"no C compiler for {source.name}: install one (apt install gcc) or set CC")
    folder = Path(tempfile.mkdtemp(prefix="aiouffd-native-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    built = folder / (source.stem + (".so" if library else ""))
    how = ["-shared", "-fPIC"] if library else []
    if sanitizer:
        how.append(f"-fsanitize={sanitizer}")
    done = subprocess.run(
        [
            *(compiler, "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror"),
            *(*how, "-o", str(built), str(source)),
        ],
        check=not sanitizer,
        timeout=120,
    )
    if done.returncode:
        pytest.skip(f"no {sanitizer} sanitizer beside {compiler}: apt install libgcc-12-dev")
    return built
