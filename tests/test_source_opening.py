"""Sources of sessions: how they are opened, and what that costs others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

from aiouffd.source_opening import SourceOpening
from aiouffd.sources import Source
from aiouffd.sources.buffer import BufferSource
from tests.serving import within


class Slow(BufferSource):
    """One whose extents take as long as somebody else wants."""

    def __init__(self) -> None:
        super().__init__(bytes(4096))
        self.asked = threading.Event()
        self.go_on = threading.Event()
        self.closed_early = False
        self.closed = False

    def extents(self) -> Iterator[tuple[int, int]]:
        self.asked.set()
        assert self.go_on.wait(20), "the loop is held"
        self.closed_early = self.closed
        yield 0, 4096

    async def aclose(self) -> None:
        self.closed = True
        await super().aclose()


class Parts:
    def __init__(self, source: Slow) -> None:
        self.source = source

    async def open_part(self, part: str) -> Source:
        assert part == "7"
        return self.source


async def test_the_extents_of_a_part_are_collected_beside_the_loop() -> None:
    """Those of a large one are many, and others are served meanwhile."""
    source = Slow()

    async def use() -> list[tuple[int, int]]:
        async with SourceOpening(Parts(source)).open("7") as (opened, extents):
            assert opened is source
            return list(extents)

    using = asyncio.create_task(use())
    while not source.asked.is_set():
        await asyncio.sleep(0.001)
    source.go_on.set()
    assert await within(using) == [(0, 4096)]
    assert source.closed


async def test_a_part_that_nobody_waits_for_is_closed_when_its_extents_are_there() -> None:
    """Not before: a file's number would be another's by then."""
    source = Slow()

    async def use() -> None:
        async with SourceOpening(Parts(source)).open("7"):
            raise AssertionError("it was cancelled")

    using = asyncio.create_task(use())
    while not source.asked.is_set():
        await asyncio.sleep(0.001)
    using.cancel()
    await asyncio.sleep(0)
    source.go_on.set()
    await within(asyncio.wait([using]))
    assert using.cancelled()
    assert source.closed
    assert not source.closed_early
