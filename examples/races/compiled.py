"""Compile the C files of this folder, for the examples beside it."""

import atexit
import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path


def library(*sources: str) -> ctypes.CDLL:
    """Build a shared library from files of this folder, and load it.

    Args:
        sources: Names of C files.

    Raises:
        SystemExit: There is no C compiler.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("no C compiler: install one (apt install gcc), or set CC")
    here = Path(__file__).resolve().parent
    folder = tempfile.mkdtemp(prefix="aiouffd-races-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    built = Path(folder, Path(sources[0]).with_suffix(".so"))
    flags = ["-O2", "-g", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror"]
    paths = [here / source for source in sources]
    subprocess.run([compiler, *flags, "-o", built, *paths], check=True, timeout=120)
    return ctypes.CDLL(str(built), use_errno=True)
