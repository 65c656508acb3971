"""The server process of a run with many sessions: one Session per userfaultfd.

Knows: how to take userfaultfds from the target's socket, and what a session costs while nothing
happens.
Must not know: who measures the faults; the target does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import resource
import time
from collections.abc import Sequence

from .serving import MARK, PAGE, Target, end_of, receive, resident

SETTLE_SECONDS = 1.2  # each target is asked once whether it lives, after a second
IDLE_SECONDS = 1.0


async def serve(target: Target, options: argparse.Namespace) -> None:
    """Serve, and print what the sessions cost before the first fault."""
    from aiouffd import OwnedFd
    from aiouffd.handover import HandedRegion, Handover, Peer
    from aiouffd.kernel import abi, calls
    from aiouffd.session import Session
    from aiouffd.sources.buffer import BufferSource

    source = BufferSource(bytes([MARK]) * PAGE * (target.length // PAGE))
    by_fd: dict[int, list[HandedRegion]] = {}
    for fd, start, length in target.registrations(options.whole):
        calls.register(fd, start, length, abi.UFFDIO_REGISTER_MODE_MISSING)
        by_fd.setdefault(fd, []).append(HandedRegion(start, length, start - target.start, PAGE))
    pid = os.getppid()
    sample: dict[str, float] = {}
    async with contextlib.AsyncExitStack() as stack:
        gc.collect()
        before = resident()
        descriptors = len(os.listdir("/proc/self/fd"))
        for fd, regions in by_fd.items():
            peer = stack.enter_context(Peer(pid, 0, 0, OwnedFd(os.pidfd_open(pid))))
            handover = Handover(OwnedFd(fd), tuple(regions))
            await stack.enter_async_context(Session(handover, source, peer=peer))
        gc.collect()
        count = len(by_fd)
        sample["bytes_per_session"] = (resident() - before) / count
        descriptors = len(os.listdir("/proc/self/fd")) - descriptors
        sample["descriptors_per_session"] = 1 + descriptors / count
        if options.idle:
            sample["idle_wake_ups"] = await idle_wake_ups()
        print(json.dumps(sample), flush=True)
        target.go()
        await end_of(target)


async def idle_wake_ups() -> float:
    """Count how often this thread wakes up while nothing happens."""
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, time.sleep, SETTLE_SECONDS)
    before = switches()
    await loop.run_in_executor(None, time.sleep, IDLE_SECONDS)
    return max(switches() - before - 1, 0)  # the end of the sleep is one


def switches() -> int:
    """Say how often this thread has gone to sleep."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def main(argv: Sequence[str] | None = None) -> None:
    """Serve one target and end with it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--cpu", type=int, required=True)
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio")
    parser.add_argument("--whole", action="store_true", help="all ranges in one session")
    parser.add_argument("--idle", action="store_true", help="count wake-ups while idle, first")
    options = parser.parse_args(argv)
    os.sched_setaffinity(0, {options.cpu})
    work = serve(receive(options.socket), options)
    if options.loop == "uvloop":
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(work)
    else:
        asyncio.run(work)


if __name__ == "__main__":
    main()
