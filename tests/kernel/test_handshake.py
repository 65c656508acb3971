"""UFFDIO_API with an explanation."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from aiouffd.errors import NotSupported
from aiouffd.kernel import abi, calls, gates
from aiouffd.kernel.handshake import shake_hands


@pytest.fixture
def fd() -> Iterator[int]:
    """A userfaultfd before UFFDIO_API."""
    fd = gates.open_userfaultfd()
    yield fd
    os.close(fd)


def test_features_are_enabled(fd: int) -> None:
    """What is asked for is what the kernel says to be on."""
    shake_hands(fd, abi.UFFD_FEATURE_EVENT_REMOVE)
    assert calls.fdinfo(fd).features == abi.UFFD_FEATURE_EVENT_REMOVE


@pytest.mark.parametrize("name", abi.FEATURES)
def test_what_is_enabled_is_what_the_kernel_enabled(fd: int, name: str) -> None:
    """One feature may bring another along."""
    assert shake_hands(fd, abi.FEATURES[name]) == calls.fdinfo(fd).features


def test_other_errors_are_the_kernels_own() -> None:
    """What is no userfaultfd is not asked for its features."""
    with open(os.devnull, "rb") as file, pytest.raises(OSError) as caught:
        shake_hands(file.fileno(), 1 << 62)
    assert caught.value.errno == errno.ENOTTY


def test_a_lacking_feature_is_named_and_the_descriptor_stays_good(fd: int) -> None:
    """An unknown bit is shown by its number; asking for less then works."""
    with pytest.raises(NotSupported, match="bit 62"):
        shake_hands(fd, 1 << 62 | abi.UFFD_FEATURE_THREAD_ID)
    shake_hands(fd, abi.UFFD_FEATURE_THREAD_ID)


def test_a_second_handshake_is_einval(fd: int) -> None:
    """Where no feature is lacking the kernel's own error stays."""
    shake_hands(fd, 0)
    with pytest.raises(OSError) as caught:
        shake_hands(fd, 0)
    assert caught.value.errno == errno.EINVAL


def without_capabilities(action: Callable[[], None]) -> None:
    """Run something in a thread that has no effective capabilities."""
    libc = ctypes.CDLL(None, use_errno=True)
    failed: list[BaseException] = []

    def run() -> None:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
        nothing = (ctypes.c_uint32 * 6)()
        try:
            assert libc.capset(header, nothing) == 0
            action()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


@pytest.mark.root
def test_fork_events_need_privilege(fd: int) -> None:
    """Without CAP_SYS_PTRACE the refusal says so, and the descriptor stays good."""

    def ask() -> None:
        with pytest.raises(NotSupported, match="CAP_SYS_PTRACE"):
            shake_hands(fd, abi.UFFD_FEATURE_EVENT_FORK)
        shake_hands(fd, abi.UFFD_FEATURE_EVENT_REMAP)

    without_capabilities(ask)
    assert calls.fdinfo(fd).features == abi.UFFD_FEATURE_EVENT_REMAP
