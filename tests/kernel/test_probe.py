"""The probe on the running kernel."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aiouffd.kernel import abi, calls, gates
from aiouffd.kernel.capabilities import NAMES
from aiouffd.kernel.probe import _range_ioctls, observe, probe


def test_a_probe_leaves_nothing_behind() -> None:
    """Every descriptor is closed, every mapping gone; twice gives the same."""
    probe()  # what is imported and opened once for all
    fds = os.listdir("/proc/self/fd")
    first, second = probe(), probe()
    assert os.listdir("/proc/self/fd") == fds
    assert b"aiouffd-probe" not in Path("/proc/self/maps").read_bytes()
    flags = [line for line in Path("/proc/self/smaps").read_text().splitlines() if "VmFl" in line]
    assert not any(flag in line.split() for line in flags for flag in ("um", "uw", "ui"))
    assert first.capabilities == second.capabilities


def test_the_report_agrees_with_the_kernel() -> None:
    """Each feature is available exactly if the kernel's own answer has its bit."""
    report = probe()
    fd = gates.open_userfaultfd(allow_user_mode_only=True)
    try:
        available, ioctls = calls.api(fd, 0)
    finally:
        os.close(fd)
    assert report.seen.features == available
    assert report.seen.ioctls == ioctls
    assert report.seen.range_ioctls & abi.UFFD_API_RANGE_IOCTLS == abi.UFFD_API_RANGE_IOCTLS
    assert tuple(one.name for one in report.capabilities)[: len(NAMES)] == NAMES
    for name, bit in abi.FEATURES.items():
        if name != "EVENT_FORK":
            assert report[name].available == bool(available & bit)


@pytest.mark.root
def test_this_machine_has_everything() -> None:
    """Linux 6.18 as root lacks nothing but, at times, free huge pages."""
    if tuple(int(part) for part in os.uname().release.split(".")[:2]) < (6, 16):
        pytest.skip("needs Linux 6.16 or newer for PAGE_IS_GUARD")
    lacking = [one.name for one in probe().capabilities if not one.available]
    assert set(lacking) <= {"hugetlb"}


def test_looking_a_capability_up() -> None:
    """By any spelling; bits that are not there are known to be missing; the rest is a KeyError."""
    report = probe()
    assert report["MOVE"] is report["move"]
    assert not report["bit-40"].available
    with pytest.raises(KeyError):
        report["teleport"]


def test_huge_pages_are_counted(huge_pages: object) -> None:
    """A pool with free pages makes hugetlb available."""
    assert callable(huge_pages)
    huge_pages(1)
    report = probe()
    assert report["hugetlb"].available
    assert report.seen.huge_pages >= 1


def _refuse(number: int) -> gates.Gate:
    def gate(flags: int) -> int:
        raise OSError(number, os.strerror(number))

    return (gates.DEVICE, gate)


def test_every_gate_is_tried_in_both_forms() -> None:
    """A refusal by one gate is recorded, and the next is used."""
    seen = observe((_refuse(errno.EACCES), (gates.SYSCALL, calls.open_syscall)))
    assert [(one.gate, one.user_mode_only) for one in seen.attempts] == [
        (gates.DEVICE, False),
        (gates.SYSCALL, False),
        (gates.DEVICE, True),
        (gates.SYSCALL, True),
    ]
    assert [one.errno for one in seen.attempts if one.gate == gates.DEVICE] == [errno.EACCES] * 2
    assert seen.features


def test_without_any_gate_the_rest_is_still_probed() -> None:
    """Features are unknown, the pagemap is not."""
    report = probe((_refuse(errno.ENOENT),))
    assert report.seen.features is None
    assert not report["move"].available
    assert report["pagemap-scan"].available
    assert not report["userfaultfd"].available
    assert "--device" in report["userfaultfd"].remedy


def test_a_gate_that_closes_midway() -> None:
    """Descriptors that run out between two questions leave answers out, and raise nothing."""
    granted = 0

    def gate(flags: int) -> int:
        nonlocal granted
        granted += 1
        if granted > 2:  # both forms were tried
            raise OSError(errno.EMFILE, "none left")
        return calls.open_syscall(flags)

    report = probe(((gates.SYSCALL, gate),))
    assert report.seen.features is None
    assert report.seen.tried["event-fork"] == errno.EMFILE
    assert not report["event-fork"].available


def test_a_gate_to_something_else() -> None:
    """A descriptor that is no userfaultfd answers nothing; what was tried on it says why."""

    def gate(flags: int) -> int:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    report = probe((("wrong", gate),))
    assert report.seen.features is None
    assert report.seen.tried["continue-wp"] == errno.ENOTTY
    assert report["userfaultfd"].available  # as far as the gate goes
    assert not report["move"].available


def test_a_kernel_that_refuses_to_register() -> None:
    """What cannot be registered adds nothing to the mask: here before the handshake."""
    fd = gates.open_userfaultfd()
    try:
        assert _range_ioctls(fd) == 0
        calls.api(fd, 0)
        assert _range_ioctls(fd) & abi.UFFD_API_RANGE_IOCTLS == abi.UFFD_API_RANGE_IOCTLS
    finally:
        os.close(fd)


# --- circumstances that only a process of its own can have ------------------------------

_CHILD = """
import ctypes, errno, sys
from aiouffd.kernel import probe
libc = ctypes.CDLL(None, use_errno=True)
def do(name, *arguments):
    if getattr(libc, name)(*arguments):
        raise OSError(ctypes.get_errno(), name)
"""


def _probe_after(setup: str, expression: str) -> str:
    """Probe in a child after some calls of the C library; return an expression's value."""
    program = f"{_CHILD}{setup}\nreport = probe.probe()\nprint({expression})\n"
    return subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    ).stdout.strip()


@pytest.mark.root
def test_a_refused_continue_is_said_with_its_errno() -> None:
    """Memory that is locked is there at once, and cannot be continued: EEXIST."""
    lock_what_is_mapped_later = "do('mlockall', 2)"
    tried = _probe_after(lock_what_is_mapped_later, "report.seen.tried['continue-wp']")
    assert tried == str(errno.EEXIST)


@pytest.mark.root
def test_a_hidden_proc_sys_leaves_the_pool_alone() -> None:
    """Without /proc/sys huge pages are those of /proc/meminfo; nothing is raised."""
    hide = """
do('unshare', 0x20000)  # CLONE_NEWNS
do('mount', b'none', b'/', None, 0x44000, None)  # MS_REC | MS_PRIVATE
do('mount', b'none', b'/proc/sys', b'tmpfs', 0, None)
"""
    assert _probe_after(hide, "report['userfaultfd'].available") == "True"
