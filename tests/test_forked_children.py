"""The limit of forked children: the session ends before the machine does, and sums are kept.

Real forks, and what becomes of their memory, are in test_server.py.
"""

from __future__ import annotations

import os

import pytest

from aiouffd.closing import close_pager
from aiouffd.errors import PeerError
from aiouffd.fds import OwnedFd
from aiouffd.forked_children import ForkedChildren
from aiouffd.handover import HandedRegion, Handover
from aiouffd.pager import Pager
from aiouffd.ranges import PAGE_SIZE
from aiouffd.service import Service
from aiouffd.uffd import Userfaultfd


def children_of(service: Service) -> ForkedChildren:
    """Begin without any."""
    with OwnedFd(os.memfd_create("what its target handed over")) as fd:
        handover = Handover(fd, (HandedRegion(0, PAGE_SIZE, 0, PAGE_SIZE),))
        return ForkedChildren(handover, service, "a target")


def child() -> Pager:
    """Make the pager of a child without memory."""
    return Pager(Userfaultfd.open(allow_user_mode_only=True))


async def test_more_than_can_be_refused_end_the_session() -> None:
    """So many wait to be settled at most; each is closed in the end."""
    children = children_of(Service(max_children=2))
    pagers = [child() for _ in range(2 * 2 + 64 + 1)]
    for one in pagers[:-1]:
        children.adopt(one)
        children.refuse_beyond_limit(one)
    children.adopt(pagers[-1])
    with pytest.raises(PeerError, match="forks faster than children can be refused"):
        children.refuse_beyond_limit(pagers[-1])
    await children.close(None)
    assert all(one.uffd.closed for one in pagers)


async def test_what_has_ended_is_kept_as_a_sum() -> None:
    """Its pager is forgotten with the next fork, what it did is not."""
    children = children_of(Service())
    first, second = child(), child()
    children.adopt(first)
    first.counters.faults += 3
    await close_pager(first, None, None)
    children.adopt(second)
    assert children.pagers == [second]
    assert children.past.faults == 3
    await children.close(None)
