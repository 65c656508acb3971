"""UFFDIO_API with an explanation."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator

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


@pytest.mark.root
def test_fork_events_need_privilege() -> None:
    """Without CAP_SYS_PTRACE the refusal says so."""
    program = (
        "import os\n"
        "from aiouffd.errors import NotSupported\n"
        "from aiouffd.kernel import abi, calls, gates, handshake\n"
        "fd = gates.open_userfaultfd()\n"
        "os.setuid(65534)\n"
        "try:\n"
        "    handshake.shake_hands(fd, abi.UFFD_FEATURE_EVENT_FORK)\n"
        "except NotSupported as error:\n"
        "    print(error)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=30, stdout=subprocess.PIPE
    ).stdout
    assert b"CAP_SYS_PTRACE" in output
