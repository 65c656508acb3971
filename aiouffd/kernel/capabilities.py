"""Every capability by name: whether it is there, how that is known, and how to get it.

Knows: names, first versions and remedies; how to judge what was observed.
Must not know: how anything is observed; nothing here touches the system.

Laws of this file:

* Each feature bit has a name: the kernel's in lower case with dashes (``minor-shmem``), but
  ``wp`` for PAGEFAULT_FLAG_WP.  Bits of newer kernels are ``bit-17`` and ``ioctl-9``.
* What was observed decides, never a version number: features get backported.  Versions
  only choose the words of a remedy.
* Whatever is missing says in a sentence how to get it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from . import abi
from .gates import DEVICE, SYSCALL, Attempt, Circumstances, remedy


@dataclass(frozen=True, slots=True)
class Observation:
    """What was seen of the kernel; ``capabilities`` judges it.

    Attributes:
        release: The kernel's release, such as ``6.18.44``.
        machine: Its architecture, such as ``x86_64``.
        uid: The effective user.
        circumstances: What decides who may open a userfaultfd.
        attempts: What each gate answered, in full and in user-mode-only form.
        features: What UFFDIO_API offers; None if nothing could be opened.
        ioctls: What UFFDIO_API says of the descriptor's ioctls.
        range_ioctls: The ioctls of a range, all kinds of small-page memory and modes or'ed.
        tried: What was tried for real, by capability: 0, or the errno.
        huge_pages: Free pages of the default huge size, those on demand included.
    """

    release: str
    machine: str
    uid: int
    circumstances: Circumstances
    attempts: tuple[Attempt, ...]
    features: int | None
    ioctls: int = 0
    range_ioctls: int = 0
    tried: Mapping[str, int] = field(default_factory=dict)
    huge_pages: int = 0


@dataclass(frozen=True, slots=True)
class Capability:
    """One thing that can be there or not.

    Attributes:
        name: Its name, in lower case.
        available: Whether this process can use it here and now.
        since: The first release of Linux with it; empty if that says nothing.
        about: What it is good for, in a few words.
        how: How it is known.
        remedy: If it is missing, how to get it.
    """

    name: str
    available: bool
    since: str
    about: str
    how: str
    remedy: str = ""


class _About(NamedTuple):
    since: str
    text: str
    build: str = ""  # what the kernel's build must have


_WP_BUILD: Final = "CONFIG_HAVE_ARCH_USERFAULTFD_WP (x86-64; aarch64 from 6.10)"
_MARKER_BUILD: Final = "CONFIG_PTE_MARKER_UFFD_WP (x86-64; aarch64 from 6.10)"
_MINOR_BUILD: Final = "CONFIG_HAVE_ARCH_USERFAULTFD_MINOR (64-bit x86 and aarch64)"

_GATES: Final[dict[str, _About]] = {
    "userfaultfd": _About("4.3", "a userfaultfd can be opened at all"),
    "kernel-faults": _About("4.3", "faults of system calls and KVM are served too"),
    "user-mode-only": _About("5.11", "user-mode faults only, without privilege"),
    "device": _About("6.1", f"opened through {DEVICE}"),
    "syscall": _About("4.3", "opened by the system call"),
}

_FEATURES: Final[dict[str, tuple[str, str]]] = {
    "PAGEFAULT_FLAG_WP": ("write-protect faults on anonymous memory", _WP_BUILD),
    "EVENT_FORK": ("the child's memory is served too", ""),
    "EVENT_REMAP": ("a message when memory is moved (mremap)", ""),
    "EVENT_REMOVE": ("a message when pages are dropped (madvise)", ""),
    "MISSING_HUGETLBFS": ("missing faults on huge pages", "CONFIG_HUGETLB_PAGE"),
    "MISSING_SHMEM": ("missing faults on shared memory", "CONFIG_SHMEM"),
    "EVENT_UNMAP": ("a message when memory is unmapped", ""),
    "SIGBUS": ("a signal in place of a message", ""),
    "THREAD_ID": ("who faulted", ""),
    "MINOR_HUGETLBFS": ("minor faults on huge pages", _MINOR_BUILD),
    "MINOR_SHMEM": ("minor faults on shared memory", _MINOR_BUILD),
    "EXACT_ADDRESS": ("the address within the page", ""),
    "WP_HUGETLBFS_SHMEM": ("WP faults on huge pages and shared memory", _MARKER_BUILD),
    "WP_UNPOPULATED": ("write-protecting pages that are not there yet", _MARKER_BUILD),
    "POISON": ("UFFDIO_POISON: a page that fails loudly", _MARKER_BUILD),
    "WP_ASYNC": ("write tracking without messages", _MARKER_BUILD),
    "MOVE": ("UFFDIO_MOVE: pages change place without a copy", ""),
}

_TRIED: Final[dict[str, _About]] = {
    "continue-wp": _About("6.4", "UFFDIO_CONTINUE can map a page write-protected", _MARKER_BUILD),
    "pagemap-scan": _About("6.7", "PAGEMAP_SCAN: get and clear what was written"),
    "pagemap-guard": _About("6.16", "PAGEMAP_SCAN tells guard pages"),
    "pidfd": _About("5.3", "the end of a served process is noticed"),
    "peer-pidfd": _About("6.5", "SO_PEERPIDFD: a peer is pinned without a race"),
}

_HUGETLB: Final = _About("", "free huge pages in the pool")


def feature_name(name: str) -> str:
    """Turn a feature's name in the header into the capability's."""
    return "wp" if name == "PAGEFAULT_FLAG_WP" else name.lower().replace("_", "-")


#: Every name that is always in the list, in its order; unknown bits come after these.
NAMES: Final[tuple[str, ...]] = (
    *_GATES,
    *(feature_name(name) for name in abi.FEATURES),
    *_TRIED,
    "hugetlb",
)

_BIT: Final = re.compile(r"(bit|ioctl)-(\d|[1-5]\d|6[0-3])")


def canonical(name: str) -> str | None:
    """Find the capability that a user means.

    Args:
        name: A capability's name; the header's spelling is understood too
            (``MINOR_SHMEM``, ``UFFD_FEATURE_MINOR_SHMEM``).

    Returns:
        The name as in ``NAMES`` or of an unnamed bit (``bit-17``), or None.
    """
    name = name.strip().lower().replace("_", "-").removeprefix("uffd-feature-")
    if name == "pagefault-flag-wp":
        return "wp"
    return name if name in NAMES or _BIT.fullmatch(name) else None


def _version(text: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _newer_kernel(about: _About, seen: Observation) -> str:
    if _version(seen.release) < _version(about.since):
        return f"It takes Linux {about.since} or newer; this is {seen.release}."
    build = f" with {about.build}" if about.build else ""
    return f"Linux {seen.release} should have it, but was built without: build the kernel{build}."


def _gate_remedy(seen: Observation, refused: list[Attempt]) -> str:
    texts = dict.fromkeys(remedy(attempt, seen.circumstances) for attempt in refused)
    text = "; ".join(texts)
    return text[:1].upper() + text[1:] + "." if text else ""


def _gates(seen: Observation) -> list[Capability]:
    full = [attempt for attempt in seen.attempts if not attempt.user_mode_only]
    groups = {
        "userfaultfd": list(seen.attempts),
        "kernel-faults": full,
        "user-mode-only": [attempt for attempt in seen.attempts if attempt.user_mode_only],
        "device": [attempt for attempt in full if attempt.gate == DEVICE],
        "syscall": [attempt for attempt in full if attempt.gate == SYSCALL],
    }
    result = []
    for name, attempts in groups.items():
        granted = [attempt for attempt in attempts if not attempt.errno]
        available = bool(granted)
        result.append(
            Capability(
                name,
                available,
                _GATES[name].since,
                _GATES[name].text,
                "; ".join(str(attempt) for attempt in granted[:1] or attempts) or "not tried",
                "" if available else _gate_remedy(seen, attempts),
            )
        )
    return result


def _feature(name: str, seen: Observation) -> Capability:
    bit = abi.FEATURES[name]
    text, build = _FEATURES[name]
    about = _About(abi.FEATURE_SINCE[name], text, build)
    how = f"bit {bit.bit_length() - 1} of UFFDIO_API"
    help_ = ""
    if seen.features is None:
        how, help_ = "not seen", "No userfaultfd can be opened to ask: see userfaultfd above."
    elif not seen.features & bit:
        help_ = _newer_kernel(about, seen)
    elif name == "EVENT_FORK" and (number := seen.tried.get("event-fork", 0)):
        how = f"UFFDIO_API with it: {_errno_text(number)}"
        help_ = (
            "It takes CAP_SYS_PTRACE in the initial user namespace (root, outside of one's own)."
        )
    return Capability(feature_name(name), not help_, about.since, text, how, help_)


def _errno_text(number: int) -> str:
    return f"{errno.errorcode.get(number, number)} ({os.strerror(number)})"


def _tried(name: str, about: _About, seen: Observation) -> Capability:
    number = seen.tried.get(name)
    how = "tried" if not number else f"tried: {_errno_text(number)}"
    help_ = ""
    if number is None:
        how, help_ = "not seen", "No userfaultfd can be opened to try it: see userfaultfd above."
    elif number == errno.EACCES and name.startswith("pagemap-"):
        help_ = (
            "A process that has changed its user may not read its own /proc/self/pagemap:"
            " start it as that user, or make it dumpable (PR_SET_DUMPABLE)."
        )
    elif number in (errno.EACCES, errno.EPERM):
        help_ = "This process may not: a security module or a seccomp filter refuses the call."
    elif number:
        help_ = _newer_kernel(about, seen)
    return Capability(name, not help_, about.since, about.text, how, help_)


def _unnamed(name: str, what: str, available: bool) -> Capability:
    how = f"bit {name.rpartition('-')[2]} of {what}"
    if available:
        return Capability(name, True, "", "newer than this version of aiouffd", how)
    return Capability(
        name, False, "", "unknown to this version of aiouffd", how, "It takes a newer kernel."
    )


def _bits(mask: int) -> list[int]:
    return [bit for bit in range(mask.bit_length()) if mask >> bit & 1]


def capabilities(seen: Observation) -> tuple[Capability, ...]:
    """Judge an observation.

    Args:
        seen: What was observed.

    Returns:
        One entry for each of ``NAMES``, then one for each bit without a name.
    """
    result = _gates(seen)
    result += [_feature(name, seen) for name in abi.FEATURES]
    result += [_tried(name, about, seen) for name, about in _TRIED.items()]
    huge = seen.huge_pages > 0
    result.append(
        Capability(
            "hugetlb",
            huge,
            _HUGETLB.since,
            _HUGETLB.text,
            f"{seen.huge_pages} free in /proc/meminfo and on demand",
            "" if huge else "The pool is empty: as root, `sysctl vm.nr_hugepages=64`.",
        )
    )
    new_features = (seen.features or 0) & ~abi.UFFD_API_FEATURES
    new_ioctls = (seen.ioctls | seen.range_ioctls) & ~sum(abi.IOCTL_BITS.values())
    result += [_unnamed(f"bit-{bit}", "UFFDIO_API", True) for bit in _bits(new_features)]
    result += [_unnamed(f"ioctl-{bit}", "the ioctls masks", True) for bit in _bits(new_ioctls)]
    return tuple(result)


def absent_bit(name: str) -> Capability:
    """Make the entry of an unnamed bit that this kernel lacks.

    Args:
        name: ``bit-N`` or ``ioctl-N``.
    """
    return _unnamed(name, "UFFDIO_API" if name.startswith("bit") else "the ioctls masks", False)
