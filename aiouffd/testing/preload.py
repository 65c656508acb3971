"""The library that child programs load: building it, and which programs can load it.

Knows: C compilers, where to keep what they build, the heads of ELF files.
Must not know: harnesses, regions; what the library says is ``announcements``'s.

Laws of this file:

* What is loaded into other programs lies in a folder that only this user can write to.
* A library appears whole or not at all, however many processes build it at once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from ..errors import NotSupported

_SOURCE: Final = Path(__file__).with_name("preload.c")
_FLAGS: Final = ("-std=gnu11", "-O2", "-shared", "-fPIC", "-fvisibility=hidden")
_SECONDS: Final = 60
_PT_INTERP: Final = 3
_ELF: Final = struct.Struct(
    "<4sBB10xHH12xQ14xHH"
)  # class, data; type, machine; e_phoff; ph size, count


@functools.cache
def library() -> str:
    """Give the path of the library, built if it has not been yet.

    It is kept in a folder of this user's below the one for temporary files.

    Raises:
        NotSupported: There is no C compiler, or it cannot build this.
    """
    command = _compiler()
    source = _SOURCE.read_bytes()
    made_of = source + shlex.join((*command, *_FLAGS)).encode() + platform.machine().encode()
    name = f"preload-{hashlib.sha256(made_of).hexdigest()[:20]}.so"
    folder = _folder()
    built = os.path.join(folder, name)
    if not os.path.exists(built):
        handle, path = tempfile.mkstemp(prefix=".building-", dir=folder)
        os.close(handle)
        try:
            _build(command, path)
            os.chmod(path, 0o755)  # noqa: S103 - programs of other users may load it
            os.rename(path, built)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            raise
    return built


def _build(command: list[str], path: str) -> None:
    try:
        done = subprocess.run(
            [*command, *_FLAGS, "-o", path, str(_SOURCE)],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
        if done.returncode == 0:
            return
        trouble = done.stderr.strip() or f"exit status {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        trouble = str(error)
    raise NotSupported(
        f"{shlex.join(command)} cannot build the library that child programs load:\n{trouble}",
        "Set CC to a C compiler for this machine, or install one: sudo apt install gcc.",
    )


def _compiler() -> list[str]:
    if os.environ.get("CC", "").strip():
        return shlex.split(os.environ["CC"])
    for name in ("cc", "gcc", "clang"):
        if (path := shutil.which(name)) is not None:
            return [path]
    raise NotSupported(
        "child programs load a small library, and there is no C compiler to build it",
        "Install one (sudo apt install gcc), or set CC.",
    )


def _folder() -> str:
    """Give a folder that only this user can write to; others may read it."""
    folder = os.path.join(tempfile.gettempdir(), f"aiouffd-{os.geteuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o755)  # programs of other users may load what is in it
    status = os.lstat(folder)
    if (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid == os.geteuid()
        and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        return folder
    raise NotSupported(
        f"{folder} is not a folder that only this user can write to, so no library is kept there",
        "Remove it, or set TMPDIR to another folder.",
    )


def why_not(program: str) -> str | None:
    """Say why a program will not load the library: static, with other rights; None if it may.

    Args:
        program: Path of the file.  One that is no ELF file (a script) may always.
    """
    try:
        status = os.stat(program)
        with open(program, "rb") as file:
            head = file.read(_ELF.size)
            if len(head) < _ELF.size or head[:4] != b"\x7fELF":
                return None
            if _runs_with_other_rights(program, status):
                return "it is setuid, setgid or has file capabilities, and such programs load none"
            _, bits, order, _, machine, table, size, count = _ELF.unpack(head)
            if (bits, order, machine) != _native():
                return "it is built for another processor than this Python"
            file.seek(table)
            entries = file.read(size * count)
    except OSError:  # not readable: it runs or not, and is asked afterwards
        return None
    kinds = {
        int.from_bytes(entries[at : at + 4], "little") for at in range(0, len(entries), size or 1)
    }
    if _PT_INTERP not in kinds:
        return "it is linked statically, and such programs load none"
    return None


def _runs_with_other_rights(program: str, status: os.stat_result) -> bool:
    if status.st_mode & stat.S_ISUID and status.st_uid != os.geteuid():
        return True
    if status.st_mode & stat.S_ISGID and status.st_gid != os.getegid():
        return True
    try:
        return bool(os.getxattr(program, "security.capability")) and os.geteuid() != 0
    except OSError:
        return False


@functools.cache
def _native() -> tuple[int, int, int]:
    """Give class, byte order and machine of what runs now."""
    with open("/proc/self/exe", "rb") as file:
        _, bits, order, _, machine, *_ = _ELF.unpack(file.read(_ELF.size))
    return bits, order, machine
