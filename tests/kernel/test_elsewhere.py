"""Where there is no userfaultfd: importing works, using raises NotSupported."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import aiouffd

#: What other systems lack: modules, and names of modules that are there.
_PRETEND = """
import sys
{imports}
for name in {modules!r}:
    sys.modules[name] = None
sys.platform = {platform!r}
import errno, mmap, os, signal, socket
for module, names in (
    (os, "memfd_create pidfd_open eventfd uname setns unshare sched_getaffinity preadv"),
    (errno, "EHWPOISON"),
    (mmap, "MAP_ANONYMOUS MAP_POPULATE MADV_DONTFORK MADV_DONTNEED PROT_READ"),
    (socket, {socket!r}),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
"""
#: What others import of these comes first: they were built for this system.
_OTHERS = """
import asyncio, asyncio.unix_events, argparse, contextlib, ctypes, socket, subprocess, tempfile
for name in "aiohttp matplotlib.figure obstore prometheus_client redis.asyncio rich.live".split():
    with contextlib.suppress(ImportError):
        __import__(name)
"""

SYSTEMS = {
    "darwin": {"platform": "darwin", "modules": [], "socket": "SO_PEERCRED MSG_CMSG_CLOEXEC"},
    "win32": {
        "platform": "win32",
        "modules": ["fcntl", "resource", "pwd", "grp", "termios", "tty"],
        "socket": "SO_PEERCRED MSG_CMSG_CLOEXEC AF_UNIX send_fds recv_fds SCM_RIGHTS",
    },
}


def elsewhere(system: str, program: str) -> str:
    """Run a program that believes to be on another system."""
    pretend = _PRETEND.format(imports=_OTHERS, **SYSTEMS[system])
    result = subprocess.run(
        [sys.executable, "-c", pretend + program],
        timeout=60,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def modules() -> list[str]:
    """Every module of the package but the one that is a program."""
    return [
        module.name
        for module in pkgutil.walk_packages(aiouffd.__path__, "aiouffd.")
        if not module.name.endswith("__main__")
    ]


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_module_can_be_imported(system: str) -> None:
    """Type checkers and documentation builds need no Linux."""
    program = "import importlib\n" + "".join(
        f"importlib.import_module({name!r})\n" for name in modules()
    )
    assert elsewhere(system, program + "print('done')") == "done\n"


@pytest.mark.parametrize("system", SYSTEMS)
def test_using_it_says_why_not(system: str) -> None:
    """Opening, probing and looking into a process raise NotSupported and nothing else."""
    program = """
from aiouffd.errors import NotSupported
from aiouffd.kernel import calls, gates, pagemap, probe
for call in (calls.require_linux, gates.open_userfaultfd, probe.probe, pagemap.open_pagemap):
    try:
        call()
    except NotSupported as error:
        print(error.missing)
"""
    assert elsewhere(system, program).splitlines() == ["userfaultfd exists on Linux only"] * 4


def test_without_fcntl_every_ioctl_says_why_not() -> None:
    """Where the module is missing no call gets as far as a NameError."""
    program = """
from aiouffd.errors import NotSupported
from aiouffd.kernel import calls
for call in (calls.wake, calls.unregister, calls.copy, calls.zeropage, calls.api):
    try:
        call(0, *[4096] * (call.__code__.co_argcount - 1 - len(call.__defaults__ or ())))
    except NotSupported as error:
        print(error.missing)
"""
    assert elsewhere("win32", program).splitlines() == ["userfaultfd exists on Linux only"] * 5


def test_the_command_line_says_why_not() -> None:
    """``aiouffd info`` is one line and status 1 there."""
    program = "from aiouffd.cli import main\nprint(main(['info']))"
    lines = elsewhere("darwin", program).splitlines()  # stderr comes among them
    assert len(lines) == 2
    assert "1" in lines
    assert any(line.startswith("aiouffd: userfaultfd exists on Linux only.") for line in lines)
