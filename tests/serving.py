"""A target and the pager that serves it, for tests of the pager.

Knows: how to start one, which bytes the image has, and how to record what a pager tells.
Must not know: what a test is about.

Every page of the image holds its own number plus one in each of its words, so that a wrong,
stale or zero page is seen at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from aiouffd import (
    Copy,
    Event,
    Feature,
    Handler,
    Mode,
    PageFault,
    Pager,
    Region,
    Resolution,
    Userfaultfd,
)
from tests.targets import DEADLINE, PAGE, Target

T = TypeVar("T")

#: Every message about the layout; forks need CAP_SYS_PTRACE and are asked for by name.
LAYOUT: Final = Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP

MADV_DONTNEED: Final = 4
MADV_REMOVE: Final = 9


def image(offset: int, length: int = PAGE, page_size: int = PAGE) -> bytes:
    """The bytes of the image."""
    first = offset // page_size
    return b"".join(
        (first + number + 1).to_bytes(8, "little") * (page_size // 8)
        for number in range(length // page_size)
    )


async def from_image(fault: PageFault) -> Resolution:
    """Answer at once with the image's page."""
    return Copy(image(fault.offset, fault.length, fault.length))


@dataclass
class Record:
    """An observer that keeps all it is told, in order."""

    log: list[tuple[Any, ...]] = field(default_factory=list)

    def begin(self, fault: PageFault) -> None:
        self.log.append(("begin", fault))

    def end(self, fault: PageFault, outcome: str, elapsed_ns: int) -> None:
        assert elapsed_ns >= 0
        self.log.append(("end", fault, outcome))

    def event(self, event: Event) -> None:
        self.log.append(("event", event))

    def failure(self, fault: PageFault, error: Exception) -> None:
        self.log.append(("failure", fault, error))

    @property
    def offsets(self) -> list[int]:
        """Offsets of the faults that began."""
        return [entry[1].offset for entry in self.log if entry[0] == "begin"]

    @property
    def outcomes(self) -> list[str]:
        return [entry[2] for entry in self.log if entry[0] == "end"]

    @property
    def events(self) -> list[Event]:
        return [entry[1] for entry in self.log if entry[0] == "event"]

    @property
    def failures(self) -> list[Exception]:
        return [entry[2] for entry in self.log if entry[0] == "failure"]


class Gate:
    """A handler that waits until it is let go, and counts who came."""

    def __init__(self, answer: Handler = from_image) -> None:
        self.answer = answer
        self.faults: list[PageFault] = []
        self.cancelled: list[PageFault] = []
        self._open = asyncio.Event()

    def let_go(self) -> None:
        self._open.set()

    async def __call__(self, fault: PageFault) -> Any:
        self.faults.append(fault)
        try:
            await self._open.wait()
        except asyncio.CancelledError:
            self.cancelled.append(fault)
            raise
        return await self.answer(fault)


@dataclass
class Served:
    """A target, and the pager that serves all of its memory as one region."""

    target: Target
    uffd: Userfaultfd
    pager: Pager
    region: Region


@contextlib.asynccontextmanager
async def serving(
    handler: Handler = from_image,
    kind: str = "anon",
    pages: int = 64,
    *,
    features: int = 0,
    modes: int = Mode.MISSING,
    threads: int = 4,
    know_target: bool = True,
    grows: bool = False,
    leave_out: int = 0,
    **settings: Any,
) -> AsyncIterator[Served]:
    """Serve a target until the block ends; then every fault must have been accounted for.

    Args:
        leave_out: The first so many pages are left unregistered.
    """
    with Target(kind, pages, features=features, register=0, threads=threads) as target:
        uffd = Userfaultfd.adopt(target.take_uffd())
        if know_target:
            settings["target"] = target.pidfd
        async with Pager(uffd, **settings) as pager:
            region = pager.register(
                target.at(leave_out),
                target.length - leave_out * target.page_size,
                handler,
                modes=modes,
                page_size=target.page_size,
                offset=leave_out * target.page_size,
                grows=grows,
            )
            yield Served(target, uffd, pager, region)
            check_books(pager)
        check_books(pager)
        assert pager.in_flight == 0


def check_books(pager: Pager) -> None:
    """Every fault read has joined another, has ended, or is in flight."""
    counters = pager.counters
    assert counters.faults == counters.joined + counters.ended + pager.in_flight, counters


async def within(awaitable: Awaitable[T], seconds: float = DEADLINE) -> T:
    """Await something with the tests' deadline."""
    async with asyncio.timeout(seconds):
        return await awaitable


@contextlib.contextmanager
def unread(target: Target, pages: int = 2) -> Iterator[Callable[[], Any]]:
    """Keep a layout event of a served target from being finished, for as long as wanted.

    The first ``pages`` pages belong to a second userfaultfd that nobody reads.  An munmap
    across both makes both "changing": the kernel notifies one after the other, so that the
    pager's own answers EAGAIN while no event of it is pending.  Start the munmap inside the
    block with ``target.start_munmap``; calling what is yielded lets it go on.
    """
    _, number = target.open_uffd(Feature.EVENT_UNMAP, 0o2004000)
    with Userfaultfd.adopt(number) as other:
        other.register(target.base, pages * target.page_size)

        def read_on() -> Any:
            return other.read()

        yield read_on
