"""Who may open a userfaultfd, and what is said to who may not: faked answers and real ones."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aiouffd.errors import NotSupported
from aiouffd.kernel import abi, calls, gates
from aiouffd.kernel.gates import DEVICE, SYSCALL, Attempt, Circumstances, Gate

HOST = Circumstances(seccomp=False, ptrace=False, initial_namespace=True, sysctl=0)
ROOT = Circumstances(seccomp=False, ptrace=True, initial_namespace=True, sysctl=0)
CONTAINER = Circumstances(seccomp=True, ptrace=False, initial_namespace=True, sysctl=0)
NAMESPACE = Circumstances(seccomp=False, ptrace=True, initial_namespace=False, sysctl=0)


class Kernel:
    """A kernel's answers: per gate what it says to the full and to the user-mode-only form."""

    def __init__(self, device: tuple[int, int], syscall: tuple[int, int]) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.answers = {DEVICE: device, SYSCALL: syscall}

    def _gate(self, name: str) -> Callable[[int], int]:
        def answer(flags: int) -> int:
            user_mode_only = bool(flags & abi.UFFD_USER_MODE_ONLY)
            assert flags & ~abi.UFFD_USER_MODE_ONLY == os.O_CLOEXEC | os.O_NONBLOCK
            self.asked.append((name, user_mode_only))
            number = self.answers[name][user_mode_only]
            if number:
                raise OSError(number, os.strerror(number))
            return calls.open_syscall(flags)

        return answer

    @property
    def gates(self) -> tuple[Gate, ...]:
        return tuple((name, self._gate(name)) for name in self.answers)


ANSWERS = [0, errno.EPERM, errno.EACCES, errno.ENOENT, errno.ENOSYS, errno.EINVAL]


@pytest.mark.root
@pytest.mark.parametrize("accepts", [False, True])
@pytest.mark.parametrize("device", ANSWERS)
def test_the_permission_matrix(device: int, accepts: bool) -> None:
    """Device, then call on any failure, then user-mode only if accepted; else all is named."""
    for full, limited in itertools.product(ANSWERS, repeat=2):
        open_with_answers(device, full, limited, accepts)


def open_with_answers(device: int, full: int, limited: int, accepts: bool) -> None:
    """One square of the matrix."""
    kernel = Kernel((device, device), (full, limited))

    def attempt() -> int:
        return gates.open_userfaultfd(allow_user_mode_only=accepts, gates=kernel.gates)

    # Only what was refused for want of privilege is asked again.
    again = [name for name, number in ((DEVICE, device), (SYSCALL, full)) if number == errno.EPERM]
    granted = not device or not full or (accepts and SYSCALL in again and not limited)
    if granted:
        os.close(attempt())
    else:
        with pytest.raises(NotSupported) as caught:
            attempt()
        assert DEVICE in caught.value.missing
        assert SYSCALL in caught.value.missing
        for number in (device, full):
            assert errno.errorcode[number] in caught.value.missing
        assert caught.value.remedy.endswith(".")
    expected = [(DEVICE, False)]
    if device:
        expected.append((SYSCALL, False))
        if full and accepts:
            expected += [(name, True) for name in again]
    assert kernel.asked == expected


@pytest.mark.parametrize("device", ANSWERS)
def test_asking_for_user_mode_only_never_gives_more(device: int) -> None:
    """With user_mode_only every gate is asked for that form, and for no other."""
    kernel = Kernel((0, device), (0, 0))
    os.close(gates.open_userfaultfd(user_mode_only=True, gates=kernel.gates))
    assert all(limited for _, limited in kernel.asked)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_running_out_is_no_lack_of_support(number: int) -> None:
    """Exhausted descriptors or memory stay an OSError: retrying may help, remedies do not."""
    kernel = Kernel((errno.ENOENT, errno.ENOENT), (number, number))
    with pytest.raises(OSError) as caught:
        gates.open_userfaultfd(gates=kernel.gates)
    assert caught.value.errno == number
    assert caught.value.filename == SYSCALL


def test_an_error_without_a_number_is_named_too() -> None:
    """A gate that raises a bare OSError counts as EIO."""

    def broken(flags: int) -> int:
        raise OSError("no number")

    with pytest.raises(NotSupported) as caught:
        gates.open_userfaultfd(gates=(("broken", broken),))
    assert "broken: EIO" in caught.value.missing


@pytest.mark.parametrize(
    "gate, limited, number, at, words",
    [
        (DEVICE, False, errno.ENOENT, HOST, "--device /dev/userfaultfd"),
        (DEVICE, False, errno.EACCES, HOST, "udev"),
        (DEVICE, False, errno.EPERM, CONTAINER, "device cgroup"),
        (DEVICE, False, errno.ENXIO, HOST, "make the node anew"),
        (SYSCALL, False, errno.ENOSYS, HOST, "CONFIG_USERFAULTFD"),
        (SYSCALL, False, errno.ENOSYS, CONTAINER, "seccomp"),
        (SYSCALL, True, errno.EINVAL, HOST, "Linux 5.11"),
        (SYSCALL, False, errno.EACCES, ROOT, "SELinux"),
        (SYSCALL, False, errno.EPERM, HOST, "sysctl vm.unprivileged_userfaultfd=1"),
        (SYSCALL, False, errno.EPERM, HOST, "CAP_SYS_PTRACE"),
        (SYSCALL, False, errno.EPERM, HOST, "user_mode_only"),
        (SYSCALL, False, errno.EPERM, NAMESPACE, "outside of this user namespace"),
        (SYSCALL, False, errno.EPERM, CONTAINER, "a seccomp filter that lets the call through"),
        (SYSCALL, True, errno.EPERM, CONTAINER, "a seccomp filter refuses"),
        (SYSCALL, False, errno.EINVAL, HOST, "man 2 userfaultfd"),
    ],
)
def test_each_refusal_has_its_remedy(
    gate: str, limited: bool, number: int, at: Circumstances, words: str
) -> None:
    """What would help depends on gate, errno and circumstances."""
    assert words in gates.remedy(Attempt(gate, limited, number), at)


def test_a_remedy_does_not_promise_what_cannot_help() -> None:
    """No sysctl where the kernel has none; a privileged process is told of the filter only."""
    old = Circumstances(seccomp=False, ptrace=False, initial_namespace=True, sysctl=None)
    assert "sysctl" not in gates.remedy(Attempt(SYSCALL, False, errno.EPERM), old)
    filtered = Circumstances(seccomp=True, ptrace=True, initial_namespace=True, sysctl=0)
    text = gates.remedy(Attempt(SYSCALL, False, errno.EPERM), filtered)
    assert "a seccomp filter refuses" in text
    assert "sysctl" not in text
    limited = gates.remedy(Attempt(SYSCALL, True, errno.EPERM), HOST)
    assert "user_mode_only" not in limited


def test_attempts_read_well() -> None:
    """An attempt says the gate, the form and the answer; an unknown number stays a number."""
    assert str(Attempt(DEVICE, False, 0)) == "/dev/userfaultfd: ok"
    assert str(Attempt(SYSCALL, True, errno.EPERM)).startswith(
        "userfaultfd(2) (user-mode only): EPERM ("
    )
    assert "99999" in str(Attempt(SYSCALL, False, 99999))


def test_circumstances_are_those_of_this_process() -> None:
    """What is read from /proc agrees with what the kernel then grants."""
    at = gates.read_circumstances()
    assert at.privileged == (at.ptrace and at.initial_namespace)
    if at.privileged and not at.seccomp:
        os.close(gates.open_userfaultfd())


@pytest.mark.parametrize(
    "status, seccomp, ptrace",
    [
        (b"Name:\tx\nno colon\nCapEff:\t0000000000080000\nSeccomp:\t2\n", True, True),
        (b"Name:\t\xff\nCapEff:\t0000000000000000\nSeccomp:\t1\n", False, False),
        (b"Name:\tvery old\n", False, False),
    ],
)
def test_circumstances_of_other_kernels(
    tmp_path: Path, status: bytes, seccomp: bool, ptrace: bool
) -> None:
    """Missing files and fields mean an older kernel, not an error."""
    (tmp_path / "self" / "ns").mkdir(parents=True)
    (tmp_path / "self" / "status").write_bytes(status)
    assert gates.read_circumstances(str(tmp_path)) == Circumstances(seccomp, ptrace, True, None)
    (tmp_path / "self" / "ns" / "user").touch()
    (tmp_path / "sys" / "vm").mkdir(parents=True)
    (tmp_path / "sys" / "vm" / "unprivileged_userfaultfd").write_bytes(b"1\n")
    assert gates.read_circumstances(str(tmp_path)) == Circumstances(seccomp, ptrace, False, 1)


# --- real processes with fewer rights --------------------------------------------------

BECOME_NOBODY = "os.setgroups([]); os.setgid(65534); os.setuid(65534)"

ENTER_USER_NAMESPACE = """
if libc.unshare(0x10000000):
    raise OSError(ctypes.get_errno(), "unshare")
with open("/proc/self/uid_map", "w") as file:
    file.write(f"0 {uid} 1")
"""

#: A filter that answers userfaultfd(2) with EPERM, as container runtimes install it.
DENY_SYSCALL = """
class Filter(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte),
                ("k", ctypes.c_uint)]
class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.POINTER(Filter))]
rules = (Filter * 4)(
    Filter(0x20, 0, 0, 0),                      # load the call's number
    Filter(0x15, 0, 1, abi.NR_USERFAULTFD),     # userfaultfd?
    Filter(0x06, 0, 0, 0x00050000 | errno.EPERM),  # SECCOMP_RET_ERRNO
    Filter(0x06, 0, 0, 0x7FFF0000),             # SECCOMP_RET_ALLOW
)
program = Program(4, rules)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program), 0, 0):
    raise OSError(ctypes.get_errno(), "prctl")
"""

_PROGRAM = """
import ctypes, encodings.ascii, errno, json, os
from aiouffd.errors import NotSupported
from aiouffd.kernel import abi, gates, probe
libc = ctypes.CDLL(None, use_errno=True)
uid = os.getuid()
{setup}
def outcome(**settings):
    try:
        os.close(gates.open_userfaultfd(**settings))
    except NotSupported as error:
        return [error.missing, error.remedy]
    return "ok"
report = probe.probe()
print(json.dumps({{
    "full": outcome(),
    "accepting": outcome(allow_user_mode_only=True),
    "limited": outcome(user_mode_only=True),
    "capabilities": {{one.name: one.available for one in report.capabilities}},
    "remedies": {{one.name: one.remedy for one in report.capabilities}},
}}))
"""


def in_child(*setup: str) -> Any:
    """Run gates and probe in a process that has given up rights first."""
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(setup="\n".join(setup))],
        timeout=60,
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(result.stdout)


def unprivileged_sysctl() -> bool:
    """Whether this machine lets everybody in."""
    return gates.read_circumstances().sysctl == 1


@pytest.mark.root
def test_root_is_let_in() -> None:
    """Root has everything, by every gate."""
    told = in_child()
    assert (told["full"], told["accepting"], told["limited"]) == ("ok", "ok", "ok")
    for name in ("userfaultfd", "kernel-faults", "user-mode-only", "syscall", "event-fork"):
        assert told["capabilities"][name]


@pytest.mark.root
def test_nobody_gets_user_mode_faults_only() -> None:
    """An unprivileged user is refused by device and call, and may have the limited form."""
    if unprivileged_sysctl():
        pytest.skip("needs vm.unprivileged_userfaultfd=0: sysctl vm.unprivileged_userfaultfd=0")
    told = in_child(BECOME_NOBODY)
    missing, remedy = told["full"]
    assert "/dev/userfaultfd: EACCES" in missing
    assert "userfaultfd(2): EPERM" in missing
    for words in ("udev", "sysctl vm.unprivileged_userfaultfd=1", "CAP_SYS_PTRACE"):
        assert words in remedy
    assert (told["accepting"], told["limited"]) == ("ok", "ok")
    has = told["capabilities"]
    assert has["userfaultfd"]
    assert has["user-mode-only"]
    for name in ("kernel-faults", "device", "syscall", "event-fork"):
        assert not has[name]
        assert told["remedies"][name]
    for name in ("move", "poison", "wp-async", "event-remap", "event-remove", "event-unmap"):
        assert has[name]  # all other features need no privilege


@pytest.mark.root
def test_root_of_a_user_namespace_is_not_root() -> None:
    """The device follows its file mode; the call and EVENT_FORK want the initial namespace."""
    if unprivileged_sysctl():
        pytest.skip("needs vm.unprivileged_userfaultfd=0: sysctl vm.unprivileged_userfaultfd=0")
    told = in_child(ENTER_USER_NAMESPACE)
    has = told["capabilities"]
    assert not has["syscall"]
    assert "outside of this user namespace" in told["remedies"]["syscall"]
    assert not has["event-fork"]
    assert "initial user namespace" in told["remedies"]["event-fork"]
    assert has["user-mode-only"]
    assert has["device"]  # its owner is this very uid
    assert told["full"] == "ok"


@pytest.mark.root
def test_a_user_namespace_of_nobody() -> None:
    """Capabilities in a namespace of one's own open nothing."""
    if unprivileged_sysctl():
        pytest.skip("needs vm.unprivileged_userfaultfd=0: sysctl vm.unprivileged_userfaultfd=0")
    # A process that changed its user may not write its own uid_map until it is dumpable again.
    told = in_child(BECOME_NOBODY, "libc.prctl(4, 1, 0, 0, 0); uid = 65534", ENTER_USER_NAMESPACE)
    missing, remedy = told["full"]
    assert "/dev/userfaultfd: EACCES" in missing
    assert "outside of this user namespace" in remedy
    assert told["accepting"] == "ok"


@pytest.mark.root
def test_a_seccomp_filter_leaves_the_device() -> None:
    """The usual container: the filter denies the call, the device passes it."""
    told = in_child(DENY_SYSCALL)
    assert told["full"] == "ok"
    has = told["capabilities"]
    assert has["device"]
    assert has["kernel-faults"]
    assert not has["syscall"]
    assert "seccomp filter refuses" in told["remedies"]["syscall"]


@pytest.mark.root
def test_a_seccomp_filter_without_the_device() -> None:
    """With neither, not even the limited form can be had, and nothing is known of features."""
    told = in_child(DENY_SYSCALL, BECOME_NOBODY)
    for way in ("full", "accepting", "limited"):
        assert "EPERM" in told[way][0]
        assert "--device /dev/userfaultfd" in told[way][1] or "udev" in told[way][1]
    assert "user-mode only" in told["accepting"][0]
    assert "seccomp" in told["limited"][1]
    has = told["capabilities"]
    assert not any(has[name] for name in ("userfaultfd", "user-mode-only", "move", "wp"))
    assert "see userfaultfd" in told["remedies"]["move"]
