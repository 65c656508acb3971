"""Parents: a process that is not to outlive the one that started it.

Knows: PR_SET_PDEATHSIG.
Must not know: why.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def die_with_parent(number: int) -> None:
    """Get a signal as soon as the thread ends that started this process.

    Kernel: prctl(PR_SET_PDEATHSIG), since Linux 2.1.57; it is no memory access of anybody's, so it
    comes also where every thread of ours waits for a page.

    Args:
        number: The signal; 0 is none any more.

    Raises:
        OSError: The kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number), 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
