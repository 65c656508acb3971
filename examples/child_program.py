"""Freeze another program between two reads of shared memory, and change what it reads next.

    python examples/child_program.py

The program (child_program.c) prints a record: its length lies on one page, its text on the
next.  It stands where it has read the length and not yet the text; meanwhile another record is
written.  What it prints then is neither, unless it looks at the record's version again.
"""

import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

from aiouffd.testing import Harness, Region

SOURCE = Path(__file__).with_suffix(".c")


def write(region: Region, version: int, text: bytes) -> None:
    """Write a record as its producer would."""
    region.poke(0, struct.pack("=II", version - 1, 0))
    region.poke(region.page_size, text.ljust(100, b"\0"))
    region.poke(0, struct.pack("=II", version, len(text)))


def run(program: str, *arguments: str) -> str:
    """Have the program read a record while it changes; give what it prints."""
    with Harness() as uffd:
        region = uffd.region(2, name="record")
        region.name_page(1, "text")
        write(region, 2, b"Al pays 20")
        with (
            region.page("text").freeze() as freeze,
            uffd.program(
                [program, *arguments], {"AIOUFFD_REGION": region}, stdout=subprocess.PIPE
            ) as child,
        ):
            frozen = freeze.wait()
            print(f"{child.name} has read the length and stands before the text")
            write(region, 4, b"Bob pays 2000")
            frozen.release()
            return child.communicate()[0].decode().strip()


compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
if compiler is None:
    raise SystemExit("no C compiler: install one (apt install gcc), or set CC")
with tempfile.TemporaryDirectory() as folder:
    program = os.path.join(folder, "consumer")
    subprocess.run([compiler, "-O2", "-Wall", "-Werror", "-o", program, SOURCE], check=True)
    print("it prints:", run(program))
    print("the careful one:", run(program, "careful"))
