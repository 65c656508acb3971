"""The threads in which large pieces are decompressed: one per CPU, for all images of a process.

Knows: threads, forks.
Must not know: what is decompressed.

More threads than CPUs would gain nothing, and each has a memory of its own to warm up (glibc's
arenas): work that wanders between them is some 10 % slower.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

_executor: ThreadPoolExecutor | None = None


def _forget_threads() -> None:
    """A child has none of its parent's threads."""
    global _executor
    _executor = None


if hasattr(os, "register_at_fork"):  # not a Unix: importing works
    os.register_at_fork(after_in_child=_forget_threads)


async def in_thread(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call a function in one of the threads.

    Cancellation: the function goes on, and what it returns is dropped.
    """
    global _executor
    if _executor is None:
        threads = len(os.sched_getaffinity(0))
        _executor = ThreadPoolExecutor(threads, thread_name_prefix="aiouffd-zstd")
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_executor, lambda: function(*args, **kwargs))
