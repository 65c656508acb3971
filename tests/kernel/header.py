"""What the machine's own headers say: a C program made from names, compiled and run.

Knows: how to ask the C compiler for constants, sizes and offsets.
Must not know: what the answers should be.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

_INCLUDES = (
    "stddef.h",
    "stdio.h",
    "sys/ioctl.h",
    "sys/socket.h",
    "sys/syscall.h",
    "linux/fs.h",
    "linux/userfaultfd.h",
    "linux/version.h",
)


def ask(constants: Mapping[str, str], guarded: Mapping[str, tuple[str, str]]) -> dict[str, int]:
    """Compile and run a program that prints numbers.

    Args:
        constants: Key to macro; printed if the headers define the macro.
        guarded: Key to (macro, expression); printed if the headers define the macro.

    Returns:
        The numbers of those that the headers have.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to ask for the header: install one (apt install gcc) or set CC")
    lines = [f"#include <{name}>" for name in _INCLUDES]
    lines += ['#define SHOW(key, value) printf("%s %llu\\n", key, (unsigned long long)(value))']
    lines += ["int main(void) {"]
    asked = {key: (macro, macro) for key, macro in constants.items()} | dict(guarded)
    for key, (macro, expression) in asked.items():
        lines += [f"#ifdef {macro}", f'SHOW("{key}", {expression});', "#endif"]
    lines += ["return 0; }", ""]
    with tempfile.TemporaryDirectory(prefix="aiouffd-header-") as folder:
        source, program = Path(folder, "ask.c"), Path(folder, "ask")
        source.write_text("\n".join(lines), encoding="ascii")
        subprocess.run([compiler, "-Wall", "-o", program, source], check=True, timeout=120)
        output = subprocess.run([program], check=True, timeout=20, stdout=subprocess.PIPE).stdout
    return {key: int(value) for key, value in map(str.split, output.decode().splitlines())}
