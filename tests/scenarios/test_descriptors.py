"""No descriptor left: what waits, and what must not."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiouffd import Feature, Pager, Userfaultfd
from tests.serving import check_books, from_image
from tests.targets import Target, until


@contextmanager
def descriptors_used_up() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_fork_that_must_wait_loses_no_fault_read_before_it() -> None:
    """64 faults fill one read and the next one fails for want of a descriptor: none is lost."""
    faults = 64
    settings: dict[str, Any] = {"features": Feature.EVENT_FORK, "threads": faults + 1}
    async with Target("anon", faults, **settings) as target:
        touches = [target.start_read(page, page) for page in range(faults)]
        await until(lambda: target.fdinfo().pending == faults, "every fault is pending")
        forking = target.start_fork(faults)
        await target.in_event(faults)
        uffd = Userfaultfd.adopt(target.take_uffd())
        pager = Pager(uffd, target=target.pidfd)
        async with pager:
            pager.register(target.base, target.length, from_image, registered=True)
            with descriptors_used_up():
                # Nothing can be filled before the FORK is read, and it cannot be read.
                await until(lambda: pager.counters.parked == faults, "every fault is parked")
                assert not forking.done
                check_books(pager)
            assert [await touch for touch in touches] == list(range(1, faults + 1))
            child = await forking
            await child.ready
            assert await child.start_peek(target.base) == 1
            assert len(pager.children) == 1
