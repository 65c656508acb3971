"""A child that faults, moves its memory, faults on and frees it, as uffd-unit-tests.c has it."""

from __future__ import annotations

import pytest

from aiouffd import Copy, PageFault, Pager, Resolution, Unprotect
from tests.conformance.support import (
    ALL,
    EVENT_FORK,
    EVENT_REMAP,
    EVENT_REMOVE,
    MISSING,
    WP,
    WP_FEATURES,
    MakeMemory,
    release_advice,
    unit,
)
from tests.targets import MREMAP_FIXED, MREMAP_MAYMOVE, Target, until


class Numbers:
    """Fill each page with its number in the source, and count."""

    def __init__(self, *, protect: bool) -> None:
        self.protect = protect
        self.kinds: list[str] = []

    async def __call__(self, fault: PageFault) -> Resolution:
        self.kinds.append(fault.kind)
        if fault.wp:
            return Unprotect()
        number = fault.offset // fault.length + 1
        return Copy(number.to_bytes(8, "little") * (fault.length // 8), protect=self.protect)


async def check_child(child: Target, handler: Numbers, room: int) -> None:
    """Everything the child does; each page is missing once and, if protected, written once."""
    size, half = child.page_size, child.pages // 2
    first, last = list(range(1, half + 1)), list(range(half + 1, child.pages + 1))

    async def write_all(address: int, count: int) -> None:
        for page in range(count):
            assert await child.start_poke(address + page * size, 200 + page) == 200 + page

    assert await child.start_sweep(0, half) == first
    if handler.protect:
        await write_all(child.base, half)
    flags = MREMAP_MAYMOVE | MREMAP_FIXED
    moved = await child.call("mremap", child.base, child.length, child.length, flags, room)
    assert moved == room
    assert await child.start_words(room + half * size, size, half) == last
    if handler.protect:
        await write_all(room + half * size, half)
        assert await child.start_peek(room) == 200
    else:
        assert await child.start_words(room, size, half) == first
    assert handler.kinds.count("missing") == child.pages
    assert handler.kinds.count("wp") == (child.pages if handler.protect else 0)
    assert await child.call("madvise", room, child.length, release_advice(child)) == 0
    assert await child.start_words(room, size, child.pages) == [0] * child.pages
    assert handler.kinds.count("missing") == child.pages


@pytest.mark.parametrize(
    "protect",
    [
        pytest.param(
            False,
            id="events",
            marks=unit(
                "events",
                "FORK, REMAP and REMOVE: a child faults at the old and the new place; freed pages "
                "read zero; as many missing faults as pages",
            ),
        ),
        pytest.param(
            True,
            id="events-wp",
            marks=unit("events-wp", "the same with protected copies and a WP fault for each page"),
        ),
    ],
)
@ALL
async def test_events(kind: str, protect: bool, memory: MakeMemory) -> None:
    """Fork, remap and remove are followed: every page is filled once, freed ones are zero."""
    features = EVENT_FORK | EVENT_REMAP | EVENT_REMOVE | (WP_FEATURES if protect else 0)
    modes = MISSING | WP if protect else MISSING
    handler = Numbers(protect=protect)
    with memory(kind, features=features, register=modes) as (target, uffd):
        size = target.page_size
        room = -(-target.reserve(target.length + size) // size) * size
        async with Pager(uffd, target=target.pidfd) as pager:
            pager.register(
                target.base,
                target.length,
                handler,
                modes=modes,
                page_size=size,
                registered=True,
            )
            child = await target.fork()
            assert len(pager.children) == 1
            served = pager.children[0]
            await check_child(child, handler, room)
            assert served.counters.removed == target.pages
            # Private pages the parent faults for itself; shared ones the child has left as zeros.
            shared = kind in {"shmem", "hugetlb"}
            before = len(handler.kinds)
            assert await target.start_read(0) == (0 if shared else 1)
            assert len(handler.kinds) == before + (0 if shared else 1)
            if kind == "anon":  # it is noticed within a second or so, which once is enough
                child.kill()
                await until(lambda: not pager.children, "the child's pager ends with the child")
