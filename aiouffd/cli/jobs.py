"""Jobs that end by themselves, or are ended: by Ctrl-C, or by SIGTERM in the same way.

Knows: signals, the event loop.
Must not know: what a job does.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any


def run_job(job: Coroutine[Any, Any, int]) -> int:
    """Run a job on a loop of its own.

    Args:
        job: Gives the exit status.  SIGTERM cancels it.

    Returns:
        The exit status; after SIGTERM, 143.
    """
    try:
        return asyncio.run(_until_terminated(job))
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM


async def _until_terminated(job: Coroutine[Any, Any, int]) -> int:
    task = asyncio.ensure_future(job)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task
