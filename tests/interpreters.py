"""The Python interpreters of this machine that the suite runs on.

Knows: where interpreters lie (PATH, pyenv) and how to see that one really runs.
Must not know: pytest, aiouffd.  Any Python 3.8 can read this file: it is what ``make`` starts.
"""

from __future__ import annotations

import os
import pwd
import subprocess
from dataclasses import dataclass
from pathlib import Path

WANTED = ("3.11", "3.12", "3.13")
OLDEST = (3, 11)

_QUESTION = """
import importlib.util as u, sys
print("%d.%d" % sys.version_info[:2], u.find_spec("ensurepip") is not None, sys.executable)
import ctypes, mmap, ssl, venv
"""


@dataclass(frozen=True)
class Interpreter:
    """An interpreter that was started and answered."""

    version: str  # such as "3.11"
    path: str
    has_ensurepip: bool  # Debian packs it apart, and venv cannot do without


def ask(path: str) -> Interpreter | None:
    """Start an interpreter and let it say what it is; None if it does not run."""
    try:
        done = subprocess.run(
            [path, "-I", "-c", _QUESTION],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None  # a pyenv shim without its version, a build without ssl, ...
    version, ensurepip, executable = done.stdout.rstrip("\n").split(" ", 2)
    return Interpreter(version, executable, ensurepip == "True")


def _homes() -> list[Path]:
    """List the home of this user and, under sudo, of the user who typed it."""
    homes = [Path.home()]
    if "SUDO_UID" in os.environ:
        try:
            homes.append(Path(pwd.getpwuid(int(os.environ["SUDO_UID"])).pw_dir))
        except (KeyError, ValueError):
            pass  # a user that the machine does not know
    return homes


def _candidates(name: str) -> list[str]:
    places = [Path(folder) / name for folder in os.get_exec_path() if folder]
    version = name[len("python") :]
    if "." in version:
        for home in _homes():
            places += sorted(home.glob(f".pyenv/versions/{version}*/bin/python"), reverse=True)
    return [str(place) for place in places if os.access(place, os.X_OK)]


def find(version: str) -> Interpreter | None:
    """Find an interpreter of a version such as "3.12", rather one that has ensurepip."""
    found: Interpreter | None = None
    for path in _candidates(f"python{version}"):
        interpreter = ask(path)
        if interpreter is None or interpreter.version != version:
            continue
        if interpreter.has_ensurepip:
            return interpreter
        found = found or interpreter
    return found


def find_all() -> list[Interpreter]:
    """Find one interpreter per wanted version; if 3.11 is missing, also what ``python3`` is."""
    found = [interpreter for interpreter in map(find, WANTED) if interpreter is not None]
    if not any(interpreter.version == WANTED[0] for interpreter in found):
        for path in _candidates("python3"):
            other = ask(path)
            if other is None or any(other.version == known.version for known in found):
                continue
            if tuple(map(int, other.version.split("."))) >= OLDEST:
                found.insert(0, other)
                break
    return found
