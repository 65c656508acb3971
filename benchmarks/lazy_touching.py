"""One run of LazyMemory: touch every page once, and print what a touch took.

Knows: how to time an element read.
Must not know: what it is compared with.

    python -m benchmarks.lazy_touching inline|loop asyncio|uvloop CPU PAGES
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable

from aiouffd.events import PageFault
from aiouffd.lazy_memory import LazyHandler, LazyMemory

PAGE = 4096
CONTENT = b"\x5a" * PAGE


def inline(_: PageFault) -> bytes:
    """Answer in the faulting thread."""
    return CONTENT


async def later(_: PageFault) -> bytes:
    """Answer on the loop."""
    return CONTENT


HANDLERS: dict[str, LazyHandler] = {"inline": inline, "loop": later}


def touch(view: memoryview, pages: int) -> list[int]:
    """Read a byte of each page; give the nanoseconds of each read, sorted."""
    clock = time.perf_counter_ns
    took = []
    for at in range(0, pages * PAGE, PAGE):
        before = clock()
        value = view[at]
        took.append(clock() - before)
        if value != CONTENT[0]:
            raise AssertionError(f"wrong byte at {at}")
    return sorted(took)


async def main(kind: str, pages: int) -> None:
    """Run and print."""
    async with LazyMemory(pages * PAGE, HANDLERS[kind]) as memory:
        took = await asyncio.to_thread(touch, memory.view, pages)
    print(json.dumps({"p50_ns": took[pages // 2], "p99_ns": took[pages * 99 // 100]}))


if __name__ == "__main__":
    os.sched_setaffinity(0, {int(sys.argv[3])})
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    if sys.argv[2] == "uvloop":
        import uvloop

        new_loop = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main(sys.argv[1], int(sys.argv[4])))
