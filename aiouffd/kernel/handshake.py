"""UFFDIO_API with an explanation: which feature was refused, and what would help.

Knows: the handshake and why it fails.
Must not know: how the descriptor was opened, or what the features are for.
"""

from __future__ import annotations

import errno
import os

from ..errors import NotSupported
from . import abi, calls, gates


def shake_hands(fd: int, features: int) -> int:
    """Do UFFDIO_API, the first ioctl of a userfaultfd's life.

    Kernel: UFFDIO_API, since Linux 4.3.  It succeeds once; after a refusal the descriptor
    may try again.

    Args:
        fd: A new userfaultfd.
        features: What to enable, or'ed.

    Returns:
        What is enabled: WP_ASYNC brings WP_UNPOPULATED along.

    Raises:
        NotSupported: A feature is lacking or not permitted; names it.
        OSError: Anything else.
    """
    try:
        calls.api(fd, features)
    except OSError as error:
        if error.errno == errno.EPERM and features & abi.UFFD_FEATURE_EVENT_FORK:
            raise NotSupported(
                "feature EVENT_FORK is not permitted",
                "It takes CAP_SYS_PTRACE in the initial user namespace: run as root, or leave"
                " the feature out.",
            ) from error
        if error.errno != errno.EINVAL:
            raise
        missing = features & ~_available()
        if not missing:
            raise
        wanted = ", ".join(
            f"{name} (Linux {abi.FEATURE_SINCE[name]})" if name in abi.FEATURE_SINCE else name
            for name in abi.names(missing, abi.FEATURES)
        )
        raise NotSupported(
            f"this kernel ({os.uname().release}) lacks {wanted}",
            "Ask for fewer features, or boot a newer kernel; `aiouffd info` shows what is there.",
        ) from error
    if features & abi.UFFD_FEATURE_WP_ASYNC:
        features |= abi.UFFD_FEATURE_WP_UNPOPULATED
    return features


def _available() -> int:
    """Ask a throw-away descriptor for all features: an fd shakes hands only once."""
    probe = gates.open_userfaultfd(allow_user_mode_only=True)
    try:
        return calls.api(probe, 0)[0]
    finally:
        os.close(probe)
