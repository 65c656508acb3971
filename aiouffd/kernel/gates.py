"""The gates through which a userfaultfd can be had, tried in order, and what each refusal means.

Knows: the device, the system call, the user-mode-only form; who is refused by which, and why.
Must not know: features, ranges; the new descriptor is returned before UFFDIO_API.

Laws of this file:

* Gates are data: a tuple of (name, callable that takes flags and returns a descriptor).
* The device comes first, then the system call on *any* failure: containers deny the call
  and pass the device, hosts deny the device and allow the call.
* The user-mode-only form is used only if the caller accepts it: with it, every system call
  that touches a missing page fails with EFAULT.
* A refusal is never swallowed: the error names every gate, its errno and the remedy.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from ..errors import NotSupported
from . import abi, calls

Gate = tuple[str, Callable[[int], int]]

DEVICE: Final = abi.DEVICE_PATH
SYSCALL: Final = "userfaultfd(2)"

#: In the order in which they are tried.
GATES: Final[tuple[Gate, ...]] = (
    (DEVICE, calls.open_device),
    (SYSCALL, calls.open_syscall),
)

#: CAP_SYS_PTRACE in the masks of /proc/PID/status.
CAP_SYS_PTRACE: Final = 1 << 19
#: Inode of the initial user namespace (PROC_USER_INIT_INO), the same on every Linux.
INITIAL_USER_NAMESPACE: Final = 0xEFFFFFFD

#: These say that something ran out, not that something is lacking.
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What of this process and machine decides who may open a userfaultfd.

    Attributes:
        seccomp: A seccomp filter is active (``Seccomp: 2`` in /proc/self/status).
        ptrace: CAP_SYS_PTRACE is in the effective set, of whatever user namespace.
        initial_namespace: This is the initial user namespace, whose capabilities count.
        sysctl: ``vm.unprivileged_userfaultfd``; None where the kernel has no such file.
    """

    seccomp: bool
    ptrace: bool
    initial_namespace: bool
    sysctl: int | None

    @property
    def privileged(self) -> bool:
        """Whether the kernel grants this process what it keeps for CAP_SYS_PTRACE."""
        return self.ptrace and self.initial_namespace


@dataclass(frozen=True, slots=True)
class Attempt:
    """One gate that was tried.

    Attributes:
        gate: Its name.
        user_mode_only: It was asked for a userfaultfd of user-mode faults only.
        errno: What it answered; 0 for a descriptor.
    """

    gate: str
    user_mode_only: bool
    errno: int

    def __str__(self) -> str:
        form = " (user-mode only)" if self.user_mode_only else ""
        if not self.errno:
            return f"{self.gate}{form}: ok"
        name = errno.errorcode.get(self.errno, str(self.errno))
        return f"{self.gate}{form}: {name} ({os.strerror(self.errno)})"


def read_circumstances(proc: str = "/proc") -> Circumstances:
    """Read what decides who may open a userfaultfd.

    Args:
        proc: Where procfs is mounted.
    """
    # Bytes: a process that has just given up its rights may be unable to import a codec.
    with open(f"{proc}/self/status", "rb") as file:
        status = dict(line.split(b":", 1) for line in file if b":" in line)
    try:
        with open(proc + abi.UNPRIVILEGED_SYSCTL.removeprefix("/proc"), "rb") as file:
            sysctl = int(file.read())
    except OSError:  # older than 5.2, not built in, or /proc/sys is hidden
        sysctl = None
    try:
        initial = os.stat(f"{proc}/self/ns/user").st_ino == INITIAL_USER_NAMESPACE
    except OSError:  # no user namespaces in this kernel, or they are hidden: assume the best
        initial = True
    return Circumstances(
        seccomp=status.get(b"Seccomp", b"0").strip() == b"2",
        ptrace=bool(int(status.get(b"CapEff", b"0"), 16) & CAP_SYS_PTRACE),
        initial_namespace=initial,
        sysctl=sysctl,
    )


def _device_remedy(number: int) -> str:
    if number == errno.ENOENT:
        return (
            f"{DEVICE} is missing: in a container start it with `--device {DEVICE}`;"
            " on the host it takes Linux 6.1 or newer with CONFIG_USERFAULTFD"
        )
    if number == errno.EACCES:
        return (
            f"let this user open {DEVICE}: `chmod` or `chgrp` it, or write a udev rule"
            " (whoever may open it gets kernel-mode faults too)"
        )
    if number == errno.EPERM:
        return f"the device cgroup refuses {DEVICE}: start the container with `--device {DEVICE}`"
    return f"{DEVICE} is there but is not the userfaultfd device: make the node anew"


def _syscall_remedy(number: int, user_mode_only: bool, at: Circumstances) -> str:
    if number == errno.ENOSYS:
        return (
            "the kernel has no userfaultfd: it takes CONFIG_USERFAULTFD=y (Linux 4.3 or newer)"
            + (", or a seccomp filter that lets the call through" if at.seccomp else "")
        )
    if number == errno.EINVAL and user_mode_only:
        return "UFFD_USER_MODE_ONLY takes Linux 5.11 or newer"
    if number == errno.EACCES:
        return "a security module (SELinux: anon_inode create) refuses it: allow it in its policy"
    if number == errno.EPERM and at.seccomp and (user_mode_only or at.privileged):
        # The kernel itself refuses neither of the two with EPERM.
        return (
            "a seccomp filter refuses the system call: use the device (`--device"
            f" {DEVICE}` passes the default filters), or `--security-opt seccomp=unconfined`"
        )
    if number == errno.EPERM:
        ways = ["`sysctl vm.unprivileged_userfaultfd=1`"] if at.sysctl is not None else []
        ways.append(
            "CAP_SYS_PTRACE"
            if at.initial_namespace
            else "CAP_SYS_PTRACE outside of this user namespace (inside it, it does not count)"
        )
        if not user_mode_only:
            ways.append("accept user-mode faults only (user_mode_only)")
        if at.seccomp:
            ways.append("a seccomp filter that lets the call through")
        return "the system call is for the privileged: " + ", or ".join(ways)
    return "the system call failed in an unknown way: see `man 2 userfaultfd`"


def remedy(attempt: Attempt, at: Circumstances) -> str:
    """Say in a sentence how to get past a gate that refused.

    Args:
        attempt: The refusal.
        at: The circumstances under which it happened.
    """
    if attempt.gate == DEVICE:
        return _device_remedy(attempt.errno)
    return _syscall_remedy(attempt.errno, attempt.user_mode_only, at)


def open_first(
    gates: Sequence[Gate], *, user_mode_only: bool, attempts: list[Attempt]
) -> int | None:
    """Try gates in order, and note each answer.

    Args:
        gates: What to try.
        user_mode_only: Ask for user-mode faults only.
        attempts: Where each answer is appended.

    Returns:
        A close-on-exec, non-blocking descriptor, or None if every gate refused.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (abi.UFFD_USER_MODE_ONLY if user_mode_only else 0)
    for name, gate in gates:
        try:
            fd = gate(flags)
        except OSError as error:
            attempts.append(Attempt(name, user_mode_only, error.errno or errno.EIO))
        else:
            attempts.append(Attempt(name, user_mode_only, 0))
            return fd
    return None


def open_userfaultfd(
    *,
    user_mode_only: bool = False,
    allow_user_mode_only: bool = False,
    gates: Sequence[Gate] = GATES,
) -> int:
    """Open a userfaultfd through the first gate that lets us.

    Kernel: USERFAULTFD_IOC_NEW on /dev/userfaultfd, since Linux 6.1; userfaultfd(2), since 4.3.

    Args:
        user_mode_only: Ask for user-mode faults only from the start.
        allow_user_mode_only: Accept user-mode faults only if nothing better is granted.
        gates: What to try, in order.

    Returns:
        A close-on-exec, non-blocking descriptor, before UFFDIO_API.  Whether it serves
        kernel-mode faults cannot be read from it: pass ``user_mode_only`` to be sure.

    Raises:
        NotSupported: Every gate refused; each is named with its errno and its remedy.
        OSError: Descriptors or memory ran out.
    """
    calls.require_linux()
    attempts: list[Attempt] = []
    fd = open_first(gates, user_mode_only=user_mode_only, attempts=attempts)
    if fd is None and allow_user_mode_only and not user_mode_only:
        # Only the privilege check looks at the flag, and it answers EPERM.
        refused = {attempt.gate for attempt in attempts if attempt.errno == errno.EPERM}
        again = [gate for gate in gates if gate[0] in refused]
        fd = open_first(again, user_mode_only=True, attempts=attempts)
    if fd is not None:
        return fd
    for attempt in attempts:
        if attempt.errno in _EXHAUSTED:
            raise OSError(attempt.errno, os.strerror(attempt.errno), attempt.gate)
    raise refusal(attempts, read_circumstances())


def refusal(attempts: Sequence[Attempt], at: Circumstances) -> NotSupported:
    """Make one error of several refused gates.

    Args:
        attempts: What was tried, in order.
        at: The circumstances under which it happened.
    """
    tried = "; ".join(str(attempt) for attempt in attempts)
    remedies = dict.fromkeys(remedy(attempt, at) for attempt in attempts)
    return NotSupported(
        f"no userfaultfd can be opened here ({tried})",
        "Any one of these helps: " + "; ".join(remedies) + ".",
    )
