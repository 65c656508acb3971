"""What this kernel, build, user and container allow: observed on throw-away descriptors.

Knows: how to try each thing without leaving a trace.
Must not know: what to make of the answers; ``capabilities`` judges them.

Laws of this file:

* A descriptor is used for one question and closed: UFFDIO_API succeeds once in its life.
* What carries a permission of its own (EVENT_FORK) or has no bit (CONTINUE write-protected)
  is tried for real.
* Nothing faults: memory that is registered here is never touched afterwards.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import abi, calls
from .capabilities import Capability, Observation, absent_bit, canonical, capabilities
from .gates import GATES, Attempt, Gate, open_first, open_userfaultfd, read_circumstances

__all__ = ["Capability", "Observation", "Report", "observe", "open_userfaultfd", "probe"]

_MISSING = abi.UFFDIO_REGISTER_MODE_MISSING
_WP = abi.UFFDIO_REGISTER_MODE_WP
_MINOR = abi.UFFDIO_REGISTER_MODE_MINOR


@dataclass(frozen=True, slots=True)
class Report:
    """What was observed, and what follows from it.

    Attributes:
        seen: The observation.
        capabilities: Every capability, in the order of ``capabilities.NAMES``, then the
            bits of a kernel newer than this version of aiouffd.
    """

    seen: Observation
    capabilities: tuple[Capability, ...]

    def __getitem__(self, name: str) -> Capability:
        """Look a capability up; the header's spelling is understood too.

        Raises:
            KeyError: There is no capability of that name.
        """
        known = canonical(name)
        if known is None:
            raise KeyError(name)
        for capability in self.capabilities:
            if capability.name == known:
                return capability
        return absent_bit(known)


def _number(action: Callable[[], object]) -> int:
    """Do something; give 0, or its errno."""
    try:
        action()
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _mask(fd: int, memory: mmap.mmap, mode: int) -> int:
    """Register memory and give it back: the mask of ioctls, or 0."""
    start = _address(memory)
    try:
        mask = calls.register(fd, start, len(memory), mode)
        calls.unregister(fd, start, len(memory))
    except OSError:
        return 0
    return mask


def _range_ioctls(fd: int) -> int:
    mask = 0
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    shared = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
    for flags, modes in (
        (private, (_MISSING, _MISSING | _WP)),
        (shared, (_MINOR, _MISSING | _WP | _MINOR)),
    ):
        with mmap.mmap(-1, calls.PAGE_SIZE, flags) as memory:
            for mode in modes:
                mask |= _mask(fd, memory, mode)
    return mask


def _try_continue_wp(fd: int) -> None:
    """Map a page of the page cache write-protected."""
    memfd = os.memfd_create("aiouffd-probe", os.MFD_CLOEXEC)
    try:
        os.ftruncate(memfd, calls.PAGE_SIZE)
        os.pwrite(memfd, b"\1", 0)
        with mmap.mmap(memfd, calls.PAGE_SIZE) as memory:
            start = _address(memory)
            calls.register(fd, start, calls.PAGE_SIZE, _MINOR | _WP)
            mode = abi.UFFDIO_CONTINUE_MODE_WP
            result = calls.continue_(fd, start, calls.PAGE_SIZE, mode)
            if result < 0:
                raise OSError(-result, os.strerror(-result))
    finally:
        os.close(memfd)


def _try_pagemap_scan(category: int) -> None:
    """Scan an empty range."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = abi.PM_SCAN_ARG_STRUCT.size
        calls.pagemap_scan(
            fd,
            bytearray(
                abi.PM_SCAN_ARG_STRUCT.pack(size, 0, 0, 0, 0, 0, 0, 0, 0, category, 0, category)
            ),
        )
    finally:
        os.close(fd)


def _try_pidfd() -> None:
    os.close(os.pidfd_open(os.getpid()))


def _try_peer_pidfd() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        answer = ours.getsockopt(socket.SOL_SOCKET, abi.SO_PEERPIDFD, 4)
    (fd,) = struct.unpack("=i", answer)
    os.close(fd)


def _huge_pages() -> int:
    with open("/proc/meminfo", "rb") as file:
        fields = dict(line.split(b":", 1) for line in file)
    free = int(fields.get(b"HugePages_Free", b"0")) - int(fields.get(b"HugePages_Rsvd", b"0"))
    try:
        with open("/proc/sys/vm/nr_overcommit_hugepages", "rb") as file:
            spare = int(file.read()) - int(fields.get(b"HugePages_Surp", b"0"))
    except OSError:  # no hugetlb in the kernel, or /proc/sys is hidden
        spare = 0
    return free + max(0, spare)


def observe(gates: Sequence[Gate] = GATES) -> Observation:
    """Try everything once.

    Args:
        gates: Where to open userfaultfds; every one of them is tried in both its forms.

    Raises:
        NotSupported: This is not Linux.
    """
    calls.require_linux()
    attempts: list[Attempt] = []
    usable: tuple[Gate, bool] | None = None
    for user_mode_only in (False, True):
        for gate in gates:
            fd = open_first((gate,), user_mode_only=user_mode_only, attempts=attempts)
            if fd is not None:
                os.close(fd)
                usable = usable or (gate, user_mode_only)

    tried = {
        "pagemap-scan": _number(lambda: _try_pagemap_scan(abi.PAGE_IS_WRITTEN)),
        "pagemap-guard": _number(lambda: _try_pagemap_scan(abi.PAGE_IS_GUARD)),
        "pidfd": _number(_try_pidfd),
        "peer-pidfd": _number(_try_peer_pidfd),
    }
    features: int | None = None
    ioctls = range_ioctls = 0
    if usable is not None:

        def with_fd(ask: Callable[[int], object]) -> int:
            gate, user_mode_only = usable
            fd = open_first((gate,), user_mode_only=user_mode_only, attempts=[])
            if fd is None:  # the last descriptor was taken meanwhile
                return errno.EMFILE
            try:
                return _number(lambda: ask(fd))
            finally:
                os.close(fd)

        def handshake(fd: int) -> None:
            nonlocal features, ioctls, range_ioctls
            features, ioctls = calls.api(fd, 0)
            range_ioctls = _range_ioctls(fd)

        def continue_wp(fd: int) -> None:
            calls.api(fd, 0)
            _try_continue_wp(fd)

        with_fd(handshake)
        tried["event-fork"] = with_fd(lambda fd: calls.api(fd, abi.UFFD_FEATURE_EVENT_FORK))
        tried["continue-wp"] = with_fd(continue_wp)

    system = os.uname()
    return Observation(
        release=system.release,
        machine=system.machine,
        uid=os.geteuid(),
        circumstances=read_circumstances(),
        attempts=tuple(attempts),
        features=features,
        ioctls=ioctls,
        range_ioctls=range_ioctls,
        tried=tried,
        huge_pages=_huge_pages(),
    )


def probe(gates: Sequence[Gate] = GATES) -> Report:
    """Find out what this kernel, build, user and container allow.

    Opens and closes some descriptors; takes a few milliseconds.

    Args:
        gates: Where to open userfaultfds.

    Raises:
        NotSupported: This is not Linux.

    Sharing: any thread.  What it says holds for this process with its present rights.
    """
    seen = observe(gates)
    return Report(seen, capabilities(seen))
