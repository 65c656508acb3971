"""UFFDIO_API and UFFDIO_REGISTER, as uffd-unit-tests.c checks them."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
from collections.abc import Callable

import pytest

from aiouffd import NotSupported, ResolutionRefused, Userfaultfd
from aiouffd.kernel import abi, calls
from tests.conformance.support import ALL, MINOR, MISSING, WP, MakeMemory, unit

_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK


def handshake(fd: int, api: int, features: int) -> tuple[int, int, int]:
    """Shake hands with any api number, which the typed call does not allow."""
    argument = bytearray(abi.UFFDIO_API_STRUCT.pack(api, features, 0))
    fcntl.ioctl(fd, abi.UFFDIO_API, argument)
    answer: tuple[int, int, int] = abi.UFFDIO_API_STRUCT.unpack(argument)
    return answer


def check_handshake(open_one: Callable[[int], int]) -> None:
    fd = open_one(_FLAGS)
    try:
        with pytest.raises(OSError) as refused:
            handshake(fd, 0xAB, 0)
        assert refused.value.errno == errno.EINVAL
        with pytest.raises(OSError) as refused:
            handshake(fd, abi.UFFD_API, 1 << 63)
        assert refused.value.errno == errno.EINVAL
        _, features, ioctls = handshake(fd, abi.UFFD_API, 0)
        assert features & abi.UFFD_FEATURE_PAGEFAULT_FLAG_WP
        assert ioctls == abi.UFFD_API_IOCTLS
        with pytest.raises(OSError) as refused:
            handshake(fd, abi.UFFD_API, 0)
        assert refused.value.errno == errno.EINVAL
    finally:
        os.close(fd)


@unit(
    "UFFDIO_API (with syscall)",
    "a wrong api number, an unknown feature and a second handshake are refused",
    on="none",
)
def test_uffdio_api_by_syscall() -> None:
    """By the system call: only API 0xAA, known features, once."""
    check_handshake(calls.open_syscall)
    with pytest.raises(NotSupported, match="63"):
        Userfaultfd.open(1 << 63)


@unit("UFFDIO_API (with /dev/userfaultfd)", "the same through the device", on="none")
def test_uffdio_api_by_device() -> None:
    """By the device: only API 0xAA, known features, once."""
    check_handshake(calls.open_device)


@unit(
    "register-ioctls",
    "all 8 sets of modes: none, and minor on anonymous memory, are EINVAL; the mask has what "
    "the modes need",
)
@ALL
def test_register_ioctls(kind: str, memory: MakeMemory) -> None:
    """Each set of modes is refused, or answers a mask with the ioctls that it needs."""
    needed = {MISSING: "COPY", WP: "WRITEPROTECT", MINOR: "CONTINUE"}
    with memory(kind, register=0) as (target, uffd):
        for chosen in itertools.product((0, MISSING), (0, WP), (0, MINOR)):
            modes = sum(chosen)
            if not modes or (kind == "anon" and modes & MINOR):
                with pytest.raises(ResolutionRefused) as refused:
                    uffd.register(target.base, target.length, modes)
                assert refused.value.errno == errno.EINVAL
                continue
            mask = uffd.register(target.base, target.length, modes)
            assert mask & abi.IOCTL_BITS["WAKE"]
            for mode, ioctl in needed.items():
                if modes & mode:
                    assert mask & abi.IOCTL_BITS[ioctl], (modes, ioctl)
            has_zeropage = bool(mask & abi.IOCTL_BITS["ZEROPAGE"])
            assert has_zeropage == (not kind.startswith("hugetlb"))
            uffd.unregister(target.base, target.length)
