"""Processes that carry a key in their environment, wherever they have gone, and their end.

Knows: /proc, and that a number may be given to somebody else at any moment.
Must not know: who has started them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Collection


def end(keys: Collection[bytes]) -> None:
    """Kill every process of this user that was started with one of some keys.

    A process passes its environment on to those that it starts, unless it takes care not to.

    Args:
        keys: Bytes that nobody else has in an environment.
    """
    for name in filter(str.isdigit, os.listdir("/proc")):
        if not _has(name, keys):
            continue
        try:
            pidfd = os.pidfd_open(int(name))
        except OSError:  # gone
            continue
        try:
            if _has(name, keys):  # still: the number was not given to somebody else
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        finally:
            os.close(pidfd)


def _has(process: str, keys: Collection[bytes]) -> bool:
    try:
        with open(f"/proc/{process}/environ", "rb") as file:
            environment = file.read()
    except OSError:  # another user's, or gone
        return False
    return any(key in environment for key in keys)
